"""What the counts of a group say by themselves: statistics over measured cells, streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.table import CellTable

# Cells whose stored counts are looked at together.
_BLOCK = 4096
#: Total that counts of a cell are scaled to, as in scvi-tools.
SCALED_TOTAL = 1e4


@dataclass(frozen=True)
class Tally:
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
    mean: NDArray[np.float64]
    nonzero: NDArray[np.float64]
    normalized: NDArray[np.float64]
    normalized_var: NDArray[np.float64]


def tally(table: CellTable, index: Tensor, site: str) -> Tally:
    """Statistics of some cells from their stored counts alone.

    Parameters
    ----------
    table
        The data.
    index
        Positions of the cells, int64.
    site
        ``"rho"`` for genes, ``"p"`` for regions.
    """
    counts = table.x if site == "rho" else table.y
    measured = table.has_rna if site == "rho" else table.has_atac
    n_features = table.n_genes if site == "rho" else table.n_regions
    index = index[measured[index]]
    n = len(index)
    if n == 0 or counts is None:
        nothing = np.full(n_features, np.nan)
        return Tally(0, nothing, nothing, nothing, nothing)
    # Sums of counts, of ones, of scaled counts and of their squares.
    sums = torch.zeros(4, n_features, dtype=torch.float64)
    for part in index.split(_BLOCK):
        rows = counts.select_rows(part)
        column, value = rows.col.long(), rows.val.double()
        sums[1] += torch.bincount(column, minlength=n_features)
        if site == "rho":
            total = rows.row_sums().double().clamp(min=1.0)
            scaled = value * (SCALED_TOTAL / total)[rows.rows()]
            for number, weight in ((0, value), (2, scaled), (3, scaled.square())):
                sums[number] += torch.bincount(column, weights=weight, minlength=n_features)
    if site == "p":
        # Of regions only open or not is known to the model.
        sums[0] = sums[2] = sums[3] = sums[1]
    mean, nonzero, normalized, square = (sums / n).numpy()
    return Tally(n, mean, nonzero, normalized, np.maximum(square - normalized**2, 0.0))


class Supported(NamedTuple):
    """What the counts of a group leave open of its mean, on the model's scale, (F,) each.

    Attributes
    ----------
    mean
        Mean of the counts with half a count added: below it the counts do not reach.
    error
        Standard error of the mean.
    """

    mean: NDArray[np.float64]
    error: NDArray[np.float64]


def count_support(
    tally1: Tally, tally2: Tally, site: str, mean1: Any, mean2: Any, additive: bool
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
    first, second = (
        Supported(np.minimum(unit * one.mean, (mean1 + mean2) / 2), unit * one.error) for one in seen
    )
    return first, second


def _with_half_a_count(found: Tally, site: str) -> Supported:
    n = found.n_measured
    if n == 0:
        return Supported(np.zeros_like(found.mean), np.zeros_like(found.mean))
    if site == "p":
        rate = (found.nonzero * n + 0.5) / (n + 1)
        return Supported(rate, np.sqrt(rate * (1 - rate) / n))
    # What one count weighs, in scaled counts, in a cell of the group's mean total.
    one = SCALED_TOTAL / max(float(found.mean.sum()), 1.0)
    return Supported(found.normalized + 0.5 * one / n, np.sqrt((found.normalized_var + 0.5 * one**2 / n) / n))
