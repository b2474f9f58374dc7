"""Weights of the mean of the measured in what is imputed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import multinomial

from pyro_multivi import MULTIVI, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.posterior.calibration import fit_shrinkage as module
from pyro_multivi.posterior.calibration.fit_shrinkage import GRID, fit_shrinkage, log_scores, weight_of
from pyro_multivi.posterior.engine.decode import Average, decode, mean_buffers
from pyro_multivi.posterior.engine.replicates import hide
from pyro_multivi.traces import evaluation_mode


def _weights(model):
    return [float(mean_buffers(model.program, modality)[1]) for modality in MODALITIES]


@pytest.mark.parametrize("with_panels", [False, True])
@pytest.mark.parametrize("modality", MODALITIES)
def test_scores_are_those_of_a_multinomial(make_program, make_cells, modality, with_panels):
    program, cells = make_program(), make_cells((6, 0, 0))
    n_features = modality.n_features_in(program.config)
    known = np.ones((6, n_features), dtype=bool)
    if with_panels:
        known[::2, :3] = False
        panels = Panels(torch.from_numpy(known[:2]), torch.arange(6) % 2)
        counts = modality.counts_in(cells).to_dense() * torch.from_numpy(known)
        program.rna_typical.fill_(1 / 7)
        program.atac_typical.fill_(1 / 9)
        cells = cells.replace(**{modality.counts: type(modality.counts_in(cells)).from_dense(counts)})
        cells = cells.replace(**{modality.panels: panels})
    mean = torch.rand(n_features, generator=torch.Generator().manual_seed(0)) + 0.1
    found = log_scores(program, cells, modality, mean).numpy()
    with evaluation_mode(program):
        own = decode(program, hide(cells, modality), Average(), (modality.decoded,)).sites[0][modality.decoded]
        own, r = own.dense()[0].numpy(), program.region_factors().numpy()
    counts = modality.counts_in(cells).to_dense().numpy()
    if modality is ATAC:
        counts, own, mean = counts > 0, own * r, mean.numpy() * r
    expected = np.empty((6, len(GRID)))
    for n in range(6):
        for number, weight in enumerate(GRID.double().numpy()):
            rate = ((1 - weight) * own[n] + weight * np.asarray(mean)).astype(float)[known[n]]
            expected[n, number] = multinomial.logpmf(counts[n][known[n]], counts[n].sum(), rate / rate.sum())
    # But for the multinomial coefficient, which all weights share.
    np.testing.assert_allclose(found - found[:, :1], expected - expected[:, :1], atol=1e-4)


def _drawn(weight, n_cells, seed=0, n_features=30, n_counts=200, noise=0.0):
    """Scores of cells whose counts are drawn at a weight, that of each cell with some noise of its own."""
    rng = np.random.default_rng(seed)
    own, mean = rng.dirichlet(np.ones(n_features), n_cells), np.full(n_features, 1 / n_features)
    at = np.clip(weight + noise * rng.standard_normal((n_cells, 1)), 0, 1)
    counts = rng.multinomial(n_counts, (1 - at) * own + at * mean)
    grid = GRID.double().numpy()
    rates = (1 - grid[:, None, None]) * own + grid[:, None, None] * mean
    return torch.from_numpy((counts * np.log(rates.clip(1e-30))).sum(-1).T)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_the_weight_that_counts_were_drawn_at_is_found(weight):
    assert weight_of(_drawn(weight, 60)) == pytest.approx(weight, abs=0.04)


def test_without_information_the_weight_is_that_of_the_prior():
    assert weight_of(torch.zeros(20, len(GRID), dtype=torch.float64)) == pytest.approx(0.5)


def test_counts_of_a_cell_are_not_taken_for_independent():
    """Each count ten times over is no more information on cells that differ; more cells are."""
    score = _drawn(0.8, 12, noise=0.4)
    assert weight_of(10 * score) == pytest.approx(weight_of(score), abs=1e-6)
    estimates = [weight_of(_drawn(0.8, 12, seed, noise=0.4)) for seed in range(30)]
    untempered = [float(_drawn(0.8, 12, seed, noise=0.4).sum(0).softmax(0) @ GRID.double()) for seed in range(30)]
    assert np.std(estimates) < np.std(untempered)


@pytest.fixture(scope="module")
def trained():
    adata = simulate_multiome((200, 60, 60), 40, 70, n_latent=3, effect_size=2.0, differential_fraction=0.6, seed=0)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=32, n_latent=3)
    model.train(max_epochs=30, batch_size=32, lr=1e-2, progress_bar=False)
    return model


def _again(model, change):
    """Fit of a copy of a trained model, its program changed first."""
    other = copy.copy(model)
    other.program = copy.deepcopy(model.program)
    with torch.no_grad():
        change(other.program)
    parts = (Minibatches(model._training_table(), part) for part in (model._split.train, model._split.validation))
    fit_shrinkage(other.program, *parts)
    return other


def test_a_mean_is_that_of_the_measured_cells(trained):
    program, table = trained.program, trained._training_table()
    x, y = table.x.to_dense()[table.has_rna], table.y.to_dense()[table.has_atac] > 0
    share = (x.sum(0) + 0.5) / (x.sum() + 0.5 * x.shape[1])
    torch.testing.assert_close(program.rna_mean, share, rtol=1e-4, atol=1e-7)
    counted = y.sum(0) + 0.5
    with evaluation_mode(program):
        measured = trained.minibatch(np.flatnonzero(table.has_atac))
        p = decode(program, measured, Average(), ("p",)).sites[0]["p"].dense()[0]
        r = program.region_factors()
    torch.testing.assert_close(program.atac_mean * r / (program.atac_mean @ r), counted / counted.sum())
    # On the level of what is decoded, up to the choice of cells that tells it.
    assert float(program.atac_mean @ r / (p @ r).mean()) == pytest.approx(1.0, abs=0.05)


def test_what_the_other_modality_tells_is_kept_and_what_it_does_not_is_not(trained):
    """Simulated types: hardly any weight. An encoder that reads other genes: what it says is not believed."""

    def weights_if_scrambled(seed):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))

        def scrambled(program):
            program.rna_first_layer.counts.weight.copy_(program.rna_first_layer.counts.weight[order])

        return _weights(_again(trained, scrambled))

    rna, atac = np.transpose([weights_if_scrambled(seed) for seed in range(4)])
    # Over seeds and versions of torch 0.01 to 0.07, and 0.65 to 0.88.
    assert all(weight < 0.25 for weight in _weights(trained))
    assert np.median(atac) > 0.5
    np.testing.assert_allclose(rna, _weights(trained)[0], atol=1e-6)  # its encoder is as it was


def test_estimates_of_cells_without_the_modality_are_drawn_towards_the_mean(trained):
    other = _again(trained, lambda _: None)
    program = other.program
    lacks = {modality: ~modality.measured_in(other._training_table()).numpy() for modality in MODALITIES}
    calls = {
        RNA: lambda **more: other.get_normalized_expression(return_numpy=True, **more),
        ATAC: lambda **more: other.get_accessibility_estimates(return_numpy=True, **more),
    }
    plain = {}
    for modality, call in calls.items():
        mean, weight = mean_buffers(program, modality)
        weight.zero_()
        plain[modality] = call(), call(n_samples=4), call(n_samples=40, return_interval=0.9)
        weight.fill_(0.4)
        mean[0] = 5.0  # more than a probability
    for modality, call in calls.items():
        mean = mean_buffers(program, modality)[0].numpy()
        one, several, interval = plain[modality]
        for found, before in ((call(), one), (call(n_samples=4), several)):
            expected = np.where(lacks[modality][:, None], 0.6 * before + 0.4 * mean, before)
            expected = np.minimum(expected, 1.0) if modality is ATAC else expected
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
            whole = call(**{modality.list_argument: [7, 0]})
            np.testing.assert_allclose(whole, call()[:, [7, 0]], rtol=1e-5)
        # What is made of draws is that of the model.
        for found, before in zip(call(n_samples=40, return_interval=0.9), interval, strict=True):
            np.testing.assert_array_equal(found, before)
    detected = other.get_accessibility_estimates(normalize_cells=True, normalize_regions=True, return_numpy=True)
    assert detected.max() <= 1
    filled = other.impute(measured_too=True).layers["imputed"].toarray()
    np.testing.assert_allclose(filled[:, :40], calls[RNA](), rtol=1e-5, atol=1e-6)


def _trained(n, **arguments):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return model


def test_without_enough_held_out_pairs_nothing_is_fitted():
    one = {"train_size": 0.9, "validation_size": 0.005}
    for n, arguments in (((200, 0, 0), one), ((200, 0, 0), {"train_size": 1.0}), ((0, 60, 60), {})):
        model = _trained(n, **arguments)
        assert _weights(model) == [0.0, 0.0]
        assert not model.program.rna_mean.any()


def test_two_held_out_pairs_are_enough():
    model = _trained((200, 0, 0), train_size=0.9, validation_size=0.01)
    assert len(model.validation_indices) == 2
    assert all(0 < weight < 1 for weight in _weights(model))


def test_a_modality_without_training_cells_is_left_out():
    adata = simulate_multiome((20, 10, 10), 20, 30, seed=0)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    for only in ("expression", "accessibility"):
        model, trained = MULTIVI(adata, n_hidden=4, n_latent=2), adata.obs["modality"] == only
        model.train(1, progress_bar=False, external_indexing=[trained, ~trained])
        rna, atac = _weights(model)
        assert (rna > 0, atac > 0) == (only == "expression", only == "accessibility")
        assert np.isfinite(model.get_normalized_expression(return_numpy=True)).all()
        assert np.isfinite(model.get_accessibility_estimates(return_numpy=True)).all()


def test_going_on_fits_anew_and_models_of_earlier_versions_have_no_weight():
    model = _trained((200, 0, 0))
    assert min(_weights(model)) > 0
    seen = []
    model.train(max_epochs=1, progress_bar=False, callbacks=[lambda *_: seen.append(_weights(model)) and False])
    assert seen == [[0.0, 0.0]]
    assert min(_weights(model)) > 0
    old = {
        name: value
        for name, value in model.program.state_dict().items()
        if not name.startswith(("rna_mean", "atac_mean"))
    }
    program = copy.deepcopy(model.program)
    program.load_state_dict(old)
    assert not program.rna_mean_weight.any()
    assert not program.atac_mean.any()


def test_an_interrupted_fit_leaves_a_usable_model(monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "log_scores", interrupted)
    model = _trained((200, 0, 0))
    assert model.is_trained
    assert _weights(model) == [0.0, 0.0]
    assert "interrupted after training: what is imputed is not drawn towards the mean" in caplog.text
