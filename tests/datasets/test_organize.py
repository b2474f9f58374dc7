from __future__ import annotations

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.adapter import layer_names
from pyro_multivi.datasets.organize import organize_multiome_anndatas
from pyro_multivi.datasets.samples import join_samples
from pyro_multivi.datasets.simulate import simulate_multiome

GENES, PEAKS = "Gene Expression", "Peaks"


def cells(counts, names, features, types=None, **obs):
    var = pd.DataFrame(index=features)
    if types is not None:
        var["feature_types"] = types
    counts = sp.csr_matrix(np.array(counts, np.float32))
    return AnnData(counts, obs=pd.DataFrame(obs, index=names), var=var)


@pytest.fixture
def multi():
    # Peaks and genes in turn: the result has genes first.
    return cells([[1, 2, 3, 4], [5, 6, 7, 8]], ["m1", "m2"], ["p1", "gA", "p2", "gB"], [PEAKS, GENES, PEAKS, GENES])


@pytest.fixture
def rna():
    return cells([[10, 20, 30]], ["r1"], ["gB", "gC", "gA"], [GENES] * 3)


@pytest.fixture
def atac():
    return cells([[1, 0], [0, 9]], ["a1", "a2"], ["p2", "p1"], [PEAKS] * 2)


def test_values_land_on_their_features(multi, rna, atac, caplog):
    joined = organize_multiome_anndatas(multi, rna, atac)
    assert joined.var_names.tolist() == ["gA", "gB", "p1", "p2"]
    assert joined.var["feature_types"].tolist() == [GENES, GENES, PEAKS, PEAKS]
    assert joined.obs_names.tolist() == ["m1", "m2", "r1", "a1", "a2"]
    modality = ["paired", "paired", "expression", "accessibility", "accessibility"]
    assert joined.obs["modality"].tolist() == modality
    assert joined.obs["modality"].cat.categories.tolist() == ["paired", "expression", "accessibility"]
    expected = [[2, 4, 1, 3], [6, 8, 5, 7], [30, 10, 0, 0], [0, 0, 0, 1], [0, 0, 9, 0]]
    np.testing.assert_array_equal(joined.X.toarray(), expected)
    assert isinstance(joined.X, sp.csr_matrix)
    assert joined.X.has_sorted_indices
    assert joined.X.dtype == np.float32
    assert [record.getMessage() for record in caplog.records] == [
        "1 of the 3 features of rna_anndata are not in multi_anndata and are left out"
    ]


def test_features_that_count_as_zero_are_logged(multi, rna, caplog):
    organize_multiome_anndatas(multi, rna[:, ["gA"]])
    assert caplog.records[0].levelno == logging.WARNING
    assert [record.getMessage() for record in caplog.records] == [
        "1 of the 2 features of multi_anndata are not in rna_anndata: its cells count as zero there"
    ]


def test_union_without_paired_cells(rna, atac, caplog):
    del rna.var["feature_types"]
    del atac.var["feature_types"]
    joined = organize_multiome_anndatas(rna_anndata=rna, atac_anndata=atac)
    assert joined.var_names.tolist() == ["gB", "gC", "gA", "p2", "p1"]
    assert joined.var["feature_types"].tolist() == [GENES] * 3 + [PEAKS] * 2
    np.testing.assert_array_equal(joined.X.toarray(), [[10, 20, 30, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 9]])
    assert caplog.records == []


def test_splitting_and_joining_is_the_identity(mosaic):
    mosaic.layers["double"] = mosaic.X * 2
    pattern, feature = mosaic.obs["modality"], mosaic.var["feature_types"]
    joined = organize_multiome_anndatas(
        mosaic[pattern == "paired"],
        mosaic[pattern == "expression", feature == GENES],
        mosaic[pattern == "accessibility", feature == PEAKS],
    )
    assert (joined.X != mosaic.X).nnz == 0
    assert (joined.layers["double"] != mosaic.X * 2).nnz == 0
    columns = mosaic.obs.columns.tolist()
    pd.testing.assert_frame_equal(joined.obs[columns], mosaic.obs)
    pd.testing.assert_frame_equal(joined.var[mosaic.var.columns], mosaic.var)


