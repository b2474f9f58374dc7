"""Chunks of zarr folders that are not there, which zarr reads as zeros."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names


class StoreChangedError(RuntimeError):
    """A file or folder of counts is incomplete, or was changed, moved or damaged after it was opened."""


#: How to write what can be read by cells.
CONVERT = "pyro_multivi.convert_stores(IN, 'OUT.zarr'), or on the command line pyro-multivi convert IN OUT.zarr"
#: What to do about errors of the operating system that a file which is as it should be may cause.
_REMEDIES = {
    errno.EMFILE: "Too many files are open at once: allow more (ulimit -n 4096), or write the stores as one, "
    f"{CONVERT}",
    errno.EACCES: "You may not read it: have its owner give you the right (chmod, in folders of every file)",
    errno.EAGAIN: "Another program has it open for writing: close it there (adata.file.close()), or wait until it ends",
    errno.EIO: "The disk, or the network it is reached by, has failed: check that, and try again",
}
_REMEDIES |= {
    errno.ENFILE: _REMEDIES[errno.EMFILE],
    errno.EPERM: _REMEDIES[errno.EACCES],
    errno.ESTALE: _REMEDIES[errno.EIO],
}

# Registered numbers of the codecs that hdf5plugin brings.
_CODECS = {32001: "blosc", 32004: "lz4", 32008: "bitshuffle", 32015: "zstd", 32026: "blosc2"}


def raise_system_error(error: BaseException, path: Path) -> None:
    """Raise an error whose remedy is known: of the operating system, or a codec that is not there; else do nothing."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _REMEDIES:
        raise OSError(number, f"{path} cannot be read ({os.strerror(number)}). {_REMEDIES[number]}") from error
    codecs = _missing_codecs(path) if isinstance(error, OSError) and number is None else []
    if codecs:
        raise _without_codecs(path, codecs) from error


def _missing_codecs(path: Path) -> list[str]:
    """Codecs that arrays of an HDF5 file are compressed by and that HDF5 has not here."""
    found: dict[str, None] = {}

    def look(_: str, item: Any) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        filters = item.id.get_create_plist()
        for place in range(filters.get_nfilters()):
            number, *_, name = filters.get_filter(place)
            if not h5py.h5z.filter_avail(number):
                found[_CODECS.get(number) or name.decode(errors="replace") or f"the filter {number}"] = None

    try:
        with h5py.File(path, "r") as file:
            file.visititems(look)
    except Exception:  # a damaged file, of which the first error says more
        return []
    return list(found)


def _without_codecs(path: Path, codecs: list[str]) -> OSError:
    return OSError(
        f"{path} cannot be read: it is compressed by {' and '.join(codecs)}, which HDF5 lacks here. Install hdf5plugin "
        "(pip install hdf5plugin) and import it before the file is read (on the command line set HDF5_PLUGIN_PATH to "
        "the folder of its plugins); or write the file with compression='gzip' where it can be read."
    )


def refuse_incomplete(folder: Path, name: str, matrix: Any) -> None:
    """Refuse a compressed matrix of a zarr folder of which chunks are not there that cannot be zeros.

    Zarr takes an absent chunk for zeros, which writers may leave out. An absent chunk of columns cannot be zeros if a
    row has two entries or more in it, nor one of row pointers if the rows do not fit their width and the entries. One
    of the values would be of stored zeros alone, which no writer of counts makes.

    Parameters
    ----------
    folder
        The zarr folder.
    name
        Of the matrix in it.
    matrix
        Its group, opened; dense ones pass, whose blocks of zeros may be left out.

    Raises
    ------
    StoreChangedError
        If such a chunk is absent.
    """
    if str(matrix.attrs.get("encoding-type", "array")) not in ("csr_matrix", "csc_matrix"):
        return
    absent = {part: _absent(folder / name / part) for part in ("indptr", "indices", "data")}
    if not any(len(starts) for starts, *_ in absent.values()):
        return
    indptr = np.asarray(matrix["indptr"][:]).astype(np.int64)
    widths, n_entries = np.diff(indptr), int(matrix["data"].shape[0])
    wide = int(matrix.attrs["shape"][1 if str(matrix.attrs["encoding-type"]) == "csr_matrix" else 0])
    wrong: dict[str, list[str]] = {part: [] for part in absent}
    starts, _, files = absent["indptr"]
    if len(starts) and (
        int(indptr[0]) != 0
        or int(indptr[-1]) != n_entries
        or int(widths.min(initial=0)) < 0
        or int(widths.max(initial=0)) > wide
    ):
        wrong["indptr"] = files
    else:
        starts, size, files = absent["indices"]
        for start, file in zip(starts, files, strict=True):
            inside = np.diff(np.clip(indptr, start, start + size))
            if int(inside.max(initial=0)) > 1:
                wrong["indices"].append(file)
        wrong["data"] = absent["data"][2]
    for part, files in wrong.items():
        if files:
            raise StoreChangedError(
                f"{folder} is incomplete, as after an interrupted copy: of the array {f'{name}/{part}'!r} "
                f"{len(files)} chunk{'s are' if len(files) > 1 else ' is'} not there ({first_names(files)}), and would "
                "count as zeros. Copy the folder again, as a whole; if it never had more (stored zeros alone), call "
                "eliminate_zeros() of the matrix and write it again."
            )


def _absent(array: Path) -> tuple[NDArray[np.int64], int, list[str]]:
    """First entries of the chunks (or shards) of an array of one dimension that are not there, size, and file names."""
    n, size, prefix = _promised(array)
    folder, _, prefix = prefix.rpartition("/")
    place = array / folder
    found = set(os.listdir(place)) if place.is_dir() else set()
    numbers = [number for number in range(-(-n // size)) if f"{prefix}{number}" not in found]
    names = [f"{folder}/{prefix}{number}" if folder else f"{prefix}{number}" for number in numbers]
    return np.array(numbers, dtype=np.int64) * size, size, names


def _promised(array: Path) -> tuple[int, int, str]:
    """Length of an array, size of a chunk (or shard), and what stands before its number, as its metadata say."""
    path = array / "zarr.json"
    if not path.is_file():
        described = json.loads((array / ".zarray").read_text(encoding="utf-8"))
        return int(described["shape"][0]), int(described["chunks"][0]), ""
    described = json.loads(path.read_text(encoding="utf-8"))
    keys = described["chunk_key_encoding"]
    separator = keys.get("configuration", {}).get("separator", "/" if keys["name"] == "default" else ".")
    size = int(described["chunk_grid"]["configuration"]["chunk_shape"][0])
    return int(described["shape"][0]), size, f"c{separator}" if keys["name"] == "default" else ""
