"""Pseudobulk statistics: averages of the counts of a group over its measured cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.modality import Modality
from pyro_multivi.data.table import CellTable

Array = NDArray[np.float64]

# Cells whose stored counts are summed together.
_BLOCK = 4096
#: Total to which the counts of a cell are scaled, as in scvi-tools.
SCALED_TOTAL = 1e4


@dataclass(frozen=True)
class PseudobulkSums:
    """Sums over the measured cells of a set of cells; those of a group are added up from those of its disjoint parts.

    Attributes
    ----------
    n_measured
        Number of those cells.
    totals
        Cells with a count; unless the modality is binary also sums of counts, of scaled counts and of their squares:
        (1 or 4, F).
    """

    n_measured: int
    totals: Array

    @classmethod
    def of_cells(cls, table: CellTable, index: Tensor, modality: Modality) -> PseudobulkSums:
        """Sum up the stored counts of the cells at ``index``, int64."""
        counts, n_features = modality.counts_in(table), modality.n_features_in(table)
        index = index[modality.measured_in(table)[index]]
        sums = torch.zeros(1 if modality.binary else 4, n_features, dtype=torch.float64)
        if counts is None:
            return cls(0, sums.numpy())
        for part in index.split(_BLOCK):
            rows = counts.select_rows(part)
            # Before anything is summed: a table may hold small integers.
            rows = rows.with_values(rows.val.double())
            column = rows.col.long()
            sums[0] += torch.bincount(column, minlength=n_features)
            if not modality.binary:
                value, total = rows.val, rows.row_sums().clamp(min=1.0)
                scaled = value * (SCALED_TOTAL / total)[rows.rows()]
                for number, weight in enumerate((value, scaled, scaled.square()), 1):
                    sums[number] += torch.bincount(column, weights=weight, minlength=n_features)
        return cls(len(index), sums.numpy())


@dataclass(frozen=True)
class PseudobulkStatistics:
    """Averages over the cells of a group in which the modality was measured; NaN if there is none.

    Attributes
    ----------
    n_measured
        Number of those cells n.
    mean, nonzero
        Mean count and share of cells with a count, of each feature, (F,).
    normalized, normalized_var
        Mean and (population) variance of counts scaled to a total of 10 000 per cell, (F,). Of a binary modality
        those of open or closed.
    """

    n_measured: int
    mean: Array
    nonzero: Array
    normalized: Array
    normalized_var: Array

    @classmethod
    def from_sums(cls, parts: Sequence[PseudobulkSums]) -> PseudobulkStatistics:
        """Statistics of all cells of disjoint parts."""
        n = sum(part.n_measured for part in parts)
        totals = np.sum([part.totals for part in parts], axis=0)
        if n == 0:
            missing = np.full(parts[0].totals.shape[1], np.nan)
            return cls(0, missing, missing, missing, missing)
        averages: Array = totals / n
        if len(averages) == 1:
            rate = averages[0]
            return cls(n, rate, rate, rate, rate - rate**2)
        nonzero, mean, normalized, square = averages
        return cls(n, mean, nonzero, normalized, np.maximum(square - normalized**2, 0.0))


class PseudobulkMean(NamedTuple):
    """Mean of the counts of a group with half a count added, and its standard error, (F,) each."""

    mean: Array
    error: Array


def pseudobulk_means(
    observed: tuple[PseudobulkStatistics, PseudobulkStatistics],
    means: tuple[Array, Array],
    modality: Modality,
    additive: bool,
) -> tuple[PseudobulkMean, PseudobulkMean]:
    """Pseudobulk mean of two groups on the scale of the model's, and the error that the counts leave in it.

    The decoder learnt the mean of a group from the counts of that group, so its error is no smaller
    than theirs; the posterior of z does not hold it. It is taken from the counts
    themselves, hence whatever the observation model. Half a count (half an open cell) is added, so
    that features without any count are not known exactly. The unit, which library sizes and cell and region
    factors set, is that in which the two groups together have the mean the model gives them.

    For a difference, a share of open cells has the variance that it would have if both groups shared
    one, where that is larger: a group with few open cells by chance would have too small an error. On log
    scales it is the other way round, and a group's own variance is kept.

    Parameters
    ----------
    means
        Model's means of the groups, (F,).
    additive
        Whether the groups are compared by their difference, rather than by a ratio.

    Returns
    -------
    tuple
        Zeros for a group without measured cells.
    """
    found = [_with_half_a_count(group, modality) for group in observed]
    if modality.binary and additive and all(group.n_measured for group in observed):
        common = (found[0].mean + found[1].mean) / 2
        pooled = [np.sqrt(common * (1 - common) / group.n_measured) for group in observed]
        found = [PseudobulkMean(m, np.maximum(error, least)) for (m, error), least in zip(found, pooled, strict=True)]
    modelled = sum(mean for mean, group in zip(means, observed, strict=True) if group.n_measured)
    unit = modelled / np.maximum(found[0].mean + found[1].mean, 1e-300)
    # No higher than both groups' common mean, so that a probability stays one.
    most = (means[0] + means[1]) / 2
    first, second = (PseudobulkMean(np.minimum(unit * one.mean, most), unit * one.error) for one in found)
    return first, second


def pseudobulk_correction(observed: PseudobulkStatistics, expected: Array, modality: Modality) -> Array:
    """Ratio of the counts observed in a set of cells to those that the model expects of it, (F,).

    A decoder is smooth and its weights are held back: it draws the means of groups together, by no less
    than the error of the counts where groups differ much. The mean it gives a group, times this factor,
    is no longer biased by that. Half a count is added to both sides, so that features with next to no
    counts stay with the model; without measured cells the factor is 1.

    Parameters
    ----------
    expected
        Expectation of the counts: of a binary modality the probability of being found open, otherwise
        a number in proportion to the mean count, (F,).
    """
    n = observed.n_measured
    if n == 0:
        return np.ones_like(expected)
    if modality.binary:
        return (observed.nonzero * n + 0.5) / (expected * n + 0.5)
    half = 0.5 / (n * max(float(observed.mean.sum()), 1.0))
    return (observed.normalized / SCALED_TOTAL + half) / (expected / max(float(expected.sum()), 1e-300) + half)


def _with_half_a_count(group: PseudobulkStatistics, modality: Modality) -> PseudobulkMean:
    n = group.n_measured
    if n == 0:
        return PseudobulkMean(np.zeros_like(group.mean), np.zeros_like(group.mean))
    if modality.binary:
        rate = (group.nonzero * n + 0.5) / (n + 1)
        return PseudobulkMean(rate, np.sqrt(rate * (1 - rate) / n))
    # Weight of one count, in scaled counts, in a cell of the group's mean total.
    one = SCALED_TOTAL / max(float(group.mean.sum()), 1.0)
    return PseudobulkMean(group.normalized + 0.5 * one / n, np.sqrt((group.normalized_var + 0.5 * one**2 / n) / n))
