"""Counts on disk behind the interface of those in memory: row pointers are kept, counts are read by cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.matrix import RowMatrix, spans

# Odd numbers of 64 random bits: entries of a row are hashed to numbers that are summed.
_COLUMN_FACTOR, _VALUE_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


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
        self._places: dict[str, NDArray[np.int32]] = {}
        self._widths: dict[str, int] = {}
        self._kept: tuple[NDArray[np.int64], dict[str, Any]] | None = None

    def add(self, name: str, places: NDArray[np.int32], width: int) -> None:
        """Make a modality known: the place of every column of the matrix among its features, -1 for another's."""
        self._places[name], self._widths[name] = places, width

    def read(self, name: str, rows: NDArray[np.int64]) -> Any:
        """Ascending rows of a modality, as sparse rows (len(rows), width) in canonical form."""
        kept = self._kept
        # By one step: a thread that reads ahead, and results asked for meanwhile, share it.
        found = kept[1].pop(name, None) if kept is not None and np.array_equal(kept[0], rows) else None
        if kept is None or found is None:
            kept = rows, self._read(rows)
            found = kept[1].pop(name)
        self._kept = kept if kept[1] else None
        return found

    def _read(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        parts: dict[str, list[Any]] = {name: [] for name in self._places}
        with self.matrix.unchanged():
            for span in spans(rows, self.matrix.at_once):
                block = self.matrix.read(int(span[0]), int(span[-1]) + 1)
                if len(span) < block.shape[0]:
                    block = block[span - span[0]]
                for name, places in self._places.items():
                    parts[name].append(columns_of(block, places, self._widths[name]))
        return {name: _stacked(blocks, self._widths[name]) for name, blocks in parts.items()}


def columns_of(block: Any, places: NDArray[np.int32], width: int) -> Any:
    """Some columns of sparse rows in canonical form: sorted, no duplicates, no stored zeros."""
    own = np.flatnonzero(places >= 0)
    if len(own) == width and np.array_equal(places[own[0] : own[0] + width] if width else own, np.arange(width)):
        # As columns lie in most files: SciPy cuts a slice in a third of the time.
        made = block[:, own[0] : own[0] + width] if width else block[:, :0]
    else:
        column = places[block.indices]
        entries = np.flatnonzero(column >= 0)
        made = sp.csr_array((block.shape[0], width), dtype=block.dtype)
        made.data, made.indices = block.data[entries], column[entries]
        made.indptr = np.searchsorted(entries, block.indptr).astype(np.int32)
    made.sum_duplicates()
    if len(made.data) and not made.data.all():
        made.eliminate_zeros()
    return made


def _stacked(blocks: list[Any], width: int) -> Any:
    if len(blocks) == 1:
        return blocks[0]
    kind: Any = (0, width)  # SciPy's types have no matrix from its shape alone.
    return sp.vstack(blocks, format="csr") if blocks else sp.csr_array(kind, dtype=np.float32)


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
        index = index.cpu()
        ordered = bool((index.diff() > 0).all())
        wanted, inverse = (index, None) if ordered else torch.unique(index, return_inverse=True)
        found = self._ascending(wanted.numpy())
        return found if inverse is None else found.select_rows(inverse)

    def _ascending(self, cells: NDArray[np.int64]) -> SparseCounts:
        places, order = cells, None
        if self.row_of is not None:
            own = self.row_of[cells]
            places, order = np.unique(own[own >= 0], return_inverse=True)
        read = self.rows.read(self.name, places)
        ones = self.kind == np.uint8 and self.largest <= 1
        # One 1 for all, as a table in memory has it.
        val = torch.ones(1, dtype=torch.uint8).expand(len(read.data)) if ones else _tensor(read.data.astype(self.kind))
        counts = SparseCounts(_tensor(read.indptr), _tensor(read.indices), val, (len(places), self.shape[1]))
        if order is None:
            return counts
        # An empty row at the end, for the cells without one (-1).
        padded = SparseCounts(
            torch.cat([counts.crow, counts.crow[-1:]]), counts.col, counts.val, (len(places) + 1, self.shape[1])
        )
        at = np.full(len(cells), len(places), dtype=np.int64)
        at[own >= 0] = order
        return padded.select_rows(torch.from_numpy(at))

    def row_sums(self) -> Tensor:
        """Sum over features, shape (n,)."""
        return self.totals

    def to_dense(self) -> Tensor:
        """All of them, read at once, shape (n, F): for data that are small."""
        return self.select_rows(torch.arange(self.shape[0])).to_dense()

    def parts(self) -> tuple[Tensor, ...]:
        """What tells these counts from others."""
        return self.crow, self.hashes


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array)


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
