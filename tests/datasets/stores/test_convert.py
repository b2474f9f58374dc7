"""Conversion: the same data set, whatever it came from and however often it was interrupted."""

from __future__ import annotations

from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.datasets.stores import convert

QUIET = {"progress_bar": False}


@pytest.fixture
def cells():
    adata = pm.simulate_multiome((40, 20, 20), n_genes=14, n_regions=26, n_batches=2, seed=0)
    return ad.AnnData(sp.csr_matrix(adata.X), obs=adata.obs, var=adata.var)


@pytest.fixture
def small_files(monkeypatch):
    """Files of 200 entries, and blocks of 7 rows."""
    monkeypatch.setattr(convert, "_SHARD", 200)
    monkeypatch.setattr(convert, "_CHUNK", 50)
    monkeypatch.setattr("pyro_multivi.data.stores.matrix._AT_ONCE", 7)
    monkeypatch.setattr(convert, "_ROWS", 7)


def assert_same(path, cells):
    read = ad.read_zarr(path)
    assert (read.X != cells.X).nnz == 0
    assert read.obs_names.equals(cells.obs_names)
    assert read.obs["batch"].tolist() == cells.obs["batch"].tolist()
    assert read.var["feature_types"].tolist() == cells.var["feature_types"].tolist()
    stored = pm.open_stores(path)
    reports = [pm.MULTIVI.setup_anndata(each, modality_key="modality") for each in (stored, cells)]
    assert repr(reports[0]) == repr(reports[1])


@pytest.mark.parametrize("form", ["csr", "csc", "dense", "float64"])
def test_what_is_written_is_what_was_read(cells, tmp_path, form, small_files):
    written = cells.copy()
    forms = {"csc": cells.X.tocsc(), "dense": cells.X.toarray(), "float64": cells.X.astype(float)}
    written.X = forms.get(form, cells.X)
    written.write_h5ad(tmp_path / "a.h5ad")
    path = convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    assert_same(path, cells)
    group = zarr.open_group(str(path), mode="r")
    assert group["X/data"].dtype == (np.uint8 if cells.X.max() < 256 else np.int16)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5ad", "a.zarr"]


def test_counts_that_no_small_type_holds(cells, tmp_path):
    cells.X.data[3] = 70_000
    cells.write_h5ad(tmp_path / "a.h5ad")
    convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    assert_same(tmp_path / "a.zarr", cells)


@pytest.mark.parametrize("file", [1, 2, 5])
def test_the_same_call_goes_on_where_it_was_interrupted(cells, tmp_path, monkeypatch, small_files, file):
    cells.write_h5ad(tmp_path / "a.h5ad")
    call = convert.convert_stores, (tmp_path / "a.h5ad", tmp_path / "a.zarr")
    noted, write = [], convert.UnfinishedFolder.write_progress

    def dies(self, progress):
        write(self, progress)
        noted.append(progress["done"])
        if len(noted) == file:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert.UnfinishedFolder, "write_progress", dies)
        with pytest.raises(KeyboardInterrupt):
            call[0](*call[1], **QUIET)
    assert not (tmp_path / "a.zarr").exists()
    counted = []
    monkeypatch.setattr(convert, "_count", lambda *_: counted.append(1))
    call[0](*call[1], **QUIET)
    assert counted == []
    assert_same(tmp_path / "a.zarr", cells)
    assert noted[-1] == 200 * (file - 1)


@pytest.mark.parametrize("earlier", [False, True])
def test_the_same_call_goes_on_where_the_last_step_failed(cells, tmp_path, monkeypatch, small_files, earlier):
    cells.write_h5ad(tmp_path / "a.h5ad")

    def fails(self):
        raise PermissionError("no")

    with monkeypatch.context() as patch:
        patch.setattr(convert.UnfinishedFolder, "publish", fails)
        with pytest.raises(PermissionError):
            convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    if earlier:  # which deleted the row pointers before the last step
        (tmp_path / ".a.zarr.unfinished" / "indptr.npy").unlink()
    convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    assert_same(tmp_path / "a.zarr", cells)


@pytest.mark.parametrize("limit", [1, 3000, 8000])
def test_after_a_full_disk_the_same_call_writes_it(tmp_path, small_files, limit):
    """Also where only the last of 8136 bytes of row pointers found no place, and nothing else is as large."""
    resource = pytest.importorskip("resource")
    cells = pm.simulate_multiome((1000, 0, 0), n_genes=3, n_regions=4, n_types=2, seed=0)
    cells.write_h5ad(tmp_path / "a.h5ad")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    assert_same(tmp_path / "a.zarr", cells)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5ad", "a.zarr"]


