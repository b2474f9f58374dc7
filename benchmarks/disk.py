"""Data on disk: steps per second against memory, peak memory against the number of cells, and readers side by side.

Simulated cells are written block by block to several stores, and converted. Each measurement is a process of its own,
whose peak is its own. ``--million`` is one run from disk to a latent space and a differential test.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
#: Cells that are drawn at a time.
BLOCK = 2_000
#: Counts of a cell: reads of RNA, and open regions.
READS, OPEN = 1_500, 1_500
N_TYPES = 8
BATCH = 128
#: Seconds that a reader is given.
LONGEST = 90


# ---------------------------------------------------------------------------------------------- data


def store_paths(folder: Path, cells: int, stores: int) -> list[Path]:
    return [folder / f"cells{cells}_{number}.h5ad" for number in range(stores)]


def write(folder: str, cells: int, genes: int, regions: int, stores: int) -> dict[str, Any]:
    """Stores of equal size, uncompressed CSR; of four the last but one has RNA alone and the last ATAC alone."""
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    frequencies = [_frequencies(rng, size) for size in (genes, regions)]
    paths = store_paths(Path(folder), cells, stores)
    share = np.array_split(np.arange(cells), stores)
    for number, (path, own) in enumerate(zip(paths, share, strict=True)):
        only = {stores - 2: 0, stores - 1: 1}.get(number) if stores >= 4 else None
        _write_store(path, own, frequencies, only, np.random.default_rng(number))
    return {"seconds": time.perf_counter() - start, "bytes": sum(path.stat().st_size for path in paths)}


def _frequencies(rng: np.random.Generator, size: int) -> np.ndarray:
    """Cumulated shares of features in each cell type, (types, features): a tenth of them differ between types."""
    common = rng.lognormal(0.0, 1.5, size)
    fold = np.where(rng.random((N_TYPES, size)) < 0.1, rng.lognormal(0.0, 1.0, (N_TYPES, size)), 1.0)
    cumulated = np.cumsum(common * fold, axis=1)
    return cumulated / cumulated[:, -1:]


def _write_store(
    path: Path, names: np.ndarray, frequencies: list[np.ndarray], only: int | None, rng: np.random.Generator
) -> None:
    import h5py
    import pandas as pd
    import scipy.sparse as sp
    from anndata.io import write_elem

    sizes = [each.shape[1] for each in frequencies]
    kept = [number for number in (0, 1) if only in (None, number)]
    width = sum(sizes[number] for number in kept)
    types = rng.integers(0, N_TYPES, len(names))
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (len(names), width)})
        arrays = {
            name: group.create_dataset(name, (0,), maxshape=(None,), dtype=kind, chunks=(2**16,))
            for name, kind in (("data", np.float32), ("indices", np.int32))
        }
        indptr, done = [np.zeros(1, dtype=np.int64)], 0
        for start in range(0, len(names), BLOCK):
            own = types[start : start + BLOCK]
            parts = []
            for number in kept:
                total = rng.poisson((READS, OPEN)[number] * rng.lognormal(0.0, 0.3, len(own)))
                row = np.repeat(np.arange(len(own)), total)
                column = np.empty(len(row), dtype=np.int64)
                chance = rng.random(len(row))
                for kind in range(N_TYPES):
                    mine = own[row] == kind
                    column[mine] = np.searchsorted(frequencies[number][kind], chance[mine])
                column = np.minimum(column, sizes[number] - 1)
                counts = sp.csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=(len(own), sizes[number]))
                if number:
                    counts.data[:] = 1.0
                parts.append(counts)
            block = sp.hstack(parts, format="csr")
            for name in arrays:
                values = getattr(block, name)
                arrays[name].resize((done + len(values),))
                arrays[name][done:] = values
            indptr.append(block.indptr[1:].astype(np.int64) + done)
            done += len(block.data)
        group.create_dataset("indptr", data=np.concatenate(indptr))
        kinds = [("Gene Expression", "gene", sizes[0]), ("Peaks", "region", sizes[1])]
        var = [(f"{word}_{number}", kind) for kind, word, size in (kinds[k] for k in kept) for number in range(size)]
        obs = pd.DataFrame({"cell_type": pd.Categorical([f"type_{kind}" for kind in types])})
        obs.index = [f"cell_{number}" for number in names]
        write_elem(file, "obs", obs)
        table = pd.DataFrame({"feature_types": pd.Categorical([kind for _, kind in var])}, index=[n for n, _ in var])
        write_elem(file, "var", table)
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in ("layers", "obsm", "varm", "obsp", "varp", "uns"):
            write_elem(file, name, {})


def convert(paths: list[str], out: str) -> dict[str, Any]:
    import pyro_multivi as pm

    start = time.perf_counter()
    pm.convert_stores({Path(path).stem: path for path in paths}, out, progress_bar=False)
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    return {"seconds": time.perf_counter() - start, "bytes": size, "peak": peak()}


# ------------------------------------------------------------------------------------------- measurements


def peak() -> float:
    """Peak memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def opened(paths: list[str], form: str, cells: int) -> Any:
    """The first cells: from disk, or in memory. A differential test compares types of cells in them."""
    import pyro_multivi as pm

    stored = pm.open_stores(paths[0] if len(paths) == 1 else paths)
    if form == "memory":
        from anndata import AnnData

        from pyro_multivi.data.stores.reference import stores_of

        cells = min(cells, stored.n_obs)
        with stores_of(stored).matrix(None, stored.var_names, "layer").reading() as read_rows:
            (x,) = read_rows([(0, cells)])
        return AnnData(x.astype(np.float32), obs=stored.obs[:cells], var=stored.var)
    return stored[:cells].copy() if cells < stored.n_obs else stored


