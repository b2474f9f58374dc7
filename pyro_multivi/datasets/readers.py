"""Reading files: AnnData, MuData and what Cell Ranger and Cell Ranger ARC write.

Nothing is unpickled: HDF5 and text only.
"""

from __future__ import annotations

import gzip
import os
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.checks import first_names
from pyro_multivi.data.modality import ATAC, RNA

_ALLOWED = (
    "an AnnData file (.h5ad), a MuData file (.h5mu), a 10x feature-barcode matrix (.h5), "
    "or a folder with matrix.mtx, features.tsv and barcodes.tsv, each plain or .gz"
)

#: Descriptions of a feature in a 10x file, and the column of ``var`` that each becomes.
_COLUMNS = {"id": "gene_ids", "feature_type": "feature_types", "genome": "genome", "interval": "interval"}


def read(path: str | os.PathLike[str]) -> AnnData | Any:  # Any: a MuData, whose type needs the extra
    """Read cells from a file or folder of any known format.

    Parameters
    ----------
    path
        An AnnData file ``.h5ad``, a MuData file ``.h5mu`` (needs the extra ``mudata``), a feature-barcode
        matrix ``.h5`` of Cell Ranger, Cell Ranger ATAC or Cell Ranger ARC, or a folder with its
        ``matrix.mtx``.

    Returns
    -------
    AnnData or MuData
        A MuData for ``.h5mu``, else an AnnData.

    Raises
    ------
    FileNotFoundError
        If there is nothing at ``path``.
    ValueError
        If it is of no known format, or broken.
    ImportError
        If mudata is needed and not installed.

    Examples
    --------
    >>> import tempfile
    >>> from pyro_multivi.datasets.simulate import simulate_multiome
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     simulate_multiome((10, 0, 0)).write_h5ad(folder + "/cells.h5ad")
    ...     read(folder + "/cells.h5ad").shape
    (10, 900)
    """
    path = _existing(path)
    if path.is_dir():
        return read_10x_mtx(path)
    kind = path.suffix.lower()
    if kind == ".h5":
        return read_10x_h5(path)
    if kind not in (".h5ad", ".h5mu"):
        raise ValueError(f"{path} is of no known format; give {_ALLOWED}")
    with _opened(path):
        pass  # Tells a broken file from one with unexpected content, which the reader below reports.
    if kind == ".h5ad":
        return anndata.read_h5ad(path)
    with mudata_as_given() as mudata:
        return mudata.read_h5mu(path)


