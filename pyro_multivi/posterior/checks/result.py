"""Result of a predictive check: tables, their summary, a compact repr."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd

from pyro_multivi.data.modality import MODALITIES

#: Tables whose rows carry a p-value.
TESTED = (*(modality.features for modality in MODALITIES), "cells", "groups", "totals", "user")


@dataclass(repr=False)
class PredictiveCheck:
    """Comparison of replicated with measured data. Every table is tidy: a row per statistic and feature, cell or group.

    Tables with a p-value have the columns ``statistic``, ``observed``, ``replicated`` (mean over
    replicates), ``lower``, ``upper`` (central interval of the replicates) and ``p_value``, the share of
    replicates above the data (ties by half): near 0 the data are larger than the model expects, near 1
    smaller. Under the right model it is uniform for statistics over cells. Those of single cells
    gather around 1/2, because the latents of a cell are inferred from it.

    Attributes
    ----------
    genes, regions
        Statistics of each feature over the measured cells; column ``gene`` or ``region``.
    cells
        Depth and detected features of each cell; column ``cell``.
    groups
        Statistics of features over the cells of each batch or group; columns ``by``, ``group``, ``feature``.
    totals
        Mean and standard deviation over cells of the statistics of cells; columns ``by``, ``group``.
    user
        The user's statistics; column ``position``.
    histogram
        Number of times that each count occurs, observed and replicated; the last row is of all larger counts.
    reliability
        Predicted probability of being open against the share open, by ``setting`` and bin.
    coverage
        Nominal probability of intervals of expression against the share covered, by ``setting`` and
        ``counts``: all of them, and those whose expectation is at least 1. Where most counts are 0 every model
        covers them, so that only the others distinguish models.
    imputed
        Means of counts and of predictions of a hidden modality and their correlation over cells, by feature.
    scores
        Calibration in single numbers, by ``setting``: ``ece``, ``brier`` (beside that of a constant rate
        per region), ``coverage_90``, ``largest_coverage_gap``, and these of counts of expectation 1 or more.
    n_cells, n_samples, level
        Size of the check and probability of the intervals.
    notes
        Checks that were not possible, with the reason.
    """

    genes: pd.DataFrame = field(default_factory=pd.DataFrame)
    regions: pd.DataFrame = field(default_factory=pd.DataFrame)
    cells: pd.DataFrame = field(default_factory=pd.DataFrame)
    groups: pd.DataFrame = field(default_factory=pd.DataFrame)
    totals: pd.DataFrame = field(default_factory=pd.DataFrame)
    user: pd.DataFrame = field(default_factory=pd.DataFrame)
    histogram: pd.DataFrame = field(default_factory=pd.DataFrame)
    reliability: pd.DataFrame = field(default_factory=pd.DataFrame)
    coverage: pd.DataFrame = field(default_factory=pd.DataFrame)
    imputed: pd.DataFrame = field(default_factory=pd.DataFrame)
    scores: pd.DataFrame = field(default_factory=pd.DataFrame)
    n_cells: int = 0
    n_samples: int = 0
    level: float = 0.95
    setting: str = "cells"
    notes: list[str] = field(default_factory=list)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables that are not empty, by name."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: table for name, table in found.items() if isinstance(table, pd.DataFrame) and len(table)}

    def summary(self) -> pd.DataFrame:
        """One row per statistic.

        Columns: ``n``; ``data_above``, ``data_below``: shares whose observed value lies above or below
        the central interval of the replicates by p-value; ``expected``, that share under the right
        model, both sides together; ``uniformity``, Kolmogorov's distance of the p-values from uniform ones
        (0 is best); ``fails``, whether more than twice the expected share lie outside, and more than chance
        would put there (binomial, at the expected share).
        """
        # Imported late: loading it takes longer than all else that this package imports.
        from scipy.stats import binom

        tail = (1 - self.level) / 2
        rows = []
        for name in TESTED:
            table = getattr(self, name)
            if not len(table):
                continue
            keys = ["by", "statistic"] if "by" in table else ["statistic"]
            for key, part in table.groupby(keys, sort=False):
                p = np.sort(part["p_value"].dropna().to_numpy())
                if not len(p):
                    continue
                above, below = float((p < tail).mean()), float((p > 1 - tail).mean())
                steps = np.arange(1, len(p) + 1) / len(p)
                by_chance = binom.sf(round((above + below) * len(p)) - 1, len(p), 2 * tail)
                rows.append(
                    {
                        "table": name if "by" not in table or key[0] == "all" else f"{name} by {key[0]}",
                        "statistic": key[-1],
                        "n": len(p),
                        "data_above": above,
                        "data_below": below,
                        "expected": 2 * tail,
                        "uniformity": float(np.maximum(np.abs(steps - p), np.abs(steps - 1 / len(p) - p)).max()),
                        "fails": above + below > 4 * tail and by_chance <= 2 * tail + 1e-9,
                    }
                )
        return pd.DataFrame(rows)

    def to_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the summary and every table that is not empty to an existing folder; returns the paths."""
        written = []
        for name, table in {"summary": self.summary(), **self.tables}.items():
            path = Path(folder) / f"{name}.csv"
            table.to_csv(path, index=False)
            written.append(path)
        return written

    def __repr__(self) -> str:
        lines = [f"PredictiveCheck: {self.n_samples} replicates of {self.n_cells} {self.setting}"]
        summary = self.summary()
        if len(summary):
            lines.append(f"outside the central {100 * self.level:.0f} % of replicates (expected {1 - self.level:.0%}):")
            for row in summary.to_dict("records"):
                share = row["data_above"] + row["data_below"]
                mark = "FAILS" if row["fails"] else "ok"
                lines.append(f"  {row['table']:22s} {row['statistic']:26s} {share:6.1%} of {row['n']:<7d} {mark}")
        for setting, part in self.scores.groupby("setting", sort=False) if len(self.scores) else ():
            values = [f"{name} {value:.4f}" for name, value in zip(part["score"], part["value"], strict=True)]
            lines.append(f"  {setting!s}: {', '.join(values)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
