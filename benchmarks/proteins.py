"""Proteins: what they add to types, imputation from them and of them against ridge, their truth, and their time.

``python benchmarks/proteins.py simulated`` draws cells of which a part has RNA, ATAC and proteins, a part RNA alone and
a part proteins alone, trains a model with and one without proteins, and prints purity, correlations of imputed with
hidden counts beside those of a ridge regression on the same cells, and how well foreground, background and intervals
hold against the truth. ``time`` prints the CPU time of a step of training on one thread, without and with proteins and
with Poisson counts of fragments, in turn and round after round; other processes hardly matter to it.
"""

from __future__ import annotations

import argparse

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
from step_times import print_step_times, random_cells, untrained

import pyro_multivi as pm
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity

PROTEINS = "protein_expression"
ALL, RNA_ONLY, PROTEINS_ONLY = range(3)


def cells_of(options: argparse.Namespace, seed: int) -> tuple[anndata.AnnData, np.ndarray, np.ndarray, np.ndarray]:
    """Simulated cells with what some were not measured for taken out; their part, and all counts of genes, proteins."""
    n = options.cells
    adata = pm.simulate_multiome(
        (n, 0, 0), options.genes, options.regions, n_types=6, n_batches=2, n_proteins=options.proteins,
        type_separation=0.6, mean_library=500.0, seed=seed,
    )  # fmt: skip
    part = np.random.default_rng(seed).permutation(np.arange(n) % 3)
    genes, proteins = adata.X[:, : options.genes].toarray(), adata.obsm[PROTEINS].to_numpy().copy()
    has_rna, has_atac = part != PROTEINS_ONLY, part == ALL
    keep = sp.csr_matrix(np.repeat([has_rna, has_atac], [options.genes, options.regions], axis=0).T.astype(np.float32))
    adata.X = sp.csr_matrix(adata.X.multiply(keep))
    adata.obs["modality"] = np.array(["paired", "expression", "protein"])[part]
    adata.obsm[PROTEINS].loc[part == RNA_ONLY] = 0.0
    return adata, part, genes, proteins


def trained(adata: anndata.AnnData, seed: int, epochs: int, **keys: str) -> pm.MULTIVI:
    """A model of these cells."""
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", **keys)
    model = pm.MULTIVI(adata, seed=seed)
    model.train(max_epochs=epochs, seed=seed, progress_bar=False)
    return model


