"""Selection of cells by position, mask or name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_multivi.data.checks import nearest


def select_cells(indices: Any, names: Iterable[str]) -> Tensor:
    """Positions of the cells meant by ``indices``.

    Parameters
    ----------
    indices
        None for all cells, a boolean mask, positions (negative ones count from the end), or names.
    names
        Names of all n cells.

    Returns
    -------
    Tensor
        int64, in the order given.

    Raises
    ------
    ValueError, IndexError, KeyError
        If the mask has another length, a position is out of range, a name is unknown, or nothing
        is selected.

    Examples
    --------
    >>> select_cells([True, False, True], ["a", "b", "c"])
    tensor([0, 2])
    >>> select_cells(["c"], ["a", "b", "c"])
    tensor([2])
    """
    names = list(names)
    n = len(names)
    if indices is None:
        return torch.arange(n)
    wanted = np.atleast_1d(np.asarray(indices))
    if wanted.dtype == object:
        # Nullable arrays of pandas before 2.2 become objects.
        kind = pd.api.types.infer_dtype(wanted, skipna=False)
        wanted = wanted.astype({"boolean": bool, "integer": np.int64}.get(kind, object))
    if wanted.size == 0:
        raise ValueError("indices selects no cell: give at least one, or None for all cells.")
    if wanted.ndim != 1:
        raise ValueError(f"indices has {wanted.ndim} dimensions: give a flat list of positions, names or a mask.")
    if wanted.dtype == bool:
        if len(wanted) != n:
            raise ValueError(f"indices is a mask of {len(wanted)} cells and the data has {n}: give one value per cell.")
        wanted = np.flatnonzero(wanted)
        if not len(wanted):
            raise ValueError("indices selects no cell: the mask is False everywhere.")
    elif wanted.dtype.kind in "iu":
        outside = wanted[(wanted < -n) | (wanted >= n)]
        if len(outside):
            raise IndexError(f"indices holds {outside[0]}, and the data has {n} cells: give positions below {n}.")
        wanted = np.where(wanted < 0, wanted + n, wanted)
    elif wanted.dtype.kind in "OUS":
        place = {name: position for position, name in enumerate(names)}
        unknown = [name for name in wanted.tolist() if name not in place]
        if unknown:
            raise KeyError(f"indices holds {unknown[0]!r}, which is no cell of the data. {nearest(unknown[0], names)}")
        wanted = np.asarray([place[name] for name in wanted.tolist()])
    else:
        raise ValueError(f"indices has values of type {wanted.dtype}: give positions, names, a mask or None.")
    return torch.from_numpy(wanted.astype(np.int64))
