"""Models of cells that all have both modalities: chosen by default, and states given one modality alone."""

from __future__ import annotations

import copy
import hashlib
import json
import logging

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch.distributions import Normal, kl_divergence

import pyro_multivi as pm
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.networks.alignment import DISTILLATION_WEIGHT
from pyro_multivi.networks.experts import seen_from_one
from pyro_multivi.posterior.engine.replicates import hide
from pyro_multivi.traces import evaluation_mode, measure

N_GENES = 40


def simulated(*sizes, seed=0):
    adata = pm.simulate_multiome(sizes or (60, 0, 0), n_genes=N_GENES, n_regions=60, seed=seed)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    return adata


def small(adata, **choices):
    return pm.MULTIVI(adata, **{"n_hidden": 8, "n_latent": 2, **choices})


def of_one_modality(adata, kept):
    """The same cells with the counts of one modality alone."""
    counts = adata.X.toarray() if sp.issparse(adata.X) else adata.X.copy()
    counts[:, slice(N_GENES, None) if kept == "expression" else slice(0, N_GENES)] = 0
    rest = adata.copy()
    rest.X, rest.obs["modality"] = counts, kept
    return rest


def checksum(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def model():
    """A model of 300 cells, for tests that only read."""
    with torch.random.fork_rng():
        made = small(simulated(300, 0, 0), n_hidden=32, n_latent=4)
        made.train(40, progress_bar=False)
    return made


# ---------------------------------------------------------------------- the choice


class OwnGuide(pm.MultiVIProgram):
    def seen(self, experts):
        return seen_from_one(experts) if self.training else experts


class OwnPrior(pm.MultiVIProgram):
    def z_prior(self, s):
        return super().z_prior(s)


@pytest.mark.parametrize(("choices", "expected"), [
    ({}, True),
    ({"fully_paired": False}, False),
    ({"modality_penalty": "Jeffreys"}, False),
    ({"modality_penalty": "Jeffreys", "fully_paired": True}, True),
    ({"mixing_weight": 4.0}, False),
    ({"contrast_weight": 2.5}, False),
    ({"program_class": OwnGuide}, False),
    ({"program_class": OwnPrior}, True),
], ids=str)  # fmt: skip
def test_the_default_is_whether_all_cells_are_paired(caplog, choices, expected):
    adata = simulated()
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        config = small(adata, **choices).program.config
    assert config.fully_paired is expected
    is_told = "fully_paired=True, because all 60 cells have both modalities" in caplog.text
    assert is_told == (expected and "fully_paired" not in choices)
    assert (config.modality_penalty == "None") == (expected and "modality_penalty" not in choices)


@pytest.mark.parametrize("sizes", [(60, 1, 0), (60, 0, 1), (60, 20, 20)])
def test_one_cell_that_lacks_a_modality_makes_a_mosaic(sizes):
    adata = simulated(*sizes)
    assert not small(adata).program.config.fully_paired
    lacking = sum(sizes[1:])
    with pytest.raises(ValueError, match=f"fully_paired=True, but {lacking} of {sum(sizes)} cells lack a modality"):
        small(adata, fully_paired=True)


@pytest.mark.parametrize("features", [slice(0, N_GENES), slice(N_GENES, None)])
def test_a_single_modality_is_not_fully_paired(features):
    adata = simulated()[:, features].copy()
    del adata.obs["modality"]
    pm.MULTIVI.setup_anndata(adata)
    assert not small(adata).program.config.fully_paired
    with pytest.raises(ValueError, match="fully_paired=True"):
        small(adata, fully_paired=True)


def test_training_refuses_other_data_with_cells_that_lack_a_modality(tmp_path):
    adata = simulated()
    model = small(adata)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", of_one_modality(adata, "expression"))
    with pytest.raises(ValueError, match="fully_paired=True, but 60 of 60 cells lack a modality.*MULTIVI"):
        loaded.train(1, progress_bar=False)


def test_a_program_with_an_expert_network_of_its_own_trains():
    class Head(torch.nn.Module):
        def __init__(self, n_hidden, n_latent):
            super().__init__()
            self.both = torch.nn.Linear(n_hidden, 2 * n_latent)

        def forward(self, state):
            loc, log_scale = self.both(state.hidden).chunk(2, -1)
            return loc, log_scale.exp()

    class Own(pm.MultiVIProgram):
        def __init__(self, config):
            super().__init__(config)
            self.rna_expert = Head(config.hidden, config.latent)

    model = small(simulated(), program_class=Own)
    assert model.program.config.fully_paired
    model.train(2, progress_bar=False)
    assert np.isfinite(model.get_latent_representation(modality="expression")).all()


# ---------------------------------------------------------------------- states given one modality


@pytest.mark.parametrize("modality", ["expression", "accessibility"])
def test_a_modality_alone_is_the_cell_without_the_other(model, modality):
    """modality= of paired cells, cells that lack the other modality, and a mosaic of both tell the same."""
    adata = model.adata
    alone = model.get_latent_representation(modality=modality)
    single = of_one_modality(adata, modality)
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(model.get_latent_representation(single), alone, **close)
    joint = model.get_latent_representation()
    # Every second cell of a mosaic lacks a modality; each cell has the state that it has among its like.
    mosaic = adata.copy()
    mosaic.X = np.where(np.arange(300)[:, None] % 2, mosaic.X.toarray(), single.X)
    mosaic.obs["modality"] = np.where(np.arange(300) % 2, "paired", modality)
    expected = np.where(np.arange(300)[:, None] % 2, joint, alone)
    np.testing.assert_allclose(model.get_latent_representation(mosaic), expected, **close)
    assert np.abs(alone - joint).mean() > 0.01


def test_hidden_counts_are_those_of_a_modality_alone(model):
    cells = next(iter(model._cells(None, np.arange(20), 20)))
    program = model.program
    with evaluation_mode(program):
        alone = program.experts_alone(cells, cells.design, program.encode(cells, cells.design))
        for hidden, kept in ((ATAC, RNA), (RNA, ATAC)):
            rest = hide(cells, hidden)
            found = program.mix(program.experts(rest, rest.design, program.encode(rest, rest.design)))
            torch.testing.assert_close(found.mean, alone[kept.name].loc)
            torch.testing.assert_close(found.stddev, alone[kept.name].scale)


def test_a_modality_alone_learns_the_state_of_both(model):
    """Share of the variance of joint states that those given one modality explain."""
    # 0.82 to 0.94 and 0.66 to 0.87 over four seeds of data and training.
    held_out = simulated(300, 0, 0, seed=0)
    joint = model.get_latent_representation(held_out)
    for modality, least in (("expression", 0.7), ("accessibility", 0.5)):
        alone = model.get_latent_representation(held_out, modality=modality)
        assert 1 - ((joint - alone) ** 2).sum() / ((joint - joint.mean(0)) ** 2).sum() > least
    divergence = np.ravel(model.history["distillation_validation"])
    assert divergence[-1] < 0.7 * divergence[0]


def test_distillation_is_a_term_of_training_that_the_elbo_hides(model):
    """Other networks of one modality alone change it, and nothing else that is said of paired cells."""
    program, cells = copy.deepcopy(model.program), next(iter(model._cells(None, np.arange(50), 50)))
    torch.manual_seed(0)
    before = measure(program, cells)
    with evaluation_mode(program):
        hidden = program.encode(cells, cells.design)
        joint = Normal(*program.averaged(program.experts(cells, cells.design, hidden)))
        alone = program.experts_alone(cells, cells.design, hidden).values()
        expected = sum(kl_divergence(joint, Normal(each.loc, each.scale)).sum() for each in alone)
        program.atac_alone_expert.loc.bias += 1.0
    assert float(before.training["distillation"]) == pytest.approx(DISTILLATION_WEIGHT * float(expected), rel=1e-4)
    torch.manual_seed(0)
    after = measure(program, cells)
    assert after.elbo == pytest.approx(before.elbo, rel=1e-12)
    assert after.training["distillation"] > before.training["distillation"]


def test_other_data_may_lack_a_modality(model):
    adata = simulated(30, 15, 15, seed=1)
    assert np.isfinite(model.get_latent_representation(adata)).all()
    assert np.isfinite(model.get_normalized_expression(adata, return_numpy=True)).all()
    assert "imputed" in model.posterior_predictive_check(n_samples=40, held_out=False).tables
    query = pm.MULTIVI.load_query_data(adata, model)
    np.testing.assert_allclose(query.get_latent_representation(), model.get_latent_representation(adata), rtol=1e-5)


def test_a_query_of_a_new_batch_trains_on_cells_that_lack_a_modality():
    reference = pm.simulate_multiome((60, 0, 0), n_genes=N_GENES, n_regions=60, seed=0)
    reference.obs["batch"] = "a"
    pm.MULTIVI.setup_anndata(reference, modality_key="modality", batch_key="batch")
    model = small(reference)
    model.train(2, progress_bar=False)
    adata = pm.simulate_multiome((20, 20, 20), n_genes=N_GENES, n_regions=60, seed=1)
    adata.obs["batch"] = "b"
    query = pm.MULTIVI.load_query_data(adata, model)
    query.train(2, progress_bar=False)
    assert np.isfinite(query.get_latent_representation()).all()


def test_minified_cells_keep_the_state_of_a_modality_alone():
    model = small(simulated())
    model.train(2, progress_bar=False)
    asked = [{"modality": name} for name in ("expression", "accessibility", "joint")]
    before = [model.get_latent_representation(**given) for given in asked]
    model.minify_adata()
    for given, expected in zip(asked, before, strict=True):
        np.testing.assert_allclose(model.get_latent_representation(**given), expected, rtol=1e-5, atol=1e-6)


def test_an_earlier_version_gave_one_modality_to_the_expert_of_both(model, tmp_path, caplog):
    """Its states given both stay; those given one modality are what they were, and a warning says so."""
    folder = tmp_path / "model"
    model.save(folder)
    state = model.program.state_dict()
    torch.save({name: value for name, value in state.items() if "_alone_expert." not in name}, folder / "weights.pt")
    description = json.loads((folder / "model.json").read_text())
    description["weights_sha256"] = checksum(folder / "weights.pt")
    (folder / "model.json").write_text(json.dumps(description))
    sums = folder / "SHA256SUMS"
    names = [line.split()[1] for line in sums.read_text().splitlines()]
    sums.write_text("".join(f"{checksum(folder / name)}  {name}\n" for name in names))
    loaded = pm.MULTIVI.load(folder, model.adata)
    assert "fully paired models learned nothing of states given one modality: do not use those" in caplog.text
    for name, value in loaded.program.state_dict().items():
        assert torch.equal(value, state[name.replace("_alone_expert.", "_expert.")])
