"""Data as scvi-tools takes them: without feature types, with fewer features than there are, without a modality."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import pyro_multivi as scvi
from pyro_multivi import REGISTRY_KEYS
from pyro_multivi.data import synthetic_iid
from pyro_multivi.model import MULTIVI
from pyro_multivi.train import SaveCheckpoint, ScibCallback
from pyro_multivi.utils import attrdict


@pytest.fixture
def untyped():
    adata = scvi.simulate_multiome((40, 10, 10), 12, 15, n_batches=2, seed=0)
    typed = adata.copy()
    del adata.var["feature_types"]
    return adata, typed


def fitted(adata, **given):
    model = MULTIVI(adata, n_hidden=6, n_latent=2, **given)
    model.train(1, enable_progress_bar=False)
    return model


def test_columns_in_order_are_genes_and_then_regions(untyped, tmp_path):
    adata, typed = untyped
    MULTIVI.setup_anndata(typed, batch_key="batch", modality_key="modality")
    report = MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    assert any("n_genes=..., n_regions=..." in note for note in report.notes)
    model = fitted(adata, n_genes=np.int64(12), n_regions=15)
    expected = fitted(typed).get_latent_representation()
    np.testing.assert_array_equal(model.get_latent_representation(), expected)
    assert list(model.get_normalized_accessibility().columns) == list(adata.var_names[12:])
    # In another object they are found by name, typed or not, in any order, and without the regions too.
    for other in (adata[:, ::-1].copy(), typed):
        np.testing.assert_allclose(model.get_latent_representation(other), expected, rtol=1e-4, atol=1e-5)
    rna = adata[adata.obs["modality"] != "accessibility", :12].copy()
    assert model.get_latent_representation(rna, modality="expression").shape == (50, 2)
    model.save(tmp_path / "model", save_anndata=True)
    np.testing.assert_array_equal(MULTIVI.load(tmp_path / "model").get_latent_representation(), expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"has no column 'feature_types'.*: give n_genes and n_regions"),
        ({"n_genes": 12}, r"give n_genes and n_regions, and the first columns are genes"),
        ({"n_genes": 12, "n_regions": 16}, r"n_genes=12, n_regions=16, but adata has 27 features"),
        ({"n_genes": 0, "n_regions": 0}, r"n_genes=0, n_regions=0, but"),
    ],
)
def test_numbers_that_do_not_fit_columns(untyped, given, message):
    MULTIVI.setup_anndata(untyped[0])
    with pytest.raises(ValueError, match=message):
        MULTIVI(untyped[0], **given)


def test_labels_of_a_concatenation_are_no_feature_types(untyped):
    """Scripts count genes by them: ``anndata.concat([rna, atac], axis=1, label="modality")``."""
    adata, typed = untyped
    rna, atac = adata[:40, :12].copy(), adata[:40, 12:].copy()
    paired = ad.concat([rna, atac], axis=1, label="modality", merge="first")
    assert set(paired.var["modality"]) == {"0", "1"}
    alone = typed.obs["modality"].to_numpy()
    rest = adata[alone == "expression", :12].copy(), adata[alone == "accessibility", 12:].copy()
    joined = scvi.data.organize_multiome_anndatas(paired, *rest)
    for found in (paired, joined):
        is_gene = found.var["modality"] == "0"
        MULTIVI.setup_anndata(found, batch_key="batch")
        model = MULTIVI(found, n_hidden=4, n_latent=2, n_genes=is_gene.sum(), n_regions=(~is_gene).sum())
        assert model.get_var_names()["atac"].tolist() == adata.var_names[12:].tolist()
        with pytest.raises(ValueError, match="give n_genes and n_regions"):
            MULTIVI(found)
    with pytest.raises(ValueError, match=r"var\['modality'\] holds '0', '1': neither genes"):
        MULTIVI.setup_anndata(paired, feature_type_key="modality")


def test_columns_that_are_neither(untyped):
    adata = untyped[0][:40].copy()
    MULTIVI.setup_anndata(adata)
    with pytest.warns(UserWarning, match="The last 17 of the 27 features are neither"):
        assert MULTIVI(adata, n_genes=10, n_regions=0, n_hidden=4).n_genes == 10


def test_a_column_that_was_named_has_to_be_there(untyped):
    for given in ({"feature_type_key": "kind"}, {"feature_type_values": {"genes": "gene"}}):
        with pytest.raises(ValueError, match=r"is not in adata.var"):
            MULTIVI.setup_anndata(untyped[0], **given)


def test_fewer_features_than_a_mudata_has():
    mdata = synthetic_iid(20, 10, 3, 12, return_mudata=True)
    modalities = {"rna_layer": "rna", "atac_layer": "accessibility"}
    MULTIVI.setup_mudata(mdata, batch_key="batch", modalities=modalities)
    with pytest.warns(UserWarning, match=r"n_genes=4, but mdata.mod\['rna'\].X has 10 genes: only the first 4"):
        model = MULTIVI(mdata, n_genes=4, n_regions=12, n_hidden=4, n_latent=2)
    model.train(1, enable_progress_bar=False)
    assert model.get_normalized_expression(indices=[1, 2]).shape == (2, 4)
    assert (model.n_genes, model.module.n_input_genes, model.n_proteins) == (4, 4, 0)
    with pytest.raises(ValueError, match="n_genes=11, but the data set up has 10"):
        MULTIVI(mdata, n_genes=11)
    MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "protein_layer": "accessibility"})
    with pytest.raises(ValueError, match="n_regions=12, but the setup names no ATAC: .*modalities={'atac_layer': ...}"):
        MULTIVI(mdata, n_regions=12)


def test_names_that_scripts_import():
    assert (REGISTRY_KEYS.X_KEY, REGISTRY_KEYS.ATAC_X_KEY, REGISTRY_KEYS.BATCH_KEY) == ("X", "atac", "batch")
    assert (REGISTRY_KEYS.PROTEIN_EXP_KEY, REGISTRY_KEYS.INDICES_KEY, REGISTRY_KEYS.SAMPLE_KEY) == (
        "proteins", "ind_x", "sample",
    )  # fmt: skip
    minified = ("MINIFY_TYPE_KEY", "LATENT_QZM_KEY", "LATENT_QZV_KEY", "OBSERVED_LIB_SIZE")
    assert [getattr(REGISTRY_KEYS, name) for name in minified] == [
        "minify_type", "latent_qzm", "latent_qzv", "observed_lib_size",
    ]  # fmt: skip
    assert attrdict({"a": 1}) == {"a": 1}
    with pytest.raises(AttributeError, match="'b' is not there"):
        attrdict({"a": 1}).b  # noqa: B018


def test_attributes_of_the_module_and_with_an_underscore(untyped):
    adata = untyped[1]
    adata.obs["size"] = 1.5
    MULTIVI.setup_anndata(adata, size_factor_key="size")
    model = fitted(adata)
    module = model.module
    assert (module.n_input_genes, module.n_input_regions, module.n_latent, module.n_hidden) == (12, 15, 2, 6)
    assert (module.use_size_factor_key, module.gene_likelihood) == (True, "zinb")
    assert model.adata_manager.registry is model.registry_
    assert model.is_trained_
    np.testing.assert_array_equal(model.train_indices_, model.train_indices)
    assert model.history_.keys() == model.history.keys()


def test_callbacks_of_scvi_tools(untyped):
    with pytest.warns(UserWarning, match=r"ScibCallback\(\) does nothing here"):
        callback = ScibCallback()
    MULTIVI.setup_anndata(untyped[1])
    MULTIVI(untyped[1], n_hidden=4, n_latent=2).train(1, callbacks=[callback], enable_progress_bar=False)
    with pytest.raises(TypeError, match="SaveCheckpoint is a callback of Lightning.*early_stopping_monitor"):
        SaveCheckpoint(monitor="elbo_validation")
