"""Models of cells that all have proteins too: states are learned from all three modalities together."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import ExtraFeatures
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.networks.alignment import DISTILLATION_WEIGHT
from pyro_multivi.networks.linear_start import start_linearly
from pyro_multivi.posterior.engine.replicates import hide
from pyro_multivi.traces import evaluation_mode, measure

PROTEINS = "protein_expression"


def simulated(*sizes, stained=1.0, seed=0, n_genes=40):
    sizes = sizes or (60, 0, 0)
    return pm.simulate_multiome(sizes, n_genes=n_genes, n_regions=60, n_proteins=8, stained=stained, seed=seed)


def set_up(adata):
    return pm.MULTIVI.setup_anndata(adata, modality_key="modality", protein_expression_obsm_key=PROTEINS)


def small(adata, **choices):
    return pm.MULTIVI(adata, **{"n_hidden": 16, "n_latent": 3, **choices})


@pytest.fixture(scope="module")
def model():
    """A trained model, for tests that only read."""
    adata = simulated(200, 0, 0)
    set_up(adata)
    with torch.random.fork_rng():
        made = small(adata)
        made.train(5, progress_bar=False)
    return made


def minibatch(model, n=40):
    return model._training_table().batch(torch.arange(n))


# ---------------------------------------------------------------------- the choice


def test_cells_that_all_have_three_modalities_are_learned_together(caplog):
    adata = simulated()
    report = set_up(adata)
    assert "all cells have all three modalities: MULTIVI() learns from all three together" in str(report)
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        config = small(adata).program.config
    assert config.fully_paired
    assert config.modality_penalty == "None"
    assert "fully_paired=True, because all 60 cells have all three modalities" in caplog.text
    assert not small(adata, fully_paired=False).program.config.fully_paired


@pytest.mark.parametrize(("sizes", "stained"), [((59, 1, 0), 1.0), ((60, 0, 0), 0.5)])
def test_one_cell_that_lacks_a_modality_makes_a_mosaic(sizes, stained):
    adata = simulated(*sizes, stained=stained)
    assert "learns from all three together" not in str(set_up(adata))
    assert not small(adata).program.config.fully_paired
    with pytest.raises(ValueError, match="fully_paired=True, but .* of 60 cells lack a modality: leave it out"):
        small(adata, fully_paired=True)


@pytest.mark.parametrize("n_lacking", [1, 2])
def test_setup_tells_of_few_cells_that_make_a_mosaic(n_lacking):
    """Two of 60 are more than a fiftieth."""
    adata = simulated()
    adata.obsm[PROTEINS].iloc[:n_lacking] = 0.0
    told = "all but 1 of 60 cells have all three modalities: without these few MULTIVI() would learn from all three"
    assert (told in str(set_up(adata))) == (n_lacking == 1)


def test_rna_and_proteins_of_all_cells_are_learned_together():
    adata = simulated()[:, :40].copy()
    del adata.obs["modality"]
    report = pm.MULTIVI.setup_anndata(adata, protein_expression_obsm_key=PROTEINS)
    assert "all cells have both modalities" in str(report)
    model = small(adata)
    assert model.program.config.fully_paired
    model.train(2, progress_bar=False)
    assert np.isfinite(model.get_latent_representation(modality="protein")).all()


# ---------------------------------------------------------------------- states


def state(program, cells):
    with evaluation_mode(program):
        return program.mix(program.experts(cells, cells.design, program.encode(cells, cells.design)))


def test_the_state_is_the_average_of_all_three(model):
    program, cells = model.program, minibatch(model)
    with evaluation_mode(program):
        hidden = program.encode(cells, cells.design)
        parts = [program.rna_expert(hidden.rna), program.atac_expert(hidden.atac)]
        protein = program.modelled_extra[0]
        parts.append(protein.head(protein.encode(cells, cells.design)))
    found = state(program, cells)
    torch.testing.assert_close(found.mean, sum(loc for loc, _ in parts) / 3)
    torch.testing.assert_close(found.variance, sum(scale**2 for _, scale in parts) / 9)


@pytest.mark.parametrize("kept", [["protein"], ["expression"], ["expression", "accessibility"]], ids=str)
def test_cells_that_lack_a_modality_have_the_product_of_posteriors(model, kept):
    program, cells = model.program, minibatch(model)
    rest = cells
    for modality in (RNA, ATAC, ExtraFeatures("protein")):
        if modality.name not in kept:
            rest = hide(rest, modality)
    with evaluation_mode(program):
        alone = program.experts_alone(cells, cells.design, program.encode(cells, cells.design))
        joint = program.experts(cells, cells.design, program.encode(cells, cells.design))
    # The product of Normals over the prior's, by their natural parameters.
    variance = {name: alone[name].scale.clamp(max=1 if len(kept) > 1 else None, min=0) ** 2 for name in kept}
    precision = 1 + sum(1 / variance[name] - 1 for name in kept)
    mean = sum(alone[name].loc / variance[name] for name in kept) / precision
    found = state(program, rest)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, 1 / precision)
    for name in kept:
        assert not torch.allclose(alone[name].loc, joint[name].loc, atol=1e-3)


def test_distillation_teaches_each_modality_the_state_given_all(model):
    program, cells = model.program, minibatch(model)
    torch.manual_seed(0)
    found = measure(program, cells).training["distillation"]
    with evaluation_mode(program):
        alone = program.experts_alone(cells, cells.design, program.encode(cells, cells.design))
    joint = state(program, cells).base_dist
    each = [kl_divergence(joint, Normal(expert.loc, expert.scale)).sum() for expert in alone.values()]
    assert len(each) == 3
    assert float(found) == pytest.approx(DISTILLATION_WEIGHT * float(sum(each)), rel=1e-4)


def test_minified_cells_keep_the_state_of_proteins_alone():
    adata = simulated()
    set_up(adata)
    model = small(adata)
    model.train(2, progress_bar=False)
    before = model.get_latent_representation(modality="protein")
    model.minify_adata()
    np.testing.assert_allclose(model.get_latent_representation(modality="protein"), before, rtol=1e-5, atol=1e-6)


def test_a_query_may_lack_proteins(model):
    query = simulated(30, 15, 15, stained=0.5, seed=1)
    mapped = pm.MULTIVI.load_query_data(query, model)
    assert np.isfinite(mapped.get_latent_representation()).all()
    assert np.isfinite(mapped.get_normalized_protein_expression(return_numpy=True)).all()


def test_a_program_saved_without_its_networks_gives_those_of_all_three(model):
    state_of = model.program.state_dict()
    loaded = copy.deepcopy(model.program)
    loaded.load_state_dict({name: value for name, value in state_of.items() if ".alone_head." not in name})
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state_of[name.replace(".alone_head.", ".head.")])


# ---------------------------------------------------------------------- the linear start


def cells_of(model):
    table = model._training_table()
    return Minibatches(table, torch.arange(len(table)), batch_size=128)


def test_proteins_add_nothing_to_the_state_that_training_starts_from():
    """With them, q(z) starts at what RNA and ATAC say."""
    with_proteins = simulated(400, 0, 0, n_genes=100)
    set_up(with_proteins)
    without = with_proteins.copy()
    pm.MULTIVI.setup_anndata(without, modality_key="modality")
    found = []
    for adata in (with_proteins, without):
        made = small(adata, n_hidden=64)
        assert start_linearly(made.program, cells_of(made)) > 0
        found.append(state(made.program, minibatch(made, 400)))
    # The first layers of both start at other random weights.
    for one, other in zip(found[0].mean.T, found[1].mean.T, strict=True):
        assert np.corrcoef(one, other)[0, 1] > 0.99
    torch.testing.assert_close(found[0].stddev, found[1].stddev, rtol=0.02, atol=0.0)


def test_proteins_alone_start_at_what_they_tell_of_the_state():
    adata = simulated(400, 0, 0, n_genes=100)
    set_up(adata)
    made = small(adata, n_hidden=64)
    k = start_linearly(made.program, cells_of(made))
    assert k > 0
    cells = minibatch(made, 400)
    joint = state(made.program, cells).mean[:, :k]
    protein = made.program.modelled_extra[0]
    with evaluation_mode(made.program):
        alone = protein.expert_alone(cells, cells.design)
        values = protein.input(cells)
    design = np.column_stack([np.ones(400), values])
    linear = design @ np.linalg.lstsq(design, joint.numpy(), rcond=None)[0]
    for dimension in range(k):
        # Explained by a network of proteins at least as well as by a line.
        explained = np.corrcoef(alone.loc[:, dimension], joint[:, dimension])[0, 1]
        assert explained > 0.95 * np.corrcoef(linear[:, dimension], joint[:, dimension])[0, 1]
    torch.testing.assert_close(
        alone.scale[:, :k].square(), (1 - alone.loc[:, :k].var(0, False)).expand(400, k), rtol=1e-3, atol=1e-3
    )


def test_proteins_of_a_mosaic_start_at_the_state_of_their_own_cells():
    """Cells of every pattern, in mixed order: those without proteins, and those with nothing else, teach nothing."""
    adata = simulated(600, 0, 0, n_genes=100)
    part = np.random.default_rng(0).permutation(np.arange(600) % 3)
    adata.X = adata.X.toarray() * (part != 2)[:, None]
    adata.obs["modality"] = np.array(["paired", "paired", "protein"])[part]
    adata.obsm[PROTEINS].loc[part == 0] = 0.0
    set_up(adata)
    made = small(adata, n_hidden=64)
    k = start_linearly(made.program, cells_of(made))
    assert k > 0
    cells = minibatch(made, 600)
    with evaluation_mode(made.program):
        experts = made.program.experts(cells, cells.design, made.program.encode(cells, cells.design))
    both = part == 1
    for dimension in range(k):
        by_rna, by_protein = (experts[name].loc[both, dimension] for name in ("expression", "protein"))
        assert np.corrcoef(by_rna, by_protein)[0, 1] > 0.5
    assert not experts["protein"].loc[part == 0].any()
