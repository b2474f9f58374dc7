"""pyro_multivi as a system of the protocol; see protocol.py for what ``fit`` takes and returns."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._dynamo  # the first optimiser imports it; scvi-tools does so when it is imported itself

import pyro_multivi as pm

#: A JSON of settings for runs that cannot pass them.
VARIABLE = "PYRO_MULTIVI_SETTINGS"

#: Called with the epochs done, the seconds trained and the results so far.
EpochCallback = Callable[[int, float, dict[str, Any]], None]


def fit(
    adata: Any,
    n_genes: int,
    has_rna: np.ndarray,
    has_atac: np.ndarray,
    epochs: int | None,
    seed: int,
    settings: dict[str, dict[str, Any]] | None = None,
    watch: EpochCallback | None = None,
    watched: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Train once.

    Parameters
    ----------
    epochs
        At most; None is the package's default.
    settings
        Arguments by what takes them, all optional: ``{"setup": {...}, "model": {...}, "train": {...},
        "results": {...}, "accessibility": {...}, "latent": {...}}``, of ``setup_anndata``, ``MULTIVI``, ``train``, the
        two imputations (``n_samples``), that of accessibility (``normalize_cells``) and the joint
        ``get_latent_representation`` (``give_mean``). Default: the JSON in the environment variable
        :data:`VARIABLE`, if there is one.
    watch, watched
        Called after these epochs. What it takes does not count as training.
    """
    chosen = json.loads(os.environ.get(VARIABLE, "{}")) if settings is None else settings
    known = ("setup", "model", "train", "results", "accessibility", "latent")
    unknown = chosen.keys() - set(known)
    if unknown:
        raise ValueError(f"settings has {sorted(unknown)}: allowed are {', '.join(known)}.")
    adata = adata.copy()
    adata.obs["modality"] = np.select([has_rna & has_atac, has_rna], ["paired", "expression"], "accessibility")
    pm.MULTIVI.setup_anndata(adata, **{"modality_key": "modality", **chosen.get("setup", {})})
    model = pm.MULTIVI(adata, **{"seed": seed, **chosen.get("model", {})})
    draws, latent = chosen.get("results", {}), chosen.get("latent", {})
    # The chance of detection in a cell includes its sequencing depth.
    detection = {"normalize_cells": True, **chosen.get("accessibility", {})}
    watching = 0.0
    n_epochs = 0

    def count(*_: Any) -> None:
        nonlocal watching, n_epochs
        n_epochs += 1
        if watch is None or n_epochs not in watched:
            return
        stopped = time.perf_counter()
        # Results before train() returns; the noise of training goes on as if there had been none.
        model.is_trained = True
        with torch.random.fork_rng(devices=[]):
            watch(n_epochs, stopped - started - watching, results(model, draws, detection, latent))
        watching += time.perf_counter() - stopped

    options = {"progress_bar": False, "seed": seed, **chosen.get("train", {})}
    options["callbacks"] = [count]
    if epochs is not None:
        options["max_epochs"] = epochs
    started = time.perf_counter()
    model.train(**options)
    seconds = time.perf_counter() - started - watching
    return {**results(model, draws, detection, latent), "seconds": seconds, "epochs": n_epochs}


def results(
    model: pm.MULTIVI, draws: dict[str, Any], detection: dict[str, Any], latent: dict[str, Any]
) -> dict[str, Any]:
    """Results that the protocol scores."""
    return {
        "latent": model.get_latent_representation(**latent),
        "z_rna": model.get_latent_representation(modality="expression"),
        "z_atac": model.get_latent_representation(modality="accessibility"),
        "rho": lambda cells: model.get_normalized_expression(indices=cells, return_numpy=True, **draws),
        "p": lambda cells: model.get_accessibility_estimates(
            indices=cells, return_numpy=True, normalize_regions=True, **draws, **detection
        ),
    }
