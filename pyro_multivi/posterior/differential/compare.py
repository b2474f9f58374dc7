"""Differential expression and accessibility: group against group, many comparisons from the same draws."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi.data.table import CellTable
from pyro_multivi.posterior.differential.cell_pairs import CellPairs, DrawSelection, pair_order
from pyro_multivi.posterior.differential.contrasts import Contrast, Partition
from pyro_multivi.posterior.differential.effect import Statistics, StatisticsByBlock, TestSpecification, estimated_delta
from pyro_multivi.posterior.differential.group_draws import DrawKey, DrawSource, GroupDraws, Moments, feature_blocks_of
from pyro_multivi.posterior.differential.group_means import change_of_means, probability_larger, statistics_of_posterior
from pyro_multivi.posterior.differential.raw_counts import (
    PseudobulkStatistics,
    PseudobulkSums,
    pseudobulk_correction,
    pseudobulk_means,
)
from pyro_multivi.posterior.differential.request import DifferentialRequest
from pyro_multivi.posterior.differential.shrinkage import ChangePosterior, ShrinkagePrior, unshrunk
from pyro_multivi.posterior.differential.tables import LAYOUTS, Comparison, arrange
from pyro_multivi.posterior.engine.draws import region_factors
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")

Array = NDArray[np.float64]
Pair = tuple[Array, Array]
Group = tuple[DrawKey, ...]

# Least pseudocount that is estimated: far below the share of any gene with counts.
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
    """Compare groups of cells. Cells that several comparisons share are drawn and decoded once.

    Parameters
    ----------
    names
        Names of the features to report.
    silent
        Show no progress bar.

    Returns
    -------
    DataFrame
        The comparisons below each other, one row per feature.
    """
    shared = _SharedDraws(DrawSource(program, table, request, device), contrasts)
    _warn_of_unmeasured(shared)
    compare = _compare_means if request.unit == "group" else _compare_cells
    return arrange(compare(shared, silent), contrasts, request, names)


@dataclass(frozen=True)
class _SharedDraws:
    """Draws and counts of all groups of some comparisons, made of disjoint parts that the comparisons share."""

    source: DrawSource
    contrasts: Sequence[Contrast]

    @property
    def request(self) -> DifferentialRequest:
        return self.source.request

    @cached_property
    def partition(self) -> Partition:
        return Partition.of(self.contrasts)

    @cached_property
    def sums(self) -> list[PseudobulkSums]:
        """Sums of the counts of each part."""
        modality, table = self.request.modality, self.source.table
        return [PseudobulkSums.of_cells(table, cells, modality) for cells in self.partition.cells]

    @cached_property
    def groups(self) -> list[tuple[Group, Group]]:
        """Draws that make up the two groups of each comparison."""
        found = []
        for contrast, (parts1, parts2) in zip(self.contrasts, self.partition.groups, strict=True):
            batches1, batches2 = self._decoded_in(contrast)
            group1 = tuple(DrawKey(part, batches1) for part in parts1)
            found.append((group1, tuple(DrawKey(part, batches2) for part in parts2)))
        return found

    @cached_property
    def keys(self) -> list[DrawKey]:
        """All draws that are needed."""
        return list(dict.fromkeys(key for groups in self.groups for group in groups for key in group))

    @cached_property
    def pseudobulk(self) -> list[tuple[PseudobulkStatistics, PseudobulkStatistics]]:
        """Statistics of the counts of the two groups of each comparison."""

        def of_group(group: Group) -> PseudobulkStatistics:
            return PseudobulkStatistics.from_sums([self.sums[key.part] for key in group])

        return [(of_group(group1), of_group(group2)) for group1, group2 in self.groups]

    @cached_property
    def region_factors(self) -> Tensor | None:
        """Region factors r, (F,); None where the model has none of this modality."""
        return region_factors(self.source.program) if self.request.modality.binary else None

    def draw(self, key: DrawKey) -> GroupDraws:
        return self.source.draw(self.partition.cells[key.part], key.batches)

    def sizes(self, group: Group) -> list[int]:
        """Numbers of cells of the parts of a group."""
        return [len(self.partition.cells[key.part]) for key in group]

    def detection(self, number: int, cell_factors: Mapping[DrawKey, float]) -> Tensor | None:
        """Probability of detecting an open region in a cell of mean depth, d r, (F,); None to compare p or rho."""
        if self.request.probability != "detected":
            return None
        group1, group2 = self.groups[number]
        both = group1 + group2
        measured = [self.sums[key.part].n_measured for key in both]
        factors = [cell_factors[key] for key in both]
        # Without any measured cell, d follows its prior.
        factor = np.average(factors, weights=measured if sum(measured) else self.sizes(both))
        if np.isnan(factor):
            factor = np.float64(1.0)
        r = self.region_factors
        if r is None:
            r = torch.ones(self.request.modality.n_features_in(self.source.table), device=self.source.device)
        return float(factor) * r

    def pseudocounts(self, number: int, largest: Sequence[Array], detection: Tensor | None) -> float:
        """Pseudocount as given, or estimated from the features that a group hardly has.

        Then it is the 0.9 quantile of their largest draws, (F,) of each group.
        """
        if self.request.pseudocounts is not None:
            return self.request.pseudocounts
        factor = 1.0 if detection is None else detection.double().cpu().numpy()
        found = [_LEAST_PSEUDOCOUNT]
        for most, observed in zip(largest, self.pseudobulk[number], strict=True):
            few = observed.mean < self.request.threshold_counts
            if few.any():
                found.append(float(np.quantile((factor * most)[few], 0.9)))
        return max(found)

    def specification(self, delta: float, pseudocounts: float) -> TestSpecification:
        request = self.request
        return TestSpecification(
            request.change, delta, pseudocounts, request.test_mode, request.two_sided, request.m1_domain_fn,
            request.levels, extremes=LAYOUTS[request.modality].extremes,
        )  # fmt: skip

    def _decoded_in(self, contrast: Contrast) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Batches that the groups are decoded in."""
        if not self.request.batch_correction or self.request.batches[0] is not None:
            return self.request.batches
        found = torch.unique(self.source.table.batch_code[torch.cat([contrast.index1, contrast.index2])])
        both = tuple(int(code) for code in found if code >= 0)
        n = self.request.n_draws
        if len(both) > n:
            raise ValueError(f"n_samples={n} is fewer than the {len(both)} batches: give more draws.")
        return both, both