def ridge(x: np.ndarray, y: np.ndarray, new: np.ndarray, seed: int) -> np.ndarray:
    """Prediction by ridge regression, its penalty chosen on a fifth of the cells."""
    mean, sd = x.mean(0), x.std(0) + 1e-6
    x, new = (x - mean) / sd, (new - mean) / sd
    held_out = np.random.default_rng(seed).random(len(x)) < 0.2

    def predicted(rows: np.ndarray, at: np.ndarray, penalty: float) -> np.ndarray:
        centre = y[rows].mean(0)
        kernel = x[rows] @ x[rows].T + penalty * np.eye(int(rows.sum()))
        return centre + (at @ x[rows].T) @ np.linalg.solve(kernel, y[rows] - centre)

    penalties = x.shape[1] * 10.0 ** np.arange(-3, 4)
    errors = [np.square(predicted(~held_out, x[held_out], each) - y[held_out]).mean() for each in penalties]
    return predicted(np.ones(len(x), dtype=bool), new, float(penalties[int(np.argmin(errors))]))


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over features of the correlation over cells."""
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [np.corrcoef(one[:, place], other[:, place])[0, 1] for place in range(one.shape[1])]
    return float(np.nanmean(found))


def auroc(is_positive: np.ndarray, score: np.ndarray) -> float:
    """Area under the curve of one protein."""
    rank = pd.Series(score).rank().to_numpy()
    n, m = is_positive.sum(), (~is_positive).sum()
    return float((rank[is_positive].sum() - n * (n + 1) / 2) / (n * m))


def mean_of_log(model: pm.MULTIVI, mean: np.ndarray) -> np.ndarray:
    """Expectation of log(1 + count), which ridge predicts, over background and foreground at their means."""
    share = model.get_protein_foreground_probability(return_numpy=True)
    of_foreground = model.get_normalized_protein_expression(return_numpy=True)
    background = (mean - of_foreground) / (1 - share).clip(min=1e-6)
    return (1 - share) * np.log1p(background) + share * np.log1p(of_foreground / share.clip(min=1e-6))


def simulated(options: argparse.Namespace) -> None:
    """Print every figure, one line per seed, and their means."""
    rows = []
    for seed in options.of_seeds:
        adata, part, genes, proteins = cells_of(options, seed)
        shares = np.log1p(1e4 * genes / genes.sum(1, keepdims=True).clip(min=1))
        logs = np.log1p(proteins)
        model = trained(adata, seed, options.epochs, protein_expression_obsm_key=PROTEINS)
        latent = model.get_latent_representation()
        types = adata.obs["cell_type"].to_numpy()
        few = adata[part != PROTEINS_ONLY].copy()
        without = trained(few, seed, options.epochs).get_latent_representation()
        row = {}
        for name, chosen in (("all three", part == ALL), ("RNA", part == RNA_ONLY)):
            row[f"purity, {name}"] = neighbour_purity(latent[chosen], types[chosen], 15)
            inside = chosen[part != PROTEINS_ONLY]
            row[f"  without proteins, {name}"] = neighbour_purity(without[inside], types[chosen], 15)
        row["purity, proteins alone"] = neighbour_purity(
            latent[part == PROTEINS_ONLY], types[part == PROTEINS_ONLY], 15
        )

        mean = model.get_normalized_protein_expression(include_protein_background=True, return_numpy=True)
        row["proteins from RNA, log of mean"] = correlation(np.log(mean[part == RNA_ONLY]), logs[part == RNA_ONLY])
        row["proteins from RNA, mean of log"] = correlation(
            mean_of_log(model, mean)[part == RNA_ONLY], logs[part == RNA_ONLY]
        )
        by_ridge = ridge(shares[part == ALL], logs[part == ALL], shares[part == RNA_ONLY], seed)
        row["  ridge, proteins"] = correlation(by_ridge, logs[part == RNA_ONLY])
        seen = genes.mean(0) > 0.5
        rho = model.get_normalized_expression(return_numpy=True, library_size=1e4)
        alone = part == PROTEINS_ONLY
        row["RNA from proteins"] = correlation(np.log1p(rho[alone][:, seen]), shares[alone][:, seen])
        by_ridge = ridge(logs[part == ALL], shares[part == ALL], logs[alone], seed)
        row["  ridge, RNA"] = correlation(by_ridge[:, seen], shares[alone][:, seen])

        stained = part != RNA_ONLY
        probability = model.get_protein_foreground_probability(return_numpy=True)
        truth = adata.obsm["true_protein_foreground"].to_numpy()
        row["foreground AUROC"] = float(
            np.mean([auroc(truth[stained, t], probability[stained, t]) for t in range(options.proteins)])
        )
        learned = model.program.extra["protein"].background_log_mean.detach().exp().numpy()
        error = np.abs(learned / adata.uns["true_protein_background"] - 1)
        row["background error, median"], row["  within 10 %"] = float(np.median(error)), float((error < 0.1).mean())
        found = model.get_normalized_protein_expression(
            include_protein_background=True, n_samples=100, return_interval=0.9, return_numpy=True
        )
        target = adata.obsm["true_protein_mean"].to_numpy()
        held = (found.lower <= target) & (target <= found.upper)
        row["90 % intervals, measured"], row["90 % intervals, imputed"] = held[stained].mean(), held[~stained].mean()
        rows.append(row)
        shown = ", ".join(f"{name.strip()} {value:.3f}" for name, value in row.items())
        print(f"seed {seed}: {shown}", flush=True)
    table = pd.DataFrame(rows).T
    table.columns = [f"seed {seed}" for seed in options.of_seeds]
    table["mean"] = table.mean(axis=1)
    print(table.round(3).to_string())


def step_times(options: argparse.Namespace) -> None:
    """CPU time of a step, relative to that without proteins of open or closed regions."""
    rng = np.random.default_rng(0)
    adata = random_cells(rng, options.cells, options.genes, options.regions)
    adata.obsm[PROTEINS] = rng.poisson(10.0, (options.cells, options.proteins)).astype(np.float32)
    models = {
        "no proteins": untrained(adata, "bernoulli"),
        "with proteins": untrained(adata, "bernoulli", protein_expression_obsm_key=PROTEINS),
        "poisson": untrained(adata, "poisson"),
    }
    print(f"{options.genes} genes x {options.regions} regions, {options.proteins} proteins, 128 cells, 1 thread")
    print_step_times(models, options.rounds, **({"compile": True} if options.compile else {}))


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("simulated", "time"))
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--proteins", type=int, help="default: 20; 100 for time")
    parser.add_argument("--cells", type=int, help="default: 1500; 512 for time")
    parser.add_argument("--genes", type=int, help="default: 300; 15000 for time")
    parser.add_argument("--regions", type=int, help="default: 600; 80000 for time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="time with compiled loops")
    options = parser.parse_args()
    options.of_seeds = range(options.first_seed, options.first_seed + options.seeds)
    defaults = (20, 1500, 300, 600) if options.what == "simulated" else (100, 512, 15_000, 80_000)
    for name, value in zip(("proteins", "cells", "genes", "regions"), defaults, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    (simulated if options.what == "simulated" else step_times)(options)


if __name__ == "__main__":
    main()
