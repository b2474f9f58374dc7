"""Reader of counts: a matrix of any kind, block by block, checked, into compact tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.modality import Modality
from pyro_multivi.data.setup.adapter import Counts, Opened
from pyro_multivi.data.setup.options import UNS_KEY
from pyro_multivi.data.sparse import MOST_COUNTS, SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts, StoredRows, row_hashes
from pyro_multivi.data.stores.joined import on_disk
from pyro_multivi.data.stores.matrix import RowMatrix, for_scipy, pointers_fit
from pyro_multivi.data.stores.matrix import blocks as stored_blocks
from pyro_multivi.data.stores.rows import Columns

# A block of a dense matrix stays under 64 MB in float32; sparse rows of 5 000 counts take 20 MB.
_BLOCK_ENTRIES = 2**24
_BLOCK_ROWS = 512


def read(
    sources: Mapping[Modality, Counts], names: Mapping[Modality, tuple[str, ...]], partial: bool = False
) -> dict[Modality, SparseCounts | StoredCounts]:
    """Check the counts of some features of each modality, for every cell of the data set; read those not on disk.

    A matrix that several modalities share is cut into blocks of rows once. Columns of the result are int32. Values are
    as small as they may be without being changed: one byte each for counts up to 255, no memory if all of them are 1.
    Of a matrix on disk nothing is kept but sums over the counts of each cell.

    Parameters
    ----------
    sources
        The counts.
    names
        Features wanted of each modality, in this order.
    partial
        Whether some of them may be missing; their columns are then empty.

    Raises
    ------
    ValueError
        If features are missing (with ``partial``, all of them) or values are no counts.
    """
    made: dict[Modality, _Compact | _OnDisk] = {}
    for own, stored in _by_matrix(sources):
        if stored is None:
            made.update((each.modality, _Compact(each, names[each.modality], partial)) for each in own)
        else:
            rows = StoredRows(stored)
            made.update((each.modality, _OnDisk(each, names[each.modality], partial, rows)) for each in own)
        _fill([made[each.modality] for each in own], own[0], stored)
    return {modality: made[modality].finish() for modality in sources}


def read_whole(
    sources: Mapping[Modality, Counts], names: Mapping[Modality, tuple[str, ...]]
) -> dict[Modality, SparseCounts]:
    """Read the counts of each modality into memory, those on disk too."""
    made = {modality: _Compact(counts, names[modality], partial=False) for modality, counts in sources.items()}
    for own, stored in _by_matrix(sources):
        _fill([made[each.modality] for each in own], own[0], stored)
    return {modality: compact.finish() for modality, compact in made.items()}


def _by_matrix(sources: Mapping[Modality, Counts]) -> Iterator[tuple[list[Counts], RowMatrix | None]]:
    """Counts that share a matrix, and the matrix if it lies on disk."""
    found: dict[int, list[Counts]] = {}
    for counts in sources.values():
        found.setdefault(id(counts.matrix), []).append(counts)
    for own in found.values():
        yield own, on_disk(own[0].matrix, own[0].where)


def _fill(compacts: Sequence[_Compact | _OnDisk], counts: Counts, stored: RowMatrix | None) -> None:
    for start, block in _blocks(counts, stored):
        compressed = _compressed(block, counts)
        for compact in compacts:
            compact.add(start, compressed)


_TOO_LARGE = f"above {MOST_COUNTS:,}"
_ADVICE_TOO_LARGE = (
    "No gene of one cell has as many reads or molecules: are these intensities, scaled values or sums over cells? Give "
    "the counts of single cells."
)
_ADVICE_NAN = (
    " If NaN stands for what was not measured, as an outer join fills it in, join the samples by "
    "pyro_multivi.join_samples instead, or write 0 where a whole modality is NaN: cells without a count of it count as "
    "not measured."
)


class _Compact:
    """Counts of some features of one modality, growing block by block."""

    def __init__(self, counts: Counts, names: tuple[str, ...], partial: bool) -> None:
        take = _places_of(names, counts, partial)
        self.counts, self._width = counts, len(names)
        # Column of the result of each column that is there; None if they are the same.
        self._places = np.flatnonzero(take >= 0).astype(np.int32) if (take < 0).any() else None
        take = take[take >= 0]
        self._columns, self._features = counts.columns[take], counts.features[take]
        self._every = np.array_equal(self._columns, np.arange(counts.matrix.shape[1]))
        self._sizes = [np.zeros(1, np.int64)]
        self._col, self._val = np.zeros(0, np.int32), np.zeros(0, np.uint8)

    def add(self, start: int, rows: sp.csr_array[Any, tuple[int, int]]) -> None:
        """Add the rows from ``start`` on, in canonical form: sorted, no duplicates, no stored zeros."""
        block = rows if self._every else rows[:, self._columns]
        block.sum_duplicates()
        block.eliminate_zeros()
        check_values(self.counts, self._features, start, block)
        self._sizes.append(np.diff(block.indptr).astype(np.int64))
        self._col = _extended(self._col, block.indices if self._places is None else self._places[block.indices])
        self._val = _extended(self._val, block.data, smallest(block.data))

    def finish(self) -> SparseCounts:
        """The counts, in the order of the data set's cells; those without a row in the matrix get an empty one."""
        crow = np.cumsum(np.concatenate(self._sizes))
        n, width = len(crow) - 1, self._width
        parts = torch.from_numpy(self._col), _ones_once(torch.from_numpy(self._val))
        if self.counts.rows is None:
            return SparseCounts(torch.from_numpy(crow), *parts, (n, width))
        # An empty row at the end, for the cells without one (-1).
        padded = SparseCounts(torch.from_numpy(np.append(crow, crow[-1])), *parts, (n + 1, width))
        rows = np.where(self.counts.rows < 0, n, self.counts.rows)
        return padded.select_rows(torch.from_numpy(rows.astype(np.int64)))


def check_values(
    counts: Counts, features: Sequence[str] | pd.Index[Any], start: int, block: sp.csr_array[Any, tuple[int, int]]
) -> None:
    """Refuse values that are no counts, at the first with its cell and feature.

    Of a binary modality any value that is not negative will do, since only zero or not is used.
    """
    values, modality = block.data, counts.modality
    rules = [("NaN or infinite", ~np.isfinite(values)), ("negative", values < 0)]
    if not modality.binary:
        rules.append(("not a whole number", values != np.floor(values)))
        rules.append((_TOO_LARGE, values > MOST_COUNTS))
    elif values.dtype.kind == "f" and values.dtype.itemsize > np.dtype(np.float32).itemsize:
        with np.errstate(over="ignore", under="ignore"):
            single = values.astype(np.float32)
        # What would be zero is open to some of the code, which goes by what is stored, and closed to the rest.
        rules.append(("out of the range of single precision (float32)", ~np.isfinite(single) | (single == 0)))
    for what, wrong in rules:
        if wrong.any():
            advice = _ADVICE_TOO_LARGE if what is _TOO_LARGE else f"Raw counts are needed{counts.hint(counts.placed)}"
            at = int(np.argmax(wrong))
            advice += _ADVICE_NAN if np.isnan(values[at]) else ""
            cell = counts.cells[start + int(np.searchsorted(block.indptr, at, side="right")) - 1]
            feature = features[int(block.indices[at])]
            raise ValueError(
                f"{counts.where} holds {modality.assay} values that are {what}, for instance {values[at]!s} for "
                f"cell {str(cell)!r} and {modality.feature} {str(feature)!r}. {advice}"
            )


class _OnDisk:
    """Counts of some features of one modality that stay on disk: checked block by block, and summed up."""

    def __init__(self, counts: Counts, names: tuple[str, ...], partial: bool, rows: StoredRows) -> None:
        take = _places_of(names, counts, partial)
        self._counts, self._rows, self._names = counts, rows, names
        places = np.full(counts.matrix.shape[1], -1, dtype=np.int32)
        places[counts.columns[take[take >= 0]]] = np.flatnonzero(take >= 0)
        self._columns = Columns(places, len(names))
        self._parts: list[tuple[NDArray[np.int64], ...]] = []
        self._largest, self._kind, self._whole = 0.0, np.dtype(np.uint8), True

    def add(self, start: int, rows: sp.csr_array[Any, tuple[int, int]]) -> None:
        """Check the rows from ``start`` on."""
        block = self._columns.take(rows)
        check_values(self._counts, self._names, start, block)
        self._kind = np.result_type(self._kind, smallest(block.data))
        self._largest = max(self._largest, float(block.data.max(initial=0)))
        self._whole = self._whole and bool((block.data == np.floor(block.data)).all())
        self._parts.append((np.diff(block.indptr).astype(np.int64), row_hashes(block), block.sum(1)))

    def finish(self) -> StoredCounts:
        """The counts, in the order of the data set's cells."""
        sizes, hashes, totals = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        row_of = self._counts.rows
        ones = self._kind == np.uint8 and self._largest <= 1
        self._rows.add(self._counts.modality.key, self._columns, None if ones else self._kind)
        if row_of is not None:
            # What a cell without a row has stands at the end.
            sizes, hashes, totals = (np.append(part, part.dtype.type(0))[row_of] for part in (sizes, hashes, totals))
        return StoredCounts(
            rows=self._rows,
            name=self._counts.modality.key,
            row_of=None if row_of is None else row_of.astype(np.int64),
            crow=torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)])),
            hashes=torch.from_numpy(hashes),
            totals=torch.from_numpy(totals.astype(np.float64)),
            shape=(len(sizes), len(self._names)),
            kind=self._kind,
            largest=self._largest,
            whole=self._whole,
        )


def smallest(values: NDArray[Any]) -> np.dtype[Any]:
    """The smallest of uint8, int16 and float32 that holds all these counts as they are.

    Examples
    --------
    >>> smallest(np.array([1.0, 255.0])), smallest(np.array([256.0])), smallest(np.array([0.5]))
    (dtype('uint8'), dtype('int16'), dtype('float32'))
    """
    largest = values.max(initial=0)
    whole = values.dtype.kind != "f" or bool((values == np.floor(values)).all())
    fitting = (kind for kind in (np.uint8, np.int16) if whole and largest <= np.iinfo(kind).max)
    return np.dtype(next(fitting, np.float32))


def _extended(values: NDArray[Any], more: NDArray[Any], least: np.dtype[Any] | None = None) -> NDArray[Any]:
    """The values and some more behind them, in a type that holds both; memory grows in place."""
    kind = values.dtype if least is None else np.result_type(values.dtype, least)
    extended = values.astype(kind, copy=False)
    n = len(extended)
    extended.resize(n + len(more), refcheck=False)
    extended[n:] = more
    return extended


def _ones_once(values: Tensor) -> Tensor:
    """One 1 for all, where all are 1: as most accessibility is."""
    if len(values) == 0 or not bool((values == 1).all()):
        return values
    return values[:1].clone().expand(len(values))


