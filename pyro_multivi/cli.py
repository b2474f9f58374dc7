"""Command line: ``pyro-multivi demo``, ``train``, ``check`` and ``differential``."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_multivi._optional import require
from pyro_multivi._version import __version__
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.data.modality import MODALITIES, modelled
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.readers import read
from pyro_multivi.plots.report import check_and_report
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        run = {"demo": _demo, "train": _train, "check": _check, "differential": _differential}[options.command]
        run(options)
    except (ValueError, KeyError, OSError, ImportError, ArithmeticError, MemoryError) as error:
        # The person who typed the command needs the library's message, not a trace.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"pyro-multivi: {message}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-multivi", description="MultiVI: one latent state per cell from RNA, ATAC or both."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="analyse the built-in real cells from start to end")
    _add_training(demo)
    demo.set_defaults(labels="cell_type")

    train = commands.add_parser("train", help="train on a file of yours")
    train.add_argument("data", help=".h5ad, .h5mu, 10x .h5 (Cell Ranger ARC) or a 10x mtx folder")
    train.add_argument("--labels", help="obs column that colours the picture and scores the latent space")
    train.add_argument("--layer", help="layer with the raw counts")
    train.add_argument("--batch-key", help="obs column of batches")
    train.add_argument("--modality-key", help="obs column saying paired, expression or accessibility")
    train.add_argument("--feature-type-key", default="feature_types", help="var column telling genes from peaks")
    for modality in MODALITIES:
        key = modality.key
        train.add_argument(
            f"--{key}", default=key, help=f"name of the {modality.assay} modality of an .h5mu (default: {key})"
        )
    train.add_argument("--categorical-covariate", action="append", default=[], metavar="KEY", help="may be repeated")
    train.add_argument("--continuous-covariate", action="append", default=[], metavar="KEY", help="may be repeated")
    train.add_argument(
        "--min-fraction",
        type=float,
        default=0.01,
        help="leave out features detected in a smaller share of the cells (default: 0.01; not for .h5mu)",
    )
    train.add_argument("--n-latent", type=int)
    train.add_argument("--n-hidden", type=int)
    train.add_argument("--gene-likelihood", default="zinb", help="zinb, nb or poisson (default: zinb)")
    _add_training(train)

    check = commands.add_parser("check", help="compare a trained model's replicates with the data")
    check.add_argument("model", type=Path, help="folder of a saved model")
    check.add_argument("data", nargs="?", help="its data, as for train; or demo for the built-in cells")
    check.add_argument("--out", required=True, type=Path, help="folder for tables and check.html; made if not there")
    check.add_argument("--n-samples", type=int, default=100, help="replicates (default: 100)")
    check.add_argument("--all-cells", action="store_true", help="all cells, not only those held out of training")
    check.add_argument("--labels", metavar="KEY", help="obs column: statistics also within its groups")
    check.add_argument("--hidden-depth", default="observed", help="observed (default), predicted or prior")
    check.add_argument("--seed", type=int, default=0)

    differential = commands.add_parser("differential", help="genes or regions in which groups of cells differ")
    differential.add_argument("model", type=Path, help="folder of a saved model")
    differential.add_argument("data", nargs="?", help="file of the cells; not needed if the folder holds the data")
    differential.add_argument("--groupby", required=True, help="obs column of the groups")
    differential.add_argument("--group1", action="append", metavar="NAME", help="may be repeated (default: all)")
    differential.add_argument("--group2", metavar="NAME", help="compare with this group (default: all other cells)")
    differential.add_argument(
        "--modality",
        choices=[modality.name for modality in MODALITIES],
        help="genes or regions (default: genes, if the model has any)",
    )
    differential.add_argument("--out", required=True, type=Path, help="table to write: .csv or .parquet")
    differential.add_argument("--mode", default="change", help="change or vanilla (default: change)")
    differential.add_argument("--unit", default="group", help="group or cell: compare means or cells (default: group)")
    differential.add_argument("--delta", type=float, help="least change (default: 0.25 log2; 0.05 detected)")
    differential.add_argument("--fdr-target", type=float, default=0.05, help="false discovery rate (default: 0.05)")
    differential.add_argument(
        "--batch-correction",
        action=argparse.BooleanOptionalAction,
        help="decode both groups in the same batches (default: where they lie unevenly over the batches)",
    )
    differential.add_argument("--n-samples", type=int, default=5000, help="draws of each group (default: 5000)")
    differential.add_argument("--seed", type=int, default=0)
    differential.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="folder to write to; made if it is not there")
    parser.add_argument("--max-epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, help="default: 128, fewer for small data")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto", help="auto, cpu or gpu")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _demo(options: argparse.Namespace) -> None:
    adata = cell_lines()
    print("SNARE-seq of four human cell lines (Chen et al. 2019, GSE126074), shipped with the package.")
    print(MULTIVI.setup_anndata(adata))
    _analyse(MULTIVI(adata, seed=options.seed), adata, options)


def _train(options: argparse.Namespace) -> None:
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


def _check(options: argparse.Namespace) -> None:
    data = None
    if options.data is not None:
        built_in = options.data == "demo" and not Path(options.data).exists()
        data = cell_lines() if built_in else read(options.data)
    model = MULTIVI.load(options.model, data)
    if model.adata is None:
        raise ValueError(f"{str(options.model)!r} holds no data: give DATA, a file or 'demo' for the built-in cells.")
    check, written = check_and_report(
        model,
        options.out,
        labels=options.labels,
        n_samples=options.n_samples,
        held_out=not options.all_cells,
        hidden_depth=options.hidden_depth,
        seed=options.seed,
    )
    print(check)
    print(f"written to {options.out}: {', '.join(written)}")


def _differential(options: argparse.Namespace) -> None:
    out: Path = options.out
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out {out} is neither .csv nor .parquet: choose one of these endings.")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}.")
    if out.suffix == ".parquet":
        # A missing package is reported before the work.
        require("pyarrow", "parquet")
    model = MULTIVI.load(options.model, None if options.data is None else read(options.data))
    if model.adata is None:
        raise ValueError(f"{options.model} holds no data: give the file of the cells after it.")
    modality = options.modality or modelled(model.spec)[0].name
    table = getattr(model, f"differential_{modality}")(
        groupby=options.groupby,
        group1=options.group1,
        group2=options.group2,
        mode=options.mode,
        delta="default" if options.delta is None else options.delta,
        batch_correction=options.batch_correction,
        fdr_target=options.fdr_target,
        silent=options.quiet,
        unit=options.unit,
        n_samples=options.n_samples,
        seed=options.seed,
    )
    # A feature has a row in each comparison: a column, unlike an index, need not be unique.
    table = table.rename_axis("feature").reset_index()
    if out.suffix == ".csv":
        table.to_csv(out, index=False)
    else:
        table.to_parquet(out, index=False)
    called = next((name for name in map(str, table) if name.startswith(("is_de_fdr", "is_da_fdr"))), None)
    for comparison, rows in table.groupby("comparison", sort=False):
        found = "" if called is None else f": {int(rows[called].sum())} called at FDR {options.fdr_target:g}"
        batches = table.attrs["batches"][comparison][0]
        found += "" if batches is None else f", decoded in {', '.join(batches)}"
        print(f"  {comparison}, {len(rows)} features{found}")
    print(f"written to {out}")


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
    out.mkdir(parents=True, exist_ok=True)
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
    pd.DataFrame(latent, index=pd.Index(data.obs_names, name="cell"), columns=columns).to_csv(out / "latent.csv")
    pd.concat(model.history.values(), axis=1).to_csv(out / "history.csv")
    (out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    model.save(out / "model", overwrite=True)
    written = ["latent.csv", "history.csv", "figures.json", "model/"]
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
        return False
    from pyro_multivi import plots

    figure = figure_class(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
    plots.latent_scatter(latent, labels, left, "latent space")
    plots.training_history(model.history, "elbo", right)
    right.set_title("training")
    figure.savefig(path, dpi=150)
    return True
