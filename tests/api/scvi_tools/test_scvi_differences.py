"""Rows of the table in tutorials/from_scvi_tools.md: the same call, another meaning, each as the table says."""

from __future__ import annotations

import anndata
import numpy as np
import pytest

import pyro_multivi as scvi
from pyro_multivi.model import MULTIVI


@pytest.fixture(scope="module")
def world():
    adata = scvi.simulate_multiome((60, 15, 15), 20, 30, n_batches=2, n_types=2, seed=0)
    adata.obs["flag"] = adata.obs["batch"] == "batch_1"
    MULTIVI.setup_anndata(adata, batch_key="flag", modality_key="modality")
    model = MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(2, enable_progress_bar=False)
    return adata, model


def test_the_warning_of_save_best_says_which_weights_are_kept(world):
    model = MULTIVI(world[0], n_hidden=4, n_latent=1)
    with pytest.warns(UserWarning, match="save_best=False: where cells are held out the weights of the epoch best for"):
        # Nothing is learned, so that no epoch is better than the first.
        model.train(
            4, lr=0, early_stopping=False, early_stopping_monitor="kl_z_validation", save_best=False, progress_bar=False
        )
    best = model.history["kl_z_validation"]["kl_z_validation"].idxmin()
    assert best < 3
    assert f"weights are those of epoch {best + 1}, the best" in model._history.ending


def test_epochs_of_the_warm_up_count_for_early_stopping(world):
    model = MULTIVI(world[0], n_hidden=4, n_latent=1)
    options = {"early_stopping_patience": 1, "early_stopping_min_delta": 1e6, "n_epochs_kl_warmup": 50}
    with pytest.warns(UserWarning, match="warmup_epochs=9: early_stopping_patience counts from the first scored epoch"):
        model.train(4, early_stopping_warmup_epochs=9, progress_bar=False, **options)
    assert len(model.history["elbo_validation"]) == 2


def test_effects_of_accessibility_are_group_1_minus_group_2(world):
    table = world[1].differential_accessibility(groupby="cell_type", group1="type_0", group2="type_1", n_samples=50)
    np.testing.assert_allclose(table["effect_size"], table["est_prob1"] - table["est_prob2"], atol=1e-6)
    np.testing.assert_allclose(table["emp_effect"], table["emp_prob1"] - table["emp_prob2"], atol=1e-6)


def test_draws_depend_on_their_seed_alone(world):
    model = world[1]
    scvi.settings.seed = 7  # of models made from here on
    draws = [model.get_latent_representation(give_mean=False, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    assert model.get_elbo() == model.get_elbo().item()
    assert model.get_reconstruction_error()["reconstruction_loss_expression"].item() > 0
    marginal, error = model.get_marginal_ll(n_mc_samples=3, return_se=True)
    assert (marginal.ndim, error.ndim) == (0, 0)
    assert marginal.item() == model.get_marginal_ll(n_mc_samples=3)


def test_depths_are_counts_and_nan_where_not_measured(world):
    adata, model = world
    sizes = model.get_library_size_factors()
    has_rna = (adata.obs["modality"] != "accessibility").to_numpy()
    assert np.median(sizes["expression"][has_rna]) > 20
    assert np.isnan(sizes["expression"][~has_rna]).all()


def test_lists_of_features_keep_their_order_and_are_known(world):
    model = world[1]
    both = model.get_normalized_expression(return_numpy=True)
    found = model.get_normalized_expression(gene_list=["gene_07", "gene_03"], return_numpy=True)
    np.testing.assert_allclose(found, both[:, [7, 3]], rtol=1e-5)
    with pytest.raises(ValueError, match="gene_list holds 'nope': no gene of the model"):
        model.get_normalized_expression(gene_list=["gene_07", "nope"], return_numpy=True)


def test_rows_are_the_cells_asked_for_whatever_n_samples_overall(world):
    assert world[1].get_normalized_expression(indices=[4, 2], n_samples_overall=9).shape == (2, 20)


def test_batches_by_truth_value_and_the_mean_over_several(world):
    model = world[1]
    one = model.get_normalized_accessibility(transform_batch=True, return_numpy=True)
    other = model.get_normalized_accessibility(transform_batch="False", return_numpy=True)
    mean = model.get_normalized_accessibility(transform_batch=["True", "False"], return_numpy=True)
    np.testing.assert_allclose(mean, (one + other) / 2, rtol=1e-5, atol=1e-6)


def test_an_object_with_more_features_than_the_model(world, tmp_path):
    adata, model = world
    other = adata[:, :2].copy()
    other.var_names = ["other_0", "other_1"]
    wide = anndata.concat([adata, other], axis=1, merge="first", uns_merge="first")
    model.save(tmp_path / "model")
    loaded = MULTIVI.load(tmp_path / "model", wide)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_an_adversary_with_nothing_to_mix(world):
    paired = world[0][world[0].obs["modality"] == "paired"].copy()
    MULTIVI.setup_anndata(paired, batch_key="flag")
    model = MULTIVI(paired, n_hidden=4, n_latent=2)
    with pytest.warns(UserWarning, match="adversarial_mixing=True has no effect, .* without an adversary") as said:
        model.train(1, adversarial_mixing=True, enable_progress_bar=False)
    assert len(said) == 1
    assert model.is_trained
    assert "adversary_train" not in model.history


def test_errors_are_of_the_classes_of_scvi_tools_too(world, tmp_path):
    adata, model = world
    for argument in ("layer", "batch_key", "size_factor_key", "categorical_covariate_keys"):
        value = ["nowhere"] if argument == "categorical_covariate_keys" else "nowhere"
        with pytest.raises(KeyError) as caught:
            MULTIVI.setup_anndata(adata.copy(), **{argument: value})
        assert isinstance(caught.value, ValueError)
        assert str(caught.value).startswith(f"{argument}='nowhere' is not in adata.")
    with pytest.raises(KeyError, match="^groupby='celltype' is no column of obs. Did you mean 'cell_type'"):
        model.differential_expression(groupby="celltype")
    query = adata.copy()
    del query.obs["flag"]
    with pytest.raises(KeyError, match="^batch_key='flag' is not in adata.obs"):
        model.get_elbo(query)
    model.save(tmp_path / "model")
    for kind in (ValueError, FileExistsError):
        with pytest.raises(kind, match="exists: choose another path or give overwrite=True"):
            model.save(tmp_path / "model")
    for kind in (ValueError, FileNotFoundError):
        with pytest.raises(kind, match="^dir_path='.*nowhere' is not a saved model"):
            MULTIVI.load(tmp_path / "nowhere")
        with pytest.raises(kind, match="^reference_model: dir_path='.*nowhere' is not a saved model"):
            MULTIVI.load_query_data(adata, tmp_path / "nowhere")
    without = MULTIVI(adata, n_hidden=4, n_latent=2, region_factors=False)
    without.is_trained = True
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match="modality='foo' is not allowed: choose one of 'joint'"):
            model.get_latent_representation(modality="foo")
        with pytest.raises(kind, match="region_factors=False was chosen"):
            without.get_region_factors()
        with pytest.raises(kind, match="get_protein_foreground_probability: this model has no proteins"):
            model.get_protein_foreground_probability()
