"""A result too large for memory, written to an AnnData file block by block.

The file grows under a hidden name beside its own and gets its own name when it is complete, so a
file of that name is always a whole result. It remembers how many cells are complete and of which
request: the same request made again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi._optional import require

logger = logging.getLogger("pyro_multivi")

SUFFIXES = (".h5ad", ".zarr")
#: Attribute of a file that is not complete.
_MARK = "pyro_multivi_unfinished"
# Cells x features of a chunk, 1 MB in float32: neither rows nor columns are slow to read.
_CHUNK = (256, 1024)
# Stored entries of a chunk of a sparse matrix.
_SPARSE_CHUNK = 2**18


class Store:
    """A :class:`~pyro_multivi.posterior.quantities.array_sink.Sink` in a ``.h5ad`` file or ``.zarr`` folder.

    Used as a context: leaving it without an error completes the file, leaving it with an error
    keeps what was written for another try (nothing, if no cell was complete).

    Parameters
    ----------
    out
        Path of the file; see :func:`check_path`.
    request
        Digest of everything the result depends on: an unfinished file is continued only if it
        was made for the same request, else written anew.
    obs, var, uns
        Parts of the AnnData.
    dense, sparse
        Elements of the file by name of the result: ``{"mean": "X", "sd": "layers/sd"}``.

    Raises
    ------
    RuntimeError
        If another process is writing the same file.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        request: str,
        obs: pd.DataFrame,
        var: pd.DataFrame,
        uns: Mapping[str, Any],
        dense: Mapping[str, str] | None = None,
        sparse: Mapping[str, str] | None = None,
    ) -> None:
        self.path = check_path(out)
        self._part = self.path.with_name(f".{self.path.name}.unfinished")
        self._request = request
        self._places = {**(dense or {}), **(sparse or {})}
        self._shape = (len(obs), len(var))
        self.n_done = 0
        self._root: Any = None
        if self._part.exists():
            self._root = self._resume()
        if self._root is None:
            try:
                self._begin(AnnData(obs=obs, var=var, uns=dict(uns)), list((dense or {}).values()), sparse or {})
            except BaseException:
                # For instance a column of obs that AnnData cannot write.
                self._close()
                _remove(self._part)
                raise
        else:
            for place in (sparse or {}).values():
                # Rows of a minibatch that was not complete are dropped.
                n_stored = int(self._root[place]["indptr"][self.n_done])
                for part in ("data", "indices"):
                    self._root[place][part].resize((n_stored,))

    # ------------------------------------------------------------------ as a sink

    def put(self, name: str, rows: slice, features: slice, values: NDArray[Any]) -> None:
        """See :class:`~pyro_multivi.posterior.quantities.array_sink.Sink`."""
        self._root[self._places[name]][rows, features] = values

    def append(self, name: str, rows: sp.csr_matrix) -> None:
        """See :class:`~pyro_multivi.posterior.quantities.array_sink.Sink`."""
        matrix = self._root[self._places[name]]
        first = matrix["data"].shape[0]
        for part, values in (("data", rows.data), ("indices", rows.indices)):
            matrix[part].resize((first + rows.nnz,))
            matrix[part][first:] = values
        matrix["indptr"][self.n_done + 1 : self.n_done + 1 + rows.shape[0]] = first + rows.indptr[1:].astype(np.int64)

    def commit(self, n_done: int) -> None:
        """See :class:`~pyro_multivi.posterior.quantities.array_sink.Sink`."""
        # The data first, so that the mark never promises what is not on disk.
        self._flush()
        self.n_done = n_done
        self._mark()
        self._flush()

    # ------------------------------------------------------------------ from beginning to end

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
            return
        self._close()
        if self.n_done == 0:
            _remove(self._part)
            return
        logger.warning(
            "out=%r: stopped after %d of %d cells. Make the same call again to go on, or delete %s.",
            str(self.path), self.n_done, self._shape[0], self._part,
        )  # fmt: skip

    def _begin(self, frame: AnnData, dense: Sequence[str], sparse: Mapping[str, str]) -> None:
        if _is_zarr(self.path):
            zarr = require("zarr", "zarr")
            # Version 2 of the format is read by every AnnData we support.
            version = {"zarr_format": 2} if hasattr(zarr.Group, "create_array") else {}
            _write_frame(zarr.open_group(str(self._part), mode="w", **version), frame)
        else:
            with h5py.File(self._part, "w") as file:
                _write_frame(file, frame)
        self._root = self._open()
        n_cells, n_features = self._shape
        for place in dense:
            array = self._create(place, self._shape, np.float32, tuple(map(min, self._shape, _CHUNK)))
            array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for place in sparse.values():
            matrix = self._root.create_group(place)
            for part, kind in (("data", np.float32), ("indices", np.int32)):
                self._create(f"{place}/{part}", (0,), kind, (_SPARSE_CHUNK,), grows=True)
            self._create(f"{place}/indptr", (n_cells + 1,), np.int64, (min(n_cells + 1, _SPARSE_CHUNK),))[:] = 0
            matrix.attrs.update(
                {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, n_features]}
            )
        self._mark()
        self._flush()

    def _resume(self) -> Any:
        """The unfinished file if it belongs to this request; otherwise it is removed."""
        try:
            self._root = self._open()
            mark = json.loads(self._root.attrs[_MARK])
            if mark["request"] == self._request:
                self.n_done = int(mark["n_done"])
                logger.info("out=%r: going on after %d cells.", str(self.path), self.n_done)
                return self._root
            why = "was left by another request"
        except BlockingIOError as error:
            raise RuntimeError(f"out={str(self.path)!r} is being written by another process.") from error
        except (OSError, KeyError, ValueError) as error:
            why = f"cannot be read ({error})"
        self._close()
        logger.info("out=%r: an unfinished file %s; beginning anew.", str(self.path), why)
        _remove(self._part)
        return None

    def _finish(self) -> None:
        del self._root.attrs[_MARK]
        self._close()
        os.replace(self._part, self.path)

    def _mark(self) -> None:
        self._root.attrs[_MARK] = json.dumps({"request": self._request, "n_done": self.n_done})

    # ------------------------------------------------------------------ HDF5 or zarr

    def _open(self) -> Any:
        if _is_zarr(self.path):
            return require("zarr", "zarr").open_group(str(self._part), mode="r+")
        return h5py.File(self._part, "r+")

    def _create(
        self, place: str, shape: tuple[int, ...], kind: Any, chunks: tuple[int, ...], grows: bool = False
    ) -> Any:
        root = self._root
        if isinstance(root, h5py.File):
            return root.create_dataset(place, shape, kind, chunks=chunks, maxshape=(None,) if grows else None)
        create = root.create_array if hasattr(root, "create_array") else root.create_dataset
        return create(place, shape=shape, dtype=kind, chunks=chunks)

    def _flush(self) -> None:
        if isinstance(self._root, h5py.File):
            self._root.flush()

    def _close(self) -> None:
        if isinstance(self._root, h5py.File):
            self._root.close()
        self._root = None


