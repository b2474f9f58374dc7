"""Picture that ``demo`` and ``train`` leave: neighbours in the latent space, training, a check of held-out cells."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi._optional import require
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.vocabulary import PAIRED
from pyro_multivi.plots.latent import as_words, is_continuous, neighbour_embedding, principal_plane
from pyro_multivi.plots.overview import overview

# An embedding of more cells takes minutes and shows no more; of fewer there are no neighbours to speak of.
_MOST_CELLS, _FEWEST_CELLS = 5000, 30
# A check of these takes seconds; replicates are the fewest that 95 % intervals need.
_CHECKED_CELLS, _REPLICATES = 200, 40


def first_picture(
    model: MULTIVI, latent: NDArray[Any], labels: Mapping[str, pd.Series[Any]] | None, seed: int
) -> bytes | None:
    """The picture as PNG; None and a hint without matplotlib.

    Parameters
    ----------
    model
        Trained model with its data.
    latent
        Latent state of its cells, (cells, K).
    labels
        One column of labels by its name, or None.
    seed
        Seed of the embedding and of the cells that are drawn and checked.
    """
    try:
        require("matplotlib.figure", "plot")
    except ImportError as error:
        print(f"no picture: {error}")
        return None
    rng = np.random.default_rng(seed)
    shown = np.sort(rng.permutation(len(latent))[:_MOST_CELLS])
    part = f" ({len(shown)} of {len(latent)} cells)" if len(shown) < len(latent) else ""
    colourings = {name: _drawable(values)[shown] for name, values in (labels or {}).items()}
    colourings |= {name: values[shown] for name, values in _origins(model).items()}
    two: dict[str, Any] = {f"{name}{part}": colourings[name] for name in [*colourings][:2]}
    xy, directions = _embedded(latent[shown], seed)
    figure = overview(xy, directions, two or {f"latent space{part}": None}, model.history, _checked(model, rng))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _drawable(labels: pd.Series[Any]) -> NDArray[Any]:
    """Numbers as they are, categories as strings; missing ones stay missing."""
    if is_continuous(labels):
        return labels.to_numpy(dtype=float, na_value=np.nan)
    return as_words(labels)


def _origins(model: MULTIVI) -> dict[str, NDArray[Any]]:
    """What cells should be mixed by: measured modalities and batch, each if there is more than one."""
    table = model._training_table()
    has = {modality: modality.measured_in(table).numpy() for modality in MODALITIES}
    pattern = np.full(len(table), PAIRED, dtype=object)
    for modality in MODALITIES:
        pattern[has[modality] & ~np.all([*has.values()], axis=0)] = f"{modality.assay} only"
    batch = np.array(model.spec.batch_categories, dtype=object)[table.batch_code.numpy()]
    origins = {"measured modalities": pattern, model.spec.setup.batch_key or "batch": batch}
    return {name: values for name, values in origins.items() if len(set(values)) > 1}


def _embedded(latent: NDArray[Any], seed: int) -> tuple[NDArray[Any], str]:
    if len(latent) < _FEWEST_CELLS:
        return principal_plane(latent), "principal direction"
    try:
        return neighbour_embedding(latent, seed)
    except ImportError as error:
        print(f"the picture shows the two principal directions instead of neighbours: {error}")
        return principal_plane(latent), "principal direction"


def _checked(model: MULTIVI, rng: np.random.Generator) -> pd.DataFrame | None:
    """Summary of a small check; None and a remark if no cells were held out."""
    held_out = rng.permutation(model.validation_indices)[:_CHECKED_CELLS]
    if len(held_out) == 0:
        print("no check in the picture: no cells were held out")
        return None
    check = model.posterior_predictive_check(
        indices=np.sort(held_out), n_samples=_REPLICATES, hide_modalities=False, seed=0
    )
    return check.summary()