def test_inputs_are_untouched_and_not_shared(multi, rna, atac):
    # Unordered entries: putting them in order must not happen in the user's arrays.
    rna.X.indices[:], rna.X.data[:] = [2, 0, 1], [30, 10, 20]
    rna.X.has_sorted_indices = False
    inputs = (multi, rna, atac)
    before = [adata.copy() for adata in inputs]
    raw = [(adata.X.data.copy(), adata.X.indices.copy()) for adata in inputs]
    joined = organize_multiome_anndatas(*inputs)
    joined.X.data[:] = -1
    joined.obs["modality"] = "changed"
    joined.var["feature_types"] = "changed"
    for adata, copy, (data, indices) in zip(inputs, before, raw, strict=True):
        np.testing.assert_array_equal(adata.X.data, data)
        np.testing.assert_array_equal(adata.X.indices, indices)
        pd.testing.assert_frame_equal(adata.obs, copy.obs)
        pd.testing.assert_frame_equal(adata.var, copy.var)
    alone = organize_multiome_anndatas(rna_anndata=rna)
    alone.X.data[:] = -1
    np.testing.assert_array_equal(rna.X.data, raw[1][0])


@pytest.mark.parametrize("make", [sp.csc_matrix, lambda x: x.toarray(), lambda x: x.astype(np.int64)])
def test_other_storage(multi, rna, atac, make):
    expected = organize_multiome_anndatas(multi, rna, atac).X.toarray()
    for adata in (multi, rna, atac):
        adata.X = make(adata.X)
    joined = organize_multiome_anndatas(multi, rna, atac)
    assert isinstance(joined.X, sp.csr_matrix)
    np.testing.assert_array_equal(joined.X.toarray(), expected)


def test_only_colliding_names_get_a_suffix(multi, rna, atac):
    rna.obs_names = ["m2"]
    joined = organize_multiome_anndatas(multi, rna, atac)
    assert joined.obs_names.tolist() == ["m1", "m2_paired", "m2_expression", "a1", "a2"]
    rna.obs_names, atac.obs_names = ["m2"], ["a1", "m2_paired"]
    with pytest.raises(ValueError, match="obs_names of all inputs together holds names more than once"):
        organize_multiome_anndatas(multi, rna, atac)


def test_columns_of_obs_are_joined(multi, rna, tmp_path):
    multi.obs["donor"] = pd.Categorical(["d1", "d2"])
    rna.obs["donor"] = pd.Categorical(["d3"])
    multi.obs["doublet"] = [True, False]
    multi.obs["depth"] = [1, 2]
    multi.obs["note"] = ["x", "y"]
    rna.obs["note"] = np.nan
    rna.obs["day"] = [1.5]
    rna.obs["sample"] = ["s"]
    rna.obs["empty"] = np.nan
    obs = organize_multiome_anndatas(multi, rna).obs
    assert obs["donor"].tolist() == ["d1", "d2", "d3"]
    assert isinstance(obs["donor"].dtype, pd.CategoricalDtype)
    assert obs["doublet"].dtype == "boolean"
    assert obs["doublet"].tolist() == [True, False, pd.NA]
    np.testing.assert_array_equal(obs["depth"], [1, 2, np.nan])
    np.testing.assert_array_equal(obs["day"], [np.nan, np.nan, 1.5])
    assert obs["note"].tolist()[:2] == ["x", "y"]
    assert obs["note"].isna().tolist() == [False, False, True]
    assert obs["sample"].isna().tolist() == [True, True, False]
    assert obs["empty"].isna().all()
    joined = organize_multiome_anndatas(multi, rna)
    joined.write_h5ad(tmp_path / "joined.h5ad")
    assert anndata.read_h5ad(tmp_path / "joined.h5ad").obs["donor"].tolist() == ["d1", "d2", "d3"]


def test_column_of_unlike_types(multi, rna):
    multi.obs["batch"], rna.obs["batch"] = pd.Categorical(["1", "2"]), [3]
    with pytest.raises(ValueError, match="column 'batch' is of type (object|str) and int64 in different inputs"):
        organize_multiome_anndatas(multi, rna)


def test_layers_that_one_input_lacks_are_left_out(multi, rna, caplog):
    multi.layers["counts"] = multi.X.copy()
    joined = organize_multiome_anndatas(multi, rna[:, ["gA", "gB"]])
    assert layer_names(joined.layers) == []
    assert caplog.records[0].getMessage() == "layer 'counts' is left out: rna_anndata has none"


