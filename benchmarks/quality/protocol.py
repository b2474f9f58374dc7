"""Hide one modality in two thirds of paired cells, and score what a system makes of the rest.

A system is a module with one function,

    fit(adata, n_genes, has_rna, has_atac, epochs, seed, settings=None) -> dict

of an AnnData of raw counts (genes first, csr) in which what was hidden is zero. It returns

======================  ==========================================================================
``latent``              (n, K) joint latent
``z_rna``, ``z_atac``   (n, K) latents of one modality alone, used for paired cells only; or None
``rho``                 function of positions -> (len, G), share of each gene, up to a factor per cell
``p``                   function of positions -> (len, M), detection of regions, up to a factor per cell
``seconds``             of training
======================  ==========================================================================

This module imports no system; it needs numpy, scipy, anndata and scikit-learn.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, average_precision_score, silhouette_score
from sklearn.neighbors import NearestNeighbors

#: Groups of metrics, each computed from other results.
GROUPS = ("latent", "accessibility", "expression")
#: Layer of simulated data with the rates that generated it: shares of genes, detection of regions.
TRUE_RATE = "true_rate"

PAIRED, RNA_ONLY, ATAC_ONLY = 0, 1, 2
# Cells whose hidden modality is scored, paired cells and twins that are matched, at most.
_N_IMPUTED, _N_MATCHED, _N_TWINS = 500, 1500, 2000
# Groups of cells of like depth.
_N_STRATA = 4
# Spearman within a cell is taken of every fifth of them.
_EVERY = 5


@dataclass(frozen=True)
class Hidden:
    """A data set with a part hidden.

    Attributes
    ----------
    whole
        All counts: the truth.
    seen
        What a system may see: the counts left, batch columns, no labels.
    n_genes
        G; genes come first.
    part
        Which modalities of each cell are left, (n,): ``PAIRED``, ``RNA_ONLY`` or ``ATAC_ONLY``.
    twins
        Positions of the RNA-only and of the ATAC-only copies of cells that are there twice, (2, n).
    """

    whole: Any
    seen: Any
    n_genes: int
    part: np.ndarray
    twins: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), dtype=np.int64))

    @property
    def has_rna(self) -> np.ndarray:
        return self.part != ATAC_ONLY

    @property
    def has_atac(self) -> np.ndarray:
        return self.part != RNA_ONLY


def prepare(
    path: str | Path,
    seed: int,
    n_cells: int | None = None,
    least_detected: float = 0.01,
    twins: float = 0.0,
    paired: float | None = None,
) -> Hidden:
    """Read a file of paired cells and hide: :func:`read`, then :func:`hide`."""
    whole, n_genes = read(path, seed, n_cells, least_detected)
    return hide(whole, n_genes, seed, twins, paired)


def read(
    path: str | Path, seed: int, n_cells: int | None = None, least_detected: float = 0.01
) -> tuple[anndata.AnnData, int]:
    """Paired cells of a file, genes first, and the number of genes.

    Parameters
    ----------
    path
        h5ad of raw counts with ``obs["cell_type"]`` and ``var["feature_types"]``.
    seed
        Of which cells are taken.
    n_cells
        Take so many cells at random; default all.
    least_detected
        Features detected in a smaller share of the cells are left out.
    """
    whole = anndata.read_h5ad(path)
    if n_cells is not None and n_cells < whole.n_obs:
        whole = whole[np.sort(np.random.default_rng(seed).choice(whole.n_obs, n_cells, replace=False))].copy()
    is_gene = (whole.var["feature_types"] == "Gene Expression").to_numpy()
    is_common = np.asarray((whole.X > 0).mean(axis=0)).ravel() >= least_detected
    order = np.concatenate([np.flatnonzero(is_gene & is_common), np.flatnonzero(~is_gene & is_common)])
    whole = whole[:, order].copy()
    whole.X = sp.csr_matrix(whole.X, dtype=np.float32)
    return whole, int((is_gene & is_common).sum())


def hide(whole: Any, n_genes: int, seed: int, twins: float = 0.0, paired: float | None = None) -> Hidden:
    """Leave a third of the cells paired, a third with RNA only, a third with ATAC only.

    With ``paired`` it is that share which stays paired, and half of the others have RNA only. A share of the cells,
    ``twins``, is there twice instead, once with RNA only and once with ATAC only: pairs that no system may use as
    pairs.
    """
    n_cells = whole.n_obs
    place = np.arange(n_cells)
    code = place % 3 if paired is None else np.where(place < round(paired * n_cells), PAIRED, 1 + place % 2)
    part = np.random.default_rng(seed + 1000).permutation(code)
    one = np.sort(np.random.default_rng(seed + 2000).choice(n_cells, round(twins * n_cells), replace=False))
    two = np.arange(n_cells, n_cells + len(one))
    if len(one):
        part[one] = RNA_ONLY
        part = np.concatenate([part, np.full(len(two), ATAC_ONLY)])
        whole = anndata.concat([whole, whole[one]], merge="same", index_unique="-")
    rna, atac = (
        sp.diags_array((part != missing).astype(np.float32)) @ counts
        for counts, missing in ((whole.X[:, :n_genes], ATAC_ONLY), (whole.X[:, n_genes:], RNA_ONLY))
    )
    left = sp.csr_matrix(sp.hstack([rna, atac]), dtype=np.float32)
    left.eliminate_zeros()
    seen = anndata.AnnData(left, obs=whole.obs.drop(columns="cell_type"), var=whole.var[["feature_types"]])
    return Hidden(whole, seen, n_genes, part, np.stack([one, two]))


def score(
    hidden: Hidden,
    found: Mapping[str, Any],
    batch_key: str | None = None,
    groups: Sequence[str] = GROUPS,
) -> dict[str, float]:
    """Every metric of some groups.

    Parameters
    ----------
    hidden
        What was hidden.
    found
        What a system returned.
    batch_key
        Column of obs; adds ``batch_mixing``.
    groups
        Of :data:`GROUPS`.
    """
    scores: dict[str, float] = {}
    if "latent" in groups:
        scores |= score_latent(hidden, found, batch_key)
    if "accessibility" in groups:
        scores |= score_accessibility(hidden, found["p"])
    if "expression" in groups:
        scores |= score_expression(hidden, found["rho"])
    return scores


def score_latent(hidden: Hidden, found: Mapping[str, Any], batch_key: str | None = None) -> dict[str, float]:
    """Scores of cell types, modalities (and batches) in the latent space."""
    z_nk = np.asarray(found["latent"])
    label = _codes(hidden.whole.obs["cell_type"])
    clusters = KMeans(len(np.unique(label)), n_init=10, random_state=0).fit_predict(z_nk)
    scores = {
        "knn_celltype_purity": float((label[neighbours(z_nk, 30)] == label[:, None]).mean()),
        "ari_kmeans": float(adjusted_rand_score(label, clusters)),
        "silhouette_celltype": float(silhouette_score(z_nk, label)),
        "modality_mixing": mixing(z_nk, hidden.part),
    }
    if batch_key is not None:
        scores["batch_mixing"] = mixing(z_nk, _codes(hidden.whole.obs[batch_key]))
    if found.get("z_rna") is not None:
        paired = np.flatnonzero(hidden.part == PAIRED)[:_N_MATCHED]
        scores["foscttm_paired"] = foscttm(np.asarray(found["z_rna"])[paired], np.asarray(found["z_atac"])[paired])
    one, two = hidden.twins
    if len(one):
        scores["twin_foscttm"] = foscttm(z_nk[one[:_N_TWINS]], z_nk[two[:_N_TWINS]])
        agree = [label[to[nearest(z_nk[of], z_nk[to])]] == label[of] for of, to in ((one, two), (two, one))]
        scores["twin_label_transfer"] = float(np.mean(agree))
    return scores


def score_accessibility(hidden: Hidden, detection: Any) -> dict[str, float]:
    """Imputed accessibility against the hidden one, of cells left with RNA only."""
    # The other half of a twin was seen, as another cell.
    cells = np.setdiff1d(np.flatnonzero(hidden.part == RNA_ONLY), hidden.twins[0])[:_N_IMPUTED]
    is_open = hidden.whole.X[:, hidden.n_genes :] > 0
    truth_bm = is_open[cells].toarray()
    measured = np.asarray(is_open[hidden.has_atac].mean(axis=0)).ravel() + 1e-6
    scores = _accessibility("imputed", truth_bm, np.asarray(detection(cells)))
    scores |= _accessibility("base", truth_bm, np.broadcast_to(measured, truth_bm.shape), across_cells=False)
    if TRUE_RATE in hidden.whole.layers:
        scores |= _accessibility("oracle", truth_bm, _true_rate(hidden, cells)[:, hidden.n_genes :])
    return scores


def _accessibility(name: str, truth_bm: np.ndarray, p_bm: np.ndarray, across_cells: bool = True) -> dict[str, float]:
    some = np.flatnonzero(truth_bm.any(axis=1))
    precision = [average_precision_score(truth_bm[i], p_bm[i]) for i in some]
    depth_b = truth_bm.sum(axis=1)
    mean_bm = np.clip(depth_b[:, None] * p_bm / p_bm.sum(axis=1, keepdims=True), 1e-9, None)
    scores = {
        f"atac_{name}_auprc_per_cell": float(np.mean(precision)),
        f"atac_{name}_auroc_per_cell": float(auroc(truth_bm[some].T, p_bm[some].T).mean()),
        f"atac_{name}_poisson_nll_per_count": float((mean_bm - truth_bm * np.log(mean_bm)).sum() / truth_bm.sum()),
    }
    if across_cells:
        often = np.argsort(-truth_bm.mean(axis=0))[:2000]
        truth_bm, p_bm = truth_bm[:, often], p_bm[:, often]
        scores[f"atac_{name}_auroc_per_region_top2000"] = float(auroc(*_varying(truth_bm, p_bm)).mean())
        edges = np.quantile(depth_b, np.linspace(0, 1, _N_STRATA + 1)[1:-1])
        stratum = np.searchsorted(edges, depth_b)
        found, weights = [], []
        for s in range(_N_STRATA):
            truth, value = _varying(truth_bm[stratum == s], p_bm[stratum == s])
            found.append(auroc(truth, value))
            weights.append(truth.sum(axis=0) * (~truth).sum(axis=0))
        in_strata = np.average(np.concatenate(found), weights=np.concatenate(weights))
        scores[f"atac_{name}_auroc_per_region_in_depth_strata"] = float(in_strata)
    return scores


def _varying(truth: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns whose truth is not the same in all cells."""
    varies = truth.any(axis=0) & ~truth.all(axis=0)
    return truth[:, varies], value[:, varies]


