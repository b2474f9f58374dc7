"""Cost per cell of training and of the latent representation as data and minibatches grow.

Ours alone, in one process, on random counts: one figure with four panels, and its numbers as CSV.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from make_data import random_counts
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import seconds

import pyro_multivi as pm


@dataclass(frozen=True)
class Point:
    """One data set and how it is trained on; the middle of every curve but that over cells."""

    n_cells: int = 1_280
    n_genes: int = 1_000
    n_regions: int = 20_000
    density: float = 0.05
    batch_size: int = 128
    n_hidden: int = 128


@dataclass(frozen=True)
class Curve:
    """One panel: a field of :class:`Point` and what it is set to."""

    title: str
    field: str
    label: str
    log: bool
    points: tuple[Point, ...]


def curves(scale: float) -> tuple[Curve, ...]:
    """The four panels, with numbers of features, or of cells in the first, multiplied by ``scale``."""
    middle = replace(Point(), n_regions=round(20_000 * scale), n_genes=round(1_000 * scale))
    # Narrow, so that 100 000 cells take seconds: the question is whether a cell costs the same in any crowd.
    narrow = Point(n_genes=500, n_regions=2_000, n_hidden=64)

    def over(point: Point, field: str, values: tuple[Any, ...]) -> tuple[Point, ...]:
        return tuple(replace(point, **{field: value}) for value in values)

    cells = tuple(round(n * scale) for n in (1_000, 3_000, 10_000, 30_000, 100_000))
    regions = tuple(round(n * scale) for n in (5_000, 10_000, 20_000, 40_000, 80_000))
    return (
        Curve("data set", "n_cells", "cells", True, over(narrow, "n_cells", cells)),
        Curve("regions", "n_regions", "regions", False, over(middle, "n_regions", regions)),
        Curve(
            "non-zeros", "density", "share of non-zeros", False, over(middle, "density", (0.01, 0.02, 0.05, 0.1, 0.2))
        ),
        Curve(
            "minibatch", "batch_size", "cells per minibatch", True, over(middle, "batch_size", (32, 64, 128, 256, 512))
        ),
    )


def measure(point: Point) -> dict[str, float]:
    """Seconds per cell of training and of the latent representation at one point."""
    rng = np.random.default_rng(0)
    counts = sp.hstack(
        [
            random_counts(rng, point.n_cells, point.n_genes, point.density),
            random_counts(rng, point.n_cells, point.n_regions, point.density, binary=True),
        ],
        format="csr",
    )
    kinds = np.repeat(["Gene Expression", "Peaks"], [point.n_genes, point.n_regions])
    names = [f"feature_{i}" for i in range(counts.shape[1])]
    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(point.n_cells)])
    adata = ad.AnnData(counts, obs=obs, var=pd.DataFrame({"feature_types": kinds}, index=names))
    pm.MULTIVI.setup_anndata(adata)
    model = pm.MULTIVI(adata, n_hidden=point.n_hidden, n_latent=10)
    ends = [time.perf_counter()]

    def epoch_ended(*_: Any) -> None:
        ends.append(time.perf_counter())

    model.train(
        # The first epoch is not counted; two of the others steady a short one.
        max_epochs=2 if point.n_cells > 10_000 else 3,
        lr=1e-4,
        accelerator="cpu",
        train_size=1.0,
        batch_size=point.batch_size,
        early_stopping=False,
        callbacks=[epoch_ended],
        progress_bar=False,
    )
    epochs = [end - start for start, end in pairwise(ends)]
    latent, _ = seconds(lambda: model.get_latent_representation(batch_size=point.batch_size))
    return {
        "nonzeros_per_cell": counts.nnz / point.n_cells,
        "training_seconds_per_cell": statistics.median(epochs[1:]) / point.n_cells,
        "latent_seconds_per_cell": latent / point.n_cells,
    }


def draw(measured: list[tuple[Curve, list[dict[str, float]]]]) -> Figure:
    """Four panels: milliseconds per cell."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes: list[Axes] = list(figure.subplots(2, 2).flat)
    for ax, (curve, rows) in zip(axes, measured, strict=True):
        x = [getattr(point, curve.field) for point in curve.points]
        for name, marker in (("training", "o"), ("latent", "s")):
            ax.plot(x, [1e3 * row[f"{name}_seconds_per_cell"] for row in rows], marker=marker, label=name)
        if curve.log:
            ax.set_xscale("log", base=2 if curve.field == "batch_size" else 10)
        ax.set_ylim(bottom=0)
        ax.set_xlabel(curve.label)
        ax.set_ylabel("ms per cell")
        ax.set_title(described(curve), fontsize="medium")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    return figure


def described(curve: Curve) -> str:
    """Title of a panel: what grows, and what does not."""
    point = curve.points[0]
    fixed = {
        "n_cells": f"{point.n_cells:_} cells",
        "n_regions": f"{point.n_regions:_} regions",
        "density": f"{point.density:.0%} non-zeros",
        "batch_size": f"minibatches of {point.batch_size}",
    }
    rest = ", ".join(text for field, text in fixed.items() if field != curve.field)
    return f"{curve.title} ({rest.replace('_', ' ')})"


def main() -> None:
    """Measure the curves, write the CSV and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder to write to")
    parser.add_argument("--threads", type=int, default=2, help="threads")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies the sizes; small ones only show that it runs"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    measure(Point(n_cells=256, n_regions=1_000))  # imports and thread pools, not counted
    measured = []
    with (options.out / "scaling.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        for number, curve in enumerate(curves(options.scale)):
            rows = []
            for point in curve.points:
                print(f"{curve.title}: {getattr(point, curve.field)} {curve.label}", file=sys.stderr)
                row = measure(point)
                rows.append(row)
                if number == 0 and len(rows) == 1:
                    writer.writerow(["curve", *asdict(point), *row])
                writer.writerow([curve.title, *asdict(point).values(), *(f"{value:.6g}" for value in row.values())])
                file.flush()
            measured.append((curve, rows))
    draw(measured).savefig(options.out / "scaling.png", dpi=150)
    print(f"wrote {options.out / 'scaling.csv'} and {options.out / 'scaling.png'}")


if __name__ == "__main__":
    main()
