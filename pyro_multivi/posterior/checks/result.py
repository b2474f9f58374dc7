"""Result of a predictive check: tables, their summary, a compact repr."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_multivi.data.checks import checked
from pyro_multivi.data.modality import MODALITIES, PROTEIN
from pyro_multivi.files import write_whole

#: Tables whose rows carry a p-value.
TESTED = (*(modality.features for modality in MODALITIES), "extra", "cells", "groups", "totals", "user")
#: Words of the column ``fails`` wherever it is read, on the console and on the page.
FAILS, PASSES, NO_TEST = "FAILS", "ok", "n/a"


def outside(p_value: ArrayLike, level: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether observed values lie above, and below, the central interval of their replicates, by p-value.

    Examples
    --------
    >>> outside([0.01, 0.025, 0.5, 0.99], 0.95)
    (array([ True, False, False, False]), array([False, False, False,  True]))
    """
    p = np.asarray(p_value, dtype=np.float64)
    # 1 - 0.95 is a little more than 0.05: without a margin a share of just 0.025 lies outside on one side alone.
    tail = (1 - level) / 2 - 1e-9
    return p < tail, p > 1 - tail


def expected_outside(n_samples: int, level: float) -> float:
    """Probability under the right model that a value lies outside: p is a multiple of 1/S, so not just 1 - level.

    Examples
    --------
    >>> round(expected_outside(100, 0.95), 4), round(expected_outside(1000, 0.95), 4)
    (0.0594, 0.05)
    """
    return 2 * math.ceil((1 - level) / 2 * n_samples - 1e-9) / (n_samples + 1)


def p_value_text(p_value: float, n_samples: int) -> str:
    """A p-value to the precision that S replicates give: none of 100 is ``"< 0.01"``, not 0.

    Examples
    --------
    >>> [p_value_text(p, 100) for p in (0.0, 0.034, 1.0)]
    ['< 0.01', '0.03', '> 0.99']
    """
    digits = max(2, math.ceil(math.log10(n_samples)))
    if p_value * n_samples < 0.5:
        return f"< {1 / n_samples:.{digits}f}"
    if (1 - p_value) * n_samples < 0.5:
        return f"> {1 - 1 / n_samples:.{digits}f}"
    return f"{p_value:.{digits}f}"


