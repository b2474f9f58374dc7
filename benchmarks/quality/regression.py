"""No network: regressions between the principal components of the two modalities, in seconds.

Each modality gets linear scores from all cells that have it. Paired cells teach how the scores of one follow from
those of the other; rates that are linear in the scores turn predicted scores into what is imputed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import scipy.sparse as sp
from sklearn.cross_decomposition import PLSRegression
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold

N_COMPONENTS = 20
# Numbers of components of partial least squares, of which cross-validation takes one.
_COMPONENTS = {"partial least squares": (2, 4, 8, 15), "canonical correlations": (1, 2, 3, 4, 6, 8, 12)}


def fit(
    adata: Any,
    n_genes: int,
    has_rna: np.ndarray,
    has_atac: np.ndarray,
    epochs: int | None,
    seed: int,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Regress; ``epochs`` means nothing here.

    ``settings["method"]`` is ``"partial least squares"``, ``"ridge"`` or ``"canonical correlations"``. The joint
    latent of the first two is the space of RNA, measured or predicted; that of the last is the mean of a common factor
    given what a cell has (probabilistic canonical correlation); it imputes by partial least squares, and its imputed
    accessibility has the depth of the cell in it.
    """
    started = time.perf_counter()
    method = settings["method"]
    x_ng = adata.X[:, :n_genes].tocsr()
    y_nm = (adata.X[:, n_genes:] > 0).astype(np.float32).tocsr()
    paired = np.flatnonzero(has_rna & has_atac)
    depth, n_open = (np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1.0) for counts in (x_ng, y_nm))
    z_rna, z_atac = rna_scores(x_ng, depth, has_rna, seed), atac_scores(y_nm, n_open, has_atac, seed)
    folds = list(KFold(5, shuffle=True, random_state=0).split(paired))
    rna_from_atac, atac_from_rna = np.zeros_like(z_rna), np.zeros_like(z_atac)
    for z_nk, of, has, into in ((z_atac, z_rna, has_atac, rna_from_atac), (z_rna, z_atac, has_rna, atac_from_rna)):
        into[has] = learn(method, z_nk[paired], of[paired], folds).predict(z_nk[has])
    if method == "canonical correlations":
        latent, alone_rna, alone_atac = common_factor(z_rna, z_atac, has_rna, has_atac, folds)
    else:
        latent, alone_rna, alone_atac = np.where(has_rna[:, None], z_rna, rna_from_atac), z_rna, rna_from_atac

    share_ng, open_nm = (sp.diags_array(1 / depth) @ x_ng).tocsr(), (sp.diags_array(1 / n_open) @ y_nm).tocsr()
    rna_rates, atac_rates = rates(share_ng, z_rna, has_rna), rates(open_nm, z_atac, has_atac)
    mean_share = np.asarray(x_ng[has_rna].sum(axis=0)).ravel() + 0.5
    mean_share /= mean_share.sum()
    mean_open = np.asarray(open_nm[has_atac].mean(axis=0)).ravel()
    depth_scores = np.column_stack([z_rna, np.log(depth)])
    log_n_open = RidgeCV(np.logspace(-2, 4, 13)).fit(depth_scores[paired], np.log(n_open[paired]))

    def rho(cells: np.ndarray) -> np.ndarray:
        share = np.maximum(with_ones(rna_from_atac[cells]) @ rna_rates, 0.2 * mean_share)
        return np.asarray(share / share.sum(axis=1, keepdims=True))

    def p(cells: np.ndarray) -> np.ndarray:
        rate = np.maximum(with_ones(atac_from_rna[cells]) @ atac_rates, 0.05 * mean_open)
        if method != "canonical correlations":
            return np.asarray(rate)
        # With the predicted depth of the cell, on which no score within a cell depends.
        return np.asarray(rate * np.exp(log_n_open.predict(depth_scores[cells]))[:, None])

    seconds = time.perf_counter() - started
    return {"latent": latent, "z_rna": alone_rna, "z_atac": alone_atac, "rho": rho, "p": p, "seconds": seconds}


def rna_scores(x_ng: Any, depth: np.ndarray, measured: np.ndarray, seed: int) -> np.ndarray:
    """Principal components of log counts per 10 000, (n, K); zero where not measured."""
    logged = (sp.diags_array(1e4 / depth) @ x_ng).log1p().tocsr()[measured]
    n = min(N_COMPONENTS, min(logged.shape) - 1)
    z_nk = np.zeros((len(measured), n))
    z_nk[measured] = PCA(n, svd_solver="arpack", random_state=seed).fit_transform(logged)
    return z_nk


