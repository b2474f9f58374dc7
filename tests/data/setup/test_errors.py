import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_multivi.data.setup.covariates import CONSTANT_SD
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
        (
            {"categorical_covariate_keys": ["batch", "batch"]},
            r"categorical_covariate_keys=.* holds 'batch' more than once",
        ),
        ({"continuous_covariate_keys": ["age", "age"]}, r"continuous_covariate_keys=.* holds 'age' more than once"),
        ({"extra_obsm_keys": ["adt", "adt"]}, r"extra_obsm_keys=.* holds 'adt' more than once: name each once"),
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
    with pytest.raises(
        ValueError,
        match=message + r".*Raw counts are needed(, and none are in adata|\. These are nearly whole: round them)",
    ):
        setup_anndata(adata)


def test_nan_of_an_outer_join(adata):
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    joined = ad.concat([adata[:3, genes], adata[3:, ~genes]], join="outer")[:, adata.var_names].copy()
    joined.var = adata.var
    with pytest.raises(ValueError, match=r"values that are NaN .* join the samples by .*join_samples.* or write 0"):
        setup_anndata(joined)
    joined.X = np.nan_to_num(joined.X)
    assert setup_anndata(joined).n_cells == {"paired": 0, "expression": 3, "accessibility": 3}


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
    with pytest.raises(ValueError, match=r"X is empty. .*layers\['counts'\] looks like counts, give layer='counts'"):
        setup_anndata(empty)
    setup_anndata(empty, layer="counts")
    del empty.layers["counts"]
    with pytest.raises(ValueError, match=r"X is empty. .*none are in adata: .* were looked at. Put them into adata.X"):
        setup_anndata(empty)


def test_text_instead_of_numbers(adata):
    adata.layers["text"] = adata.X.astype(str).astype(object)
    with pytest.raises(ValueError, match=r"adata.layers\['text'\] holds values of type object; RNA counts must be"):
        setup_anndata(adata, layer="text")
    adata.layers["half"] = adata.X.astype(np.float16)
    assert setup_anndata(adata, layer="half").n_genes == 3


@pytest.mark.parametrize("dtype", ["str", "category", "string"])
@pytest.mark.parametrize("argument", ["continuous_covariate_keys", "size_factor_key"])
def test_numbers_written_as_text_are_to_be_converted(adata, argument, dtype):
    adata.obs["depth"] = pd.Series(["1.5", "2", "4"] * 2, index=adata.obs_names, dtype=dtype)
    with pytest.raises(ValueError, match=rf"{argument}='depth' must be numeric .*\. Convert these numbers: ") as caught:
        setup_anndata(adata, **{argument: ["depth"]})
    exec(re.search(r"Convert these numbers: (.*)\.$", str(caught.value))[1])
    setup_anndata(adata, **{argument: ["depth"]})


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


@pytest.mark.parametrize("of", ["obs", "var"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (lambda n: pd.RangeIndex(n), r"names that are no strings, for instance 0: make them strings: .*astype\(str\)"),
        (lambda n: pd.Index([np.nan, *map(str, range(1, n))]), "1 names that are no strings, for instance nan: give"),
        (lambda n: pd.Index([0, *map(str, range(1, n))], dtype=object), "1 names that are no strings, for instance 0"),
        (lambda n: pd.CategoricalIndex(range(n)), "names that are no strings, for instance 0"),
    ],
)
def test_names_must_be_strings(adata, of, names, message):
    frame = getattr(adata, of)
    frame.index = names(len(frame))
    with pytest.raises(ValueError, match=rf"adata.{of}_names holds \d+ {message}".replace("1 names", "names")):
        setup_anndata(adata)
    frame.index = pd.Index(list(map(str, range(len(frame)))), dtype="string")
    assert setup_anndata(adata).n_genes == 3


@pytest.mark.parametrize(("of", "column", "key"), [("obs", "batch", "batch_key"), ("var", "feature_types", None)])
def test_a_column_may_be_there_once_only(adata, of, column, key):
    frame = getattr(adata, of)
    setattr(adata, f"_{of}", pd.concat([frame, frame[[column]]], axis=1))
    with pytest.raises(ValueError, match=rf"adata.{of} has 2 columns called '{column}'.* Keep one: (.*)\.") as caught:
        setup_anndata(adata, **({key: column} if key else {}))
    mend = str(caught.value).split("Keep one: ")[1].rstrip(".")
    exec(mend, {"adata": adata})
    setup_anndata(adata, **({key: column} if key else {}))


def test_a_masked_array_is_refused(adata):
    values = adata.X
    masked = ad.AnnData(np.ma.masked_array(values, mask=values > 3), obs=adata.obs, var=adata.var)
    with pytest.raises(ValueError, match=r"adata.X is a masked array, of which \d+ values are hidden.*filled\(0\)"):
        setup_anndata(masked)


