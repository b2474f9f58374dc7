"""Realised false discovery rate and power of differential tests on simulated cells, beside tests without a model.

A feature has changed if its true means differ by at least 0.25 in log2 (genes) or 0.05 (share of cells in which a
region is found open). Others are Wilcoxon, Welch and Fisher tests with Benjamini-Hochberg on the same counts, and
`model-free`: normalised means with the error of their sample variance, shrunk by the same empirical Bayes. Power at
equal FDR is that of the longest list whose realised FDR is at most the target.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

import pyro_multivi as pm
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, Modality
from pyro_multivi.posterior.differential.shrinkage import ShrinkagePrior
from pyro_multivi.posterior.differential.tables import expected_fdr_calls

Array = NDArray[Any]
DELTA = {RNA: 0.25, ATAC: 0.05}
TARGET = 0.05
SCENARIOS = ("balanced", "few", "mosaic", "shallow", "batches", "sizes")
# Cells of the smaller group: of one type against 400 of the others, and against 400 of the same.
SIZES, NULL_SIZES = (10, 30, 100), (1, 2, 3, 5, 10, 30)


def main() -> None:
    """Print one row for each scenario, modality and test, and the calls where nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--scenarios", nargs="+", choices=[*SCENARIOS, "null"], default=[*SCENARIOS, "null"])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--genes", type=int, default=400)
    parser.add_argument("--regions", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=60)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for scenario in options.scenarios:
        found: dict[tuple[str, str], list[Any]] = {}
        for seed in options.seeds:
            adata = simulated(scenario, seed, options)
            model = trained(adata, scenario, seed, options.epochs)
            for modality in MODALITIES:
                measure = false_calls if scenario == "null" else rates
                for name, row in measure(model, scenario, modality, seed):
                    found.setdefault((modality.name, name), []).append(row)
        for (kind, name), rows in found.items():
            if scenario == "null":
                print(
                    f"null {kind:13} {name:12} any call in {np.mean(np.array(rows) > 0):.3f} of {len(rows)}", flush=True
                )
                continue
            rate, power, equal = np.mean(rows, axis=0)
            print(
                f"{scenario:9} {kind:13} {name:20} FDR {rate:.3f} power {power:.3f} at equal FDR {equal:.3f}",
                flush=True,
            )


def simulated(scenario: str, seed: int, options: argparse.Namespace) -> Any:
    """Cells of a scenario."""
    sizes = {"n_genes": options.genes, "n_regions": options.regions, "seed": seed}
    if scenario == "mosaic":
        return pm.simulate_multiome((300, 250, 250), **sizes)
    if scenario == "shallow":
        return pm.simulate_multiome((800, 0, 0), mean_library=200, mean_accessibility=0.1, **sizes)
    if scenario == "balanced":
        return pm.simulate_multiome((800, 0, 0), **sizes)
    if scenario == "null":
        adata = pm.simulate_multiome((1800, 0, 0), **sizes)
        return adata[np.flatnonzero(adata.obs["cell_type"] == "type_0")[:430]].copy()
    if scenario in ("few", "sizes"):
        adata = pm.simulate_multiome((1200, 0, 0), **sizes)
        first = (adata.obs["cell_type"] == "type_0").to_numpy()
        n, m = (20, 800) if scenario == "few" else (max(SIZES), 400)
        return adata[np.sort(np.r_[np.flatnonzero(first)[:n], np.flatnonzero(~first)[:m]])].copy()
    # Types 0 and 1 lie by 80 to 20 in the first batch, the others in the second.
    adata = pm.simulate_multiome((2000, 0, 0), n_batches=2, **sizes)
    kind, batch = (adata.obs[name].cat.codes.to_numpy() for name in ("cell_type", "batch"))
    kept = np.random.default_rng(seed).random(len(adata)) < np.where((kind < 2) == (batch == 0), 0.8, 0.2)
    return adata[np.flatnonzero(kept)[:800]].copy()


