"""Data on disk: steps per second against memory, peak memory against the number of cells, and readers side by side.

Simulated cells are written block by block to several stores, and converted. Each measurement is a process of its own,
whose peak is its own. ``--million`` is one run from disk to a latent space and a differential test.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disk_data import convert, opened, store_paths, write
from disk_readers import BATCH, READERS, read
from measure import peak_megabytes

HERE = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------- measurements


def train(paths: list[str], form: str, cells: int, epochs: int) -> dict[str, Any]:
    """Seconds of each epoch, of set-up and constructor, and the peak."""
    import pyro_multivi as pm

    before = peak_megabytes()
    start = time.perf_counter()
    adata = opened(paths, form, cells)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pm.MULTIVI.setup_anndata(adata)
    model = pm.MULTIVI(adata)
    ready = time.perf_counter() - start
    model.train(max_epochs=epochs, batch_size=BATCH, check_val_every_n_epoch=epochs, progress_bar=False)
    seconds = model.history["seconds"]["seconds"].tolist()
    steps = -(-len(model.train_indices) // BATCH)
    return {
        "form": form, "cells": cells, "setup": ready, "steps_per_second": steps / min(seconds[:-1] or seconds),
        "epochs": seconds, "import": before, "peak": peak_megabytes(),
    }  # fmt: skip


def whole(paths: list[str], cells: int, epochs: int) -> dict[str, Any]:
    """From disk to a latent space and a differential test: seconds and peak of each step."""
    import pyro_multivi as pm

    found: dict[str, Any] = {"cells": cells, "import": [0.0, peak_megabytes()]}

    def step(name: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = act()
        found[name] = [time.perf_counter() - start, peak_megabytes()]
        return made

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = step("open", lambda: opened(paths, "zarr", cells))
        step("setup", lambda: pm.MULTIVI.setup_anndata(adata))
        model = step("model", lambda: pm.MULTIVI(adata))
        step("train", lambda: model.train(max_epochs=epochs, batch_size=BATCH, progress_bar=False))
        step("latent", model.get_latent_representation)
        step(
            "differential",
            lambda: model.differential_expression(groupby="cell_type", group1="type_0", group2="type_1", silent=True),
        )
        step("check", lambda: model.posterior_predictive_check(
            indices=range(min(cells, 1000)), n_samples=40, hide_modalities=False
        ))  # fmt: skip
    return found


WORKERS = {"write": write, "convert": convert, "train": train, "whole": whole, "read": read}


def measured(task: str, python: str = sys.executable, **arguments: Any) -> dict[str, Any] | None:
    """Result of a worker in a process of its own; None, and the last line of its error, if it failed."""
    command = [python, str(HERE / "disk.py"), "--worker", task, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        print(f"  {task} {arguments.get('reader', '')}: {said[-1]}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------- reports


def said(found: dict[str, Any]) -> str:
    return f"{found['bytes'] / 1e9:.2f} GB in {found['seconds']:.0f} s"


def prepare(options: argparse.Namespace, cells: int) -> tuple[list[str], str]:
    """Stores of so many cells, and the converted one, written unless they are there."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    paths, out = store_paths(folder, cells, options.stores), folder / f"cells{cells}.zarr"
    sizes = {"cells": cells, "genes": options.genes, "regions": options.regions, "stores": options.stores}
    described = folder / f"cells{cells}.json"
    if not described.exists() or json.loads(described.read_text()) != sizes:
        for path in (*paths, described):
            path.unlink(missing_ok=True)
        shutil.rmtree(out, ignore_errors=True)
        found = measured("write", folder=str(folder), **sizes)
        if found is None:
            raise SystemExit("the data could not be written")
        print(
            f"wrote {cells} cells in {options.stores} stores: {found['bytes'] / 1e9:.2f} GB in {found['seconds']:.0f} s"
        )
        described.write_text(json.dumps(sizes))
    if not out.exists():
        found = measured("convert", paths=[*map(str, paths)], out=str(out))
        if found is None:
            raise SystemExit("the data could not be converted")
        print(f"converted: {said(found)}, peak {found['peak']:.0f} MB", flush=True)
    return [*map(str, paths)], str(out)