@pytest.mark.parametrize(
    "kept",
    ["{", "[]", "null", '{"version": 2}', '{"version": 2, "kind": "x"}',
     '{"version": 2, "kind": "anndata", "extra": "a"}',
     '{"version": 2, "kind": "anndata", "batch_key": 3}', '{"version": 2, "kind": "anndata", "later": 1}'],
)  # fmt: skip
def test_damaged_arguments_of_the_setup(adata, kept):
    adata.uns["pyro_multivi"] = {"setup": kept}
    with pytest.raises(ValueError, match=r"\['setup'\] is damaged: call MULTIVI.setup_anndata\(adata, ...\) again"):
        DataSpec.of(adata)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1e200, 1, 2, 3, 4, 5], "values from 1 to 1e\\+200, which cannot be standardised in single precision"),
        (np.arange(6) * 1e-300, "which cannot be standardised in single precision"),
        ([1e30, 1, 2, 3, 4, 5], "beside the value 1e\\+30 the others differ too little"),
        (np.arange(6) * 1j, "must be numeric and is of type complex128"),
    ],
)
def test_covariates_out_of_single_precision(adata, values, message):
    adata.obs["age"] = values
    with pytest.raises(ValueError, match=f"continuous_covariate_keys='age'.*{message}"):
        setup_anndata(adata, continuous_covariate_keys=["age"])


def test_covariates_of_other_cells_out_of_single_precision(adata):
    setup_anndata(adata, continuous_covariate_keys=["age"])
    other = adata.copy()
    other.obs["age"] = 1e200
    with pytest.raises(ValueError, match="'age' holds 1e\\+200, which is out of the range of single precision"):
        DataSpec.of(adata).table(other)


def test_a_covariate_that_is_constant_but_for_rounding(adata):
    adata.obs["age"] = 0.1 + np.arange(6) % 2 * 2e-17
    setup_anndata(adata, continuous_covariate_keys=["age"])
    assert DataSpec.of(adata).continuous_sd == (CONSTANT_SD,)


@pytest.mark.parametrize(("key", "value"), [(["s", None], 1e-60), (["s", None], 1e60), (["one", "s"], 1 - 1e-12)])
def test_size_factors_out_of_single_precision(adata, key, value):
    adata.obs["one"], adata.obs["s"] = 1.0, value
    with pytest.raises(
        ValueError, match=r"size factors 's' must be above 0 and .* also in single precision \(float32\)"
    ):
        setup_anndata(adata, size_factor_key=key)


def test_counts_beyond_what_single_precision_tells_apart(adata):
    adata.X[2, 1] = 1e6
    setup_anndata(adata)
    adata.X[2, 1] = 1e7
    with pytest.raises(ValueError, match=r"RNA values that are above 1,000,000, .* 'cell2' and gene 'g1'"):
        setup_anndata(adata)


def test_advice_names_what_is_there(adata):
    adata.X = adata.X * 0.8
    with pytest.raises(ValueError, match=r"layers \(none\) and raw were looked at. Normalised .*: (.*)\.$") as caught:
        setup_anndata(adata)
    assert "layer='counts'" not in str(caught.value)
    adata.X = np.rint(adata.X * 1.25) + np.float32(1e-3)
    with pytest.raises(ValueError, match="These are nearly whole: round them, ") as caught:
        setup_anndata(adata)
    exec(str(caught.value).split("round them, ")[1].rstrip("."), {"adata": adata, "np": np})
    setup_anndata(adata)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csr_array])
def test_dask_arrays_are_read_block_by_block(adata, form):
    dask = pytest.importorskip("dask.array", reason="dask is not installed")
    lazy = dask.from_array(adata.X, chunks=(4, 3)).map_blocks(form)
    setup_anndata(adata)
    expected = DataSpec.of(adata).table(adata)
    other = ad.AnnData(lazy, obs=adata.obs, var=adata.var)
    setup_anndata(other)
    found = DataSpec.of(other).table(other)
    assert (found.x.to_dense() == expected.x.to_dense()).all()
    assert (found.y.to_dense() == expected.y.to_dense()).all()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of anndata and zarr, at writing
def test_an_object_read_lazily(adata, tmp_path):
    pytest.importorskip("dask.array", reason="dask is not installed")
    pytest.importorskip("xarray", reason="xarray is not installed")
    adata.write_zarr(tmp_path / "a.zarr")
    lazy = ad.experimental.read_lazy(tmp_path / "a.zarr")
    report = setup_anndata(lazy, batch_key="batch", modality_key="modality")
    assert report.n_cells["paired"] == 6
    assert report.batches == {"a": 2, "b": 2, "c": 2}


def test_a_column_of_lists_is_refused(adata):
    adata.obs["lists"] = [[number] for number in range(adata.n_obs)]
    with pytest.raises(ValueError, match=r"continuous_covariate_keys='lists' must be numeric .* '\[0\]', '\[1\]'"):
        setup_anndata(adata, continuous_covariate_keys=["lists"])
