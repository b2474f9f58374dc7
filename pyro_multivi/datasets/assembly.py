"""Steps that all readers share: paths, errors that name the file, names and types of features, an AnnData."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi.data.modality import ATAC

ALLOWED = (
    "an AnnData file (.h5ad), a MuData file (.h5mu), a 10x feature-barcode matrix (.h5), "
    "or a folder with matrix.mtx, features.tsv and barcodes.tsv, each plain or .gz"
)
#: Descriptions of a feature in a 10x file, and the column of ``var`` that each becomes.
FEATURE_COLUMNS = {"id": "gene_ids", "feature_type": "feature_types", "genome": "genome", "interval": "interval"}


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
    except (ImportError, MemoryError):
        raise
    except Exception as error:
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
