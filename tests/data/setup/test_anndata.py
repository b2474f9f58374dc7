import copy
import json
import logging
from contextlib import nullcontext
from importlib.metadata import version

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_multivi.data.setup.adapter import layer_names
from pyro_multivi.data.setup.register import setup_anndata
from pyro_multivi.data.setup.spec import DataSpec

GENES, PEAKS = 4, 6


def make(n: int = 8, seed: int = 0) -> ad.AnnData:
    """Paired cells; genes and peaks alternate among the columns, and one protein is there too."""
    rng = np.random.default_rng(seed)
    kinds = np.array(["Gene Expression", "Peaks"] * GENES + ["Peaks"] * (PEAKS - GENES) + ["Antibody Capture"])
    counts = rng.poisson(1.0, (n, len(kinds))).astype(np.float32)
    counts[:, :2] += 1  # every cell has a count of each modality
    return ad.AnnData(
        sp.csr_matrix(counts),
        obs=pd.DataFrame(
            {
                "batch": pd.Categorical(np.array(["b", "a", "b", "a"] * (n // 4))),
                "donor": np.arange(n) % 3,
                "age": np.linspace(20.0, 60.0, n),
                "type": ["T", "B"] * (n // 2),
            },
            index=[f"cell{i}" for i in range(n)],
        ),
        var=pd.DataFrame({"feature_types": kinds}, index=[f"f{i}" for i in range(len(kinds))]),
    )


def snapshot(adata: ad.AnnData) -> dict:
    return copy.deepcopy(
        {
            "X": adata.X,
            "layers": dict(adata.layers),
            "obsm": dict(adata.obsm),
            "obs": adata.obs,
            "var": adata.var,
            "uns": {key: value for key, value in adata.uns.items() if key != "pyro_multivi"},
        }
    )


def assert_same_matrix(old, new):
    if not sp.issparse(old):
        np.testing.assert_array_equal(old, new)
        return
    assert type(old) is type(new)
    for part in ("data", "indices", "indptr"):  # the very same storage, not only the same values
        np.testing.assert_array_equal(getattr(old, part), getattr(new, part))


def assert_unchanged(before: dict, adata: ad.AnnData):
    after = snapshot(adata)
    assert_same_matrix(before["X"], after["X"])
    for kind in ("layers", "obsm"):
        assert before[kind].keys() == after[kind].keys()
        for key in before[kind]:
            assert_same_matrix(before[kind][key], after[kind][key])
    pd.testing.assert_frame_equal(before["obs"], after["obs"])
    pd.testing.assert_frame_equal(before["var"], after["var"])
    assert before["uns"] == after["uns"]


def test_report_says_what_was_found(caplog):
    adata = make()
    with caplog.at_level(logging.INFO, logger="pyro_multivi"):
        report = setup_anndata(
            adata,
            batch_key="batch",
            categorical_covariate_keys=["donor"],
            continuous_covariate_keys=["age"],
            labels_key="type",
        )
    assert (report.n_genes, report.n_regions) == (GENES, PEAKS)
    assert report.n_cells == {"paired": 8, "expression": 0, "accessibility": 0}
    assert report.batches == {"a": 4, "b": 4}
    assert report.categorical == {"donor": ("0", "1", "2")}
    assert report.continuous["age"] == pytest.approx((40.0, np.std(np.linspace(20, 60, 8))))
    assert report.labels == ("B", "T")
    genes = adata.X.toarray()[:, adata.var["feature_types"] == "Gene Expression"]
    assert report.density["RNA"] == pytest.approx((genes > 0).mean())
    assert "whole numbers" in report.counts["RNA"]
    text = repr(report)
    assert "8: 8 paired, 0 RNA only, 0 ATAC only (inferred from the counts)" in text
    assert "2: a (4), b (4)" in text
    assert "1 features of type 'Antibody Capture' are ignored." in text
    assert "give modality_key" in text
    assert "note        all cells have both modalities: MULTIVI() learns from both together" in text
    assert text in caplog.text


def test_only_one_key_is_written_and_nothing_else_changes():
    adata = make()
    adata.layers["odd"] = sp.csc_matrix(adata.X)
    adata.obsm["X_pca"] = np.ones((8, 2))
    adata.uns["mine"] = {"kept": 1}
    # Unsorted columns and a stored zero: reading must not tidy up the user's own arrays.
    adata.X.indices[:2] = adata.X.indices[:2][::-1].copy()
    adata.X.data[-1] = 0.0
    adata.X.has_sorted_indices = False
    before = snapshot(adata)
    setup_anndata(adata, batch_key="batch", size_factor_key=None)
    DataSpec.of(adata).table(adata)
    assert_unchanged(before, adata)
    assert list(adata.uns["pyro_multivi"]) == ["setup"]
    kept = json.loads(adata.uns["pyro_multivi"]["setup"])
    assert kept["version"] == 2
    assert kept["kind"] == "anndata"
    assert kept["batch_key"] == "batch"


def test_untidy_storage_is_read_right_and_left_untidy():
    # Genes alone: no column is selected, so that blocks are as close to the user's own arrays as can be.
    rows = sp.csr_matrix(
        (np.array([2.0, 1.0, 0.0, 4.0], dtype=np.float32), np.array([2, 0, 1, 0]), np.array([0, 2, 4])), shape=(2, 3)
    )
    var = pd.DataFrame({"feature_types": "Gene Expression"}, index=["a", "b", "c"])
    adata = ad.AnnData(rows, obs=pd.DataFrame(index=["c0", "c1"]), var=var)
    assert adata.X.indices.tolist() == [2, 0, 1, 0]
    setup_anndata(adata)
    table = DataSpec.of(adata).table(adata)
    assert adata.X.indices.tolist() == [2, 0, 1, 0]
    assert adata.X.data.tolist() == [2.0, 1.0, 0.0, 4.0]
    assert table.x.col.tolist() == [0, 2, 0]
    assert table.x.val.tolist() == [1.0, 2.0, 4.0]


def test_setup_survives_h5ad(tmp_path):
    adata = make()
    setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["donor"], modality_values={"m": "paired"})
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    assert DataSpec.of(again) == DataSpec.of(adata)


def test_view_is_set_up_without_warning_and_its_parent_stays():
    adata = make()
    before = snapshot(adata)
    view = adata[:4, ::-1]
    report = setup_anndata(view)  # warnings are errors here
    assert report.n_cells["paired"] == 4
    assert not view.is_view
    assert "pyro_multivi" in view.uns
    assert "pyro_multivi" not in adata.uns
    assert_unchanged(before, adata)


def test_setup_that_fails_writes_nothing():
    adata = make()
    with pytest.raises(ValueError, match="batch_key"):
        setup_anndata(adata, batch_key="batches")
    assert "pyro_multivi" not in adata.uns


@pytest.mark.parametrize("form", ["csr", "csc", "coo-free dense", "int csr", "csr_array", "fortran"])
def test_any_matrix_form_gives_the_same_table(form):
    if form == "csr_array" and version("anndata").startswith("0.10."):
        pytest.skip("anndata 0.10 has no sparse arrays")
    adata = make()
    setup_anndata(adata)
    expected = DataSpec.of(adata).table(adata)
    dense = adata.X.toarray()
    adata.X = {
        "csr": lambda: sp.csr_matrix(dense),
        "csc": lambda: sp.csc_matrix(dense),
        "coo-free dense": lambda: dense,
        "int csr": lambda: sp.csr_matrix(dense.astype(np.int64)),
        "csr_array": lambda: sp.csr_array(dense),
        "fortran": lambda: np.asfortranarray(dense.astype(np.float64)),
    }[form]()
    setup_anndata(adata)
    got = DataSpec.of(adata).table(adata)
    for name in ("x", "y"):
        for part in ("crow", "col", "val"):
            want, have = getattr(getattr(expected, name), part), getattr(getattr(got, name), part)
            assert want.dtype == have.dtype
            assert want.tolist() == have.tolist()


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_backed_file_is_read_and_left_as_it_is(tmp_path, form):
    adata = make()
    adata.X = {"csr": adata.X, "csc": adata.X.tocsc(), "dense": adata.X.toarray()}[form]
    adata.write_h5ad(tmp_path / "a.h5ad")
    setup_anndata(adata)
    written = (tmp_path / "a.h5ad").read_bytes()
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    with pytest.warns(UserWarning, match="by columns.*pyro-multivi convert") if form == "csc" else nullcontext():
        report = setup_anndata(backed)
    table = DataSpec.of(backed).table(backed)
    with pytest.raises(ValueError, match="view of an object in a file"):
        setup_anndata(backed[:4])
    backed.file.close()
    assert repr(report) == repr(setup_anndata(adata))
    np.testing.assert_array_equal(table.x.to_dense(), DataSpec.of(adata).table(adata).x.to_dense())
    assert (tmp_path / "a.h5ad").read_bytes() == written


def test_blocks_do_not_show(monkeypatch):
    adata = make(n=12)
    setup_anndata(adata)
    expected = DataSpec.of(adata).table(adata)
    monkeypatch.setattr("pyro_multivi.data.setup.counts._BLOCK_ROWS", 5)
    got = DataSpec.of(adata).table(adata.copy())
    np.testing.assert_array_equal(got.y.to_dense(), expected.y.to_dense())
    assert got.y.crow.tolist() == expected.y.crow.tolist()


def test_layer_and_other_spellings_of_feature_types():
    adata = make()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    adata.var["kind"] = adata.var.pop("feature_types").replace({"Gene Expression": "gene", "Peaks": "cCRE"})
    report = setup_anndata(
        adata,
        layer="counts",
        feature_type_key="kind",
        feature_type_values={"genes": "gene", "regions": ["cCRE", "peak"]},
    )
    assert (report.n_genes, report.n_regions) == (GENES, PEAKS)
    table = DataSpec.of(adata).table(adata)
    genes = adata.layers["counts"].toarray()[:, adata.var["kind"] == "gene"]
    np.testing.assert_array_equal(table.x.to_dense(), genes)


@pytest.mark.parametrize(
    ("genes", "regions"), [("GEX", "ATAC"), ("rna", "peaks"), ("Gene Expression", "ATAC"), ("gene", "Peaks")]
)
def test_usual_spellings_of_feature_types_are_known(genes, regions):
    adata = make()
    usual = setup_anndata(adata.copy())
    kinds = adata.var["feature_types"].astype(str)
    adata.var["feature_types"] = kinds.replace({"Gene Expression": genes, "Peaks": regions})
    report = setup_anndata(adata)
    assert (report.n_genes, report.n_regions) == (usual.n_genes, usual.n_regions)
    assert any(note.startswith("1 features of type 'Antibody Capture' are ignored.") for note in report.notes)
    # A query may spell them as Cell Ranger does.
    query = make()
    assert DataSpec.of(adata).table(query).x is not None


@pytest.mark.filterwarnings("ignore:.* features are left out:UserWarning")
def test_what_is_said_of_feature_types_holds():
    adata = make()
    # Beside features of the usual type those of a like spelling are others, as they are beside stated types.
    adata.var["feature_types"] = adata.var["feature_types"].astype(str)
    adata.var.iloc[0, adata.var.columns.get_loc("feature_types")] = "gene"
    assert setup_anndata(adata).n_genes == GENES - 1
    assert setup_anndata(adata, feature_type_values={"genes": "gene"}).n_genes == 1


@pytest.mark.parametrize(("kind", "genes", "regions"), [("Gene Expression", GENES, 0), ("Peaks", 0, PEAKS)])
def test_one_modality_alone(kind, genes, regions):
    adata = make()
    adata = adata[:, adata.var["feature_types"] == kind].copy()
    report = setup_anndata(adata)
    assert (report.n_genes, report.n_regions) == (genes, regions)
    table = DataSpec.of(adata).table(adata)
    assert (table.x is None, table.y is None) == (genes == 0, regions == 0)
    assert bool(table.has_rna.all()) == (genes > 0)


def test_chromatin_accessibility_is_a_region():
    adata = make()
    adata.var["feature_types"] = adata.var["feature_types"].replace("Peaks", "Chromatin Accessibility")
    assert setup_anndata(adata).n_regions == PEAKS


def test_peaks_may_be_anything_not_negative_and_binary_is_named():
    adata = make()
    dense = adata.X.toarray()
    peaks = (adata.var["feature_types"] == "Peaks").to_numpy()
    dense[:, peaks] *= 0.3
    adata.X = dense
    report = setup_anndata(adata)
    assert any("only zero or not zero is used" in note for note in report.notes)
    assert report.counts["ATAC"].startswith("adata.X: not whole numbers")
    dense[:, peaks] = dense[:, peaks] > 0
    adata.X = dense
    assert setup_anndata(adata).counts["ATAC"] == "adata.X: binary"


def test_size_factors_reach_the_table_and_may_lack_where_not_measured():
    adata = make()
    dense = adata.X.toarray()
    peaks = (adata.var["feature_types"] == "Peaks").to_numpy()
    dense[3, peaks] = 0
    adata.X = dense
    adata.obs["depth"] = np.arange(8) + 1.0
    adata.obs["open"] = 0.3
    adata.obs.loc["cell3", "open"] = np.nan
    setup_anndata(adata, size_factor_key=["depth", "open"])
    table = DataSpec.of(adata).table(adata)
    assert table.rna_size.tolist() == (np.arange(8) + 1.0).tolist()
    # The median of the others.
    assert table.atac_size[3].item() == pytest.approx(0.3)
    assert table.atac_size[0].item() == pytest.approx(0.3)
    setup_anndata(adata, size_factor_key="depth")
    assert DataSpec.of(adata).table(adata).atac_size is None
    adata.obs.loc["cell2", "open"] = np.nan
    with pytest.raises(ValueError, match=r"'open' must be above 0 and below 1 .* nan for cell 'cell2'"):
        setup_anndata(adata, size_factor_key=[None, "open"])
    adata.obs.loc["cell5", "depth"] = 0.0
    with pytest.raises(ValueError, match=r"'depth' must be above 0 and finite .* 0.0 for cell 'cell5'"):
        setup_anndata(adata, size_factor_key="depth")


def test_real_mosaic(shared_data):
    adata = ad.read_h5ad(shared_data / "multiome_mosaic150.h5ad")
    stated = setup_anndata(adata, modality_key="modality")
    assert stated.n_cells == {"paired": 50, "expression": 50, "accessibility": 50}
    assert not stated.inferred
    table = DataSpec.of(adata).table(adata)
    assert (table.has_rna & table.has_atac).tolist() == (adata.obs["modality"] == "paired").tolist()
    assert len(table.x.val) + len(table.y.val) == adata.X.nnz
    inferred = setup_anndata(adata)
    assert inferred.n_cells == stated.n_cells
    assert inferred.inferred


def test_x_is_no_layer():
    # AnnData 0.13 has X among its layers, as None.
    adata = make()
    adata.layers["counts"] = adata.X.copy()
    assert layer_names(adata.layers) == ["counts"]
    assert layer_names([None, "counts"]) == ["counts"]
