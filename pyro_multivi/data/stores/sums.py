"""Sums over the rows or the columns of counts, in memory or block by block from disk."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_multivi.data.stores.joined import on_disk
from pyro_multivi.data.stores.matrix import RowMatrix, blocks

Values = NDArray[np.floating[Any]]


class Sums(Protocol):
    """Sums over the rows or the columns of a matrix of counts, (n, F)."""

    def of_rows(self, weights: Values, positive: bool) -> Values:
        """Weighted sum of each row, (n,), of the counts or of whether they are above zero."""

    def of_columns(self, weights: Values) -> Values:
        """Weighted number of rows in which each column is above zero, (F,)."""


def sums_of(matrix: Any, where: str) -> Sums:
    """Sums of a matrix of an AnnData; ``where`` is how the user would write it."""
    stored = on_disk(matrix, where)
    return _InMemory(matrix) if stored is None else _OnDisk(stored)


class _InMemory:
    def __init__(self, matrix: Any) -> None:
        self._matrix, self._positive = matrix, sp.csr_matrix(matrix > 0)

    def of_rows(self, weights: Values, positive: bool) -> Values:
        return np.asarray((self._positive if positive else self._matrix) @ weights).ravel()

    def of_columns(self, weights: Values) -> Values:
        return np.asarray(self._positive.T @ weights).ravel()


class _OnDisk:
    """Each sum is one reading of all blocks of rows."""

    def __init__(self, matrix: RowMatrix) -> None:
        self._matrix = matrix

    def of_rows(self, weights: Values, positive: bool) -> Values:
        found = np.zeros(self._matrix.shape[0])
        for start, rows in blocks(self._matrix):
            found[start : start + rows.shape[0]] = (rows > 0 if positive else rows) @ weights
        return found

    def of_columns(self, weights: Values) -> Values:
        found = np.zeros(self._matrix.shape[1])
        for start, rows in blocks(self._matrix):
            found += (rows > 0).T @ weights[start : start + rows.shape[0]]
        return found
