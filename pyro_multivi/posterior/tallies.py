"""What the counts of a group say by themselves: statistics over measured cells, streamed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def count_error(tally1: Tally, tally2: Tally, site: str, mean1: Any, mean2: Any) -> tuple[Any, Any]:
    """Standard error of the mean of each group that its own counts leave, on the model's scale.

    The decoder learnt the mean of a group from the counts of that group, so it knows it no better
    than they do; the posterior of z does not hold this error. It is taken from the counts
    themselves, hence whatever the observation model. Half a count (half an open cell) is added, so
    that features never seen are not known exactly. The unit, which library sizes and cell and region
    factors set, is that in which the two groups together have the mean the model gives them.

    Parameters
    ----------
    tally1, tally2
        Of the two groups.
    site
        ``"rho"`` or ``"p"``.
    mean1, mean2
        Model's means, (F,).

    Returns
    -------
    tuple
        Two arrays, (F,); zeros for a group of which nothing was measured.
    """
    groups = [_smoothed(found, site) for found in (tally1, tally2)]
    seen = sum(rate for rate, _ in groups)
    modelled = sum(mean for mean, found in ((mean1, tally1), (mean2, tally2)) if found.n_measured)
    unit = modelled / np.maximum(seen, 1e-300)
    first, second = (unit * error for _, error in groups)
    return first, second


def _smoothed(found: Tally, site: str) -> tuple[Any, Any]:
    """Mean with half a count added, and its standard error; zeros where nothing was measured."""
    n = found.n_measured
    if n == 0:
        return np.zeros_like(found.mean), np.zeros_like(found.mean)
    if site == "p":
        rate = (found.nonzero * n + 0.5) / (n + 1)
        return rate, np.sqrt(rate * (1 - rate) / n)
    # One count weighs, in scaled counts, as much as it does on average over the group's cells.
    total = max(float(found.mean.sum()), 1.0)
    half = 0.5 * SCALED_TOTAL / total / n
    # The variance of half a Poisson count more, of the mean: (half a count) x (one count) / n.
    extra = 0.5 * (SCALED_TOTAL / total) ** 2 / n
    return found.normalized + half, np.sqrt((found.normalized_var + extra) / n)
