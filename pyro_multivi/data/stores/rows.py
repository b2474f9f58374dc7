"""Rows that were read, cut into the columns of each modality and gathered without a copy of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.matrix import Rows, unchecked_csr

Places = NDArray[np.int64]


class Columns:
    """Some columns of a matrix, and the place of each among the features of a modality.

    Parameters
    ----------
    places
        Place of every column of the matrix, (columns,), -1 for one that is left out.
    width
        Number of features; those without a column are empty.
    """

    def __init__(self, places: NDArray[np.int32], width: int) -> None:
        own = np.flatnonzero(places >= 0)
        shifts = places[own] - own
        self.width = width
        self._places = places
        self._first, self._stop = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
        #: Neighbours in the order of the features, as in most files: a slice of every row.
        self.are_run = len(own) == self._stop - self._first and bool((shifts == shifts[:1]).all())
        self.shift = int(shifts[0]) if self.are_run and len(own) else 0

    def take(self, block: Rows) -> Rows:
        """These columns of sparse rows, in canonical form."""
        made = unchecked_csr((block.shape[0], self.width), block.data, block.indices, block.indptr)
        if not self.are_run:
            column = self._places[block.indices]
            entries = np.flatnonzero(column >= 0)
            made.data, made.indices = block.data[entries], column[entries]
            made.indptr = np.searchsorted(entries, block.indptr).astype(np.int32)
        elif self._first or self._stop < block.shape[1]:
            part = block[:, self._first : self._stop]
            made = unchecked_csr(made.shape, part.data, part.indices + (self._first + self.shift), part.indptr)
        elif self.shift:
            made.indices = block.indices + self.shift
        return canonical(made)

    def bounds(self, block: Rows) -> tuple[Places, Places]:
        """Places at which these columns begin and end in each of some rows in canonical form, if they are a run."""
        start, stop = block.indptr[:-1].astype(np.int64), block.indptr[1:].astype(np.int64)
        whole = self._stop == block.shape[1]
        return (
            _first_at_least(block.indices, start, stop, self._first) if self._first else start,
            stop if whole else _first_at_least(block.indices, start, stop, self._stop),
        )


def canonical(rows: Rows) -> Rows:
    """Put rows in canonical form, in place: sorted, no duplicates, no stored zeros."""
    rows.sum_duplicates()
    if len(rows.data) and not rows.data.all():
        rows.eliminate_zeros()
    return rows


def _first_at_least(columns: NDArray[np.int32], start: Places, stop: Places, least: int) -> Places:
    """Position in each row, between ``start`` and ``stop``, of the first column that is not below ``least``.

    By bisection of all rows at once.
    """
    found = start.copy()
    step = 1 << int((stop - start).max(initial=0)).bit_length()
    while step := step >> 1:
        ahead = found + step
        inside = ahead <= stop
        # Of a row that ends before, any entry is looked at and nothing made of it.
        below = columns[np.where(inside, ahead, 1) - 1] < least
        found += step * (inside & below)
    return found


@dataclass(frozen=True, eq=False)
class RowSlices:
    """Rows of a modality as slices of blocks that were read, (n, F).

    Modalities of one matrix share the blocks, and nothing is copied before rows are gathered.

    Attributes
    ----------
    columns, values
        Columns of the matrix and values in each block.
    block, start, stop
        Block of each row and where it begins and ends there, (n,), int64.
    shift
        What to add to the columns.
    shape
        (n, F).
    kind
        Type of the values; None if all of them are 1.
    """

    columns: Sequence[NDArray[np.int32]]
    values: Sequence[NDArray[Any]]
    block: Places
    start: Places
    stop: Places
    shift: int
    shape: tuple[int, int]
    kind: np.dtype[Any] | None

    def at(self, rows: Places) -> RowSlices:
        """The rows at some positions, in any order; -1 stands for an empty one."""
        empty = rows < 0
        if not len(self.block):  # all are empty
            none = np.zeros(len(rows), np.int64)
            return self._with(none, none, none)
        stop = np.where(empty, self.start[rows], self.stop[rows])
        return self._with(self.block[rows], self.start[rows], stop)

    def _with(self, block: Places, start: Places, stop: Places) -> RowSlices:
        shape = len(block), self.shape[1]
        return RowSlices(self.columns, self.values, block, start, stop, self.shift, shape, self.kind)

    def select_rows(self, index: Tensor) -> SparseCounts:
        """The rows at ``index`` (int64), in that order; by NumPy, since torch's threads belong to the step."""
        rows = index.numpy()
        start, stop = self.start[rows], self.stop[rows]
        ends = np.cumsum(stop - start)
        total = int(ends[-1]) if len(ends) else 0
        crow = np.zeros(len(rows) + 1, dtype=np.int32 if total < 2**31 else np.int64)
        crow[1:] = ends
        slices = list(map(slice, start.tolist(), stop.tolist()))
        blocks = self.block[rows].tolist() if len(self.columns) else []
        col = _gathered(self.columns, blocks, slices, np.dtype(np.int32))
        if self.shift:
            col += self.shift
        if self.kind is None:
            # One 1 for all, as a table in memory has it.
            val = torch.ones(1, dtype=torch.uint8).expand(total)
        else:
            val = torch.from_numpy(_gathered(self.values, blocks, slices, self.kind).astype(self.kind, copy=False))
        return SparseCounts(torch.from_numpy(crow), torch.from_numpy(col), val, (len(rows), self.shape[1]))


def _gathered(
    arrays: Sequence[NDArray[Any]], blocks: Sequence[int], slices: Sequence[slice], kind: np.dtype[Any]
) -> NDArray[Any]:
    """Slices of several arrays, one after the other: plain copies."""
    parts = [arrays[block][part] for block, part in zip(blocks, slices, strict=False)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=kind)
