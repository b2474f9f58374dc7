"""Pictures: each function takes an ``ax`` and returns it. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi._optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's palette: told apart by colour-blind readers.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
_MARKERS = "osD^vP*X"
_CHANGE_LABELS = {
    "lfc_mean": "change of expression, group 1 over group 2",
    "change_mean": "change of accessibility, group 1 over group 2",
}


def principal_plane(latent: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Coordinates of cells in the plane of largest variance, (cells, 2)."""
    centred = latent - latent.mean(0)
    if centred.shape[1] == 1:
        centred = np.column_stack([centred, np.zeros(len(centred))])
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    plane: NDArray[np.floating[Any]] = centred @ axes[:2].T
    return plane


def latent_scatter(
    latent: NDArray[np.floating[Any]], labels: Sequence[Any] | None = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Cells in the two principal directions of the latent space.

    Parameters
    ----------
    latent
        (cells, K); shown as it is if K is 2.
    labels
        One per cell; gives colour and, past eight labels, marker.
    ax
        Where to draw; default: a new figure.
    title
        Above the picture.
    """
    ax = _axes(ax)
    xy = latent if latent.shape[1] == 2 else principal_plane(latent)
    names = np.zeros(len(xy), dtype=int) if labels is None else np.asarray(labels)
    for place, name in enumerate(pd.unique(pd.Series(names).sort_values())):
        chosen = names == name
        ax.scatter(
            xy[chosen, 0],
            xy[chosen, 1],
            s=14,
            alpha=0.75,
            linewidths=0,
            color=PALETTE[place % len(PALETTE)],
            marker=_MARKERS[(place // len(PALETTE)) % len(_MARKERS)],
            label=str(name),
        )
    if labels is not None:
        ax.legend(frameon=False, markerscale=1.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    kind = "latent" if latent.shape[1] == 2 else "principal"
    ax.set(xlabel=f"{kind} direction 1", ylabel=f"{kind} direction 2", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def training_history(history: Mapping[str, pd.DataFrame], quantity: str = "elbo", ax: Axes | None = None) -> Axes:
    """A loss over epochs, of training and validation cells.

    Parameters
    ----------
    history
        ``model.history``.
    quantity
        Name without ``_train`` or ``_validation``.
    ax
        Where to draw; default: a new figure.

    Raises
    ------
    KeyError
        If the quantity was not recorded.
    """
    found = [name for name in (f"{quantity}_train", f"{quantity}_validation") if name in history]
    if not found:
        known = sorted({name.rsplit("_", 1)[0] for name in history})
        raise KeyError(f"quantity={quantity!r} was not recorded; recorded are {', '.join(known)}.")
    ax = _axes(ax)
    for place, name in enumerate(found):
        values = history[name][name].dropna()
        ax.plot(
            values.index + 1,
            values,
            color=PALETTE[place],
            linestyle=("-", "--")[place],
            label=name.rsplit("_", 1)[1],
        )
    ax.legend(frameon=False)
    label = "minus ELBO" if quantity == "elbo" else quantity.replace("_", " ")
    ax.set(xlabel="epoch", ylabel=f"{label} (nats per cell)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def volcano(table: pd.DataFrame, comparison: str | None = None, ax: Axes | None = None, n_labels: int = 10) -> Axes:
    """How large changes are against how sure they are.

    Parameters
    ----------
    table
        From ``differential_expression`` or ``differential_accessibility`` with ``mode="change"``.
    comparison
        Which comparison of the table; needed if it holds several.
    ax
        Where to draw; default: a new figure.
    n_labels
        Names to write at the called features of largest change, half of them on either side.

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
        if comparison not in known:
            raise ValueError(f"comparison={comparison!r} is not in the table: choose one of {known}.")
        table = table[table["comparison"] == comparison]
    elif comparison is not None:
        raise ValueError(f"comparison={comparison!r}, but the table holds a single one without a name: leave it out.")
    ax = _axes(ax)
    x, y, hit = table[change].to_numpy(), table["bayes_factor"].to_numpy(), table[called].to_numpy(dtype=bool)
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
            ax.annotate(
                str(table.index[place]), (x[place], y[place]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
    ax.legend(frameon=False, fontsize=8)
    ax.set(xlabel=_CHANGE_LABELS[change], ylabel="log Bayes factor", title=comparison or "")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def top_features(table: pd.DataFrame, n: int = 5, ax: Axes | None = None) -> Axes:
    """The features that are most surely and most strongly higher in group 1, for each comparison.

    Parameters
    ----------
    table
        From ``differential_expression`` or ``differential_accessibility`` with ``mode="change"``.
    n
        Features per comparison, called ones only: fewer are drawn where fewer are called.
    ax
        Where to draw; default: a new figure.

    Raises
    ------
    ValueError
        If the table is of another kind, or nothing in it is called as higher in group 1.
    """
    change, called = _columns(table)
    higher = table[table[called].astype(bool) & (table[change] > 0)]
    if higher.empty:
        raise ValueError("No feature of the table is called as higher in group 1: there is nothing to draw.")
    names = higher["comparison"] if "comparison" in higher else pd.Series("", index=higher.index)
    ax = _axes(ax)
    labels: list[str] = []
    for number, name in enumerate(names.unique()):
        rows = higher[names.to_numpy() == name].nlargest(n, change)
        place = np.arange(len(labels), len(labels) + len(rows))
        ax.barh(
            place,
            rows[change],
            xerr=rows[change.replace("_mean", "_std")],
            color=PALETTE[number % len(PALETTE)],
            error_kw={"elinewidth": 1, "ecolor": "#555555"},
            label=name or None,
        )
        labels.extend(map(str, rows.index))
    ax.set_yticks(np.arange(len(labels)), labels, fontsize=7)
    ax.invert_yaxis()
    if names.iloc[0]:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ax.set(xlabel=f"{_CHANGE_LABELS[change]}, with its standard deviation")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _columns(table: pd.DataFrame) -> tuple[str, str]:
    """The columns of a differential table that hold the change and the calls."""
    change = next((name for name in _CHANGE_LABELS if name in table), None)
    called = next((str(name) for name in table if str(name).startswith(("is_de_fdr", "is_da_fdr"))), None)
    if change is None or called is None:
        raise ValueError(
            "table holds no changes and calls: give what differential_expression or differential_accessibility "
            "return with mode='change'."
        )
    return change, called


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    made: Axes = require("matplotlib.pyplot", "plot").subplots()[1]
    return made
