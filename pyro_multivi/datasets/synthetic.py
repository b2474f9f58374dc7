"""Cells for trying things out, by the name and with the columns of ``scvi.data.synthetic_iid``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi._optional import mudata_as_given
from pyro_multivi._settings import settings
from pyro_multivi.data.checks import check_choice, checked, shown

if TYPE_CHECKING:
    from mudata import MuData

# Of negative binomial counts: successes and their probability.
_SUCCESSES, _PROBABILITY = 5, 0.3
# Mean and standard deviation of values that are no counts, rna_dist="normal".
_MEAN, _SD = 5.0, 2.0


@checked
def synthetic_iid(
    batch_size: int = 200,
    n_genes: int = 100,
    n_proteins: int = 100,
    n_regions: int = 100,
    n_batches: int = 2,
    n_labels: int = 3,
    dropout_ratio: float = 0.7,
    sparse_format: str | None = None,
    generate_coordinates: bool = False,
    return_mudata: bool = False,
    *,
    batch_key: str = "batch",
    labels_key: str = "labels",
    rna_key: str = "rna",
    gene_names_prefix: str = "gene",
    protein_expression_key: str = "protein_expression",
    protein_names_key: str = "protein_names",
    protein_names_prefix: str = "protein",
    accessibility_key: str = "accessibility",
    region_names_prefix: str = "region",
    coordinates_key: str = "coordinates",
    rna_dist: str = "nb",
    seed: int | None = None,
) -> AnnData | MuData:
    """Draw counts that are independent of each other, with the shapes and names of ``scvi.data.synthetic_iid``.

    There is nothing to be learned from them; :func:`pyro_multivi.simulate_multiome` draws cells of several types.

    Parameters
    ----------
    batch_size
        Cells of each batch.
    n_genes, n_proteins, n_regions
        Numbers of features; without proteins or regions there is no such matrix.
    n_batches, n_labels
        Numbers of batches and of labels, the latter at random.
    dropout_ratio
        Share of the counts of genes and regions that is kept; all others are 0. (The name is that of scvi-tools.)
    sparse_format
        ``"csr_matrix"`` or ``"csc_matrix"``; None is dense.
    generate_coordinates
        Also two coordinates of each cell, in ``obsm``.
    return_mudata
        A MuData of the modalities "rna", "accessibility" and "protein_expression" instead of an AnnData of genes with
        all else in ``obsm``.
    batch_key, labels_key, rna_key, gene_names_prefix, protein_expression_key, protein_names_key, \
    protein_names_prefix, accessibility_key, region_names_prefix, coordinates_key
        Names of columns, modalities and matrices, and beginnings of the names of features.
    rna_dist
        ``"nb"``, or ``"normal"`` for values that are no counts.
    seed
        Seed; default: ``pyro_multivi.settings.seed``, or 0.

    Returns
    -------
    AnnData or MuData
        ``n_batches * batch_size`` cells.

    Examples
    --------
    >>> adata = synthetic_iid(batch_size=5)
    >>> adata.shape, adata.obsm["accessibility"].shape, adata.obs["batch"].unique().tolist()
    ((10, 100), (10, 100), ['batch_0', 'batch_1'])
    """
    if n_genes < 1:
        raise ValueError(f"n_genes={shown(n_genes)} is not allowed: give a whole number of at least 1.")
    check_choice("rna_dist", rna_dist, ("nb", "normal"))
    if sparse_format is not None:
        check_choice("sparse_format", sparse_format, ("csr_matrix", "csc_matrix"))
    random, n = np.random.default_rng(settings.seed_or(seed)), n_batches * batch_size

    def counts(width: int, kept: float = 1.0, normal: bool = False) -> Any:
        shape = (n, width)
        drawn: Any = random.normal(_MEAN, _SD, shape) if normal else None
        if drawn is None:
            drawn = random.negative_binomial(_SUCCESSES, _PROBABILITY, shape)
        drawn = drawn * random.binomial(1, kept, shape)
        return drawn if sparse_format is None else getattr(sp, sparse_format)(drawn)

    def names(prefix: str, width: int) -> list[str]:
        return [f"{prefix}_{place}" for place in range(width)]

    cells = [str(place) for place in range(n)]
    obs = pd.DataFrame({batch_key: pd.Categorical(np.repeat(names("batch", n_batches), batch_size))}, index=cells)
    parts = {rna_key: (counts(n_genes, dropout_ratio, rna_dist == "normal"), names(gene_names_prefix, n_genes))}
    if n_regions:
        parts[accessibility_key] = counts(n_regions, dropout_ratio), names(region_names_prefix, n_regions)
    if n_proteins:
        parts[protein_expression_key] = counts(n_proteins), names(protein_names_prefix, n_proteins)
    if n_labels:
        obs[labels_key] = pd.Categorical(np.array(names("label", n_labels))[random.integers(0, n_labels, n)])
    data: Any
    if return_mudata:
        modalities = {
            key: AnnData(matrix, obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=features))
            for key, (matrix, features) in parts.items()
        }
        with mudata_as_given() as mudata:
            data = mudata.MuData(modalities)
        for column in obs.columns:
            data.obs[column] = obs[column]
    else:
        matrix, features = parts.pop(rna_key)
        data = AnnData(matrix, obs=obs, var=pd.DataFrame(index=features))
        for key, (matrix, features) in parts.items():
            data.obsm[key] = matrix
            if key == protein_expression_key:
                data.uns[protein_names_key] = np.array(features)
    if generate_coordinates:
        data.obsm[coordinates_key] = random.normal(size=(n, 2))
    return data
