"""Data sets whose counts lie in stores: an AnnData of cells and features, and where their counts are."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.data.checks import check_strings, check_unique, first_names
from pyro_multivi.data.setup.options import UNS_KEY
from pyro_multivi.data.stores.joined import JoinedMatrix
from pyro_multivi.data.stores.matrix import WRITTEN_BEFORE, StoredMatrix, opened_group

#: Where a data set says where its counts are: ``adata.uns["pyro_multivi"]["stores"]``, a JSON string.
STORES = "stores"
_VERSION = 1


@dataclass(frozen=True)
class Store:
    """A file or folder that an AnnData was written to.

    Attributes
    ----------
    name, path
        Its name, and where it is.
    cells, features
        Checksums of the names of its cells and features.
    """

    name: str
    path: str
    cells: int
    features: int


class Stores:
    """Stores as one data set, opened.

    Parameters
    ----------
    stores
        The stores, in the order of their cells.
    cells, features
        Names of the cells and of the features of each.
    """

    def __init__(
        self, stores: Sequence[Store], cells: Sequence[pd.Index[Any]], features: Sequence[pd.Index[Any]]
    ) -> None:
        self.stores = list(stores)
        self.cells = joint_names(cells, [store.name for store in stores])
        check_unique(self.cells, "obs_names of all stores together", "rename the cells or the stores")
        self._features = list(features)
        self._metadata = [_metadata(Path(store.path)) for store in stores]
        self._matrices: dict[str, tuple[pd.Index[Any], JoinedMatrix]] = {}

    def to_json(self) -> str:
        """The string kept in ``uns``."""
        return json.dumps({"version": _VERSION, "stores": [asdict(store) for store in self.stores]})

    def matrix(
        self, layer: str | None, features: pd.Index[Any], argument: str, measured: NDArray[np.bool_] | bool = True
    ) -> JoinedMatrix:
        """Counts of some features in all cells, (cells, features).

        ``argument`` is the one that named the layer; features that were not ``measured`` may be in none of the stores.
        """
        name = "X" if layer is None else f"layers/{layer}"
        known = self._matrices.get(name)
        if known is not None and known[0].equals(features):
            return known[1]
        parts, found = [], np.zeros(len(features), dtype=bool)
        for store, own in zip(self.stores, self._features, strict=True):
            try:
                matrix = StoredMatrix(store.path, name)
            except ValueError as error:
                raise error if layer is None else ValueError(f"{argument}={layer!r}: {error}") from error
            if matrix.shape[1] != len(own):
                raise ValueError(f"{store.path}: {name} has {matrix.shape[1]} columns, and var {len(own)} rows.")
            places = features.get_indexer(own).astype(np.int32)
            found[places[places >= 0]] = True
            parts.append((matrix, None if own.equals(features) else places))
        # Others are zeros, which a query marks as not measured.
        absent = features[~found & measured]
        if len(absent):
            raise ValueError(
                f"adata.var_names holds {len(absent)} features that are in none of its stores: {first_names(absent)}. "
                "Features of stores are known by name: leave their names as they are."
            )
        made = JoinedMatrix(parts, len(features))
        if made.shape[0] != len(self.cells):
            raise ValueError(f"The stores have {made.shape[0]} rows in {name} and {len(self.cells)} in obs.")
        self._matrices = {**self._matrices, name: (features, made)}
        return made

    def rows_of(self, cells: pd.Index[Any]) -> NDArray[np.intp] | None:
        """Row of each of some cells; None if they are all cells in order."""
        if cells.equals(self.cells):
            return None
        rows = self.cells.get_indexer(cells)
        if (rows < 0).any():
            raise ValueError(
                f"adata.obs_names holds {int((rows < 0).sum())} cells that are in none of its stores: "
                f"{first_names(cells[rows < 0])}. Cells of stores are known by name: leave their names as they are."
            )
        return rows

    def is_current(self) -> bool:
        """Whether the stores still have the same names of cells and features, as far as their files show."""
        return self._metadata == [_metadata(Path(store.path)) for store in self.stores]


def joint_names(names: Sequence[pd.Index[Any]], suffixes: Sequence[str]) -> pd.Index[Any]:
    """Names of several tables, one after the other; one that is in more than one of them gets its table's suffix."""
    every = pd.Index(np.concatenate([index.to_numpy(dtype=object) for index in names]))
    repeated = set(every[every.duplicated()])
    if not repeated:
        return every
    return pd.Index(
        [
            f"{name}_{suffix}" if name in repeated else name
            for index, suffix in zip(names, suffixes, strict=True)
            for name in index
        ]
    )


