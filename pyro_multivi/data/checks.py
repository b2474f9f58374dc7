"""Checks of what a user hands in, with errors that say what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

# Names shown in a message: enough to recognise a pattern, few enough to read.
_SHOWN = 5
# Of the names one can choose from, more: the right one should be among them.
_SHOWN_CHOICES = 12
# Rows looked at when searching for the layer that holds counts.
_PEEK = 200


def first_names(names: Iterable[object], limit: int = _SHOWN) -> str:
    """The first few names, quoted, and how many there are in all."""
    every = list(names)
    shown = ", ".join(repr(str(name)) for name in every[:limit])
    return shown if len(every) <= limit else f"{shown}, ... ({len(every)} in all)"


def nearest(name: object, known: Iterable[object]) -> str:
    """A sentence that suggests the closest known name, if one is close, and lists those known."""
    options = [str(option) for option in known]
    if not options:
        return "There are none."
    # Case is the commonest slip, and difflib counts it as a wrong letter.
    by_lower = {option.casefold(): option for option in reversed(options)}
    close = difflib.get_close_matches(str(name).casefold(), list(by_lower), n=1)
    suggestion = f"Did you mean {by_lower[close[0]]!r}? " if close else ""
    return f"{suggestion}Known: {first_names(options, _SHOWN_CHOICES)}."


def unknown_key(argument: str, key: object, where: str, known: Iterable[object]) -> ValueError:
    """The error for a key that is not where an argument says it is."""
    return ValueError(f"{argument}={key!r} is not in {where}. {nearest(key, known)}")


def check_unique(names: pd.Index, where: str, fix: str) -> None:
    """Names must be unique, for rows and columns are found by them.

    Raises
    ------
    ValueError
        Naming the first duplicates and ``fix``.
    """
    if not names.is_unique:
        repeated = names[names.duplicated()].unique()
        raise ValueError(f"{where} holds names more than once: {first_names(repeated)}. Make them unique: {fix}.")


def check_values(
    block: sp.csr_array,
    modality: str,
    where: str,
    cells: pd.Index,
    features: pd.Index,
    hint: Callable[[], str],
) -> None:
    """Refuse stored values that are no counts.

    Parameters
    ----------
    block
        Some rows of a matrix.
    modality
        ``"RNA"``: whole numbers are needed. ``"ATAC"``: any value that is not negative will do,
        since only zero or not is used.
    where
        How the user would write the matrix.
    cells, features
        Names of the rows and columns of the block.
    hint
        Says what to do about it: the end of the sentence "Raw counts are needed".

    Raises
    ------
    ValueError
        At the first wrong value, with its cell and feature.
    """
    values = block.data
    rules = [("NaN or infinite", ~np.isfinite(values)), ("negative", values < 0)]
    if modality == "RNA":
        rules.append(("not a whole number", values != np.floor(values)))
    for what, wrong in rules:
        if wrong.any():
            at = int(np.argmax(wrong))
            row = int(np.searchsorted(block.indptr, at, side="right")) - 1
            feature = features[int(block.indices[at])]
            raise ValueError(
                f"{where} holds {modality} values that are {what}, for instance {values[at]!s} for cell "
                f"{str(cells[row])!r} and {'gene' if modality == 'RNA' else 'region'} {str(feature)!r}. "
                f"Raw counts are needed{hint()}"
            )


def counts_hint(owner: Any, layer: str | None, name: str, argument: str) -> str:
    """Where raw counts seem to be: the end of the sentence "Raw counts are needed".

    Parameters
    ----------
    owner
        The AnnData that holds the matrix in question.
    layer
        The layer that was wrong; None for ``.X``.
    name
        How the user would write ``owner``.
    argument
        The setup argument that chooses the layer.
    """
    for other in owner.layers:
        if other != layer and _looks_like_counts(owner.layers[other]):
            return f": {name}.layers[{other!r}] looks like counts, give {argument}={other!r}."
    if layer is not None and owner.X is not None and _looks_like_counts(owner.X):
        return f": {name}.X looks like counts, give {argument}=None."
    if owner.raw is not None and _looks_like_counts(owner.raw.X):
        return (
            f": {name}.raw looks like counts, copy it to a layer ({name}.layers['counts'] = "
            f"{name}.raw[:, {name}.var_names].X) and give {argument}='counts'."
        )
    return f", for instance from a layer: {argument}='counts'."


def _looks_like_counts(matrix: Any) -> bool:
    block: Any = matrix[:_PEEK]
    # A compressed block has its stored values in .data; NumPy's .data is a buffer.
    values: NDArray[Any] = np.asarray(getattr(block, "data", block) if sp.issparse(block) else block)
    if values.size == 0 or values.dtype.kind not in "buif":
        return False
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all())


def name_list(argument: str, value: Sequence[str] | str | None) -> tuple[str, ...]:
    """A list of names; None is no name and one string is one name.

    Raises
    ------
    TypeError
        If an entry is not a string.
    """
    if value is None:
        return ()
    names = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a list of strings; {name!r} is not a string.")
    return names