def check_path(out: str | os.PathLike[str]) -> Path:
    """Check that a result can be written to a path.

    Raises
    ------
    ValueError
        If the suffix is neither ``.h5ad`` nor ``.zarr``.
    FileNotFoundError, FileExistsError, PermissionError
        If the folder is missing, something is there already, or the folder may not be written to.
    """
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"out={str(out)!r} must end in {' or '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"out={str(out)!r}: the folder {str(path.absolute().parent)!r} does not exist.")
    if path.exists():
        raise FileExistsError(f"out={str(out)!r} exists and is not replaced: choose another path, or delete it.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"out={str(out)!r}: the folder {str(path.absolute().parent)!r} may not be written to.")
    if _is_zarr(path):
        require("zarr", "zarr")
    return path


def digest(arguments: Mapping[str, Any], *tensors: Tensor | None) -> str:
    """Digest of arguments and tensors: a short text that differs if any of them does."""
    found = hashlib.blake2b(json.dumps(arguments, sort_keys=True, default=str).encode(), digest_size=16)
    for tensor in tensors:
        if tensor is not None:
            found.update(str(tuple(tensor.shape)).encode())
            found.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).view(np.uint8).data)
    return found.hexdigest()


def _is_zarr(path: Path) -> bool:
    return path.suffix == ".zarr"


def _write_frame(root: Any, frame: AnnData) -> None:
    """Write the AnnData without its matrices, which are added as they come."""
    try:
        from anndata.io import write_elem
    except ImportError:  # before anndata 0.11
        from anndata.experimental import write_elem
    write_elem(root, "/", frame)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
