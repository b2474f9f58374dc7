"""Reading counts out of a matrix of any kind, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.setup.adapter import Counts
from pyro_multivi.data.sparse import SparseCounts

# A block of a dense matrix stays under 64 MB in float32; sparse rows of 5 000 counts take 20 MB.
_BLOCK_ENTRIES = 2**24
_BLOCK_ROWS = 512


@dataclass(frozen=True)
class Survey:
    """What the counts of one modality are like.

    Attributes
    ----------
    nnz
        Number of non-zero counts of each cell, shape (n,); 0 for cells without a row.
    whole
        Whether all values are whole numbers.
    largest
        The largest value.
    """

    nnz: NDArray[np.int64]
    whole: bool
    largest: float


def survey(counts: Counts, n_cells: int) -> Survey:
    """Look at every count once, holding one block at a time; wrong values raise ValueError."""
    sizes: list[NDArray[np.int64]] = []
    whole, largest = True, 0.0
    for block in _blocks(counts, None):
        sizes.append(np.diff(block.indptr).astype(np.int64))
        if block.nnz:
            whole = whole and bool((block.data == np.floor(block.data)).all())
            largest = max(largest, float(block.data.max()))
    nnz = np.concatenate(sizes)
    if counts.rows is not None:
        # One more entry, for the cells without a row (-1).
        nnz = np.append(nnz, 0)[counts.rows]
    return Survey(nnz, whole, largest)


def read(counts: Counts, names: tuple[str, ...]) -> SparseCounts:
    """The counts of the features ``names``, in that order, for every cell of the data set.

    Columns are int32. Values are as small as they may be without being changed: one byte each for counts
    up to 255, no memory if all of them are 1. Cells without a row in the matrix get an empty one.

    Raises
    ------
    ValueError
        If features are missing or values are no counts.
    """
    take = match_features(counts.features, names, counts.modality, counts.where)
    sizes, col, val = [np.zeros(1, np.int64)], np.zeros(0, np.int32), np.zeros(0, np.uint8)
    for block in _blocks(counts, take):
        sizes.append(np.diff(block.indptr).astype(np.int64))
        col, val = _extended(col, block.indices), _extended(val, block.data, smallest(block.data))
    crow = np.cumsum(np.concatenate(sizes))
    n, width = len(crow) - 1, len(names)
    parts = torch.from_numpy(col), _ones_once(torch.from_numpy(val))
    if counts.rows is None:
        return SparseCounts(torch.from_numpy(crow), *parts, (n, width))
    # An empty row at the end, for the cells without one (-1).
    padded = SparseCounts(torch.from_numpy(np.append(crow, crow[-1])), *parts, (n + 1, width))
    rows = np.where(counts.rows < 0, n, counts.rows)
    return padded.select_rows(torch.from_numpy(rows.astype(np.int64)))


def smallest(values: NDArray[Any]) -> np.dtype[Any]:
    """The smallest of uint8, int16 and float32 that holds all these counts as they are.

    Examples
    --------
    >>> smallest(np.array([1.0, 255.0])), smallest(np.array([256.0])), smallest(np.array([0.5]))
    (dtype('uint8'), dtype('int16'), dtype('float32'))
    """
    largest = values.max(initial=0)
    for kind in (np.uint8, np.int16):
        if largest <= np.iinfo(kind).max:
            if values.dtype.kind != "f" or bool((values == np.floor(values)).all()):
                return np.dtype(kind)
            break
    return np.dtype(np.float32)


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


def match_features(found: pd.Index[Any], names: tuple[str, ...], modality: str, where: str) -> NDArray[np.intp] | None:
    """Position of each wanted feature among those found; None if they are the same in the same order.

    Raises
    ------
    ValueError
        If some are missing.
    """
    if len(found) == len(names) and bool((found == np.asarray(names, dtype=object)).all()):
        return None
    take = found.get_indexer(pd.Index(names, dtype=object))
    missing = take < 0
    if missing.any():
        what = "genes" if modality == "RNA" else "regions"
        absent = [name for name, gone in zip(names, missing, strict=True) if gone]
        raise ValueError(
            f"{where} lacks {len(absent)} of the model's {len(names)} {what}: {first_names(absent)}. It has "
            f"{len(found)} {what}: {first_names(found)}. All of them are needed, by the same names in any "
            f"order; or leave out all {what}: then these cells count as not measured for {modality}."
        )
    return take


def _blocks(counts: Counts, take: NDArray[np.intp] | None) -> Iterator[sp.csr_array[Any, tuple[int, int]]]:
    """Checked rows, block after block, in canonical form: sorted, no duplicates, no stored zeros."""
    columns, features = counts.columns, counts.features
    if take is not None:
        columns, features = columns[take], features[take]
    matrix = _by_rows(counts.matrix)
    n_rows, n_columns = matrix.shape
    every = np.array_equal(columns, np.arange(n_columns))
    sparse = sp.issparse(matrix) or hasattr(matrix, "format")
    step = _BLOCK_ROWS if sparse else max(1, min(_BLOCK_ROWS, _BLOCK_ENTRIES // max(n_columns, 1)))
    for start in range(0, n_rows, step):
        block = _compressed(matrix[start : start + step], counts)
        if not every:
            block = block[:, columns]
        block.sum_duplicates()
        block.eliminate_zeros()
        cells = counts.cells[start : start + step]
        check_values(block, counts.modality, counts.where, cells, features, counts.hint)
        yield block


def _by_rows(matrix: Any) -> Any:
    """The matrix in a form whose rows are cheap to cut: sparse ones by rows, others as they are."""
    # Backed sparse matrices of AnnData say their format as SciPy's do.
    form = getattr(matrix, "format", "csr")
    if form == "csr":
        return matrix
    in_memory: Any = matrix if sp.issparse(matrix) else matrix[:]
    return in_memory.tocsr()


def _compressed(block: Any, counts: Counts) -> sp.csr_array[Any, tuple[int, int]]:
    """A block as sparse rows. It may be changed: cutting rows out of a matrix has copied them."""
    if not sp.issparse(block):
        block = np.asarray(block)
    if block.dtype.kind not in "buif":
        raise ValueError(
            f"{counts.where} holds values of type {block.dtype}; {counts.modality} counts must be numbers."
        )
    if block.dtype == np.float16:  # which SciPy's sparse matrices do not know
        block = block.astype(np.float32)
    return sp.csr_array(block)


def check_values(
    block: sp.csr_array,
    modality: str,
    where: str,
    cells: pd.Index,
    features: pd.Index,
    hint: Callable[[], str],
) -> None:
    """Refuse stored values that are no counts.

    Parameters
    ----------
    block
        Some rows of a matrix.
    modality
        ``"RNA"``: whole numbers are needed. ``"ATAC"``: any value that is not negative will do,
        since only zero or not is used.
    where
        How the user would write the matrix.
    cells, features
        Names of the rows and columns of the block.
    hint
        Says what to do about it: the end of the sentence "Raw counts are needed".

    Raises
    ------
    ValueError
        At the first wrong value, with its cell and feature.
    """
    values = block.data
    rules = [("NaN or infinite", ~np.isfinite(values)), ("negative", values < 0)]
    if modality == "RNA":
        rules.append(("not a whole number", values != np.floor(values)))
    for what, wrong in rules:
        if wrong.any():
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(block.indptr, at, side="right")) - 1
            feature = features[int(block.indices[at])]
            raise ValueError(
                f"{where} holds {modality} values that are {what}, for instance {values[at]!s} for cell "
                f"{str(cells[row])!r} and {'gene' if modality == 'RNA' else 'region'} {str(feature)!r}. "
                f"Raw counts are needed{hint()}"
            )
