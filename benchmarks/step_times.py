"""CPU time of a step of training: models of the same random cells in turn, round after round, on one thread."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping
from typing import Any

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from make_data import random_counts

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.training import FitOptions, fit

BATCH_SIZE = 128


def random_cells(rng: np.random.Generator, n_cells: int, n_genes: int, n_regions: int) -> anndata.AnnData:
    """Paired cells without structure."""
    parts = [random_counts(rng, n_cells, n, density) for n, density in ((n_genes, 0.1), (n_regions, 0.05))]
    adata = anndata.AnnData(sp.hstack(parts, format="csr"))
    adata.var["feature_types"] = np.repeat(["Gene Expression", "Peaks"], [n_genes, n_regions])
    adata.obs["modality"] = "paired"
    return adata


def untrained(adata: anndata.AnnData, likelihood: str, **keys: str) -> pm.MULTIVI:
    """A model of random cells; ``keys`` are of setup."""
    with warnings.catch_warnings():
        # Random counts may look like anything.
        warnings.simplefilter("ignore", UserWarning)
        pm.MULTIVI.setup_anndata(adata, modality_key="modality", **keys)
        return pm.MULTIVI(adata, accessibility_likelihood=likelihood)


def print_step_times(models: Mapping[str, pm.MULTIVI], rounds: int, **choices: Any) -> None:
    """Print the time of each model's step, and its ratios, formed within a round, to that of the first model.

    Other processes hardly matter to CPU time on one thread. ``choices`` are fields of ``FitOptions``.
    """
    torch.set_num_threads(1)
    tables = {name: model._training_table() for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            n_cells = model.adata.n_obs
            batches = Minibatches(tables[name], torch.arange(n_cells), batch_size=BATCH_SIZE, shuffle=True, seed=number)
            started = time.process_time()
            fit(model.program, batches, None, FitOptions(max_epochs=1, progress_bar=False, **choices))
            seconds[name].append((time.process_time() - started) / -(-n_cells // BATCH_SIZE))
    first, *_ = seconds
    for name, values in seconds.items():
        # The first round warms up.
        ratios = [one / other for one, other in zip(values[1:], seconds[first][1:], strict=True)]
        print(
            f"  {name:<14} {1e3 * statistics.median(values[1:]):7.1f} ms a step, {statistics.median(ratios):.3f} times "
            f"that of {first} ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )
