"""``pyro-multivi demo`` and ``train``: a trained model, tables and a picture of it."""

from __future__ import annotations

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_multivi._optional import require
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.cli.outputs import check_model_folder, make_folder, refuse_existing, save_model
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.readers import read
from pyro_multivi.files import write_whole
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity

#: Everything that is written to the folder.
OUTPUTS = ("model", "latent.csv", "history.csv", "figures.json", "latent.png")


def demo(options: argparse.Namespace) -> None:
    """Analyse the built-in cells."""
    adata = cell_lines()
    print("SNARE-seq of four human cell lines (Chen et al. 2019, GSE126074), shipped with the package.")
    print(MULTIVI.setup_anndata(adata))
    _analyse(MULTIVI(adata, seed=options.seed), adata, options)


def train(options: argparse.Namespace) -> None:
    """Train on a file and write what was learned."""
    refuse_existing(options.out, OUTPUTS, options.overwrite)
    data = read(options.data)
    keys = {
        "batch_key": options.batch_key,
        "modality_key": options.modality_key,
        "categorical_covariate_keys": options.categorical_covariate or None,
        "continuous_covariate_keys": options.continuous_covariate or None,
    }
    if isinstance(data, AnnData):
        data = _detected(data, options.min_fraction)
        report = MULTIVI.setup_anndata(data, layer=options.layer, feature_type_key=options.feature_type_key, **keys)
    else:
        names = {f"{modality.key}_layer": getattr(options, modality.key) for modality in MODALITIES}
        modalities = {layer: name for layer, name in names.items() if name in data.mod}
        layers = dict.fromkeys(names, options.layer)
        report = MULTIVI.setup_mudata(data, modalities=modalities, **layers, **keys)
    print(report)
    model = MULTIVI(
        data,
        n_latent=options.n_latent,
        n_hidden=options.n_hidden,
        gene_likelihood=options.gene_likelihood,
        seed=options.seed,
    )
    _analyse(model, data, options)


def _detected(adata: AnnData, min_fraction: float) -> AnnData:
    """Features detected in at least a share of the cells."""
    if not 0 <= min_fraction < 1:
        raise ValueError(f"--min-fraction {min_fraction} is not allowed: give a share from 0 to below 1.")
    kept = np.asarray((adata.X > 0).mean(0)).ravel() >= min_fraction
    if not kept.any():
        raise ValueError(f"--min-fraction {min_fraction} leaves no feature: give a smaller share.")
    return adata[:, kept].copy()


def _analyse(model: MULTIVI, data: Any, options: argparse.Namespace) -> None:
    """Train, then write the model, the latent space, the history, figures and a picture."""
    out: Path = options.out
    labels = None
    if options.labels is not None:
        if options.labels not in data.obs:
            raise KeyError(f"--labels {options.labels!r} is not a column of obs; there are {', '.join(data.obs)}.")
        labels = data.obs[options.labels].astype(str).to_numpy()
    make_folder(out, OUTPUTS, options.overwrite)
    check_model_folder(model, out / "model")
    print(model)
    started = time.perf_counter()
    model.train(
        max_epochs=options.max_epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=options.seed,
        accelerator=options.accelerator,
        progress_bar=not options.quiet,
    )
    # Before anything that may fail.
    written = [f"{save_model(model, out / 'model', options.overwrite).name}/"]
    latent = np.asarray(model.get_latent_representation())
    figures: dict[str, float] = {
        "cells": len(latent),
        "epochs": len(model.history["train_loss"]),
        "training_seconds": round(time.perf_counter() - started, 1),
        "elbo_per_cell": model.get_elbo(),
        **model.get_reconstruction_error(),
    }
    if labels is not None and len(latent) > 30:
        figures["neighbour_purity_30"] = neighbour_purity(latent, labels, 30)
        shares = pd.Series(labels).value_counts(normalize=True)
        figures["neighbour_purity_chance"] = float((shares**2).sum())
    columns = [f"z{number + 1}" for number in range(latent.shape[1])]
    table = pd.DataFrame(latent, index=pd.Index(data.obs_names, name="cell"), columns=columns)
    for name, text in {
        "latent.csv": table.to_csv(),
        "history.csv": pd.concat(model.history.values(), axis=1).to_csv(),
        "figures.json": json.dumps(figures, indent=1) + "\n",
    }.items():
        write_whole(out / name, text.encode())
        written.append(name)
    if _draw(latent, labels, model, out / "latent.png"):
        written.append("latent.png")
    for name, value in figures.items():
        print(f"  {name:40s} {value:.4g}" if isinstance(value, float) else f"  {name:40s} {value}")
    print(f"written to {out}: {', '.join(written)}")


def _draw(latent: Any, labels: Any, model: MULTIVI, path: Path) -> bool:
    """Draw the latent space beside the training curve; without matplotlib print a hint instead."""
    try:
        figure_class = require("matplotlib.figure", "plot").Figure
    except ImportError as error:
        print(f"no picture: {error}")
        # One of an earlier run would be taken for one of this model.
        path.unlink(missing_ok=True)
        return False
    from pyro_multivi import plots

    figure = figure_class(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    plots.latent_scatter(latent, labels, left, "latent space")
    plots.training_history(model.history, "elbo", right)
    right.set_title("training")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_whole(path, picture.getvalue())
    return True
