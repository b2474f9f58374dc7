"""Changes between the means of two groups: likelihood-ratio test of their counts, standard errors, posteriors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit, xlog1py, xlogy

from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.posterior.differential.effect import Change, Statistics, StatisticsByBlock, TestSpecification
from pyro_multivi.posterior.differential.raw_counts import (
    MOST_OPEN,
    PseudobulkSums,
    probability_open,
    rate_of_opening,
)
from pyro_multivi.posterior.differential.shrinkage import ChangePosterior
from pyro_multivi.posterior.engine.decode import BLOCK
from pyro_multivi.processes.group import current

Array = NDArray[np.float64]
Pair = tuple[Array, Array]

# Relative step of a slope: the cube root of double precision, where its error is least.
_STEP = 1e-5
# Scores below which a change over its score is 0 / 0; the smallest tail of a t distribution that has a normal score.
_LEAST_SCORE, _LEAST_TAIL = 1e-3, 1e-300
# Least number of expected counts: a decoder may give next to nothing.
_LEAST_EXPECTED = 1e-6
# Rounds of the weights of two means in the common one, on which they hardly depend, and of that of rates of opening.
_ROUNDS, _OPEN_ROUNDS = 8, 16
# Cells that the dispersion of both groups counts as beside that of one, and degrees of freedom that all features
# lend one. By measurement: with more, three cells of 400 alike are called; with less, twenty cells lose power.
_PRIOR_CELLS, _PRIOR_FREEDOM = 2, 10
_LEAST_DISPERSION = 1e-3
# Features whose posteriors are evaluated together: a few mixtures of this length take some MB.
_EXACT_WIDTH = 4096


@dataclass(frozen=True)
class GroupCounts:
    """Counts of a group as evidence on its mean.

    Attributes
    ----------
    n_cells, freedom
        Number of measured cells, and degrees of freedom of the spread within the parts of the group; (F,) where
        features were measured in different cells.
    mean
        Mean that the counts give, on the scale that is compared, (F,).
    exposure
        Expected sum of counts per unit of the mean, (F,): the means differ by more than the counts where batches or
        depths differ. Of open or closed regions per unit of the rate of opening (:func:`rate_of_opening`).
    effective_cells
        Number of cells of equal depth that would know as much of the spread between cells.
    excess, base
        Sum of squares beyond Poisson counts, and that of a squared coefficient of variation of 1, (F,).
    """

    n_cells: int | Array
    freedom: int | Array
    mean: Array
    exposure: Array
    effective_cells: float | Array
    excess: Array
    base: Array

    def at(self, features: NDArray[np.bool_]) -> GroupCounts:
        """The counts of some features."""
        return GroupCounts(**{name: value[features] for name, value in vars(self).items()})

    def one_more_cell(self, rate: Array) -> tuple[Array, Array]:
        """Counts and exposure with a cell at the given rate beside those of the group, (F,) each."""
        return self.mean * self.exposure + rate * self.exposure / self.n_cells, self.exposure * (1 + 1 / self.n_cells)


@dataclass(frozen=True)
class TestedMeans:
    """Likelihood-ratio test of two means, (F,) each.

    Attributes
    ----------
    means
        Mean of each group, with one more cell at the common mean.
    common
        Mean of both groups under no change.
    errors
        Standard errors of the means under no change.
    score
        Standard normal score: signed root of the deviance, positive where the first mean is larger.
    """

    means: Pair
    common: Array
    errors: Pair
    score: Array

    def divided_by(self, factor: Array) -> TestedMeans:
        """The test of means over a number of each feature, (F,), that leaves a probability a probability."""
        most = np.where(factor < 1, MOST_OPEN, np.inf)
        first, second, common = (np.minimum(mean / factor, most) for mean in (*self.means, self.common))
        return TestedMeans((first, second), common, (self.errors[0] / factor, self.errors[1] / factor), self.score)


def counts_of_group(
    parts: Sequence[PseudobulkSums],
    means: Sequence[Array],
    expected: Sequence[Array],
    sizes: Sequence[int],
    modality: AnyModality,
) -> GroupCounts:
    """Counts of a group: the model's mean times the ratio of the counts to those that the model expects.

    So the decoder cancels, up to the ratio of the batches and depths that are compared to those that were measured. In
    the ratio a part counts by the cells that measured a feature: few of many would bring their error as if it were that
    of many. Of open or closed regions the ratio is of rates of opening.

    Parameters
    ----------
    parts
        Sums over the cells of each part of the group.
    means, expected
        The model's mean of each part, and the expected value of a measured cell, (F,) each; of a composition numbers in
        proportion to it.
    sizes
        Numbers of cells of the parts.
    """
    of_part, weights, exposure = [], [], np.zeros(len(means[0]))
    for part, mean, wanted, size in zip(parts, means, expected, sizes, strict=True):
        weights.append(size * part.measured if part.n_measured else np.full(len(mean), float(size)))
        if part.n_measured and not modality.binary:
            there = wanted * part.measured
            # The depth is of all features; the counts of a panel are those of its own.
            depth = part.depth if part.measured.all() else float(part.counts.sum())
            share = there / max(float(there.sum()), 1e-300)
            there = depth * share if modality.compositional else part.n_measured * there
            own = np.maximum(there, _LEAST_EXPECTED) / np.maximum(mean, 1e-300) * part.measured
            mean = np.where(part.measured, part.counts / np.where(part.measured, own, 1.0), mean)
            exposure = exposure + own
        of_part.append(mean)
    measured = [part for part in parts if part.n_measured]

    def summed(values: Sequence[float]) -> Array:
        """Sum of a number of each part over those that measured a feature, (F,)."""
        return np.sum([0.0 * exposure, *(n * part.measured for n, part in zip(values, measured, strict=True))], axis=0)

    n, freedom = summed([part.n_measured for part in measured]), summed([part.n_measured - 1 for part in measured])
    depths, squares = summed([part.depth for part in measured]), summed([part.depth_squares for part in measured])
    counts: Array = np.sum([part.counts for part in parts], axis=0)
    weight = np.stack(weights)
    weight[:, ~weight.any(0)] = 1.0
    counted = np.stack([part.n_measured * part.measured for part in parts])
    known = weight * (counted > 0)
    model = _average(means, known)
    if modality.binary:
        # Averages first: rates of opening of few cells are biased.
        share = _average([part.counts / max(part.n_measured, 1) for part in parts], counted)
        there = rate_of_opening(np.maximum(_average(expected, counted), 1e-9))
        depth_of_cell = there / rate_of_opening(np.maximum(model, 1e-9))
        found, exposure = probability_open(rate_of_opening(share) / depth_of_cell), n * depth_of_cell
    else:
        ratio = model / np.maximum(_average(means, counted), 1e-300)
        found, exposure = ratio * _average(of_part, counted), exposure / np.maximum(ratio, 1e-300)
    group_mean = np.maximum(_average(means, weight) + known.sum(0) / weight.sum(0) * (found - model), 0.0)
    return GroupCounts(
        n_cells=n,
        freedom=freedom,
        mean=group_mean,
        exposure=exposure,
        effective_cells=depths**2 / np.maximum(squares, 1.0),
        excess=sum((part.excess for part in measured), np.zeros(len(exposure))),
        base=counts**2 / np.maximum(depths, 1.0) * freedom / np.maximum(n, 1),
    )


def _average(values: Sequence[Array], weight: Array) -> Array:
    """Average over parts, (P, F), with these weights; 0 without any."""
    return np.asarray((weight * np.stack(values)).sum(0) / np.maximum(weight.sum(0), 1e-300))


def compare_counts(groups: tuple[GroupCounts, GroupCounts], modality: AnyModality) -> TestedMeans:
    r"""Test whether two groups share one mean, by the likelihood of the sums of their counts.

    The sum K of the counts of a group has mean :math:`\mu = E m` and variance :math:`\mu (1 + a \mu)`, as rates differ
    between the cells of the group: it is negative binomial with :math:`a = \phi / n` (:func:`dispersions`), of
    log-likelihood

    .. math:: K \log \mu - (K + 1/a) \log(1 + a \mu)

    Where each of n cells is open or closed, K is binomial with probability :math:`1 - (1 - m)^{E / n}`: exposure
    multiplies the rate of opening :math:`-\log(1 - m)`. For small m that is :math:`\mu = E m` too.

    To each group one cell is added in which the feature has the mean of both, so that features with next to no counts,
    or open in next to all cells, are close to no change. Dispersions are estimates: scores of counts are those of a t
    distribution, with the degrees of freedom of Satterthwaite.
    """
    if modality.binary:
        return _compare_open(groups)
    # Half a count in all: no feature has none.
    rate = (sum(group.mean * group.exposure for group in groups) + 0.5) / (groups[0].exposure + groups[1].exposure)
    (counts1, exposure1), (counts2, exposure2) = (group.one_more_cell(rate) for group in groups)
    first, second = counts1 / exposure1, counts2 / exposure2
    a1, a2 = (
        dispersion / group.effective_cells * group.n_cells / (group.n_cells + 1)
        for dispersion, group in zip(dispersions(groups, rate), groups, strict=True)
    )
    common = rate
    for _ in range(_ROUNDS):
        weight1, weight2 = exposure1 / (1 + a1 * exposure1 * common), exposure2 / (1 + a2 * exposure2 * common)
        common = (weight1 * first + weight2 * second) / (weight1 + weight2)
    deviance = (
        _log_likelihood(counts1, counts1, a1)
        + _log_likelihood(counts2, counts2, a2)
        - _log_likelihood(counts1, exposure1 * common, a1)
        - _log_likelihood(counts2, exposure2 * common, a2)
    )
    score = np.sign(first - second) * np.sqrt(np.maximum(2 * deviance, 0.0))
    variance1, variance2 = common / weight1, common / weight2
    free1, free2 = (group.freedom + _PRIOR_FREEDOM for group in groups)
    freedom = (variance1 + variance2) ** 2 / (variance1**2 / free1 + variance2**2 / free2)
    score = -np.sign(score) * ndtri(np.maximum(stdtr(freedom, -np.abs(score)), _LEAST_TAIL))
    return TestedMeans((first, second), common, (np.sqrt(variance1), np.sqrt(variance2)), score)


def _compare_open(groups: tuple[GroupCounts, GroupCounts]) -> TestedMeans:
    """Test of numbers of open cells."""
    n_cells = [np.asarray(group.n_cells, dtype=np.float64) for group in groups]
    depths = [group.exposure / n for group, n in zip(groups, n_cells, strict=True)]
    shares = [
        probability_open(depth * rate_of_opening(group.mean)) for group, depth in zip(groups, depths, strict=True)
    ]
    # Half a cell in all: no region is open in none, or in all.
    half = 0.5 / np.add(*n_cells)
    share = 2 * half * np.add(*(n * own for n, own in zip(n_cells, shares, strict=True)))
    common = rate_of_opening(np.clip(share + half, half, 1 - half))
    common = common / (2 * half * np.add(*(group.exposure for group in groups)))
    # One more cell in each group.
    n_cells, shares = (
        [n + 1 for n in n_cells],
        [
            (n * own + probability_open(depth * common)) / (n + 1)
            for n, own, depth in zip(n_cells, shares, depths, strict=True)
        ],
    )
    own1, own2 = (rate_of_opening(share) / depth for share, depth in zip(shares, depths, strict=True))
    # Newton's method in 1 / rate, in which the slope of the log-likelihood is convex: it nears the root from one side.
    low, high = np.minimum(own1, own2), np.maximum(own1, own2)
    common = low
    for _ in range(_OPEN_ROUNDS):
        slope, bend = np.zeros(len(common)), np.zeros(len(common))
        for n, own, depth in zip(n_cells, shares, depths, strict=True):
            rate = depth * common
            share = -np.expm1(-rate)
            slope += n * depth * (own / share - 1)
            bend += n * own * (rate / share) ** 2 * np.exp(-rate)
        common = np.clip(common / (1 - slope / bend * common), low, high)
    deviance, errors = np.zeros(len(common)), []
    for n, share, own, depth in zip(n_cells, shares, (own1, own2), depths, strict=True):
        deviance += 2 * n * (_log_open(share, depth * own) - _log_open(share, depth * common))
        # To first order; no error of a probability is larger than 1.
        steep = np.exp(np.minimum((depth / 2 - 1) * common, 50.0)) / depth
        errors.append(np.minimum(np.sqrt(-np.expm1(-depth * common) / n) * steep, 1.0))
    score = np.sign(own1 - own2) * np.sqrt(np.maximum(deviance, 0.0))
    means = probability_open(own1), probability_open(own2)
    return TestedMeans(means, probability_open(common), (errors[0], errors[1]), score)


def _log_open(share: Array, rate: Array) -> Array:
    """Log-likelihood of a share of open cells at this rate of opening, by cell, (F,)."""
    return xlogy(share, -np.expm1(-rate)) - (1 - share) * rate


def dispersions(groups: tuple[GroupCounts, GroupCounts], rate: Array) -> Pair:
    r"""Squared coefficient of variation of the rate between the cells of each group, shrunk, (F,) each.

    The moment estimate of a feature is drawn towards that of all features of its group, with the weight that its own
    error leaves it if dispersions of features differ by as much as their mean. That of all features is drawn towards
    the one of both groups together, which counts as much as two cells: three cells cannot say how much they differ.

    Parameters
    ----------
    rate
        Mean of both groups, (F,).
    """
    both = sum(group.excess.sum() for group in groups) / max(sum(group.base.sum() for group in groups), 1e-300)
    found = []
    for group in groups:
        free = group.freedom
        most = float(np.max(free))
        of_all = most * group.excess.sum() / max(group.base.sum(), 1e-300) + _PRIOR_CELLS * both
        typical = max(of_all / (most + _PRIOR_CELLS), _LEAST_DISPERSION)
        # Expected number of counts of a cell, which decides how much a feature tells of its dispersion.
        expected = rate * group.exposure / group.n_cells
        relative_variance = 2 / np.maximum(free, 1) * (1 + 1 / np.maximum(typical * expected, 1e-9)) ** 2
        weight = np.where(np.greater(free, 0), 1 / (1 + relative_variance), 0.0)
        own: Array = np.where(group.base > 0, group.excess / np.maximum(group.base, 1e-300), typical)
        found.append(np.maximum(weight * own + (1 - weight) * typical, 0.1 * typical))
    return found[0], found[1]


def _log_likelihood(counts: Array, mean: Array, spread: Array) -> Array:
    """Log-likelihood of sums of counts with this mean and variance mean + spread mean², without constants, (F,)."""
    found = xlogy(counts, mean) - xlog1py(counts + 1 / spread, spread * mean)
    return np.asarray(found, dtype=np.float64)


def change_by_counts(change: Change, pseudocounts: float, tested: TestedMeans) -> tuple[Array, Array]:
    """The change and its standard error on any scale, (F,) each: a change over its error is the score of the test."""
    flat, error = change_of_means(change, pseudocounts, (tested.common, tested.common), tested.errors)
    found = _at(change, pseudocounts, *tested.means)
    clear = np.abs(tested.score) > _LEAST_SCORE
    ratio = np.abs(found - flat) / np.where(clear, np.abs(tested.score), 1.0)
    return found, np.where(clear, ratio, error)


def change_of_means(change: Change, pseudocounts: float, means: Pair, errors: Pair) -> tuple[Array, Array]:
    """The change from one mean to the other and its standard error to first order, (F,) each."""
    first, second = means
    # Small beside the distance from 0 and from 1, where log scales end; never lost in rounding.
    step1, step2 = (np.maximum(_STEP * mean * np.abs(1 - mean), 1e-14) for mean in means)
    slope1 = (
        _at(change, pseudocounts, first + step1, second) - _at(change, pseudocounts, first - step1, second)
    ) / step1
    slope2 = (
        _at(change, pseudocounts, first, second + step2) - _at(change, pseudocounts, first, second - step2)
    ) / step2
    return _at(change, pseudocounts, first, second), np.hypot(slope1 * errors[0], slope2 * errors[1]) / 2


def _at(change: Change, pseudocounts: float, first: Array, second: Array) -> Array:
    return change(torch.from_numpy(first), torch.from_numpy(second), pseudocounts).numpy()


def probability_larger(means: Pair, errors: Pair) -> Array:
    """Probability that the first mean is the larger one, under a flat prior, (F,)."""
    return ndtr((means[0] - means[1]) / np.maximum(np.hypot(*errors), 1e-300))


def scattered(values: Array, known: NDArray[np.bool_]) -> Array:
    """Values of some features among all, NaN elsewhere, (F,)."""
    found = np.full(len(known), np.nan)
    found[known] = values
    return found


def t_ratio(freedom: int) -> float:
    """Length of the central 95 % of a t distribution relative to a normal one."""
    return float(stdtrit(max(freedom, 1), 0.975) / 1.96)


def statistics_of_posterior(
    posterior: Callable[[slice], ChangePosterior],
    n_features: int,
    specification: TestSpecification,
    n_draws: int,
    rng: np.random.Generator,
) -> Statistics:
    """Probability and statistics of a change, (F,) each, a block of features at a time.

    Probabilities, means and deviations are exact; the rest comes from draws of the posterior. Processes share blocks.

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
    for start in range(0, n_features, width)[current().turn]:
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
    return found.of_all()
