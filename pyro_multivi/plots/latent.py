"""Pictures of the latent space and of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.data.checks import checked, shown
from pyro_multivi.plots.style import PALETTE, as_latent, axes_or_new, labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vP*X"


def principal_plane(latent: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Coordinates of cells in the plane of largest variance, (cells, 2)."""
    latent = as_latent(latent)
    centred = latent - latent.mean(0)
    if centred.shape[1] == 1:
        centred = np.column_stack([centred, np.zeros(len(centred))])
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    plane: NDArray[np.floating[Any]] = centred @ axes[:2].T
    return plane


@checked
def latent_scatter(
    latent: NDArray[np.floating[Any]], labels: Sequence[Any] | None = None, ax: Axes | None = None, title: str = ""
) -> Axes:
    """Cells in the two principal directions of the latent space.

    Parameters
    ----------
    latent
        (cells, K); shown as it is if K is 2.
    labels
        One per cell, shown by colour and, past eight labels, by marker.
    ax
        Axes to draw into; default: a new figure.
    title
        Title of the picture.
    """
    latent = as_latent(latent)
    if labels is not None and (isinstance(labels, (str, bytes)) or np.shape(labels) != (len(latent),)):
        raise ValueError(f"labels={shown(labels)} is not allowed: give one for each of the {len(latent)} cells.")
    ax = axes_or_new(ax)
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
    return labelled(ax, f"{kind} direction 1", f"{kind} direction 2", title=title)


@checked
def training_history(history: Mapping[str, pd.DataFrame], quantity: str = "elbo", ax: Axes | None = None) -> Axes:
    """A loss over epochs, of training and validation cells.

    Parameters
    ----------
    history
        ``model.history``.
    quantity
        Name without ``_train`` or ``_validation``.
    ax
        Axes to draw into; default: a new figure.

    Raises
    ------
    KeyError
        If the quantity was not recorded.
    """
    if not isinstance(history, Mapping):
        raise TypeError(f"history={shown(history)} is not allowed: give the history of a model, model.history.")
    found = [name for name in (f"{quantity}_train", f"{quantity}_validation") if name in history]
    if not found:
        known = sorted({name.rsplit("_", 1)[0] for name in history})
        raise KeyError(f"quantity={quantity!r} was not recorded; recorded are {', '.join(known)}.")
    ax = axes_or_new(ax)
    for place, name in enumerate(found):
        values = history[name][name].dropna()
        ax.plot(
            values.index + 1, values, color=PALETTE[place], linestyle=("-", "--")[place], label=name.rsplit("_", 1)[1]
        )
    ax.legend(frameon=False)
    label = "minus ELBO" if quantity == "elbo" else quantity.replace("_", " ")
    return labelled(ax, "epoch", f"{label} (nats per cell)")
