"""Agreement of labels among neighbours in the latent space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pyro_multivi.data.checks import checked

# Cells at a time: their neighbours take some 50 MB.
_AT_ONCE = 65_536


@checked
def neighbour_purity(latent: NDArray[np.floating[Any]], labels: Sequence[Any], k: int = 30) -> float:
    """Share of each cell's k nearest neighbours that have its label, averaged over cells.

    Parameters
    ----------
    latent
        Latent states, (cells, K).
    labels
        One label per cell; one that is missing is that of no other cell.
    k
        Number of neighbours.

    Raises
    ------
    ValueError
        If there are not more than ``k`` cells, or not one label per cell.

    Examples
    --------
    >>> neighbour_purity(np.array([[0.0], [0.1], [5.0], [5.1]]), ["a", "a", "b", "b"], k=1)
    1.0
    """
    names = np.asarray(labels)
    if len(names) != len(latent):
        raise ValueError(f"labels has {len(names)} entries for {len(latent)} cells: give one per cell.")
    if len(latent) <= k:
        raise ValueError(f"k={k} neighbours need more than {k} cells, there are {len(latent)}: choose a smaller k.")
    tree = cKDTree(latent)
    # Numbers in place of names, which may be long strings, and some cells at a time.
    code = pd.factorize(names)[0]
    n_alike = 0
    for start in range(0, len(code), _AT_ONCE):
        cells = slice(start, start + _AT_ONCE)
        near = np.asarray(tree.query(latent[cells], k=k + 1)[1])
        own = code[cells, None]
        # A cell need not be the first of its neighbours where others have the same state, nor among so many.
        is_itself = near == np.arange(start, start + len(near))[:, None]
        is_itself[~is_itself.any(1), -1] = True
        n_alike += int(((code[near] == own) & (own >= 0) & ~is_itself).sum())
    return n_alike / (len(code) * k)