def trained(adata: Any, scenario: str, seed: int, epochs: int) -> pm.MULTIVI:
    """A small model of them."""
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch" if scenario == "batches" else None)
    model = pm.MULTIVI(adata, n_hidden=32, n_latent=5, gene_likelihood="nb")
    with torch.random.fork_rng():
        model.train(epochs, lr=5e-3, batch_size=64, n_epochs_kl_warmup=10, progress_bar=False, seed=seed)
    return model


def rates(model: pm.MULTIVI, scenario: str, modality: Modality, seed: int) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Realised FDR, power of the calls and power at equal FDR of every test, over all comparisons."""
    parts: dict[str, list[tuple[Array, ...]]] = {}
    for label, first, second in groups(model.adata.obs["cell_type"].to_numpy().astype(str), scenario):
        changed = np.abs(true_change(model.adata, modality, first, second)) >= DELTA[modality]
        parts.setdefault(f"ours{label}", []).append((*ours(model, modality, first, second), changed))
        for name, test in TESTS[modality].items():
            parts.setdefault(f"{name}{label}", []).append(
                (*test(*(counts(model.adata, modality, i) for i in (first, second))), changed)
            )
    for name, every in parts.items():
        score, called, changed = (np.concatenate(part) for part in zip(*every, strict=True))
        power = (called & changed).sum() / changed.sum()
        yield name, ((called & ~changed).sum() / max(1, called.sum()), power, equal_fdr_power(score, changed))


def groups(kinds: Array, scenario: str) -> Iterator[tuple[str, Array, Array]]:
    """Pairs of groups of a scenario, and what tells their rows from those of others."""
    for kind in ["type_0"] if scenario in ("few", "sizes") else np.unique(kinds):
        first, second = np.flatnonzero(kinds == kind), np.flatnonzero(kinds != kind)
        if scenario == "sizes":
            yield from ((f", {n} cells", first[:n], second) for n in SIZES)
        else:
            yield "", first, second


def false_calls(model: pm.MULTIVI, scenario: str, modality: Modality, seed: int) -> Iterator[tuple[str, int]]:
    """Numbers of calls for groups of few cells against 400 cells of the same type."""
    rng = np.random.default_rng(seed)
    for n in NULL_SIZES:
        cells = rng.permutation(model.adata.n_obs)
        yield f"{n} cells", int(ours(model, modality, cells[:n], cells[n : n + 400])[1].sum())


def true_change(adata: Any, modality: Modality, first: Array, second: Array) -> Array:
    """Change of the true means, both decoded in all batches."""
    truth = adata.obsm[f"true_{modality.decoded}"].astype(float)
    n_batches = adata.uns["simulation"]["n_batches"]
    if n_batches > 1:
        # The simulator is linear in state and batch, on the scale of log shares or log odds.
        state, batch = adata.obsm["true_z"].astype(float), adata.obs["batch"].cat.codes.to_numpy()
        design = np.column_stack([state, np.eye(n_batches)[batch]])
        linear = np.log(truth) - (np.log1p(-truth) if modality.binary else np.log(truth[:, :1]))
        weights = np.linalg.lstsq(design, linear, rcond=None)[0]
        every = [np.exp(state @ weights[:-n_batches] + row) for row in weights[-n_batches:]]
        truth = np.mean([e / (1 + e) if modality.binary else e / e.sum(1, keepdims=True) for e in every], axis=0)
    if not modality.binary:
        return np.log2(truth[first].mean(0)) - np.log2(truth[second].mean(0))
    both = np.r_[first, second]
    both = both[(adata.obs["modality"] != "expression").to_numpy()[both]]
    r = adata.var["true_region_factor"].to_numpy()[-truth.shape[1] :]
    depth = adata.obs["true_cell_factor"].to_numpy()[both].mean()
    return r * depth * (truth[first].mean(0) - truth[second].mean(0))


def ours(model: pm.MULTIVI, modality: Modality, first: Array, second: Array) -> tuple[Array, Array]:
    """1 - probability, and calls."""
    table = getattr(model, f"differential_{modality.name}")(idx1=first, idx2=second, n_samples=1000)
    table = table.loc[list(modality.feature_names_in(model.spec))]
    called = table["is_da_fdr" if modality.binary else "is_de_fdr_0.05"]
    probability = table["prob_da" if modality.binary else "proba_de"].to_numpy(dtype=float)
    return 1 - probability, called.fillna(False).to_numpy(dtype=bool)


def counts(adata: Any, modality: Modality, cells: Array) -> Array:
    """Counts of the measured cells, (cells, features); of regions open or closed."""
    lacking = "accessibility" if modality is RNA else "expression"
    cells = cells[(adata.obs["modality"] != lacking).to_numpy()[cells]]
    of_modality = (adata.var["feature_types"] == modality.feature_type).to_numpy()
    found = adata.X[cells][:, of_modality].toarray().astype(float)
    return (found > 0).astype(float) if modality.binary else found


def adjusted(p: Array) -> tuple[Array, Array]:
    """P-values, and calls of Benjamini and Hochberg."""
    p = np.nan_to_num(p, nan=1.0)
    return p, stats.false_discovery_control(p) <= TARGET


def log_normalised(x: Array) -> Array:
    """Logarithms of counts scaled to one total."""
    return np.log1p(1e3 * x / np.maximum(x.sum(1, keepdims=True), 1))


def fisher(first: Array, second: Array) -> tuple[Array, Array]:
    """Fisher's exact test."""
    tables = zip(first.sum(0), second.sum(0), strict=True)
    n, m = len(first), len(second)
    return adjusted(np.array([stats.fisher_exact([[a, n - a], [b, m - b]])[1] for a, b in tables]))


