"""Decoders with a last layer of their own: as references of queries, and where training fails."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

import pyro_multivi as pm
from pyro_multivi.networks.decoders import DecodedExpression
from pyro_multivi.networks.extra import Proteins
from pyro_multivi.posterior.calibration.refit import calibrated_buffers

INTERVAL = {"n_samples": 20, "return_interval": 0.9, "return_numpy": True}


@pytest.fixture(scope="module")
def adata():
    adata = pm.simulate_multiome(
        (40, 20, 20), n_genes=20, n_regions=30, n_batches=2, n_proteins=4, fragments=3.0, seed=0
    )
    keys = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "protein_expression"}
    pm.MULTIVI.setup_anndata(adata, **keys)
    return adata


@pytest.fixture
def untrained(adata):
    def make(program_class, **choices):
        return pm.MULTIVI(adata, n_hidden=8, n_latent=2, program_class=program_class, **choices)

    return make


def of_batch(adata, name):
    query = adata[:30].copy()
    query.obs["batch"] = name
    return query


def test_a_linear_decoder_is_a_reference(recipes, fitted):
    model = fitted(recipes.LinearExpression)
    adata = model.adata
    assert model.program.rna_weight_sd.any()
    for name in ("batch_0", "another"):
        mapped = pm.MULTIVI.load_query_data(of_batch(adata, name), model)
        np.testing.assert_array_equal(mapped.get_latent_representation(adata), model.get_latent_representation())
        intervals = [one.get_normalized_expression(adata, **INTERVAL) for one in (mapped, model)]
        for found, expected in zip(*intervals, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert model.transfer_labels(of_batch(adata, "another"), "cell_type").shape[0] == 30
    # Directions grow with the input of the layer: two dimensions of z, the batches, the intercept.
    before, after = (one.program.rna_weight_directions for one in (model, mapped))
    assert before.shape[1] == 2 + 2 + 1
    torch.testing.assert_close(after[:, :4], before[:, :4])
    torch.testing.assert_close(after[:, 4], before[:, 2:4].mean(1))
    torch.testing.assert_close(after[:, 5], before[:, 4])
    mapped.train(1, progress_bar=False)
    assert np.isfinite(mapped.get_normalized_expression(**INTERVAL).sd).all()


def test_a_model_that_was_not_calibrated_is_a_reference_and_a_file(recipes, untrained, adata, tmp_path):
    model = untrained(recipes.LinearExpression)
    assert model.program.rna_weight_directions.shape[1] == model.program.expression_decoder.rho.in_features + 1
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata, program_class=recipes.LinearExpression)
    loaded.is_trained = True
    for name in ("batch_0", "another"):
        mapped = pm.MULTIVI.load_query_data(of_batch(adata, name), loaded)
        assert np.isfinite(mapped.get_latent_representation()).all()


@pytest.mark.parametrize("late", [False, True])
def test_an_error_before_the_first_epoch_is_shown_and_changes_nothing(recipes, untrained, monkeypatch, late):
    """Also where the layer was put in after the model was made."""
    model = untrained(recipes.LinearExpression)
    if late:
        directions = model.program.rna_weight_directions
        model.program.rna_weight_directions = directions.new_zeros(len(directions), 9)

    def fail(*arguments):
        raise ZeroDivisionError("a mistake of one's own")

    with monkeypatch.context() as patch:
        patch.setattr(recipes.LinearExpression, "expression", fail)
        with pytest.raises(ZeroDivisionError, match="a mistake of one's own"):
            model.train(1, progress_bar=False)
    assert not model.is_trained
    assert model.program.rna_weight_directions.shape[1] == model.program.expression_decoder.rho.in_features + 1


def test_an_error_before_the_first_epoch_keeps_the_calibration(recipes, fitted, monkeypatch):
    model = fitted(recipes.LinearExpression)
    before = [buffer.clone() for buffer in calibrated_buffers(model.program)]

    def fail(*arguments):
        raise ZeroDivisionError("a mistake of one's own")

    with monkeypatch.context() as patch:
        patch.setattr(recipes.LinearExpression, "expression", fail)
        with pytest.raises(ZeroDivisionError):
            model.train(1, progress_bar=False)
    for found, expected in zip(calibrated_buffers(model.program), before, strict=True):
        torch.testing.assert_close(found, expected)


def with_last_layers(make):
    """Program whose last layers are all made by a function of their widths."""

    class OwnProteins(Proteins):
        def __init__(self, name, config):
            super().__init__(name, config)
            self.odds, self.log_ratio = (make(config.hidden, self.n_features) for _ in range(2))

    class Own(pm.MultiVIProgram):
        def __init__(self, config):
            super().__init__(config)
            expression = self.expression_decoder
            expression.rho, expression.pi = (make(config.hidden, config.n_genes) for _ in range(2))
            self.accessibility_decoder.p = make(config.hidden, config.n_regions)
            for modality in self.modelled_extra:
                self.extra[modality.name] = OwnProteins(modality.name, config)

    return Own


KINDS = {
    "low rank": lambda width, n: nn.Sequential(nn.Linear(width, 3), nn.Linear(3, n)),
    "no bias": lambda width, n: nn.Linear(width, n, bias=False),
}


@pytest.mark.parametrize(("kind", "likelihood"), [("low rank", "bernoulli"), ("no bias", "poisson")])
def test_a_last_layer_of_ones_own_keeps_its_start_and_works(kind, likelihood, untrained, adata, tmp_path, caplog):
    program_class = with_last_layers(KINDS[kind])
    caplog.set_level(logging.INFO, logger="pyro_multivi")
    model = untrained(program_class, accessibility_likelihood=likelihood)
    said = [record.message for record in caplog.records if "keeps the start" in record.message]
    assert [line.split()[2] for line in said] == ["rho", "pi", "p", "odds", "log_ratio"]
    assert all(value.any() for name, value in model.program.named_parameters() if "decoder.rho" in name)
    model.train(1, progress_bar=False)
    # Of weights that a decoder reads out there is a posterior, of others none.
    assert bool(model.program.rna_weight_sd.any()) == (kind == "no bias")
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata, program_class=program_class)
    for verb in ("get_normalized_expression", "get_accessibility_estimates", "get_normalized_protein_expression"):
        for found, again in zip(*(getattr(one, verb)(**INTERVAL) for one in (model, loaded)), strict=True):
            assert np.isfinite(found).all()
            np.testing.assert_array_equal(found, again)
    assert np.isfinite(model.get_elbo())
    assert np.isfinite(model.differential_expression(groupby="cell_type", n_samples=20)["lfc_mean"]).any()
    mapped = pm.MULTIVI.load_query_data(of_batch(adata, "another"), model)
    assert np.isfinite(mapped.get_latent_representation()).all()


class Network(nn.Module):
    """A decoder of a class of one's own, whose layers have other names."""

    def __init__(self, width, n):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 8), nn.SiLU(), nn.Linear(8, n))

    def forward(self, z, s):
        return self.layers(torch.cat([z, s.expand(*z.shape[:-1], -1)], -1))