def train(paths: list[str], form: str, cells: int, epochs: int) -> dict[str, Any]:
    """Seconds of each epoch, of set-up and constructor, and the peak."""
    import pyro_multivi as pm

    before = peak()
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
        "epochs": seconds, "import": before, "peak": peak(),
    }  # fmt: skip


def whole(paths: list[str], cells: int, epochs: int) -> dict[str, Any]:
    """From disk to a latent space and a differential test: seconds and peak of each step."""
    import pyro_multivi as pm

    found: dict[str, Any] = {"cells": cells, "import": [0.0, peak()]}

    def step(name: str, act: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        made = act()
        found[name] = [time.perf_counter() - start, peak()]
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


def read(path: str, reader: str, minibatches: int) -> dict[str, Any]:
    """Minibatches per second, shuffled, as sparse rows."""
    number, first, start, used = 0, 0, time.perf_counter(), time.process_time()
    deadline = start + LONGEST
    for _ in READERS[reader](path):
        number += 1
        if number == minibatches // 4:  # what is read first, is read before the clock
            first, start, used = number, time.perf_counter(), time.process_time()
        if number == minibatches or time.perf_counter() > deadline:
            break
    timed = number - first
    seconds, used = time.perf_counter() - start, time.process_time() - used
    return {"reader": reader, "per_second": timed / seconds, "cpu": used / timed, "peak": peak()}


def _ours(path: str) -> Iterator[Any]:
    """Until the float counts of each modality are tensors; their order by feature is work of every step."""
    import pyro_multivi as pm
    from pyro_multivi.data.loader import Minibatches
    from pyro_multivi.data.setup.spec import DataSpec
    from pyro_multivi.data.stores.passes import cells_from_disk

    adata = pm.open_stores(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pm.MULTIVI.setup_anndata(adata)
    table = DataSpec.of(adata).table(adata)
    batches = Minibatches(table, batch_size=BATCH, shuffle=True)
    while True:
        yield from cells_from_disk(table, batches.parts(), len(table), 64)


def _ours_in_memory(path: str) -> Iterator[Any]:
    """The same minibatches cut from a table in memory."""
    import torch

    import pyro_multivi as pm
    from pyro_multivi.data.setup.spec import DataSpec

    adata = opened([path], "memory", sys.maxsize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pm.MULTIVI.setup_anndata(adata)
    table = DataSpec.of(adata).table(adata)
    while True:
        yield from map(table.batch, torch.randperm(len(table)).split(BATCH))


def _annbatch(path: str) -> Iterator[Any]:
    """The same blocks and buffers as ours, and its own codecs if they are installed: rows of the whole matrix."""
    import anndata as ad
    import zarr
    from annbatch import Loader

    try:
        import zarrs  # noqa: F401

        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    except ImportError:
        print("annbatch without zarrs, its faster codecs", file=sys.stderr)
    group = zarr.open_group(path, mode="r")
    loader = Loader(batch_size=BATCH, chunk_size=128, preload_nchunks=64, shuffle=True)
    loader.add_adata(ad.AnnData(X=ad.io.sparse_dataset(group["X"]), obs=ad.io.read_elem(group["obs"])[[]]))
    while True:
        yield from loader


def _annbatch_split(path: str) -> Iterator[Any]:
    """Its rows, cut into the genes and the regions, and the genes' counts as floats: what ours gives."""
    import anndata as ad
    import zarr

    types = ad.io.read_elem(zarr.open_group(path, mode="r")["var"])["feature_types"].astype(str)
    genes = int((types == "Gene Expression").sum())
    for found in _annbatch(path):
        rows = found["X"]
        yield rows[:, :genes].astype(np.float32), rows[:, genes:]


def _anndata_backed(path: str) -> Iterator[Any]:
    """Rows at random, sorted within a minibatch, from anndata's sparse dataset."""
    import anndata as ad
    import zarr

    matrix, rng = ad.io.sparse_dataset(zarr.open_group(path, mode="r")["X"]), np.random.default_rng(0)
    while True:
        for part in np.array_split(rng.permutation(matrix.shape[0]), max(1, matrix.shape[0] // BATCH)):
            yield matrix[np.sort(part)]


def _anndata_lazy(path: str) -> Iterator[Any]:
    """Rows at random, sorted within a minibatch, from read_lazy."""
    import anndata as ad

    matrix, rng = ad.experimental.read_lazy(path).X, np.random.default_rng(0)
    while True:
        for part in np.array_split(rng.permutation(matrix.shape[0]), max(1, matrix.shape[0] // BATCH)):
            yield matrix[np.sort(part)].compute()


READERS = {
    "ours": _ours, "ours, in memory": _ours_in_memory, "annbatch, split": _annbatch_split, "annbatch": _annbatch,
    "sparse_dataset": _anndata_backed, "read_lazy": _anndata_lazy,
}  # fmt: skip
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
