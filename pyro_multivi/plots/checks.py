"""Pictures of a predictive check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi._optional import require
from pyro_multivi.data.checks import check_choice, check_probability, checked
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.plots.style import PALETTE, axes_or_new, check_table, labelled, statistic_name, whole_numbers
from pyro_multivi.posterior.checks.result import outside

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE = PALETTE[0], PALETTE[5]
# More points than this make a picture slow and no clearer: a random part is drawn.
_MOST_POINTS = 4000
# Columns that name what a row of a table is of.
_THINGS = ("gene", "region", "feature", "cell")


@checked
def observed_against_replicated(
    table: pd.DataFrame, statistic: str, ax: Axes | None = None, level: float = 0.95, log: bool | None = None
) -> Axes:
    """Scatter plot of an observed statistic against its replicates; on the diagonal they agree.

    Parameters
    ----------
    table
        ``genes``, ``regions`` or ``cells`` of a :class:`~pyro_multivi.posterior.checks.result.PredictiveCheck`.
    statistic
        Name of the statistic.
    ax
        Axes to draw into; default: a new figure.
    level
        Probability of the table's intervals; points outside are orange triangles.
    log
        Logarithmic axes, linear next to zero; default: where positive values span more than a factor of 30.

    Raises
    ------
    KeyError
        If the table does not hold the statistic.
    """
    part = _of_statistic(table, statistic)
    level = check_probability("level", level, 0.95)
    part = part.dropna(subset=["observed", "replicated"])
    is_outside = pd.Series(np.logical_or(*outside(part["p_value"], level)), index=part.index)
    n_outside, n = int(is_outside.sum()), len(part)
    part = _drawn(part, "observed")
    is_outside = is_outside.loc[part.index]
    ax = axes_or_new(ax)
    for chosen, colour, marker, label in (
        (~is_outside, _BLUE, "o", f"inside ({n - n_outside})"),
        (is_outside, _ORANGE, "^", f"outside ({n_outside})"),
    ):
        _draw_points(ax, part[chosen], color=colour, fmt=marker, label=label)
    _draw_diagonal(ax, part[["observed", "replicated"]].to_numpy(), log)
    # Bars may reach below it: they shine through, and the words stay readable.
    frame: dict[str, Any] = {"framealpha": 0.8, "edgecolor": "none", "fontsize": "small", "title_fontsize": "small"}
    ax.legend(loc="upper left", title=f"{level:.0%} of replicates", **frame)
    name = statistic_name(statistic, unit=True)
    return labelled(ax, f"{name}, replicated", f"{name}, observed")


def _drawn(points: pd.DataFrame, height: str) -> pd.DataFrame:
    """Points to be drawn: the highest, which are few and may be all that fails, and a random part of the others."""
    if len(points) <= _MOST_POINTS:
        return points
    highest = points.nlargest(_MOST_POINTS // 4, height)
    rest = points.drop(highest.index).sample(_MOST_POINTS - len(highest), random_state=0)
    return pd.concat([highest, rest])


def _draw_points(ax: Axes, points: pd.DataFrame, **style: Any) -> None:
    """Draw observed against replicated values, with the intervals of the latter as bars."""
    columns = ("replicated", "observed", "lower", "upper")
    replicated, observed, lower, upper = (points[name].to_numpy() for name in columns)
    # Lists: matplotlib takes the float of an array or Series that holds a single point, which both deprecate.
    width = [error.clip(min=0).tolist() for error in (replicated - lower, upper - replicated)]
    ax.errorbar(replicated, observed, xerr=width, markersize=4, markeredgewidth=0, elinewidth=0.6, alpha=0.65, **style)


def _draw_diagonal(ax: Axes, both: NDArray[Any], log: bool | None, colour: str = "black") -> None:
    """Draw the line of equal values over their range, and make the axes logarithmic where that shows more."""
    both = both[np.isfinite(both)]
    if not both.size:
        return
    positive = both[both > 0]
    if log is None:
        log = bool(positive.size and both.min() >= 0 and positive.max() > 30 * positive.min())
    if log and positive.size:
        # Zeros are drawn a decade below all but the very smallest values.
        least = 10.0 ** np.floor(np.log10(np.quantile(positive, 0.02)))
        ax.set_xscale("symlog", linthresh=least)
        ax.set_yscale("symlog", linthresh=least)
    ends = [both.min(), both.max()]
    ax.plot(ends, ends, color=colour, linewidth=1, zorder=3)


@checked
def rootogram(histogram: pd.DataFrame, ax: Axes | None = None, start: int = 0) -> Axes:
    """Hanging rootogram (Tukey): bars of observed counts hang from the curve of replicated ones.

    Parameters
    ----------
    histogram
        ``histogram`` of a :class:`~pyro_multivi.posterior.checks.result.PredictiveCheck`.
    ax
        Axes to draw into; default: a new figure.
    start
        Smallest count shown: zeros may dwarf all others.
    """
    check_table("histogram", histogram, ("count", "observed", "replicated", "lower", "upper"))
    if not (histogram["count"] >= start).any():
        raise ValueError(f"start={start} is not allowed: the largest count of the histogram is less.")
    ax = axes_or_new(ax)
    histogram = histogram[histogram["count"] >= start]
    count = histogram["count"].to_numpy()
    observed, expected, lower, upper = (
        np.sqrt(histogram[name].to_numpy()) for name in ("observed", "replicated", "lower", "upper")
    )
    ax.bar(count, observed, bottom=expected - observed, width=0.8, color=PALETTE[4], label="observed")
    ax.fill_between(count, lower, upper, color=_ORANGE, alpha=0.3, linewidth=0, label="interval of replicates")
    ax.plot(count, expected, color=_ORANGE, marker="o", markersize=4, label="replicated")
    ax.axhline(0, color="black", linewidth=1)
    every = 1 if len(count) <= 10 else 5
    ticks = [tick for tick in count.tolist() if tick % every == 0 and tick + every / 2 < count[-1]]
    ax.set_xticks([*ticks, count[-1]], [*map(str, ticks), f"{count[-1]}+"])
    ax.legend(frameon=False)
    return labelled(ax, "count of a gene in a cell", "square root of how often it occurs")


@checked
def calibration_curve(reliability: pd.DataFrame, ax: Axes | None = None, least: int = 100) -> Axes:
    """Share of regions that were open against the predicted probability, with bars of 95 % for the error of counting.

    Parameters
    ----------
    reliability
        ``reliability`` of a :class:`~pyro_multivi.posterior.checks.result.PredictiveCheck`.
    ax
        Axes to draw into; default: a new figure.
    least
        Bins of fewer cell-region pairs are left out: their share is mostly chance.
    """
    check_table("reliability", reliability, ("setting", "n", "predicted", "observed"))
    ax = axes_or_new(ax)
    shown = reliability[reliability["n"] >= least]
    for place, (setting, part) in enumerate(shown.groupby("setting", sort=False)):
        # Error of independent pairs, which those of one cell are only nearly.
        error = 1.96 * np.sqrt(part["observed"] * (1 - part["observed"]) / part["n"])
        ax.errorbar(
            part["predicted"],
            part["observed"],
            yerr=error,
            **_look(place),
            markersize=5,
            elinewidth=1,
            label=str(setting),
        )
    end = max(0.05, float(shown[["predicted", "observed"]].to_numpy().max()) if len(shown) else 1.0)
    ax.plot([0, end], [0, end], color="black", linewidth=1)
    if len(shown):
        ax.legend(frameon=False)
    return labelled(ax, "predicted probability of being open", "share open, observed")


def coverage_curve(coverage: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of intervals of expression that hold the measured count, against their nominal probability.

    Parameters
    ----------
    coverage
        ``coverage`` of a :class:`~pyro_multivi.posterior.checks.result.PredictiveCheck`.
    ax
        Axes to draw into; default: a new figure.
    """
    check_table("coverage", coverage, ("setting", "counts", "nominal", "covered"))
    ax = axes_or_new(ax)
    for place, ((setting, counts), part) in enumerate(coverage.groupby(["setting", "counts"], sort=False)):
        ax.plot(part["nominal"], part["covered"], **_look(place), markersize=4, label=f"{setting}, {counts}")
    ax.plot([0, 1], [0, 1], color="black", linewidth=1)
    # Of the two corners that the curves leave free.
    ax.legend(loc="lower right", fontsize="small", framealpha=0.8, edgecolor="none")
    return labelled(ax, "probability of the interval", "share of counts inside, observed", xlim=(0, 1), ylim=(0, 1))


