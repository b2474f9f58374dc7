import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_multivi.data.setup.register import setup_anndata
from pyro_multivi.data.setup.spec import DataSpec


@pytest.fixture
def adata() -> ad.AnnData:
    """Six paired cells, three genes g0.. and four peaks p0.., every value at least 1."""
    counts = np.random.default_rng(0).poisson(2.0, (6, 7)).astype(np.float32) + 1
    return ad.AnnData(
        counts,
        obs=pd.DataFrame(
            {"batch": list("aabbcc"), "age": np.arange(6.0), "modality": "paired"},
            index=[f"cell{i}" for i in range(6)],
        ),
        var=pd.DataFrame(
            {"feature_types": ["Gene Expression"] * 3 + ["Peaks"] * 4},
            index=["g0", "g1", "g2", "p0", "p1", "p2", "p3"],
        ),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_key": "Batch"}, r"batch_key='Batch' is not in adata.obs. Did you mean 'batch'\?"),
        (
            {"modality_key": "modalty"},
            r"modality_key='modalty' is not in adata.obs. Did you mean 'modality'\?",
        ),
        ({"labels_key": "xyz"}, r"labels_key='xyz' is not in adata.obs. Known: 'batch', 'age', 'modality'"),
        ({"categorical_covariate_keys": ["bach"]}, r"categorical_covariate_keys='bach' .* 'batch'\?"),
        ({"continuous_covariate_keys": ["Age"]}, r"continuous_covariate_keys='Age' .* 'age'\?"),
        ({"size_factor_key": "ages"}, r"size_factor_key='ages' is not in adata.obs. Did you mean 'age'\?"),
        ({"layer": "count"}, r"layer='count' is not in adata.layers. Did you mean 'counts'\?"),
        (
            {"feature_type_key": "feature_type"},
            r"feature_type_key='feature_type' is not in adata.var. Did you mean 'feature_types'\? .* "
            r"adata.var\['feature_type'\] = 'Gene Expression'",
        ),
        (
            {"feature_type_values": {"genes": "gene", "regions": "peak"}},
            r"holds 'Gene Expression', 'Peaks': neither genes \('gene'\) nor regions \('peak'\)",
        ),
        ({"feature_type_values": {"gene": "gene"}}, r"the key 'gene'. Did you mean 'genes'\?"),
        ({"feature_type_values": {"genes": "Peaks"}}, r"'Peaks' cannot be both genes and regions"),
        ({"size_factor_key": ["age", "age", "age"]}, r"size_factor_key=\[.*\] must be the column"),
        ({"size_factor_key": 3}, r"size_factor_key=3 must be the column"),
        (
            {"modality_values": {"m": "multiome"}},
            r"modality_values\['m'\] is 'multiome' and must be one of 'paired'",
        ),
        (
            {"continuous_covariate_keys": ["batch"]},
            r"must be numeric .* 'a', 'b', 'c'. .*categorical_covariate_keys",
        ),
    ],
)
def test_wrong_arguments(adata, arguments, message):
    adata.layers["counts"] = adata.X
    with pytest.raises(ValueError, match=message):
        setup_anndata(adata, **arguments)


@pytest.mark.parametrize(
    ("column", "key"),
    [("batch", "batch_key"), ("batch", "labels_key"), ("modality", "modality_key"), ("age", "continuous")],
)
def test_gaps_in_columns(adata, column, key):
    adata.obs.loc[["cell1", "cell4"], column] = np.nan
    arguments = {"continuous_covariate_keys": ["age"]} if key == "continuous" else {key: column}
    with pytest.raises(ValueError, match=rf"{key}.*={column!r} .*(2 cells|for 2 cells): 'cell1', 'cell4'"):
        setup_anndata(adata, **arguments)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("cell", "feature", "value", "message"),
    [
        (
            4,
            1,
            -1.0,
            "adata.X holds RNA values that are negative, for instance -1.0 for cell 'cell4' and gene 'g1'",
        ),
        (2, 5, -1.0, "adata.X holds ATAC values that are negative, .* cell 'cell2' and region 'p2'"),
        (
            0,
            0,
            np.nan,
            "RNA values that are NaN or infinite, for instance nan for cell 'cell0' and gene 'g0'",
        ),
        (
            5,
            6,
            np.inf,
            "ATAC values that are NaN or infinite, for instance inf for cell 'cell5' and region 'p3'",
        ),
        (
            3,
            2,
            1.5,
            "RNA values that are not a whole number, for instance 1.5 for cell 'cell3' and gene 'g2'",
        ),
    ],
)
def test_values_that_are_no_counts(adata, form, cell, feature, value, message):
    dense = adata.X.copy()
    dense[cell, feature] = value
    adata.X = form(dense)
    with pytest.raises(ValueError, match=message + r".*Raw counts are needed, .* layer='counts'"):
        setup_anndata(adata)


