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
from scipy.special import ndtr
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import ATAC, Modality
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.panels import measured_share
from pyro_multivi.posterior.differential.cell_pairs import CellPairs, DrawSelection, pair_order
from pyro_multivi.posterior.differential.contrasts import Contrast, Partition, batches_of_both, covariates_of_both
from pyro_multivi.posterior.differential.effect import Statistics, StatisticsByBlock, TestSpecification, estimated_delta
from pyro_multivi.posterior.differential.group_draws import DrawKey, DrawSource, GroupDraws, Moments, feature_blocks_of
from pyro_multivi.posterior.differential.group_means import (
    GroupCounts,
    change_by_counts,
    change_of_means,
    compare_counts,
    counts_of_group,
    probability_larger,
    scattered,
    statistics_of_posterior,
    t_ratio,
)
from pyro_multivi.posterior.differential.raw_counts import PseudobulkStatistics, PseudobulkSums
from pyro_multivi.posterior.differential.request import DifferentialRequest
from pyro_multivi.posterior.differential.shrinkage import ChangePosterior, ShrinkagePrior, unshrunk
from pyro_multivi.posterior.differential.tables import (
    LEAST_CELLS,
    Comparison,
    arrange,
    changed_as_a_whole,
    layout_of,
    warn_of_unmeasured,
)
from pyro_multivi.posterior.engine.draws import region_factors
from pyro_multivi.processes.group import current
from pyro_multivi.processes.shares import shared_map
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")

Array = NDArray[np.float64]
Group = tuple[DrawKey, ...]

# Least pseudocount that is estimated: far below the share of any gene with counts.
_LEAST_PSEUDOCOUNT = 1e-10
# Error of the change that all genes have in common, relative to that of independent genes: 1.5 to 2.3 in simulation.
_COMMON_ERROR = 2.0


def compare_groups(
    program: MultiVIProgram,
    table: CellTable,
    contrasts: Sequence[Contrast],
    request: DifferentialRequest,
    names: Sequence[str],
    batch_names: Sequence[str],
    covariates: Mapping[str, slice],
    device: torch.device,
    silent: bool = True,
) -> pd.DataFrame:
    """Compare groups of cells. Cells that several comparisons share are drawn and decoded once.

    Parameters
    ----------
    names, batch_names
        Names of the features to report, and of all batches.
    covariates
        Columns of the design by the name of a covariate.
    silent
        Show no progress bar.

    Returns
    -------
    DataFrame
        The comparisons below each other, one row per feature. ``attrs["batches"]`` holds, by comparison, the names of
        the batches that each group was decoded in, None for each cell in its own; ``attrs["covariates"]`` the names of
        other covariates in which both groups have their common mean; ``attrs["changed_as_a_whole"]`` the comparisons in
        which nearly all genes are called.
    """
    shared = _SharedDraws(DrawSource(program, table, request, device), contrasts, covariates)
    warn_of_unmeasured(shared.pseudobulk, contrasts, request)
    compare = _compare_means if request.unit == "group" else _compare_cells
    compared = compare(shared, silent)
    found = arrange(compared, contrasts, request, names, shared.region_factors)
    found.attrs["batches"] = {
        contrast.comparison: [
            None if group[0].batches is None else [batch_names[code] for code in group[0].batches] for group in groups
        ]
        for contrast, groups in zip(contrasts, shared.groups, strict=True)
    }
    found.attrs["covariates"] = {
        contrast.comparison: [name for name, which in covariates.items() if (which.start in dict(group[0].covariates))]
        for contrast, (group, _) in zip(contrasts, shared.groups, strict=True)
    }
    whole = found.attrs["changed_as_a_whole"] = changed_as_a_whole(compared, contrasts, request)
    if whole:
        logger.warning(
            "Nearly all %s are called in %s. They are shares of a whole: where a few take more, all others have less. "
            "Look at those few first, or compare with a larger delta.", request.modality.features, first_names(whole),
        )  # fmt: skip
    logger.info("Batches that the groups are decoded in: %s", found.attrs["batches"])
    if covariates:
        logger.info("Covariates in which they are decoded at their common mean: %s", found.attrs["covariates"])
    return found


