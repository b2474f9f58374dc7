"""Likelihoods of accessibility: which explains held-out cells, what it does to types and imputation, and its time.

``python benchmarks/accessibility_likelihoods.py simulated`` draws fragments, trains a model of open or closed regions,
of Poisson and of negative binomial counts on the same cells, and compares them on held-out ones; ``binarised`` does so
on the same cells with every count above zero as 1. ``real FILE ...`` hides a modality in two thirds of the paired cells
of files with ``var["feature_types"]`` (counts of reads become fragments) and scores types (``obs["cell_type"]``, if it
is there) and imputation. ``time`` prints the CPU time of a step of training on one thread at 15 000 genes × 80 000
regions, the likelihoods in turn and round after round; other processes hardly matter to it.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from step_times import print_step_times, random_cells, untrained

import pyro_multivi as pm
from pyro_multivi.data.fragments.checks import even_share
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity

LIKELIHOODS = ("bernoulli", "poisson", "nb")


def trained(adata: anndata.AnnData, likelihood: str, epochs: int, seed: int, **sizes: int) -> pm.MULTIVI:
    """A model of cells whose measurement patterns are in ``obs["modality"]``."""
    with warnings.catch_warnings():
        # Binarised data are meant here.
        warnings.simplefilter("ignore", UserWarning)
        pm.MULTIVI.setup_anndata(adata, modality_key="modality", layer="used")
        model = pm.MULTIVI(adata, seed=seed, accessibility_likelihood=likelihood, **sizes)
    model.train(max_epochs=epochs, seed=seed, progress_bar=False)
    return model


def compared(models: dict[str, pm.MULTIVI], is_region: np.ndarray, draws: int) -> pd.DataFrame:
    """Held-out log-likelihoods, and those of a second reading of open regions as counts.

    Beside the Poisson reading of :func:`pyro_multivi.compare_models`, a region that is open has one of the counts that
    open regions of the training cells have, as often as they have it.
    """
    table = pm.compare_models(models, n_mc_samples=draws)
    model = models["bernoulli"]
    y = sp.csr_matrix(model.adata.layers["used"])[:, is_region]
    held_out = np.zeros(y.shape[0], dtype=bool)
    held_out[model.validation_indices] = True
    largest = int(y.data.max()) + 1
    seen = np.bincount(y[~held_out].data.astype(int), minlength=largest)[1:] + 0.5
    log_share = np.log(seen / seen.sum())
    of_counts = log_share[y[held_out].data.astype(int) - 1].sum() / held_out.sum()
    table["frequency_reading"] = np.nan
    table.loc["bernoulli", "frequency_reading"] = table.loc["bernoulli", "open_log_likelihood"] + of_counts
    columns = ["log_likelihood", "difference", "difference_error", "frequency_reading"]
    return table[[*columns, "open_log_likelihood", "open_difference", "open_difference_error", "n_cells"]]


def auroc(truth: np.ndarray, value: np.ndarray) -> float:
    """Area under the ROC curve, of one cell."""
    order = np.argsort(value, kind="stable")
    rank = np.empty(len(value))
    rank[order] = np.arange(1, len(value) + 1)
    n = truth.sum()
    return float((rank[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))


def simulated(options: argparse.Namespace, binarised: bool) -> None:
    """Compare likelihoods on simulated fragments, or on the same cells with no count above 1."""
    for seed in range(options.seeds):
        n = options.cells
        adata = pm.simulate_multiome(
            (n, n // 4, n // 4), options.genes, options.regions, fragments=options.fragments, seed=seed
        )
        is_region = (adata.var["feature_types"] == "Peaks").to_numpy()
        counts = sp.csc_matrix(adata.X)
        if binarised:
            counts = sp.hstack([counts[:, ~is_region], counts[:, is_region] > 0])
        adata.layers["used"] = sp.csr_matrix(counts, dtype=np.float32)
        models = {name: trained(adata, name, options.epochs, seed) for name in LIKELIHOODS}
        print(f"\nseed {seed}, {'binarised' if binarised else 'fragments'}:")
        print(compared(models, is_region, options.draws).round(2).to_string())
        rate = adata.obsm["true_p"] * adata.var["true_region_factor"].to_numpy()[is_region]
        rate = options.fragments * rate * adata.obs["true_cell_factor"].to_numpy()[:, None]
        changes = adata.var["is_differential"].to_numpy()[is_region]
        for name, model in models.items():
            found = detection(model)
            rows = {"measured": adata.obs["modality"] != "expression", "imputed": adata.obs["modality"] == "expression"}
            of_truth = {
                what: np.mean([
                    np.corrcoef(found[cells][:, m], 1 - np.exp(-rate[cells][:, m]))[0, 1]
                    for m in np.flatnonzero(changes)
                ])
                for what, cells in rows.items()
            }  # fmt: skip
            shown = ", ".join(f"{what} {value:.3f}" for what, value in of_truth.items())
            print(
                f"  {name:<10} P(y > 0) against the truth over cells: {shown}; purity {purity(model):.3f}", flush=True
            )


def detection(model: pm.MULTIVI, indices: Any = None) -> np.ndarray:
    """Probability of at least one fragment in each cell, of its own depth."""
    found = model.get_accessibility_estimates(
        indices=indices, normalize_cells=True, normalize_regions=True, detection=True, return_numpy=True
    )
    return np.asarray(found)


def purity(model: pm.MULTIVI) -> float:
    """Share of a cell's neighbours that are of its type."""
    if "cell_type" not in model.adata.obs:
        return float("nan")
    types = model.adata.obs["cell_type"].astype(str).to_numpy()
    return neighbour_purity(np.asarray(model.get_latent_representation()), types, 30)


