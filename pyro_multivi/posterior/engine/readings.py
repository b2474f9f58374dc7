"""Likelihoods of accessibility read as those of other data: counts as open or closed, open or closed as counts.

Models that count fragments and models of open or closed regions explain different data, so that their likelihoods say
nothing about each other. Two readings do: of what is open alone, which every model predicts, and of the counts, where
a probability q to be open stands for the one Poisson count that is above zero as often, of mean -log(1 - q).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout, ScaledBernoulli
from pyro_multivi.distributions.base import CellDistribution
from pyro_multivi.distributions.fragments import FragmentCounts

# Draws x entries x hidden units evaluated together: 64 MB in float32.
_AT_ONCE = 2**24


def log_prob_as_open(fn: Any, y: SparseCounts) -> Tensor:
    """Log-probability of which regions are open, whatever their counts, (..., B)."""
    if isinstance(fn, ScaledBernoulli):
        return fn.log_prob(y)
    _check(fn)
    theta = fn.theta

    def opened(mean: Tensor, region: Tensor, _: Tensor) -> Tensor:
        zero = -mean if theta is None else -theta[region] * torch.log1p(mean / theta[region])
        # log(1 - p(0)) - log p(0), p(0) being that of all regions below.
        return torch.log(-torch.expm1(zero)).clamp(min=-1e4) - zero

    closed = SparseCounts(torch.zeros_like(y.crow), y.col[:0], y.val[:0], (y.shape[0], y.shape[1]))
    return fn.log_prob(closed) + _sum_at_entries(fn, fn.size, fn.rate, y, opened)


def log_prob_as_counts(fn: Any, y: SparseCounts) -> Tensor:
    """Log-probability of the counts, (..., B); of open or closed regions, as Poisson counts that are as often 0."""
    if isinstance(fn, FragmentCounts):
        return fn.log_prob(y)
    _check(fn)

    def counted(q: Tensor, _: Tensor, x: Tensor) -> Tensor:
        mean = -torch.log1p(-q.clamp(max=1 - 1e-6))
        return torch.xlogy(x, mean) - mean - torch.lgamma(x + 1) - torch.log(q)

    return fn.log_prob(y) + _sum_at_entries(fn, fn.cell_factor, fn.region_factor, y, counted)


#: Readings by the word for what they are of.
READINGS: Mapping[str, Callable[[Any, SparseCounts], Tensor]] = {
    "open": log_prob_as_open,
    "counts": log_prob_as_counts,
}


def _check(fn: Any) -> None:
    if not isinstance(fn, (ScaledBernoulli, FragmentCounts)):
        raise ValueError(
            f"A model's accessibility is a {type(fn).__name__}, of which no other reading is known: compare models "
            "with the same likelihood of accessibility."
        )


def _sum_at_entries(
    fn: CellDistribution,
    size: Tensor,
    rate: Tensor | None,
    y: SparseCounts,
    term: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Sum over the counts above zero of each cell of a function of p size rate, the region and the count."""
    p: Any = fn.p
    shape = fn.batch_shape
    row, col = y.rows().long(), y.col.long()
    hidden = p.hidden.expand(*shape, -1) if isinstance(p, Readout) else None
    width = p.hidden.shape[-1] if isinstance(p, Readout) else 1
    total = torch.zeros(shape, dtype=torch.float64, device=y.device)
    size = size.expand(shape)
    step = max(1, _AT_ONCE // (width * max(1, shape[:-1].numel())))
    for at in torch.arange(len(col), device=y.device).split(step):
        r, c = row[at], col[at]
        if hidden is None:
            of_p = p.expand(*shape, p.shape[-1])[..., r, c]
        else:
            of_p = torch.sigmoid((hidden[..., r, :] * p.weight[c]).sum(-1) + p.bias[c])
        value = of_p * size[..., r]
        value = value if rate is None else value * rate[c]
        total.index_add_(-1, r, term(value, c, y.val[at].to(value.dtype)).double())
    return total
