"""Covariates of other cells: values that the model's data had in no cell, and new categories."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

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


class OwnProgram(pm.MultiVIProgram):
    """As that of the package, of another class."""


class LinearExpression(pm.MultiVIProgram):
    """The linear decoder of tutorials/recipes.md: its last layer sees z and the design."""

    class Stack(nn.Module):
        def forward(self, z, s):
            return torch.cat([z, s.expand(*z.shape[:-1], -1)], -1)

    def __init__(self, config):
        super().__init__(config)
        self.expression_decoder.stack = self.Stack()
        self.expression_decoder.rho = nn.Linear(config.latent + config.n_covariates, config.n_genes)


@pytest.mark.parametrize("kind", [OwnProgram, LinearExpression])
def test_a_new_batch_and_a_new_category_for_a_program_of_ones_own_with_one_batch(adata, kind):
    donors = adata[:60].copy()
    donors.obs["donor"] = np.where(np.arange(60) % 2, "a", "b")
    donors.obs["batch"] = "batch_0"
    pm.MULTIVI.setup_anndata(donors, modality_key="modality", batch_key="batch", categorical_covariate_keys=["donor"])
    model = pm.MULTIVI(donors, n_hidden=6, n_latent=2, gene_likelihood="nb", program_class=kind)
    model.train(2, progress_bar=False)
    query = donors[:20].copy()
    query.obs["batch"], query.obs["donor"] = "batch_1", "c"
    mapped = pm.MULTIVI.load_query_data(query, model)
    assert mapped.program.partly_trained["accessibility_decoder.p.weight"] == (1, [7])
    found, expected = (each.get_normalized_expression(donors, return_numpy=True) for each in (mapped, model))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
