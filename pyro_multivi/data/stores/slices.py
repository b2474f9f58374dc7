"""Slices of an array on disk: one by one from HDF5, many at once from zarr."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

#: Slices of an array of one dimension, each from a first place to before another.
Slices = Sequence[tuple[int, int]]

# Entries that zarr is asked for at once: enough that a call costs little beside them.
_AT_ONCE = 2**22
# Zarr's configuration is of the whole process.
_configuring = threading.Lock()


def slices_reader(group: Any, name: str) -> Callable[[Slices], Iterator[NDArray[Any]]]:
    """The function that reads slices of an array of a group, one after the other; they may be changed."""
    with _native_codecs(group):
        array = group[name]
    zarr = sys.modules.get("zarr")
    if zarr is None or zarr.__version__.startswith("2.") or not isinstance(array, zarr.Array) or not _joins(array):
        return lambda slices: (np.asarray(array[start:stop]) for start, stop in slices)
    return lambda slices: _from_zarr(array, slices)


def _joins(array: Any) -> bool:
    """Whether this version of zarr has what :func:`_together` calls; else slices are read one by one, more slowly."""
    try:
        from zarr.core.buffer import default_buffer_prototype  # noqa: F401
        from zarr.core.indexing import ChunkProjection  # noqa: F401
        from zarr.core.sync import sync  # noqa: F401
    except ImportError:
        return False
    return hasattr(getattr(array, "_async_array", None), "_get_selection")


def _from_zarr(array: Any, slices: Slices) -> Iterator[NDArray[Any]]:
    """Slices in few calls, of which each costs as much as some 30 cells."""
    before = np.cumsum([0, *(stop - start for start, stop in slices)])
    while len(slices):
        n = max(1, int(np.searchsorted(before, before[0] + _AT_ONCE, side="right")) - 1)
        found = _together(array, slices[:n])
        # Each is a part of what was read.
        yield from np.split(found, (before[1:n] - before[0]).tolist())
        slices, before = slices[n:], before[n:]


def _together(array: Any, slices: Slices) -> NDArray[Any]:
    """Slices of a zarr array, joined.

    Zarr has no public function for several slices; its own selections are made of the call below, in every version 3.
    """
    from zarr.core.buffer import default_buffer_prototype
    from zarr.core.sync import sync

    if len(slices) == 1:
        return np.asarray(array[slice(*slices[0])])
    wanted = _Selection(slices, int((getattr(array, "shards", None) or array.chunks)[0]))
    return np.asarray(sync(array._async_array._get_selection(wanted, prototype=default_buffer_prototype())))


class _Selection:
    """Slices of an array in the words of zarr: parts of its chunks (or shards), and where they go."""

    drop_axes = ()

    def __init__(self, slices: Slices, chunk: int) -> None:
        self._slices, self._chunk = slices, chunk
        self.shape = (sum(stop - start for start, stop in slices),)

    def __iter__(self) -> Iterator[Any]:
        from zarr.core.indexing import ChunkProjection

        done = 0
        for start, stop in self._slices:
            while start < stop:
                number, first = divmod(start, self._chunk)
                last = min(first + stop - start, self._chunk)
                n = last - first
                yield ChunkProjection((number,), (slice(first, last),), (slice(done, done + n),), n == self._chunk)
                start, done = start + n, done + n


@contextmanager
def _native_codecs(group: Any) -> Iterator[None]:
    """Have arrays opened in the context decoded by zarrs, in a quarter of the time, where it is installed.

    Not where the user chose other codecs.
    """
    zarr = sys.modules.get("zarr")
    if isinstance(group, h5py.Group) or zarr is None or zarr.__version__.startswith("2."):
        yield
        return
    try:
        import zarrs  # noqa: F401
    except ImportError:
        yield
        return
    place, usual = "codec_pipeline.path", "zarr.core.codec_pipeline.BatchedCodecPipeline"
    with _configuring, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Array is unsupported by ZarrsCodecPipeline")
        if zarr.config.get(place) != usual:
            yield
        else:
            with zarr.config.set({place: "zarrs.ZarrsCodecPipeline"}):
                yield
