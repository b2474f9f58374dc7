"""Elements of an AnnData written to HDF5 or zarr: tables with any text, and no change of the user's object."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import h5py
import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from pyro_multivi.data.checks import caution, shown

# What is written as text where a column holds text and these.
_WORDS = (str, bool, int, float, np.generic)
# Types of columns of objects by what they hold.
_PLAIN: dict[str, Any] = {"boolean": "boolean", "integer": "Int64", "floating": float, "mixed-integer-float": float}


def write_element(place: Any, name: str, element: Any) -> None:
    """Write an AnnData or a part of one, each of its tables as :func:`writable` makes it.

    Parameters
    ----------
    place
        Group of h5py or zarr.
    name
        Name of the element within it; ``/`` for the group itself.
    element
        What anndata can write.

    Raises
    ------
    TypeError
        If a column holds what no such file can.
    ValueError
        If a column, or an entry such as a layer, has a name that no such file can hold.
    """
    from anndata.experimental import write_dispatched

    changed: list[str] = []
    nested: list[str] = []

    def write(function: Any, group: Any, key: str, value: Any, *, dataset_kwargs: Any, iospec: Any) -> None:
        where = key.strip("/") or name
        if isinstance(value, Mapping):
            # Colours of a column "a/b" are enough to have one in uns, and not worth the rest of the data.
            in_uns = "uns" in where.split("/")
            check_names(where, "an entry", value, alone=in_uns)
            split = [f"{where}[{each!r}]" for each in value if in_uns and "/" in str(each)]
            nested.extend(split)
            value = _by_group(value) if split else value
        if isinstance(value, pd.DataFrame):
            check_names(where, "a column", value.columns, alone=isinstance(group, h5py.Group))
            value = writable(value, where, changed)
        function(group, key, value, dataset_kwargs=dataset_kwargs)

    with warnings.catch_warnings():
        # What they will do otherwise some day: anndata in its chunks, zarr in its form of texts.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        warnings.filterwarnings("ignore", module="zarr")
        write_dispatched(place, name, element, write)
    if changed:
        caution(
            f"{', '.join(changed)}: text beside numbers, which no file of anndata holds in one column. "
            "The numbers were written as text."
        )
    if nested:
        caution(f"{', '.join(nested)}: what stands before a '/' becomes an entry of its own, with the rest inside it.")


def check_names(where: str, what: str, names: Iterable[Any], alone: bool) -> None:
    """Refuse names that a file does not give back, for there "/" stands between a group and what lies in it.

    Parameters
    ----------
    where, what
        Owner of the names, and what they are called, in the message.
    names
        The names; those that are no text are looked at elsewhere.
    alone
        Whether a "/" is allowed where no other name is what stands before it, as of columns in HDF5, which are listed
        there by their whole names.

    Examples
    --------
    >>> check_names("obs", "a column", ["CD4/CD8"], alone=True)
    >>> check_names("layers", "an entry", ["CD4/CD8"], alone=False)
    Traceback (most recent call last):
        ...
    ValueError: layers has an entry called 'CD4/CD8', a name that no file gives back: give it another, without '/'.
    """
    known = {name for name in names if isinstance(name, str)}
    for name in sorted(known):
        groups = {name[:place] for place, letter in enumerate(name) if letter == "/"}
        if name in ("", ".") or name.startswith("/") or (groups and not alone) or groups & known:
            raise ValueError(
                f"{where} has {what} called {name!r}, a name that no file gives back: give it another, without '/'."
            )


def _by_group(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """Entries with what is called "a/b" as the entry "b" of the entry "a"."""
    made: dict[Any, Any] = {}
    for name, entry in entries.items():
        *groups, last = name.split("/") if isinstance(name, str) else [name]
        place = made
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = entry
    return made


def writable(frame: pd.DataFrame, where: str, changed: list[str]) -> pd.DataFrame:
    """A table that HDF5 and zarr hold: text with gaps as categories, truth values and numbers with gaps as such.

    Parameters
    ----------
    frame
        The table, which stays as it is.
    where
        Its name in messages.
    changed
        Takes up the names of columns whose numbers become text.

    Returns
    -------
    DataFrame
        A copy; the table itself where nothing is to be done.

    Examples
    --------
    >>> frame = pd.DataFrame({"note": ["a", None], "seen": [True, None]}, index=["c1", "c2"], dtype=object)
    >>> writable(frame, "obs", []).dtypes.astype(str).to_dict()
    {'note': 'category', 'seen': 'boolean'}
    """
    odd = [name for name in frame.columns if not isinstance(name, str)]
    if odd:
        raise TypeError(
            f"{where} has a column called {odd[0]!r}, and names of columns are text in a file of anndata: "
            f"{where}.columns = {where}.columns.astype(str)."
        )
    columns = [_writable(column, f"{where}[{name!r}]", changed) for name, column in frame.items()]
    texts = isinstance(frame.index.dtype, pd.StringDtype)
    if not texts and all(column is found for column, (_, found) in zip(columns, frame.items(), strict=True)):
        return frame
    index = frame.index.astype(object) if texts else frame.index
    made = pd.DataFrame({place: column.array for place, column in enumerate(columns)}, index=index)
    made.columns = frame.columns
    return made


def _writable(column: pd.Series[Any], where: str, changed: list[str]) -> pd.Series[Any]:
    gaps = column.isna()
    if isinstance(column.dtype, pd.StringDtype):
        return column.astype("category" if gaps.any() else object)
    if isinstance(column.dtype, (pd.Float32Dtype, pd.Float64Dtype)):
        return column.astype(column.dtype.type)
    if _is_plain(column.dtype):
        return column
    column = column if column.dtype == object else column.astype(object)
    kind = infer_dtype(column, skipna=True)
    if kind == "string":
        return column.astype("category") if gaps.any() else column
    if kind == "empty":
        return column.astype(float)
    if kind in _PLAIN:
        return column.astype(_PLAIN[kind])
    other = next((value for value in column[~gaps] if not isinstance(value, _WORDS)), None)
    if other is not None:
        raise TypeError(
            f"{where} holds {shown(other)}, which no file of anndata can: make the column text by .astype(str), or "
            "leave it out."
        )
    changed.append(where)
    texts = column.astype(object).where(gaps, column.astype(str))
    return texts.astype("category") if gaps.any() else texts


def _is_plain(dtype: Any) -> bool:
    """Whether a file holds columns of a type as they are: numbers, truth values and categories of these or of text."""
    if isinstance(dtype, pd.CategoricalDtype):
        return infer_dtype(dtype.categories) == "string" or _is_plain(dtype.categories.dtype)
    if isinstance(dtype, np.dtype):
        return dtype.kind in "biufc"
    if isinstance(dtype, (pd.SparseDtype, pd.ArrowDtype)):
        return False
    return isinstance(dtype, pd.BooleanDtype) or pd.api.types.is_integer_dtype(dtype)
