"""Posterior predictive check: replicated counts compared with the measured ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, paired
from pyro_multivi.data.minibatch import AnyModality, Cells, ExtraFeatures
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.posterior.checks import statistics as stats
from pyro_multivi.posterior.checks.request import CheckRequest
from pyro_multivi.posterior.checks.result import PredictiveCheck
from pyro_multivi.posterior.checks.scoring import Scorer
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.replicates import (
    check_memory,
    counts_of,
    hide,
    masked_replicate,
    observed_matrix,
    replicate,
)
from pyro_multivi.processes.group import current
from pyro_multivi.processes.shares import Arrays, minibatches_in_turn, shared_map
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

# Added to the name of a setting: scores of counts of fragments beside those of genes.
_COUNTED = ", fragments"
# Added to the name of a setting, by the source of a hidden modality's depth.
_DEPTH = {"observed": "", "predicted": ", depth from the other", "prior": ", depth from its prior"}


def predictive_check(
    program: MultiVIProgram,
    minibatches: Minibatches,
    request: CheckRequest,
    groupings: Sequence[stats.Grouping],
) -> PredictiveCheck:
    """Compare replicated with measured counts of some cells, all together and within each of their groups.

    Raises
    ------
    MemoryError
        If the statistics of all replicates would not fit.
    """
    everyone = stats.Grouping("all", np.zeros(minibatches.n_cells, dtype=np.int64), ("all",))
    check = _Check(program, minibatches, request, [everyone, *groupings])
    check.compare_statistics()
    if request.hide_modalities:
        check.predict_hidden()
    if request.user:
        check.compare_user()
    return check.result()


@dataclass
class _Check:
    """Computation of a check; the parts of its tables are collected by table."""

    program: MultiVIProgram
    minibatches: Minibatches
    request: CheckRequest
    groupings: Sequence[stats.Grouping]
    parts: dict[str, list[pd.DataFrame]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)
    #: Statistics of cells that determine the depth they are replicated at.
    untested: set[str] = field(default_factory=set)

    def compare_statistics(self) -> None:
        """Add the built-in statistics, and scores of cells whose counts the guide is given."""
        request, n_samples = self.request, self.request.n_samples
        width = {modality: len(names) for modality, names in request.feature_names.items()}
        n_groups = sum(len(grouping.names) for grouping in self.groupings)
        check_memory(
            sum(stats.FeatureSums.bytes_needed(modality, n_groups, n_samples, width[modality]) for modality in width),
            f"Statistics of {n_samples} replicates of {sum(width.values())} features",
            ["fewer n_samples", "some genes and regions", "fewer groups"],
        )
        observed, replicated = (
            {modality: stats.CountSums(modality, self.groupings, size, width[modality]) for modality in width}
            for size in (1, n_samples)
        )
        scorers = {modality: Scorer(modality, width[modality]) for modality in width}
        self._add_up(observed, replicated, scorers)
        for modality in width:
            for sums in (observed[modality], replicated[modality], scorers[modality]):
                current().sum_arrays_(sums.arrays())
        # Of several modalities whose counts are scored, names say which.
        counted = [each for each in scorers if not each.binary and not isinstance(each, ExtraFeatures)]
        for modality, scorer in scorers.items():
            self._tabulate_features(modality, observed[modality], replicated[modality])
            measured_n = modality.measured_in(self.minibatches.table)[self.minibatches.index].numpy()
            if measured_n.any():
                self._tabulate_cells(measured_n, observed[modality], replicated[modality])
            else:
                self.notes.append(f"{modality.name} was measured in none of these cells")
            suffix = f", {modality.features}" if isinstance(modality, ExtraFeatures) else ""
            self._add(scorer.tables(request.setting + (_COUNTED if modality in counted[1:] else suffix)))

    def _add_up(
        self,
        observed: Mapping[AnyModality, stats.CountSums],
        replicated: Mapping[AnyModality, stats.CountSums],
        scorers: Mapping[AnyModality, Scorer],
    ) -> None:
        """Go through the minibatches of this process; find statistics that are no test, in any process."""
        request = self.request
        untested: set[str] = set()
        for start, cells in minibatches_in_turn(self.minibatches):
            measured = {}
            for modality, features in request.features.items():
                counts, measured[modality] = self._measured(cells, modality, features)
                scorers[modality].begin(counts)
                observed[modality].add(start + measured[modality], slice(0, 1), counts[None])
                total = stats.cell_statistics(modality)[0]
                if total not in untested and depth_is_inferred(self.program, cells, modality):
                    untested.add(total)
            for draws, found in replicate(self.program, cells, request.n_samples, request.seed):
                for modality, features in request.features.items():
                    drawn, rows = found[modality.counts], measured[modality]
                    values = _chosen(drawn.values, features, rows)
                    scorers[modality].add(values, _chosen(drawn.mean(), features, rows))
                    replicated[modality].add(start + rows, draws, values)
            for scorer in scorers.values():
                scorer.end()
        totals = [stats.cell_statistics(modality)[0] for modality in scorers]
        found_in_any = current().any(*(total in untested for total in totals))
        self.untested.update(total for total, is_found in zip(totals, found_in_any, strict=True) if is_found)

    def predict_hidden(self) -> None:
        """Hide each modality of the cells that have another in turn, predict it from the others, and add scores."""
        indices = {modality: self._with_others(modality) for modality in self.request.features}
        hidden = {modality: index for modality, index in indices.items() if len(index)}
        if len(self.request.features) < 2 or not hidden:
            self.notes.append("no modality was hidden and predicted: none of these cells has both")
            return
        for modality, index in hidden.items():
            self._predict(modality, index)

    def _with_others(self, modality: AnyModality) -> Tensor:
        """Positions of the cells that have a modality and another: of RNA and ATAC, where both are checked, both."""
        every, checked = self.minibatches, self.request.features
        if not isinstance(modality, ExtraFeatures) and len(set(MODALITIES) & set(checked)) == 2:
            return paired(every)
        measured = {each: each.measured_in(every.table)[every.index] for each in checked}
        others = [has for other, has in measured.items() if other != modality]
        has_others = sum(others, torch.zeros_like(measured[modality]))
        return every.index[measured[modality] & has_others]

    def _predict(self, modality: AnyModality, index: Tensor) -> None:
        """Add scores of a modality that is hidden from some cells and predicted."""
        request, every, features = self.request, self.minibatches, self.request.features[modality]
        minibatches = Minibatches(every.table, index, batch_size=every.batch_size, device=every.device)
        names, site = list(request.feature_names[modality]), modality.counts
        scorer = Scorer(modality, len(names))
        for _, cells in minibatches_in_turn(minibatches):
            counts, rows = self._measured(cells, modality, features)
            scorer.begin(counts)
            for _, found in replicate(self.program, cells, request.n_samples, request.seed, site, request.hidden_depth):
                scorer.add(*(_chosen(part, features, rows) for part in (found[site].values, found[site].mean())))
            scorer.end()
        current().sum_arrays_(scorer.arrays())
        imputed = scorer.imputation.table()
        imputed.insert(0, "feature", names)
        imputed.insert(0, "modality", modality.name)
        setting = f"hidden {modality.name}{_DEPTH[request.hidden_depth]}"
        self._add({**scorer.tables(setting), "imputed": imputed})

    def compare_user(self) -> None:
        """Add the user's statistics."""
        request = self.request
        counts = observed_matrix(self.program, self.minibatches)
        observed = {name: statistic(counts) for name, statistic in request.user.items()}

        def of_replicate(number: int) -> Arrays:
            counts = masked_replicate(self.program, self.minibatches, number, request.seed)
            return {name: statistic(counts) for name, statistic in request.user.items()}

        found = shared_map(of_replicate, range(request.n_samples))
        replicated = {name: np.empty((request.n_samples, len(value))) for name, value in observed.items()}
        for number, values in enumerate(found):
            for name, value in values.items():
                replicated[name][number] = value
        for name, value in observed.items():
            labels = {"position": range(len(value))}
            self._add({"user": stats.compare_all({name: value}, {name: replicated[name]}, labels, request.level)})

    def result(self) -> PredictiveCheck:
        """The tables, put together."""
        return PredictiveCheck(
            **{name: pd.concat(tables, ignore_index=True) for name, tables in self.parts.items()},
            n_cells=self.minibatches.n_cells,
            n_samples=self.request.n_samples,
            level=self.request.level,
            setting=self.request.setting,
            untested=tuple(sorted(self.untested)),
            notes=self.notes,
        )

    def _measured(
        self, cells: Cells, modality: AnyModality, features: Tensor | None
    ) -> tuple[Tensor, NDArray[np.int64]]:
        """Counts of the measured cells of a minibatch, and their positions in it."""
        counts, measured = counts_of(self.program, cells, modality.counts)
        rows: NDArray[np.int64] = np.flatnonzero(measured.cpu().numpy())
        return _chosen(counts, features, rows), rows

    def _tabulate_features(self, modality: AnyModality, observed: stats.CountSums, replicated: stats.CountSums) -> None:
        """Add statistics of features over all cells and over those of each group."""
        names = list(self.request.feature_names[modality])
        for grouping, of_data, of_model in zip(self.groupings, observed.features, replicated.features, strict=True):
            for code, group in enumerate(grouping.names):
                if of_data.n_cells[code] < 2:
                    continue
                data, model = (self._chosen_statistics(sums.statistics(code)) for sums in (of_data, of_model))
                labels: dict[str, Any]
                if grouping.by != "all":
                    table, labels = "groups", {"by": grouping.by, "group": group, "feature": names}
                elif isinstance(modality, ExtraFeatures):
                    table, labels = "extra", {"modality": modality.name, "feature": names}
                else:
                    table, labels = modality.features, {modality.feature: names}
                self._add({table: stats.compare_all(data, model, labels, self.request.level)})

    def _tabulate_cells(
        self, measured_n: NDArray[np.bool_], observed: stats.CountSums, replicated: stats.CountSums
    ) -> None:
        """Add statistics of measured cells, their mean and deviation in each group, and the histogram of counts."""
        level = self.request.level
        data, model = (
            {name: values[:, measured_n] for name, values in self._chosen_statistics(sums.cells).items()}
            for sums in (observed, replicated)
        )
        names = [name for name, measured in zip(self.minibatches.cell_names, measured_n, strict=True) if measured]
        self._add({"cells": stats.compare_all(data, model, {"cell": names}, level)})
        for grouping in self.groupings:
            code_n = grouping.code_n[measured_n]
            for code, group in enumerate(grouping.names):
                rows = code_n == code
                if rows.sum() < 2:
                    continue
                totals = stats.over_cells(data, rows), stats.over_cells(model, rows)
                self._add({"totals": stats.compare_all(*totals, {"by": grouping.by, "group": group}, level)})
        if observed.histogram is not None and replicated.histogram is not None:
            frequency = stats.compare(observed.histogram[0], replicated.histogram, level)
            self._add({"histogram": pd.DataFrame({"count": np.arange(stats.LARGEST_COUNT + 2), **frequency})})

    def _chosen_statistics(self, statistics: Mapping[str, stats.Array]) -> dict[str, stats.Array]:
        return {name: values for name, values in statistics.items() if name in self.request.built_in}

    def _add(self, tables: Mapping[str, pd.DataFrame]) -> None:
        for name, table in tables.items():
            if len(table):
                self.parts[name].append(table)


