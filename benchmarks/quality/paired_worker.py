"""One system on cells that all have both modalities; prints one line of JSON.

The stage ``fit`` runs in the environment of a system that is trained, and writes its latent space to a file. The
stage ``score`` runs in an environment with scanpy, igraph and muon, the same for every system.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

warnings.filterwarnings("ignore")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import protocol  # noqa: E402
from measure import report, task  # noqa: E402

#: Neighbours of every cell in every graph.
N_NEIGHBOURS = 20
#: Resolutions of Leiden, of which each score takes its best.
RESOLUTIONS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0)
#: Share of the labels that are hidden and told by the others.
HIDDEN_LABELS = 0.5
N_COMPONENTS = 30


def main() -> None:
    """Do one stage."""
    job = task()
    report({"fit": fit, "score": score}[job["stage"]](job))


def fit(job: dict[str, Any]) -> dict[str, Any]:
    """Train a system without labels, and write its latent space."""
    import torch

    torch.set_num_threads(job["threads"])
    system = importlib.import_module(job["system"])
    seen, n_genes = protocol.read(job["data"], job["seed"], job["n_cells"])
    seen.obs = seen.obs.drop(columns="cell_type")
    measured = np.ones(seen.n_obs, dtype=bool)
    found = system.fit(seen, n_genes, measured, measured, job["epochs"], job["seed"], job["settings"])
    np.save(job["latent"], np.asarray(found["latent"], dtype=np.float32))
    return {"seconds": found["seconds"], "epochs": found.get("epochs")}


def score(job: dict[str, Any]) -> dict[str, Any]:
    """Scores of every run: a system by name, or a latent space in a file, with a seed."""
    found = []
    for run in job["runs"]:
        seed = run["seed"]
        whole, n_genes = protocol.read(job["data"], seed, job["n_cells"])
        started = time.perf_counter()
        if run["latent"] is None:
            graph_nn = SYSTEMS[run["system"]](whole, n_genes, seed)
        else:
            graph_nn = neighbours(np.load(run["latent"]), seed)
        seconds = time.perf_counter() - started
        label = whole.obs["cell_type"].astype(str).to_numpy()
        known = ~np.isin(label, job["unlabelled"])
        clusters = [leiden(graph_nn, resolution, seed) for resolution in RESOLUTIONS]
        scores = score_clusters(clusters, label, known) | score_transfer(graph_nn, label, known, seed)
        if job["batch_key"] is not None:
            scores["batch_mixing"] = mixing(graph_nn, whole.obs[job["batch_key"]].astype(str).to_numpy())
        sizes = {"n_cells": whole.n_obs, "n_genes": n_genes, "n_regions": whole.n_vars - n_genes}
        found.append({**sizes, "scores": scores, "seconds": seconds})
        print(run["system"], seed, scores, file=sys.stderr, flush=True)
    return {"runs": found}


def principal_components(whole: Any, n_genes: int, seed: int) -> np.ndarray:
    """RNA: principal components of log counts per 10 000, (n, K)."""
    from sklearn.decomposition import PCA

    x_ng = whole.X[:, :n_genes].tocsr()
    depth = np.maximum(np.asarray(x_ng.sum(axis=1)).ravel(), 1.0)
    logged = (sp.diags_array(1e4 / depth) @ x_ng).log1p().tocsr()
    n = min(N_COMPONENTS, min(logged.shape) - 1)
    return np.asarray(PCA(n, svd_solver="arpack", random_state=seed).fit_transform(logged))


def semantic_indexing(whole: Any, n_genes: int, seed: int) -> np.ndarray:
    """ATAC: singular vectors of log(1 + 10 000 TF-IDF), (n, K), of unit variance; the first, depth, is left out."""
    from sklearn.decomposition import TruncatedSVD

    y_nm = (whole.X[:, n_genes:] > 0).astype(np.float32).tocsr()
    n_open = np.maximum(np.asarray(y_nm.sum(axis=1)).ravel(), 1.0)
    rarity = len(n_open) / np.maximum(np.asarray(y_nm.sum(axis=0)).ravel(), 1.0)
    weighted = (sp.diags_array(1e4 / n_open) @ y_nm @ sp.diags_array(rarity)).log1p().tocsr()
    n = min(N_COMPONENTS, min(weighted.shape) - 1)
    z_nk = TruncatedSVD(n + 1, algorithm="arpack", random_state=seed).fit_transform(weighted)[:, 1:]
    return np.asarray(z_nk / z_nk.std(axis=0))


def concatenation(whole: Any, n_genes: int, seed: int) -> np.ndarray:
    """Both, each scaled to the same total variance."""
    parts = [part(whole, n_genes, seed) for part in (principal_components, semantic_indexing)]
    return np.hstack([part / np.sqrt(part.var(axis=0).sum()) for part in parts])


def weighted_neighbours(whole: Any, n_genes: int, seed: int) -> Any:
    """Weighted nearest neighbours of both modalities, as muon documents them: components of unit length."""
    import anndata
    import mudata
    import muon
    import scanpy

    parts = {}
    for name, part in (("rna", principal_components), ("atac", semantic_indexing)):
        parts[name] = anndata.AnnData(obs=whole.obs[[]].copy())
        parts[name].obsm["X_part"] = part(whole, n_genes, seed)
        muon.pp.l2norm(parts[name], rep="X_part")
        scanpy.pp.neighbors(parts[name], n_neighbors=N_NEIGHBOURS, use_rep="X_part", random_state=seed)
    both = mudata.MuData(parts)
    muon.pp.neighbors(
        both,
        n_neighbors=N_NEIGHBOURS,
        n_multineighbors=min(200, whole.n_obs - 1),
        random_state=seed,
    )
    return both.obsp["connectivities"].tocsr()


def of_space(space: Callable[[Any, int, int], np.ndarray]) -> Callable[[Any, int, int], Any]:
    """The graph of neighbours in a space."""
    return lambda whole, n_genes, seed: neighbours(space(whole, n_genes, seed), seed)


#: Systems that need no training: name and graph of neighbours.
SYSTEMS: dict[str, Callable[[Any, int, int], Any]] = {
    "RNA": of_space(principal_components),
    "ATAC": of_space(semantic_indexing),
    "concatenation": of_space(concatenation),
    "WNN": weighted_neighbours,
}


def neighbours(z_nk: np.ndarray, seed: int) -> Any:
    """Weights of the nearest neighbours, (n, n), as scanpy makes them."""
    import anndata
    import scanpy

    cells = anndata.AnnData(obsm={"z": np.asarray(z_nk)}, obs=dict.fromkeys(["none"], np.zeros(len(z_nk))))
    scanpy.pp.neighbors(cells, n_neighbors=N_NEIGHBOURS, use_rep="z", random_state=seed)
    return cells.obsp["connectivities"].tocsr()


def leiden(graph_nn: Any, resolution: float, seed: int) -> np.ndarray:
    """Clusters of a graph, (n,)."""
    import random

    import igraph

    upper = sp.triu(graph_nn, k=1).tocoo()
    graph = igraph.Graph(n=graph_nn.shape[0], edges=np.stack([upper.row, upper.col], axis=1))
    igraph.set_random_number_generator(random.Random(seed))
    found = graph.community_leiden("modularity", weights=upper.data, resolution=resolution, n_iterations=-1)
    return np.asarray(found.membership)


def score_clusters(clusters: list[np.ndarray], label: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """The best agreement of clusters with types, over resolutions."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    measures = {"ari_leiden": adjusted_rand_score, "ami_leiden": adjusted_mutual_info_score}
    return {
        name: float(max(measure(label[known], found[known]) for found in clusters))
        for name, measure in measures.items()
    }