def test_mudata_stands_for_paired_cells(rna):
    mudata = pytest.importorskip("mudata")
    mosaic = simulate_multiome((6, 0, 0), 10, 12)
    mdata = simulate_multiome((6, 0, 0), 10, 12, return_mudata=True)
    # Another order of cells in one modality.
    parts = {"gex": mdata.mod["rna"].copy(), "acc": mdata.mod["atac"][::-1].copy()}
    with mudata_as_given():
        mixed = mudata.MuData(parts)
    mixed.obs["donor"] = [f"d{i}" for i in range(6)]
    joined = organize_multiome_anndatas(mixed, mudata_modalities=("gex", "acc"))
    assert joined.var_names.tolist() == mosaic.var_names.tolist()
    assert (joined[mosaic.obs_names].X != mosaic.X).nnz == 0
    assert joined.obs["donor"].tolist() == mixed.obs["donor"].tolist()
    assert set(joined.obs["modality"]) == {"paired"}
    with pytest.raises(ValueError, match="MuData without modality 'rna', 'atac'; it has 'gex', 'acc'"):
        organize_multiome_anndatas(mixed)


def test_mudata_that_is_not_paired():
    pytest.importorskip("mudata")
    mdata = simulate_multiome((6, 2, 1), 10, 12, return_mudata=True)
    message = "9 cells, of which 8 are in 'rna' and 7 in 'atac'; all must be in both.*use setup_mudata"
    with pytest.raises(ValueError, match=message):
        organize_multiome_anndatas(mdata)
    with pytest.raises(TypeError, match=r"rna_anndata must be an AnnData, not MuData; give its AnnData"):
        organize_multiome_anndatas(rna_anndata=mdata)


def test_nothing_given():
    with pytest.raises(ValueError, match="give at least one of multi_anndata, rna_anndata and atac_anndata"):
        organize_multiome_anndatas()


def test_wrong_class():
    with pytest.raises(TypeError, match="rna_anndata must be an AnnData, not ndarray"):
        organize_multiome_anndatas(rna_anndata=np.zeros((2, 2)))


def test_no_common_features(multi, rna):
    rna.var_names = ["x", "y", "z"]
    message = "none of the 3 features of rna_anndata is in multi_anndata.*'x', 'y', 'z', .* has 'gA', 'gB'"
    with pytest.raises(ValueError, match=message):
        organize_multiome_anndatas(multi, rna)


def test_a_gene_is_not_a_peak_of_the_same_name(multi, rna):
    rna.var_names = ["p1", "p2", "x"]
    with pytest.raises(ValueError, match="none of the 3 features of rna_anndata is in multi_anndata"):
        organize_multiome_anndatas(multi, rna)


def test_genes_and_peaks_of_one_name(rna, atac):
    atac.var_names = ["gA", "p1"]
    with pytest.raises(ValueError, match="the genes and peaks together holds names more than once: 'gA'"):
        organize_multiome_anndatas(rna_anndata=rna, atac_anndata=atac)


@pytest.mark.filterwarnings("ignore:.*names are not unique:UserWarning")  # What AnnData says of such names.
@pytest.mark.parametrize("axis", ["obs", "var"])
def test_repeated_names(multi, atac, axis):
    setattr(atac, f"{axis}_names", ["p1", "p1"])
    message = rf"atac_anndata.{axis}_names holds names more than once: 'p1'.*{axis}_names_make_unique\(\)"
    with pytest.raises(ValueError, match=message):
        organize_multiome_anndatas(multi, atac_anndata=atac)


def test_feature_types_missing_or_not_allowed(multi, rna):
    multi.var = multi.var.rename(columns={"feature_types": "kind"})
    with pytest.raises(ValueError, match="no column 'type', .* it has 'kind'. Name another with"):
        organize_multiome_anndatas(multi, feature_type_key="type")
    rna.var["kind"] = [GENES, "Antibody Capture", GENES]
    with pytest.raises(ValueError, match="rna_anndata holds features of type 'Antibody Capture'; allowed"):
        organize_multiome_anndatas(multi, rna, feature_type_key="kind")
    rna.var["kind"] = GENES
    joined = organize_multiome_anndatas(multi, rna, feature_type_key="kind")
    assert joined.var["kind"].tolist() == [GENES, GENES, PEAKS, PEAKS]


def test_usual_spellings_of_feature_types(multi, rna, atac):
    expected = organize_multiome_anndatas(multi.copy(), rna.copy(), atac.copy())
    multi.var["feature_types"] = multi.var["feature_types"].replace({GENES: "GEX", PEAKS: "ATAC"})
    atac.var["feature_types"] = "Chromatin Accessibility"
    joined = organize_multiome_anndatas(multi, rna, atac)
    pd.testing.assert_frame_equal(joined.var, expected.var)
    assert (joined.X != expected.X).nnz == 0


def test_spellings_that_inputs_agree_on_are_kept(multi, rna, atac):
    for adata in (multi, rna, atac):
        adata.var["feature_types"] = adata.var["feature_types"].replace({GENES: "GEX", PEAKS: "ATAC"})
    assert organize_multiome_anndatas(multi, rna, atac).var["feature_types"].tolist() == ["GEX"] * 2 + ["ATAC"] * 2
    del rna.var["feature_types"]
    assert organize_multiome_anndatas(rna_anndata=multi[:, ["gA"]]).var["feature_types"].tolist() == ["GEX"]
    atac.var["feature_types"] = PEAKS
    joined = organize_multiome_anndatas(multi, rna, atac)
    assert joined.var["feature_types"].tolist() == ["GEX"] * 2 + [PEAKS] * 2
    np.testing.assert_array_equal(joined.X.toarray()[2:], [[30, 10, 0, 0], [0, 0, 0, 1], [0, 0, 9, 0]])


def test_features_without_types_stay_in_their_order(multi, rna, atac, caplog):
    kinds = multi.var.pop("feature_types")
    multi.var["kind"] = kinds
    joined = organize_multiome_anndatas(multi, rna, atac[:, ["p1"]])
    assert joined.var_names.tolist() == ["p1", "gA", "p2", "gB"]
    pd.testing.assert_frame_equal(joined.var, multi.var)
    np.testing.assert_array_equal(joined.X.toarray()[2:], [[0, 30, 0, 10], [0, 0, 0, 0], [9, 0, 0, 0]])
    said = [record.getMessage() for record in caplog.records]
    assert "has no column 'feature_types' (or 'modality')" in said[0]
    assert said[1:] == [
        "1 of the 4 features of multi_anndata are not in rna_anndata or atac_anndata: cells of these count as zero "
        "there",
        "1 of the 3 features of rna_anndata are not in multi_anndata and are left out",
    ]
    with pytest.raises(ValueError, match="none of the 1 features of atac_anndata is in multi_anndata"):
        organize_multiome_anndatas(multi, atac_anndata=cells([[1]], ["a1"], ["x"]))


def test_features_of_the_other_type_are_left_out_if_they_hold_nothing(multi, rna, caplog):
    wide = multi.copy()
    wide.obs_names = ["r1", "r2"]
    wide.X = sp.csr_matrix(wide.X.toarray() * [0, 1, 0, 1])
    with caplog.at_level(logging.INFO):
        joined = organize_multiome_anndatas(multi, wide)
    np.testing.assert_array_equal(joined.X.toarray()[2:], [[2, 4, 0, 0], [6, 8, 0, 0]])
    assert caplog.messages == ["2 other features of rna_anndata hold no counts and are left out"]
    wide.layers["counts"] = multi.X.copy()
    wide.var["feature_types"] = wide.var["feature_types"].replace({PEAKS: "ATAC"})
    with pytest.raises(
        ValueError, match=r"type 'ATAC'; .*isin\(\['ATAC'\]\)\]. They hold counts: .* belong into multi_anndata"
    ):
        organize_multiome_anndatas(multi, wide)


def test_data_given_in_the_place_of_the_other_modality(multi):
    """Scripts for scvi-tools do: ``organize_multiome_anndatas(paired, atac)``."""
    atac = multi[:, multi.var["feature_types"] == PEAKS].copy()
    atac.obs_names = ["a1", "a2"]
    with pytest.raises(ValueError, match="rna_anndata holds features of type 'Peaks'.* Give it as atac_anndata$"):
        organize_multiome_anndatas(multi, atac)
    del atac.var["feature_types"]
    with pytest.raises(ValueError, match="2 features of rna_anndata have names of Peaks .*: give it as atac_anndata$"):
        organize_multiome_anndatas(multi, atac)
    assert organize_multiome_anndatas(multi, atac_anndata=atac).n_obs == 4


def test_advice_on_feature_types_leaves_features(multi, rna):
    rna.var["feature_types"] = "transcripts"
    with pytest.raises(ValueError, match="Write one of these where they mean it: (.*)") as caught:
        organize_multiome_anndatas(multi, rna)
    exec(str(caught.value).rpartition("mean it: ")[2], {"rna_anndata": rna})
    assert organize_multiome_anndatas(multi, rna).n_obs == 3
    rna.var["feature_types"] = [GENES, "protein", GENES]
    with pytest.raises(ValueError, match="Take the others out: ") as caught:
        organize_multiome_anndatas(multi, rna)
    kept = eval(str(caught.value).rpartition("others out: ")[2].rstrip("."), {"rna_anndata": rna})  # noqa: S307
    assert kept.n_vars == 2


