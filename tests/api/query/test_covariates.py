"""Continuous covariates of other cells: values that the model's data had in no cell."""

from __future__ import annotations

import numpy as np
import pytest

import pyro_multivi as pm


@pytest.fixture(scope="module")
def adata():
    made = pm.simulate_multiome((60, 20, 20), n_genes=12, n_regions=14, n_batches=2, seed=0)
    made.obs["age"] = 18_000.0
    made.obs["dose"] = np.random.default_rng(0).normal(40.0, 10.0, len(made))
    return made


@pytest.fixture(scope="module")
def model(adata):
    keys = ["age", "dose"]
    report = pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", continuous_covariate_keys=keys)
    assert "age: 1.8e+04 in all cells, without effect" in repr(report)
    found = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    found.train(2, progress_bar=False)
    return found


def cells_with(adata, **values):
    cells = adata[:40].copy()
    for name, value in values.items():
        cells.obs[name] = value
    return cells


def test_what_was_constant_has_no_effect_in_other_cells(adata, model):
    expected = model.get_normalized_expression(indices=range(40), return_numpy=True)
    with pytest.warns(UserWarning, match="'age' was 18000 in all cells of the model's data, and is not in 40 of these"):
        found = model.get_normalized_expression(adata=cells_with(adata, age=20_000.0), return_numpy=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(model.get_normalized_expression(adata=cells_with(adata), return_numpy=True), expected)


def test_nor_in_a_query(adata, model, tmp_path):
    model.save(tmp_path / "model")
    batch = "new"
    with pytest.warns(UserWarning, match="its effect is not known, and other values have none here"):
        found = pm.MULTIVI.load_query_data(cells_with(adata, age=20_000.0, batch=batch), tmp_path / "model")
    same = pm.MULTIVI.load_query_data(cells_with(adata, batch=batch), model)
    np.testing.assert_array_equal(
        found.get_accessibility_estimates(return_numpy=True), same.get_accessibility_estimates(return_numpy=True)
    )


def test_values_far_from_those_of_the_model_are_told(adata, model):
    far = cells_with(adata, dose=4000.0)
    with pytest.warns(UserWarning, match=r"'dose' lies more than 5 standard .* \(4.*, sd .*\) in 40 of these 40 cells"):
        model.get_latent_representation(adata=far)
    with pytest.warns(UserWarning, match="Is it in the same unit"):
        pm.MULTIVI.load_query_data(far, model)
    # A few are far in many a covariate: of the model's own cells, too.
    few = cells_with(adata)
    few.obs.iloc[:3, few.obs.columns.get_loc("dose")] = 4000.0
    model.get_latent_representation(adata=few)