def atac_scores(y_nm: Any, n_open: np.ndarray, measured: np.ndarray, seed: int) -> np.ndarray:
    """Latent semantic indexing, (n, K), of unit variance; its first component, depth, is left out."""
    rarity = np.log1p(measured.sum() / (1.0 + np.asarray(y_nm.sum(axis=0)).ravel()))
    weighted = (sp.diags_array(1e4 / n_open) @ y_nm @ sp.diags_array(rarity)).log1p().tocsr()[measured]
    n = min(N_COMPONENTS + 1, min(weighted.shape) - 1)
    z_nk = np.zeros((len(measured), n - 1))
    z_nk[measured] = TruncatedSVD(n, random_state=seed).fit_transform(weighted)[:, 1:]
    z_nk[measured] = (z_nk[measured] - z_nk[measured].mean(axis=0)) / z_nk[measured].std(axis=0)
    return z_nk


def learn(method: str, z_pk: np.ndarray, wanted_pk: np.ndarray, folds: list[Any]) -> Any:
    """A regression of the scores of paired cells, its flexibility chosen by cross-validation."""
    if method == "ridge":
        return RidgeCV(np.logspace(-1, 5, 25)).fit(z_pk, wanted_pk)
    error: dict[int, float] = {}
    for n in _COMPONENTS[method]:
        if n > min(z_pk.shape[1], wanted_pk.shape[1]):
            continue
        for train, test in folds:
            predicted = PLSRegression(n, scale=False).fit(z_pk[train], wanted_pk[train]).predict(z_pk[test])
            error[n] = error.get(n, 0.0) + float(((predicted - wanted_pk[test]) ** 2).sum())
    return PLSRegression(min(error, key=lambda n: error[n]), scale=False).fit(z_pk, wanted_pk)


def common_factor(
    z_rna: np.ndarray, z_atac: np.ndarray, has_rna: np.ndarray, has_atac: np.ndarray, folds: list[Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of the common factor given what a cell has, given RNA and given ATAC (Bach and Jordan 2005).

    Both the penalty and how much each canonical direction is trusted come from held-out cells.
    """
    paired = np.flatnonzero(has_rna & has_atac)
    rna, atac = z_rna / z_rna[has_rna].std(axis=0), z_atac
    n = min(rna.shape[1], atac.shape[1])

    def held_out(penalty: float) -> np.ndarray:
        total = np.zeros(n)
        for train, test in folds:
            a, b = canonical(rna[paired[train]], atac[paired[train]], penalty)
            u, v = rna[paired[test]] @ a, atac[paired[test]] @ b
            total += [max(float(np.corrcoef(u[:, j], v[:, j])[0, 1]), 0.0) for j in range(n)]
        return total / len(folds)

    found = {penalty: held_out(penalty) for penalty in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}
    penalty = max(found, key=lambda one: found[one][:8].sum())
    a, b = canonical(rna[paired], atac[paired], penalty)
    u, v = rna @ a, atac @ b
    u, v = u / u[has_rna].std(axis=0), v / v[has_atac].std(axis=0)
    correlation = np.clip(found[penalty], 0.0, 0.99)
    kept = correlation > 0.1
    if not kept.any():
        kept[0] = True
    root, u, v = np.sqrt(correlation[kept]), u[:, kept], v[:, kept]
    both = (u + v) * root / (1 + root**2)
    latent = np.where((has_rna & has_atac)[:, None], both, np.where(has_rna[:, None], u * root, v * root))
    return latent, u * root, v * root


def canonical(a_pk: np.ndarray, b_pk: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """Canonical directions of two sets of scores with a ridge penalty."""
    roots = []
    for z_pk in (a_pk, b_pk):
        value, vector = np.linalg.eigh(z_pk.T @ z_pk / len(z_pk) + penalty * np.eye(z_pk.shape[1]))
        roots.append(vector @ np.diag(1 / np.sqrt(value)) @ vector.T)
    u, _, vt = np.linalg.svd(roots[0] @ (a_pk.T @ b_pk / len(a_pk)) @ roots[1], full_matrices=False)
    return roots[0] @ u, roots[1] @ vt.T


def rates(share_nf: Any, z_nk: np.ndarray, measured: np.ndarray, penalty: float = 10.0) -> np.ndarray:
    """Coefficients of features' shares on scores and an intercept without penalty, (K + 1, F)."""
    scores = with_ones(z_nk[measured])
    gram = scores.T @ scores + penalty * np.diag(np.r_[0.0, np.ones(scores.shape[1] - 1)])
    return np.asarray(np.linalg.solve(gram, (share_nf[measured].T @ scores).T))


def with_ones(z_nk: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(z_nk)), z_nk])
