"""Differential expression and accessibility: group against group, many comparisons from the same draws."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi.data.table import CellTable
from pyro_multivi.posterior.differential.cell_pairs import Collected, Pairs, Side, pair_order
from pyro_multivi.posterior.differential.contrasts import Contrast, Parts
from pyro_multivi.posterior.differential.effect import Statistics, TestSpecification
from pyro_multivi.posterior.differential.group_draws import DrawSource, GroupDraws, Key, Moments, blocks_of
from pyro_multivi.posterior.differential.group_means import change_of_means, describe, mean_errors, probably_larger
from pyro_multivi.posterior.differential.raw_counts import (
    PseudobulkStatistics,
    PseudobulkSums,
    count_support,
    observed_to_expected,
)
from pyro_multivi.posterior.differential.request import DifferentialRequest
from pyro_multivi.posterior.differential.shrinkage import Changes, Prior, as_estimated
from pyro_multivi.posterior.differential.tables import Comparison, arrange
from pyro_multivi.posterior.engine.draws import region_factors
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")

Array = NDArray[np.float64]

# Least pseudocount that is estimated: far below the share of any gene that was seen.
_LEAST_PSEUDOCOUNT = 1e-10


def compare_groups(
    program: MultiVIProgram,
    table: CellTable,
    contrasts: Sequence[Contrast],
    request: DifferentialRequest,
    names: Sequence[str],
    device: torch.device,
    silent: bool = True,
) -> pd.DataFrame:
    """Compare groups. The cells that all comparisons take together are drawn and decoded once.

    Parameters
    ----------
    program, table
        Model and data.
    contrasts
        The groups.
    request
        What is asked.
    names
        Of the features asked for.
    device
        Where the program is.
    silent
        Show no progress bar.

    Returns
    -------
    DataFrame
        The comparisons below each other, one row per feature.
    """
    source = DrawSource(
        program, table, request.site, request.n_samples, request.weights, request.batch_size, device, request.seed
    )
    plan = _Plan(source, contrasts, request)
    for number, contrast in enumerate(contrasts):
        _note_unmeasured(contrast, plan.tallies(number), request)
    compare = _compare_means if request.unit == "group" else _compare_cells
    return arrange(compare(plan, silent), contrasts, request, names)


def estimated_delta(change: Array, least: float) -> float:
    """A bound that separates features that change from those that do not.

    Three Normals are fitted to the mean changes of the features; the bound is 0.6 times the mean
    distance from zero of the lowest and the highest of them, and at least ``least``.
    """
    values = change[np.isfinite(change)]
    if len(values) < 3 or np.ptp(values) == 0:
        return least
    loc = np.quantile(values, [0.05, 0.5, 0.95])
    variance, share = np.full(3, values.var()), np.full(3, 1 / 3)
    # A component may not collapse onto one feature.
    narrowest = 1e-4 * values.var()
    for _ in range(200):
        log_part = np.log(share) - 0.5 * (np.log(variance) + (values[:, None] - loc) ** 2 / variance)
        part = np.exp(log_part - log_part.max(1, keepdims=True))
        part /= part.sum(1, keepdims=True)
        weight = np.maximum(part.sum(0), 1e-12)
        share, loc = weight / weight.sum(), (part * values[:, None]).sum(0) / weight
        variance = np.maximum((part * (values[:, None] - loc) ** 2).sum(0) / weight, narrowest)
    return max(least, 0.6 * float(np.mean(np.abs([loc.min(), loc.max()]))))


@dataclass(frozen=True)
class _Plan:
    """Which draws the comparisons need, and what is common to them."""

    source: DrawSource
    contrasts: Sequence[Contrast]
    request: DifferentialRequest

    @cached_property
    def parts(self) -> Parts:
        return Parts.of(self.contrasts)

    @cached_property
    def sums(self) -> list[PseudobulkSums]:
        """Of the counts of each part."""
        return [PseudobulkSums.count(self.source.table, cells, self.request.site) for cells in self.parts.cells]

    @cached_property
    def sides(self) -> list[tuple[tuple[Key, ...], tuple[Key, ...]]]:
        """Of each comparison, what its groups consist of."""
        found = []
        for contrast, (parts1, parts2) in zip(self.contrasts, self.parts.sides, strict=True):
            batches1, batches2 = self._decoded_in(contrast)
            found.append((tuple(Key(part, batches1) for part in parts1), tuple(Key(part, batches2) for part in parts2)))
        return found

    @cached_property
    def keys(self) -> list[Key]:
        """All that has to be drawn."""
        return list(dict.fromkeys(key for sides in self.sides for side in sides for key in side))

    @cached_property
    def region_factors(self) -> Tensor | None:
        return region_factors(self.source.program)

    def draw(self, key: Key) -> GroupDraws:
        return self.source.draw(self.parts.cells[key.part], key.batches)

    def sizes(self, keys: Sequence[Key]) -> list[int]:
        """Numbers of cells."""
        return [len(self.parts.cells[key.part]) for key in keys]

    def tallies(self, number: int) -> tuple[PseudobulkStatistics, PseudobulkStatistics]:
        """Of a comparison's groups."""
        first, second = (PseudobulkSums.tally([self.sums[key.part] for key in side]) for side in self.sides[number])
        return first, second

    def scale(self, number: int, cell_factors: dict[Key, float]) -> Tensor | None:
        """What a comparison multiplies all values of each region with, (F,); None for 1."""
        if self.request.probability != "detected":
            return None
        keys = [key for side in self.sides[number] for key in side]
        sizes = [self.sums[key.part].n_measured for key in keys]
        factors = [cell_factors[key] for key in keys]
        # Without any cell with ATAC, d follows its prior.
        factor = np.average(factors, weights=sizes if sum(sizes) else self.sizes(keys))
        if np.isnan(factor):
            factor = np.float64(1.0)
        r = self.region_factors
        ones = torch.ones(self.source.table.n_regions, device=self.source.device)
        return float(factor) * (ones if r is None else r)

    def pseudocounts(self, number: int, largest: Sequence[Array], scale: Tensor | None) -> float:
        """As given, or what the model makes of features that a group hardly has.

        That is the 0.9 quantile of their largest draws, (F,) of each group.
        """
        if self.request.pseudocounts is not None:
            return self.request.pseudocounts
        factor = 1.0 if scale is None else scale.double().cpu().numpy()
        low = [found.mean < self.request.threshold_counts for found in self.tallies(number)]
        found = [
            float(np.quantile((factor * most)[few], 0.9)) for most, few in zip(largest, low, strict=True) if few.any()
        ]
        return max(_LEAST_PSEUDOCOUNT, *found) if found else _LEAST_PSEUDOCOUNT

    def question(self, delta: float, pseudocounts: float) -> TestSpecification:
        request = self.request
        return TestSpecification(
            request.change, delta, pseudocounts, request.test_mode, request.two_sided, request.m1_domain_fn,
            request.levels, in_full=request.site == "rho",
        )  # fmt: skip

    def _decoded_in(self, contrast: Contrast) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Batches that the groups are decoded in."""
        if not self.request.batch_correction:
            return None, None
        if self.request.batches1 is not None:
            return self.request.batches1, self.request.batches2
        seen = torch.unique(self.source.table.batch_code[torch.cat([contrast.index1, contrast.index2])])
        both = tuple(int(code) for code in seen if code >= 0)
        n = self.request.n_samples
        if len(both) > n:
            raise ValueError(f"n_samples={n} is fewer than the {len(both)} batches: give more draws.")
        return both, both


# --------------------------------------------------------------------- cells


def _compare_cells(plan: _Plan, silent: bool) -> list[Comparison]:
    """Random cells of the groups with each other; all comparisons in each block of features."""
    request = plan.request
    pools = {key: plan.draw(key) for key in tqdm(plan.keys, desc="decoding", disable=silent)}
    largest: dict[Key, Array] = {}
    if request.pseudocounts is None:
        largest = {key: pool.moments(largest=True).largest for key, pool in pools.items()}
    factors = {key: pool.cell_factor for key, pool in pools.items()}
    pairs, pseudocounts = [], []
    for number, sides in enumerate(plan.sides):
        scale = plan.scale(number, factors)
        most = [np.maximum.reduce([largest[key] for key in side]) for side in sides] if largest else []
        pseudocounts.append(plan.pseudocounts(number, most, scale))
        if scale is not None and request.features is not None:
            scale = scale[request.features]
        pairs.append(_pairs(plan, number, scale))
    delta = [np.nan if request.delta is None or request.mode == "vanilla" else request.delta for _ in pairs]
    n_features = pools[plan.keys[0]].values.shape[-1] if request.features is None else len(request.features)
    if request.delta is None and request.mode == "change":
        changes = [Collected(n_features) for _ in pairs]
        for block, values in blocks_of(pools, request.features):
            for both, found, offset in zip(pairs, changes, pseudocounts, strict=True):
                change = both.change(block, both.scales(values), request.change, offset)
                found.put(block, {"mean": change.mean(0)})
        delta = [estimated_delta(found.statistics["mean"], request.change.least_delta) for found in changes]
    questions = [plan.question(bound, offset) for bound, offset in zip(delta, pseudocounts, strict=True)]
    results = [Collected(n_features) for _ in pairs]
    with tqdm(total=n_features, desc="features", disable=silent) as bar:
        for block, values in blocks_of(pools, request.features):
            for both, question, found in zip(pairs, questions, results, strict=True):
                scales = both.scales(values)
                vanilla = request.mode == "vanilla"
                found.put(block, both.exceeding(scales) if vanilla else both.changing(block, scales, question))
            bar.update(block.stop - block.start)
    return [
        Comparison(found.statistics, plan.tallies(number), delta[number], pseudocounts[number])
        for number, found in enumerate(results)
    ]


def _pairs(plan: _Plan, number: int, scale: Tensor | None) -> Pairs:
    source, request, sides = plan.source, plan.request, plan.sides[number]
    rng = np.random.default_rng([request.seed, 4])
    strata = [source.strata(side[0].batches) for side in sides]
    first, second = (Side.of(rng, side, plan.sizes(side), which) for side, which in zip(sides, strata, strict=True))
    same = sides[0][0].batches == sides[1][0].batches
    order = pair_order(rng, request.n_samples, request.n_pairs, strata[0] if same else None, source.device)
    return Pairs(first, second, order, scale)


# --------------------------------------------------------------------- means of groups


def _compare_means(plan: _Plan, silent: bool) -> list[Comparison]:
    """Means of groups. All features are looked at, so that a result does not depend on which are asked for."""
    largest = plan.request.pseudocounts is None
    keys = plan.keys
    if plan.request.calibrated:
        # What counts are expected to be depends on the batch that they were seen in.
        keys = list(dict.fromkeys([*keys, *(Key(key.part, None) for key in keys)]))
    moments: dict[Key, Moments] = {}
    factors: dict[Key, float] = {}
    for key in tqdm(keys, desc="decoding", disable=silent):
        pool = plan.draw(key)
        moments[key], factors[key] = pool.moments(largest), pool.cell_factor
    return [_compare_two_means(plan, number, moments, factors) for number in range(len(plan.sides))]


def _corrected(plan: _Plan, keys: Sequence[Key], moments: dict[Key, Moments]) -> Array:
    """The mean of a group, of which its counts have corrected what the decoder smoothed away, (F,)."""
    means = []
    for key in keys:
        expected = moments[Key(key.part, None)].expected
        if plan.request.site == "p" and plan.region_factors is not None:
            expected = expected * plan.region_factors.double().cpu().numpy()
        seen = PseudobulkSums.tally([plan.sums[key.part]])
        means.append(moments[key].mean * observed_to_expected(seen, expected, plan.request.site))
    mean: Array = np.average(means, axis=0, weights=plan.sizes(keys))
    return mean


def _compare_two_means(plan: _Plan, number: int, moments: dict[Key, Moments], factors: dict[Key, float]) -> Comparison:
    request, sides, tallies = plan.request, plan.sides[number], plan.tallies(number)
    groups = [Moments.of_union([moments[key] for key in side], plan.sizes(side)) for side in sides]
    scale = plan.scale(number, factors)
    factor: Any = 1.0 if scale is None else scale.double().cpu().numpy()
    first, second = (group.mean * factor for group in groups)
    if request.calibrated:
        first, second = (_corrected(plan, side, moments) * factor for side in sides)
        if request.site == "p":
            # Probabilities, which a factor above 1 may take beyond it.
            limits = (1 - 0.5 / (seen.n_measured + 1) if seen.n_measured else 1.0 for seen in tallies)
            first, second = (np.minimum(mean, most) for mean, most in zip((first, second), limits, strict=True))
    means = (first, second)
    pseudocounts = plan.pseudocounts(number, [group.largest for group in groups], scale)
    least: tuple[Any, Any] = (0.0, 0.0)
    counts: tuple[Any, Any] = (0.0, 0.0)
    if request.calibrated:
        additive = request.mode == "vanilla" or request.change.name == "difference"
        support = count_support(*tallies, request.site, *means, additive)
        least, counts = (support[0].mean, support[1].mean), (support[0].error, support[1].error)
    n_cells = [sum(min(size, request.n_samples) for size in plan.sizes(side)) for side in sides]
    variances = (groups[0].var * factor**2, groups[1].var * factor**2)
    errors = mean_errors(variances, (n_cells[0], n_cells[1]), counts)
    rng = np.random.default_rng([request.seed, 3])
    delta: float | None
    statistics: Statistics
    if request.mode == "vanilla":
        delta, statistics = np.nan, {"m1": probably_larger(means, errors)}
    else:
        change, error = change_of_means(request.change, pseudocounts, means, errors, least)
        delta = request.delta
        if delta is None:
            delta = estimated_delta(change, request.change.least_delta)
        # What some genes take too much of a whole, all others lack. With size factors rho is none.
        whole = request.site == "rho" and plan.source.program.config.library != "size_factor"
        shares = whole and request.change.name == "log-fold"
        common = float(np.linalg.norm(np.concatenate(errors)) / np.log(2)) if shares else None
        prior = Prior.learn(change, error, rng, common) if request.calibrated else None

        def posterior(block: slice) -> Changes:
            if prior is None:
                return as_estimated(change[block], error[block])
            return prior.posterior(change[block], error[block])

        statistics = describe(posterior, len(change), plan.question(delta, pseudocounts), request.n_samples, rng)
    statistics = {"mean1": groups[0].mean, "mean2": groups[1].mean, **statistics}
    if request.features is not None:
        asked = request.features.cpu().numpy()
        statistics = {name: values[asked] for name, values in statistics.items()}
    return Comparison(statistics, tallies, delta, pseudocounts)


def _note_unmeasured(
    contrast: Contrast, tallies: tuple[PseudobulkStatistics, PseudobulkStatistics], request: DifferentialRequest
) -> None:
    what = "RNA" if request.site == "rho" else "ATAC"
    for number, (found, name) in enumerate(zip(tallies, (contrast.group1, contrast.group2), strict=True), 1):
        if found.n_measured == 0:
            logger.warning(
                "Group %d%s has no cell with %s: its estimates are imputed, what the counts leave open of them is "
                "not known, and statistics of counts are NaN.",
                number, f" ({name})" if name else "", what,
            )  # fmt: skip