def real(options: argparse.Namespace, path: Path) -> None:
    """Compare likelihoods on cells of a file, some of them with a modality hidden."""
    whole = anndata.read_h5ad(path)
    whole.X = sp.csr_matrix(whole.X, dtype=np.float32)
    measured = "modality" if "modality" in whole.obs else None
    pattern = (
        np.array(["paired"] * len(whole), dtype=object)
        if measured is None
        else whole.obs[measured].astype(str).to_numpy(object)
    )
    is_region = (whole.var["feature_types"] == "Peaks").to_numpy()
    for kind, has in ((True, pattern != "expression"), (False, pattern != "accessibility")):
        share = np.asarray((whole.X[has] > 0).mean(0)).ravel()
        is_region_kept = (is_region == kind) & (share < options.least)
        whole = whole[:, ~is_region_kept].copy()
        is_region = (whole.var["feature_types"] == "Peaks").to_numpy()
    counts = sp.csr_matrix(whole.X[:, is_region])
    parts = (torch.from_numpy(part) for part in (counts.indptr, counts.indices, counts.data))
    reads = even_share(SparseCounts(*parts, counts.shape)) is not None
    if reads:
        pm.reads_to_fragments(whole, fragment_layer="used")
    else:
        whole.layers["used"] = whole.X.copy()
    values = whole.layers["used"][:, is_region].data
    print(
        f"\n{path.name}: {whole.n_obs} cells, {(~is_region).sum()} genes, {is_region.sum()} regions, counts of", end=" "
    )
    print(f"{'reads' if reads else 'fragments'}; {(values > 1).mean():.1%} of open regions have more than one fragment")
    for seed in range(options.seeds):
        rng = np.random.default_rng(seed)
        seen = pattern.copy()
        paired = rng.permutation(np.flatnonzero(pattern == "paired"))
        third = len(paired) // 3
        seen[paired[:third]], seen[paired[third : 2 * third]] = "expression", "accessibility"
        adata = whole.copy()
        adata.obs["modality"] = seen
        kept = sp.csr_matrix(np.where(is_region, 1.0, 0.0))
        of_regions, of_genes = (
            sp.csr_matrix(whole.layers["used"].multiply(each)) for each in (kept, 1 - kept.toarray())
        )
        rows = [sp.diags((seen != other).astype(np.float32)) for other in ("expression", "accessibility")]
        adata.layers["used"] = sp.csr_matrix(rows[0] @ of_regions + rows[1] @ of_genes, dtype=np.float32)
        models = {name: trained(adata, name, options.epochs, seed) for name in LIKELIHOODS}
        print(compared(models, is_region, options.draws).round(2).to_string())
        for name, model in models.items():
            hidden, hidden_rna = paired[:third], paired[third : 2 * third]
            truth = whole.layers["used"][hidden][:, is_region].toarray() > 0
            found = detection(model, hidden)
            of_cells = [auroc(one, value) for one, value in zip(truth, found, strict=True) if 0 < one.sum() < len(one)]
            x = whole.layers["used"][hidden_rna][:, ~is_region].toarray()
            share = model.get_normalized_expression(indices=hidden_rna, return_numpy=True)
            nll = -(x * np.log(share * x.sum(1, keepdims=True)) - share * x.sum(1, keepdims=True)).sum() / x.sum()
            print(
                f"  seed {seed} {name:<10} purity {purity(model):.3f}, hidden regions AUROC {np.mean(of_cells):.4f}, "
                f"hidden counts of genes {nll:.3f} nats per count",
                flush=True,
            )


def step_times(options: argparse.Namespace) -> None:
    """CPU time of a step of training by likelihood, relative to open or closed regions."""
    adata = random_cells(np.random.default_rng(0), options.cells, options.genes, options.regions)
    models = {name: untrained(adata, name) for name in LIKELIHOODS}
    for choices in [{}, {"compile": True}] if options.compile else [{}]:
        print(f"\n{options.genes} genes x {options.regions} regions, 128 cells, 1 thread, {choices or 'eager'}")
        print_step_times(models, options.rounds, **choices)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulated", "binarised", "real", "time"))
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--cells", type=int, help="default: 400; 1280 for time")
    parser.add_argument("--genes", type=int, help="default: 300; 15000 for time")
    parser.add_argument("--regions", type=int, help="default: 600; 80000 for time")
    parser.add_argument("--fragments", type=float, default=4.0, help="mean fragments of an open region")
    parser.add_argument("--least", type=float, default=0.02, help="least share of the cells with a feature")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compiled loops too")
    options = parser.parse_args()
    defaults = (1280, 15_000, 80_000) if options.what == "time" else (400, 300, 600)
    for name, value in zip(("cells", "genes", "regions"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.what == "time":
        step_times(options)
    elif options.what == "real":
        for path in options.files:
            real(options, path)
    else:
        simulated(options, options.what == "binarised")


if __name__ == "__main__":
    main()