@checked
def imputed_against_measured(imputed: pd.DataFrame, modality: str, ax: Axes | None = None) -> Axes:
    """Measured against predicted means of the features of a hidden modality, coloured by correlation over cells.

    Features without a correlation, since they do not vary over the cells, are grey.

    Parameters
    ----------
    imputed
        ``imputed`` of a :class:`~pyro_multivi.posterior.checks.result.PredictiveCheck`.
    modality
        ``"expression"``, ``"accessibility"``, ``"protein"`` or the name of another extra modality.
    ax
        Axes to draw into; default: a new figure.

    Raises
    ------
    KeyError
        If the modality was not hidden.
    """
    check_table("imputed", imputed, ("modality", "measured", "imputed", "correlation"))
    known = [each.name for each in MODALITIES]
    check_choice("modality", modality, list(dict.fromkeys([*known, *imputed["modality"].unique()])))
    part = imputed[imputed["modality"] == modality]
    if not len(part):
        raise KeyError(f"modality={modality!r} was not hidden and predicted in this check.")
    ax = axes_or_new(ax)
    # Features that vary most with the prediction on top.
    shown = _drawn(part, "measured").sort_values("correlation", na_position="first")
    colours = require("matplotlib", "plot").colormaps["cividis"].with_extremes(bad="#B0B0B0")
    style: dict[str, Any] = {"cmap": colours, "vmin": 0, "vmax": 1, "plotnonfinite": True, "s": 12}
    points = ax.scatter(shown["imputed"], shown["measured"], c=shown["correlation"], **style)
    lowest = "min" if (shown["correlation"] < 0).any() else "neither"
    ax.figure.colorbar(points, ax=ax, label="correlation over cells", extend=lowest)
    _draw_diagonal(ax, shown[["measured", "imputed"]].to_numpy(), None, _ORANGE)
    return labelled(ax, f"mean {modality}, predicted", f"mean {modality}, observed")


