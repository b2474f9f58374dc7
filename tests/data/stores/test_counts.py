"""Counts on disk are those in memory, whatever form they lie in and whichever cells are asked for."""

from __future__ import annotations

import errno
import os
import shutil
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import zarr

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores.counts import StoredCounts, row_hashes
from pyro_multivi.data.stores.matrix import StoreChangedError, StoredMatrix, spans

try:
    from anndata.io import write_elem
except ImportError:  # anndata before 0.11
    from anndata.experimental import write_elem

#: Of zarr 3; zarr 2 knows no other format.
FORMAT_2: dict[str, Any] = {} if zarr.__version__.startswith("2.") else {"zarr_format": 2}

KEYS = {"modality_key": "modality", "batch_key": "batch"}


def table_of(adata):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    return DataSpec.of(adata).table(adata)


def same(one, other):
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in ("crow", "col", "val"))


def test_every_form_holds_the_same_counts(on_disk, mosaic):
    memory, disk = table_of(mosaic), table_of(pm.open_stores(on_disk))
    assert disk.on_disk
    assert not memory.on_disk
    assert memory.difference(disk) is disk.difference(memory) is None
    for index in (
        torch.arange(120),
        torch.tensor([7, 3, 3, 119]),
        torch.arange(119, -1, -3),
        torch.tensor([], dtype=torch.long),
    ):
        one, other = memory.batch(index), disk.batch(index)
        assert same(one.x, other.x)
        assert same(one.y, other.y)
    for name in ("x", "y"):
        one, other = getattr(memory, name), getattr(disk, name)
        assert (one.largest, one.whole) == (other.largest, other.whole)
        assert torch.equal(one.row_sums().double(), other.row_sums())
        assert torch.equal(one.crow, other.crow)


def test_marginals_and_report_are_those_of_memory(on_disk, mosaic):
    stored = pm.open_stores(on_disk)
    assert repr(pm.MULTIVI.setup_anndata(stored, **KEYS)) == repr(pm.MULTIVI.setup_anndata(mosaic, **KEYS))
    one, other = table_of(mosaic).marginals(), table_of(stored).marginals()
    for name, value in vars(one).items():
        found = getattr(other, name)
        assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found, name


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_a_backed_anndata_stays_on_disk_also_when_its_file_is_closed(mosaic, tmp_path, form):
    written = mosaic.copy()
    written.X = written.X.toarray() if form == "dense" else written.X
    written.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    table = table_of(backed)
    backed.file.close()
    assert isinstance(table.x, StoredCounts)
    assert same(table.batch(torch.arange(120)).y, table_of(mosaic).batch(torch.arange(120)).y)


def test_a_backed_anndata_is_found_from_another_folder(mosaic, tmp_path, monkeypatch):
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.chdir(tmp_path)
    backed = ad.read_h5ad("a.h5ad", backed="r")
    table = table_of(backed)
    monkeypatch.chdir("/")
    assert same(table.batch(torch.arange(120)).y, table_of(mosaic).batch(torch.arange(120)).y)
    backed.file.close()


@pytest.mark.parametrize("how", ["replaced", "another folder", "deleted"])
def test_counts_of_another_file_of_the_name_are_not_read(mosaic, tmp_path, monkeypatch, how):
    """Cells, in memory, would be those of one file, and counts those of the other."""
    other = mosaic.copy()
    other.X.data += 1
    (tmp_path / "other").mkdir()
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    other.write_h5ad(tmp_path / "other" / "a.h5ad")
    monkeypatch.chdir(tmp_path)
    backed = ad.read_h5ad("a.h5ad", backed="r")
    if how == "replaced":
        os.replace("other/a.h5ad", "a.h5ad")
    elif how == "deleted":
        os.unlink("a.h5ad")
    else:
        monkeypatch.chdir("other")
    with pytest.raises(StoreChangedError, match=r"adata.X lies in 'a\.h5ad', which is not the file any more"):
        pm.MULTIVI.setup_anndata(backed, **KEYS)
    backed.file.close()