def score_expression(hidden: Hidden, share: Any) -> dict[str, float]:
    """Imputed expression against the hidden one, of cells left with ATAC only."""
    cells = np.setdiff1d(np.flatnonzero(hidden.part == ATAC_ONLY), hidden.twins[1])[:_N_IMPUTED]
    counts = hidden.whole.X[:, : hidden.n_genes]
    truth_bg = counts[cells].toarray()
    measured = np.asarray(counts[hidden.has_rna].sum(axis=0)).ravel() + 1e-2
    scores = _expression("imputed", truth_bg, np.asarray(share(cells)))
    scores |= _expression("base", truth_bg, np.broadcast_to(measured, truth_bg.shape), across_cells=False)
    if TRUE_RATE in hidden.whole.layers:
        scores |= _expression("oracle", truth_bg, _true_rate(hidden, cells)[:, : hidden.n_genes])
    return scores


def _expression(name: str, truth_bg: np.ndarray, rho_bg: np.ndarray, across_cells: bool = True) -> dict[str, float]:
    rho_bg = rho_bg / rho_bg.sum(axis=1, keepdims=True)
    depth_b1 = truth_bg.sum(axis=1, keepdims=True)
    mean_bg = np.clip(depth_b1 * rho_bg, 1e-8, None)
    observed_bg = np.log1p(truth_bg / np.maximum(depth_b1, 1) * 1e4)
    within = slice(None, None, _EVERY)
    scores = {
        f"rna_{name}_poisson_nll_per_count": float((mean_bg - truth_bg * np.log(mean_bg)).sum() / truth_bg.sum()),
        f"rna_{name}_spearman_per_cell": float(np.nanmean(spearman(rho_bg[within].T, observed_bg[within].T))),
    }
    if across_cells:
        varying = np.argsort(-observed_bg.var(axis=0))[:1000]
        rank_correlation = spearman(rho_bg[:, varying], observed_bg[:, varying])
        scores[f"rna_{name}_spearman_per_gene_top1000"] = float(np.nanmean(rank_correlation))
    return scores