def score_transfer(graph_nn: Any, label: np.ndarray, known: np.ndarray, seed: int) -> dict[str, float]:
    """Hidden labels told by the weighted vote of labelled neighbours in the graph: share told right.

    A cell without a labelled neighbour is told wrong.
    """
    types, code = np.unique(label, return_inverse=True)
    is_hidden = known & (np.random.default_rng(seed + 3000).random(len(label)) < HIDDEN_LABELS)
    shown = known & ~is_hidden
    vote_nt = graph_nn[is_hidden][:, shown] @ np.eye(len(types))[code[shown]]
    told = np.where(vote_nt.any(axis=1), vote_nt.argmax(axis=1), -1)
    return {"label_transfer": float((told == code[is_hidden]).mean())}


def mixing(graph_nn: Any, batch: np.ndarray) -> float:
    """Mean entropy of the batch among a cell's neighbours by weight, over its entropy among all cells."""
    names, code = np.unique(batch, return_inverse=True)
    share_nb = graph_nn @ np.eye(len(names))[code]
    share_nb = share_nb / share_nb.sum(axis=1, keepdims=True) + 1e-12
    overall = np.bincount(code) / len(code)
    return float(-(share_nb * np.log(share_nb)).sum(axis=1).mean() / -(overall * np.log(overall)).sum())


if __name__ == "__main__":
    main()