def test_a_file_open_for_writing_is_read_into_memory(mosaic, tmp_path):
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r+")
    assert not table_of(backed).on_disk
    backed.file.close()


def test_each_modality_of_a_backed_mudata_stays_on_disk(tmp_path):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=12, n_regions=18, seed=0, return_mudata=True)
    with mudata_as_given() as mudata:
        mdata.write(tmp_path / "m.h5mu")
        backed = mudata.read_h5mu(tmp_path / "m.h5mu", backed="r")
    pm.MULTIVI.setup_mudata(backed)
    pm.MULTIVI.setup_mudata(mdata)
    table, memory = DataSpec.of(backed).table(backed), DataSpec.of(mdata).table(mdata)
    assert table.on_disk
    assert memory.difference(table) is None
    index = torch.tensor([39, 0, 25, 3])
    assert same(memory.batch(index).y, table.batch(index).y)
    backed.file.close()


def test_duplicates_zeros_and_order_on_disk_do_not_show(mosaic, tmp_path):
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        rows = sp.csr_matrix((file["X/data"][:], file["X/indices"][:], file["X/indptr"][:]), shape=mosaic.shape)
        data, indices, indptr = [], [], [0]
        for row in range(mosaic.n_obs):
            own = rows[row]
            values, places = own.data.tolist(), own.indices.tolist()
            # Backwards, a zero that is stored, and a count in two parts.
            values, places = [*values[::-1], 0.0, values[0] - 1, 1.0], [*places[::-1], 39, places[0], places[0]]
            values[len(own.data) - 1] = 0.0
            data += values
            indices += places
            indptr.append(len(data))
        for name, part in {"data": data, "indices": indices, "indptr": indptr}.items():
            kind = file[f"X/{name}"].dtype
            del file[f"X/{name}"]
            file[f"X/{name}"] = np.array(part, dtype=kind)
    table = table_of(pm.open_stores(tmp_path / "a.h5ad"))
    memory = table_of(mosaic)
    assert memory.difference(table) is None
    assert same(memory.batch(torch.arange(120)).x, table.batch(torch.arange(120)).x)


@pytest.mark.parametrize("kind", [np.uint16, np.uint64, np.int64])
def test_columns_of_any_type_of_whole_numbers(mosaic, tmp_path, kind):
    """SciPy has no unsigned indices; programs other than anndata write them."""
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        indptr, data, indices = (file[f"X/{part}"][:] for part in ("indptr", "data", "indices"))
        row = np.repeat(np.arange(mosaic.n_obs), np.diff(indptr))
        backwards = np.lexsort((-indices, row))
        file["X/data"][:] = data[backwards]
        for name, part in {"indices": indices[backwards], "indptr": indptr}.items():
            del file[f"X/{name}"]
            file[f"X/{name}"] = part.astype(kind)
    table, memory = table_of(pm.open_stores(tmp_path / "a.h5ad")), table_of(mosaic)
    assert memory.difference(table) is None
    index = torch.tensor([50, 3, 4, 119])
    assert same(memory.batch(index).x, table.batch(index).x)
    assert same(memory.batch(index).y, table.batch(index).y)


def test_values_that_are_no_counts_are_named_with_their_cell(mosaic, tmp_path):
    values = mosaic.X.toarray()
    values[5, mosaic.var_names.get_loc("gene_03")] = 1.5
    mosaic.X = sp.csr_matrix(values)
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    stored = pm.open_stores(tmp_path / "a.h5ad")
    with pytest.raises(
        ValueError, match=r"not a whole number, for instance 1.5 for cell 'cell_005' and gene 'gene_03'"
    ):
        pm.MULTIVI.setup_anndata(stored, **KEYS)


