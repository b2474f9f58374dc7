"""Folders with ``matrix.mtx`` and its tables, as Cell Ranger writes them and as repositories hand them out."""

from __future__ import annotations

import gzip
import logging
import os
import warnings
from pathlib import Path
from typing import IO, cast

import numpy as np
import scipy.io
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi.data.checks import checked, first_names
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.data.vocabulary import REGION_NAME
from pyro_multivi.datasets.assembly import ALLOWED, assemble, check_sizes, errors_naming, existing, variables

_log = logging.getLogger("pyro_multivi")

MATRIX, _BARCODES = "matrix.mtx", "barcodes.tsv"
#: Tables of features by the program that writes them: Cell Ranger, Cell Ranger 2, Cell Ranger ATAC.
_FEATURES = ("features.tsv", "genes.tsv", "peaks.bed")


@checked
def read_10x_mtx(folder: str | os.PathLike[str]) -> AnnData:
    r"""Read a folder with ``matrix.mtx``, ``features.tsv`` and ``barcodes.tsv``, each plain or ``.gz``.

    ``genes.tsv`` (Cell Ranger 2) or ``peaks.bed`` (Cell Ranger ATAC) may stand for ``features.tsv``. The names may
    have a prefix, as in a repository: ``GSM1_s1_matrix.mtx.gz``. A ``features.tsv`` without the column of feature
    types says by the names which features are regions (``chr1:100-200``); all others are genes.

    Parameters
    ----------
    folder
        The folder, for instance ``filtered_feature_bc_matrix``; or the ``matrix.mtx`` in it, where a folder holds those
        of several samples.

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
    folder = existing(folder)
    if folder.is_dir():
        matrix_path = _file_in(folder, MATRIX)
    elif plain_name(folder).endswith(MATRIX):
        matrix_path, folder = folder, folder.parent
    else:
        raise ValueError(f"{folder} is a file, not a folder; give {ALLOWED}")
    prefix = plain_name(matrix_path).removesuffix(MATRIX)
    features = _feature_table(_file_in(folder, *_FEATURES, prefix=prefix))
    barcodes = [row[0] for row in _rows(_file_in(folder, _BARCODES, prefix=prefix))]
    # The content tells whether a file is compressed: some browsers unpack and keep the name.
    opened = gzip.open if _is_gzip(matrix_path) else open
    with (
        errors_naming(matrix_path, "is broken or not in Matrix Market format"),
        opened(matrix_path, "rb") as file,
        warnings.catch_warnings(),
    ):
        # SciPy 1.18 warns that it will return another class of sparse matrix; either will do.
        warnings.filterwarnings("ignore", "The default value for `spmatrix`", DeprecationWarning)
        matrix = sp.coo_matrix(scipy.io.mmread(cast("IO[bytes]", file)))
    sizes = len(features["id"]), len(barcodes)
    if matrix.shape != sizes and matrix.shape == sizes[::-1]:
        matrix = matrix.T  # Cells x features, as some programs write it.
    check_sizes(matrix_path, *matrix.shape, *sizes)
    return assemble(sp.csr_matrix(matrix.T, dtype=np.float32), barcodes, variables(features))


def plain_name(path: Path) -> str:
    """Name of a file, without the suffix of compression."""
    return path.name.removesuffix(".gz")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _file_in(folder: Path, *names: str, prefix: str = "") -> Path:
    """The file of one of these names behind the prefix, else without any, else behind the only one there is."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    for start in (prefix, ""):
        for name in names:
            for path in files:
                if plain_name(path) == start + name:
                    return path
    prefixed = {plain_name(path): path for path in files if plain_name(path).endswith(names)}
    wanted = " or ".join(names)
    if not prefixed:
        found = first_names(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{folder} has no {wanted} (plain or .gz); it holds {found}")
    if len(prefixed) > 1:
        matrix = next((path for path in files if plain_name(path).endswith(MATRIX)), folder / MATRIX)
        raise ValueError(
            f"{folder} has more than one {wanted}: {first_names(path.name for path in prefixed.values())}. Give the "
            f"path of one matrix, such as {matrix}; its tables begin with the same letters"
        )
    return next(iter(prefixed.values()))


def _rows(path: Path) -> list[list[str]]:
    """Fields of a tab-separated file; rows may differ in length."""
    with errors_naming(path, "is broken, perhaps truncated"):
        content = path.read_bytes()
        text = (gzip.decompress(content) if _is_gzip(path) else content).decode("utf-8-sig")
    return [line.split("\t") for line in text.splitlines() if line]


def _feature_table(path: Path) -> dict[str, list[str]]:
    """Descriptions of the features, keyed as in the HDF5 file."""
    rows = _rows(path)
    kind = next(name for name in _FEATURES if plain_name(path).endswith(name))
    if kind == "peaks.bed":
        _check_columns(path, rows, 3, "chromosome, start and end")
        intervals = [f"{row[0]}:{row[1]}-{row[2]}" for row in rows]
        types = [ATAC.feature_type] * len(rows)
        return {"id": intervals, "name": intervals, "feature_type": types, "interval": intervals}
    # Without the column of types a table has one or two columns throughout: names, or identifiers and names.
    fewest = min(len(rows[0]), 3) if rows else 3
    _check_columns(path, rows, fewest, "identifier, name and feature type")
    names = [row[min(1, fewest - 1)] for row in rows]
    has_types = kind == "features.tsv" and fewest == 3
    types = [row[2] for row in rows] if has_types else _types_by_name(path, names, kind)
    table = {"id": [row[0] for row in rows], "name": names, "feature_type": types}
    # Cell Ranger ARC adds chromosome, start and end; a gene without a place has them empty or not at all.
    placed = [f"{row[3]}:{row[4]}-{row[5]}" if len(row) >= 6 and row[3] else "" for row in rows]
    if any(placed):
        table["interval"] = placed
    return table


def _check_columns(path: Path, rows: list[list[str]], fewest: int, needed: str) -> None:
    for number, row in enumerate(rows, 1):
        if len(row) < fewest:
            raise ValueError(
                f"{path} has {len(row)} columns in row {number}; it needs at least {fewest} in every row: {needed}"
            )


def _types_by_name(path: Path, names: list[str], kind: str) -> list[str]:
    """Feature types of a table without them, with a warning."""
    found = [ATAC if REGION_NAME.fullmatch(name) else RNA for name in names]
    # genes.tsv never has types; that all its rows are genes goes without saying unless a name is of a region.
    if kind == "features.tsv" or ATAC in found:
        sizes = " and ".join(f"{found.count(modality)} {modality.features}" for modality in MODALITIES)
        _log.warning("%s has no column of feature types: by their names %s", path, sizes)
    return [modality.feature_type for modality in found]
