"""Setup, constructor and queries on one large object: seconds and peak memory of one checkout.

Make the cells once, then measure each checkout in a process of its own, alternating between them::

    python benchmarks/setup.py make cells.h5ad
    python benchmarks/setup.py measure cells.h5ad --checkout /path/to/a/checkout

The second prints one line of JSON: seconds by the clock and of the processor, which other work on the machine disturbs
less, and the peaks of the whole process so far, in MB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from measure import peak_megabytes

#: Features and the share of their counts that are not zero: genes, then regions.
FEATURES = {"Gene Expression": (2_000, 0.08), "Peaks": (20_000, 0.03)}
N_CELLS = 100_000
_BLOCK = 5_000


def counts(rng: np.random.Generator, n_cells: int, n_features: int, density: float, largest: int) -> sp.csr_matrix:
    """Counts from 1 to ``largest`` at places drawn uniformly, shape (cells, features)."""
    places = np.unique(rng.integers(0, n_cells * n_features, int(n_cells * n_features * density)))
    start = np.searchsorted(places, np.arange(n_cells + 1) * n_features)
    values = np.minimum(rng.geometric(0.5, len(places)), largest).astype(np.float32)
    return sp.csr_matrix((values, (places % n_features).astype(np.int32), start), shape=(n_cells, n_features))


def make(path: Path, n_cells: int) -> None:
    """Write paired cells of uniformly scattered counts: setup reads them like any others."""
    rng = np.random.default_rng(0)
    blocks = []
    for start in range(0, n_cells, _BLOCK):
        size = min(_BLOCK, n_cells - start)
        both = [
            counts(rng, size, n, density, largest=1 if kind == "Peaks" else 200)
            for kind, (n, density) in FEATURES.items()
        ]
        blocks.append(sp.hstack(both, format="csr", dtype=np.float32))
    kinds = [kind for kind, (n, _) in FEATURES.items() for _ in range(n)]
    ad.AnnData(
        sp.vstack(blocks, format="csr"),
        obs=pd.DataFrame(
            {"batch": pd.Categorical(rng.choice(["a", "b", "c"], n_cells)), "modality": "paired"},
            index=[f"cell_{n}" for n in range(n_cells)],
        ),
        var=pd.DataFrame({"feature_types": pd.Categorical(kinds)}, index=[f"feature_{n}" for n in range(len(kinds))]),
    ).write_h5ad(path)


def measure(path: Path, checkout: Path) -> dict[str, float]:
    """Seconds of each stage and the peak after it."""
    sys.path.insert(0, str(checkout))
    import torch

    from pyro_multivi import MULTIVI

    torch.set_num_threads(1)
    adata = ad.read_h5ad(path)
    query = adata[::4].copy()
    found: dict[str, float] = {"loaded_peak": round(peak_megabytes())}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        clock, processor = time.perf_counter(), time.process_time()
        yield
        found[f"{name}_seconds"] = round(time.perf_counter() - clock, 3)
        found[f"{name}_processor_seconds"] = round(time.process_time() - processor, 3)
        found[f"{name}_peak"] = round(peak_megabytes())

    with timed("setup"):
        MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    with timed("constructor"):
        model = MULTIVI(adata, n_hidden=32, n_latent=8)
    for name in ("first_query", "second_query"):
        with timed(name):
            model.minibatch(range(128), adata=query)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("make", "measure"))
    parser.add_argument("path", type=Path, help="the .h5ad file of cells")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--cells", type=int, default=N_CELLS, help="number of cells to make")
    arguments = parser.parse_args()
    if arguments.action == "make":
        make(arguments.path, arguments.cells)
    else:
        print(json.dumps(measure(arguments.path, arguments.checkout)))


if __name__ == "__main__":
    main()
