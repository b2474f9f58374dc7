"""Conversion: a data set written in the form that is read fastest, block by block, resumable."""

from __future__ import annotations

import io
import logging
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from tqdm.auto import tqdm

from pyro_multivi._optional import require
from pyro_multivi.data.checks import check_unique, checked, first_names, shown, unknown_key
from pyro_multivi.data.setup.adapter import layer_names
from pyro_multivi.data.setup.counts import smallest
from pyro_multivi.data.setup.masks.declared import MASKS_KEY
from pyro_multivi.data.setup.options import UNS_KEY, Setup, is_mudata
from pyro_multivi.data.stores.matrix import Rows
from pyro_multivi.data.stores.reference import STORES, checksum_of, stores_of, uniquely
from pyro_multivi.data.stores.rows import canonical
from pyro_multivi.data.stores.unfinished import UnfinishedFolder
from pyro_multivi.datasets.readers import read, sample_name
from pyro_multivi.datasets.samples import join_samples
from pyro_multivi.datasets.stores.elements import write_element
from pyro_multivi.datasets.stores.open import open_stores
from pyro_multivi.files import write_whole

_log = logging.getLogger("pyro_multivi")

# Entries in a chunk, which is read as a whole (some 50 cells), and in a file of many chunks (zarr 3), of which one is
# written at a time.
_CHUNK, _SHARD = 2**17, 2**23
# Rows of data in memory that are written at a time.
_ROWS = 1024