# --------------------------------------------------------------------- cells


def _compare_cells(shared: _SharedDraws, silent: bool) -> list[Comparison]:
    """Compare random cells of the groups; all comparisons in each block of features."""
    request = shared.request
    draws = {key: shared.draw(key) for key in tqdm(shared.keys, desc="decoding", disable=silent)}
    largest: dict[DrawKey, Array] = {}
    if request.pseudocounts is None:
        largest = {key: drawn.moments(largest=True).largest for key, drawn in draws.items()}
    factors = {key: drawn.cell_factor for key, drawn in draws.items()}
    pairs, pseudocounts = [], []
    for number, groups in enumerate(shared.groups):
        detection = shared.detection(number, factors)
        most = [np.maximum.reduce([largest[key] for key in group]) for group in groups] if largest else []
        pseudocounts.append(shared.pseudocounts(number, most, detection))
        if detection is not None and request.features is not None:
            detection = detection[request.features]
        pairs.append(_pairs(shared, number, detection))
    n_features = draws[shared.keys[0]].values.shape[-1] if request.features is None else len(request.features)
    if request.bound is None:
        changes = [StatisticsByBlock(n_features) for _ in pairs]
        for block, values in feature_blocks_of(draws, request.features):
            for both, found, offset in zip(pairs, changes, pseudocounts, strict=True):
                change = both.change(block, both.groups(values), request.change, offset)
                found.put(block, {"mean": change.mean(0)})
        deltas = [estimated_delta(found.statistics["mean"], request.change.least_delta) for found in changes]
    else:
        deltas = [request.bound for _ in pairs]
    results = [StatisticsByBlock(n_features) for _ in pairs]
    specifications = [shared.specification(*pair) for pair in zip(deltas, pseudocounts, strict=True)]
    with tqdm(total=n_features, desc="features", disable=silent) as bar:
        for block, values in feature_blocks_of(draws, request.features):
            for both, specification, result in zip(pairs, specifications, results, strict=True):
                drawn = both.groups(values)
                if request.mode == "vanilla":
                    result.put(block, both.vanilla_statistics(drawn))
                else:
                    result.put(block, both.change_statistics(block, drawn, specification))
            bar.update(block.stop - block.start)
    statistics = [result.statistics for result in results]
    return list(map(Comparison, statistics, shared.pseudobulk, deltas, pseudocounts))


