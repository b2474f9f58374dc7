"""What the counts of a group say by themselves: statistics over measured cells, streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.table import CellTable

Array = NDArray[np.float64]

# Cells whose stored counts are looked at together.
_BLOCK = 4096
#: Total that counts of a cell are scaled to, as in scvi-tools.
SCALED_TOTAL = 1e4


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
        Mean and (population) variance of counts scaled to a total of 10 000 per cell, (F,).
    """

    n_measured: int
    mean: Array
    nonzero: Array
    normalized: Array
    normalized_var: Array


@dataclass(frozen=True)
class PseudobulkSums:
    """What is summed up over the measured cells of a part; the sums of a group are those of its parts.

    Attributes
    ----------
    n_measured
        Number of those cells.
    totals
        Of ones, and for genes also of counts, of scaled counts and of their squares: (1 or 4, F).
    """

    n_measured: int
    totals: Array

    @classmethod
    def count(cls, table: CellTable, index: Tensor, site: str) -> PseudobulkSums:
        """Go through the stored counts of some cells.

        Parameters
        ----------
        table
            The data.
        index
            Positions of the cells, int64.
        site
            ``"rho"`` for genes, ``"p"`` for regions, of which only open or not is known to the model.
        """
        counts = table.x if site == "rho" else table.y
        measured = table.has_rna if site == "rho" else table.has_atac
        n_features = table.n_genes if site == "rho" else table.n_regions
        index = index[measured[index]]
        sums = torch.zeros(4 if site == "rho" else 1, n_features, dtype=torch.float64)
        if counts is None:
            return cls(0, sums.numpy())
        for part in index.split(_BLOCK):
            rows = counts.select_rows(part)
            # Before anything is summed: a table may hold small integers.
            rows = rows.with_values(rows.val.double())
            column = rows.col.long()
            sums[0] += torch.bincount(column, minlength=n_features)
            if site == "rho":
                value, total = rows.val, rows.row_sums().clamp(min=1.0)
                scaled = value * (SCALED_TOTAL / total)[rows.rows()]
                for number, weight in enumerate((value, scaled, scaled.square()), 1):
                    sums[number] += torch.bincount(column, weights=weight, minlength=n_features)
        return cls(len(index), sums.numpy())

    @staticmethod
    def tally(parts: Sequence[PseudobulkSums]) -> PseudobulkStatistics:
        """Of the cells of all these parts together."""
        n = sum(one.n_measured for one in parts)
        totals = np.sum([one.totals for one in parts], axis=0)
        if n == 0:
            nothing = np.full(parts[0].totals.shape[1], np.nan)
            return PseudobulkStatistics(0, nothing, nothing, nothing, nothing)
        averages: Array = totals / n
        if len(averages) == 1:
            rate = averages[0]
            return PseudobulkStatistics(n, rate, rate, rate, rate - rate**2)
        nonzero, mean, normalized, square = averages
        return PseudobulkStatistics(n, mean, nonzero, normalized, np.maximum(square - normalized**2, 0.0))


class Supported(NamedTuple):
    """What the counts of a group leave open of its mean, on the model's scale, (F,) each.

    Attributes
    ----------
    mean
        Mean of the counts with half a count added: below it the counts do not reach.
    error
        Standard error of the mean.
    """

    mean: Array
    error: Array


def count_support(
    tally1: PseudobulkStatistics, tally2: PseudobulkStatistics, site: str, mean1: Any, mean2: Any, additive: bool
) -> tuple[Supported, Supported]:
    """How well its own counts determine the mean of each group.

    The decoder learnt the mean of a group from the counts of that group, so it knows it no better
    than they do; the posterior of z does not hold this error. It is taken from the counts
    themselves, hence whatever the observation model. Half a count (half an open cell) is added, so
    that features never seen are not known exactly. The unit, which library sizes and cell and region
    factors set, is that in which the two groups together have the mean the model gives them.

    For a difference, a share of open cells has the variance that it would have if both groups shared
    one, where that is larger: a group with few open cells by chance seems to be known too well. On log
    scales it is the other way round, and a group's own variance is kept.

    Parameters
    ----------
    tally1, tally2
        Of the two groups.
    site
        ``"rho"`` or ``"p"``.
    mean1, mean2
        Model's means, (F,).
    additive
        Whether their difference is asked for, rather than a ratio.

    Returns
    -------
    tuple
        Zeros for a group of which nothing was measured.
    """
    tallies = (tally1, tally2)
    seen = [_with_half_a_count(found, site) for found in tallies]
    if site == "p" and additive and tally1.n_measured and tally2.n_measured:
        common = (seen[0].mean + seen[1].mean) / 2
        errors = [np.sqrt(common * (1 - common) / found.n_measured) for found in tallies]
        seen = [Supported(one.mean, np.maximum(one.error, error)) for one, error in zip(seen, errors, strict=True)]
    modelled = sum(mean for mean, found in zip((mean1, mean2), tallies, strict=True) if found.n_measured)
    unit = modelled / np.maximum(seen[0].mean + seen[1].mean, 1e-300)
    # No higher than both groups' common mean, so that a probability stays one.
    first, second = (Supported(np.minimum(unit * one.mean, (mean1 + mean2) / 2), unit * one.error) for one in seen)
    return first, second


def observed_to_expected(seen: PseudobulkStatistics, expected: Array, site: str) -> Array:
    """By what factor the counts of a part exceed what the model expects of them, (F,).

    A decoder is smooth and its weights are held back: it draws the means of groups together, by no less
    than the error of the counts where groups differ much. The mean it gives a group, times this factor,
    is no longer biased by that. Half a count is added to both sides, so that features of which next to
    nothing was seen stay with the model; where nothing was measured the factor is 1.

    Parameters
    ----------
    seen
        Of the part.
    expected
        What its counts are expected to be: of regions the probability of being found open, of genes
        a number in proportion to the mean count, (F,).
    site
        ``"rho"`` or ``"p"``.
    """
    n = seen.n_measured
    if n == 0:
        return np.ones_like(expected)
    if site == "p":
        return (seen.nonzero * n + 0.5) / (expected * n + 0.5)
    half = 0.5 / (n * max(float(seen.mean.sum()), 1.0))
    return (seen.normalized / SCALED_TOTAL + half) / (expected / max(float(expected.sum()), 1e-300) + half)


def _with_half_a_count(found: PseudobulkStatistics, site: str) -> Supported:
    n = found.n_measured
    if n == 0:
        return Supported(np.zeros_like(found.mean), np.zeros_like(found.mean))
    if site == "p":
        rate = (found.nonzero * n + 0.5) / (n + 1)
        return Supported(rate, np.sqrt(rate * (1 - rate) / n))
    # What one count weighs, in scaled counts, in a cell of the group's mean total.
    one = SCALED_TOTAL / max(float(found.mean.sum()), 1.0)
    return Supported(found.normalized + 0.5 * one / n, np.sqrt((found.normalized_var + 0.5 * one**2 / n) / n))
