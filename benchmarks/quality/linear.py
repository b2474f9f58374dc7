"""No training: linear projections of each modality, and averages over the nearest paired cells.

The joint latent is the space of RNA; cells without RNA stand at the mean of the paired cells whose
ATAC is most like theirs. Takes seconds; a model that does not beat it has no reason to be used.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.neighbors import NearestNeighbors

N_COMPONENTS = 20
N_NEIGHBOURS = 25


def fit(
    adata: Any,
    n_genes: int,
    has_rna: np.ndarray,
    has_atac: np.ndarray,
    epochs: int | None,
    seed: int,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Project and look up; ``epochs`` and ``settings`` mean nothing here."""
    started = time.perf_counter()
    x_ng = adata.X[:, :n_genes].tocsr()
    y_nm = (adata.X[:, n_genes:] > 0).astype(np.float32).tocsr()
    paired = np.flatnonzero(has_rna & has_atac)
    z_rna = project_rna(x_ng, has_rna, seed)
    z_atac = project_atac(y_nm, has_atac, seed)

    def like(z_nk: np.ndarray, cells: np.ndarray, n: int = N_NEIGHBOURS) -> np.ndarray:
        """Paired cells most like each of these, (len, n), in the space of one modality."""
        found = NearestNeighbors(n_neighbors=min(n, len(paired))).fit(z_nk[paired])
        return paired[found.kneighbors(z_nk[cells], return_distance=False)]

    latent = z_rna.copy()
    latent[~has_rna] = z_rna[like(z_atac, np.flatnonzero(~has_rna))].mean(axis=1)
    from_atac = np.full_like(latent, np.nan)
    # The first one found is the cell itself.
    from_atac[paired] = z_rna[like(z_atac, paired, N_NEIGHBOURS + 1)[:, 1:]].mean(axis=1)
    mean_share = np.asarray(x_ng.sum(axis=0)).ravel() + 1.0
    mean_share /= mean_share.sum()
    mean_detection = np.asarray(y_nm[has_atac].mean(axis=0)).ravel()

    def rho(cells: np.ndarray) -> np.ndarray:
        # Half neighbours, half mean profile: 25 shallow cells leave most genes at zero.
        pooled = np.stack([np.asarray(x_ng[near].sum(axis=0)).ravel() for near in like(z_atac, cells)])
        return 0.5 * pooled / np.maximum(pooled.sum(axis=1, keepdims=True), 1.0) + 0.5 * mean_share

    def p(cells: np.ndarray) -> np.ndarray:
        near = np.stack([np.asarray(y_nm[near].mean(axis=0)).ravel() for near in like(z_rna, cells)])
        return 0.5 * near + 0.5 * mean_detection

    seconds = time.perf_counter() - started
    return {"latent": latent, "z_rna": z_rna, "z_atac": from_atac, "rho": rho, "p": p, "seconds": seconds}


def project_rna(x_ng: Any, measured: np.ndarray, seed: int) -> np.ndarray:
    """Principal components of log counts per 10 000, (n, K); zero where not measured."""
    depth = np.maximum(np.asarray(x_ng.sum(axis=1)).ravel(), 1.0)
    logged = (sp.diags_array(1e4 / depth) @ x_ng).log1p().tocsr()[measured]
    n = min(N_COMPONENTS, min(logged.shape) - 1)
    z_nk = np.zeros((len(measured), n))
    z_nk[measured] = PCA(n, svd_solver="arpack", random_state=seed).fit_transform(logged)
    return z_nk


def project_atac(y_nm: Any, measured: np.ndarray, seed: int) -> np.ndarray:
    """Latent semantic indexing, (n, K); zero where not measured. Its first component, depth, is left out."""
    n_open = np.maximum(np.asarray(y_nm.sum(axis=1)).ravel(), 1.0)
    rarity = np.log1p(measured.sum() / (1.0 + np.asarray(y_nm.sum(axis=0)).ravel()))
    weighted = (sp.diags_array(1 / n_open) @ y_nm @ sp.diags_array(rarity)).tocsr()[measured]
    n = min(N_COMPONENTS, min(weighted.shape) - 1)
    z_nk = np.zeros((len(measured), n - 1))
    z_nk[measured] = TruncatedSVD(n, random_state=seed).fit_transform(weighted)[:, 1:]
    return z_nk