def read_10x_h5(path: str | os.PathLike[str]) -> AnnData:
    """Read a feature-barcode matrix in HDF5, for instance ``filtered_feature_bc_matrix.h5``.

    Written by Cell Ranger since version 3, Cell Ranger ATAC and Cell Ranger ARC.

    Parameters
    ----------
    path
        The file.

    Returns
    -------
    AnnData
        Cells x features in the order of the file; ``X`` is csr float32. ``var`` has ``gene_ids``,
        ``feature_types`` and, where the file has them, ``genome`` and ``interval``. ``var_names`` are gene
        symbols and, for peaks, intervals; the second and later of equal names (of features or of
        cells) get ``-1``, ``-2``, ...

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no such matrix, or broken.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "filtered_feature_bc_matrix.h5"
    ...     with h5py.File(path, "w") as file:
    ...         for name, value in {
    ...             "barcodes": ["AAAC-1", "AAAG-1"],
    ...             "data": [3, 1],
    ...             "indices": [0, 1],
    ...             "indptr": [0, 1, 2],
    ...             "shape": [2, 2],
    ...             "features/id": ["ENSG00000141510", "chr1:10-20"],
    ...             "features/name": ["TP53", "chr1:10-20"],
    ...             "features/feature_type": ["Gene Expression", "Peaks"],
    ...         }.items():
    ...             file[f"matrix/{name}"] = value
    ...     adata = read_10x_h5(path)
    >>> adata.to_df()
            TP53  chr1:10-20
    AAAC-1   3.0         0.0
    AAAG-1   0.0         1.0
    """
    path = _existing(path)
    with _opened(path) as file:
        matrix = file.get("matrix")
        if not isinstance(matrix, h5py.Group) or "features" not in matrix:
            raise ValueError(f"{path} is not a 10x feature-barcode matrix: {_describe(file)}")
        needed = ["barcodes", "data", "indices", "indptr", "shape"]
        needed += ["features/id", "features/name", "features/feature_type"]
        absent = [name for name in needed if name not in matrix]
        if absent:
            raise ValueError(f"{path} lacks {first_names(f'matrix/{name}' for name in absent)}")
        barcodes = _strings(matrix["barcodes"])
        stored = matrix["features"]
        features = {key: _strings(stored[key]) for key in ("name", *_COLUMNS) if key in stored}
        # Compressed by barcode over features x barcodes: the same arrays are csr over cells x features.
        data, indices, indptr = (np.asarray(matrix[key]) for key in ("data", "indices", "indptr"))
        n_features, n_cells = (int(size) for size in matrix["shape"])
    _check_sizes(path, n_features, n_cells, len(features["id"]), len(barcodes))
    consistent = (
        len(indptr) == n_cells + 1
        and indptr[0] == 0
        and (np.diff(indptr) >= 0).all()
        and indptr[-1] == len(data) == len(indices)
        and (len(indices) == 0 or (indices.min() >= 0 and indices.max() < n_features))
    )
    if not consistent:
        raise ValueError(f"{path} is broken: data, indices and indptr of its matrix do not fit together")
    x = sp.csr_matrix((data.astype(np.float32), indices, indptr), shape=(n_cells, n_features))
    return _assemble(x, barcodes, _variables(features))


def read_10x_mtx(folder: str | os.PathLike[str]) -> AnnData:
    r"""Read a folder with ``matrix.mtx``, ``features.tsv`` and ``barcodes.tsv``, each plain or ``.gz``.

    ``genes.tsv`` (Cell Ranger 2) or ``peaks.bed`` (Cell Ranger ATAC) may stand for ``features.tsv``.

    Parameters
    ----------
    folder
        The folder, for instance ``filtered_feature_bc_matrix``.

    Returns
    -------
    AnnData
        As from :func:`read_10x_h5`.

    Raises
    ------
    FileNotFoundError
        If the folder or a file in it is missing.
    ValueError
        If a file is broken or the files do not fit together.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     folder = Path(name)
    ...     scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix([[3, 0], [0, 1]]))
    ...     _ = (folder / "barcodes.tsv").write_text("AAAC-1\nAAAG-1\n")
    ...     _ = (folder / "genes.tsv").write_text("ENSG1\tTP53\nENSG2\tGATA1\n")
    ...     adata = read_10x_mtx(folder)
    >>> adata.to_df()
            TP53  GATA1
    AAAC-1   3.0    0.0
    AAAG-1   0.0    1.0
    """
    folder = _existing(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder; give {_ALLOWED}")
    matrix_path = _one_of(folder, "matrix.mtx")
    features_path = _one_of(folder, "features.tsv", "genes.tsv", "peaks.bed")
    barcodes_path = _one_of(folder, "barcodes.tsv")
    features = _feature_table(features_path)
    barcodes = [row[0] for row in _rows(barcodes_path)]
    try:
        with warnings.catch_warnings():
            # SciPy 1.18 warns that it will return another class of sparse matrix; either will do.
            warnings.filterwarnings("ignore", "The default value for `spmatrix`", DeprecationWarning)
            matrix = scipy.io.mmread(matrix_path)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{matrix_path} is broken or not in Matrix Market format: {error}") from error
    _check_sizes(matrix_path, *matrix.shape, len(features["id"]), len(barcodes))
    return _assemble(sp.csr_matrix(matrix.T, dtype=np.float32), barcodes, _variables(features))


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}; give {_ALLOWED}")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file; the error of HDF5 about a broken one becomes one that names the file."""
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file, as {path.suffix} must be; is it complete?")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path} is broken, perhaps truncated: {error}") from error