def test_a_change_of_one_count_is_told_by_its_cell(mosaic, tmp_path):
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    before = table_of(pm.open_stores(tmp_path / "a.h5ad"))
    mosaic.X.data[mosaic.X.indptr[50]] += 1
    mosaic.write_h5ad(tmp_path / "b.h5ad")
    after = table_of(pm.open_stores(tmp_path / "b.h5ad"))
    assert "in 1 of 120 cells, the first being 'cell_050'" in before.difference(after)
    shifted = sp.csr_array(np.array([[0, 1, 2], [0, 2, 1], [0, 1, 2], [1, 0, 2]]))
    hashes = row_hashes(shifted)
    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 3


@pytest.mark.parametrize("how", ["rewritten", "moved", "truncated"])
def test_a_store_that_changes_while_it_is_used(mosaic, tmp_path, how):
    path = tmp_path / "a.h5ad"
    mosaic.write_h5ad(path)
    table = table_of(pm.open_stores(path))
    if how == "rewritten":
        mosaic.write_h5ad(path)
    elif how == "moved":
        shutil.move(path, tmp_path / "b.h5ad")
    else:
        os.truncate(path, 2000)
    found = "not there any more" if how == "moved" else "was changed while it was in use"
    with pytest.raises(StoreChangedError, match=rf"a\.h5ad (is )?{found}"):
        table.batch(torch.tensor([3]))


@pytest.mark.parametrize("how", ["lost", "rewritten"])
def test_a_chunk_of_a_zarr_store_that_changes(mosaic, tmp_path, how):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", **FORMAT_2)
    write_elem(group, "/", mosaic)
    table = table_of(pm.open_stores(tmp_path / "a.zarr"))
    chunk = next(path for path in sorted((tmp_path / "a.zarr/X/data").iterdir()) if not path.name.startswith("."))
    if how == "lost":
        chunk.unlink()  # which zarr would take for zeros
    else:
        chunk.write_bytes(chunk.read_bytes()[:-1])
    with pytest.raises(StoreChangedError, match=r"a\.zarr was changed while it was in use"):
        table.batch(torch.tensor([3]))


def test_neighbours_are_read_along_and_far_rows_are_not():
    rows = np.array([0, 2, 3, 40, 41, 100, 2500, 2501])
    assert [part.tolist() for part in spans(rows, 1024)] == [[0, 2, 3], [40, 41], [100], [2500, 2501]]
    assert [len(part) for part in spans(np.arange(2500), 1024)] == [1024, 1024, 452]
    assert list(spans(np.array([], dtype=np.int64), 1024)) == []


def test_reading_opens_the_file_for_that_time_only(mosaic, tmp_path):
    mosaic.write_h5ad(tmp_path / "a.h5ad")
    matrix = StoredMatrix(tmp_path / "a.h5ad")
    with matrix.reading() as read:
        (rows,) = read([(3, 7)])
    assert (rows != mosaic.X[3:7]).nnz == 0
    with h5py.File(tmp_path / "a.h5ad", "r+"):  # which HDF5 refuses while the file is open for reading
        pass


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
@pytest.mark.parametrize("form", ["zarr2", "zarr2/", "zarr3", "shards"])
def test_chunks_that_are_not_there_are_no_zeros(mosaic, tmp_path, form, part):
    path, x = tmp_path / "a.zarr", sp.csr_matrix(mosaic.X)
    if zarr.__version__.startswith("2.") and form != "zarr2":
        pytest.skip("zarr 2 writes format 2 only")
    group = zarr.open_group(str(path), mode="w", **(FORMAT_2 if form.startswith("zarr2") else {}))
    write_elem(group, "/", mosaic)
    for name in ("data", "indices", "indptr"):
        values = getattr(x, name)
        del group[f"X/{name}"]
        kind = {"shards": (40,)} if form == "shards" else {}
        if form == "zarr2/":
            kind = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
        create = group["X"].create_dataset if zarr.__version__.startswith("2.") else group["X"].create_array
        create(name, shape=values.shape, dtype=values.dtype, chunks=(20,), **kind)[:] = values
    before = pm.open_stores(path)
    assert before.shape == mosaic.shape
    folder = path / "X" / part
    (folder / "c" / "2" if (folder / "c").is_dir() else folder / "2").unlink()
    said = rf"a\.zarr is incomplete.* 'X/{part}' 1 chunk is not there \('(c/)?2'\)"
    for use in (
        lambda: pm.open_stores(path),
        lambda: pm.read(path),
        lambda: pm.MULTIVI.setup_anndata(before, **KEYS),
        lambda: pm.convert_stores(path, tmp_path / "b.zarr", progress_bar=False),
    ):
        with pytest.raises(StoreChangedError, match=said):
            use()