@checked
def p_value_histogram(table: pd.DataFrame, statistic: str, ax: Axes | None = None) -> Axes:
    """Histogram of the Bayesian p-values of a statistic; under the right model the bars are level.

    Parameters
    ----------
    table
        As for :func:`observed_against_replicated`.
    statistic
        Name of the statistic.
    ax
        Axes to draw into; default: a new figure.
    """
    part = _of_statistic(table, statistic)
    p = part["p_value"].dropna()
    things = next((f"{name}s" for name in _THINGS if name in part), "values")
    ax = axes_or_new(ax)
    edges = np.linspace(0, 1, 21)
    ax.hist(p, edges.tolist(), color=PALETTE[4], edgecolor="white")
    ax.yaxis.set_major_locator(whole_numbers())
    ax.axhline(len(p) / (len(edges) - 1), color=_ORANGE, linestyle="--", linewidth=1.5, label="expected")
    ax.legend(frameon=False)
    return labelled(ax, f"p-value, {statistic_name(statistic)}", f"number of {things}")


def _of_statistic(table: pd.DataFrame, statistic: str) -> pd.DataFrame:
    """Rows of a statistic."""
    check_table("table", table, ("statistic", "observed", "replicated", "lower", "upper", "p_value"))
    part = table[table["statistic"] == statistic]
    if not len(part):
        known = ", ".join(map(repr, pd.unique(table["statistic"])))
        raise KeyError(f"statistic={statistic!r} is not in the table: choose from {known}.")
    return part


def _look(place: int) -> dict[str, Any]:
    """Colour, line and marker of a curve."""
    # As many colours as are dark enough on white, and other numbers of lines and markers: no two curves look alike.
    colour, line = PALETTE[(0, 5, 2, 3, 1, 4, 7)[place % 7]], ("-", "--", ":", "-.")[place % 4]
    return {"color": colour, "linestyle": line, "marker": "osD^vPX*"[place % 8]}
