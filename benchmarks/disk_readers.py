"""Readers of shuffled minibatches from one store, side by side: ours, annbatch's and anndata's own."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from disk_data import opened
from measure import peak_megabytes

BATCH = 128
#: Seconds that a reader is given.
LONGEST = 90


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
    return {"reader": reader, "per_second": timed / seconds, "cpu": used / timed, "peak": peak_megabytes()}


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
