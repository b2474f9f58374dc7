"""Changes between the means of two groups, with their standard errors and posteriors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from pyro_multivi.posterior.differential.effect import Change, Statistics, StatisticsByBlock, TestSpecification
from pyro_multivi.posterior.differential.shrinkage import ChangePosterior
from pyro_multivi.posterior.engine.decode import BLOCK

Array = NDArray[np.float64]

# Relative step of a slope: the cube root of double precision, where its error is least.
_STEP = 1e-5
# Features whose posteriors are evaluated together: a few mixtures of this length take some MB.
_EXACT_WIDTH = 4096


def change_of_means(
    change: Change,
    pseudocounts: float,
    means: tuple[Array, Array],
    errors: tuple[Array, Array],
    least: tuple[Array | float, Array | float] = (0.0, 0.0),
) -> tuple[Array, Array]:
    """The change from one mean to the other and its standard error to first order, (F,) each.

    Slopes are taken no lower than ``least``, the pseudobulk means: near zero a logarithm has no first order.
    """

    def at(first: Array, second: Array) -> Array:
        found: Array = change(torch.from_numpy(first), torch.from_numpy(second), pseudocounts).numpy()
        return found

    first, second = (np.maximum(mean, low) for mean, low in zip(means, least, strict=True))
    # Small beside the distance from 0 and from 1, where log scales end; never lost in rounding.
    step1, step2 = (np.maximum(_STEP * mean * np.abs(1 - mean), 1e-14) for mean in (first, second))
    slope1 = (at(first + step1, second) - at(first - step1, second)) / (2 * step1)
    slope2 = (at(first, second + step2) - at(first, second - step2)) / (2 * step2)
    return at(*means), np.hypot(slope1 * errors[0], slope2 * errors[1])


def probability_larger(means: tuple[Array, Array], errors: tuple[Array, Array]) -> Array:
    """Probability that the first mean is the larger one, under a flat prior, (F,)."""
    larger: Array = ndtr((means[0] - means[1]) / np.maximum(np.hypot(*errors), 1e-300))
    return larger


def statistics_of_posterior(
    posterior: Callable[[slice], ChangePosterior],
    n_features: int,
    specification: TestSpecification,
    n_draws: int,
    rng: np.random.Generator,
) -> Statistics:
    """Probability and statistics of a change, (F,) each, a block of features at a time.

    Probabilities, means and deviations are exact; the rest comes from draws of the posterior.

    Parameters
    ----------
    posterior
        Function that gives the posterior of the change of a block of features.
    n_draws
        Draws where there have to be some.
    """
    found = StatisticsByBlock(n_features)
    drawing = specification.extremes or bool(specification.levels) or specification.m1_domain_fn is not None
    width = max(1, BLOCK // n_draws) if drawing else _EXACT_WIDTH
    seed = int(rng.integers(2**63))
    for start in range(0, n_features, width):
        block = slice(start, min(start + width, n_features))
        change = posterior(block)
        statistics = {"mean": change.mean(), "std": change.std()}
        if specification.m1_domain_fn is None:
            delta = specification.delta
            statistics["probability"] = specification.probability(change.above(delta), change.below(-delta))
        if drawing:
            # The same random numbers in every block: a feature's draws do not depend on its place.
            draws = torch.from_numpy(change.draws(n_draws, np.random.default_rng(seed)))
            statistics |= specification.order_statistics(draws)
            if specification.m1_domain_fn is not None:
                statistics["probability"] = specification.probability_of_draws(draws)
        found.put(block, statistics)
    return found.statistics
