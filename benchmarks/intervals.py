"""Intervals against the truth that the cells were drawn from, by measurement pattern.

For each seed cells are simulated (a third each paired, RNA only and ATAC only), a model is trained with the defaults,
and 90 % intervals of some cells of each pattern are compared with the true values of differential features, once with
draws of the fitted decoder alone and once as they are returned, with draws of the last layers too. Library sizes are
compared in all cells.

    python benchmarks/intervals.py --cells 600 --seeds 5
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

import pyro_multivi as pm
from pyro_multivi.posterior.calibration.fit_weights import clear_weight_posteriors

PATTERNS = ("paired", "RNA only", "ATAC only")
# Cells of each pattern in which features are compared, and draws of each.
N_COMPARED, N_DRAWS = 100, 200


def intervals(model: pm.MULTIVI, size: int) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Whether intervals hold the truth, (cells, features), by quantity; cells of a pattern come together.

    Of differential features those of the first ``size`` cells of each pattern, of library sizes those of all cells.
    """
    adata = model.adata
    differential = adata.var["is_differential"].to_numpy()
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    rows = np.concatenate([part[:size] for part in np.split(np.arange(len(adata)), len(PATTERNS))])
    options = {"indices": rows, "n_samples": N_DRAWS, "return_interval": 0.9, "return_numpy": True}
    detection = adata.obsm["true_p"] * adata.obs["true_cell_factor"].to_numpy()[:, None]
    detection = detection * adata.var["true_region_factor"].to_numpy()[~genes]
    rho = model.get_normalized_expression(gene_list=differential[genes], **options)
    yield "rho", _holds(rho, adata.obsm["true_rho"][rows][:, differential[genes]])
    p = model.get_accessibility_estimates(
        region_list=differential[~genes], normalize_cells=True, normalize_regions=True, **options
    )
    yield "detection", _holds(p, detection[rows][:, differential[~genes]])
    every = model.minibatch(np.arange(len(adata)))
    lower, upper = np.quantile(pm.posterior.draw(model.program, every, ("l",), N_DRAWS)["l"].numpy(), [0.05, 0.95], 0)
    library = adata.obs["true_library"].to_numpy()
    yield "l", ((lower <= library) & (library <= upper))[:, None]


def _holds(found: pm.Estimate, truth: NDArray[np.float32]) -> NDArray[np.bool_]:
    held: NDArray[np.bool_] = (found.lower <= truth) & (truth <= found.upper)
    return held


def coverage(n_cells: int, n_batches: int, seed: int) -> pd.DataFrame:
    """Share of the intervals that hold the truth: a row for each quantity and decoder, a column for each pattern."""
    of_pattern = n_cells // 3
    adata = pm.simulate_multiome((of_pattern,) * 3, n_batches=n_batches, seed=seed)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata)
    model.train(progress_bar=False, seed=seed)
    found = {}
    for decoder in ("drawn", "fitted"):
        if decoder == "fitted":
            clear_weight_posteriors(model.program)
        for quantity, held in intervals(model, min(N_COMPARED, of_pattern)):
            found[quantity, decoder] = [part.mean() for part in np.split(held, len(PATTERNS))]
    return pd.DataFrame.from_dict(found, orient="index", columns=PATTERNS)


def main() -> None:
    """Print the mean over seeds, and its range."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=600)
    parser.add_argument("--batches", type=int, default=1, help="batches of the cells, each in all patterns")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=101)
    arguments = parser.parse_args()
    tables = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        tables.append(coverage(arguments.cells, arguments.batches, seed))
        print(f"{arguments.cells} cells, seed {seed}\n{tables[-1].round(3).to_string()}", flush=True)
    every = pd.concat(tables).groupby(level=0)
    for name, table in (("mean", every.mean()), ("least", every.min()), ("largest", every.max())):
        print(f"{name} of {len(tables)} seeds\n{table.round(3).to_string()}")


if __name__ == "__main__":
    main()
