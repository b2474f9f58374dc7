"""Reading files: AnnData, MuData and what Cell Ranger and Cell Ranger ARC write.

Nothing is unpickled: HDF5 and text only.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata
import h5py
import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi._optional import mudata_as_given, require
from pyro_multivi.data.checks import checked, first_names
from pyro_multivi.data.stores.chunks import raise_system_error, refuse_incomplete
from pyro_multivi.data.stores.matrix import opened_group
from pyro_multivi.data.stores.reference import element
from pyro_multivi.datasets.assembly import (
    ALLOWED,
    FEATURE_COLUMNS,
    assemble,
    check_sizes,
    errors_naming,
    existing,
    variables,
)
from pyro_multivi.datasets.mtx import MATRIX, plain_name
from pyro_multivi.datasets.mtx import read_10x_mtx as read_10x_mtx

# Names that Cell Ranger gives to every sample's file or folder, of which the folder above tells one from another.
_EVERY_SAMPLES = re.compile(
    r"[_.-]?((sample_)?(filtered|raw)_(feature|peak|gene)_bc_matri(x|ces)(_h5|_mex)?|matrix|outs|count)$"
)
#: Suffixes of what has to be unpacked first.
_PACKED = (".gz", ".bz2", ".xz", ".zip", ".tar", ".tgz")


@checked
def read(path: str | os.PathLike[str]) -> AnnData | Any:  # Any: a MuData, whose type needs the extra
    """Read cells from a file or folder of any known format.

    Parameters
    ----------
    path
        An AnnData file ``.h5ad`` or folder ``.zarr`` (extra ``zarr``), a MuData file ``.h5mu`` (extra ``mudata``), a
        feature-barcode matrix ``.h5`` of Cell Ranger, Cell Ranger ATAC or Cell Ranger ARC, or a folder with its
        ``matrix.mtx``, or that file itself.

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
        If mudata or zarr is needed and not installed.

    Examples
    --------
    >>> import tempfile
    >>> from pyro_multivi.datasets.simulate import simulate_multiome
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     simulate_multiome((10, 0, 0)).write_h5ad(folder + "/cells.h5ad")
    ...     read(folder + "/cells.h5ad").shape
    (10, 900)
    """
    path = existing(path)
    if any((path / name).is_file() for name in (".zgroup", "zarr.json")):
        require("zarr", "zarr")
        with errors_naming(path):
            _refuse_absent(path)
            return _sound(anndata.read_zarr(path))
    if path.is_dir() and path.suffix.lower() == ".zarr":
        raise ValueError(f"{path} is no zarr store: it has neither zarr.json nor .zgroup. Is it complete?")
    if path.is_dir() or plain_name(path).endswith(MATRIX):
        return read_10x_mtx(path)
    kind = path.suffix.lower()
    if kind == ".h5":
        return read_10x_h5(path)
    if kind in _PACKED:
        raise ValueError(f"{path} is packed: unpack it first, and give what it holds: {ALLOWED}")
    if kind not in (".h5ad", ".h5mu"):
        raise ValueError(f"{path} is of no known format; give {ALLOWED}")
    # Tells a broken file from one with unexpected content, which the reader below reports.
    with _opened(path) as file:
        found = ".h5mu" if "mod" in file else ".h5ad" if "var" in file and "X" in file else kind
    if found != kind:
        raise ValueError(f"{path} looks like a {found} file: give it that suffix.")
    if kind == ".h5ad":
        with errors_naming(path):
            return _sound(anndata.read_h5ad(path))
    with errors_naming(path), mudata_as_given() as mudata:
        mdata = _read_h5mu(mudata, path)
        for adata in mdata.mod.values():
            _sound(adata)
        return mdata


def _refuse_absent(path: Path) -> None:
    """Refuse a zarr folder of which chunks of counts are not there, which anndata would read as zeros."""
    with opened_group(path) as group:
        layers = group["layers"].keys() if "layers" in group else ()
        for name in ("X", *(f"layers/{layer}" for layer in layers)):
            if name in group:
                refuse_incomplete(path, name, group[name])


def _read_h5mu(mudata: ModuleType, path: Path) -> Any:
    """A MuData with the tables that it has in the file."""
    try:
        return mudata.read_h5mu(path)
    except ValueError as error:
        # mudata 0.3 writes NaN to the new rows of obsm and varm, also where there are none, and fails at whole numbers.
        if "NaN to integer" not in str(error) or not hasattr(mudata, "set_options"):
            raise
        # As it reads by default it does not, but puts columns of the modalities into the tables.
        with mudata.set_options(pull_on_update=None), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            mdata = mudata.read_h5mu(path)
        with h5py.File(path, "r") as file:
            tables = {name: element(file, name) for name in ("obs", "var")}
        for name, table in tables.items():
            if not table.index.equals(getattr(mdata, name).index):
                raise
            setattr(mdata, name, table)
        return mdata


def sample_name(path: str | os.PathLike[str]) -> str:
    """Name of the sample in a file or folder.

    Examples
    --------
    >>> sample_name("data/A.h5ad"), sample_name("S1/outs/filtered_feature_bc_matrix.h5"), sample_name("G1_matrix.mtx")
    ('A', 'S1', 'G1')
    """
    whole = Path(os.path.abspath(path))
    first = re.sub(r"\.(h5|h5ad|h5mu|zarr|mtx)$", "", plain_name(whole), flags=re.IGNORECASE)
    found = (_EVERY_SAMPLES.sub("", part) for part in (first, *(folder.name for folder in whole.parents)))
    return next((name for name in found if name), first)


@checked
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
    path = existing(path)
    with errors_naming(path):
        return _feature_barcode_matrix(path)


def _feature_barcode_matrix(path: Path) -> AnnData:
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
        features = {key: _strings(stored[key]) for key in ("name", *FEATURE_COLUMNS) if key in stored}
        # Compressed by barcode over features x barcodes: the same arrays are csr over cells x features.
        data, indices, indptr = (np.asarray(matrix[key]) for key in ("data", "indices", "indptr"))
        n_features, n_cells = (int(size) for size in matrix["shape"])
    check_sizes(path, n_features, n_cells, len(features["id"]), len(barcodes))
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
    return assemble(x, barcodes, variables(features))


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file; the error of HDF5 about a broken one becomes one that names the file."""
    try:
        # H5py says of a file that may not be read that it is no HDF5 file.
        path.open("rb").close()
        if not h5py.is_hdf5(path):
            raise ValueError(f"{path} is not an HDF5 file, as {path.suffix} must be; is it complete?")
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise_system_error(error, path)
        raise ValueError(f"{path} is broken, perhaps truncated: {error}") from error


def _sound(adata: AnnData) -> AnnData:
    """Refuse sparse matrices that contradict themselves: no reader checks them, and some uses of them crash."""
    for matrix in (adata.X, *adata.layers.values()):
        if isinstance(matrix, (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array)):
            matrix.check_format(full_check=True)
    return adata


def _describe(file: h5py.File) -> str:
    """Reason why an HDF5 file is no feature-barcode matrix, from what it holds."""
    groups = list(file)
    if any("gene_names" in file[name] for name in groups if isinstance(file[name], h5py.Group)):
        return "it was written by Cell Ranger 2; read the folder with matrix.mtx and genes.tsv instead"
    if {"obs", "var"} <= set(groups):
        kind = ".h5mu" if "mod" in groups else ".h5ad"
        return f"it looks like a {kind} file: give it that suffix"
    return f"it holds {first_names(groups) or 'nothing'}, and a group 'matrix' with 'features' is needed"


def _strings(dataset: h5py.Dataset) -> list[str]:
    return [str(value) for value in dataset.asstr()[:]]
