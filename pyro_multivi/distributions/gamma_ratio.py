"""The part of the negative binomial that holds gamma functions, free of cancellation."""

from __future__ import annotations

import torch
from torch import Tensor

# From here on Stirling's series with four terms is exact to float64 rounding, while the
# difference of two lgamma would lose digits that grow with theta.
STIRLING_FROM = 30.0


def _stirling_tail(z: Tensor) -> Tensor:
    """lgamma(z) - [(z - 1/2) log z - z + log(2 pi)/2] for z >= STIRLING_FROM."""
    inverse = z.reciprocal()
    square = inverse * inverse
    return inverse * (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square / 1680)))


def _stirling_tail_slope(z: Tensor) -> Tensor:
    """Derivative of :func:`_stirling_tail`."""
    square = z.reciprocal().square()
    return -square * (1 / 12 - square * (3 / 360 - square * (5 / 1260 - square * (7 / 1680))))


def log_rising(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Split lgamma(x + theta) - lgamma(theta) where it is accurate to.

    Returns
    -------
    (ratio, is_large)
        Where ``theta`` is small, ``ratio`` is the difference itself. Where ``is_large``, it is
        the difference minus x log(theta), which goes to 0 as theta goes to infinity (the
        Poisson limit).
    """
    is_large = theta >= STIRLING_FROM
    # Each branch gets arguments it can digest, so that the other's gradient cannot become nan.
    small = torch.where(is_large, 1.0, theta)
    large = torch.where(is_large, theta, STIRLING_FROM)
    difference = torch.lgamma(x + small) - torch.lgamma(small)
    total = x + large
    series = (total - 0.5) * torch.log1p(x / large) - x + _stirling_tail(total) - _stirling_tail(large)
    return torch.where(is_large, series, difference), is_large


def log_rising_slope(x: Tensor, theta: Tensor) -> Tensor:
    """Derivative of lgamma(x + theta) - lgamma(theta) - x log(theta) by log(theta).

    Goes to 1 - x as theta goes to 0 (for x >= 1) and to 0 as theta goes to infinity.
    """
    is_large = theta >= STIRLING_FROM
    small = torch.where(is_large, 1.0, theta)
    large = torch.where(is_large, theta, STIRLING_FROM)
    difference = small * (torch.digamma(x + small) - torch.digamma(small)) - x
    total = x + large
    tails = _stirling_tail_slope(total) - _stirling_tail_slope(large)
    series = large * (torch.log1p(x / large) + tails) - x * (1 - 0.5 / total)
    return torch.where(is_large, series, difference)