def _pairs(shared: _SharedDraws, number: int, factor: Tensor | None) -> CellPairs:
    source, request, groups = shared.source, shared.request, shared.groups[number]
    rng = np.random.default_rng([request.seed, 4])
    strata = [source.strata(group[0].batches) for group in groups]
    first, second = (
        DrawSelection.choose(rng, group, shared.sizes(group), which)
        for group, which in zip(groups, strata, strict=True)
    )
    same = groups[0][0].batches == groups[1][0].batches
    order = pair_order(rng, request.n_draws, request.n_pairs, strata[0] if same else None, source.device)
    return CellPairs(first, second, order, factor)


# --------------------------------------------------------------------- means of groups


def _compare_means(shared: _SharedDraws, silent: bool) -> list[Comparison]:
    """Compare means of groups, of all features: results do not depend on those that are reported."""
    largest = shared.request.pseudocounts is None
    keys = shared.keys
    if shared.request.corrects_by_counts:
        # Expected counts are those of each cell in its own batch.
        keys = list(dict.fromkeys([*keys, *(DrawKey(key.part, None) for key in keys)]))
    moments: dict[DrawKey, Moments] = {}
    factors: dict[DrawKey, float] = {}
    for key in tqdm(keys, desc="decoding", disable=silent):
        drawn = shared.draw(key)
        moments[key], factors[key] = drawn.moments(largest), drawn.cell_factor
    return [_compare_two_means(shared, number, moments, factors) for number in range(len(shared.groups))]


def _compare_two_means(
    shared: _SharedDraws, number: int, moments: Mapping[DrawKey, Moments], factors: Mapping[DrawKey, float]
) -> Comparison:
    request, groups = shared.request, shared.groups[number]
    drawn = [Moments.of_union([moments[key] for key in group], shared.sizes(group)) for group in groups]
    detection = shared.detection(number, factors)
    factor = 1.0 if detection is None else detection.double().cpu().numpy()
    pseudocounts = shared.pseudocounts(number, [group.largest for group in drawn], detection)
    means, errors, least = _means_and_errors(shared, number, moments, drawn, factor)
    if request.mode == "vanilla":
        delta, statistics = np.nan, {"probability": probability_larger(means, errors)}
    else:
        change, error = change_of_means(request.change, pseudocounts, means, errors, least)
        delta = estimated_delta(change, request.change.least_delta) if request.bound is None else request.bound
        statistics = _change_statistics(shared, shared.specification(delta, pseudocounts), change, error, errors)
    statistics = {"mean1": drawn[0].mean, "mean2": drawn[1].mean, **statistics}
    if request.features is not None:
        rows = request.features.cpu().numpy()
        statistics = {name: values[rows] for name, values in statistics.items()}
    return Comparison(statistics, shared.pseudobulk[number], delta, pseudocounts)


