"""Matrices of several stores as one: rows one after the other, columns by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_multivi.data.stores.counts import columns_of
from pyro_multivi.data.stores.matrix import Rows, StoredMatrix


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
    def unchanged(self) -> Iterator[None]:
        """A context for reading, in which a change of any part is an error."""
        with ExitStack() as stack:
            for matrix, _ in self.parts:
                stack.enter_context(matrix.unchanged())
            yield

    def read(self, start: int, stop: int) -> Rows:
        """The rows from ``start`` to before ``stop``."""
        found = []
        for (matrix, places), first in zip(self.parts, self._starts.tolist(), strict=False):
            own = slice(max(start - first, 0), min(stop - first, matrix.shape[0]))
            if own.start < own.stop:
                block = matrix.read(own.start, own.stop)
                found.append(block if places is None else columns_of(block, places, self.shape[1]))
        return found[0] if len(found) == 1 else sp.vstack(found, format="csr")