def compare_readers(options: argparse.Namespace, out: str) -> None:
    print(f"\nminibatches of {BATCH} per second from {Path(out).name}, shuffled (sparse rows, no training)")
    for reader in READERS:
        python = options.annbatch_python or sys.executable if "annbatch" in reader else sys.executable
        found = measured("read", python, path=out, reader=reader, minibatches=options.minibatches)
        if found is not None:
            speed = f"{found['per_second']:8.1f}   {1000 * found['cpu']:6.1f} ms of CPU each"
            print(f"  {reader:<15} {speed}   peak {found['peak']:6.0f} MB", flush=True)


def compare_training(options: argparse.Namespace, paths: list[str], out: str, cells: int) -> None:
    print(
        f"\nsteps of {BATCH} cells per second, {cells} cells, {options.epochs} epochs (without the one that is scored)"
    )
    forms = {"memory": [out], "zarr": [out], "h5ad": paths}
    speeds = {}
    for form, place in forms.items():
        found = measured("train", paths=place, form=form, cells=cells, epochs=options.epochs)
        if found is not None:
            speeds[form] = found["steps_per_second"]
            share = f"{speeds[form] / speeds['memory']:.0%} of memory" if "memory" in speeds else ""
            print(f"  {form:<8} {speeds[form]:6.2f} {share:<16} peak {found['peak']:6.0f} MB", end="")
            print(f", set-up {found['setup']:.0f} s", flush=True)


def memory_curve(options: argparse.Namespace, out: str) -> None:
    print("\nfrom disk to a differential test: peak memory in MB (and seconds) after each step")
    for cells in options.sizes:
        found = measured("whole", paths=[out], cells=cells, epochs=1)
        if found is not None:
            steps = {name: value for name, value in found.items() if name != "cells"}
            print(
                f"  {cells:>9} cells  " + "  ".join(f"{k} {v[1]:.0f} ({v[0]:.0f} s)" for k, v in steps.items()),
                flush=True,
            )


def main() -> None:
    """Write data, and measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--regions", type=int, default=20_000)
    parser.add_argument("--stores", type=int, default=4)
    parser.add_argument("--sizes", type=int, nargs="*", help="cells of the memory curve (default: a tenth to all)")
    parser.add_argument("--train-cells", type=int, help="cells of the training speed (default: a tenth)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--minibatches", type=int, default=400)
    parser.add_argument("--parts", nargs="*", default=["readers", "training", "memory"])
    parser.add_argument("--million", action="store_true", help="one run of 1 000 000 cells x 1 000 x 10 000")
    parser.add_argument("--folder", type=Path, default=HERE / "results" / "disk", help="some 3.5 GB for 100 000 cells")
    parser.add_argument("--annbatch-python", help="Python with annbatch, which needs 3.12, if this one has none")
    parser.add_argument("--worker", nargs=2, metavar=("TASK", "JSON"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        task, arguments = options.worker
        print(json.dumps(WORKERS[task](**json.loads(arguments))))
        return
    if options.million:
        options.cells, options.genes, options.regions, options.parts = 1_000_000, 1_000, 10_000, ["memory"]
        options.sizes = [options.cells]
    options.sizes = options.sizes or [options.cells // 10, options.cells // 3, options.cells]
    paths, out = prepare(options, options.cells)
    if "readers" in options.parts:
        compare_readers(options, out)
    if "training" in options.parts:
        compare_training(
            options, paths, out, min(options.cells, options.train_cells or max(20_000, options.cells // 10))
        )
    if "memory" in options.parts:
        memory_curve(options, out)


if __name__ == "__main__":
    main()
