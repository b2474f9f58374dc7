"""Selection of cells, or features, by position, mask or name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import (
    ExternalIndexingError,
    UnknownKeyError,
    first_names,
    nearest,
    shown,
    unwrapped,
)

# Lists of external_indexing, by what their cells are for.
_PARTS = ("training", "validation", "test")
# Positions shown in a message, as many as names.
_SHOWN_POSITIONS = 5


def select_cells(indices: Any, names: Iterable[str], argument: str = "indices") -> Tensor:
    """Positions of the cells meant by ``indices``.

    Parameters
    ----------
    indices
        None for all cells, a boolean mask, positions (negative ones count from the end), or names.
    names
        Names of all n cells.
    argument
        Name that errors give ``indices``.

    Returns
    -------
    Tensor
        int64, in the order given.

    Raises
    ------
    ValueError, IndexError, KeyError
        If the mask has another length or order of cells, a position is out of range, a name is unknown, or nothing
        is selected.

    Examples
    --------
    >>> select_cells([True, False, True], ["a", "b", "c"])
    tensor([0, 2])
    >>> select_cells(["c"], ["a", "b", "c"])
    tensor([2])
    """
    names = list(names)
    if indices is None:
        return torch.arange(len(names))
    wanted = as_list(argument, indices)
    if wanted.size == 0:
        raise ValueError(f"{argument} selects no cell: give at least one, or None for all cells.")
    if wanted.ndim != 1:
        raise ValueError(
            f"{argument}={shown(indices)} has {wanted.ndim} dimensions: give a flat list of positions, names or a mask."
        )
    if wanted.dtype == bool:
        chosen = _marked(argument, indices, wanted, names)
    elif wanted.dtype.kind in "iu":
        chosen = _at_positions(argument, indices, wanted, names)
    elif wanted.dtype.kind in "OUS":
        chosen = _called(argument, wanted, names)
    else:
        raise ValueError(
            f"{argument}={shown(indices)} has values of type {wanted.dtype}: give positions, names, a mask or None."
        )
    return torch.from_numpy(chosen.astype(np.int64))


def divide_cells(external_indexing: Any, names: Iterable[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the cells of training, validation and test that ``external_indexing`` lists.

    Parameters
    ----------
    external_indexing
        A list of up to three lists of cells, in this order, each as of :func:`select_cells`. What is left out, None or
        empty holds no cell.
    names
        Names of all n cells.

    Returns
    -------
    tuple of Tensor
        int64, each ascending, together every cell once.

    Raises
    ------
    ExternalIndexingError
        If a cell is listed twice, or not at all.
    ValueError, IndexError, KeyError, TypeError
        If a list is none of cells, or none of them is for training.

    Examples
    --------
    >>> divide_cells([["a", "d"], [2, 1]], ["a", "b", "c", "d"])
    (tensor([0, 3]), tensor([1, 2]), tensor([], dtype=torch.int64))
    """
    names = list(names)
    if not isinstance(external_indexing, (list, tuple)) or not 1 <= len(external_indexing) <= len(_PARTS):
        raise ValueError(
            f"external_indexing={shown(external_indexing)} is not allowed: give a list of up to three lists of cells, "
            "[training, validation, test]."
        )
    given = [*external_indexing, *[None] * (len(_PARTS) - len(external_indexing))]
    found = [_part(f"external_indexing[{place}]", cells, names) for place, cells in enumerate(given)]
    times = np.stack([np.bincount(part, minlength=len(names)) for part in found])
    for name, often in zip(_PARTS, times, strict=True):
        if (often > 1).any():
            raise ExternalIndexingError(
                f"external_indexing lists cells more than once for {name}: {_shown_cells(often > 1, names)}. List each "
                "cell once."
            )
    for one, other in combinations(range(len(_PARTS)), 2):
        in_both = (times[one] > 0) & (times[other] > 0)
        if in_both.any():
            raise ExternalIndexingError(
                f"external_indexing lists cells both for {_PARTS[one]} and for {_PARTS[other]}: "
                f"{_shown_cells(in_both, names)}. List each cell once."
            )
    lacking = times.sum(0) == 0
    if lacking.any():
        raise ExternalIndexingError(
            f"external_indexing leaves out {int(lacking.sum())} of {len(names)} cells: {_shown_cells(lacking, names)}. "
            "List those that are neither trained on nor held out as the third, [training, validation, test]."
        )
    if not times[0].any():
        raise ValueError("external_indexing[0] lists no cell: at least one is needed for training.")
    first, second, third = (torch.from_numpy(np.flatnonzero(often).astype(np.int64)) for often in times)
    return first, second, third


