"""Layout of minified data: what is kept of each cell's posterior, where, and how it is known to be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.setup.options import UNS_KEY

#: Key of ``obsm`` with the posterior, (n, P).
OBSM_KEY = "pyro_multivi_posterior"
#: Column of ``obs`` with the RNA counts of each cell, by scvi-tools' name.
OBSERVED_LIBRARY = "observed_lib_size"
#: Entries of ``uns["pyro_multivi"]``: the kind of minified data, and the digest of the weights that it came from.
KIND, WEIGHTS = "minified", "minified_by"

#: Parts of a row in their order, with their width: so many columns, and so many times the dimension of z.
_PARTS: dict[str, tuple[int, int]] = {
    "measured": (len(MODALITIES), 0),
    "total": (len(MODALITIES), 0),
    "library": (2, 0),
    "factor": (1, 0),
    "z": (0, 2),
    **{modality.name: (0, 2) for modality in MODALITIES},
}
#: A column behind them, where the cell factor is inferred.
FACTOR_SD = "factor_sd"
_FIXED = sum(fixed for fixed, _ in _PARTS.values())
_TIMES = sum(times for _, times in _PARTS.values())


def stored_part(stored: Any, name: str) -> Any:
    """One part of the posterior of some cells, an array or tensor.

    Parameters
    ----------
    stored
        (B, P).
    name
        ``"measured"``: whether a cell has each modality, (B, 2). ``"total"``: its RNA counts and its number of open
        regions or of fragments, (B, 2). ``"library"``: mean and standard deviation of log l, (B, 2). ``"factor"``: the
        mean of logit d, or of log d where fragments are counted, whose standard deviation ``"factor_sd"`` is; without
        it d itself, (B, 1). ``"z"``, or the name of a modality: mean and standard deviation of z given all or that,
        (B, 2 K).

    Examples
    --------
    >>> stored = np.arange(19.0)[None]  # K = 2
    >>> stored_part(stored, "library"), stored_part(stored, "z")
    (array([[4., 5.]]), array([[ 7.,  8.,  9., 10.]]))
    """
    latent, start = (stored.shape[1] - _FIXED) // _TIMES, 0
    for other, (fixed, times) in _PARTS.items():
        width = fixed + times * latent
        if other == name:
            return stored[:, start : start + width]
        start += width
    if name == FACTOR_SD and has_factor_sd(stored):
        return stored[:, start:]
    raise KeyError(name)


def has_factor_sd(stored: Any) -> bool:
    """Whether the posterior of some cells, (B, P), has a standard deviation of the cell factor."""
    return bool((stored.shape[1] - _FIXED) % _TIMES)


def packed(parts: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """The posterior of some cells, (B, P), of all its parts, each (B, its width)."""
    columns = [parts[name].cpu().numpy() for name in (*_PARTS, FACTOR_SD) if name in parts or name in _PARTS]
    return np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")


def kind_of(data: Any) -> str | None:
    """The kind of minified data that an AnnData or MuData is; None for others."""
    kept = data.uns.get(UNS_KEY)
    found = kept.get(KIND) if isinstance(kept, Mapping) else None
    return None if found is None else str(found)


def weights_of(data: Any) -> str:
    """Digest of the weights of the model that minified an object."""
    return str(data.uns[UNS_KEY].get(WEIGHTS))


def posterior_of(data: Any) -> NDArray[np.float32] | None:
    """The posterior in a minified object, (n, P); None in others.

    Raises
    ------
    ValueError
        If it was taken out.
    """
    if kind_of(data) is None:
        return None
    kept = data.obsm[OBSM_KEY] if OBSM_KEY in data.obsm else np.zeros((0, 0))
    found: NDArray[np.float32] = np.asarray(kept, dtype=np.float32)
    if found.ndim != 2 or found.shape[1] <= _FIXED or (found.shape[1] - _FIXED) % _TIMES > 1:
        raise ValueError(
            f"These data were minified, but obsm[{OBSM_KEY!r}] with the posterior of the cells is not there as it was "
            "written: restore it, or give the data with their counts."
        )
    return found