class OwnDecoders(pm.MultiVIProgram):
    def __init__(self, config):
        super().__init__(config)
        width = config.latent + config.n_covariates
        self.expression_decoder = Network(width, config.n_genes)
        self.accessibility_decoder = Network(width, config.n_regions)

    def expression(self, z, s):
        return DecodedExpression(self.expression_decoder(self.transform(z), s).softmax(-1), None, None)

    def accessibility(self, z, s):
        return self.accessibility_decoder(self.transform(z), s).sigmoid()


@pytest.mark.parametrize("choices", [{}, {"gene_likelihood": "nb", "dispersion": "gene-cell"}])
@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson"])
def test_a_decoder_of_another_class_takes_the_place_of_ours(likelihood, choices, untrained, adata, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="pyro_multivi")
    model = untrained(OwnDecoders, accessibility_likelihood=likelihood, **choices)
    said = [record.message for record in caplog.records if "keeps the start" in record.message]
    assert [line.split()[2] for line in said] == ["rho", "p"]
    assert all("is not there" in line for line in said)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata, program_class=OwnDecoders)
    for verb in ("get_normalized_expression", "get_accessibility_estimates"):
        for found, again in zip(*(getattr(one, verb)(**INTERVAL) for one in (model, loaded)), strict=True):
            np.testing.assert_array_equal(found, again)
    mapped = pm.MULTIVI.load_query_data(of_batch(adata, "another"), model)
    assert np.isfinite(mapped.get_latent_representation()).all()
