"""Pictures of the latent space and of training."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi._optional import require
from pyro_multivi.data.checks import checked
from pyro_multivi.data.checks import shown as shown_value
from pyro_multivi.plots.style import (
    PALETTE,
    as_latent,
    as_written,
    axes_or_new,
    distinct_colours,
    labelled,
    outline,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# More categories than these are drawn as one: nobody tells their colours apart.
_MOST_CATEGORIES = 60
# Of fewer cells there are no neighbours to be kept.
_FEWEST_CELLS = 4
# Letters of a label beside the unit on one line.
_SHORT = 16
# Letters of an entry of the legend, and the width of one in inches.
_LONGEST, _LETTER = 26, 0.07
# Height of the labels of an axis, size of a number at cells, both in inches; cells of a category tried for its number.
_LABELS, _NUMBER, _TRIED = 0.5, np.array([0.17, 0.12]), 100
#: Look of a legend with many entries.
COMPACT: dict[str, Any] = {"frameon": False, "fontsize": "small", "handletextpad": 0.1, "columnspacing": 0.8}
_MISSING, _OTHER = "#D9D9D9", "#8C8C8C"


def as_words(labels: pd.Series[Any]) -> Any:
    """Labels as words; missing ones stay missing."""
    return labels.astype(str).astype(object).where(labels.notna().to_numpy(), None).to_numpy(dtype=object)


def principal_plane(latent: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Coordinates of cells in the plane of largest variance, (cells, 2)."""
    latent = as_latent(latent)
    centred = latent - latent.mean(0)
    if centred.shape[1] == 1:
        centred = np.column_stack([centred, np.zeros(len(centred))])
    # Whole, so that there are two of a single cell too.
    _, _, axes = np.linalg.svd(centred, full_matrices=len(centred) < 2)
    return centred @ axes[:2].T


@checked
def neighbour_embedding(latent: NDArray[np.floating[Any]], seed: int = 0) -> tuple[NDArray[np.floating[Any]], str]:
    """Coordinates in which neighbours in the latent space stay neighbours: UMAP where it is installed, else t-SNE.

    Distances between clusters and their sizes mean nothing in them.

    Parameters
    ----------
    latent
        (cells, K), at least four cells.
    seed
        Seed of the optimisation.

    Returns
    -------
    ndarray, str
        Coordinates (cells, 2), and the name of the method.

    Raises
    ------
    ValueError
        If ``latent`` is no such matrix.
    ImportError
        Without umap-learn and scikit-learn (extra ``plot``).
    """
    latent = as_latent(latent)
    if len(latent) < _FEWEST_CELLS:
        raise ValueError(f"latent of {len(latent)} cells is not allowed: give at least {_FEWEST_CELLS}.")
    if find_spec("umap") is not None:
        with warnings.catch_warnings():
            # It says that a seed takes it one thread.
            warnings.simplefilter("ignore", UserWarning)
            return require("umap", "plot").UMAP(random_state=seed).fit_transform(latent), "UMAP"
    perplexity = min(30.0, (len(latent) - 1) / 3)
    manifold = require("sklearn.manifold", "plot")
    return manifold.TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(latent), "t-SNE"


@checked
def latent_scatter(
    latent: NDArray[np.floating[Any]],
    labels: Sequence[Any] | None = None,
    ax: Axes | None = None,
    title: str = "",
    directions: str | None = None,
) -> Axes:
    """Cells in the two principal directions of the latent space, or in coordinates of your own.

    Labels are categories, or numbers of which there are many: these have a colour bar. Past eight categories each has
    a number as well, which stands at its cells and in the legend. A missing label is grey.

    Parameters
    ----------
    latent
        (cells, K); shown as it is if K is 2.
    labels
        One per cell.
    ax
        Axes to draw into; default: a new figure.
    title
        Title of the picture.
    directions
        Name of the axes, for instance that of an embedding.
    """
    latent = as_latent(latent)
    if labels is not None and (isinstance(labels, (str, bytes)) or np.shape(labels) != (len(latent),)):
        raise ValueError(f"labels={shown_value(labels)} is not allowed: give one for each of the {len(latent)} cells.")
    ax = axes_or_new(ax)
    xy = latent if latent.shape[1] == 2 else principal_plane(latent)
    size = float(np.clip(12_000 / max(len(xy), 1), 3, 16))
    options: dict[str, Any] = {"s": size, "alpha": 0.8, "linewidths": 0}
    values = pd.Series(np.zeros(len(xy)) if labels is None else np.asarray(labels))
    missing = values.isna().to_numpy()
    if missing.any():
        ax.scatter(xy[missing, 0], xy[missing, 1], color=_MISSING, **options)
    if labels is not None and is_continuous(values):
        # In random order: no value lies on top of the others.
        order = np.random.default_rng(0).permutation(np.flatnonzero(~missing))
        points = ax.scatter(
            xy[order, 0], xy[order, 1], c=values.to_numpy(dtype=float)[order], cmap="viridis", **options
        )
        ax.figure.colorbar(points, ax=ax)
    else:
        _draw_categories(
            ax, xy[~missing], values[~missing].to_numpy(), labels is not None, bool(missing.any()), options
        )
    kind = directions or ("latent direction" if latent.shape[1] == 2 else "principal direction")
    return labelled(ax, f"{kind} 1", f"{kind} 2", title=title)


