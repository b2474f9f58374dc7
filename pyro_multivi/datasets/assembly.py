"""Steps that readers and joins share: paths, errors that name the file, features, an AnnData, tables put together."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi.data.checks import caution, first_names
from pyro_multivi.data.modality import ATAC
from pyro_multivi.data.stores.chunks import StoreChangedError, raise_system_error

_log = logging.getLogger(__name__)

ALLOWED = (
    "an AnnData file (.h5ad) or folder (.zarr), a MuData file (.h5mu), a 10x feature-barcode matrix (.h5), "
    "or a folder with matrix.mtx, features.tsv and barcodes.tsv, each plain or .gz"
)
#: Descriptions of a feature in a 10x file, and the column of ``var`` that each becomes.
FEATURE_COLUMNS = {"id": "gene_ids", "feature_type": "feature_types", "genome": "genome", "interval": "interval"}
# Barcodes of two samples that are alike by chance are a few per cent: Cell Ranger knows 737 000.
SAME_CELLS = 0.5
# Fewer may have the same numbers of counts by chance.
_FEWEST_CELLS = 10


def existing(path: str | os.PathLike[str]) -> Path:
    """The path, if there is a file or folder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}; give {ALLOWED}")
    return path


@contextmanager
def errors_naming(path: Path, problem: str = "is broken, or holds what cannot be read") -> Iterator[None]:
    """Any error of a library about the content of a file, as one that names the file, in one line."""
    try:
        yield
    except (ImportError, MemoryError, StoreChangedError):
        raise
    except Exception as error:
        raise_system_error(error, path)
        said = " ".join(str(error).split())
        if isinstance(error, ValueError) and said.startswith(str(path)):
            raise
        raise ValueError(f"{path} {problem}: {said or type(error).__name__}") from error


def check_sizes(path: Path, n_features: int, n_cells: int, features_named: int, cells_named: int) -> None:
    """Refuse a matrix that does not fit the names of features and barcodes."""
    if (n_features, n_cells) != (features_named, cells_named):
        heading = features_named == n_features + 1 or cells_named == n_cells + 1
        hint = ": is the first row of a table a heading? Take it out" if heading else ""
        raise ValueError(
            f"{path} holds {n_features} features x {n_cells} barcodes, but {features_named} features and "
            f"{cells_named} barcodes are named{hint}"
        )


def variables(features: dict[str, list[str]]) -> pd.DataFrame:
    """``var`` from the descriptions of the features."""
    intervals = features.get("interval", [""] * len(features["id"]))
    names = [
        interval if kind == ATAC.feature_type and interval else name or identifier
        for identifier, name, kind, interval in zip(
            features["id"], features["name"], features["feature_type"], intervals, strict=True
        )
    ]
    columns: dict[str, Any] = {column: features[key] for key, column in FEATURE_COLUMNS.items() if key in features}
    for column in ("feature_types", "genome"):
        if column in columns:
            columns[column] = pd.Categorical(columns[column])
    return pd.DataFrame(columns, index=pd.Index(names))


def assemble(x: sp.csr_matrix, barcodes: list[str], var: pd.DataFrame) -> AnnData:
    """An AnnData; the second and later of equal names get ``-1``, ``-2``, ..."""
    x.sum_duplicates()
    with warnings.catch_warnings():
        # AnnData warns of equal names before they can be made unique, and of suffixes that exist.
        warnings.simplefilter("ignore", UserWarning)
        adata = AnnData(x, obs=pd.DataFrame(index=pd.Index(barcodes)), var=var)
        adata.obs_names_make_unique()
        adata.var_names_make_unique()
    return adata


def moved(x: sp.csr_matrix, columns: NDArray[np.int64], width: int) -> sp.csr_matrix:
    """Rows with each column at its new place; those placed at -1 are left out."""
    indices = columns.astype(x.indices.dtype)[x.indices]
    keep = indices >= 0
    # How many entries are kept before each; indexing copies, so the input is never sorted in place.
    before = np.concatenate([[0], np.cumsum(keep)])
    made = sp.csr_matrix((x.data[keep], indices[keep], before[x.indptr]), shape=(x.shape[0], width))
    made.sort_indices()
    return made


def join_obsm(
    found: Sequence[Mapping[str, Any]], names: Sequence[str], cells: pd.Index[Any]
) -> dict[str, NDArray[Any] | sp.csr_matrix | pd.DataFrame]:
    """Entries of ``obsm`` that all objects have with the same columns, one below the other; others are logged.

    Parameters
    ----------
    found
        ``obsm`` of each object.
    names
        Names of the objects, for the log.
    cells
        Names of all cells.
    """
    joined: dict[str, Any] = {}
    for key in sorted({key for obsm in found for key in obsm}):
        lacking = [name for name, obsm in zip(names, found, strict=True) if key not in obsm]
        if lacking:
            _log.warning("obsm[%r] is left out: not in %s", key, " and ".join(lacking))
            continue
        parts = [obsm[key] for obsm in found]
        if len({_columns(part) for part in parts}) > 1:
            _log.warning("obsm[%r] is left out: its columns are others in %s", key, " and ".join(names))
        elif isinstance(parts[0], pd.DataFrame):
            joined[key] = pd.concat([part[list(parts[0])] for part in parts]).set_axis(cells)
        elif any(map(sp.issparse, parts)):
            joined[key] = sp.vstack([sp.csr_matrix(part) for part in parts], format="csr")
        else:
            joined[key] = np.concatenate([np.asarray(part) for part in parts])
    return joined


