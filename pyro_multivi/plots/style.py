"""Colours and axes that all pictures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from pyro_multivi._optional import require
from pyro_multivi.data.checks import first_names, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's palette, which colour-blind readers can distinguish.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def axes_or_new(ax: Axes | None, height: float | None = None) -> Axes:
    """The given axes, or those of a new figure, by default as high as matplotlib's, with room for labels and legend."""
    if ax is not None:
        if not hasattr(ax, "transAxes"):
            raise TypeError(f"ax={shown(ax)} is not allowed: give one of matplotlib's Axes, or None for a new figure.")
        return ax
    figure, made = require("matplotlib.pyplot", "plot").subplots(layout="constrained")
    if height is not None:
        figure.set_figheight(max(height, figure.get_figheight()))
    return made


def check_table(argument: str, table: object, columns: Sequence[str]) -> None:
    """Refuse what is no frame with some columns."""
    if not isinstance(table, pd.DataFrame):
        raise TypeError(f"{argument}={shown(table)} is not allowed: give a table, a pandas DataFrame.")
    absent = [name for name in columns if name not in table]
    if absent:
        raise ValueError(
            f"{argument} lacks the columns {first_names(absent)}: give the table that the docstring names; it has "
            f"{first_names(table.columns) or 'none'}."
        )


def as_latent(latent: ArrayLike, argument: str = "latent") -> NDArray[np.floating[Any]]:
    """Latent states as an array, (cells, K)."""
    try:
        found = np.asarray(latent, dtype=float)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 2 or 0 in found.shape or not np.isfinite(found).all():
        raise ValueError(
            f"{argument}={shown(latent)} is not allowed: give finite numbers of shape (cells, K), as "
            "get_latent_representation returns them."
        )
    return found


def as_written(name: object) -> str:
    """A name as matplotlib draws it unchanged: what stands between two dollar signs is no formula.

    One that begins with an underscore, which matplotlib leaves out of legends, begins with a space.
    """
    text = str(name).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def outline() -> Any:
    """White around letters, which are then readable on points."""
    return require("matplotlib.patheffects", "plot").withStroke(linewidth=2.5, foreground="white")


def whole_numbers() -> Any:
    """Ticks at whole numbers, in steps that are easy to read."""
    return require("matplotlib.ticker", "plot").MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10])


def labelled(ax: Axes, x: str, y: str, **options: Any) -> Axes:
    """The axes with labels, further properties, and without the frame's top and right sides."""
    ax.set(xlabel=as_written(x), ylabel=as_written(y), **options)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


#: Units of statistics of a predictive check; those of counts are of genes and proteins alone.
_UNITS = {
    "mean": "counts",
    "variance": "counts²",
    "zero_fraction": "share of cells",
    "detection_rate": "share of cells",
    "expression_depth": "counts",
    "protein_depth": "counts",
}


def statistic_name(statistic: str, unit: bool = False) -> str:
    """A statistic of a predictive check as a reader would say it, with its unit if that is asked for and known.

    Examples
    --------
    >>> statistic_name("zero_fraction", unit=True), statistic_name("cv")
    ('zero fraction (share of cells)', 'coefficient of variation')
    """
    name = "coefficient of variation" if statistic == "cv" else statistic.replace("_", " ")
    return f"{name} ({_UNITS[statistic]})" if unit and statistic in _UNITS else name


def distinct_colours(n: int) -> list[str]:
    """Colours that differ as much as they can: the palette, then each farthest from those before it.

    Examples
    --------
    >>> colours = distinct_colours(45)
    >>> colours[:2], len(set(colours))
    (['#0072B2', '#E69F00'], 45)
    """
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    levels = np.linspace(0, 1, 12)
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lab = _lab(candidates)
    # Neither too light on white nor so dark that all look black.
    usable = (lab[:, 0] > 30) & (lab[:, 0] < 82)
    candidates, lab = candidates[usable], lab[usable]
    taken = np.array([[int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)] for colour in PALETTE])
    nearest = np.linalg.norm(lab[:, None] - _lab(taken), axis=-1).min(1)
    found = list(PALETTE)
    while len(found) < n:
        best = int(nearest.argmax())
        found.append("#" + "".join(f"{round(255 * value):02X}" for value in candidates[best]))
        nearest = np.minimum(nearest, np.linalg.norm(lab - lab[best], axis=-1))
    return found


def _lab(rgb: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """CIE L*a*b* of sRGB colours, (n, 3): in it distances are about as large as they look."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(linear @ to_xyz.T / to_xyz.sum(1)).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
