"""Data for the benchmarks: written once, read by every worker as the same two files.

Runs in our environment and in that of scvi-tools: numpy, scipy, anndata and mudata only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
from measure import report, task
from mudata import MuData

# Cells x features drawn at a time: 64 MB of uniform numbers.
_BLOCK_ENTRIES = 16_000_000


def random_counts(
    rng: np.random.Generator, n_cells: int, n_features: int, density: float, binary: bool = False
) -> sp.csr_matrix:
    """Sparse counts, (cells, features), float32, with a given share of non-zeros.

    How often a feature is seen follows a log-normal over features (a few are nearly everywhere, most
    are rare), and cells differ in depth. There is no structure to learn: this is for timing.
    """
    frequency = rng.lognormal(0.0, 1.5, n_features)
    depth = rng.lognormal(0.0, 0.3, (n_cells, 1)).astype(np.float32)
    depth /= depth.mean()
    # Clipped at 0.95, frequencies have to grow a little to keep their mean.
    scaled = frequency * density / frequency.mean()
    for _ in range(20):
        scaled *= density / np.minimum(scaled, 0.95).mean()
    probability = np.minimum(scaled, 0.95).astype(np.float32)
    blocks = []
    size = max(1, _BLOCK_ENTRIES // n_features)
    for start in range(0, n_cells, size):
        chance = depth[start : start + size] * probability
        seen = rng.random(chance.shape, dtype=np.float32) < chance
        seen[:, probability.argmax()] = True  # no cell is empty, which would stand for "not measured"
        row, col = np.nonzero(seen)
        indptr = np.concatenate([[0], np.bincount(row, minlength=len(chance)).cumsum()])
        value = np.ones(len(col)) if binary else rng.geometric(0.6, len(col))
        blocks.append(sp.csr_matrix((value.astype(np.float32), col.astype(np.int32), indptr), shape=chance.shape))
    return sp.csr_matrix(sp.vstack(blocks, format="csr"))


def write_random(
    folder: Path, n_cells: int, n_genes: int, n_regions: int, rna_density: float, atac_density: float
) -> None:
    """Write random data of given sizes; the same for the same sizes."""
    rng = np.random.default_rng(0)
    _write(
        folder,
        random_counts(rng, n_cells, n_genes, rna_density),
        random_counts(rng, n_cells, n_regions, atac_density, binary=True),
    )


def write_file(folder: Path, path: str) -> None:
    """Write the genes and peaks of an h5ad by its ``var["feature_types"]``."""
    adata = ad.read_h5ad(path)
    kind = adata.var["feature_types"].to_numpy()
    counts = sp.csc_matrix(adata.X)
    _write(folder, counts[:, kind == "Gene Expression"], counts[:, kind == "Peaks"])


def _write(folder: Path, rna: Any, atac: Any) -> None:
    folder.mkdir(parents=True)
    cells = [f"cell_{i}" for i in range(rna.shape[0])]
    for name, counts, feature in (("rna", rna, "gene"), ("atac", atac, "region")):
        adata = ad.AnnData(sp.csr_matrix(counts, dtype=np.float32))
        adata.obs_names = cells
        adata.var_names = [f"{feature}_{i}" for i in range(counts.shape[1])]
        adata.write_h5ad(folder / f"{name}.h5ad")  # uncompressed: read many times


def load(folder: str) -> MuData:
    """The MuData of a worker, rna first: scvi-tools 1.4 takes the order for the meaning."""
    return MuData({name: ad.read_h5ad(Path(folder) / f"{name}.h5ad") for name in ("rna", "atac")})


def check_shape(accessibility: Any, mdata: MuData) -> None:
    """Make sure that what was timed is every region of every cell, as an array."""
    found, wanted = type(accessibility).__name__, mdata["atac"].shape
    if not isinstance(accessibility, np.ndarray) or accessibility.shape != wanted:
        raise RuntimeError(f"expected an array {wanted} of accessibility, got {found} {accessibility.shape}")


def main() -> None:
    """Write the data of one task and report its size."""
    job = task()
    folder = Path(job["folder"])
    if "path" in job:
        write_file(folder, job["path"])
    else:
        write_random(folder, **job["random"])
    rna, atac = (ad.read_h5ad(folder / f"{name}.h5ad", backed="r") for name in ("rna", "atac"))
    report({"n_cells": rna.n_obs, "n_genes": rna.n_vars, "n_regions": atac.n_vars})


if __name__ == "__main__":
    main()