def test_chunks_of_zeros_may_be_left_out(tmp_path):
    # The first cells have no count, and the others one each, of the first feature.
    x = sp.csr_matrix((np.ones(20), np.zeros(20, dtype=np.int32), np.r_[np.zeros(20), np.arange(21)]), shape=(40, 3))
    path = tmp_path / "a.zarr"
    group = zarr.open_group(str(path), mode="w", **FORMAT_2)
    write_elem(group, "/", ad.AnnData(x))
    for name in ("indices", "indptr"):
        values = getattr(x, name)
        del group[f"X/{name}"]
        create = group["X"].create_dataset if zarr.__version__.startswith("2.") else group["X"].create_array
        create(name, shape=values.shape, dtype=values.dtype, chunks=(10,), fill_value=0)[:] = values
        (path / "X" / name / "0").unlink(missing_ok=True)
    assert np.array_equal(pm.read(path).X.toarray(), x.toarray())
    assert StoredMatrix(path).shape == (40, 3)


def test_errors_of_the_machine_are_not_of_the_store(mosaic, tmp_path):
    resource = pytest.importorskip("resource")
    paths = [tmp_path / f"{number:03}.h5ad" for number in range(120)]
    for number, path in enumerate(paths):
        mosaic[[number]].copy().write_h5ad(path)
    stored = pm.open_stores(paths)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 80, limits[1]))
    try:
        # One store after the other, of which not all stay open.
        pm.MULTIVI.setup_anndata(stored, **KEYS)
        table = DataSpec.of(stored).table(stored)
        assert table.batch(torch.arange(120)).x.shape[0] == 120
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 20, limits[1]))
        with pytest.raises(OSError, match=r"\.h5ad cannot be read \(Too many open files\).*ulimit -n") as caught:
            table.batch(torch.arange(120))
        assert caught.value.errno == errno.EMFILE
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert table.batch(torch.arange(120)).x.shape[0] == 120


def test_a_file_that_another_program_writes_to_is_not_broken(mosaic, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    path = tmp_path / "a.h5ad"
    mosaic.write_h5ad(path)
    table = table_of(pm.open_stores(path))
    said = r"a\.h5ad cannot be read .*Another program has it open for writing"
    with path.open("rb+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # as HDF5 does
        for use in (
            lambda: pm.read(path),
            lambda: pm.open_stores(path),
            lambda: table.batch(torch.arange(3)),
            lambda: pm.convert_stores(path, tmp_path / "b.zarr", progress_bar=False),
        ):
            with pytest.raises(BlockingIOError, match=said):
                use()
    assert table.batch(torch.arange(3)).x.shape[0] == 3


def test_a_file_that_may_not_be_read_is_not_of_another_format(mosaic, tmp_path, monkeypatch):
    path = tmp_path / "a.h5ad"
    mosaic.write_h5ad(path)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(type(path), "open", denied)  # root has every right
    monkeypatch.setattr(h5py, "is_hdf5", lambda _: False)
    for use in (pm.read, pm.read_10x_h5):
        with pytest.raises(PermissionError, match=r"a\.h5ad cannot be read \(Permission denied\). You may not"):
            use(path)
