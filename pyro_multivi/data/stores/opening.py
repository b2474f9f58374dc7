"""Matrices of an AnnData that lie on disk, found as such."""

from __future__ import annotations

from typing import Any

from pyro_multivi.data.checks import caution
from pyro_multivi.data.stores.joined import JoinedMatrix
from pyro_multivi.data.stores.matrix import LazyMatrix, RowMatrix, StoredMatrix


def on_disk(matrix: Any, where: str) -> RowMatrix | None:
    """A matrix that can be read by rows; None for one in memory, or in a file open for writing.

    Parameters
    ----------
    matrix
        That of an AnnData: in memory, a dataset of h5py or zarr, anndata's wrapper of a sparse one, a dask array, or
        that of stores.
    where
        How the user would write it.

    Warns
    -----
    UserWarning
        If it is compressed by columns, so that all of it has to be read.
    """
    if isinstance(matrix, (JoinedMatrix, StoredMatrix, LazyMatrix)):
        return matrix
    if hasattr(matrix, "dask"):
        return LazyMatrix(matrix, where)
    stored = getattr(matrix, "group", matrix)
    if not hasattr(stored, "attrs") or not hasattr(matrix, "shape"):
        return None
    if getattr(matrix, "format", "csr") == "csc":
        caution(
            f"{where} lies on disk compressed by columns (CSC): all of it is read into memory. Convert it once, and it "
            "is read by cells: pyro_multivi.convert_stores(IN, 'OUT.zarr'), or on the command line pyro-multivi "
            "convert IN OUT.zarr."
        )
        return None
    file = getattr(stored, "file", None)
    if file is None:
        return LazyMatrix(stored, where)
    return StoredMatrix(file.filename, stored.name) if file.mode == "r" else None
