"""Changes of the mean of a group of cells, and how well it is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr

from pyro_multivi.posterior.differential.cell_pairs import Collected
from pyro_multivi.posterior.differential.effect import Change, Statistics, TestSpecification
from pyro_multivi.posterior.differential.shrinkage import Changes
from pyro_multivi.posterior.engine.decode import BLOCK

Array = NDArray[np.float64]

# Relative step of a slope: the cube root of double precision, where its error is least.
_STEP = 1e-5
# Features whose posteriors are evaluated together: a few mixtures of this length take some MB.
_EXACT_WIDTH = 4096


def mean_errors(
    variances: tuple[Array, Array], n_cells: tuple[int, int], counts: tuple[Any, Any]
) -> tuple[Array, Array]:
    """Standard errors of both groups' means, (F,).

    The mean over n independent cells of a group has the variance of one posterior draw of a random
    one of its cells, divided by n: the spread of the cells and what is open about each are both in it.

    Parameters
    ----------
    variances
        Of the draws of each group, (F,).
    n_cells
        Cells of each group that were drawn.
    counts
        Error that the counts leave in each mean, (F,) each, or zeros.
    """
    first, second = (
        np.sqrt(variance / n + error**2) for variance, n, error in zip(variances, n_cells, counts, strict=True)
    )
    return first, second


def change_of_means(
    change: Change,
    pseudocounts: float,
    means: tuple[Array, Array],
    errors: tuple[Array, Array],
    least: tuple[Any, Any] = (0.0, 0.0),
) -> tuple[Array, Array]:
    """The change from one mean to the other and its standard error to first order, (F,) each.

    Slopes are taken no lower than ``least``, the means that counts reach: near zero a logarithm has no
    first order.
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


def probably_larger(means: tuple[Array, Array], errors: tuple[Array, Array]) -> Array:
    """P(the first mean is the larger one) under a flat prior, (F,)."""
    larger: Array = ndtr((means[0] - means[1]) / np.maximum(np.hypot(*errors), 1e-300))
    return larger


def describe(
    posterior: Callable[[slice], Changes],
    n_features: int,
    question: TestSpecification,
    n_draws: int,
    rng: np.random.Generator,
) -> Statistics:
    """``m1``: how probable a change is; statistics of the change, (F,) each.

    Probabilities, means and deviations are exact; the rest comes from draws of the posterior.
    All is done for a block of features at a time.

    Parameters
    ----------
    posterior
        Gives the posterior of the change of some features.
    n_features
        Their number F.
    question
        What to tell.
    n_draws
        Draws where there have to be some.
    rng
        Gives the seed of the draws.
    """
    found = Collected(n_features)
    drawing = question.in_full or bool(question.levels) or question.m1_domain_fn is not None
    width = max(1, BLOCK // n_draws) if drawing else _EXACT_WIDTH
    seed = int(rng.integers(2**63))
    for start in range(0, n_features, width):
        block = slice(start, min(start + width, n_features))
        changes = posterior(block)
        told = {"mean": changes.mean(), "std": changes.std()}
        if question.m1_domain_fn is None:
            told["m1"] = question.probability(changes.above(question.delta), changes.below(-question.delta))
        if drawing:
            # The same random numbers in every block: a feature's draws do not depend on its place.
            draws = torch.from_numpy(changes.draws(n_draws, np.random.default_rng(seed)))
            told |= question.described(draws)
            if question.m1_domain_fn is not None:
                told["m1"] = question.counted(draws)
        found.put(block, told)
    return found.statistics
