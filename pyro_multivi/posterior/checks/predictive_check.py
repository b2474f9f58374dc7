"""A posterior predictive check: replicated data against the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.posterior.checks import statistics as stats
from pyro_multivi.posterior.checks.result import CheckRequest, Grouping, PredictiveCheck
from pyro_multivi.posterior.checks.scoring import Scorer
from pyro_multivi.posterior.engine.replicates import (
    MODALITY,
    check_memory,
    counts_of,
    masked_replicates,
    observed_matrix,
    observed_sites,
    replicate,
)
from pyro_multivi.program import MultiVIProgram


def criticise(program: MultiVIProgram, minibatches: Minibatches, request: CheckRequest) -> PredictiveCheck:
    """Compare replicated with measured counts.

    Raises
    ------
    MemoryError
        If the statistics of all replicates would not fit.
    """
    check = PredictiveCheck(
        n_cells=minibatches.n_cells, n_samples=request.n_samples, level=request.level, setting=request.setting
    )
    _compare_statistics(program, minibatches, request, check)
    if request.hide_modalities:
        _predict_hidden(program, minibatches, request, check)
    if request.user:
        check.user = _compare_user(program, minibatches, request)
    return check


def _compare_statistics(
    program: MultiVIProgram, minibatches: Minibatches, request: CheckRequest, check: PredictiveCheck
) -> None:
    sites, n, s = observed_sites(program), minibatches.n_cells, request.n_samples
    everyone = Grouping("all", np.zeros(n, dtype=np.int64), ("all",))
    groupings = [everyone, *request.groupings]
    width = {site: len(request.feature_names[site]) for site in sites}
    n_groups = sum(len(grouping.names) for grouping in groupings)
    needed = sum(stats.FeatureSums.bytes_needed(site, n_groups, s, width[site]) for site in sites)
    check_memory(
        needed, f"Statistics of {s} replicates of {sum(width.values())} features",
        ["fewer n_samples", "some genes and regions", "fewer groups"],
    )  # fmt: skip
    # Observed data are one more replicate, the first.
    sums = {site: [_pair(site, len(g.names), s, width[site]) for g in groupings] for site in sites}
    totals = {site: (stats.CellTotals(site, 1, n), stats.CellTotals(site, s, n)) for site in sites}
    histogram = (stats.CountHistogram(1), stats.CountHistogram(s))
    judges = {site: Scorer(site, width[site]) for site in sites}
    measured_n = {site: np.zeros(n, dtype=bool) for site in sites}
    start = 0
    for cells in minibatches:
        rows = np.arange(start, start + len(cells))
        start += len(cells)
        seen = {site: _measured(cells, site, request.features[site]) for site in sites}
        for site, (counts, at) in seen.items():
            judges[site].begin(counts)
            measured_n[site][rows[at]] = True
            _take(0, slice(0, 1), counts[None], rows[at], groupings, sums[site], totals[site], histogram, site)
        for draws, found in replicate(program, cells, s, request.seed):
            for site, (_, at) in seen.items():
                values = _chosen(found[site].values, request.features[site], at)
                mean = _chosen(found[site].mean(), request.features[site], at)
                judges[site].take(values, mean)
                _take(1, draws, values, rows[at], groupings, sums[site], totals[site], histogram, site)
        for judge in judges.values():
            judge.end()
    _tabulate(request, check, groupings, sums, totals, measured_n)
    if "x" in sites and measured_n["x"].any():
        found_h = stats.compare(histogram[0].frequency[0], histogram[1].frequency, request.level)
        check.histogram = pd.DataFrame({"count": np.arange(stats.LARGEST_COUNT + 2), **found_h})
    for site, judge in judges.items():
        _add_scores(check, request.setting, judge)
        if judge.n_cells == 0:
            check.notes.append(f"{MODALITY[site]} was measured in none of these cells")


def _take(
    which: int,
    draws: slice,
    values: Tensor,
    rows: NDArray[np.int64],
    groupings: Sequence[Grouping],
    sums: Sequence[tuple[stats.FeatureSums, stats.FeatureSums]],
    totals: tuple[stats.CellTotals, stats.CellTotals],
    histogram: tuple[stats.CountHistogram, stats.CountHistogram],
    site: str,
) -> None:
    """Add observed (0) or replicated (1) counts of measured cells to everything that is summed."""
    for grouping, pair in zip(groupings, sums, strict=True):
        code = grouping.code_n[rows]
        grouped = code >= 0
        part = values if grouped.all() else values[:, torch.from_numpy(grouped)]
        pair[which].add(code[grouped], draws, part)
    totals[which].add(rows, draws, values)
    if site == "x":
        histogram[which].add(draws, values)


def _tabulate(
    request: CheckRequest,
    check: PredictiveCheck,
    groupings: Sequence[Grouping],
    sums: Mapping[str, Sequence[tuple[stats.FeatureSums, stats.FeatureSums]]],
    totals: Mapping[str, tuple[stats.CellTotals, stats.CellTotals]],
    measured_n: Mapping[str, NDArray[np.bool_]],
) -> None:
    groups, cells, depths = [], [], []
    for site, pairs in sums.items():
        for grouping, (observed, replicated) in zip(groupings, pairs, strict=True):
            for code, name in enumerate(grouping.names):
                if observed.n_cells[code] < 2:
                    continue
                data, model = (
                    {key: value for key, value in part.statistics(code).items() if key in request.statistics}
                    for part in (observed, replicated)
                )
                kind = stats.feature_kind(site)
                names = list(request.feature_names[site])
                if grouping.by == "all":
                    setattr(check, f"{kind}s", stats.compare_all(data, model, {kind: names}, request.level))
                else:
                    labels = {"by": grouping.by, "group": name, "feature": names}
                    groups.append(stats.compare_all(data, model, labels, request.level))
        rows = measured_n[site]
        observed_t, replicated_t = (
            {key: value[:, rows] for key, value in part.totals.items() if key in request.statistics}
            for part in totals[site]
        )
        if not rows.any() or not observed_t:
            continue
        names = [name for name, kept in zip(request.cell_names, rows, strict=True) if kept]
        cells.append(stats.compare_all(observed_t, replicated_t, {"cell": names}, request.level))
        for grouping in groupings:
            for group, observed_g, replicated_g in stats.totals_of_groups(
                observed_t, replicated_t, grouping.code_n[rows], grouping.names
            ):
                labels = {"by": grouping.by, "group": group}
                depths.append(stats.compare_all(observed_g, replicated_g, labels, request.level))
    for name, frames in (("groups", groups), ("cells", cells), ("totals", depths)):
        frames = [frame for frame in frames if len(frame)]
        if frames:
            setattr(check, name, pd.concat(frames, ignore_index=True))


def _predict_hidden(
    program: MultiVIProgram, minibatches: Minibatches, request: CheckRequest, check: PredictiveCheck
) -> None:
    """Hide each modality of the paired cells in turn, predict it from the other, score it."""
    table, index = minibatches.table, minibatches.index
    paired = index[table.has_rna[index] & table.has_atac[index]]
    if len(observed_sites(program)) < 2 or not len(paired):
        check.notes.append("no modality was hidden and predicted: none of these cells has both")
        return
    cells_with_both = Minibatches(table, paired, batch_size=minibatches.batch_size, device=minibatches.device)
    for site in observed_sites(program):
        judge = Scorer(site, len(request.feature_names[site]))
        for cells in cells_with_both:
            counts, at = _measured(cells, site, request.features[site])
            judge.begin(counts)
            for _, found in replicate(program, cells, request.n_samples, request.seed, site, request.hidden_depth):
                chosen = request.features[site]
                judge.take(_chosen(found[site].values, chosen, at), _chosen(found[site].mean(), chosen, at))
            judge.end()
        depth = {"observed": "", "predicted": ", depth from the other", "prior": ", depth from its prior"}
        setting = f"hidden {MODALITY[site]}{depth[request.hidden_depth]}"
        _add_scores(check, setting, judge)
        imputed = judge.imputation.table()
        imputed.insert(0, "feature", list(request.feature_names[site]))
        imputed.insert(0, "modality", MODALITY[site])
        _append(check, "imputed", imputed)


def _compare_user(program: MultiVIProgram, minibatches: Minibatches, request: CheckRequest) -> pd.DataFrame:
    counts = observed_matrix(program, minibatches)
    observed = {name: statistic(counts) for name, statistic in request.user.items()}
    replicated = {name: np.empty((request.n_samples, len(value))) for name, value in observed.items()}
    for number, counts in enumerate(masked_replicates(program, minibatches, request.n_samples, request.seed)):
        for name, statistic in request.user.items():
            replicated[name][number] = statistic(counts)
    frames = [
        stats.compare_all({name: value}, {name: replicated[name]}, {"position": range(len(value))}, request.level)
        for name, value in observed.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _add_scores(check: PredictiveCheck, setting: str, judge: Scorer) -> None:
    if judge.n_cells == 0:
        return
    found = judge.scale.scores()
    scores = pd.DataFrame({"setting": setting, "score": list(found), "value": list(found.values())})
    _append(check, "scores", scores)
    name = "coverage" if judge.site == "x" else "reliability"
    curve = judge.scale.curve()
    curve.insert(0, "setting", setting)
    _append(check, name, curve)


def _pair(site: str, n_groups: int, n_samples: int, width: int) -> tuple[stats.FeatureSums, stats.FeatureSums]:
    return stats.FeatureSums(site, n_groups, 1, width), stats.FeatureSums(site, n_groups, n_samples, width)


def _measured(cells: Cells, site: str, features: Tensor | None) -> tuple[Tensor, NDArray[np.int64]]:
    """Counts of the cells that have them, and which of the minibatch those are."""
    counts, has = counts_of(cells, site)
    at: NDArray[np.int64] = np.flatnonzero(has.cpu().numpy())
    return _chosen(counts, features, at), at


def _chosen(values: Tensor, features: Tensor | None, rows: NDArray[np.int64]) -> Tensor:
    """Some features of some cells of (..., B, F)."""
    if len(rows) < values.shape[-2]:
        values = values[..., torch.from_numpy(rows).to(values.device), :]
    return values if features is None else values[..., features]


def _append(check: PredictiveCheck, name: str, table: pd.DataFrame) -> None:
    known = getattr(check, name)
    setattr(check, name, pd.concat([known, table], ignore_index=True) if len(known) else table)
