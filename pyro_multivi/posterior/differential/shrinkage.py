"""Empirical Bayes shrinkage of changes (adaptive shrinkage, ash).

Features that do not change are many, and of many estimates the largest are large by chance. Under a prior learnt
from all features, local false discovery rates hold also for the features that are picked as the largest
(Stephens 2017, False discovery rates: a new deal, Biostatistics 18).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, softmax

Array = NDArray[np.float64]

# Components of the prior. The widest covers twice the root mean square of the changes.
_N_WIDTHS = 14
# Features that the prior is learnt from: more would not move fifteen weights.
_MOST_FEATURES = 10_000
# Rounds of fitting: in each, so many updates of the weights and one of the centre.
_ROUNDS, _ITERATIONS = 10, 20
# Stephens' penalty: so many features that do not change are added, which keeps the share of those
# from being understated, and the centre at 0 where there is little to learn from.
_NULL_FEATURES = 10.0
_LEAST_ERROR = 1e-12


@dataclass(frozen=True)
class ChangePosterior:
    """Posterior of the change of each of F features: a mixture of K Normals.

    Attributes
    ----------
    weight, loc, scale
        Weights, means and standard deviations of the components, (F, K).
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
        return (self.weight * self.loc).sum(1)

    def std(self) -> Array:
        """Posterior standard deviation, (F,)."""
        square = (self.weight * (self.scale**2 + self.loc**2)).sum(1)
        return np.sqrt(np.maximum(square - self.mean() ** 2, 0.0))

    def draws(self, n: int, rng: np.random.Generator) -> Array:
        """Stratified draws, (n, F): the same random numbers for every feature."""
        # As many draws of each component as its weight says; the i-th draws of all features stand at the
        # same quantile of the mixture.
        ends = np.floor(self.weight.cumsum(1) * n + 0.5).astype(np.int64)
        ends[:, -1] = n
        number = np.diff(ends, prepend=0, axis=1).ravel()
        loc, scale = (np.repeat(part.ravel(), number).reshape(-1, n) for part in (self.loc, self.scale))
        return (loc + scale * rng.standard_normal(n)).T


def unshrunk(change: Array, error: Array) -> ChangePosterior:
    """Posterior under a flat prior: Normal(change, error)."""
    return ChangePosterior(np.ones((len(change), 1)), change[:, None], np.maximum(error, _LEAST_ERROR)[:, None])


@dataclass(frozen=True)
class ShrinkagePrior:
    r"""Prior of all changes: a mixture of Normals around one centre.

    .. math:: \hat\Delta_j \sim Normal(\Delta_j, s_j^2), \quad
        \Delta_j \sim \sum_k \pi_k Normal(m, \sigma_k^2 + \tau^2)

    The centre m is 0, unless features are shares of a whole (compositional), where a few that go up take all
    others down together. Then it is learnt, and its error :math:`\tau` is kept: with a centre just beyond a
    bound no feature is known to be beyond it.

    Attributes
    ----------
    width, share
        Standard deviations and weights, (K,); the narrowest component stands for no change.
    centre
        Mean of all components.
    """

    width: Array
    share: Array
    centre: float

    @classmethod
    def fit(
        cls, change: Array, error: Array, rng: np.random.Generator, common_error: float | None = None
    ) -> ShrinkagePrior:
        """Learn the prior by expectation maximisation on a fixed grid of widths.

        Parameters
        ----------
        change, error
            Estimates and their standard errors, (F,).
        rng
            Chooses features to learn from if there are very many.
        common_error
            Standard error of the change that compositional features have in common; None keeps the centre at 0.

        Examples
        --------
        >>> rng = np.random.default_rng(0)
        >>> truth = np.where(np.arange(1000) < 100, 3.0, 0.0)
        >>> change, error = truth + rng.standard_normal(1000), np.ones(1000)
        >>> found = ShrinkagePrior.fit(change, error, rng).posterior(change, error)
        >>> bool(np.abs(found.mean()[100:]).mean() < 0.3)
        True
        """
        usable = np.flatnonzero(np.isfinite(change) & np.isfinite(error))
        if len(usable) > _MOST_FEATURES:
            usable = rng.choice(usable, _MOST_FEATURES, replace=False)
        change, error = change[usable], np.maximum(error[usable], _LEAST_ERROR)
        widest = 2 * np.sqrt(max(float(np.mean(change**2)) if len(change) else 0.0, 1e-12))
        width = np.concatenate([[1e-3], np.geomspace(0.02, 1.0, _N_WIDTHS)]) * widest
        share = np.full(len(width), 1 / len(width))
        if not len(change):
            return cls(width, share, 0.0)
        variance = width[None] ** 2 + error[:, None] ** 2
        # Precision of the added features, known as well as most.
        null_precision = _NULL_FEATURES / (width[0] ** 2 + float(np.median(error)) ** 2)
        extra = np.zeros(len(width))
        extra[0] = _NULL_FEATURES
        centre = 0.0
        for _ in range(_ROUNDS):
            log_density = _log_density(change - centre, error, width)
            density = np.exp(log_density - log_density.max(1, keepdims=True))
            for _ in range(_ITERATIONS):
                members = share * (density.T @ (1 / (density @ share)))
                share = np.maximum((members + extra) / (len(change) + _NULL_FEATURES), 1e-300)
            if common_error is not None:
                precision = (density / variance) @ share / (density @ share)
                total = precision.sum() + null_precision
                centre = float(precision @ change / total)
        if common_error is not None:
            width = np.sqrt(width**2 + common_error**2 + 1 / total)
        return cls(width, share, centre)

    def posterior(self, change: Array, error: Array) -> ChangePosterior:
        """Posterior of features with these estimates and standard errors, (F,)."""
        error = np.maximum(error, _LEAST_ERROR)
        weight = softmax(np.log(self.share) + _log_density(change - self.centre, error, self.width), axis=1)
        precision = 1 / self.width[None] ** 2 + 1 / error[:, None] ** 2
        loc = (self.centre / self.width[None] ** 2 + change[:, None] / error[:, None] ** 2) / precision
        return ChangePosterior(weight, loc, np.sqrt(1 / precision))


def _log_density(change: Array, error: Array, width: Array) -> Array:
    """Log density of an estimate under each component, without constants, (F, K)."""
    variance = width[None] ** 2 + error[:, None] ** 2
    return -0.5 * (np.log(variance) + change[:, None] ** 2 / variance)
