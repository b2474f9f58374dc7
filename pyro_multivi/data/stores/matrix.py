"""Matrices on disk, read by rows: compressed or dense, in HDF5, zarr or dask."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.stores.chunks import CONVERT, raise_system_error, refuse_incomplete
from pyro_multivi.data.stores.chunks import StoreChangedError as StoreChangedError
from pyro_multivi.data.stores.freed import count_read
from pyro_multivi.data.stores.slices import slices_reader

Rows = Any  # sp.csr_array, whose type SciPy's stubs parametrise by shape
#: Reads spans of rows, each from a first row to before another, one after the other: compressed; they may be changed.
ReadRows = Callable[[Sequence[tuple[int, int]]], Iterator[Rows]]

# Rows between two wanted ones that are read along: a second reading costs more than the counts of so few cells.
_GAP = 32
#: End of a sentence on files of that time.
WRITTEN_BEFORE = (
    "of the form of anndata before 0.7, which is not read by cells. Convert the file, and give what that writes in its "
    f"place: {CONVERT}."
)
# Rows, and values of a dense matrix, read at a time at most: what is read along, and types as wide as on disk, stay
# small.
_AT_ONCE, _VALUES_AT_ONCE = 1024, 2**24


class RowMatrix(Protocol):
    """A matrix of counts (n, F) whose rows are read when they are needed."""

    shape: tuple[int, int]
    at_once: int

    def status(self) -> object:
        """Sizes and times of what lies on disk, by which a change is noticed."""

    def reading(self) -> AbstractContextManager[ReadRows]:
        """A context that gives the function to read with, and in which a change is an error."""


class StoredMatrix:
    """A matrix in an HDF5 file or a zarr group.

    It is opened for each reading, so that no file stays open in between, and a file that was replaced is noticed.

    Parameters
    ----------
    path
        File or folder.
    name
        Of the matrix in it, such as ``"X"`` or ``"layers/counts"``.

    Raises
    ------
    ValueError
        If there is no such matrix, or it is compressed by columns.
    StoreChangedError
        If chunks of it are not there, which would be read as zeros, or row pointers do not fit its entries.
    """

    def __init__(self, path: str | os.PathLike[str], name: str = "X") -> None:
        self.path, self.name = Path(path), name
        with opened_group(self.path) as group:
            if name not in group:
                folder, _, _ = name.rpartition("/")
                known = first_names(group[folder] if folder else group) or "nothing"
                raise ValueError(f"{self.path} has no {name!r}; it has {known}.")
            if self.path.is_dir():
                refuse_incomplete(self.path, name, group[name])
            try:
                self._indptr, self.shape, self.at_once = layout(group[name], f"{self.path}, {name!r}")
            except OSError as error:
                raise_system_error(error, self.path)
                raise
            self.dtype = np.dtype((group[name] if self._indptr is None else group[name]["data"]).dtype)
        if self.dtype.kind not in "buif":
            raise ValueError(f"{self.path}, {name!r}, holds values of type {self.dtype}; counts must be numbers.")
        self._then = self.status()

    def status(self) -> object:
        """Size and time of change of the file, or of every file of the matrix in a folder."""
        if self.path.is_dir():
            return tuple(sorted(_files(self.path / self.name)))
        found = os.stat(self.path)
        return found.st_ino, found.st_size, found.st_mtime_ns

    @contextmanager
    def reading(self) -> Iterator[ReadRows]:
        """Open it for some readings: a change, before or during the context, raises an error that says so."""
        self._compare()
        with ExitStack() as stack:
            found: list[ReadRows] = []

            def read(spans: Sequence[tuple[int, int]]) -> Iterator[Rows]:
                try:
                    if not found:  # at the first reading, whose error says which rows cannot be read
                        group = stack.enter_context(opened_group(self.path))
                        found.append(reader(group[self.name], self._indptr, self.shape[1]))
                    yield from found[0](spans)
                except Exception as error:  # whatever HDF5 and zarr stumble on
                    raise_system_error(error, self.path)
                    self._compare()
                    raise StoreChangedError(
                        f"Rows {spans[0][0]} to {spans[-1][1] - 1} of {self.path} cannot be read "
                        f"({type(error).__name__}: {error}): it is damaged. Restore it, and open it again."
                    ) from error

            yield read
        self._compare()

    def _compare(self) -> None:
        try:
            now = self.status()
        except OSError as error:
            raise_system_error(error, self.path)
            raise StoreChangedError(
                f"{self.path} is not there any more ({error}). It was moved or deleted while it was in use: put it "
                "back, or open it at its new place."
            ) from error
        if now != self._then:
            raise StoreChangedError(
                f"{self.path} was changed while it was in use: the size or time of change of its files is another. "
                "Counts of before and after would be mixed. Leave the file as it is while it is used; to go on with "
                "the new counts, open it again and make a new model."
            )


class LazyMatrix:
    """A matrix that lies in a dask array, or in a zarr group of any store.

    Parameters
    ----------
    matrix
        The array or group.
    where
        How the user would write it.
    """

    def __init__(self, matrix: Any, where: str) -> None:
        self._matrix, self._where = matrix, where
        self._indptr, self.shape, self.at_once = layout(matrix, where)

    def status(self) -> object:
        """Name: dask gives arrays of the same name the same values. Of others nothing is known."""
        return getattr(self._matrix, "name", None)

    def reading(self) -> AbstractContextManager[ReadRows]:
        """A context that gives the function to read with."""
        return nullcontext(reader(self._matrix, self._indptr, self.shape[1]))


@contextmanager
def opened_group(path: Path) -> Iterator[Any]:
    """The root group of an HDF5 file, or of a zarr folder, whose own metadata are read rather than a copy of them."""
    if path.is_dir():
        from pyro_multivi._optional import require

        zarr = require("zarr", "scale")
        fresh = {} if zarr.__version__.startswith("2.") else {"use_consolidated": False}
        yield zarr.open_group(str(path), mode="r", **fresh)
    else:
        try:
            file = h5py.File(path, "r")
        except OSError as error:
            raise_system_error(error, path)
            raise
        with file:
            yield file


def layout(matrix: Any, where: str) -> tuple[NDArray[np.int64] | None, tuple[int, int], int]:
    """Row pointers of a matrix, None of a dense one; its shape; and the number of rows to read at once."""
    if hasattr(matrix, "dask"):
        return None, (int(matrix.shape[0]), int(matrix.shape[1])), max(map(int, matrix.chunks[0]))
    kind = str(matrix.attrs.get("encoding-type", "array"))
    if kind == "csc_matrix":
        raise ValueError(
            f"{where} is compressed by columns (CSC), so that no row can be read without all others. Convert "
            f"it alone, and give what that writes in its place: {CONVERT}."
        )
    if "h5sparse_format" in matrix.attrs:
        raise ValueError(f"{where} is {WRITTEN_BEFORE}")
    if kind == "csr_matrix":
        n_rows, n_columns = (int(size) for size in matrix.attrs["shape"])
        indptr = np.asarray(matrix["indptr"][:]).astype(np.int64)
        n_values, n_entries = (int(matrix[part].shape[0]) for part in ("data", "indices"))
        if len(indptr) != n_rows + 1 or n_values != n_entries or not pointers_fit(indptr, n_entries):
            raise StoreChangedError(
                f"{where} is damaged: its row pointers (indptr) do not fit {n_rows} rows, {n_entries} columns of "
                f"entries (indices) and {n_values} values (data). Restore it from a copy, or write the matrix again."
            )
        return indptr, (n_rows, n_columns), _AT_ONCE
    if kind != "array" or len(matrix.shape) != 2:
        raise ValueError(f"{where} is no matrix of counts, but of the kind {kind!r}.")
    n_rows, n_columns = map(int, matrix.shape)
    return None, (n_rows, n_columns), max(1, min(_AT_ONCE, _VALUES_AT_ONCE // max(n_columns, 1)))


def pointers_fit(indptr: NDArray[Any], n_entries: int) -> bool:
    """Whether rows follow each other within the entries: SciPy would read memory beyond them, or crash."""
    return int(indptr[0]) == 0 and bool((np.diff(indptr) >= 0).all()) and int(indptr[-1]) <= n_entries


def reader(matrix: Any, indptr: NDArray[np.int64] | None, width: int) -> ReadRows:
    """The function that reads rows of a matrix whose layout is known."""
    if indptr is None:
        return lambda spans: (_dense_rows(matrix, *span) for span in spans)
    # Once: zarr reads the description of an array whenever it is asked for.
    values, columns = slices_reader(matrix, "data"), slices_reader(matrix, "indices")

    def read(spans: Sequence[tuple[int, int]]) -> Iterator[Rows]:
        ends = [(int(indptr[start]), int(indptr[stop])) for start, stop in spans]
        for (start, stop), data, indices in zip(spans, values(ends), columns(ends), strict=True):
            if len(indices) and not (int(indices.min()) >= 0 and int(indices.max()) < width):
                raise ValueError(f"a column is not one of 0 to {width - 1}")
            # Some programs write unsigned numbers, which SciPy's sparse matrices do not have either.
            indices = indices.astype(np.int32 if width < 2**31 else np.int64, copy=False)
            pointers = (indptr[start : stop + 1] - indptr[start]).astype(indices.dtype)
            yield unchecked_csr((stop - start, width), for_scipy(data), indices, pointers)

    return read


def unchecked_csr(shape: tuple[int, ...], data: NDArray[Any], indices: NDArray[Any], indptr: NDArray[Any]) -> Rows:
    """Sparse rows without SciPy's checks, which cost as much as the reading."""
    made: Any = sp.csr_array((shape[0], shape[1]), dtype=data.dtype)
    made.data, made.indices, made.indptr = data, indices, indptr
    return made