@dataclass(frozen=True)
class _SharedDraws:
    """Draws and counts of all groups of some comparisons, made of disjoint parts that the comparisons share."""

    source: DrawSource
    contrasts: Sequence[Contrast]
    #: Columns of the design by the name of a covariate.
    covariates: Mapping[str, slice]

    @property
    def request(self) -> DifferentialRequest:
        return self.source.request

    @cached_property
    def partition(self) -> Partition:
        panels: Panels | None = self.request.modality.panels_in(self.source.table)
        return Partition.of(self.contrasts, None if panels is None else panels.code)

    @cached_property
    def sums(self) -> list[PseudobulkSums]:
        """Sums of the counts of each part."""
        modality, table = self.request.modality, self.source.table
        share = measured_share(self.source.program, table, modality) if isinstance(modality, Modality) else None
        return PseudobulkSums.of_parts(table, self.partition.cells, modality, share)

    @cached_property
    def groups(self) -> list[tuple[Group, Group]]:
        """Draws that make up the two groups of each comparison."""
        found = []
        for contrast, (parts1, parts2) in zip(self.contrasts, self.partition.groups, strict=True):
            batches1, batches2 = self._decoded_in(contrast)
            wanted = self.request.batch_correction
            same = covariates_of_both(contrast, self.source.table.design, self.covariates, wanted)
            group1 = tuple(DrawKey(part, batches1, covariates=same) for part in parts1)
            found.append((group1, tuple(DrawKey(part, batches2, covariates=same) for part in parts2)))
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
        return region_factors(self.source.program) if self.request.modality == ATAC else None

    def draw(self, key: DrawKey) -> GroupDraws:
        return self.source.draw(self.source.cells_of(key, self.partition.cells[key.part]), key)

    def key_of_counts(self, key: DrawKey) -> DrawKey:
        """Draws by which the counts of a part are judged."""
        return self.source.key_of_counts(key, self.partition.cells[key.part])

    def sizes(self, group: Group) -> list[int]:
        """Numbers of cells of the parts of a group."""
        return [len(self.partition.cells[key.part]) for key in group]

    def detection(self, number: int, cell_factors: Mapping[DrawKey, float], always: bool = False) -> Tensor | None:
        """Probability of detecting an open region in a cell of mean depth, d r, (F,); None to compare p or rho."""
        if self.request.probability != "detected" and not always:
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
            request.levels, extremes=layout_of(request.modality).extremes,
        )  # fmt: skip

    def _decoded_in(self, contrast: Contrast) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Batches that the groups are decoded in; None for each cell in its own."""
        request = self.request
        if request.batches[0] is not None:
            return request.batches
        both = batches_of_both(contrast, self.source.table.batch_code, request.batch_correction)
        n = request.n_draws
        if both is not None and len(both) > n:
            raise ValueError(f"n_samples={n} is fewer than the {len(both)} batches: give more draws.")
        return both, both


# --------------------------------------------------------------------- cells


def _compare_cells(shared: _SharedDraws, silent: bool) -> list[Comparison]:
    """Compare random cells of the groups; all comparisons in each block of features."""
    request = shared.request
    draws, largest = shared.source.draw_in_turn(
        {key: shared.partition.cells[key.part] for key in shared.keys}, request.pseudocounts is None, silent
    )
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
        deltas = [estimated_delta(found.of_all()["mean"], request.change.least_delta) for found in changes]
    else:
        deltas = [request.bound for _ in pairs]
    results = [StatisticsByBlock(n_features) for _ in pairs]
    specifications = [shared.specification(*pair) for pair in zip(deltas, pseudocounts, strict=True)]
    with tqdm(total=n_features // current().size, desc="features", disable=silent or not current().is_first) as bar:
        for block, values in feature_blocks_of(draws, request.features):
            for both, specification, result in zip(pairs, specifications, results, strict=True):
                drawn = both.groups(values)
                if request.mode == "vanilla":
                    result.put(block, both.vanilla_statistics(drawn))
                else:
                    result.put(block, both.change_statistics(block, drawn, specification))
            bar.update(block.stop - block.start)
    statistics = [result.of_all() for result in results]
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
        keys = list(dict.fromkeys([*keys, *map(shared.key_of_counts, keys)]))
    found = shared_map(lambda key: shared.draw(key).statistics(largest), keys, "decoding", silent)
    factors = {key: float(arrays.pop("factor")) for key, arrays in zip(keys, found, strict=True)}
    moments = {key: Moments(**arrays) for key, arrays in zip(keys, found, strict=True)}
    return [_compare_two_means(shared, number, moments, factors) for number in range(len(shared.groups))]


def _compare_two_means(
    shared: _SharedDraws, number: int, moments: Mapping[DrawKey, Moments], factors: Mapping[DrawKey, float]
) -> Comparison:
    request, groups = shared.request, shared.groups[number]
    drawn = [Moments.of_union([moments[key] for key in group], shared.sizes(group)) for group in groups]
    detection = shared.detection(number, factors)
    factor = 1.0 if detection is None else detection.double().cpu().numpy()
    pseudocounts = shared.pseudocounts(number, [group.largest for group in drawn], detection)
    # Depth acts on what is detected: p is that over d r.
    seen = shared.detection(number, factors, always=request.modality == ATAC)
    over = np.ones(len(drawn[0].mean)) if seen is None or detection is not None else seen.double().cpu().numpy()
    counted = [_counts_of(shared, group, moments, factor * over) for group in groups if request.corrects_by_counts]
    tested, known = None, np.ones(len(drawn[0].mean), dtype=bool)
    if counted:
        # Nothing is known of a feature that no cell of a group measured.
        both = np.logical_and(*(np.asarray(group.n_cells) > 0 for group in counted))
        if both.any():
            known = both
            tested = compare_counts((counted[0].at(known), counted[1].at(known)), request.modality)
            tested = tested.divided_by(over[known])
    if tested is not None:
        means, errors = tested.means, tested.errors
    else:
        first, second = (
            (group.mean / over for group in counted) if counted else (group.mean * factor for group in drawn)
        )
        # The variance of a draw of a random cell holds both the spread of the cells and the posterior of each.
        n_drawn = [sum(min(size, request.n_draws) for size in shared.sizes(group)) for group in groups]
        error1, error2 = (np.sqrt(group.var * factor**2 / n) for group, n in zip(drawn, n_drawn, strict=True))
        means, errors = (first, second), (error1, error2)
    if request.mode == "vanilla":
        probability = probability_larger(means, errors) if tested is None else ndtr(tested.score)
        delta, statistics = np.nan, {"probability": probability}
    else:
        if tested is None:
            change, error = change_of_means(request.change, pseudocounts, means, errors)
        else:
            change, error = change_by_counts(request.change, pseudocounts, tested)
        delta = estimated_delta(change, request.change.least_delta) if request.bound is None else request.bound
        specification = shared.specification(delta, pseudocounts)
        common_error = _COMMON_ERROR * float(np.linalg.norm(np.concatenate(errors)) / np.log(2))
        cells = min(
            group.n_measured or sum(sizes)
            for group, sizes in zip(shared.pseudobulk[number], map(shared.sizes, groups), strict=True)
        )
        statistics = _change_statistics(shared, specification, change, error, common_error * t_ratio(cells - 1))
    statistics = {name: scattered(values, known) for name, values in statistics.items()}
    few = np.any([(group.n_cells > 0) & (group.n_cells < LEAST_CELLS) for group in shared.pseudobulk[number]], axis=0)
    statistics = {name: np.where(few, np.nan, values) for name, values in statistics.items()}
    statistics = {"mean1": drawn[0].mean, "mean2": drawn[1].mean, **statistics}
    if request.features is not None:
        rows = request.features.cpu().numpy()
        statistics = {name: values[rows] for name, values in statistics.items()}
    return Comparison(statistics, shared.pseudobulk[number], delta, pseudocounts)


def _counts_of(
    shared: _SharedDraws, group: Group, moments: Mapping[DrawKey, Moments], factor: Array | float
) -> GroupCounts:
    """Counts of a group beside those that the model expects."""
    modality, r = shared.request.modality, shared.region_factors
    factors = 1.0 if modality.compositional or r is None else r.double().cpu().numpy()
    expected = [moments[shared.key_of_counts(key)].expected * factors for key in group]
    means = [moments[key].mean * factor for key in group]
    sums = [shared.sums[key.part] for key in group]
    # Depths that came with the data are known. Those of other counts are read off their totals.
    if modality.binary and shared.source.table.atac_size is None:
        expected = [part.at_depth_of_counts(each) for part, each in zip(sums, expected, strict=True)]
    return counts_of_group(sums, means, expected, shared.sizes(group), modality)


def _change_statistics(
    shared: _SharedDraws, specification: TestSpecification, change: Array, error: Array, common_error: float
) -> Statistics:
    """Statistics of changes of means, shrunk unless ``calibrated=False``."""
    request = shared.request
    rng = np.random.default_rng([request.seed, 3])
    prior = None
    if request.corrects_by_counts:
        # Shares of a whole: genes that take more of it take it from all others.
        in_common = request.modality.compositional and request.change.name == "log-fold"
        prior = ShrinkagePrior.fit(change, error, rng, common_error if in_common else None)

    def posterior(block: slice) -> ChangePosterior:
        estimates = change[block], error[block]
        return unshrunk(*estimates) if prior is None else prior.posterior(*estimates)

    return statistics_of_posterior(posterior, len(change), specification, request.n_draws, rng)
