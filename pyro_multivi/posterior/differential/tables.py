"""Tables of differential tests: columns and order as scvi-tools users know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.posterior.differential.contrasts import Contrast
from pyro_multivi.posterior.differential.effect import Statistics
from pyro_multivi.posterior.differential.raw_counts import PseudobulkStatistics
from pyro_multivi.posterior.differential.request import DifferentialRequest

# Added to both sides of a ratio of probabilities, which draws may make 0.
_RATIO_OFFSET = 1e-8


@dataclass(frozen=True)
class Comparison:
    """One comparison: statistics by name, each (f,), with what was estimated for it."""

    statistics: Statistics
    tallies: tuple[PseudobulkStatistics, PseudobulkStatistics]
    delta: float
    pseudocounts: float


def arrange(
    compared: Sequence[Comparison], contrasts: Sequence[Contrast], request: DifferentialRequest, names: Sequence[str]
) -> pd.DataFrame:
    """One row per feature, the comparisons below each other."""
    columns_of = _expression if request.site == "rho" else _accessibility
    index = pd.Index(list(names))
    frames = []
    for one, contrast in zip(compared, contrasts, strict=True):
        columns, order = columns_of(one, request)
        if contrast.group1:
            columns |= {"comparison": contrast.comparison, "group1": contrast.group1, "group2": contrast.group2}
        frame = pd.DataFrame(columns, index=index)
        frames.append(frame if order is None else frame.iloc[order])
    return frames[0] if len(frames) == 1 else pd.concat(frames)


def expected_fdr_calls(probability: NDArray[np.float64], target: float) -> NDArray[np.bool_]:
    """The largest set of features whose posterior expected false discovery rate stays within a target.

    Features are taken in descending order of probability as long as the mean of (1 - probability)
    of those taken is at most the target. NaN is never taken.

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


def _asked(values: Any, request: DifferentialRequest) -> Any:
    return values if request.features is None else values[request.features.cpu().numpy()]


def _verdict(statistics: Statistics, request: DifferentialRequest) -> tuple[Any, Any]:
    """Probability of what is tested and its log ratio to that of the contrary."""
    m1 = statistics["m1"]
    return m1, np.log(m1 + _RATIO_OFFSET) - np.log(1 - m1 + _RATIO_OFFSET)


def _expression(tested: Comparison, request: DifferentialRequest) -> tuple[dict[str, Any], NDArray[np.int64] | None]:
    found = tested.statistics
    m1, bayes_factor = _verdict(found, request)
    if request.mode == "vanilla":
        columns: dict[str, Any] = {"proba_m1": m1, "proba_m2": 1 - m1, "bayes_factor": bayes_factor}
        columns |= {"scale1": found["mean1"], "scale2": found["mean2"]}
    else:
        columns = {"proba_de": m1, "proba_not_de": 1 - m1, "bayes_factor": bayes_factor}
        columns |= {"scale1": found["mean1"], "scale2": found["mean2"]}
        columns |= {"pseudocounts": tested.pseudocounts, "delta": tested.delta}
        columns |= {f"lfc_{name}": found[name] for name in ("mean", "median", "std", "min", "max")}
        columns |= _intervals("lfc", found, request)
    if request.all_stats:
        for column, of in (
            ("raw_mean", "mean"), ("non_zeros_proportion", "nonzero"), ("raw_normalized_mean", "normalized")
        ):  # fmt: skip
            for number, seen in enumerate(tested.tallies, 1):
                columns[f"{column}{number}"] = _asked(getattr(seen, of), request)
    if request.mode == "change":
        columns[f"is_de_fdr_{request.fdr_target}"] = expected_fdr_calls(m1, request.fdr_target)
        order = np.lexsort((-np.abs(found["mean"]), -m1))
    else:
        order = np.argsort(-m1, kind="stable")
    return columns, order


def _accessibility(tested: Comparison, request: DifferentialRequest) -> tuple[dict[str, Any], NDArray[np.int64] | None]:
    found = tested.statistics
    m1, bayes_factor = _verdict(found, request)
    if request.mode == "vanilla":
        columns: dict[str, Any] = {"proba_m1": m1, "proba_m2": 1 - m1}
    else:
        columns = {"prob_da": m1, "is_da_fdr": expected_fdr_calls(m1, request.fdr_target)}
    columns |= {"bayes_factor": bayes_factor, "effect_size": found["mean1"] - found["mean2"]}
    opened = [_asked(seen.nonzero, request) for seen in tested.tallies]
    if request.all_stats:
        columns["emp_effect"] = opened[0] - opened[1]
    columns |= {"est_prob1": found["mean1"], "est_prob2": found["mean2"]}
    if request.all_stats:
        columns |= {"emp_prob1": opened[0], "emp_prob2": opened[1]}
    if request.mode == "change":
        columns |= {"change_mean": found["mean"], "change_std": found["std"], "delta": tested.delta}
        columns |= _intervals("change", found, request)
    return columns, None


def _intervals(prefix: str, found: Statistics, request: DifferentialRequest) -> dict[str, Any]:
    return {
        f"{prefix}_confidence_interval_{level}_{end}": found[f"{side} {level}"]
        for level in request.levels
        for side, end in (("lower", "min"), ("upper", "max"))
    }