def depth_is_inferred(program: MultiVIProgram, cells: Cells, modality: AnyModality) -> bool:
    """Whether the guide infers the depth of cells from their counts of this modality, rather than knowing it.

    The total count of such a cell is no test of the model. Its replicates have the depth that the total
    suggested, with the error of that guess, and are drawn with the same error once more: over cells they scatter too
    much, and each cell alone lies near the middle of them.
    """
    if isinstance(modality, ExtraFeatures):
        return False
    measured = modality.measured_in(cells)
    # Measured, but zero: a depth that is known, fixed or the prior's stays as it is.
    blank = hide(cells, modality).replace(**{modality.mask: measured})
    with evaluation_mode(program):
        nodes: list[dict[str, Any]] = [dict(draw_latents(program, some).trace.nodes) for some in (cells, blank)]
    if modality.depth not in nodes[0]:
        return False
    depth, without = (found[modality.depth]["value"][..., measured] for found in nodes)
    return not torch.equal(depth, without)


def _chosen(values: Tensor, features: Tensor | None, rows: NDArray[np.int64]) -> Tensor:
    """Some features of some cells of (..., B, F)."""
    if len(rows) < values.shape[-2]:
        values = values[..., torch.from_numpy(rows).to(values.device), :]
    return values if features is None else values[..., features]