def is_continuous(labels: pd.Series[Any]) -> bool:
    """Whether labels are numbers, and too many or too uneven to be names of groups."""
    if not pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels):
        return False
    values = labels.dropna().unique()
    return len(values) > _MOST_CATEGORIES or (len(values) > len(PALETTE) and bool((values % 1 != 0).any()))


def _draw_categories(
    ax: Axes, xy: Any, labels: NDArray[Any], legend: bool, missing: bool, options: Mapping[str, Any]
) -> None:
    sizes = pd.Series(labels).value_counts()
    names = sorted(sizes.index[:_MOST_CATEGORIES], key=_natural)
    code = pd.Index(names).get_indexer(labels)
    # The last colour is of all categories that have none of their own.
    colours = np.array([*distinct_colours(len(names)), _OTHER])
    order = np.random.default_rng(0).permutation(len(xy))
    ax.scatter(xy[order, 0], xy[order, 1], c=colours[code][order], **options)
    if not legend:
        return
    numbered = len(names) > len(PALETTE)
    shown = [f"{place + 1}  {name}" if numbered else str(name) for place, name in enumerate(names)]
    entries = [*zip(shown, colours, strict=False)]
    if len(sizes) > len(names):
        entries.append((f"other ({len(sizes) - len(names)} categories)", _OTHER))
    if missing:
        entries.append(("missing", _MISSING))
    handles = [
        require("matplotlib.lines", "plot").Line2D([], [], linestyle="", marker="o", markersize=5, color=colour)
        for _, colour in entries
    ]
    texts = [as_written(_shortened(text)) for text, _ in entries]
    if not numbered:
        ax.legend(handles, texts, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, handletextpad=0.1)
        return
    # Below, in as many columns as there is room for: beside it they would leave none for the cells.
    size = np.array([ax.get_window_extent().width, ax.get_window_extent().height]) / ax.figure.dpi
    columns = legend_columns(texts, size[0])
    below = require("matplotlib.transforms", "plot").ScaledTranslation(0, -_LABELS, ax.figure.dpi_scale_trans)
    place_of: dict[str, Any] = {"bbox_to_anchor": (0.5, 0), "bbox_transform": ax.transAxes + below}
    ax.legend(handles, texts, loc="upper center", ncols=columns, **place_of, **COMPACT)
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "weight": "bold"}
    for place, (x, y) in enumerate(_places_of_numbers(xy, code, len(names), np.ptp(xy, axis=0) * _NUMBER / size)):
        ax.text(x, y, str(place + 1), path_effects=[outline()], **style)


def _places_of_numbers(xy: Any, code: NDArray[Any], n: int, room: NDArray[Any]) -> list[NDArray[Any]]:
    """A cell of each category near its median, not where the number of another stands if there is room elsewhere."""
    taken: list[NDArray[Any]] = []
    for place in range(n):
        cells = xy[code == place]
        # At one of its cells: the median of two clusters lies between them.
        near = cells[np.argsort(np.linalg.norm(cells - np.median(cells, axis=0), axis=1), kind="stable")]
        tried = near[:: 1 + len(near) // _TRIED]
        free = (cell for cell in tried if not any((np.abs(other - cell) < room).all() for other in taken))
        taken.append(next(free, near[0]))
    return taken


def _shortened(name: str) -> str:
    """A name for the legend, cut in its middle: names of one kind often differ at their end.

    Examples
    --------
    >>> _shortened("CD8+ effector memory T cell 12")
    'CD8+ effector m…T cell 12'
    """
    return name if len(name) <= _LONGEST else f"{name[:15]}…{name[-9:]}"


def legend_columns(texts: Sequence[str], width: float) -> int:
    """Columns of a legend in small letters that fit in a width in inches."""
    return max(1, int(width / (_LETTER * (max(map(len, texts)) + 4))))


def _natural(name: Any) -> list[Any]:
    """Order in which "cluster 10" follows "cluster 9"."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", str(name))]


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
        If the quantity was not recorded, or nothing was.
    """
    if not isinstance(history, Mapping):
        raise TypeError(f"history={shown_value(history)} is not allowed: give the history of a model, model.history.")
    if not history:
        raise KeyError("history is empty: the model was trained for no epoch.")
    found = [name for name in (f"{quantity}_train", f"{quantity}_validation") if name in history]
    if not found:
        known = sorted({name.rsplit("_", 1)[0] for name in history})
        raise KeyError(f"quantity={quantity!r} was not recorded; recorded are {', '.join(known)}.")
    ax = axes_or_new(ax)
    for place, name in enumerate(found):
        values = history[name][name].dropna()
        # A line of a single epoch would not be seen.
        style: dict[str, Any] = {"marker": "o" if len(values) == 1 else "", "label": name.rsplit("_", 1)[1]}
        ax.plot(values.index + 1, values, color=PALETTE[place], linestyle=("-", "--")[place], **style)
    ax.xaxis.set_major_locator(whole_numbers())
    ax.legend(frameon=False)
    label = "minus ELBO" if quantity == "elbo" else quantity.replace("_", " ")
    # Long names in two lines, for low axes.
    return labelled(ax, "epoch", f"{label}{' ' if len(label) <= _SHORT else chr(10)}(nats per cell)")
