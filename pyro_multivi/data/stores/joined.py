"""Matrices of several stores as one, and the matrix of an AnnData that lies on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_multivi.data.checks import caution
from pyro_multivi.data.stores.chunks import CONVERT, StoreChangedError
from pyro_multivi.data.stores.matrix import LazyMatrix, ReadRows, RowMatrix, Rows, StoredMatrix
from pyro_multivi.data.stores.rows import Columns

# Parts that stay open once their rows were read, for the next: systems allow some hundred open files.
_OPEN = 64


class JoinedMatrix:
    """Matrices of stores, the rows of one behind those of the one before.

    Parameters
    ----------
    parts
        Each matrix with the place of its columns in the result, -1 for one that is left out; None: they are the same.
    width
        Number of columns of the result.
    """

    def __init__(self, parts: Sequence[tuple[StoredMatrix, NDArray[np.int32] | None]], width: int) -> None:
        self.parts = list(parts)
        self._columns = [None if places is None else Columns(places, width) for _, places in parts]
        self._starts = np.cumsum([0, *(matrix.shape[0] for matrix, _ in parts)])
        self.shape = (int(self._starts[-1]), width)
        self.dtype = np.result_type(*(matrix.dtype for matrix, _ in parts))
        self.at_once = min(matrix.at_once for matrix, _ in parts)

    def status(self) -> object:
        """Status of each part."""
        return [matrix.status() for matrix, _ in self.parts]

    def having(self, columns: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Whether any of some columns is in the store of each row, (n,)."""
        found = [places is None or bool(np.isin(columns, places).any()) for _, places in self.parts]
        return np.repeat(found, [matrix.shape[0] for matrix, _ in self.parts])

    @contextmanager
    def reading(self) -> Iterator[ReadRows]:
        """A context that gives the function to read with, and in which a change of a part that is read is an error."""
        with ExitStack() as stack:
            readers = _Readers([matrix for matrix, _ in self.parts], stack)

            def read(spans: Sequence[tuple[int, int]]) -> Iterator[Rows]:
                pieces = [self._pieces(*span) for span in spans]
                wanted: dict[int, list[tuple[int, int]]] = {}
                for number, start, stop in (piece for span in pieces for piece in span):
                    wanted.setdefault(number, []).append((start, stop))
                left = {number: len(rows) for number, rows in wanted.items()}
                streams: dict[int, Iterator[Rows]] = {}
                for span in pieces:
                    found = []
                    for number, *_ in span:
                        if number not in streams:
                            streams[number] = readers.of(number, left)(wanted[number])
                        found.append(self._joint(number, next(streams[number])))
                        left[number] -= 1
                    yield found[0] if len(found) == 1 else sp.vstack(found, format="csr")

            yield read

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Rows of the parts that a span is made of: number of the part, first row in it and last."""
        ends = self._starts[1:]
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
        return [
            (number, int(max(start, before) - before), int(min(stop, ends[number]) - before))
            for number, before in enumerate(self._starts[first : last + 1], int(first))
            if max(start, before) < min(stop, ends[number])
        ]

    def _joint(self, number: int, block: Rows) -> Rows:
        columns = self._columns[number]
        return block if columns is None else columns.take(block)


class _Readers:
    """Functions that read the parts; those of the latest parts stay open.

    Parameters
    ----------
    stack
        Closes them all at its end.
    """

    def __init__(self, parts: Sequence[StoredMatrix], stack: ExitStack) -> None:
        self._parts, self._stack = parts, stack
        self._open: dict[int, tuple[ReadRows, ExitStack]] = {}

    def of(self, number: int, left: Mapping[int, int]) -> ReadRows:
        """The function for a part; where too many are open, those without rows ``left`` to be read are closed."""
        if number not in self._open:
            unneeded = [other for other in self._open if not left.get(other)]
            for other in unneeded[: max(0, len(self._open) + 1 - _OPEN)]:
                self._open.pop(other)[1].close()
            own = self._stack.enter_context(ExitStack())
            self._open[number] = own.enter_context(self._parts[number].reading()), own
        return self._open[number][0]


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

    Raises
    ------
    StoreChangedError
        If there is another file, or none, at the path of the one that the user has opened.
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
            f"is read by cells: {CONVERT}."
        )
        return None
    file = getattr(stored, "file", None)
    if file is None:
        return LazyMatrix(stored, where)
    return StoredMatrix(_place_of(file, where), stored.name) if file.mode == "r" else None


def _place_of(file: Any, where: str) -> str:
    """Path of an open HDF5 file, which is opened again for each reading, wherever the process works then."""
    path = os.path.abspath(file.filename)
    try:
        same = file.driver != "sec2" or os.path.samestat(os.fstat(file.id.get_vfd_handle()), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        raise StoreChangedError(
            f"{where} lies in {file.filename!r}, which is not the file any more that was opened: it was replaced, "
            "moved or deleted, or the process works in another folder now. Open it again, by its full path."
        )
    return path
