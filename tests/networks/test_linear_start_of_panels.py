"""Start of training from a linear model where cells were measured with different panels of features."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.networks.linear_start import start, start_linearly
from pyro_multivi.networks.linear_start.components import components
from pyro_multivi.networks.linear_start.weights import effects_on_means


def measured_in_part(seed, strength=0.25, n=600, n_features=400):
    """Low-rank signal, depth, a shift of each panel and noise, of two panels that share half of the features."""
    rng = np.random.default_rng(seed)
    state, depth = rng.standard_normal((n, 3)), np.exp(rng.normal(6, 0.8, n))
    panel = rng.integers(0, 2, n)
    x = 4 + strength * state @ rng.standard_normal((3, n_features)) + rng.standard_normal((n, n_features))
    x += 0.5 * np.log(depth)[:, None] + rng.standard_normal((2, n_features))[panel]
    measured = np.ones((2, n_features), dtype=bool)
    measured[0, : n_features // 4] = measured[1, -n_features // 4 :] = False
    return sp.csr_array(x * measured[panel]), state, depth, panel, measured


@pytest.mark.parametrize("seed", range(3))
def test_components_are_those_of_what_was_measured(seed):
    x, state, depth, panel, measured = measured_in_part(seed)
    batch = np.eye(2)[panel]
    found = components(x, depth, batch, 10, measured, panel)
    assert len(found.signal) == 3
    one, other = panel == 0, panel == 1
    mapping = np.linalg.lstsq(found.scores[one], state[one], rcond=None)[0]
    for cells in (one, other):
        # The map of the first panel holds for the second, whose scores are neither shifted nor smaller.
        centred = state[cells] - state[cells].mean(0)
        share = 1 - ((centred - found.scores[cells] @ mapping) ** 2).mean(0) / centred.var(0)
        # 0.89 to 0.95 over ten seeds.
        assert share.min() > 0.8
    # What was not measured says nothing, whatever the panel lacks.
    noise = components(measured_in_part(seed, 0.0)[0], depth, batch, 10, measured, panel)
    assert not noise.signal.size


def test_one_panel_of_all_features_is_no_panel():
    x, _, depth, *_ = measured_in_part(0)
    whole = components(x, depth, np.ones((600, 1)), 5)
    given = components(x, depth, np.ones((600, 1)), 5, np.ones((1, 400), dtype=bool), np.zeros(600, dtype=int))
    for one, other in zip(whole, given, strict=True):
        np.testing.assert_array_equal(one, other)


def union_of(sizes, seed=0, **options):
    """A model of two samples of which each lacks a quarter of the genes and regions, and the cells as simulated."""
    whole = pm.simulate_multiome(sizes, n_genes=200, n_regions=300, n_batches=2, seed=seed)
    genes, regions = whole.var_names[:200], whole.var_names[200:]
    lacking = {"batch_0": [*genes[:50], *regions[:75]], "batch_1": [*genes[150:], *regions[225:]]}
    samples = {
        batch: whole[whole.obs["batch"] == batch, ~whole.var_names.isin(lost)].copy() for batch, lost in lacking.items()
    }
    joined = pm.join_samples(samples, features="union", sample_key="batch")
    pm.MULTIVI.setup_anndata(joined, batch_key="batch", modality_key="modality")
    return pm.MULTIVI(joined, **options), whole[joined.obs_names], lacking


def cells_of(model):
    table = model._training_table()
    return Minibatches(table, torch.arange(len(table)), batch_size=128)


@pytest.mark.parametrize("options", [{}, {"latent_distribution": "ln"}], ids=["normal", "softmax of z"])
def test_an_untrained_model_of_a_union_knows_the_state(options):
    model, whole, lacking = union_of((400, 0, 0), fully_paired=True, **options)
    model.is_trained = True
    k = start_linearly(model.program, cells_of(model))
    assert 3 <= k <= 12
    true, z = whole.obsm["true_z"].astype(float), model.get_latent_representation()[:, :k]
    batch = model.adata.obs["batch"].to_numpy()
    one, other = batch == "batch_0", batch == "batch_1"
    mapping = np.linalg.lstsq(z[one] - z[one].mean(0), true[one] - true[one].mean(0), rcond=None)[0]
    for cells in (one, other):
        centred = true[cells] - true[cells].mean(0)
        fitted = (z[cells] - z[one].mean(0)) @ mapping
        # Over five seeds 0.69 to 0.87, and 0.61 to 0.77 with a softmax.
        assert 1 - ((centred - fitted) ** 2).mean() / centred.var(0).mean() > 0.5
    # Also of genes that a cell's sample lacks.
    differential = whole.var["is_differential"].to_numpy()[:200]
    for cells, lost in ((one, lacking["batch_0"]), (other, lacking["batch_1"])):
        genes = differential & whole.var_names[:200].isin(lost)
        found = model.get_normalized_expression(indices=cells, gene_list=list(whole.var_names[:200][genes]))
        truth = whole.obsm["true_rho"][cells][:, genes]
        columns = zip(np.log(found.to_numpy()).T, np.log(truth).T, strict=True)
        # Over five seeds 0.57 to 0.88, and 0.51 to 0.83 with a softmax.
        assert np.mean([np.corrcoef(*pair)[0, 1] for pair in columns]) > 0.4


def test_effects_come_from_the_cells_that_measured_a_feature(monkeypatch):
    model, *_ = union_of((200, 0, 0), fully_paired=True)
    parts = []
    monkeypatch.setattr(start, "_start", lambda _, __, of_modalities, design: parts.extend(of_modalities) or 0)
    start_linearly(model.program, cells_of(model))
    rng = np.random.default_rng(0)
    for part in parts:
        n, n_features = part.counts.shape
        mean, covariance, group = rng.standard_normal((n, 2)), np.tile(0.1 * np.eye(2), (n, 1, 1)), part.panel
        effects = start._effects(model.program, part, group, mean, covariance)
        theta = start._inverse_dispersion(model.program, part)
        numbers = set()
        for feature in range(0, n_features, 20):
            cells = np.flatnonzero(part.measured[part.panel, feature])
            numbers.add(len(cells))
            counts = part.counts[cells][:, [feature]]
            of_cells = part.depth[cells], group[cells], mean[cells], covariance[cells]
            alone = effects_on_means(counts, *of_cells, np.array([1 + counts.mean() / theta[feature]]))
            np.testing.assert_allclose(effects[feature], alone[0])
        assert numbers == {n, *np.bincount(part.panel)}


def test_regions_without_a_count_have_no_effects():
    adata = pm.simulate_multiome((100, 0, 0), n_genes=50, n_regions=30, seed=0)
    counts = adata.X.toarray()
    counts[:, 50:] = 0
    adata.X = sp.csr_matrix(counts)
    with pytest.warns(UserWarning, match="no count"):
        pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=16, n_latent=4)
    assert start_linearly(model.program, cells_of(model)) > 0
    assert not model.program.accessibility_decoder.p.weight.any()
    model.train(1, progress_bar=False)
