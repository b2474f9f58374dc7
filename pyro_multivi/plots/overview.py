"""First picture of a trained model: latent space, training, check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi._optional import require
from pyro_multivi.data.checks import checked
from pyro_multivi.data.checks import shown as shown_value
from pyro_multivi.plots.latent import COMPACT, latent_scatter, legend_columns, training_history
from pyro_multivi.plots.style import PALETTE, as_latent, axes_or_new, check_table, labelled, statistic_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = PALETTE[0], PALETTE[5], "#B0B0B0"
# Fewest values of a statistic that has a bar.
_FEWEST = 10
# Most bars that have names in letters of the usual size.
_LOOSE = 10
# Size of the figure in inches, and height of a row of a legend below it.
_WIDTH, _HEIGHT, _ROW = 12, 8, 0.17


@checked
def check_summary(summary: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of each statistic outside the central interval of its replicates, beside the share expected.

    Bars are blue, orange where the statistic fails, and grey where there is no test.

    Parameters
    ----------
    summary
        From :meth:`~pyro_multivi.posterior.checks.result.PredictiveCheck.summary`; statistics within batches and groups
        are left out.
    ax
        Axes to draw into; default: a new figure.
    """
    check_table("summary", summary, ("table", "statistic", "n", "data_above", "data_below", "expected", "fails"))
    ax = axes_or_new(ax)
    whole = summary[~summary["table"].str.contains(" by ")]
    # Of very few values the share outside says nothing, unless they fail.
    shown = whole[(whole["n"] >= _FEWEST) | whole["fails"].astype("boolean").fillna(False)]
    share = 100 * (shown["data_above"] + shown["data_below"]).to_numpy(dtype=float)
    names = [
        f"{name}, {table}" if table not in name else name
        for name, table in zip(
            map(statistic_name, shown["statistic"]), shown["table"].str.removeprefix("extra: "), strict=True
        )
    ]
    place = np.arange(len(shown))[::-1]
    colours = [_GREY if pd.isna(fails) else _ORANGE if fails else _BLUE for fails in shown["fails"]]
    ax.barh(place, share, color=colours, height=0.7)
    expected = 100 * float(shown["expected"].mean()) if len(shown) else 0.0
    for at, value, n in zip(place, share, shown["n"], strict=True):
        # Of a single value, 100 % would say more than there is.
        text = f"{value:.0f} %" if n >= _FEWEST else f"{round(value * n / 100)} of {n}"
        ax.text(max(value, expected), at, f" {text}", va="center", fontsize="small")
    ax.set_yticks(place, names, fontsize="medium" if len(shown) <= _LOOSE else "small")
    ax.axvline(expected, color="black", linewidth=1, linestyle=":")
    end = max(4 * expected, 1.2 * share.max(initial=0))
    ax.set_xlim(0, end)
    # No share is above 100 %, and the label of a tick there would be cut off.
    ax.set_xticks([tick for tick in ax.get_xticks() if 0 <= tick <= min(end, 100)])
    tested = whole["fails"].dropna()
    title = f"predictive check: {int(tested.astype(bool).sum())} of {len(tested)} fail"
    look = "orange: fails, grey: no test" if shown["fails"].isna().any() else "orange: fails"
    return labelled(ax, f"% outside replicates\n(dotted: {expected:.0f} % expected,\n{look})", "", title=title)


@checked
def overview(
    xy: NDArray[np.floating[Any]],
    directions: str,
    colourings: Mapping[str, Sequence[Any] | None],
    history: Mapping[str, pd.DataFrame],
    summary: pd.DataFrame | None = None,
) -> Figure:
    """Cells in coordinates of the latent space, beside the training curve and the summary of a check.

    Parameters
    ----------
    xy
        Coordinates, (cells, 2).
    directions
        Their name.
    colourings
        Labels of the cells by title: one picture each, at most two.
    history
        ``model.history``.
    summary
        Of a predictive check; None leaves its panel out.
    """
    xy = as_latent(xy, "xy")
    if not isinstance(colourings, Mapping) or not 1 <= len(colourings) <= 2:
        raise ValueError(f"colourings={shown_value(colourings)} is not allowed: give one or two, a dict of labels.")
    figure: Figure = require("matplotlib.figure", "plot").Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    single = len(colourings) == 1
    parts: Any = (
        figure.subfigures(1, 2, width_ratios=[0.6, 0.4]) if single else figure.subfigures(2, height_ratios=[1.6, 1])
    )
    cells, rest = parts
    width = 0.6 * _WIDTH if single else _WIDTH
    axes = cells.subplot_mosaic([["0"]] if single else [["0", "1"]])
    names = ["training"] if summary is None else ["training", "check"]
    axes |= rest.subplot_mosaic([[name] for name in names] if single else [names])
    for place, (title, labels) in enumerate(colourings.items()):
        ax = latent_scatter(xy, labels, axes[str(place)], title, directions)
        ax.set(xticks=[], yticks=[])
        legend = ax.get_legend()
        if place == 0 and legend is not None and len(legend.get_texts()) > len(PALETTE):
            # A long one below all pictures of the cells, and the figure higher by it.
            handles, texts = legend.legend_handles, [text.get_text() for text in legend.get_texts()]
            legend.remove()
            n = legend_columns(texts, width)
            cells.legend(handles, texts, loc="outside lower center", ncols=n, **COMPACT)
            figure.set_size_inches(_WIDTH, _HEIGHT + _ROW * -(-len(texts) // n))
    training_history(history, "elbo", axes["training"]).set_title("training")
    if summary is not None:
        check_summary(summary, axes["check"])
    return figure