def _means_and_errors(
    shared: _SharedDraws,
    number: int,
    moments: Mapping[DrawKey, Moments],
    drawn: Sequence[Moments],
    factor: Array | float,
) -> tuple[Pair, Pair, tuple[Array | float, Array | float]]:
    """Mean of each of two groups times a factor, its standard error, and its least value in slopes, (F,) each."""
    request, groups, observed = shared.request, shared.groups[number], shared.pseudobulk[number]
    n_cells = [sum(min(size, request.n_draws) for size in shared.sizes(group)) for group in groups]
    # The variance of a draw of a random cell holds both the spread of the cells and the posterior of each.
    variances = [group.var * factor**2 / n for group, n in zip(drawn, n_cells, strict=True)]
    if not request.corrects_by_counts:
        first, second = (group.mean * factor for group in drawn)
        return (first, second), (np.sqrt(variances[0]), np.sqrt(variances[1])), (0.0, 0.0)
    first, second = (_corrected_mean(shared, group, moments) * factor for group in groups)
    if request.modality.binary:
        # Probabilities, which a factor above 1 may take beyond it.
        limits = (1 - 0.5 / (group.n_measured + 1) if group.n_measured else 1.0 for group in observed)
        first, second = (np.minimum(mean, most) for mean, most in zip((first, second), limits, strict=True))
    additive = request.mode == "vanilla" or request.change.name == "difference"
    counted = pseudobulk_means(observed, (first, second), request.modality, additive)
    error1, error2 = (np.sqrt(var + one.error**2) for var, one in zip(variances, counted, strict=True))
    return (first, second), (error1, error2), (counted[0].mean, counted[1].mean)


def _corrected_mean(shared: _SharedDraws, group: Group, moments: Mapping[DrawKey, Moments]) -> Array:
    """Mean of a group, times the ratio of its counts to those that the smooth decoder expects, (F,)."""
    means = []
    for key in group:
        expected = moments[DrawKey(key.part, None)].expected
        if shared.region_factors is not None:
            expected = expected * shared.region_factors.double().cpu().numpy()
        observed = PseudobulkStatistics.from_sums([shared.sums[key.part]])
        means.append(moments[key].mean * pseudobulk_correction(observed, expected, shared.request.modality))
    mean: Array = np.average(means, axis=0, weights=shared.sizes(group))
    return mean


def _change_statistics(
    shared: _SharedDraws, specification: TestSpecification, change: Array, error: Array, errors: Pair
) -> Statistics:
    """Statistics of changes of means, shrunk unless ``calibrated=False``; ``errors`` are those of the means."""
    request = shared.request
    rng = np.random.default_rng([request.seed, 3])
    prior = None
    if request.corrects_by_counts:
        # Shares of a whole: genes that take more of it take it from all others. With size factors rho is no share.
        compositional = not request.modality.binary and shared.source.program.config.library != "size_factor"
        in_common = compositional and request.change.name == "log-fold"
        common_error = float(np.linalg.norm(np.concatenate(errors)) / np.log(2)) if in_common else None
        prior = ShrinkagePrior.fit(change, error, rng, common_error)

    def posterior(block: slice) -> ChangePosterior:
        estimates = change[block], error[block]
        return unshrunk(*estimates) if prior is None else prior.posterior(*estimates)

    return statistics_of_posterior(posterior, len(change), specification, request.n_draws, rng)


def _warn_of_unmeasured(shared: _SharedDraws) -> None:
    for contrast, observed in zip(shared.contrasts, shared.pseudobulk, strict=True):
        for number, (group, name) in enumerate(zip(observed, (contrast.group1, contrast.group2), strict=True), 1):
            if group.n_measured == 0:
                logger.warning(
                    "Group %d%s has no cell with %s: its estimates are imputed, what the counts leave open of them "
                    "is not known, and statistics of counts are NaN.",
                    number, f" ({name})" if name else "", shared.request.modality.assay,
                )  # fmt: skip
