"""Differential expression and accessibility: tables of features, group against group."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi.data.table import CellTable
from pyro_multivi.posterior.exceedance import Pairs, Question, Statistics
from pyro_multivi.posterior.groups import Contrast
from pyro_multivi.posterior.pools import Source
from pyro_multivi.posterior.population import change_of_means, describe, mean_errors, probably_larger
from pyro_multivi.posterior.shrinkage import as_estimated, shrunk
from pyro_multivi.posterior.tallies import Tally, count_support, tally
from pyro_multivi.posterior.testing import Request
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")

# Added to both sides of a ratio of probabilities, which draws may make 0.
_RATIO_OFFSET = 1e-8
# Least pseudocount that is estimated: far below the share of any gene that was seen.
_LEAST_PSEUDOCOUNT = 1e-10


@dataclass(frozen=True)
class Comparison:
    """One comparison: statistics by name, each (f,), with what was estimated for it."""

    statistics: Statistics
    tallies: tuple[Tally, Tally]
    delta: float
    pseudocounts: float


def compare_groups(
    program: MultiVIProgram,
    table: CellTable,
    contrasts: Sequence[Contrast],
    request: Request,
    names: Sequence[str],
    device: torch.device,
    silent: bool = True,
) -> pd.DataFrame:
    """Compare groups one after the other.

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
    source = Source(
        program, table, request.site, request.n_samples, request.weights, request.batch_size, device, request.seed
    )
    known: dict[bytes, Tally] = {}

    def tally_of(index: Tensor) -> Tally:
        key = index.numpy().tobytes()
        if key not in known:
            known[key] = tally(table, index, request.site)
        return known[key]

    arrange = _expression_table if request.site == "rho" else _accessibility_table
    frames = []
    for contrast in tqdm(contrasts, desc="comparisons", disable=silent):
        tallies = (tally_of(contrast.index1), tally_of(contrast.index2))
        _note_unmeasured(contrast, tallies, request)
        frame = arrange(_test(source, contrast, tallies, request), request, names)
        if contrast.group1:
            frame = frame.assign(comparison=contrast.comparison, group1=contrast.group1, group2=contrast.group2)
        frames.append(frame)
    return pd.concat(frames)


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


def estimated_delta(change: NDArray[np.float64], least: float) -> float:
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


def _test(source: Source, contrast: Contrast, tallies: tuple[Tally, Tally], request: Request) -> Comparison:
    batches1, batches2 = _decoded_in(source.table, contrast, request)
    pool1 = source.draw(contrast.index1, batches1, 1)
    pool2 = source.draw(contrast.index2, batches2, 2)
    pseudocounts = request.pseudocounts
    if pseudocounts is None:
        pseudocounts = _estimated_pseudocounts(pool1, pool2, tallies, request.threshold_counts)
    if request.unit == "cell":
        order = _order(source, request, batches1, batches2)
        pairs = Pairs(pool1, pool2, request.features, order)
        if request.mode == "vanilla":
            return Comparison(pairs.exceeding(), tallies, np.nan, pseudocounts)
        delta = request.delta
        if delta is None:
            delta = estimated_delta(pairs.mean_change(request.change, pseudocounts), request.change.least_delta)
        return Comparison(pairs.changing(_question(request, delta, pseudocounts)), tallies, delta, pseudocounts)
    return _test_means(Pairs(pool1, pool2, None), contrast, tallies, request, pseudocounts)


def _test_means(
    pairs: Pairs, contrast: Contrast, tallies: tuple[Tally, Tally], request: Request, pseudocounts: float
) -> Comparison:
    """Means of groups. All features are looked at, so that a result does not depend on which are asked for."""
    moments = pairs.moments()
    means = (moments["mean1"], moments["mean2"])
    least: tuple[Any, Any] = (0.0, 0.0)
    counts: tuple[Any, Any] = (0.0, 0.0)
    if request.calibrated:
        additive = request.mode == "vanilla" or request.change.name == "difference"
        support = count_support(*tallies, request.site, *means, additive)
        least, counts = (support[0].mean, support[1].mean), (support[0].error, support[1].error)
    n_cells = (min(len(contrast.index1), request.n_samples), min(len(contrast.index2), request.n_samples))
    errors = mean_errors(moments, n_cells, counts)
    rng = np.random.default_rng([request.seed, 3])
    delta: float | None
    if request.mode == "vanilla":
        delta, statistics = np.nan, {"m1": probably_larger(means, errors)}
    else:
        change, error = change_of_means(request.change, pseudocounts, means, errors, least)
        delta = request.delta
        if delta is None:
            delta = estimated_delta(change, request.change.least_delta)
        changes = shrunk(change, error, rng) if request.calibrated else as_estimated(change, error)
        question = _question(request, delta, pseudocounts)
        statistics = describe(changes, question, request.n_samples, rng)
    statistics = {"mean1": means[0], "mean2": means[1], **statistics}
    asked = {name: _asked(values, request) for name, values in statistics.items()}
    return Comparison(asked, tallies, delta, pseudocounts)


