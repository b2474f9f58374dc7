"""Pseudobulk statistics: sums and averages of the counts of a group over its measured cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import AnyModality, Panels
from pyro_multivi.data.modality import RNA
from pyro_multivi.data.table import CellTable
from pyro_multivi.processes.shares import shared_map

Array = NDArray[np.float64]

# Cells whose stored counts are summed together.
_BLOCK = 4096
#: Largest probability of being open: its rate of opening is 28.
MOST_OPEN = 1 - 1e-12
# Rounds of the depth of counts of open regions: in half of them it has all digits, unless nearly all are open.
_DEPTH_ROUNDS = 16
#: Total to which the counts of a cell are scaled, as in scvi-tools.
SCALED_TOTAL = 1e4


def rate_of_opening(probability: Array) -> Array:
    r"""Rate :math:`-\log(1 - p)` of fragments that a region is open with probability p by, (F,).

    A region is closed in a cell without any of its fragments. Their number is proportional to the depth, so that
    p is for rare ones, and cannot be for others.
    """
    rate: Array = -np.log1p(-np.minimum(probability, MOST_OPEN))
    return rate


def probability_open(rate: Array) -> Array:
    """Probability that a region is open by its rate of opening, (F,)."""
    probability: Array = np.minimum(-np.expm1(-rate), MOST_OPEN)
    return probability


@dataclass(frozen=True)
class PseudobulkSums:
    """Sums over the measured cells of a set of cells; those of a group are added up from those of its disjoint parts.

    Attributes
    ----------
    n_measured
        Number of those cells.
    measured
        Whether each feature was measured in them, (F,), as all of them are of one panel.
    totals
        Cells with a count; unless the modality is binary also sums of counts, of scaled counts, and of squares of
        counts over the total of their cell: (1 or 4, F).
    depth, depth_squares
        Sums of the totals of the cells and of their squares, or of size factors that came with the data; of a modality
        that is no composition the number of cells.
        The total is that of all features, also where some were not measured.
    """

    n_measured: int
    measured: NDArray[np.bool_]
    totals: Array
    depth: float
    depth_squares: float

    @classmethod
    def of_cells(
        cls, table: CellTable, index: Tensor, modality: AnyModality, share: Tensor | None = None
    ) -> PseudobulkSums:
        """Sum up the stored counts of the cells at ``index``, int64, all of one panel.

        ``share`` has the part of a typical cell's counts that lies in the panel of each cell of the table, (n,).
        """
        counts, n_features = modality.counts_in(table), modality.n_features_in(table)
        index = index[modality.measured_in(table)[index]]
        sums = torch.zeros(1 if modality.binary else 4, n_features, dtype=torch.float64)
        panels: Panels | None = modality.panels_in(table)
        measured = np.ones(n_features, dtype=bool)
        if panels is not None and len(index):
            measured = panels.measured[panels.code[index[0]]].numpy()
        if counts is None:
            return cls(0, measured, sums.numpy(), 0.0, 0.0)
        of_all = 1.0 if share is None or not len(index) else float(share[index[0]])
        depth = squares = float(len(index)) if modality.binary else 0.0
        for part in index.split(_BLOCK):
            rows = counts.select_rows(part)
            # Before anything is summed: a table may hold small integers.
            rows = rows.with_values(rows.val.double())
            column = rows.col.long()
            sums[0] += torch.bincount(column, minlength=n_features)
            if not modality.binary:
                value, total = rows.val, rows.row_sums().clamp(min=1.0) / of_all
                scaled = SCALED_TOTAL * (value / total[rows.rows()])
                if not modality.depth:  # The model has no depth of such values: all cells weigh the same.
                    total = torch.ones_like(total)
                elif modality == RNA and not modality.compositional:  # Size factors came with the data, in any unit.
                    size = modality.size_factor_in(table).double()
                    total = size[part] / size[modality.measured_in(table)].mean()
                depth, squares = depth + float(total.sum()), squares + float(total.square().sum())
                by_depth = value / total[rows.rows()]
                for number, weight in enumerate((value, scaled, value * by_depth), 1):
                    sums[number] += torch.bincount(column, weights=weight, minlength=n_features)
        return cls(len(index), measured, sums.numpy(), depth, squares)

    @property
    def n_cells(self) -> NDArray[np.int64]:
        """Number of cells in which each feature was measured, (F,)."""
        return self.n_measured * self.measured.astype(np.int64)

    @classmethod
    def of_parts(
        cls, table: CellTable, parts: Sequence[Tensor], modality: AnyModality, share: Tensor | None = None
    ) -> list[PseudobulkSums]:
        """Sums of several sets of cells, which processes share."""
        found = shared_map(lambda index: vars(cls.of_cells(table, index, modality, share)), parts)
        return [
            cls(int(n), measured, sums, float(depth), float(squares))
            for n, measured, sums, depth, squares in map(dict.values, found)
        ]

    @property
    def counts(self) -> Array:
        """Sum of the counts, or of open cells, (F,)."""
        return self.totals[0 if len(self.totals) == 1 else 1]

    @property
    def excess(self) -> Array:
        r"""Squares of counts around their mean :math:`m L_n` in cells of total L_n, beyond those of Poisson, (F,).

        They are :math:`\sum_n (x_n - m L_n)^2 / L_n - (N - 1) m`, with an expectation of about
        :math:`(1 - 1/N) \phi m^2 \sum_n L_n` where rates of cells have a squared coefficient of variation
        :math:`\phi`.
        """
        rate = self.counts / max(self.depth, 1.0)
        return self.totals[-1] - rate * self.counts - (self.n_measured - 1) * rate

    def at_depth_of_counts(self, expected: Array) -> Array:
        """Probabilities of open regions, (F,), at the depth at which they add up to the numbers of open cells.

        The depth that an encoder tells of a cell lies between that of the cell and a typical one, the more so the less
        it has learned: groups of other depths would differ in all regions. Depth multiplies the rates of opening.
        """
        n_open = max(float(self.counts[self.measured].sum()) / max(self.n_measured, 1), 0.5)
        rate = rate_of_opening(expected)
        own = rate[self.measured]
        # Newton's method: the number of open regions is concave in the depth, and no more than the sum of the rates.
        depth = n_open / max(float(own.sum()), 1e-300)
        for _ in range(_DEPTH_ROUNDS):
            closed = np.exp(-depth * own)
            depth += (n_open - float((1 - closed).sum())) / max(float((own * closed).sum()), 1e-300)
        return probability_open(depth * rate)


@dataclass(frozen=True)
class PseudobulkStatistics:
    """Averages over the cells of a group in which the modality was measured; NaN if there is none.

    Attributes
    ----------
    n_measured
        Number of those cells.
    n_cells
        Number of those in which each feature was measured, (F,), over which its averages are.
    mean, nonzero, normalized
        Mean count, share of cells with a count, and mean of counts scaled to a total of 10 000 per cell, of each
        feature, (F,). Of a binary modality those of open or closed.
    """

    n_measured: int
    n_cells: NDArray[np.int64]
    mean: Array
    nonzero: Array
    normalized: Array

    @classmethod
    def from_sums(cls, parts: Sequence[PseudobulkSums]) -> PseudobulkStatistics:
        """Statistics of all cells of disjoint parts."""
        n, n_cells = sum(part.n_measured for part in parts), np.sum([part.n_cells for part in parts], axis=0)
        totals = np.sum([part.totals for part in parts], axis=0)
        averages: Array = np.where(n_cells > 0, totals / np.maximum(n_cells, 1), np.nan)
        if len(averages) == 1:
            return cls(n, n_cells, averages[0], averages[0], averages[0])
        return cls(n, n_cells, averages[1], averages[0], averages[2])