def model_free(first: Array, second: Array, binary: bool) -> tuple[Array, Array]:
    """Means of the counts and sample variances, shrunk."""
    rng, groups, common = np.random.default_rng(0), (first, second), None
    if binary:
        share1, share2 = ((x.sum(0) + 0.5) / (len(x) + 1) for x in groups)
        change = share1 - share2
        error = np.sqrt(share1 * (1 - share1) / len(first) + share2 * (1 - share2) / len(second))
    else:
        totals = [np.maximum(x.sum(1, keepdims=True), 1) for x in groups]
        rates = [x / total for x, total in zip(groups, totals, strict=True)]
        half = [0.5 / total.sum() for total in totals]
        mean1, mean2 = (rate.mean(0) + h for rate, h in zip(rates, half, strict=True))
        var1, var2 = ((u.var(0, ddof=1) + h / t.mean()) / len(u) for u, h, t in zip(rates, half, totals, strict=True))
        change, error = np.log2(mean1 / mean2), np.sqrt(var1 / mean1**2 + var2 / mean2**2) / np.log(2)
        common = float(np.sqrt((var1 + var2).sum()) / np.log(2))
    posterior = ShrinkagePrior.fit(change, error, rng, common).posterior(change, error)
    delta = DELTA[ATAC if binary else RNA]
    probability = np.maximum(posterior.above(delta), posterior.below(-delta))
    return 1 - probability, expected_fdr_calls(probability, TARGET)


TESTS = {
    RNA: {
        "wilcoxon": lambda a, b: adjusted(stats.mannwhitneyu(log_normalised(a), log_normalised(b)).pvalue),
        "welch": lambda a, b: adjusted(stats.ttest_ind(log_normalised(a), log_normalised(b), equal_var=False).pvalue),
        "model-free": lambda a, b: model_free(a, b, binary=False),
    },
    ATAC: {
        "fisher": fisher,
        "welch": lambda a, b: adjusted(stats.ttest_ind(a, b, equal_var=False).pvalue),
        "model-free": lambda a, b: model_free(a, b, binary=True),
    },
}


def equal_fdr_power(score: Array, changed: Array) -> float:
    """Power of the longest list, by ascending score, whose realised FDR is at most the target."""
    order = np.argsort(score, kind="stable")
    ends = np.r_[np.diff(score[order]) > 0, True]
    rate = np.cumsum(~changed[order]) / np.arange(1, len(order) + 1)
    within = np.flatnonzero((rate <= TARGET) & ends)
    return float(changed[order][: within[-1] + 1].sum() / changed.sum()) if len(within) else 0.0


if __name__ == "__main__":
    main()