def _question(request: Request, delta: float, pseudocounts: float) -> Question:
    return Question(
        request.change, delta, pseudocounts, request.test_mode, request.two_sided, request.m1_domain_fn,
        request.levels, in_full=request.site == "rho",
    )  # fmt: skip


def _decoded_in(
    table: CellTable, contrast: Contrast, request: Request
) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Batches that the groups are decoded in."""
    if not request.batch_correction:
        return None, None
    if request.batches1 is not None:
        return request.batches1, request.batches2
    seen = torch.unique(table.batch_code[torch.cat([contrast.index1, contrast.index2])])
    both = tuple(int(code) for code in seen if code >= 0)
    if len(both) > request.n_samples:
        raise ValueError(f"n_samples={request.n_samples} is fewer than the {len(both)} batches: give more draws.")
    return both, both


def _order(
    source: Source, request: Request, batches1: tuple[int, ...] | None, batches2: tuple[int, ...] | None
) -> tuple[Tensor, Tensor] | None:
    """Which draws are paired: those of one batch with one another wherever the groups share batches."""
    rng = np.random.default_rng([request.seed, 4])
    n = request.n_samples
    same = batches1 == batches2
    if request.n_pairs is None:
        if same:
            return None
        order = (np.arange(n), rng.permutation(n))
    else:
        sizes = source.strata(len(batches1 or (0,))) if same else [n]
        ends = np.cumsum(sizes)
        stratum = rng.choice(len(sizes), request.n_pairs, p=np.array(sizes) / n)
        low, high = (ends - np.array(sizes))[stratum], ends[stratum]
        order = (rng.integers(low, high), rng.integers(low, high))
    first, second = (torch.from_numpy(part).to(source.device) for part in order)
    return first, second


def _estimated_pseudocounts(
    first: Tensor, second: Tensor, tallies: tuple[Tally, Tally], threshold: float
) -> float:
    """What the model makes of features that a group hardly has: the 0.9 quantile of their largest draws."""
    low = [found.mean < threshold for found in tallies]
    features = np.flatnonzero(low[0] | low[1])
    if not len(features):
        return _LEAST_PSEUDOCOUNT
    largest = Pairs(first, second, torch.from_numpy(features).to(first.device)).largest()
    found = [
        float(np.quantile(largest[f"max{number}"][chosen[features]], 0.9))
        for number, chosen in zip((1, 2), low, strict=True)
        if chosen.any()
    ]
    return max(_LEAST_PSEUDOCOUNT, *found)


def _note_unmeasured(contrast: Contrast, tallies: tuple[Tally, Tally], request: Request) -> None:
    what = "RNA" if request.site == "rho" else "ATAC"
    for number, (found, name) in enumerate(zip(tallies, (contrast.group1, contrast.group2), strict=True), 1):
        if found.n_measured == 0:
            logger.warning(
                "Group %d%s has no cell with %s: its estimates are imputed, what the counts leave open of them is "
                "not known, and statistics of counts are NaN.",
                number, f" ({name})" if name else "", what,
            )  # fmt: skip


def _asked(values: Any, request: Request) -> Any:
    return values if request.features is None else values[request.features.cpu().numpy()]


def _verdict(statistics: Statistics, request: Request) -> tuple[Any, Any]:
    """Probability of what is tested and its log ratio to that of the contrary."""
    m1 = statistics["m1"]
    return m1, np.log(m1 + _RATIO_OFFSET) - np.log(1 - m1 + _RATIO_OFFSET)


def _expression_table(tested: Comparison, request: Request, names: Sequence[str]) -> pd.DataFrame:
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
    return pd.DataFrame(columns, index=pd.Index(list(names))).iloc[order]


def _accessibility_table(tested: Comparison, request: Request, names: Sequence[str]) -> pd.DataFrame:
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
    return pd.DataFrame(columns, index=pd.Index(list(names)))


def _intervals(prefix: str, found: Statistics, request: Request) -> dict[str, Any]:
    return {
        f"{prefix}_confidence_interval_{level}_{end}": found[f"{side} {level}"]
        for level in request.levels
        for side, end in (("lower", "min"), ("upper", "max"))
    }