def test_layer_that_looks_like_counts_is_named(adata):
    adata.layers["logged"] = np.log1p(adata.X)
    adata.layers["raw_umis"] = sp.csr_matrix(adata.X)
    adata.X = np.log1p(adata.X)
    with pytest.raises(ValueError, match=r"adata.layers\['raw_umis'\] looks like counts, give layer='raw_umis'"):
        setup_anndata(adata)
    setup_anndata(adata, layer="raw_umis")


def test_x_or_raw_that_looks_like_counts_is_named(adata):
    adata.layers["logged"] = np.log1p(adata.X)
    with pytest.raises(ValueError, match=r"adata.X looks like counts, give layer=None"):
        setup_anndata(adata, layer="logged")
    adata.raw = adata.copy()
    del adata.layers["logged"]
    adata.X = np.log1p(adata.X)
    with pytest.raises(ValueError, match=r"adata.raw looks like counts") as caught:
        setup_anndata(adata)
    exec(re.search(r"\((adata.layers\['counts'\] = .*)\) and give", str(caught.value))[1])
    setup_anndata(adata, layer="counts")


def test_missing_x(adata):
    empty = ad.AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X})
    with pytest.raises(ValueError, match=r"adata.X is empty. Give layer, one of 'counts'"):
        setup_anndata(empty)
    setup_anndata(empty, layer="counts")


def test_text_instead_of_numbers(adata):
    adata.layers["text"] = adata.X.astype(str).astype(object)
    with pytest.raises(ValueError, match=r"adata.layers\['text'\] holds values of type object; RNA counts must be"):
        setup_anndata(adata, layer="text")
    adata.layers["half"] = adata.X.astype(np.float16)
    assert setup_anndata(adata, layer="half").n_genes == 3


@pytest.mark.filterwarnings("ignore:(Observation|Variable) names are not unique")
def test_names_must_be_unique(adata):
    adata.obs_names = ["cell0"] * 2 + list("cdef")
    with pytest.raises(ValueError, match=r"adata.obs_names holds .*: 'cell0'. .*adata.obs_names_make_unique\(\)"):
        setup_anndata(adata)
    adata.obs_names_make_unique()
    adata.var_names = ["g0", "g0", "g1", "g1", "p1", "p2", "p3"]
    with pytest.raises(ValueError, match=r"var_names \(genes\) holds .*: 'g0'. .*adata.var_names_make_unique\(\)"):
        setup_anndata(adata)
    # A peak may be called like a gene.
    adata.var_names = ["g0", "g1", "g2", "g2", "p1", "p2", "p3"]
    setup_anndata(adata)
    assert DataSpec.of(adata).region_names[0] == "g2"


def test_cells_with_nothing_measured_and_how_to_drop_them(adata):
    dense = adata.X.copy()
    dense[[1, 3]] = 0
    extra = ad.AnnData(
        np.ones((6, 1), dtype=np.float32),
        obs=adata.obs,
        var=pd.DataFrame({"feature_types": ["Antibody Capture"]}, index=["CD3"]),
    )
    for with_protein in (False, True):
        adata.X = dense
        data = ad.concat([adata, extra], axis=1, merge="same") if with_protein else adata
        with pytest.raises(ValueError, match=r"2 of 6 cells .*: 'cell1', 'cell3'. Drop them: ") as caught:
            setup_anndata(data)
        namespace = {"adata": data, "np": np}
        exec(str(caught.value).split("Drop them: ")[1], namespace)
        assert setup_anndata(namespace["adata"]).n_cells["paired"] == 4


def test_many_names_are_cut_to_five(adata):
    adata.X = np.zeros_like(adata.X)
    with pytest.raises(ValueError, match=r"6 of 6 cells .*'cell4', ... \(6 in all\)"):
        setup_anndata(adata)


@pytest.mark.filterwarnings("ignore:Transforming to str index")  # of the empty index, by anndata 0.10
def test_no_cells(adata):
    with pytest.raises(ValueError, match="adata.obs_names is empty"):
        setup_anndata(adata[:0].copy())


def test_wrong_objects(adata):
    with pytest.raises(TypeError, match="adata must be an AnnData, got DataFrame"):
        setup_anndata(adata.obs)
    with pytest.raises(TypeError, match=r"categorical_covariate_keys must be a list .* 3 is not a string"):
        setup_anndata(adata, categorical_covariate_keys=3)


def test_data_not_set_up_or_by_another_version(adata):
    with pytest.raises(ValueError, match=r"was not set up: call MULTIVI.setup_anndata\(adata, ...\) first"):
        DataSpec.of(adata)
    adata.uns["pyro_multivi"] = {"setup": '{"version": 99}'}
    with pytest.raises(ValueError, match=r"version 99 and this package reads 2: call MULTIVI.setup_anndata"):
        DataSpec.of(adata)


def test_column_removed_after_setup(adata):
    setup_anndata(adata, modality_key="modality", batch_key="batch")
    del adata.obs["modality"]
    with pytest.raises(ValueError, match="modality_key='modality' is not in adata.obs"):
        DataSpec.of(adata)
