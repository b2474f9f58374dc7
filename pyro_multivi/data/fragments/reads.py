"""Counts of reads turned into counts of fragments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_multivi.data.checks import caution, checked, first_names, shown
from pyro_multivi.data.modality import ATAC
from pyro_multivi.data.setup.adapter import layer_names
from pyro_multivi.data.setup.options import is_lazy, is_mudata
from pyro_multivi.data.vocabulary import feature_type_column, spelled

if TYPE_CHECKING:
    from anndata import AnnData


@checked
def reads_to_fragments(
    adata: AnnData,
    read_layer: str | None = None,
    fragment_layer: str = "fragments",
    feature_type_key: str = "feature_types",
) -> None:
    """Add a layer with counts of fragments, half of those of reads, rounded up.

    Both ends of a fragment are read, and both fall into the same peak unless it ends between them: counts of reads are
    mostly even. Fragments are what a cell has, and what Poisson and negative binomial models of accessibility
    (``accessibility_likelihood``) are of (Martens, Fischer, Yépez, Theis, Gagneur, 2024, Modeling fragment counts
    improves single-cell ATAC-seq analysis, Nature Methods 21).

    Parameters
    ----------
    adata
        Counts of reads; also of genes, which stay what they are in the new layer. Of a MuData give its ATAC.
    read_layer
        Layer of the counts of reads; default: ``X``.
    fragment_layer
        Layer that is added, to be named in the setup: ``setup_anndata(adata, layer="fragments")``.
    feature_type_key
        Column of ``var`` with feature types. Without it all features count as regions.

    Raises
    ------
    ValueError, TypeError
        If ``adata`` is no AnnData in memory, holds values that are no counts, or has that layer already.

    Examples
    --------
    >>> import pyro_multivi as pm
    >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, reads=True, seed=0)
    >>> pm.reads_to_fragments(adata)
    >>> bool((adata.layers["fragments"][:, 30:].sum() < adata.X[:, 30:].sum()).all())
    True
    """
    if is_mudata(adata):
        raise TypeError("adata is a MuData: give its ATAC, reads_to_fragments(mdata.mod['atac']).")
    if not hasattr(adata, "layers"):
        raise TypeError(f"adata must be an AnnData, got {shown(adata)}.")
    if fragment_layer in adata.layers:
        raise ValueError(f"layers[{fragment_layer!r}] is there already: give another fragment_layer, or delete it.")
    if read_layer is not None and read_layer not in adata.layers:
        known = first_names(layer_names(adata.layers)) or "none"
        raise ValueError(f"read_layer={read_layer!r} is no layer: choose from {known}.")
    where = "X" if read_layer is None else f"layers[{read_layer!r}]"
    reads: Any = adata.X if read_layer is None else adata.layers[read_layer]
    is_sparse = bool(sp.issparse(reads))
    if is_lazy(reads) or not (is_sparse or isinstance(reads, np.ndarray)):
        raise TypeError(
            f"{where} is {shown(reads)}: read it into memory first, adata.to_memory(), or what open_stores "
            "opened by pyro_multivi.read(path)."
        )
    is_region = _regions(adata, feature_type_key)
    made: Any = sp.csr_array(reads, copy=True)
    # A count may be stored in parts, each of which would be rounded up.
    made.sum_duplicates()
    made.eliminate_zeros()
    of_regions = is_region[made.indices]
    made.data[of_regions] = fragments_of(made.data[of_regions], where)
    adata.layers[fragment_layer] = sp.csr_matrix(made) if is_sparse else made.toarray()


def fragments_of(reads: NDArray[Any], where: str) -> NDArray[Any]:
    """Half of some counts of reads above zero, rounded up, of the same type.

    Raises
    ------
    ValueError
        If they are no counts.
    """
    wrong = ~np.isfinite(reads) | (reads < 0)
    wrong |= reads != np.floor(reads)
    if wrong.any():
        raise ValueError(f"{where} holds {reads[wrong][0]!s} among its regions, which is no count of reads.")
    if len(reads) and (reads % 2 == 1).mean() > 0.5:
        caution(
            f"{(reads % 2 == 1).mean():.0%} of the counts above zero in {where} are odd, as of fragments rather than "
            "reads, of which most are even: use them as they are."
        )
    return np.ceil(reads / 2).astype(reads.dtype)


def make_fragments(matrix: Any, columns: NDArray[np.intp], where: str) -> None:
    """Put counts of fragments into the place of those of reads, in some columns of a matrix in memory."""
    is_region = np.zeros(matrix.shape[1], dtype=bool)
    is_region[columns] = True
    if hasattr(matrix, "indptr"):
        matrix.sum_duplicates()
        lengths = np.diff(matrix.indptr)
        column = np.repeat(np.arange(len(lengths)), lengths) if matrix.format == "csc" else matrix.indices
        chosen = is_region[column] & (matrix.data != 0)
        matrix.data[chosen] = fragments_of(matrix.data[chosen], where)
        return
    chosen = is_region & (matrix != 0)
    matrix[chosen] = fragments_of(matrix[chosen], where)


def _regions(adata: AnnData, feature_type_key: str) -> NDArray[np.bool_]:
    """Whether each feature is a region."""
    column = feature_type_column(feature_type_key, adata.var.columns, needed=False)
    if not column and feature_type_key:
        return np.ones(adata.n_vars, dtype=bool)
    if column not in adata.var:
        raise ValueError(f"feature_type_key={column!r} is no column of var: it has {first_names(adata.var.columns)}.")
    types: Any = adata.var[column].astype(str)
    found: NDArray[np.bool_] = types.map(lambda word: spelled(word) == ATAC.name).to_numpy(dtype=bool)
    if not found.any():
        raise ValueError(
            f"No feature of adata is a region: var[{column!r}] holds {first_names(types.unique())}. Name its column "
            f"with feature_type_key, or call regions {ATAC.feature_type!r} there."
        )
    return found
