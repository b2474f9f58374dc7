"""Pictures of differential tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyro_multivi.data.checks import checked
from pyro_multivi.plots.style import PALETTE, as_written, axes_or_new, check_table, labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CHANGE_LABELS = {
    "lfc_mean": "change of expression, group 1 over group 2",
    "change_mean": "change of accessibility, group 1 over group 2",
}


@checked
def volcano(table: pd.DataFrame, comparison: str | None = None, ax: Axes | None = None, n_labels: int = 10) -> Axes:
    """Volcano plot: the size of changes against the evidence for them.

    Parameters
    ----------
    table
        From ``differential_expression`` or ``differential_accessibility`` with ``mode="change"``.
    comparison
        Comparison of the table to draw; needed if it holds several.
    ax
        Axes to draw into; default: a new figure.
    n_labels
        Number of names written at the called features of largest change, half of them on either side.

    Raises
    ------
    ValueError
        If the table is of another kind, or the comparison is not in it or not named.
    """
    change, called = _columns(table)
    if "comparison" in table:
        known = list(table["comparison"].unique())
        if comparison is None and len(known) == 1:
            comparison = known[0]
        if comparison not in known and (known or comparison is not None):
            raise ValueError(f"comparison={comparison!r} is not in the table: choose one of {known}.")
        table = table[table["comparison"] == comparison]
    elif comparison is not None:
        raise ValueError(f"comparison={comparison!r}, but the table holds a single one without a name: leave it out.")
    ax = axes_or_new(ax)
    x, y, hit = (
        table[change].to_numpy(),
        table["bayes_factor"].to_numpy(),
        table[called].fillna(False).to_numpy(dtype=bool),
    )
    for kind, chosen, colour, marker in (
        ("not called", ~hit, "#999999", "o"),
        ("more in group 1", hit & (x > 0), PALETTE[5], "^"),
        ("less in group 1", hit & (x <= 0), PALETTE[0], "v"),
    ):
        label = f"{kind} ({int(chosen.sum())})"
        ax.scatter(x[chosen], y[chosen], s=14, alpha=0.7, linewidths=0, color=colour, marker=marker, label=label)
    for side in (x, -x):
        candidates = np.flatnonzero(hit & (side > 0))
        for place in candidates[np.argsort(-side[candidates], kind="stable")][: (n_labels + 1) // 2]:
            name = as_written(table.index[place])
            ax.annotate(name, (x[place], y[place]), fontsize=7, xytext=(3, 3), textcoords="offset points")
    ax.legend(frameon=False, fontsize=8)
    return labelled(ax, _CHANGE_LABELS[change], "log Bayes factor", title=as_written(comparison or ""))


@checked
def top_features(table: pd.DataFrame, n: int = 5, ax: Axes | None = None) -> Axes:
    """Bars of the features called higher in group 1 with the largest changes, for each comparison.

    Parameters
    ----------
    table
        From ``differential_expression`` or ``differential_accessibility`` with ``mode="change"``.
    n
        Number of features per comparison; fewer are drawn where fewer are called.
    ax
        Axes to draw into; default: a new figure.

    Raises
    ------
    ValueError
        If the table is of another kind, or nothing in it is called as higher in group 1.
    """
    change, called = _columns(table)
    higher = table[table[called].fillna(False).astype(bool) & (table[change] > 0)]
    if higher.empty:
        raise ValueError("No feature of the table is called as higher in group 1: there is nothing to draw.")
    names = higher["comparison"] if "comparison" in higher else pd.Series("", index=higher.index)
    ax = axes_or_new(ax)
    labels: list[str] = []
    bars = []
    for number, name in enumerate(names.unique()):
        rows = higher[names.to_numpy() == name].nlargest(n, change)
        place = np.arange(len(labels), len(labels) + len(rows))
        drawn = ax.barh(
            place,
            rows[change],
            xerr=rows[change.replace("_mean", "_std")],
            color=PALETTE[number % len(PALETTE)],
            error_kw={"elinewidth": 1, "ecolor": "#555555"},
        )
        bars.append(drawn)
        labels.extend(map(as_written, rows.index))
    ax.set_yticks(np.arange(len(labels)), labels, fontsize=7)
    ax.invert_yaxis()
    if names.iloc[0]:
        # Given explicitly: of labels of bars, matplotlib leaves out those that begin with an underscore.
        texts = [as_written(name) for name in names.unique()]
        ax.legend(bars, texts, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return labelled(ax, f"{_CHANGE_LABELS[change]}, with its standard deviation", "")


def _columns(table: pd.DataFrame) -> tuple[str, str]:
    """Names of the columns of a differential table that hold the change and the calls."""
    check_table("table", table, ())
    change = next((name for name in _CHANGE_LABELS if name in table), None)
    called = next((str(name) for name in table if str(name).startswith(("is_de_fdr", "is_da_fdr"))), None)
    if change is None or called is None:
        lacks = " or ".join(_CHANGE_LABELS) if change is None else "is_de_fdr_... or is_da_fdr..."
        raise ValueError(
            f"table holds no changes and calls, for it has no column {lacks}: give what differential_expression or "
            "differential_accessibility return with mode='change'."
        )
    return change, called
