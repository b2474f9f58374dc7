"""max_epochs=0: the model of the linear start, calibrated and ready."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity
from pyro_multivi.training.optimizer import loadings


@pytest.fixture(scope="module")
def adata():
    adata = pm.simulate_multiome((120, 60, 60), n_genes=60, n_regions=120, n_batches=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def model(adata):
    model = pm.MULTIVI(adata, n_hidden=16, n_latent=4)
    model.train(max_epochs=0, progress_bar=False)
    return model


def test_the_linear_model_is_ready_calibrated_and_saved(model, adata, tmp_path):
    assert model.is_trained
    assert model.history == {}
    assert "trained 0 epochs" in model._history.ending
    assert ": max_epochs is 0;" in model._history.ending
    assert len(model.train_indices) == 216
    assert len(model.validation_indices) == 24
    assert bool(model.program.expression_decoder.rho.weight.any())
    assert bool(model.program.accessibility_decoder.p.weight.any())
    # Calibrations after training ran: depths of one modality follow from the other.
    assert bool(model.program.atac_depth_regression.any())
    latent = model.get_latent_representation()
    types = adata.obs["cell_type"].astype(str)
    by_chance = types.value_counts(normalize=True).pow(2).sum()
    assert neighbour_purity(np.asarray(latent), types.tolist(), 10) > 1.5 * by_chance
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata)
    assert loaded.is_trained
    assert loaded.history == {}
    np.testing.assert_array_equal(loaded.get_latent_representation(), latent)
    assert "0 epochs on 216 cells, 24 held out" in str(pm.describe(tmp_path / "model"))
    loaded.train(max_epochs=1, progress_bar=False)
    assert len(loaded.history["elbo_train"]) == 1
    np.testing.assert_array_equal(loaded.train_indices, model.train_indices)


def test_what_was_learned_stays(build, train, learned):
    model = train(build(), 2)
    before, n_epochs = learned(model.program), len(model.history["train_loss"])
    last = {name: value.clone() for name, value in loadings(model.program).items()}
    model.train(max_epochs=0, progress_bar=False)
    assert len(model.history["train_loss"]) == n_epochs
    after = learned(model.program)
    # The last layers alone are fitted once more, as at the end of every training.
    fitted = {*last, *(name.replace("weight", "bias") for name in last)}
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name not in fitted)


def test_a_query_stays_as_it_is(model, adata, recwarn):
    query = adata[:40].copy()
    query.obs["batch"] = "new"
    mapped = pm.MULTIVI.load_query_data(query, model, freeze_expression=False)
    before = {name: value.clone() for name, value in mapped.program.state_dict().items()}
    mapped.train(max_epochs=0, progress_bar=False)
    assert mapped.is_trained
    assert all(torch.equal(value, before[name]) for name, value in mapped.program.state_dict().items())


def test_too_few_cells_for_a_linear_model_are_told():
    adata = pm.simulate_multiome((30, 0, 0), n_genes=20, n_regions=30, seed=0)
    pm.MULTIVI.setup_anndata(adata)
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    with pytest.warns(UserWarning, match="max_epochs=0 leaves a model whose expression and accessibility do not"):
        model.train(max_epochs=0, progress_bar=False)
    assert model.is_trained
