"""Simulated cells on disk: written block by block to several stores, converted, and opened again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import peak_megabytes

#: Cells that are drawn at a time.
BLOCK = 2_000
#: Counts of a cell: reads of RNA, and open regions.
READS, OPEN = 1_500, 1_500
N_TYPES = 8


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
    return {"seconds": time.perf_counter() - start, "bytes": size, "peak": peak_megabytes()}


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
