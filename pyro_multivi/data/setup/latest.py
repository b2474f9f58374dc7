"""Latest object read: its table is used again as long as the object holds the same.

Setup, the constructor of a model and every method are given the same objects. The table of the last one is kept beside
a checksum of everything that it was made from. An object that was changed in place has another checksum; it is read,
and so checked, anew.
"""

from __future__ import annotations

import os
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.options import Setup
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
    if entry is None or entry.owner() is not data or entry.content != content:
        return None
    return entry


def keep(data: Any, content: int | None, spec: DataSpec, table: CellTable, own: bool) -> None:
    """Keep a table until the object is gone or another one is read; not without a checksum."""
    if content is not None:
        _Slot.entry = Latest(weakref.ref(data, _forget), content, spec, table, own)


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
    total = _Checksum()
    try:
        total.add_names(opened.cells)
        matrices = {id(counts.matrix): counts.matrix for counts in opened.counts.values()}
        for matrix in matrices.values():
            total.add_matrix(matrix)
        for modality, counts in opened.counts.items():
            total.add_text(modality.key)
            total.add_names(counts.features)
            total.add_array(counts.columns)
            total.add_rows(counts.rows)
        for argument, key in setup.columns():
            table = opened.tables[opened.place_of(argument)]
            total.add_text(argument, key, str(key in table))
            if key in table:
                if not table.index.equals(opened.cells):
                    total.add_names(table.index)
                total.add_frame(table[key])
        for name, extra in opened.extra.items():
            total.add_text(name)
            total.add_names(extra.feature_names())
            total.add_names(extra.cells)
            total.add_matrix(extra.matrix)
            total.add_rows(extra.rows)
    except (_NoChecksumError, TypeError, ValueError, OSError):
        return None
    return total.value


class _NoChecksumError(Exception):
    """Something that has no checksum."""


class _Checksum:
    """A checksum of arrays, names, columns and files, one after the other."""

    def __init__(self) -> None:
        self.value = 0

    def add_text(self, *parts: str) -> None:
        """Add words in their order."""
        self.add_names(parts)

    def add_names(self, names: Iterable[Any]) -> None:
        """Add names in their order."""
        self.value = zlib.crc32("\0".join(map(str, names)).encode() + b"\1", self.value)

    def add_array(self, array: Any) -> None:
        """Add the values of an array, and its type and shape."""
        if array.dtype.hasobject:
            raise _NoChecksumError
        self.add_text(str(array.dtype), str(array.shape))
        # Row by row where they do not lie one behind the other, to copy no more than a row at a time.
        for part in array if array.ndim > 1 and not array.flags.c_contiguous else (array,):
            self.value = zlib.crc32(np.ascontiguousarray(part).data, self.value)

    def add_rows(self, rows: Any) -> None:
        """Add positions of cells, or that there are none."""
        if rows is None:
            self.add_text("all")
        else:
            self.add_array(rows)

    def add_frame(self, frame: pd.DataFrame | pd.Series[Any]) -> None:
        """Add the values of columns."""
        types = frame.dtypes if isinstance(frame, pd.DataFrame) else [frame.dtype]
        self.add_text(*(kind.name for kind in types))
        self.add_array(pd.util.hash_pandas_object(frame, index=False).to_numpy())

    def add_matrix(self, matrix: Any) -> None:
        """Add a matrix: sparse, dense, a frame, or the file that it lies in."""
        if isinstance(matrix, pd.DataFrame):
            self.add_frame(matrix)
        elif isinstance(matrix, np.ndarray):
            self.add_array(matrix)
        elif isinstance(matrix, (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array)):
            self.add_text(matrix.format, str(matrix.shape))
            for part in (matrix.data, matrix.indices, matrix.indptr):
                self.add_array(part)
        else:
            self._add_file(matrix)

    def _add_file(self, matrix: Any) -> None:
        # A dataset of h5py, or anndata's wrapper of a group with a sparse one.
        stored = getattr(matrix, "group", matrix)
        file = getattr(stored, "file", None)
        # Of a file open for writing, values not yet written out would be missed.
        if file is None or getattr(file, "mode", None) != "r":
            raise _NoChecksumError
        status = os.stat(file.filename)
        self.add_text(file.filename, stored.name, str(status.st_size), str(status.st_mtime_ns))