def _places_of(names: tuple[str, ...], counts: Counts, partial: bool) -> NDArray[np.intp]:
    """Position of each wanted feature among those that are there, -1 for a missing one."""
    found, what = counts.features, counts.modality.features
    take = found.get_indexer(pd.Index(names, dtype=object))
    absent = [name for name, place in zip(names, take, strict=True) if place < 0]
    if partial and len(absent) == len(names):
        raise ValueError(
            f"{counts.where} shares no {what} with the model, which has {len(names)}: {first_names(names)}. It has "
            f"{len(found)}: {first_names(found)}. Give them the same names (gene symbols or identifiers, 'chr1:10-20' "
            f"or 'chr1-10-20', the same genome); or leave out all {what}: then these cells count as not measured for "
            f"{counts.modality.assay}."
        )
    if absent and not partial:
        raise ValueError(
            f"{counts.where} lacks {len(absent)} of the model's {len(names)} {what}: {first_names(absent)}. It has "
            f"{len(found)} {what}: {first_names(found)}. All of them are needed, by the same names in any "
            f"order; or leave out all {what}: then these cells count as not measured for {counts.modality.assay}. "
            "MULTIVI.load_query_data(adata, model) makes a model for cells in which some were not measured."
        )
    return take


def _blocks(counts: Counts, stored: RowMatrix | None) -> Iterator[tuple[int, Any]]:
    """Rows of a matrix, block after block, each with the number of its first row."""
    if stored is not None:
        yield from stored_blocks(stored)
        return
    _refuse_unsound(counts)
    matrix = _by_rows(counts.matrix)
    n_rows, n_columns = matrix.shape
    sparse = sp.issparse(matrix) or hasattr(matrix, "format")
    step = _BLOCK_ROWS if sparse else max(1, min(_BLOCK_ROWS, _BLOCK_ENTRIES // max(n_columns, 1)))
    for start in range(0, n_rows, step):
        yield start, matrix[start : start + step]


def _refuse_unsound(counts: Counts) -> None:
    """Refuse a compressed matrix that contradicts itself, as of a damaged file: reading it may crash the process."""
    matrix: Any = counts.matrix
    form = getattr(matrix, "format", None) if sp.issparse(matrix) else None
    if form not in ("csr", "csc"):
        return
    n, width = matrix.shape if form == "csr" else matrix.shape[::-1]
    indptr, indices = matrix.indptr, matrix.indices
    fits = len(indptr) == n + 1 and len(indices) == len(matrix.data) and pointers_fit(indptr, len(indices))
    used = indices[: int(indptr[-1])] if fits else indices[:0]
    if not fits or (len(used) and not (int(used.min()) >= 0 and int(used.max()) < width)):
        raise ValueError(
            f"{counts.where} is damaged: positions of its entries (indptr, indices) do not fit its shape "
            f"{tuple(matrix.shape)} and {len(matrix.data)} values. Read the file once more, or a copy of it; "
            f"{counts.where}.check_format() says more."
        )


def refuse_counts_beside_stores(opened: Opened) -> None:
    """Refuse a matrix in the place of counts that are read from the stores of the object."""
    for counts in opened.counts.values():
        if counts.beside:
            remove = f"{counts.where} = None" if counts.where.endswith(".X") else f"del {counts.where}"
            raise ValueError(
                f"{counts.where} holds a matrix, and {counts.owner} was opened by open_stores, whose counts are "
                f"read: which are meant? For those of the stores, {remove}; for the matrix, "
                f"del {counts.owner}.uns[{UNS_KEY!r}]['stores']."
            )


def _by_rows(matrix: Any) -> Any:
    """The matrix in a form whose rows are cheap to cut: sparse ones by rows, others as they are."""
    # Backed sparse matrices of AnnData have the attribute "format" as SciPy's do.
    form = getattr(matrix, "format", "csr")
    if form == "csr":
        return matrix
    in_memory: Any = matrix if sp.issparse(matrix) else matrix[:]
    return in_memory.tocsr()


def _compressed(block: Any, counts: Counts) -> sp.csr_array[Any, tuple[int, int]]:
    """A block as sparse rows, a copy: so has cutting rows out of a matrix made it."""
    if not sp.issparse(block):
        block = for_scipy(np.asarray(block))
    if block.dtype.kind not in "buif":
        raise ValueError(
            f"{counts.where} holds values of type {block.dtype}; {counts.modality.assay} counts must be numbers."
        )
    return sp.csr_array(block)
