"""What all features together say of how large changes are: an empirical Bayes prior and its posteriors.

Features that do not change at all are many, and of many estimates the largest are large by chance.
A prior learnt from all features makes the posterior of each mean what it says, also after selection
(adaptive shrinkage: Stephens 2017, False discovery rates: a new deal, Biostatistics 18).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

Array = NDArray[np.float64]

# Components of the prior. The widest covers twice the root mean square of the changes.
_N_WIDTHS = 14
# Features that the prior is learnt from: more would not move fifteen weights.
_MOST_FEATURES = 10_000
_ITERATIONS = 200
# Stephens' penalty: as if so many features more had been seen not to change, which keeps the
# share of those from being understated.
_NULL_FEATURES = 10.0


@dataclass(frozen=True)
class Changes:
    """Posterior of the change of each feature: a mixture of Normals.

    Attributes
    ----------
    weight, loc, scale
        Of the components, (F, K).
    """

    weight: Array
    loc: Array
    scale: Array

    def above(self, bound: float) -> Array:
        """P(change >= bound), (F,)."""
        return self._total(ndtr((self.loc - bound) / self.scale))

    def below(self, bound: float) -> Array:
        """P(change <= bound), (F,)."""
        return self._total(ndtr((bound - self.loc) / self.scale))

    def _total(self, by_component: Array) -> Array:
        total: Array = (self.weight * by_component).sum(1)
        return np.clip(total, 0.0, 1.0)

    def mean(self) -> Array:
        """Posterior mean, (F,)."""
        mean: Array = (self.weight * self.loc).sum(1)
        return mean

    def std(self) -> Array:
        """Posterior standard deviation, (F,)."""
        square = (self.weight * (self.scale**2 + self.loc**2)).sum(1)
        std: Array = np.sqrt(np.maximum(square - self.mean() ** 2, 0.0))
        return std

    def draws(self, n: int, rng: np.random.Generator, features: slice = slice(None)) -> Array:
        """Stratified draws for some features, (n, f): the same random numbers for every feature."""
        weight, loc, scale = (part[features] for part in (self.weight, self.loc, self.scale))
        unit = rng.permutation((np.arange(n) + 0.5) / n)
        normal = rng.standard_normal(n)
        upto = weight.cumsum(1)
        which = np.zeros((n, len(weight)), dtype=np.int64)
        for component in range(weight.shape[1] - 1):
            which += unit[:, None] > upto[:, component]
        row = np.arange(len(weight))
        drawn: Array = loc[row, which] + scale[row, which] * normal[:, None]
        return drawn


def as_estimated(change: Array, error: Array) -> Changes:
    """Posteriors under a flat prior: Normal(change, error)."""
    return Changes(np.ones((len(change), 1)), change[:, None], np.maximum(error, 1e-12)[:, None])


def shrunk(change: Array, error: Array, rng: np.random.Generator) -> Changes:
    r"""Posteriors under a prior learnt from all features.

    .. math:: \hat\Delta_j \sim Normal(\Delta_j, s_j^2), \quad
        \Delta_j \sim \sum_k \pi_k Normal(0, \sigma_k^2)

    The weights come from expectation maximisation on a fixed grid of widths, the narrowest of which
    stands for no change.

    Parameters
    ----------
    change, error
        Estimates and their standard errors, (F,).
    rng
        Chooses the features that are learnt from, if there are very many.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> truth = np.where(np.arange(1000) < 100, 3.0, 0.0)
    >>> found = shrunk(truth + rng.standard_normal(1000), np.ones(1000), rng)
    >>> bool(np.abs(found.mean()[100:]).mean() < 0.3)
    True
    """
    usable = np.flatnonzero(np.isfinite(change) & np.isfinite(error))
    if len(usable) > _MOST_FEATURES:
        usable = rng.choice(usable, _MOST_FEATURES, replace=False)
    seen, error_seen = change[usable], np.maximum(error[usable], 1e-12)
    widest = 2 * np.sqrt(max(float(np.mean(seen**2)) if len(seen) else 0.0, 1e-12))
    width = np.concatenate([[1e-3], np.geomspace(0.02, 1.0, _N_WIDTHS)]) * widest
    share = _learn(seen, error_seen, width)
    error = np.maximum(error, 1e-12)
    log_weight = np.log(share) + _log_density(change, error, width)
    log_weight -= log_weight.max(1, keepdims=True)
    weight = np.exp(log_weight)
    weight /= weight.sum(1, keepdims=True)
    precision = 1 / width[None] ** 2 + 1 / error[:, None] ** 2
    loc = change[:, None] / error[:, None] ** 2 / precision
    return Changes(weight, loc, np.sqrt(1 / precision))


def _learn(change: Array, error: Array, width: Array) -> Array:
    """Weights of the prior, (K,)."""
    log_density = _log_density(change, error, width)
    top = log_density.max(1, keepdims=True) if len(change) else np.zeros((0, 1))
    density = np.exp(log_density - top)
    extra = np.zeros(len(width))
    extra[0] = _NULL_FEATURES
    share = np.full(len(width), 1 / len(width))
    for _ in range(_ITERATIONS):
        part = density * share
        part /= part.sum(1, keepdims=True)
        share = np.maximum((part.sum(0) + extra) / (len(change) + _NULL_FEATURES), 1e-300)
    return share


def _log_density(change: Any, error: Any, width: Any) -> Array:
    """Log density of an estimate under each component, without constants, (F, K)."""
    variance = width[None] ** 2 + np.asarray(error)[:, None] ** 2
    found: Array = -0.5 * (np.log(variance) + np.asarray(change)[:, None] ** 2 / variance)
    return found
