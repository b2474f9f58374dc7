"""What belongs to a cell is kept by its name: changed objects, repeated training, comparisons."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.sparse as sp

import pyro_multivi as pm

VERBS = {
    "latent": lambda model: model.get_latent_representation(),
    "expression": lambda model: model.get_normalized_expression(),
    "impute": lambda model: model.impute(),
    "elbo": lambda model: model.get_elbo(),
    "check": lambda model: model.posterior_predictive_check(n_samples=40),
    "differential": lambda model: model.differential_expression(groupby="cell_type", n_samples=10),
    "train": lambda model: model.train(max_epochs=1, progress_bar=False),
    "minibatch": lambda model: model.minibatch([0]),
    "validation": lambda model: model.validation_indices,
}


@pytest.fixture
def adata():
    return pm.simulate_multiome((40, 10, 10), n_genes=12, n_regions=30, n_batches=2, seed=0)


@pytest.fixture
def model(adata):
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    made = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    made.train(max_epochs=1, progress_bar=False)
    return made


@pytest.mark.parametrize("verb", VERBS)
def test_a_shortened_object_is_found_out_by_every_verb(model, adata, verb):
    adata._inplace_subset_obs(np.arange(20, 60))
    with pytest.raises(
        ValueError, match="had 60 cells and have 40, cell 'cell_00' was at position 0, where 'cell_20' is now"
    ):
        VERBS[verb](model)


def change_counts(adata):
    adata.X.data[0] += 1


def log(adata):
    adata.X.data[:] = np.log1p(adata.X.data)


def move(adata):
    adata.obs["batch"] = adata.obs["batch"].to_numpy()[::-1]


def rename(adata):
    adata.obs_names = ["other", *adata.obs_names[1:]]


def reorder(adata):
    adata._inplace_subset_obs(np.arange(60)[::-1])


def rename_gene(adata):
    adata.var_names = ["other", *adata.var_names[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_counts, "their RNA counts are others in 1 of 60 cells, the first being 'cell_00'"),
        (log, "RNA values that are not a whole number"),
        (move, "their batch or covariates are others"),
        (rename, "cells have other names, cell 'cell_00' was at position 0, where 'other' is now"),
        (reorder, "they were reordered, cell 'cell_00' was at position 0, where 'cell_59' is now"),
        (rename_gene, "lacks 1 of the model's 12 genes: 'gene_00'"),
    ],
)
def test_other_changes_are_found_out(model, adata, change, message):
    change(adata)
    with pytest.raises(ValueError, match=f"changed in place since it read them: .*{message}"):
        model.get_latent_representation()


def test_what_is_no_change_is_none(model, adata):
    before = model.get_latent_representation()
    adata.obs["cluster"] = "a"
    adata.layers["log"] = adata.X.log1p()
    adata.X = sp.csc_matrix(adata.X.astype(np.float64))
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    adata._inplace_subset_var(np.arange(adata.n_vars)[::-1])
    np.testing.assert_array_equal(model.get_latent_representation(), before)


def test_a_changed_object_that_is_given_is_read_as_it_is(model, adata):
    before = model.get_latent_representation()
    held_out = {adata.obs_names[position] for position in model.validation_indices}
    adata._inplace_subset_obs(np.arange(60)[::-2])
    np.testing.assert_allclose(model.get_latent_representation(adata), before[::-2], atol=1e-6)
    left = [position for position, name in enumerate(adata.obs_names) if name in held_out]
    assert len(left) == model.posterior_predictive_check(adata, n_samples=40).n_cells


@pytest.mark.parametrize("name", ["train_indices", "validation_indices", "test_indices"])
def test_positions_of_the_split_are_copies_of_the_cells_of_now(model, adata, name):
    before = getattr(model, name).copy()
    getattr(model, name)[:] = 0
    np.testing.assert_array_equal(getattr(model, name), before)
    adata._inplace_subset_obs(np.arange(60)[::-2])
    with pytest.raises(ValueError, match="changed in place"):
        getattr(model, name)


def test_cells_once_trained_on_are_never_held_out(model, tmp_path, adata):
    first = set(model._split.train.tolist())
    with pytest.warns(UserWarning, match=r"leaves out 30 cells, of which 24 were trained on before: only the other 6"):
        model.train(max_epochs=1, train_size=0.5, progress_bar=False)
    assert len(model.validation_indices) == 6
    assert not first & set(model.validation_indices.tolist())
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", adata)
    assert loaded._split.ever_trained.tolist() == model._split.ever_trained.tolist()
    with pytest.warns(UserWarning, match="only the other 6 count"):
        loaded.train(max_epochs=1, train_size=0.7, seed=3, progress_bar=False)
    loaded.train(max_epochs=1, train_size=0.9, seed=3, progress_bar=False)  # nests: all that is left is held out
    assert not first & set(loaded.validation_indices.tolist())


@pytest.mark.parametrize("other", ["others", "some"])
def test_cells_trained_on_are_not_held_out_after_training_on_other_data(model, tmp_path, adata, other):
    first = set(adata.obs_names[model.train_indices])
    cells = adata[:20].copy()
    if other == "others":
        cells.obs_names = [f"{name}-other" for name in cells.obs_names]
    model.adata = cells
    model.train(max_epochs=1, progress_bar=False)
    model.save(tmp_path / "model")
    for back in (model, pm.MULTIVI.load(tmp_path / "model")):
        back.adata = adata
        with pytest.warns(UserWarning, match=r"leaves out 30 cells, of which 24 were trained on before"):
            back.train(max_epochs=1, train_size=0.5, seed=1, progress_bar=False)
        held_out = adata.obs_names[back.validation_indices]
        assert len(held_out) == 6
        assert first.isdisjoint(held_out)


def test_a_split_is_found_again_by_names(model, tmp_path, adata):
    model.save(tmp_path / "model")
    held_out = set(adata.obs_names[model.validation_indices])
    reordered = adata[::-1].copy()
    loaded = pm.MULTIVI.load(tmp_path / "model", reordered)
    assert set(reordered.obs_names[loaded.validation_indices]) == held_out
    others = adata.copy()
    others.obs_names = [f"{name}-other" for name in adata.obs_names]
    assert len(pm.MULTIVI.load(tmp_path / "model", others).validation_indices) == 0
    kept = json.loads((tmp_path / "model" / "model.json").read_text())
    assert kept["split"]["cell_names"] == adata.obs_names.tolist()


def test_cells_that_were_trained_on_are_not_compared_without_a_word(model, adata):
    other = pm.MULTIVI(adata, n_hidden=6, n_latent=2, gene_likelihood="nb")
    other.train(max_epochs=1, progress_bar=False)
    models = {"a": model, "b": other}
    expected = pm.compare_models(models, n_mc_samples=10)
    assert expected["n_cells"].tolist() == [6, 6]
    with pytest.warns(UserWarning, match=r"54 of the 60 cells compared were trained on by models\['a'\]"):
        pm.compare_models(models, indices=np.arange(60), n_mc_samples=10)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_region_called_like_a_gene_has_a_name_of_its_own_in_imputed_data(adata):
    adata.var_names = ["same", *adata.var_names[1:-1], "same"]
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(max_epochs=1, progress_bar=False)
    imputed = model.impute()
    assert imputed.var_names.is_unique
    assert imputed.var_names[-1] == "same (region)"


def test_other_data_may_be_put_in_place_of_the_models_own(model, adata, tmp_path, caplog):
    model.train(2, progress_bar=False)
    own, held_out = model.get_latent_representation(), model.validation_indices
    other = pm.simulate_multiome((20, 10, 10), n_genes=40, n_regions=60, n_batches=2, seed=1)
    other.obs_names = [f"other_{name}" for name in other.obs_names]
    keys = list(other.uns)
    expected = model.get_latent_representation(other)
    model.adata = other
    assert model.adata is model.adata_manager.adata is other
    assert list(other.uns) == keys
    np.testing.assert_array_equal(model.get_latent_representation(), expected)
    assert model.get_elbo() == model.get_elbo(other)
    assert "adata lacks 60 of the 60 cells of training" in caplog.text
    assert len(model.validation_indices) == 0
    model.save(tmp_path / "model")
    del other.obs["batch"]
    with pytest.raises(ValueError, match="batch_key='batch' is not in adata.obs"):
        model.adata = other
    model.adata = adata
    np.testing.assert_array_equal(model.get_latent_representation(), own)
    np.testing.assert_array_equal(model.validation_indices, held_out)
    np.testing.assert_array_equal(pm.MULTIVI.load(tmp_path / "model", adata).validation_indices, held_out)
    model.adata = adata[:30].copy()
    np.testing.assert_array_equal(model.get_latent_representation(), own[:30])
    model.train(1, progress_bar=False)
    assert not {*np.array(model.validation_indices)} & {*np.setdiff1d(np.arange(30), held_out)}


def test_scvi_tools_name_of_is_trained_can_be_set(model):
    model.is_trained_ = True
    assert model.is_trained