def _describe(file: h5py.File) -> str:
    """Reason why an HDF5 file is no feature-barcode matrix, from what it holds."""
    groups = list(file)
    if any("gene_names" in file[name] for name in groups if isinstance(file[name], h5py.Group)):
        return "it was written by Cell Ranger 2; read the folder with matrix.mtx and genes.tsv instead"
    if {"obs", "var"} <= set(groups):
        kind = ".h5mu" if "mod" in groups else ".h5ad"
        return f"it looks like a {kind} file; give it that suffix and use read"
    return f"it holds {first_names(groups) or 'nothing'}, and a group 'matrix' with 'features' is needed"


def _strings(dataset: h5py.Dataset) -> list[str]:
    return [str(value) for value in dataset.asstr()[:]]


def _one_of(folder: Path, *names: str) -> Path:
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    found = first_names(sorted(path.name for path in folder.iterdir())) or "nothing"
    wanted = " or ".join(names)
    raise FileNotFoundError(f"{folder} has no {wanted} (plain or .gz); it holds {found}")


def _rows(path: Path) -> list[list[str]]:
    """Fields of a tab-separated file; rows may differ in length."""
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is broken, perhaps truncated: {error}") from error
    return [line.split("\t") for line in text.splitlines() if line]


def _feature_table(path: Path) -> dict[str, list[str]]:
    """Descriptions of the features, keyed as in the HDF5 file."""
    rows = _rows(path)
    kind = path.name.removesuffix(".gz")
    fewest = {"features.tsv": 3, "genes.tsv": 2, "peaks.bed": 3}[kind]
    for number, row in enumerate(rows, 1):
        if len(row) < fewest:
            raise ValueError(f"{path} has {len(row)} columns in row {number}; {kind} has at least {fewest}")
    if kind == "peaks.bed":
        intervals = [f"{row[0]}:{row[1]}-{row[2]}" for row in rows]
        return {
            "id": intervals,
            "name": intervals,
            "feature_type": [ATAC.feature_type] * len(rows),
            "interval": intervals,
        }
    table = {
        "id": [row[0] for row in rows],
        "name": [row[1] for row in rows],
        "feature_type": [RNA.feature_type if kind == "genes.tsv" else row[2] for row in rows],
    }
    # Cell Ranger ARC adds chromosome, start and end; a gene without a place has them empty or not at all.
    placed = [f"{row[3]}:{row[4]}-{row[5]}" if len(row) >= 6 and row[3] else "" for row in rows]
    if any(placed):
        table["interval"] = placed
    return table


def _check_sizes(path: Path, n_features: int, n_cells: int, features_named: int, cells_named: int) -> None:
    if (n_features, n_cells) != (features_named, cells_named):
        raise ValueError(
            f"{path} holds {n_features} features x {n_cells} barcodes, but {features_named} features and "
            f"{cells_named} barcodes are named"
        )


def _variables(features: dict[str, list[str]]) -> pd.DataFrame:
    """``var`` from the descriptions of the features."""
    intervals = features.get("interval", [""] * len(features["id"]))
    names = [
        interval if kind == ATAC.feature_type and interval else name or identifier
        for identifier, name, kind, interval in zip(
            features["id"], features["name"], features["feature_type"], intervals, strict=True
        )
    ]
    columns: dict[str, Any] = {column: features[key] for key, column in _COLUMNS.items() if key in features}
    for column in ("feature_types", "genome"):
        if column in columns:
            columns[column] = pd.Categorical(columns[column])
    return pd.DataFrame(columns, index=pd.Index(names))


def _assemble(x: sp.csr_matrix, barcodes: list[str], var: pd.DataFrame) -> AnnData:
    x.sum_duplicates()
    with warnings.catch_warnings():
        # AnnData warns of equal names before they can be made unique, and of suffixes that exist.
        warnings.simplefilter("ignore", UserWarning)
        adata = AnnData(x, obs=pd.DataFrame(index=pd.Index(barcodes)), var=var)
        adata.obs_names_make_unique()
        adata.var_names_make_unique()
    return adata