@dataclass(repr=False)
class PredictiveCheck:
    """Comparison of replicated with measured data. Every table is tidy: a row per statistic and feature, cell or group.

    Tables with a p-value have the columns ``statistic``, ``observed``, ``replicated`` (mean over
    replicates), ``lower``, ``upper`` (central interval of the replicates) and ``p_value``, the share of
    replicates above the data (ties by half): near 0 the data are larger than the model expects, near 1
    smaller. It is a share of S replicates: its standard error is up to 0.5 / sqrt(S), and 0 means less than 1 / S.
    Under the right model it is uniform for statistics over cells. Those of single cells gather around 1/2, because
    the latents of a cell are inferred from it.

    Attributes
    ----------
    genes, regions
        Statistics of each feature over the measured cells; column ``gene`` or ``region``.
    extra
        The same of extra modalities, such as proteins; columns ``modality`` and ``feature``.
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
    untested
        Statistics of cells that replicates cannot be tested by, because the depth of a cell is inferred from
        just these counts: a replicate repeats the cell's depth with its error. The tables have them, without a verdict.
    notes
        Checks that were not possible, with the reason.
    """

    genes: pd.DataFrame = field(default_factory=pd.DataFrame)
    regions: pd.DataFrame = field(default_factory=pd.DataFrame)
    extra: pd.DataFrame = field(default_factory=pd.DataFrame)
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
    untested: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """Tables that are not empty, by name."""
        found = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: table for name, table in found.items() if isinstance(table, pd.DataFrame) and len(table)}

    @property
    def feature_tables(self) -> dict[str, pd.DataFrame]:
        """Statistics of features by name of the features, extra modalities each with a table of its own."""
        found = {modality.features: getattr(self, modality.features) for modality in MODALITIES}
        for name in pd.unique(self.extra["modality"]) if len(self.extra) else ():
            part, features = self.extra[self.extra["modality"] == name], f"{name}s" if name == PROTEIN else name
            found[features] = part.drop(columns="modality").reset_index(drop=True)
        return {name: table for name, table in found.items() if len(table)}

    def summary(self) -> pd.DataFrame:
        """One row per statistic.

        Columns: ``n``; ``data_above``, ``data_below``: shares whose observed value lies above or below
        the central interval of the replicates by p-value; ``expected``, that share under the right
        model, both sides together; ``uniformity``, Kolmogorov's distance of the p-values from uniform ones
        (0 is best); ``fails``, whether more than twice the expected share lie outside, and more than chance
        would put there (binomial, at the expected share). ``fails`` is missing (``<NA>``) for the statistics in
        ``untested``. Under the right model a row fails with a probability of at most about the expected share.
        """
        # Imported late: loading it takes longer than all else that this package imports.
        from scipy.stats import binom

        expected = expected_outside(self.n_samples, self.level) if self.n_samples else 1 - self.level
        rows = []
        for name in TESTED:
            table = getattr(self, name)
            if not len(table):
                continue
            keys = [key for key in ("by", "modality", "statistic") if key in table]
            for key, part in table.groupby(keys, sort=False):
                p = np.sort(part["p_value"].dropna().to_numpy())
                if not len(p):
                    continue
                above, below = (float(side.mean()) for side in outside(p, self.level))
                steps = np.arange(1, len(p) + 1) / len(p)
                by_chance = binom.sf(round((above + below) * len(p)) - 1, len(p), expected)
                fails = above + below > 2 * expected and by_chance <= expected + 1e-9
                rows.append(
                    {
                        "table": _table_name(name, table, key[0]),
                        "statistic": key[-1],
                        "n": len(p),
                        "data_above": above,
                        "data_below": below,
                        "expected": expected,
                        "uniformity": float(np.maximum(np.abs(steps - p), np.abs(steps - 1 / len(p) - p)).max()),
                        # "mean" and "sd" go before the name of a statistic of cells.
                        "fails": pd.NA if name != "user" and key[-1].split()[-1] in self.untested else fails,
                    }
                )
        return pd.DataFrame(rows).astype({"fails": "boolean"}) if rows else pd.DataFrame()

    @checked
    def to_csv(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the summary and every table that is not empty to an existing folder; returns the paths."""
        written = []
        for name, table in {"summary": self.summary(), **self.tables}.items():
            path = Path(folder) / f"{name}.csv"
            write_whole(path, table.to_csv(index=False).encode())
            written.append(path)
        return written

    def __repr__(self) -> str:
        lines = [f"PredictiveCheck: {self.n_samples} replicates of {self.n_cells} {self.setting}"]
        summary = self.summary()
        if len(summary):
            expected = summary["expected"].iloc[0]
            lines.append(f"outside the central {self.level:.0%} of replicates ({expected:.1%} under the right model):")
            for row in summary.to_dict("records"):
                share = row["data_above"] + row["data_below"]
                found = f"{round(share * row['n'])} of {row['n']}"
                mark = verdict(row["fails"])
                lines.append(f"  {row['table']:22s} {row['statistic']:26s} {found:>14s} {share:6.1%}  {mark}")
            lines.append(f"  {verdict_in_words(summary)}")
            if summary["fails"].isna().any():
                lines.append(f"  {NO_TEST}: no test, as the depth of a cell is inferred from just these counts")
        for setting, part in self.scores.groupby("setting", sort=False) if len(self.scores) else ():
            values = [f"{name} {value:.4f}" for name, value in zip(part["score"], part["value"], strict=True)]
            lines.append(f"  {setting!s}: {', '.join(values)}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _table_name(name: str, table: pd.DataFrame, first_key: str) -> str:
    """Name of some rows of a table, in the summary."""
    if "modality" in table:
        return f"{name}: {first_key}"
    return name if "by" not in table or first_key == "all" else f"{name} by {first_key}"


#: Names of the files that :meth:`PredictiveCheck.to_csv` may write.
CSV_FILES = tuple(
    f"{name}.csv"
    for name in ("summary", *(entry.name for entry in fields(PredictiveCheck) if entry.default_factory is pd.DataFrame))
)


def verdict(fails: Any) -> str:
    """Word for a value of the column ``fails``."""
    return NO_TEST if pd.isna(fails) else FAILS if fails else PASSES


def verdict_in_words(summary: pd.DataFrame) -> str:
    """Number of rows of a summary that fail, of those tested, and the number that chance alone allows."""
    tested = summary.dropna(subset=["fails"])
    return (
        f"{FAILS}: {int(tested['fails'].sum())} of {len(tested)} tested rows; under the right model "
        f"{tested['expected'].sum():.1f} on average, or fewer"
    )