def _part(argument: str, cells: Any, names: Sequence[str]) -> NDArray[np.int64]:
    """Positions of the cells of a list that may hold none."""
    value = unwrapped(cells)
    if value is None:
        return np.zeros(0, dtype=np.int64)
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(
            f"{argument}={shown(cells)} is not allowed: give a list of positions or names, a mask, or None."
        )
    wanted = as_list(argument, value)
    no_cell = wanted.size == 0 or (wanted.dtype == bool and wanted.shape == (len(names),) and not wanted.any())
    return np.zeros(0, dtype=np.int64) if no_cell else select_cells(value, names, argument).numpy()


def _shown_cells(marked: NDArray[np.bool_], names: Sequence[str]) -> str:
    """Names of the first of some cells, how many there are in all, and the positions of the same."""
    places = np.flatnonzero(marked).tolist()
    positions = ", ".join(map(str, places[:_SHOWN_POSITIONS])) + " and others" * (len(places) > _SHOWN_POSITIONS)
    return f"{first_names(names[place] for place in places)}, at {positions}"


def _marked(argument: str, indices: Any, mask: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
    """Positions of the cells that a mask marks."""
    if len(mask) != len(names):
        raise ValueError(
            f"{argument} is a mask of {len(mask)} cells and the data has {len(names)}: give one value per cell."
        )
    check_order(argument, indices, names)
    if not mask.any():
        raise ValueError(f"{argument} selects no cell: the mask is False everywhere.")
    return np.flatnonzero(mask)


def _at_positions(argument: str, indices: Any, positions: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
    """Positions from the beginning, of which negative ones count from the end."""
    refuse_numbers_for_mask(argument, indices, positions, names)
    n = len(names)
    outside = positions[(positions < -n) | (positions >= n)]
    if len(outside):
        raise IndexError(f"{argument} holds {outside[0]}, and the data has {n} cells: give positions below {n}.")
    return np.where(positions < 0, positions + n, positions)


def _called(argument: str, wanted: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
    """Positions of the cells of these names."""
    place = {name: position for position, name in enumerate(names)}
    unknown = [name for name in wanted.tolist() if not isinstance(name, str) or name not in place]
    if unknown:
        raise UnknownKeyError(
            f"{argument} holds {shown(unknown[0])}, which is no cell of the data. {nearest(unknown[0], names)}"
        )
    return np.asarray([place[name] for name in wanted.tolist()])


def check_order(argument: str, values: Any, names: Sequence[str]) -> None:
    """Refuse a pandas Series whose index holds these names in another order: its values would be of other ones.

    Any other values, and a Series that is indexed by something else, are in the order of the names.

    Raises
    ------
    ValueError
        If the index holds some of the names, and not all of them in this order.

    Examples
    --------
    >>> import pandas as pd
    >>> check_order("indices", pd.Series([True, False], index=["a", "b"]), ["a", "b"])
    >>> check_order("indices", pd.Series([True, False], index=["b", "a"]), ["a", "b"])
    Traceback (most recent call last):
        ...
    ValueError: indices is a Series with 'b' at position 0, where the data has 'a': reorder it by .loc[names ...
    """
    index = getattr(values, "index", None)
    if index is None or callable(index):  # of a list it is a method
        return
    labels, expected = list(index), list(names)
    if labels != expected and not set(expected).isdisjoint(labels):
        at = next((place for place, pair in enumerate(zip(labels, expected, strict=False)) if pair[0] != pair[1]), 0)
        raise ValueError(
            f"{argument} is a Series with {labels[at]!r} at position {at}, where the data has {expected[at]!r}: "
            "reorder it by .loc[names of the data], or give its .to_numpy() if the values are in the order of the data."
        )


def refuse_numbers_for_mask(argument: str, values: Any, numbers: NDArray[Any], names: Sequence[str]) -> None:
    """Refuse whole numbers that are a mask, or a column of the data, and would be taken for positions.

    These are a number for each name, all of them 0 or 1, and a pandas Series whose index holds names, unless each of
    its numbers is the position of its own name.

    Examples
    --------
    >>> refuse_numbers_for_mask("indices", [0, 2], np.array([0, 2]), ["a", "b", "c"])
    >>> refuse_numbers_for_mask("indices", [0, 1, 1], np.array([0, 1, 1]), ["a", "b", "c"])
    Traceback (most recent call last):
        ...
    ValueError: indices holds a 0 or 1 for each of 3 names, as a mask does: give it as True and False, by ...
    """
    if len(numbers) == len(names) > 2 and set(numbers.tolist()) <= {0, 1}:
        raise ValueError(
            f"{argument} holds a 0 or 1 for each of {len(names)} names, as a mask does: give it as True and False, by "
            ".astype(bool) of an array or a Series; of positions give each once."
        )
    labels = getattr(values, "index", None)
    if labels is None or callable(labels) or not len(labels):
        return
    place = {name: position for position, name in enumerate(names)}
    own = [place.get(label) if isinstance(label, str) else None for label in labels]
    if None not in own and own != numbers.tolist():
        raise ValueError(
            f"{argument} is a Series of whole numbers by name, {labels[0]!r}: {numbers[0]}, ...: for a mask give "
            ".astype(bool), for positions .to_numpy()."
        )


def as_list(argument: str, values: Any) -> NDArray[Any]:
    """Positions, names or a mask as an array; one of them alone as a list of one.

    Raises
    ------
    TypeError
        If the values have no order of their own, as a set, or are no list.
    ValueError
        If some values of a mask, or all of a masked array, are missing.
    """
    if isinstance(values, (slice, bytes, Mapping)) or (isinstance(values, Set) and not hasattr(values, "mapping")):
        raise TypeError(
            f"{argument}={shown(values)} is not allowed: give a list of positions or names, or a mask; of a set "
            "sorted(...), of a slice range(...)."
        )
    if isinstance(values, Iterable) and not isinstance(values, str) and not hasattr(values, "__array__"):
        values = list(values)
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise ValueError(
            f"{argument} is a masked array with {np.ma.count_masked(values)} hidden values: say what they are, of a "
            "mask by .filled(False), or leave them out by .compressed()."
        )
    try:
        found = np.atleast_1d(np.asarray(values))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _no_list(argument, values, error) from error
    gaps = pd.isna(found) if found.dtype == object else np.zeros(0, dtype=bool)
    if gaps.any() and not gaps.all() and all(isinstance(value, (bool, np.bool_)) for value in found[~gaps].tolist()):
        raise ValueError(
            f"{argument} is a mask with {int(gaps.sum())} missing values: say what they are, by .fillna(False)."
        )
    try:
        kinds = set(map(type, found.ravel().tolist())) if found.dtype == object else set()
        # Objects of one plain type, such as pandas' nullable values, are an array of it.
        return found.astype(kinds.pop()) if len(kinds) == 1 and kinds <= {bool, int} else found
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _no_list(argument, values, error) from error


def _no_list(argument: str, values: Any, error: Exception) -> TypeError:
    return TypeError(
        f"{argument}={shown(values)} is not allowed: give a flat list of positions or names, or a mask ({error})."
    )
