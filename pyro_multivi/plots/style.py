"""Colours and axes that all pictures share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyro_multivi._optional import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's palette, which colour-blind readers can distinguish.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def axes_or_new(ax: Axes | None) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        return ax
    made: Axes = require("matplotlib.pyplot", "plot").subplots()[1]
    return made


def labelled(ax: Axes, x: str, y: str, **options: Any) -> Axes:
    """The axes with labels, further properties, and without the frame's top and right sides."""
    ax.set(xlabel=x, ylabel=y, **options)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