def test_what_was_begun_for_other_data_is_begun_anew(cells, tmp_path, monkeypatch, small_files, caplog):
    cells.write_h5ad(tmp_path / "a.h5ad")
    with monkeypatch.context() as patch:
        patch.setattr(convert, "_create", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    other = cells[:30].copy()
    other.write_h5ad(tmp_path / "b.h5ad")
    convert.convert_stores(tmp_path / "b.h5ad", tmp_path / "a.zarr", **QUIET)
    assert_same(tmp_path / "a.zarr", other)
    assert "is begun anew" in caplog.text


def test_what_is_there_is_not_replaced(cells, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "a.zarr").mkdir()
    with pytest.raises(FileExistsError, match=r"out='.*a\.zarr' exists and is not replaced"):
        convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    assert not any((tmp_path / "a.zarr").iterdir())
    with pytest.raises(ValueError, match=r"out='.*a\.h5ad' must end in \.zarr"):
        convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.h5ad", **QUIET)


def test_several_files_become_one(cells, tmp_path, small_files):
    genes = (cells.var["feature_types"] == "Gene Expression").to_numpy()
    parts = {"A": cells[:40], "B": cells[40:60, genes][:, ::-1]}
    for name, part in parts.items():
        part.copy().write_h5ad(tmp_path / f"{name}.h5ad")
    paths = {name: tmp_path / f"{name}.h5ad" for name in parts}
    convert.convert_stores(paths, tmp_path / "both.zarr", **QUIET)
    joined = pm.join_samples({name: part.copy() for name, part in parts.items()})
    read = ad.read_zarr(tmp_path / "both.zarr")
    assert (read[:, joined.var_names].X != joined.X).nnz == 0
    assert read.obs["sample"].tolist() == joined.obs["sample"].tolist()


def test_gaps_in_text_of_one_file_stay_gaps(cells, tmp_path):
    cells.obs["note"], cells.obs["seen"] = "x", True
    cells[:30].copy().write_h5ad(tmp_path / "a.h5ad")
    cells[30:, ::-1].copy().write_h5ad(tmp_path / "b.h5ad")
    b = ad.read_h5ad(tmp_path / "b.h5ad")
    del b.obs["note"], b.obs["seen"]
    b.write_h5ad(tmp_path / "b.h5ad")
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    found = ad.read_zarr(convert.convert_stores(paths, tmp_path / "both.zarr", **QUIET)).obs
    for name in ("note", "seen"):
        assert found[name].isna().tolist() == [False] * 30 + [True] * (cells.n_obs - 30)


@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_setup_of_a_layer_is_one_of_x(cells, tmp_path, caplog, form):
    cells.layers["counts"] = cells.X if form == "csr" else cells.X.tocsc()
    cells.X = cells.X * np.float32(0.5)
    pm.MULTIVI.setup_anndata(cells, layer="counts", batch_key="batch", modality_key="modality")
    cells.write_h5ad(tmp_path / "a.h5ad")
    path = convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", layer="counts", **QUIET)
    stored = pm.open_stores(path)
    assert Setup.of(stored) == replace(Setup.of(cells), rna_layer=None, atac_layer=None)
    assert pm.MULTIVI(stored, n_hidden=4, n_latent=2).spec.setup.batch_key == "batch"
    # Of other counts than those that were set up, the setup says nothing.
    with caplog.at_level("WARNING", "pyro_multivi"):
        path = convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "x.zarr", **QUIET)
    assert "The setup is not taken over: its counts are in layer 'counts', not None." in caplog.text
    with pytest.raises(ValueError, match="was not set up"):
        Setup.of(pm.open_stores(path))


@pytest.mark.parametrize("as_dict", [True, False])
def test_one_file_by_columns_as_a_list_or_dictionary(cells, tmp_path, as_dict):
    cells.X = cells.X.tocsc()
    cells.write_h5ad(tmp_path / "a.h5ad")
    stores = {"a": tmp_path / "a.h5ad"} if as_dict else [tmp_path / "a.h5ad"]
    path = convert.convert_stores(stores, tmp_path / "a.zarr", **QUIET)
    assert_same(path, cells)
    assert set(ad.read_zarr(path).obs["sample"]) == {"a"}


def test_convert_on_the_command_line(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells.write_h5ad("a.h5ad")
    assert main(["convert", "a.h5ad", "a.zarr", "--quiet"]) == 0
    assert capsys.readouterr().out.endswith("a.zarr: 80 cells x 40 features\n")
    assert main(["convert", "a.h5ad", "a.zarr"]) == 1
    assert capsys.readouterr().err.startswith("pyro-multivi: OUT 'a.zarr' exists and is not replaced")
    assert main(["convert", "nowhere.h5ad", "b.zarr"]) == 1
    assert "there is no such file or folder" in capsys.readouterr().err
    with h5py.File("a.h5ad", "r+") as file:
        file["X"].attrs["encoding-type"] = "csc_matrix"
    with pytest.raises(ValueError, match="by columns") as error:
        pm.open_stores("a.h5ad")
    assert "pyro-multivi convert IN OUT.zarr" in str(error.value)


def test_masks_are_refused_not_lost(tmp_path):
    cells = pm.simulate_multiome((12, 0, 0), n_genes=10, n_regions=12, seed=0)
    pm.join_samples([cells[:6, :20], cells[6:, 4:]], features="union").write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match="says which features each batch measured"):
        convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", **QUIET)
    assert not (tmp_path / "a.zarr").exists()


def test_a_layer_by_columns_beside_counts_by_rows(cells, tmp_path):
    written = cells.copy()
    written.layers["counts"], written.X = cells.X.tocsc(), cells.X * 0.5
    written.write_h5ad(tmp_path / "a.h5ad")
    assert_same(convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "a.zarr", layer="counts", **QUIET), cells)
    with pytest.raises(ValueError, match="layer='count' is not in adata.layers"):
        convert.convert_stores(tmp_path / "a.h5ad", tmp_path / "b.zarr", layer="count", **QUIET)
