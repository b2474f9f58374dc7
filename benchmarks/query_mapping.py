"""Queries mapped onto a reference: labels carried over, reference left as it is, mixing and purity.

``python benchmarks/query_mapping.py FOLDER`` reads ``snare_cell_lines.h5ad`` and ``bmmc_multiome_tiny.h5ad`` in FOLDER.
Lines: a reference of two thirds of the cells, the rest as an RNA-only and an ATAC-only query of a new batch, with all
features, and with ever fewer of them. Marrow: donor 2 mapped onto donor 1, without and with surgery. ``--peer`` adds
scvi-tools, where it is installed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp

import pyro_multivi as pm
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity

KINDS = {"RNA": "Gene Expression", "ATAC": "Peaks"}


def expressed(adata: anndata.AnnData, least: float) -> anndata.AnnData:
    """Features found in at least a share of the cells."""
    share = np.asarray((sp.csr_matrix(adata.X) > 0).mean(0)).ravel()
    return adata[:, share >= least].copy()


def scores(table: pd.DataFrame, truth: pd.Series[Any]) -> dict[str, float]:
    """Accuracy with and without what is unknown, and calibration of the confidence."""
    words = truth.astype(str).to_numpy()
    right = table["nearest_label"].astype(str).to_numpy() == words
    given = table["label"].astype(str).to_numpy()
    confidence = table["confidence"].to_numpy()
    bins = np.minimum((confidence * 5).astype(int), 4)
    gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return {
        "labels right": float((given == words).mean()),
        "unknown": float((given == "unknown").mean()),
        "nearest right": float(right.mean()),
        "mean confidence": float(confidence.mean()),
        "calibration error": float(np.sum(gaps)),
    }


def mixing(latent: np.ndarray, batch: np.ndarray, k: int = 15) -> float:
    """Share of the k nearest neighbours that are of another batch, relative to that of well mixed cells."""
    purity = neighbour_purity(latent, batch, k)
    shares = np.unique(batch, return_counts=True)[1] / len(batch)
    return float((1 - purity) / (1 - np.square(shares).sum()))


def cell_lines(path: Path, epochs: int, seed: int, least: float) -> pd.DataFrame:
    """Labels carried over from paired cells of the lines to cells with one modality."""
    adata = expressed(anndata.read_h5ad(path), least)
    print(
        f"{adata.n_obs} cells,",
        *(f"{(adata.var['feature_types'] == kind).sum()} {kind}" for kind in KINDS.values()),
        flush=True,
    )
    rng = np.random.default_rng(seed)
    is_query = rng.permutation(len(adata)) % 3 == 2
    adata.obs["batch"] = np.where(is_query, "query", "reference")
    reference = adata[~is_query].copy()
    pm.MULTIVI.setup_anndata(reference, batch_key="batch")
    model = pm.MULTIVI(reference, seed=seed)
    model.train(max_epochs=epochs, seed=seed, progress_bar=False)
    before = model.get_latent_representation()
    line = reference.obs["cell_type"].unique()[0]
    known = reference[reference.obs["cell_type"] != line].copy()
    pm.MULTIVI.setup_anndata(known, batch_key="batch")
    smaller = pm.MULTIVI(known, seed=seed)
    smaller.train(max_epochs=epochs, seed=seed, progress_bar=False)
    rows = {}
    for assay, kind in KINDS.items():
        features = np.flatnonzero(adata.var["feature_types"] == kind)
        query = adata[is_query, features].copy()
        # From the smaller set on, cells without a count have nothing measured.
        for share in (1.0, 0.5, 0.25, 0.1):
            kept = query[:, rng.permutation(len(features))[: int(share * len(features))]].copy()
            kept = kept[np.asarray(kept.X.sum(1)).ravel() > 0].copy()
            mapped = pm.MULTIVI.load_query_data(kept, model)
            rows[f"{assay}, {share:.0%} of the features"] = scores(
                model.transfer_labels(mapped, "cell_type"), kept.obs["cell_type"]
            )
        for step, chosen in {"first layers too": {"freeze_expression": False}, "surgery": {}}.items():
            whole = pm.MULTIVI.load_query_data(query, model, **chosen)
            whole.train(seed=seed, progress_bar=False)
            rows[f"{assay}, {step}"] = scores(model.transfer_labels(whole, "cell_type"), query.obs["cell_type"])
        # Of the latter, which leaves states as they are.
        same = whole.get_latent_representation(reference), model.get_latent_representation()
        print(f"{assay}: reference latents bit-equal", all(np.array_equal(each, before) for each in same), flush=True)
        print(pd.DataFrame(rows).T.round(3).to_string(), flush=True)
        novel = np.asarray(query.obs["cell_type"] == line)
        table = smaller.transfer_labels(query, "cell_type")
        words = table["label"].astype(str).to_numpy()
        truth = query.obs["cell_type"].astype(str).to_numpy()
        rows[f"{assay}, without {line}"] = {
            "labels right": float((words == truth)[~novel].mean()),
            "unknown": float((words == "unknown")[~novel].mean()),
            "unknown of the new": float((words == "unknown")[novel].mean()),
        }
    return pd.DataFrame(rows).T


def marrow(path: Path, epochs: int, seed: int, peer: bool) -> pd.DataFrame:
    """Donor 2 mapped onto donor 1."""
    adata = anndata.read_h5ad(path)
    donors = sorted(adata.obs["batch"].unique())
    reference, query = (adata[adata.obs["batch"] == donor].copy() for donor in donors)
    types = pd.concat([reference.obs["cell_type"], query.obs["cell_type"]]).astype(str).to_numpy()
    batch = np.repeat(donors, [len(reference), len(query)])
    shared = query.obs["cell_type"].isin(reference.obs["cell_type"].unique()).to_numpy()
    rows = {}

    def add(name: str, latents: list[np.ndarray], carried: pd.DataFrame | None) -> None:
        latent = np.concatenate(latents)
        rows[name] = {"mixing": mixing(latent, batch), "purity": neighbour_purity(latent, types, 15)}
        nearest = _nearest(latents[0], reference.obs["cell_type"].astype(str).to_numpy(), latents[1])
        rows[name]["transfer, plain neighbours"] = float(
            (nearest == query.obs["cell_type"].astype(str).to_numpy())[shared].mean()
        )
        if carried is not None:
            rows[name] |= scores(carried[shared], query.obs["cell_type"][shared])

    for encode in (False, True):
        pm.MULTIVI.setup_anndata(reference, batch_key="batch")
        model = pm.MULTIVI(reference, seed=seed, encode_covariates=encode)
        model.train(max_epochs=epochs, seed=seed, progress_bar=False)
        kind = "ours, batch given to the encoders" if encode else "ours"
        for chosen in ({}, {"freeze_expression": False}):
            mapped = pm.MULTIVI.load_query_data(query, model, **chosen)
            steps = ("as mapped", "surgery") if not chosen else ("surgery, first layers too",)
            for step in steps:
                if step != "as mapped":
                    mapped.train(seed=seed, progress_bar=False)
                latents = [mapped.get_latent_representation(reference), mapped.get_latent_representation()]
                add(f"{kind}, {step}", latents, model.transfer_labels(mapped, "cell_type"))
    if peer:
        for step, latents in peer_latents(reference, query, epochs, seed).items():
            add(f"scvi-tools, {step}", latents, None)
    return pd.DataFrame(rows).T


def _nearest(reference: np.ndarray, labels: np.ndarray, latent: np.ndarray, k: int = 15) -> np.ndarray:
    """Most frequent label of the k nearest reference cells."""
    from scipy.spatial import cKDTree

    near = labels[np.asarray(cKDTree(reference).query(latent, k=k)[1])]
    names = np.unique(labels)
    return names[np.stack([(near == name).sum(1) for name in names], 1).argmax(1)]


def peer_latents(reference: Any, query: Any, epochs: int, seed: int) -> dict[str, list[np.ndarray]]:
    """Latents of reference and query by scvi-tools, as mapped and after surgery."""
    import mudata
    import scvi

    def multimodal(adata: Any) -> Any:
        parts = {name: adata[:, adata.var["feature_types"] == kind].copy() for name, kind in KINDS.items()}
        made = mudata.MuData(parts)
        made.obs["batch"] = adata.obs["batch"].astype(str).reindex(made.obs_names)
        return made

    scvi.settings.seed = seed
    modalities = {"rna_layer": "RNA", "atac_layer": "ATAC"}
    first, second = multimodal(reference), multimodal(query)
    scvi.model.MULTIVI.setup_mudata(first, batch_key="batch", modalities=modalities)
    genes, regions = (first.mod[name].n_vars for name in KINDS)
    model = scvi.model.MULTIVI(first, n_genes=genes, n_regions=regions)
    model.train(max_epochs=epochs, adversarial_mixing=False)
    mapped = scvi.model.MULTIVI.load_query_data(second, model)
    mapped.is_trained = True
    latents = {"as mapped": [model.get_latent_representation(), mapped.get_latent_representation()]}
    mapped.train(max_epochs=epochs, adversarial_mixing=False, weight_decay=0.0)
    latents["surgery"] = [mapped.get_latent_representation(first), mapped.get_latent_representation()]
    return latents


def main() -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--part", choices=["lines", "marrow"], action="append", help="default: both")
    parser.add_argument("--epochs", type=int, default=300, help="most epochs of each reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--least", type=float, default=0.005, help="lines: features found in this share of cells")
    parser.add_argument("--peer", action="store_true", help="marrow by scvi-tools too")
    options = parser.parse_args()
    parts = options.part or ["lines", "marrow"]
    pd.set_option("display.width", 200)
    if "marrow" in parts:
        file = options.data / "bmmc_multiome_tiny.h5ad"
        print(marrow(file, options.epochs, options.seed, options.peer).round(3).to_string())
    if "lines" in parts:
        file = options.data / "snare_cell_lines.h5ad"
        print(cell_lines(file, options.epochs, options.seed, options.least).round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