def neighbours(z_nk: np.ndarray, k: int) -> np.ndarray:
    """The k nearest cells of each cell, (n, k), itself left out."""
    k = min(k, len(z_nk) - 1)
    return NearestNeighbors(n_neighbors=k + 1).fit(z_nk).kneighbors(z_nk, return_distance=False)[:, 1:]


def nearest(a_nk: np.ndarray, b_nk: np.ndarray) -> np.ndarray:
    """Position of the nearest of b for each of a, (len(a),)."""
    return NearestNeighbors(n_neighbors=1).fit(b_nk).kneighbors(a_nk, return_distance=False)[:, 0]


def mixing(z_nk: np.ndarray, code: np.ndarray, k: int = 50) -> float:
    """Mean entropy of a code among the k nearest cells, over its entropy among all cells: 1 is well mixed."""
    n_codes = int(code.max()) + 1
    near = code[neighbours(z_nk, k)]
    share_nc = np.stack([(near == c).mean(axis=1) for c in range(n_codes)], axis=1) + 1e-12
    overall = np.bincount(code) / len(code)
    overall = overall[overall > 0]
    return float(-(share_nc * np.log(share_nc)).sum(axis=1).mean() / -(overall * np.log(overall)).sum())


def foscttm(a_nk: np.ndarray, b_nk: np.ndarray) -> float:
    """Share of the cells that are closer than the true match, both ways: 0 is perfect, 1/2 chance."""
    distance = cdist(a_nk, b_nk, "sqeuclidean")
    match = np.diag(distance)
    return float(((distance < match[:, None]).mean() + (distance < match[None]).mean()) / 2)


def auroc(truth: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column; ties count half."""
    rank = rankdata(value, axis=0)
    n_true = truth.sum(axis=0)
    above: np.ndarray = (rank * truth).sum(axis=0) - n_true * (n_true + 1) / 2
    return above / (n_true * (len(truth) - n_true))


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Rank correlation of each pair of columns; NaN where one is constant."""
    ranks = [rankdata(values, axis=0) for values in (a, b)]
    a, b = (rank - rank.mean(axis=0) for rank in ranks)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        correlation: np.ndarray = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return correlation


def _codes(column: Any) -> np.ndarray:
    return np.unique(column.astype(str), return_inverse=True)[1]


def _true_rate(hidden: Hidden, cells: np.ndarray) -> np.ndarray:
    return np.asarray(hidden.whole.layers[TRUE_RATE][cells])
