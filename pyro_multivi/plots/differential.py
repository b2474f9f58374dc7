"""Pictures of differential tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_multivi.data.checks import checked
from pyro_multivi.plots.style import PALETTE, as_written, axes_or_new, check_table, distinct_colours, labelled, outline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Height of a row of small letters in inches, and of one of names below each other at bars.
_ROW, _BAR = 0.11, 0.14
# From a name to its point.
_LINE: dict[str, Any] = {"arrowstyle": "-", "linewidth": 0.5, "color": "#555555", "shrinkA": 0, "shrinkB": 0}
_CHANGE_LABELS = {
    "lfc_mean": "change of expression (lfc_mean), group 1 over group 2",
    "change_mean": "change of accessibility (change_mean), group 1 over group 2",
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
    # Of a row of names, in units of the vertical axis.
    row = _ROW * np.ptp(ax.get_ylim()) * ax.figure.dpi / ax.get_window_extent().height
    for side in (x, -x):
        candidates = np.flatnonzero(hit & (side > 0))
        chosen = candidates[np.argsort(-side[candidates], kind="stable")][: (n_labels + 1) // 2]
        height = np.inf
        # Each below the one before, and written towards the middle: at the edge a long name would leave the axes. Of
        # points side by side the outer one has the lowest name, so that no line crosses a name.
        for place in chosen[np.lexsort((side[chosen], -y[chosen]))]:
            height = min(y[place], height - row)
            right = x[place] > 0
            ax.annotate(
                as_written(table.index[place]),
                (x[place], y[place]),
                (x[place] - (1 if right else -1) * 0.01 * np.ptp(ax.get_xlim()), height),
                ha="right" if right else "left",
                va="center",
                fontsize=7,
                path_effects=[outline()],
                arrowprops={**_LINE, "relpos": (float(right), 0.5)},
            )
    ax.legend(framealpha=0.8, edgecolor="none", fontsize=8)
    return labelled(ax, _CHANGE_LABELS[change], "natural log of the Bayes factor", title=as_written(comparison or ""))


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
    of_comparison = [higher[names.to_numpy() == name].nlargest(n, change) for name in names.unique()]
    ax = axes_or_new(ax, height=_BAR * sum(map(len, of_comparison)) + 1)
    labels: list[str] = []
    for name, rows, colour in zip(names.unique(), of_comparison, distinct_colours(len(of_comparison)), strict=True):
        place = np.arange(len(labels), len(labels) + len(rows))
        ax.barh(
            place,
            rows[change],
            xerr=rows[change.replace("_mean", "_std")],
            color=colour,
            error_kw={"elinewidth": 1, "ecolor": "#555555"},
            label=as_written(name),
        )
        labels.extend(map(as_written, rows.index))
    ax.set_yticks(np.arange(len(labels)), labels, fontsize=7)
    ax.invert_yaxis()
    if names.iloc[0]:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return labelled(ax, f"{_CHANGE_LABELS[change]},\nwith its standard deviation", "")


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
