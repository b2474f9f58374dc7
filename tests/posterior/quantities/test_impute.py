"""Mosaics with their gaps filled."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from pyro_multivi import MULTIVI, simulate_multiome

GENES = 40


def test_the_gaps_and_only_they_are_filled(fitted):
    adata, before = fitted.adata, fitted.adata.copy()
    found = fitted.impute()
    modality = adata.obs["modality"].to_numpy()
    assert list(found.obs_names) == list(adata.obs_names)
    assert list(found.var_names) == list(adata.var_names)
    assert list(found.var["feature_types"]) == list(adata.var["feature_types"])
    assert (found.obs["expression_source"] == np.where(modality == "accessibility", "imputed", "measured")).all()
    assert (found.obs["accessibility_source"] == np.where(modality == "expression", "imputed", "measured")).all()
    assert (found.X != adata.X).nnz == 0
    imputed = found.layers["imputed"]
    assert isinstance(imputed, sp.csr_matrix)
    imputed = imputed.toarray()
    rho = fitted.get_normalized_expression(return_numpy=True)
    p = fitted.get_accessibility_estimates(return_numpy=True)
    expected = np.hstack([
        np.where((modality == "accessibility")[:, None], rho, 0), np.where((modality == "expression")[:, None], p, 0)
    ])  # fmt: skip
    np.testing.assert_allclose(imputed, expected, rtol=1e-5)
    # Where nothing was measured there is no count beside the estimate.
    assert not found.X.toarray()[imputed > 0].any()
    # The user's object is what it was.
    assert list(adata.obs) == list(before.obs)
    assert set(adata.layers) == set(before.layers)
    assert set(adata.uns) == set(before.uns)


def test_scales_batches_draws_and_intervals_are_those_of_the_estimates(fitted):
    arguments = {"n_samples": 25, "transform_batch": "batch_1", "return_interval": 0.9, "seed": 2}
    scale = {"normalize_cells": True, "normalize_regions": True}
    found = fitted.impute(**arguments, **scale, library_size="latent", measured_too=True, batch_size=37)
    rho = fitted.get_normalized_expression(**arguments, library_size="latent", return_numpy=True)
    p = fitted.get_accessibility_estimates(**arguments, **scale, return_numpy=True)
    for layer, name in (("", "mean"), ("_sd", "sd"), ("_lower", "lower"), ("_upper", "upper")):
        expected = np.hstack([getattr(rho, name), getattr(p, name)])
        np.testing.assert_allclose(found.layers[f"imputed{layer}"].toarray(), expected, rtol=1e-4, atol=1e-6)
    assert (found.obs["expression_source"] == "imputed").sum() == 50, "measured entries stay called measured"
    arguments = json.loads(found.uns["imputation"])
    assert arguments["n_samples"] == 25
    assert arguments["transform_batch"] == "batch_1"
    assert arguments["library_size"] == "latent"


def test_a_threshold_drops_what_is_hardly_accessible(fitted):
    whole, found = fitted.impute().layers["imputed"].toarray(), fitted.impute(threshold=0.5).layers["imputed"]
    np.testing.assert_allclose(found[:, :GENES].toarray(), whole[:, :GENES])
    expected = np.where(whole[:, GENES:] >= 0.5, whole[:, GENES:], 0)
    np.testing.assert_allclose(found[:, GENES:].toarray(), expected)


@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_to_a_file(fitted, tmp_path, suffix):
    if suffix == ".zarr":
        pytest.importorskip("zarr")
    rows = np.r_[0:5, 100:105, 150:155]
    arguments = {"indices": rows, "n_samples": 25, "return_interval": 0.9}
    expected = fitted.impute(**arguments)
    path = fitted.impute(**arguments, batch_size=4, out=tmp_path / f"a{suffix}", silent=True)
    found = anndata.read_h5ad(path) if suffix == ".h5ad" else anndata.read_zarr(path)
    assert (found.X != expected.X).nnz == 0
    for name, layer in expected.layers.items():
        np.testing.assert_allclose(found.layers[name].toarray(), layer.toarray(), rtol=1e-4, atol=1e-6)
    assert list(found.obs["accessibility_source"]) == list(expected.obs["accessibility_source"])
    assert list(found.obs["cell_type"]) == list(expected.obs["cell_type"])
    assert found.uns["imputation"] == expected.uns["imputation"]


def test_of_a_mudata_comes_a_mudata_in_which_both_have_all_cells():
    pytest.importorskip("mudata")
    mdata = simulate_multiome((20, 10, 10), n_genes=20, n_regions=40, seed=0, return_mudata=True)
    MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = MULTIVI(mdata, n_hidden=8, n_latent=2)
    model.train(max_epochs=2, batch_size=20, progress_bar=False)
    found = model.impute()
    assert set(found.mod) == {"rna", "atac"}
    assert list(found.obs_names) == list(mdata.obs_names)
    for name, source, kind, n_features in (
        ("rna", "expression_source", "accessibility", 20),
        ("atac", "accessibility_source", "expression", 40),
    ):
        part = found.mod[name]
        assert part.shape == (40, n_features)
        missing = (mdata.obs["modality"] == kind).to_numpy()
        assert ((part.obs[source] == "imputed").to_numpy() == missing).all()
        assert ((found.obs[source] == "imputed").to_numpy() == missing).all()
        assert (part.layers["imputed"][missing].toarray() > 0).all()
        assert part.layers["imputed"][~missing].nnz == 0
        assert part.X[missing].nnz == 0
        assert (part[mdata.mod[name].obs_names].X != mdata.mod[name].X).nnz == 0


def test_paired_cells_have_no_gaps(fitted):
    found = fitted.impute(indices=[0, 1])
    assert found.layers["imputed"].nnz == 0
    assert set(found.obs["expression_source"]) == {"measured"}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"n_samples": 0}, "n_samples=0 is not allowed"),
    ({"threshold": 2}, "threshold=2 is not allowed"),
    ({"library_size": [1.0]}, "library_size has shape"),
    ({"transform_batch": "x"}, "transform_batch='x'"),
    ({"return_interval": 0.9}, "needs at least 20 draws"),
])  # fmt: skip
def test_bad_input(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted.impute(**arguments)
