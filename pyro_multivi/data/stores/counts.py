"""Counts on disk behind the interface of those in memory: row pointers are kept, counts are read by cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.freed import count_read
from pyro_multivi.data.stores.matrix import RowMatrix, Rows, spans
from pyro_multivi.data.stores.rows import Columns, RowSlices, canonical

# Odd numbers of 64 random bits: entries of a row are hashed to numbers that are summed.
_COLUMN_FACTOR, _VALUE_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)

# Share of the rows that were read of which the others are kept with them: a copy of some rows costs more than they do.
_KEPT = 0.75


class StoredRows:
    """Rows of a matrix on disk, cut into the columns of each modality.

    Modalities that share a matrix share this: the cells read for one are kept until the other is asked for them.

    Parameters
    ----------
    matrix
        The matrix, (rows, all columns).
    """

    def __init__(self, matrix: RowMatrix) -> None:
        self.matrix = matrix
        self._columns: dict[str, Columns] = {}
        self._kinds: dict[str, np.dtype[Any] | None] = {}
        self._kept: tuple[NDArray[np.int64], dict[str, RowSlices]] | None = None

    def add(self, name: str, columns: Columns, kind: np.dtype[Any] | None) -> None:
        """Make a modality known: its columns, and the type that holds its values, None if all of them are 1."""
        self._columns[name], self._kinds[name] = columns, kind

    def read(self, name: str, rows: NDArray[np.int64]) -> RowSlices:
        """Ascending rows of a modality, (len(rows), width)."""
        kept = self._kept
        # By one step: a thread that reads ahead, and results asked for meanwhile, share it.
        found = kept[1].pop(name, None) if kept is not None and np.array_equal(kept[0], rows) else None
        if kept is None or found is None:
            kept = rows, self._read(rows)
            found = kept[1].pop(name)
        self._kept = kept if kept[1] else None
        return found

    def _read(self, rows: NDArray[np.int64]) -> dict[str, RowSlices]:
        runs = [name for name, columns in self._columns.items() if columns.are_run]
        made = {name: _Slices(columns.width) for name, columns in self._columns.items()}
        shared = _Blocks()
        kind = np.result_type(np.uint8, *(each for name in runs if (each := self._kinds[name]) is not None))
        with self.matrix.reading() as read:
            wanted_rows = list(spans(rows, self.matrix.at_once))
            whole = [(int(span[0]), int(span[-1]) + 1) for span in wanted_rows]
            # Of all or none of them: one block that is kept as it was read keeps its neighbours in memory.
            are_copied = len(rows) < _KEPT * sum(stop - start for start, stop in whole)
            read_rows = read(whole)
            for span, block in zip(wanted_rows, map(canonical, read_rows), strict=True):
                count_read(block.data.nbytes + block.indices.nbytes)
                wanted = span - span[0]
                if are_copied:
                    block, wanted = block[wanted], np.arange(len(span))
                for name, columns in self._columns.items():
                    if name in runs:
                        start, stop = columns.bounds(block)
                        made[name].add(len(shared.columns), start[wanted], stop[wanted])
                    else:
                        own = columns.take(block)
                        made[name].blocks.add(own, self._kinds[name] or np.dtype(np.uint8))
                        pointers = own.indptr.astype(np.int64)
                        made[name].add(len(made[name].blocks.columns) - 1, pointers[:-1][wanted], pointers[1:][wanted])
                if runs:
                    shared.add(block, kind)
        return {
            name: made[name].finish(shared if name in runs else made[name].blocks, columns.shift, self._kinds[name])
            for name, columns in self._columns.items()
        }


class _Blocks:
    """Columns and values of blocks, in types as small as may be."""

    def __init__(self) -> None:
        self.columns: list[NDArray[np.int32]] = []
        self.values: list[NDArray[Any]] = []

    def add(self, block: Rows, kind: np.dtype[Any]) -> None:
        self.columns.append(block.indices.astype(np.int32, copy=False))
        with np.errstate(invalid="ignore"):  # columns of no modality may hold what is no count
            self.values.append(block.data.astype(kind, copy=False))


class _Slices:
    """Slices of rows, growing block by block."""

    def __init__(self, width: int) -> None:
        self.blocks = _Blocks()
        self._width = width
        self._parts: list[tuple[NDArray[np.int64], ...]] = [(np.zeros(0, np.int64),) * 3]

    def add(self, block: int, start: NDArray[np.int64], stop: NDArray[np.int64]) -> None:
        self._parts.append((np.full(len(start), block), start, stop))

    def finish(self, blocks: _Blocks, shift: int, kind: np.dtype[Any] | None) -> RowSlices:
        block, start, stop = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        shape = len(block), self._width
        return RowSlices(blocks.columns, blocks.values, block, start, stop, shift, shape, kind)


@dataclass(frozen=True, eq=False)
class StoredCounts:
    """Counts of one modality on disk, (n, F); in memory are 24 bytes of each cell.

    Attributes
    ----------
    rows
        Where they are read.
    name
        The modality's name there.
    row_of
        Row of each cell, (n,), -1 where it has none; None if the rows are the cells.
    crow
        Numbers of entries before each cell, (n + 1,), int64.
    hashes
        A number for the counts of each cell, (n,), int64, by which a change is told.
    totals
        Sum over the counts of each cell, (n,), float64.
    shape
        (n, F).
    kind
        Type of the counts: the smallest that holds them as they are.
    largest, whole
        The largest of them, and whether all are whole numbers.
    """

    rows: StoredRows = field(repr=False)
    name: str
    row_of: NDArray[np.int64] | None = field(repr=False)
    crow: Tensor = field(repr=False)
    hashes: Tensor = field(repr=False)
    totals: Tensor = field(repr=False)
    shape: tuple[int, int]
    kind: np.dtype[Any]
    largest: float
    whole: bool

    def select_rows(self, index: Tensor) -> SparseCounts:
        """Read the rows at ``index`` (int64), in that order."""
        cells, order = np.unique(index.cpu().numpy(), return_inverse=True)
        return self.read(cells).select_rows(torch.from_numpy(order))

    def read(self, cells: NDArray[np.int64]) -> RowSlices:
        """Read the rows of some cells, ascending."""
        if self.row_of is None:
            return self.rows.read(self.name, cells)
        own = self.row_of[cells]
        rows, order = np.unique(own[own >= 0], return_inverse=True)
        at = np.full(len(cells), -1, dtype=np.int64)
        at[own >= 0] = order
        return self.rows.read(self.name, rows).at(at)

    def row_sums(self) -> Tensor:
        """Sum over features, shape (n,)."""
        return self.totals

    def to_dense(self) -> Tensor:
        """All of them, read at once, shape (n, F): for data that are small."""
        return self.select_rows(torch.arange(self.shape[0])).to_dense()

    def parts(self) -> tuple[Tensor, ...]:
        """Tensors by which these counts are compared with others."""
        return self.crow, self.hashes


def row_hashes(rows: Any) -> NDArray[np.int64]:
    """A number for each of some sparse rows, which depends on columns and values, not on their types."""
    column = rows.indices.astype(np.uint64) + np.uint64(1)
    value = rows.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    mixed = column * _COLUMN_FACTOR ^ value * _VALUE_FACTOR
    mixed ^= mixed >> np.uint64(29)
    mixed *= _COLUMN_FACTOR
    before = np.zeros(len(mixed) + 1, dtype=np.uint64)
    np.cumsum(mixed, out=before[1:])
    return (before[rows.indptr[1:]] - before[rows.indptr[:-1]]).view(np.int64)
