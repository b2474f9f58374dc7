"""Tables of differential tests: columns and order as scvi-tools users know them; warnings of what they cannot say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pandas.arrays import BooleanArray
from torch import Tensor

from pyro_multivi.data.checks import caution, first_names
from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.posterior.differential.contrasts import Contrast
from pyro_multivi.posterior.differential.effect import Statistics
from pyro_multivi.posterior.differential.raw_counts import PseudobulkStatistics
from pyro_multivi.posterior.differential.request import DifferentialRequest

# Added to both sides of a ratio of probabilities, which draws may make 0.
_RATIO_OFFSET = 1e-8
#: Measured cells below which nothing is said of the mean of a group: of two that differ, either may be the outlier.
LEAST_CELLS = 3
# Share of called genes from which a change of the whole composition is the likelier reason.
_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Comparison:
    """Result of one comparison.

    Attributes
    ----------
    statistics
        By name, (k,) each: ``mean1`` and ``mean2`` of the groups, ``probability``, those of the change.
    pseudobulk
        Statistics of the counts of both groups, of all features.
    delta, pseudocounts
        As used.
    """

    statistics: Statistics
    pseudobulk: tuple[PseudobulkStatistics, PseudobulkStatistics]
    delta: float
    pseudocounts: float

    def calls(self, request: DifferentialRequest) -> BooleanArray:
        """Calls at the false discovery rate, (k,): missing where nothing is known, or a group did not measure it."""
        probability = self.statistics["probability"]
        measured = [group.n_cells[_reported(request)] > 0 for group in self.pseudobulk]
        unknown = np.isnan(probability) | ~np.logical_and(*measured)
        return BooleanArray(expected_fdr_calls(np.where(unknown, np.nan, probability), request.fdr_target), unknown)


def arrange(
    compared: Sequence[Comparison],
    contrasts: Sequence[Contrast],
    request: DifferentialRequest,
    names: Sequence[str],
    region_factors: Tensor | None,
) -> pd.DataFrame:
    """Table with one row per feature, the comparisons below each other."""
    layout = layout_of(request.modality)
    index = pd.Index(list(names))
    frames = []
    compared = [_in_fragments(one, request, region_factors) for one in compared]
    for one, contrast in zip(compared, contrasts, strict=True):
        columns = layout.columns(one, request)
        if any((group.n_cells != group.n_measured).any() for both in compared for group in both.pseudobulk):
            columns |= _of_both("n_measured", "n_cells", one, request)
        if contrast.group1 is not None:
            columns |= {"comparison": contrast.comparison, "group1": contrast.group1, "group2": contrast.group2}
        frame = pd.DataFrame(columns, index=index)
        if layout.sorted:
            by = [-one.statistics["probability"]]
            if request.mode == "change":
                by.insert(0, -np.abs(one.statistics["mean"]))
            frame = frame.iloc[np.lexsort(by)]
        frames.append(frame)
    return frames[0] if len(frames) == 1 else pd.concat(frames)


def _in_fragments(tested: Comparison, request: DifferentialRequest, rate: Tensor | None) -> Comparison:
    """The comparison with means of p as fragments in a typical cell, where these are counted."""
    if request.modality.binary or rate is None:
        return tested
    rate_k = (rate if request.features is None else rate[request.features]).double().cpu().numpy()
    means = ("mean1", "mean2")
    scaled = {name: rate_k * each if name in means else each for name, each in tested.statistics.items()}
    return replace(tested, statistics=scaled)


def expected_fdr_calls(probability: NDArray[np.float64], target: float) -> NDArray[np.bool_]:
    """Largest set of features whose posterior expected false discovery rate stays within a target, (F,).

    Features are taken in descending order of probability as long as the mean local false discovery rate,
    1 - probability, of those taken is at most the target. NaN is never taken.

    Examples
    --------
    >>> expected_fdr_calls(np.array([0.5, 0.99, np.nan, 0.93]), 0.05).tolist()
    [False, True, False, True]
    """
    known = np.flatnonzero(~np.isnan(probability))
    order = known[np.argsort(-probability[known], kind="stable")]
    expected = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    called = np.zeros(len(probability), dtype=bool)
    # The running mean of ascending numbers ascends: those within the target come first.
    called[order[expected <= target]] = True
    return called


def _expression(tested: Comparison, request: DifferentialRequest) -> dict[str, Any]:
    found = tested.statistics
    probability = found["probability"]
    names = ("proba_m1", "proba_m2") if request.mode == "vanilla" else ("proba_de", "proba_not_de")
    columns: dict[str, Any] = dict(zip(names, (probability, 1 - probability), strict=True))
    columns |= {"bayes_factor": _bayes_factor(probability), "scale1": found["mean1"], "scale2": found["mean2"]}
    if request.mode == "change":
        columns |= {"pseudocounts": tested.pseudocounts, "delta": tested.delta}
        columns |= {f"lfc_{name}": found[name] for name in ("mean", "median", "std", "min", "max")}
        columns |= _intervals("lfc", found, request)
    if request.all_stats:
        columns |= _of_both("raw_mean", "mean", tested, request)
        columns |= _of_both("non_zeros_proportion", "nonzero", tested, request)
        columns |= _of_both("raw_normalized_mean", "normalized", tested, request)
    if request.mode == "change":
        columns[f"is_de_fdr_{request.fdr_target}"] = tested.calls(request)
    return columns


def _accessibility(tested: Comparison, request: DifferentialRequest) -> dict[str, Any]:
    found = tested.statistics
    probability = found["probability"]
    if request.mode == "vanilla":
        columns: dict[str, Any] = {"proba_m1": probability, "proba_m2": 1 - probability}
    else:
        columns = {"prob_da": probability, "is_da_fdr": tested.calls(request)}
    columns |= {"bayes_factor": _bayes_factor(probability), "effect_size": found["mean1"] - found["mean2"]}
    what = "prob" if request.modality.binary else "fragments"
    observed: dict[str, Any] = {}
    if request.all_stats:
        observed = _of_both(f"emp_{what}", "mean", tested, request)
        columns["emp_effect"] = observed[f"emp_{what}1"] - observed[f"emp_{what}2"]
        if not request.modality.binary:
            observed |= _of_both("emp_prob", "nonzero", tested, request)
    columns |= {f"est_{what}1": found["mean1"], f"est_{what}2": found["mean2"], **observed}
    if request.mode == "change":
        columns |= {"change_mean": found["mean"], "change_std": found["std"], "delta": tested.delta}
        columns |= _intervals("change", found, request)
    return columns


def _bayes_factor(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural log of the odds."""
    return np.log(probability + _RATIO_OFFSET) - np.log(1 - probability + _RATIO_OFFSET)


