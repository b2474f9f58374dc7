"""Simulated cells with the rates that generated them, as a file for the protocol; prints one line of JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

import pyro_multivi as pm

sys.path.append(str(Path(__file__).resolve().parents[1]))

from measure import report, task
from protocol import TRUE_RATE

#: As hard as real cells: shallow, most features in common, types that overlap.
ARGUMENTS: dict[str, Any] = {
    "n_cells": (1200, 0, 0),
    "n_genes": 1000,
    "n_regions": 4000,
    "n_types": 6,
    "n_batches": 1,
    "mean_library": 1500.0,
    "mean_accessibility": 0.1,
}


def simulate(seed: int, **arguments: Any) -> Any:
    """Paired cells; the rates lie in a layer, in the columns of ``X``.

    The rate of a gene is its expected share of a cell's counts, rho (1 - pi) up to a factor per
    cell; that of a region p r, its detection per unit of the cell factor.
    """
    adata = pm.simulate_multiome(**{**ARGUMENTS, **arguments, "seed": seed})
    rna = adata.obsm["true_rho"]
    if "true_pi" in adata.obsm:
        rna = rna * (1 - adata.obsm["true_pi"])
    region_factor = adata.var["true_region_factor"].to_numpy()[rna.shape[1] :]
    adata.layers[TRUE_RATE] = np.hstack([rna, adata.obsm["true_p"] * region_factor]).astype(np.float32)
    adata.obs = adata.obs[["cell_type", "batch"]]
    for place in (adata.obsm, adata.varm, adata.uns):
        place.clear()
    return adata


def main() -> None:
    """Write one file."""
    job = task()
    simulate(job["seed"], **job["arguments"]).write_h5ad(job["path"])
    report({"path": job["path"]})


if __name__ == "__main__":
    main()