def test_several_samples_are_for_join_samples(multi):
    with pytest.raises(TypeError, match="not list; join several samples with pyro_multivi.join_samples"):
        organize_multiome_anndatas([multi, multi])


def test_modality_key_that_exists(multi, rna, caplog):
    multi.obs["modality"] = "paired"
    assert organize_multiome_anndatas(multi, rna).obs["modality"].tolist() == ["paired"] * 2 + ["expression"]
    rna.obs["modality"] = "rna"
    rna = rna[:, ["gA", "gB"]].copy()
    caplog.clear()
    assert organize_multiome_anndatas(multi, rna).obs["modality"].tolist() == ["paired"] * 2 + ["expression"]
    assert caplog.records == []
    multi.obs["modality"] = ["paired", "site 1"]
    assert organize_multiome_anndatas(multi, rna).obs["modality"].tolist() == ["paired"] * 2 + ["expression"]
    assert "obs['modality'] of multi_anndata holds 'site 1': the result has 'paired' there" in caplog.text
    assert multi.obs["modality"].tolist() == ["paired", "site 1"]
    multi.obs["modality"] = "paired"
    joined = organize_multiome_anndatas(multi, rna, modality_key="kind")
    assert joined.obs["kind"].tolist() == ["paired", "paired", "expression"]
    assert joined.obs["modality"].tolist() == ["paired", "paired", "rna"]


def test_no_matrix_no_cells_or_on_disk(multi, tmp_path):
    with pytest.raises(ValueError, match="multi_anndata has 0 cells and 4 features; leave it out"):
        organize_multiome_anndatas(multi[:0])
    with pytest.raises(ValueError, match="multi_anndata.X is None"):
        organize_multiome_anndatas(AnnData(obs=multi.obs, var=multi.var))
    multi.write_h5ad(tmp_path / "multi.h5ad")
    backed = anndata.read_h5ad(tmp_path / "multi.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"multi_anndata is backed by a file; load it: .*to_memory\(\)"):
        organize_multiome_anndatas(backed)
    backed.file.close()


def test_masks_are_refused_not_lost(rna):
    samples = [cells([[1, 2]], ["a1"], ["gA", "gB"], [GENES] * 2), cells([[3, 4]], ["b1"], ["gB", "gC"], [GENES] * 2)]
    union = join_samples(samples, features="union").copy()
    with pytest.raises(ValueError, match=r"rna_anndata.varm\['pyro_multivi_measured'\] says that some features"):
        organize_multiome_anndatas(rna_anndata=union)


def test_obsm_of_all_inputs_goes_along(multi, rna, atac, caplog):
    inputs = {"multi_anndata": multi, "rna_anndata": rna, "atac_anndata": atac}
    for place, adata in enumerate(inputs.values()):
        n, rng = adata.n_obs, np.random.default_rng(place)
        adata.obsm["protein"] = rng.poisson(4.0, (n, 3))
        adata.obsm["sparse"] = sp.csr_matrix(rng.poisson(1.0, (n, 2)))
        frame = pd.DataFrame(rng.normal(size=(n, 2)), index=adata.obs_names, columns=["a", "b"])
        adata.obsm["frame"] = frame[["b", "a"]] if place else frame
        adata.obsm["pca"] = rng.normal(size=(n, 3 if place else 2))
    multi.obsm["umap"] = np.zeros((2, 2))
    joined = organize_multiome_anndatas(**inputs)
    assert sorted(joined.obsm) == ["frame", "protein", "sparse"]
    for key in ("protein", "sparse", "frame"):
        found = sp.csr_matrix(joined.obsm[key]).toarray()
        each = [adata.obsm[key][["a", "b"]] if key == "frame" else adata.obsm[key] for adata in inputs.values()]
        np.testing.assert_array_equal(found, np.concatenate([sp.csr_matrix(part).toarray() for part in each]))
    said = [record.getMessage() for record in caplog.records if "obsm" in record.getMessage()]
    assert said == [
        "obsm['pca'] is left out: its columns are others in multi_anndata and rna_anndata and atac_anndata",
        "obsm['umap'] is left out: not in rna_anndata and atac_anndata",
    ]
    joined.obsm["protein"][0] = -1
    assert multi.obsm["protein"].min() >= 0