def _of_both(prefix: str, statistic: str, tested: Comparison, request: DifferentialRequest) -> dict[str, Any]:
    """Columns of a pseudobulk statistic of both groups."""
    rows = _reported(request)
    return {f"{prefix}{n}": getattr(group, statistic)[rows] for n, group in enumerate(tested.pseudobulk, 1)}


def _reported(request: DifferentialRequest) -> Any:
    """Positions of the reported features."""
    return slice(None) if request.features is None else request.features.cpu().numpy()


def _intervals(prefix: str, found: Statistics, request: DifferentialRequest) -> dict[str, Any]:
    return {
        f"{prefix}_confidence_interval_{level}_{end}": found[f"{side} {level}"]
        for level in request.levels
        for side, end in (("lower", "min"), ("upper", "max"))
    }


class Layout(NamedTuple):
    """Table of a modality: its columns, and whether the most probable features come first.

    ``extremes`` tells whether columns hold median, smallest and largest change.
    """

    columns: Callable[[Comparison, DifferentialRequest], dict[str, Any]]
    sorted: bool
    extremes: bool


LAYOUTS: dict[AnyModality, Layout] = {
    RNA: Layout(_expression, sorted=True, extremes=True),
    ATAC: Layout(_accessibility, sorted=False, extremes=False),
}


def layout_of(modality: AnyModality) -> Layout:
    """Table of a modality; an extra one has that of expression."""
    return LAYOUTS[modality if modality in LAYOUTS else RNA]


def warn_of_unmeasured(
    pseudobulk: Sequence[tuple[PseudobulkStatistics, PseudobulkStatistics]],
    contrasts: Sequence[Contrast],
    request: DifferentialRequest,
) -> None:
    """Warn of groups without measured cells, and of groups with too few to compare their means."""
    imputed: list[str] = []
    few: list[str] = []
    for contrast, observed in zip(contrasts, pseudobulk, strict=True):
        for group, name in zip(observed, contrast.names, strict=True):
            if group.n_measured == 0:
                imputed.append(name)
            elif group.n_measured < LEAST_CELLS and request.unit == "group":
                few.append(name)
    assay = request.modality.assay
    if imputed:
        caution(
            f"No cell of {first_names(dict.fromkeys(imputed))} has {assay}: means are imputed, with an error that is "
            "not known. Calls of these comparisons are missing (NA), and statistics of counts are NaN.",
        )  # fmt: skip
    if few:
        caution(
            f"Fewer than {LEAST_CELLS} cells of {first_names(dict.fromkeys(few))} have {assay}: changes cannot be told "
            "from how cells differ. Probabilities and changes of these comparisons are NaN, calls are missing (NA). "
            "Join the group with another, or compare cells with unit='cell'.",
        )  # fmt: skip


def changed_as_a_whole(
    compared: Sequence[Comparison], contrasts: Sequence[Contrast], request: DifferentialRequest
) -> list[str]:
    """Names of the comparisons in which nearly all features of a composition are called."""
    if request.mode == "vanilla" or not request.modality.compositional or request.features is not None:
        return []
    calls = [one.calls(request).fillna(False).to_numpy(dtype=bool) for one in compared]
    pairs = zip(calls, contrasts, strict=True)
    return [contrast.comparison for called, contrast in pairs if called.mean() >= _NEARLY_ALL]