def _dense_rows(matrix: Any, start: int, stop: int) -> Rows:
    block: Any = matrix[start:stop]
    block = block.compute() if hasattr(block, "compute") else block
    block = block if sp.issparse(block) else for_scipy(np.asarray(block))
    return sp.csr_array(block)


def for_scipy(values: NDArray[Any]) -> NDArray[Any]:
    """Values of a type that SciPy's sparse matrices have: not float16, and in the byte order of the machine."""
    half = values.dtype.kind == "f" and values.dtype.itemsize == 2
    return values.astype(np.float32 if half else values.dtype.newbyteorder("="), copy=False)


def spans(rows: NDArray[np.int64], at_once: int) -> Iterator[NDArray[np.int64]]:
    """Ascending rows in parts that are each read at once, with the few rows between them."""
    if len(rows):
        for part in np.split(rows, np.flatnonzero(np.diff(rows) > _GAP) + 1):
            cuts = np.searchsorted(part, np.arange(part[0] + at_once, part[-1] + 1, at_once))
            yield from (each for each in np.split(part, cuts) if len(each))


def blocks(matrix: RowMatrix) -> Iterator[tuple[int, Rows]]:
    """All rows, block after block, each with the number of its first row."""
    with matrix.reading() as read:
        for start in range(0, matrix.shape[0], matrix.at_once):
            for block in read([(start, min(start + matrix.at_once, matrix.shape[0]))]):
                count_read(block.data.nbytes + block.indices.nbytes)
                yield start, block


def _files(folder: Path) -> Iterator[tuple[str, int, int]]:
    for entry in os.scandir(folder):
        if entry.is_dir():
            yield from _files(Path(entry.path))
        else:
            found = entry.stat()
            yield entry.path, found.st_size, found.st_mtime_ns
