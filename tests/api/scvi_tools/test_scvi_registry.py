"""The registry of a model: arguments of its setup, states and data, asked for by the names of scvi-tools."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import pyro_multivi as scvi
from pyro_multivi.model import MULTIVI


@pytest.fixture(scope="module")
def mdata():
    mdata = scvi.simulate_multiome((40, 0, 0), 12, 15, n_batches=2, n_proteins=3, seed=0, return_mudata=True)
    mdata.obs["size"], mdata.obs["depth"] = 2.0, 0.5
    mdata.obs["age"] = np.arange(40.0)
    mdata.mod["rna"].obs["donor"] = np.where(np.arange(40) % 2, "d1", "d2")
    return mdata


@pytest.fixture(scope="module")
def of_mudata(mdata):
    MULTIVI.setup_mudata(
        mdata,
        batch_key="batch",
        size_factor_key=["size", "depth"],
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        modalities={
            "rna_layer": "rna", "atac_layer": "atac", "protein_layer": "protein", "categorical_covariate_keys": "rna",
        },
    )  # fmt: skip
    return MULTIVI(mdata, n_hidden=4, n_latent=2)


@pytest.fixture(scope="module")
def of_anndata():
    adata = scvi.simulate_multiome((40, 0, 0), 12, 15, n_batches=2, n_proteins=3, seed=0)
    adata.layers["counts"], adata.obs["size"] = adata.X.copy(), 2.0
    MULTIVI.setup_anndata(
        adata, "counts", "batch", size_factor_key="size", protein_expression_obsm_key="protein_expression"
    )
    return MULTIVI(adata, n_hidden=4, n_latent=2)


def test_arguments_of_the_setup_have_the_names_of_scvi_tools(of_mudata, of_anndata):
    modalities = {
        "rna_layer": "rna", "atac_layer": "atac", "protein_layer": "protein", "categorical_covariate_keys": "rna",
    }  # fmt: skip
    assert of_mudata.get_setup_arg("modalities") == of_mudata.registry["setup_args"]["modalities"] == modalities
    assert of_mudata.get_setup_arg("size_factor_key") == ["size", "depth"]
    assert of_mudata.get_setup_arg("idx_layer") is None
    names = {"layer": "counts", "size_factor_key": "size", "protein_expression_obsm_key": "protein_expression"}
    assert {name: of_anndata.get_setup_arg(name) for name in names} == names
    assert of_anndata.get_setup_arg("protein_names_uns_key") is None


def test_states_have_the_keys_of_scvi_tools(of_mudata):
    get = of_mudata.adata_manager.get_state_registry
    assert get("batch").original_key == "batch"
    assert get("extra_categorical_covs").field_keys == ("donor",)
    assert get("extra_categorical_covs").mappings.donor.tolist() == ["d1", "d2"]
    assert get("size_factor").columns == ["size", "depth"]
    assert [(get(key).n_obs, get(key).n_vars) for key in ("X", "atac", "proteins")] == [(40, 12), (40, 15), (40, 3)]


def test_entries_of_the_registry_as_plain_dictionaries(of_mudata):
    places = of_mudata.adata_manager.data_registry.to_dict()
    assert type(places) is type(places["batch"]) is dict
    assert places["batch"]["attr_key"] == "batch"
    assert of_mudata.summary_stats.to_dict()["n_proteins"] == 3


def test_names_of_features_by_modality(mdata, of_mudata, of_anndata):
    for model in (of_mudata, of_anndata):
        found = model.get_var_names()
        assert list(found) == ["rna", "atac", "protein"]
        for name, part in mdata.mod.items():
            assert found[name].tolist() == list(part.var_names)


def test_data_of_the_registry_are_those_of_the_object(mdata, of_mudata, of_anndata):
    manager = of_mudata.adata_manager
    for key, name in (("X", "rna"), ("atac", "atac"), ("proteins", "protein")):
        assert manager.get_from_registry(key) is mdata.mod[name].X
        assert of_mudata.data_registry(key) is of_mudata.get_from_registry(mdata, key) is mdata.mod[name].X
    adata = of_anndata.adata
    assert of_anndata.data_registry("X") is adata.layers["counts"]
    np.testing.assert_array_equal(of_anndata.data_registry("proteins"), adata.obsm["protein_expression"])


def test_columns_of_the_registry_are_codes_and_numbers(mdata, of_mudata):
    manager = of_mudata.adata_manager
    codes = manager.get_from_registry("batch")
    assert codes.shape == (40, 1)
    found = manager.get_state_registry("batch").categorical_mapping[codes[:, 0]]
    np.testing.assert_array_equal(found, mdata.obs["batch"].astype(str))
    donors = manager.get_from_registry("extra_categorical_covs")
    known = manager.get_state_registry("extra_categorical_covs").mappings["donor"]
    np.testing.assert_array_equal(known[donors["donor"]], mdata.mod["rna"].obs["donor"])
    for key, columns in (("extra_continuous_covs", ["age"]), ("size_factor", ["size", "depth"])):
        pd.testing.assert_frame_equal(manager.get_from_registry(key), mdata.obs[columns], check_names=False)
    with pytest.raises(KeyError, match="registry_key='batches' is not there. Did you mean 'batch'"):
        of_mudata.data_registry("batches")


def test_counts_that_the_object_does_not_hold(of_anndata, tmp_path):
    model = MULTIVI(of_anndata.adata, n_hidden=4, n_latent=2)
    model.train(1, enable_progress_bar=False)
    model.save(tmp_path / "model")
    model.minify_adata()
    with pytest.raises(ValueError, match="registry_key='X': the object does not hold the counts"):
        model.data_registry("X")
    assert model.data_registry("batch").shape == (40, 1)
    loaded = MULTIVI.load(tmp_path / "model")
    with pytest.raises(ValueError, match="This model has no data"):
        loaded.data_registry("X")
    assert loaded.summary_stats.n_cells == 40


def test_numbers_of_cells_are_those_of_the_object(of_anndata):
    manager = of_anndata.get_anndata_manager(of_anndata.adata[:25].copy())
    assert manager.summary_stats.n_cells == manager.get_state_registry("X").n_obs == 25
    assert of_anndata.summary_stats.n_cells == 40
