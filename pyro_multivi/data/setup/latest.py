"""Latest object read: its table is used again as long as the object holds the same.

Setup, the constructor of a model and every method are given the same objects. The table of the last one is kept beside
a checksum of everything that it was made from. An object that was changed in place has another checksum; it is read,
and so checked, anew.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.options import Setup, is_lazy
from pyro_multivi.data.table import CellTable

if TYPE_CHECKING:
    from pyro_multivi.data.setup.spec import DataSpec


@dataclass(frozen=True)
class Latest:
    """The latest object read.

    Attributes
    ----------
    owner
        The object, which is not kept alive by this.
    content
        Checksum of what the table was made from.
    spec, table
        The specification and the table.
    own
        Whether the specification is the object's own, rather than that of a model for other data.
    """

    owner: weakref.ref[Any]
    content: int
    spec: DataSpec
    table: CellTable
    own: bool


class _Slot:
    # One entry, which is replaced as a whole: threads see one entry or another, never parts of two.
    entry: Latest | None = None


def find(data: Any, content: int | None) -> Latest | None:
    """The entry of this object, if its content is still the same."""
    entry = _Slot.entry
    return entry if entry is not None and entry.owner() is data and entry.content == content else None


def keep(data: Any, content: int | None, spec: DataSpec, table: CellTable, own: bool) -> None:
    """Keep a table until the object is gone or another one is read; not without a checksum."""
    if content is not None:
        _Slot.entry = Latest(weakref.ref(data, _forget), content, spec, table, own)


def checksum_of(data: Any, table: CellTable) -> int | None:
    """Checksum of an object from which a table was made just now; None if it is not kept."""
    entry = _Slot.entry
    return entry.content if entry is not None and entry.owner() is data and entry.table is table else None


def clear() -> None:
    """Free the memory, before another table is made."""
    _Slot.entry = None


def _forget(owner: weakref.ref[Any]) -> None:
    entry = _Slot.entry
    if entry is not None and entry.owner is owner:
        _Slot.entry = None


def checksum(opened: Opened, setup: Setup) -> int | None:
    """Checksum (CRC-32) of all that a table is made from; None if something has none, such as a file being written to.

    Of a matrix in a file, it covers the file's name, size and time of change rather than the values.
    """
    value = 0
    try:
        for part in _contents(opened, setup):
            value = zlib.crc32(part, value)
    except (_NoChecksumError, TypeError, ValueError, OSError):
        return None
    return value


class _NoChecksumError(Exception):
    """Something that has no checksum."""


def _contents(opened: Opened, setup: Setup) -> Iterator[Any]:
    """All that a table is made from, as bytes."""
    yield _words(opened.cells)
    for matrix in {id(counts.matrix): counts.matrix for counts in opened.counts.values()}.values():
        yield from _of_matrix(matrix)
    for modality, counts in opened.counts.items():
        yield _words([modality.key, *counts.features])
        yield from _of_array(counts.columns)
        if counts.masks is not None:
            yield _words([*opened.panel_keys, *counts.masks.panels])
            yield from _of_array(counts.masks.measured)
            for key in opened.panel_keys:
                if opened.has_column("panel_key", key):
                    yield from _of_frame(opened.tables[opened.place_of("panel_key")][key])
        yield from _of_array(counts.rows)
    for argument, key in setup.columns():
        table = opened.tables[opened.place_of(argument)]
        yield _words([argument, key, key in table])
        if key in table:
            if not table.index.equals(opened.cells):
                yield _words(table.index)
            yield from _of_frame(table[key])
    if opened.posterior is not None:
        yield from _of_array(opened.posterior)
    for name, extra in opened.extra.items():
        yield _words([name, *extra.feature_names()])
        yield _words(extra.cells)
        yield from _of_matrix(extra.matrix)
        yield from _of_array(extra.rows)


def _words(words: Iterable[Any]) -> bytes:
    return "\0".join(map(str, words)).encode() + b"\1"


def _of_array(array: Any) -> Iterator[Any]:
    """Type, shape and values of an array; None, for positions of cells that are all cells, is told from any."""
    if array is None:
        yield _words(["all"])
        return
    if array.dtype.hasobject:
        raise _NoChecksumError
    yield _words([array.dtype, array.shape])
    # Row by row where they do not lie one behind the other, to copy no more than a row at a time.
    for part in array if array.ndim > 1 and not array.flags.c_contiguous else (array,):
        yield np.ascontiguousarray(part).data


def _of_frame(frame: pd.DataFrame | pd.Series[Any]) -> Iterator[Any]:
    yield _words(kind.name for kind in (frame.dtypes if isinstance(frame, pd.DataFrame) else [frame.dtype]))
    yield from _of_array(pd.util.hash_pandas_object(frame, index=False).to_numpy())


def _of_matrix(matrix: Any) -> Iterator[Any]:
    if isinstance(matrix, pd.DataFrame):
        yield from _of_frame(matrix)
    elif hasattr(matrix, "status"):
        yield _words([matrix.status(), matrix.shape])
    elif is_lazy(matrix):
        # Dask gives arrays of the same name the same values.
        yield _words([matrix.name, matrix.shape])
    elif isinstance(matrix, np.ndarray):
        yield from _of_array(matrix)
    elif isinstance(matrix, (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array)):
        yield _words([matrix.format, matrix.shape])
        for part in (matrix.data, matrix.indices, matrix.indptr):
            yield from _of_array(part)
    else:
        # A dataset of h5py, or anndata's wrapper of a group with a sparse one.
        stored = getattr(matrix, "group", matrix)
        file = getattr(stored, "file", None)
        # Of a file open for writing, values not yet written out would be missed.
        if file is None or getattr(file, "mode", None) != "r":
            raise _NoChecksumError
        status = os.stat(file.filename)
        yield _words([file.filename, stored.name, status.st_size, status.st_mtime_ns])
