"""Extra modalities, those besides RNA and ATAC: matrices of obsm, or other modalities of a MuData."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.setup.options import is_lazy

logger = logging.getLogger("pyro_multivi")


@dataclass(frozen=True)
class ExtraSource:
    """The matrix of an extra modality, not read yet.

    Attributes
    ----------
    where
        How the user would write it.
    matrix
        (rows, F): an array, a sparse matrix or a frame.
    cells
        Names of its rows.
    names
        Names of its columns where they are kept beside it; None for a frame, which holds its own.
    rows
        Row of each cell of the data set, -1 where it has none; None if the rows are the cells.
    """

    where: str
    matrix: Any
    cells: pd.Index[Any]
    names: pd.Index[Any] | None = None
    rows: NDArray[np.intp] | None = None

    def feature_names(self) -> tuple[str, ...]:
        """Names of the columns, "0", "1", ... where they have none."""
        if self.names is not None:
            return tuple(map(str, self.names))
        if isinstance(self.matrix, pd.DataFrame):
            return tuple(map(str, self.matrix.columns))
        return tuple(map(str, range(self.matrix.shape[1] if self.matrix.ndim == 2 else 1)))

    def read(self, wanted: tuple[str, ...]) -> Measurement:
        """Values of some features of each cell of the data set; rows that are NaN as a whole were not measured."""
        values = self._numbers()
        found = self.feature_names()
        if wanted != found:
            take = pd.Index(found).get_indexer(pd.Index(wanted))
            absent = [name for name, place in zip(wanted, take, strict=True) if place < 0]
            if absent:
                raise ValueError(
                    f"{self.where} lacks {len(absent)} of the model's {len(wanted)} features: {first_names(absent)}. "
                    f"It has {first_names(found)}. All are needed, by the same names in any order; or leave "
                    "the whole of it out: then these cells count as not measured for it."
                )
            values = values[:, take]
        missing = np.isnan(values)
        measured = ~missing.all(1)
        wrong: NDArray[np.bool_] = np.asarray((missing.any(1) & measured) | np.isinf(values).any(1))
        if wrong.any():
            raise ValueError(
                f"{self.where} holds NaN or infinite values in {int(wrong.sum())} cells: "
                f"{first_names(self.cells[wrong])}. A cell that was not measured is NaN in every column, any other "
                "in none."
            )
        values[~measured] = 0.0
        if self.rows is not None:
            measured = np.append(measured, False)[self.rows]
            values = np.vstack([values, np.zeros_like(values[:1], shape=(1, values.shape[1]))])[self.rows]
        return Measurement(torch.from_numpy(values), torch.from_numpy(measured))

    def _numbers(self) -> NDArray[np.float32]:
        matrix: Any = self.matrix
        if is_lazy(matrix):
            matrix = matrix.compute()
        elif hasattr(matrix, "group"):  # anndata's wrapper of a sparse matrix in a file
            matrix = matrix[:]
        if isinstance(matrix, np.ma.MaskedArray):
            raise ValueError(
                f"{self.where} is a masked array. Say what the hidden values are: NaN in every column of a cell that "
                "was not measured."
            )
        if sp.issparse(matrix):
            matrix = matrix.toarray()  # type: ignore[attr-defined,unused-ignore]
        try:
            if np.iscomplexobj(matrix):
                raise ValueError("they are complex")
            with np.errstate(over="ignore"):  # what is out of range is infinite, and refused
                values = np.array(matrix, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where} holds values that are no numbers: {error}") from None
        if values.ndim != 2:
            raise ValueError(f"{self.where} has shape {values.shape} and must have shape (cells, features).")
        return values


def measurement(sources: Mapping[str, ExtraSource], name: str, wanted: tuple[str, ...], n_cells: int) -> Measurement:
    """Features of an extra modality in all cells; not measured in any where the object has no such matrix."""
    if name in sources:
        return sources[name].read(wanted)
    logger.info("There is no %r: its cells count as not measured for it.", name)
    return Measurement(torch.zeros(n_cells, len(wanted)), torch.zeros(n_cells, dtype=torch.bool))