# Stores in use by their description: names of cells are read once.
_opened: dict[str, Stores] = {}


def keep(stores: Stores) -> str:
    """Keep opened stores for the objects that refer to them; return the reference."""
    text = stores.to_json()
    while len(_opened) > 3:
        del _opened[next(iter(_opened))]
    _opened[text] = stores
    return text


def stores_of(adata: Any) -> Stores | None:
    """The stores that an AnnData refers to, opened; None if it holds its counts.

    Raises
    ------
    FileNotFoundError
        If a store is not where it was.
    ValueError
        If it holds other cells or features than it did, or the reference is damaged.
    """
    kept = adata.uns.get(UNS_KEY)
    if not isinstance(kept, Mapping) or STORES not in kept:
        return None
    text = str(kept[STORES])
    found = _opened.get(text)
    if found is not None and found.is_current():
        return found
    try:
        values = json.loads(text)
        version, entries = values["version"], [Store(**entry) for entry in values["stores"]]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"uns[{UNS_KEY!r}][{STORES!r}] is damaged ({error}): open the stores again, adata = "
            "pyro_multivi.open_stores(...)."
        ) from error
    if version != _VERSION:
        raise ValueError(f"uns[{UNS_KEY!r}][{STORES!r}] has version {version!r}, and this package reads {_VERSION}.")
    names = []
    for store in entries:
        if not Path(store.path).exists():
            raise FileNotFoundError(
                f"The counts of store {store.name!r} are not at {store.path} any more. Put them back; or open them at "
                "their new place, adata = pyro_multivi.open_stores(...), and give adata."
            )
        cells, features = names_in(Path(store.path))
        for what, then, now in (("cells", store.cells, cells), ("features", store.features, features)):
            if then != checksum_of(now):
                raise ValueError(
                    f"{store.path} holds other {what} than when it was opened as store {store.name!r}: {len(now)} now, "
                    f"{first_names(now, 3)}. Restore it; or open it as it is now, adata = "
                    "pyro_multivi.open_stores(...), and make a new model."
                )
        names.append((cells, features))
    made = Stores(entries, [cells for cells, _ in names], [features for _, features in names])
    keep(made)
    return made


def names_in(path: Path) -> tuple[pd.Index[Any], pd.Index[Any]]:
    """Names of the cells and features of a store, checked."""
    with opened_group(path) as group:
        for name in ("obs", "var"):
            if hasattr(group[name], "dtype"):
                raise ValueError(f"{path}, {name!r}, is {WRITTEN_BEFORE}")
        indices = [element(group, name).index for name in ("obs", "var")]
    for name, index in zip(("obs_names", "var_names"), indices, strict=True):
        check_strings(index, f"{path}, {name}")
        check_unique(index, f"{path}, {name}", uniquely(path, name))
    return indices[0], indices[1]


def uniquely(path: Path, name: str) -> str:
    """Advice for writing a file with unique names."""
    return (
        f"write a file with unique ones, in Python: adata = pyro_multivi.read({str(path)!r}); "
        f"adata.{name}_make_unique(); adata.write_h5ad('OUT.h5ad')"
    )


def element(group: Any, name: str) -> Any:
    """An element of a store, in memory."""
    try:
        from anndata.io import read_elem
    except ImportError:  # before anndata 0.11
        from anndata.experimental import read_elem
    return read_elem(group[name])


def checksum_of(names: Iterable[str]) -> int:
    """Checksum of names in their order."""
    return zlib.crc32("\0".join(names).encode())


def _metadata(path: Path) -> list[tuple[str, int, int]]:
    """Size and time of change of a file; of a folder those of its descriptions."""
    if not path.exists():
        return []
    if not path.is_dir():
        places = [path]
    else:
        places = [
            place
            for folder in (path, path / "obs", path / "var")
            for place in (folder, *(folder / name for name in ("zarr.json", ".zattrs", ".zgroup", ".zmetadata")))
            if place.exists()
        ]
    return [(str(place), os.stat(place).st_size, os.stat(place).st_mtime_ns) for place in places]
