"""AnnData on disk, filled block by block: HDF5 or zarr."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi._optional import require
from pyro_multivi.datasets.stores.elements import write_element
from pyro_multivi.files import RecordingFile

#: Cells x features of a chunk, 1 MB in float32: neither rows nor columns are slow to read.
CHUNK = (256, 1024)
# Stored entries of a chunk of a sparse matrix.
_SPARSE_CHUNK = 2**18


class Container:
    """An AnnData in a file, whose matrices are written after everything else.

    Parameters
    ----------
    path
        Path of the file.
    frame
        The AnnData without its matrices: the file is written anew. None: it is there.
    dense
        Elements that hold dense matrices, float32.
    """

    #: Rows in which an interrupted write may damage what was there.
    rows_at_once = 1

    def __init__(self, path: Path, frame: AnnData | None = None, dense: Sequence[str] = ()) -> None:
        self._path = path
        self._arrays: dict[str, Any] = {}
        self._root = self._open(frame is None)
        try:
            if frame is not None:
                # Matrices are added as they come.
                write_element(self._root, "/", frame)
            for element in dense:
                # They stay open: what fails while HDF5 drops a handle is not reported.
                self._arrays[element] = self._root[element] if frame is None else self._matrix(element, frame.shape)
            self.flush()
        except BaseException:
            with suppress(OSError):
                self.close()
            raise

    def put(self, element: str, rows: slice, features: slice, values: NDArray[Any]) -> None:
        """Write a block of a dense matrix."""
        self._arrays[element][rows, features] = values

    def write_sparse(self, element: str, lengths: NDArray[np.int64], values: Path, columns: Path, width: int) -> None:
        """Write a sparse matrix whose values (float32) and columns (int32) lie in files, row after row."""
        matrix = self._root.create_group(element)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        self._create(f"{element}/indptr", indptr.shape, np.int64, (min(len(indptr), _SPARSE_CHUNK),))[:] = indptr
        for part, path, kind in (("data", values, np.float32), ("indices", columns, np.int32)):
            array = self._create(f"{element}/{part}", (int(indptr[-1]),), kind, (_SPARSE_CHUNK,), grows=True)
            with path.open("rb") as file:
                for start in range(0, int(indptr[-1]), _SPARSE_CHUNK):
                    piece = np.fromfile(file, kind, _SPARSE_CHUNK)
                    array[start : start + len(piece)] = piece
        shape = [len(lengths), width]
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})

    def discard(self, n_rows: int) -> None:
        """Forget the rows of dense matrices after the first ones, which may be damaged."""

    def flush(self) -> None:
        """Hand everything to the operating system, or raise OSError."""

    def close(self) -> None:
        """Flush, wait until everything is on disk, and close."""

    def _matrix(self, element: str, shape: tuple[int, int]) -> Any:
        chunks = tuple(max(min(size, most), 1) for size, most in zip(shape, CHUNK, strict=True))
        array = self._create(element, shape, np.float32, chunks)
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        return array

    def _open(self, exists: bool) -> Any:
        raise NotImplementedError

    def _create(
        self, element: str, shape: tuple[int, ...], kind: Any, chunks: tuple[int, ...], grows: bool = False
    ) -> Any:
        raise NotImplementedError


class Hdf5(Container):
    """An AnnData in a ``.h5ad`` file."""

    def _open(self, exists: bool) -> h5py.File:
        self._file = RecordingFile(self._path, "r+" if exists else "w+")
        try:
            return h5py.File(self._file, "r+" if exists else "w")
        except BaseException:
            self._file.close()
            raise

    def _create(
        self, element: str, shape: tuple[int, ...], kind: Any, chunks: tuple[int, ...], grows: bool = False
    ) -> Any:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        # The places of all chunks are settled at once, so that no kill finds the index of them half written.
        layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        limits = (None,) if grows else None
        return self._root.create_dataset(element, shape, kind, chunks=chunks, maxshape=limits, dcpl=layout)

    def flush(self) -> None:
        """See :class:`Container`."""
        try:
            self._root.flush()
        finally:
            if self._file.error is not None:
                raise self._file.error

    def close(self) -> None:
        """See :class:`Container`."""
        self._arrays.clear()
        with self._file:
            try:
                self._root.close()
            finally:
                self._file.finish()


class Zarr(Container):
    """An AnnData in a ``.zarr`` folder."""

    # A chunk is a file that is written as a whole.
    rows_at_once = CHUNK[0]

    def _open(self, exists: bool) -> Any:
        zarr = require("zarr", "zarr")
        if exists:
            return zarr.open_group(str(self._path), mode="r+")
        # Version 2 of the format is read by every AnnData we support.
        version = {"zarr_format": 2} if hasattr(zarr.Group, "create_array") else {}
        return zarr.open_group(str(self._path), mode="w", **version)

    def _create(
        self, element: str, shape: tuple[int, ...], kind: Any, chunks: tuple[int, ...], grows: bool = False
    ) -> Any:
        create = self._root.create_array if hasattr(self._root, "create_array") else self._root.create_dataset
        return create(element, shape=shape, dtype=kind, chunks=chunks)

    def discard(self, n_rows: int) -> None:
        """See :class:`Container`."""
        for element in self._arrays:
            for chunk in (self._path / element).iterdir():
                place = re.fullmatch(r"(\d+)\.\d+", chunk.name)
                if place is not None and int(place[1]) * CHUNK[0] >= n_rows:
                    chunk.unlink()


def container(path: Path, frame: AnnData | None = None, dense: Sequence[str] = ()) -> Container:
    """The container that the suffix of a path says; see :class:`Container`."""
    return (Zarr if path.suffix == ".zarr" else Hdf5)(path, frame, dense)
