"""Matrices on disk that are damaged, or in a form of other programs."""

from __future__ import annotations

import anndata as ad
import h5py
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores.matrix import StoreChangedError, StoredMatrix


def without_last(file, *parts):
    for part in parts:
        values = file[f"X/{part}"][:-5]
        del file[f"X/{part}"]
        file[f"X/{part}"] = values


def with_pointer(file, row, value):
    file["X/indptr"][row] = value


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: with_pointer(file, 10, 10**6),
        lambda file: with_pointer(file, 10, 0),
        lambda file: with_pointer(file, 0, 3),
        lambda file: without_last(file, "data"),
        lambda file: without_last(file, "indices"),
        lambda file: without_last(file, "data", "indices"),
        lambda file: without_last(file, "indptr"),
    ],
    ids=["beyond", "backwards", "not from 0", "few values", "few columns", "few entries", "few rows"],
)
def test_row_pointers_that_do_not_fit_are_damage(mosaic, tmp_path, damage):
    """SciPy would read memory beyond the entries, as counts or until the process crashes."""
    path = tmp_path / "a.h5ad"
    mosaic.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    for use in (StoredMatrix, pm.open_stores):
        with pytest.raises(StoreChangedError, match=r"a\.h5ad, 'X' is damaged: its row pointers \(indptr\) do not fit"):
            use(path)


def compressed_by(number, path, *names):
    """Have arrays say that they are compressed by a codec, as a file of another machine does."""
    with h5py.File(path, "r+") as file:
        for name in names:
            values = file[name][:]
            del file[name]
            layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            layout.set_chunk((len(values),))
            layout.set_filter(number, h5py.h5z.FLAG_OPTIONAL)
            space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
            made = h5py.h5d.create(file.id, name.encode(), kind, space, layout)
            made.write_direct_chunk((0,), values.tobytes())


@pytest.mark.parametrize("part", ["data", "indptr"])
@pytest.mark.parametrize(("number", "codec"), [(32015, "zstd"), (32099, "the filter 32099")])
def test_a_codec_that_is_not_installed_is_no_damage(mosaic, tmp_path, part, number, codec):
    if h5py.h5z.filter_avail(number):
        pytest.skip("its plugin is installed")
    path = tmp_path / "a.h5ad"
    mosaic.write_h5ad(path)
    compressed_by(number, path, f"X/{part}")
    said = rf"a\.h5ad cannot be read: it is compressed by {codec}, which HDF5 lacks here\. Install hdf5plugin"
    for use in (
        lambda: pm.read(path),
        lambda: pm.MULTIVI.setup_anndata(pm.open_stores(path), modality_key="modality"),
        lambda: pm.MULTIVI.setup_anndata(ad.read_h5ad(path, backed="r"), modality_key="modality"),
        lambda: pm.convert_stores(path, tmp_path / "b.zarr", progress_bar=False),
    ):
        with pytest.raises(OSError, match=said):
            use()


@pytest.mark.parametrize("kind", [">f4", ">f2", ">i8", ">u2"])
def test_counts_in_the_byte_order_of_another_machine(mosaic, tmp_path, kind):
    """Dense ones in memory and on disk, and sparse ones on disk."""
    keys = {"modality_key": "modality", "batch_key": "batch"}
    other = mosaic.copy()
    other.X = mosaic.X.toarray().astype(kind)
    other.write_h5ad(tmp_path / "dense.h5ad")
    mosaic.write_h5ad(tmp_path / "sparse.h5ad")
    with h5py.File(tmp_path / "sparse.h5ad", "r+") as file:
        for part, values in (("data", mosaic.X.data.astype(kind)), ("indices", mosaic.X.indices.astype(">i4"))):
            del file[f"X/{part}"]
            file[f"X/{part}"] = values
    pm.MULTIVI.setup_anndata(mosaic, **keys)
    expected = DataSpec.of(mosaic).table(mosaic)
    for adata in (other, pm.open_stores(tmp_path / "dense.h5ad"), pm.open_stores(tmp_path / "sparse.h5ad")):
        pm.MULTIVI.setup_anndata(adata, **keys)
        table = DataSpec.of(adata).table(adata)
        assert table.difference(expected) is None
        assert torch.equal(table.batch(torch.arange(120)).x.to_dense(), expected.batch(torch.arange(120)).x.to_dense())
