"""Decoders with a last layer of their own: as references of queries, and where training fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.modality import RNA
from pyro_multivi.posterior.calibration.refit import calibrated_buffers
from pyro_multivi.posterior.engine.weight_posterior import weight_buffers

INTERVAL = {"n_samples": 20, "return_interval": 0.9, "return_numpy": True}


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
    mapped.train(1, progress_bar=False)
    assert np.isfinite(mapped.get_normalized_expression(**INTERVAL).sd).all()


def test_directions_grow_with_the_input_of_the_layer(recipes, fitted):
    model = fitted(recipes.LinearExpression)
    before, after = (
        one.program.rna_weight_directions
        for one in (model, pm.MULTIVI.load_query_data(of_batch(model.adata, "another"), model))
    )
    # Two dimensions of z, the batches, the intercept.
    assert before.shape[1] == 2 + 2 + 1
    torch.testing.assert_close(after[:, :4], before[:, :4])
    torch.testing.assert_close(after[:, 4], before[:, 2:4].mean(1))
    torch.testing.assert_close(after[:, 5], before[:, 4])


def test_a_model_that_was_not_calibrated_is_a_reference_and_a_file(recipes, fitted, tmp_path):
    adata = fitted(recipes.LinearExpression).adata
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2, program_class=recipes.LinearExpression)
    assert model.program.rna_weight_directions.shape[1] == model.program.expression_decoder.rho.in_features + 1
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata, program_class=recipes.LinearExpression)
    loaded.is_trained = True
    for name in ("batch_0", "another"):
        mapped = pm.MULTIVI.load_query_data(of_batch(adata, name), loaded)
        assert np.isfinite(mapped.get_latent_representation()).all()


@pytest.mark.parametrize("late", [False, True])
def test_an_error_before_the_first_epoch_is_shown_and_changes_nothing(recipes, fitted, monkeypatch, late):
    """Also where the layer was put in after the model was made."""
    adata = fitted(pm.MultiVIProgram).adata
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2, program_class=recipes.LinearExpression)
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
    model.train(1, progress_bar=False)
    assert weight_buffers(model.program, RNA)[1].any()


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