def _columns(part: Any) -> tuple[Any, ...]:
    """Names of the columns of a frame, in any order, or the shape of an array without its rows."""
    return ("frame", frozenset(part.columns)) if isinstance(part, pd.DataFrame) else tuple(part.shape[1:])


def join_rows(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Rows of all frames with the columns of any; missing where a frame lacks one.

    Unlike ``pandas.concat`` it keeps categories, keeps truth values, and warns of nothing.
    """
    index = pd.Index([name for frame in frames for name in frame.index])
    starts = np.cumsum([0, *map(len, frames)])
    joined = {}
    for column in dict.fromkeys(column for frame in frames for column in frame.columns):
        # A column without any value does not decide the type.
        having = [
            (int(start), frame[column])
            for start, frame in zip(starts[:-1], frames, strict=True)
            if column in frame.columns and frame[column].notna().any()
        ]
        joined[column] = _join_column(str(column), having, len(index)).array
    return pd.DataFrame(joined, index=index)


def spell_out_unlike_columns(frames: list[pd.DataFrame], what: str) -> None:
    """Write as words, in place, the columns that hold numbers in one frame and words in another, and log them."""
    for column in dict.fromkeys(column for frame in frames for column in frame.columns):
        having = [frame[column] for frame in frames if column in frame.columns and frame[column].notna().any()]
        if len({pd.api.types.is_numeric_dtype(_kind(piece)) for piece in having}) > 1:
            _log.warning("column %r of obs holds numbers in one %s and words in another: words in all", column, what)
            for frame in frames:
                if column in frame:
                    frame[column] = frame[column].astype(object).map(str, na_action="ignore")


def _join_column(name: str, having: list[tuple[int, Any]], n_rows: int) -> Any:
    """A column of which some inputs have a piece, each with its first row; missing elsewhere."""
    if not having:
        return pd.Series(np.full(n_rows, np.nan))
    rows = np.concatenate([np.arange(start, start + len(piece)) for start, piece in having])
    pieces = [piece for _, piece in having]
    categorical = all(isinstance(piece.dtype, pd.CategoricalDtype) for piece in pieces)
    kinds = [_kind(piece) for piece in pieces]
    if len({pd.api.types.is_numeric_dtype(kind) for kind in kinds}) > 1:
        found = " and ".join(dict.fromkeys(str(kind) for kind in kinds))
        raise ValueError(f"column {name!r} is of type {found} in different inputs; make them alike")
    if categorical and len(set(kinds)) == 1:
        values = pd.Series(pd.api.types.union_categoricals(pieces, ignore_order=True))
    else:
        values = pd.concat(pieces)
    if values.dtype == object and all(map(pd.api.types.is_numeric_dtype, kinds)):
        # Truth values in one and numbers in another stay Python objects, which no h5ad can hold.
        values = values.astype(float)
    if values.dtype == bool and len(rows) < n_rows:
        # Plain truth values cannot be missing and would become objects, which no h5ad can hold.
        values = values.astype("boolean")
    return values.set_axis(rows).reindex(range(n_rows))


def _kind(values: pd.Series[Any]) -> Any:
    """Type of the values; that of the categories where there are any."""
    return values.cat.categories.dtype if isinstance(values.dtype, pd.CategoricalDtype) else values.dtype


def free_column(cells: Mapping[str, tuple[str, pd.DataFrame]], keys: Sequence[str]) -> str:
    """The first of some columns in which no sample has anything but its own name, which is to be written there.

    Parameters
    ----------
    cells
        By the name of a sample how the user would write its table of cells, and that table.
    keys
        The columns.

    Raises
    ------
    ValueError
        If there is none.
    """
    taken = ""
    for key in keys:
        others = {name: {*obs[key].dropna().astype(str)} - {name} for name, (_, obs) in cells.items() if key in obs}
        name = next((name for name, found in others.items() if found), None)
        if name is None:
            return key
        taken = taken or (
            f"{cells[name][0]} has a column {key!r} with {first_names(sorted(others[name]))} where {name!r} is to be "
            "written: give another sample_key, or name the sample so."
        )
    raise ValueError(taken)


def caution_of_same_cells(parts: Sequence[Any]) -> None:
    """Warn of the same counts, and of two modalities of the same cells, given as two samples.

    The samples have a ``name``, a table ``obs`` and counts ``x`` by modality.
    """
    for one, other in combinations(parts, 2):
        size, found = min(len(one.obs), len(other.obs)), one.obs.index.get_indexer(other.obs.index)
        same, shared = int((found >= 0).sum()), [modality for modality in one.x if modality in other.x]
        if same <= SAME_CELLS * size:
            continue
        if not shared:
            caution(
                f"{same} of the {size} cells of one modality have the same name in {one.name!r} and "
                f"{other.name!r}, yet each sample counts as cells of its own. If they are the same, give one "
                "sample in their place: mudata.MuData({'rna': ..., 'atac': ...})."
            )
        # Names alone may be numbers, which say nothing.
        elif same >= _FEWEST_CELLS and np.array_equal(
            *(_totals(part, shared)[rows] for part, rows in ((one, found[found >= 0]), (other, found >= 0)))
        ):
            caution(
                f"{same} of the {size} cells have the same name and the same number of counts in {one.name!r} and "
                f"{other.name!r}, yet each sample counts as cells of its own. If they are the same, give one of both."
            )


def _totals(sample: Any, modalities: Sequence[Any]) -> NDArray[Any]:
    """Number of counts of each cell in some modalities."""
    return np.sum([np.asarray(sample.x[each].sum(axis=1)).ravel() for each in modalities], axis=0)