@checked
def convert_stores(
    stores: Any,
    out: str | os.PathLike[str],
    *,
    layer: str | None = None,
    feature_type_key: str = "feature_types",
    progress_bar: bool = True,
) -> Path:
    """Write a data set as a zarr folder that :func:`open_stores` reads fastest.

    Counts are stored by cells (CSR), compressed with LZ4, in the smallest type that holds them; with
    zarr 3 in files of many chunks (shards). Memory does not grow with the number of cells, but for files that cannot be
    read by cells (CSC, 10x, MuData, Matrix Market): those are read whole, one at a time.

    If it is interrupted, the same call goes on where it stopped.

    Parameters
    ----------
    stores
        Path of a file or folder that :func:`read` knows, or several files and folders as for :func:`open_stores`.
    out
        Folder to write, ``.zarr``.
    layer
        Layer with the counts; ``X`` by default. They are written to ``X``.
    feature_type_key
        Column of ``var`` that distinguishes genes from regions, where there are several.
    progress_bar
        Show a bar.

    Returns
    -------
    Path
        The folder. It is an AnnData, ``anndata.read_zarr`` reads it too, with ``obs``, ``var``, the counts and the
        setup, if there was one of these counts. Other layers, ``obsm`` (counts of proteins too), ``varm`` and ``raw``
        are not taken over.

    Raises
    ------
    FileExistsError
        If there is something at ``out``.
    ValueError
        If counts are no numbers, names of cells or features occur more than once, or masks say which features each
        batch measured, as :func:`join_samples` writes for a union: a store has none, and zeros would count.
    ImportError
        If zarr is not installed.

    Examples
    --------
    >>> import tempfile
    >>> from pyro_multivi.datasets.simulate import simulate_multiome
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     simulate_multiome((10, 0, 0), n_genes=5, n_regions=8).write_h5ad(folder + "/cells.h5ad")
    ...     path = convert_stores(folder + "/cells.h5ad", folder + "/cells.zarr", progress_bar=False)
    ...     open_stores(path).shape
    (10, 13)
    """
    path = Path(os.path.abspath(out))
    if path.suffix.lower() != ".zarr":
        raise ValueError(f"out={str(out)!r} must end in .zarr.")
    require("zarr", "scale")
    if path.exists():
        raise FileExistsError(f"out={str(out)!r} exists and is not replaced: choose another path, or delete it.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"out={str(out)!r}: there is no folder {path.parent}.")
    adata, source = _opened(stores, layer, feature_type_key)
    if feature_type_key != "feature_types" and feature_type_key not in adata.var:
        raise unknown_key("feature_type_key", feature_type_key, "adata.var", adata.var.columns)
    work = UnfinishedFolder(path)
    try:
        with tqdm(total=2 * source.shape[0], desc="converting", unit="cell", disable=not progress_bar) as bar:
            _write(work, adata, source, bar)
        work.publish()
    finally:
        work.release()
    return path


def _opened(stores: Any, layer: str | None, feature_type_key: str) -> tuple[AnnData, _Source]:
    """The data set and its counts, on disk if they can be read by cells."""
    if not isinstance(stores, (str, os.PathLike)):
        try:
            adata = open_stores(stores, layer=layer, feature_type_key=feature_type_key)
            return adata, _Source(adata, layer)
        except ValueError as error:
            if len(stores) != 1:
                raise
            refused = error
        (name, alone), *_ = (
            stores.items() if isinstance(stores, Mapping) else [(sample_name(path), path) for path in stores]
        )
        data = _read_whole(Path(alone), refused)
        adata = join_samples({name: data}, layer=layer, feature_type_key=feature_type_key)
        return adata, _Source(adata, None)
    path = Path(stores)
    if not path.exists():
        raise FileNotFoundError(f"stores={shown(str(stores))}: there is no such file or folder.")
    try:
        adata = open_stores(path, layer=layer)
        return adata, _Source(adata, layer)
    except ValueError as error:
        refused = error
    data = _read_whole(path, refused)
    adata = join_samples([data]) if is_mudata(data) else data
    for name, index in (("obs_names", adata.obs_names), ("var_names", adata.var_names)):
        check_unique(index, f"{path}, {name}", uniquely(path, name))
    return adata, _Source(adata, layer)


def _read_whole(path: Path, refused: ValueError) -> Any:
    """A file that cannot be read by cells, for which reason it was ``refused``; masks are refused for good."""
    _log.info("%s is read whole: %s", path, refused)
    data = read(path)
    if not is_mudata(data) and MASKS_KEY in data.varm:
        raise refused
    return data


class _Source:
    """Rows of counts, from disk or memory, in canonical form."""

    def __init__(self, adata: AnnData, layer: str | None) -> None:
        stores = stores_of(adata)
        self.layer = layer
        if stores is not None:
            self._matrix: Any = stores.matrix(layer, adata.var_names, "layer")
            self._at_once = self._matrix.at_once
            self.status = zlib.crc32(repr(self._matrix.status()).encode())
        else:
            if layer is not None and layer not in adata.layers:
                raise unknown_key("layer", layer, "adata.layers", layer_names(adata.layers))
            found = adata.X if layer is None else adata.layers[layer]
            if found is None:
                known = first_names(layer_names(adata.layers)) or "there is none"
                raise ValueError(f"The data set has no counts in X: give layer=NAME, one of its layers ({known}).")
            # By rows, which those compressed by columns are not.
            self._matrix = found if isinstance(found, np.ndarray) else sp.csr_array(found)
            self._at_once, self.status = _ROWS, zlib.crc32(repr((layer, float(found.sum()))).encode())
        self.shape = tuple(map(int, self._matrix.shape))

    def blocks(self, start: int = 0) -> Iterator[Rows]:
        """Blocks of rows from ``start`` on."""
        spans = [
            (first, min(first + self._at_once, self.shape[0])) for first in range(start, self.shape[0], self._at_once)
        ]

        def slices(spans: list[tuple[int, int]]) -> Iterator[Rows]:
            return (sp.csr_array(self._matrix[slice(*span)]) for span in spans)

        stored = hasattr(self._matrix, "reading")
        with self._matrix.reading() if stored else nullcontext(slices) as read:
            # One by one: from zarr, several are read together.
            for block in (block for span in spans for block in read([span])):
                if block.dtype.kind not in "buif":
                    raise ValueError(f"stores holds values of type {block.dtype}; counts must be numbers.")
                yield canonical(block)


def _count(source: _Source, bar: Any) -> tuple[NDArray[np.int64], np.dtype[Any]]:
    """Numbers of entries before each row, and the smallest type of the values."""
    sizes, kind = [np.zeros(1, dtype=np.int64)], np.dtype(np.uint8)
    for block in source.blocks():
        sizes.append(np.diff(block.indptr).astype(np.int64))
        kind = np.result_type(kind, smallest(block.data))
        bar.update(block.shape[0])
    return np.cumsum(np.concatenate(sizes)), kind


def _write(work: UnfinishedFolder, adata: AnnData, source: _Source, bar: Any) -> None:
    """Write what is not written yet: entries file by file, the progress noted after each."""
    zarr = require("zarr", "scale")
    described = {
        "cells": checksum_of(adata.obs_names),
        "features": checksum_of(adata.var_names),
        "source": source.status,
    }
    pointers = work.folder / "indptr.npy"
    done = _n_written(work, described, pointers)
    if done is None:
        work.clear()
        indptr, kind = _count(source, bar)
        # As a whole: np.save to a file loses an error of the last bytes, and every later call stumbled on the rest.
        content = io.BytesIO()
        np.save(content, indptr)
        write_whole(pointers, content.getvalue())
        _begin(zarr, work.data, adata, indptr, kind, source)
        done = 0
        work.write_progress({**described, "done": done})
    indptr = np.load(pointers)
    group = zarr.open_group(str(work.data), mode="r+")
    total = int(indptr[-1])
    row = int(np.searchsorted(indptr, done, side="right")) - 1 if done < total else source.shape[0]
    bar.update(source.shape[0] + row - bar.n)
    held: list[tuple[NDArray[Any], NDArray[Any]]] = []
    # Of the row in which the last file ended, what is written already.
    skipped = done - int(indptr[row])
    for block in source.blocks(row):
        held.append((block.data[skipped:], block.indices[skipped:]))
        skipped = 0
        bar.update(block.shape[0])
        while (n_held := sum(len(data) for data, _ in held)) and (n_held >= _SHARD or done + n_held == total):
            data, indices = (np.concatenate(parts) for parts in zip(*held, strict=True))
            stop = min(_SHARD, n_held)
            group["X/data"][done : done + stop] = data[:stop].astype(group["X/data"].dtype)
            group["X/indices"][done : done + stop] = indices[:stop]
            held, done = [(data[stop:], indices[stop:])], done + stop
            work.write_progress({**described, "done": done})
    if done != total:
        raise ValueError(f"stores: {total} counts were found first and {done} then: they were changed meanwhile.")


def _n_written(work: UnfinishedFolder, described: Mapping[str, Any], pointers: Path) -> int | None:
    """Number of entries that an earlier call wrote; None where there is nothing to go on from."""
    try:
        progress = work.read_progress()
    except ValueError:
        # What cannot be read is taken for that of other data.
        progress = {}
    if progress is None:
        return None
    if {key: progress.get(key) for key in described} != described:
        _log.warning("%s was begun for other data, and is begun anew.", work.path)
        return None
    if not pointers.exists():
        _log.warning("%s was begun by an earlier version, and is begun anew.", work.path)
        return None
    return int(progress["done"])


def _begin(
    zarr: Any, path: Path, adata: AnnData, indptr: NDArray[np.int64], kind: np.dtype[Any], source: _Source
) -> None:
    """Write all but the counts."""
    kept = {key: value for key, value in adata.uns.get(UNS_KEY, {}).items() if key not in (STORES, "setup")}
    setup = _setup_of_x(adata, source.layer)
    kept |= {} if setup is None else {"setup": setup}
    uns = {UNS_KEY: kept} if kept else {}
    sharded = not zarr.__version__.startswith("2.")
    group = zarr.open_group(str(path), mode="w", **({"zarr_format": 3} if sharded else {}))
    write_element(group, "/", AnnData(obs=adata.obs, var=adata.var, uns=uns))
    if "X" in group:
        del group["X"]
    x = group.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": list(source.shape)})
    for name, n, dtype in (("data", int(indptr[-1]), kind), ("indices", int(indptr[-1]), np.dtype(np.int32))):
        _create(zarr, x, name, n, dtype, sharded)
    # Of the type of the indices where it holds them: old versions of SciPy do not mix types.
    _create(zarr, x, "indptr", len(indptr), np.dtype(np.int32 if indptr[-1] < 2**31 else np.int64), sharded)
    x["indptr"][:] = indptr


def _setup_of_x(adata: AnnData, layer: str | None) -> str | None:
    """The setup of a data set, if there is one, whose counts are in ``X``; none of other counts than those written."""
    if "setup" not in adata.uns.get(UNS_KEY, {}):
        return None
    try:
        setup = Setup.of(adata)
    except ValueError as error:
        _log.warning("The setup is not taken over: %s", error)
        return None
    if {setup.rna_layer, setup.atac_layer} != {layer}:
        _log.warning("The setup is not taken over: its counts are in layer %r, not %r.", setup.rna_layer, layer)
        return None
    return replace(setup, rna_layer=None, atac_layer=None).to_json()


def _create(zarr: Any, group: Any, name: str, n: int, dtype: np.dtype[Any], sharded: bool) -> None:
    """An array on disk, compressed."""
    if sharded:
        codec = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="shuffle", typesize=dtype.itemsize)
        group.create_array(
            name, shape=(n,), dtype=dtype, chunks=(_CHUNK,), shards=(_SHARD,), compressors=[codec], fill_value=0
        )
    else:
        codec = require("numcodecs", "scale").Blosc("lz4", 5, 1)
        group.create_dataset(name, shape=(n,), dtype=dtype, chunks=(_CHUNK,), compressor=codec, fill_value=0)
