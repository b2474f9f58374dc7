"""A result too large for memory, written to an AnnData file block by block.

The file grows in a hidden folder beside its own place and gets its own name when it is complete, so a
file of that name is always a whole result. The folder remembers how many cells are complete and of which
request: the same request made again goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi._optional import require
from pyro_multivi.data.stores.unfinished import UnfinishedFolder
from pyro_multivi.isolation import uninterrupted
from pyro_multivi.posterior.quantities.containers import Container, container
from pyro_multivi.processes.group import is_first_process

logger = logging.getLogger("pyro_multivi")

SUFFIXES = (".h5ad", ".zarr")


class FileSink:
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
        If another process is writing the same file, or this one is not the first of several.
    OSError
        If a write fails, for instance because the disk is full; it names ``out``.
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
        if not is_first_process():
            raise RuntimeError(
                f"out={str(out)!r} is one file, and this is not the first of the processes that torchrun started: call "
                "it in all of them within `with pyro_multivi.distributed():`, or in process 0 only."
            )
        self.path = check_path(out)
        self.n_done = 0
        self._request = request
        self._frame = AnnData(obs=obs, var=var, uns=dict(uns))
        self._dense, self._sparse = dict(dense or {}), dict(sparse or {})
        self._container: Container | None = None
        self._rows: dict[str, _SparseRows] = {}
        self._is_damaged = False
        with uninterrupted(), self._writing():
            self._folder = UnfinishedFolder(self.path)
            try:
                if not self._resume():
                    self._begin()
            except BaseException:
                # For instance a column of obs that AnnData cannot write.
                self._close()
                self._folder.remove()
                raise

    # ------------------------------------------------------------------ as a sink

    def put(self, name: str, rows: slice, features: slice, values: NDArray[Any]) -> None:
        """See :class:`~pyro_multivi.posterior.quantities.array_sink.Sink`."""
        assert self._container is not None
        with self._writing():
            self._container.put(self._dense[name], rows, features, values)

    def append(self, name: str, rows: sp.csr_matrix) -> None:
        """See :class:`~pyro_multivi.posterior.quantities.array_sink.Sink`."""
        with uninterrupted(), self._writing():
            self._rows[name].append(rows)

    def commit(self, n_done: int) -> None:
        """See :class:`~pyro_multivi.posterior.quantities.array_sink.Sink`."""
        with uninterrupted(), self._writing():
            # The data first, so that the progress never promises what is not on disk.
            if self._container is not None:
                self._container.flush()
            self.n_done = n_done
            self._note(self._n_safe())

    # ------------------------------------------------------------------ from beginning to end

    def __enter__(self) -> FileSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            try:
                if kind is None:
                    with self._writing():
                        self._finish()
            except BaseException:
                self._stop()
                raise
            if kind is not None:
                self._stop()

    def _begin(self) -> None:
        # Also where all matrices are sparse, which come last: what cannot be written is found before the work.
        begun = container(self._folder.data, self._frame, list(self._dense.values()))
        self._keep(begun)
        self._rows = {name: _SparseRows(self._folder.folder, name, 0) for name in self._sparse}
        self._note(0)

    def _resume(self) -> bool:
        """Go on where an unfinished file of this request ends; otherwise delete it."""
        try:
            progress = self._folder.read_progress()
            if progress is None:
                return False
            if progress["request"] == self._request:
                n_done = int(progress["n_done"])
                if self._dense:
                    self._keep(container(self._folder.data, dense=list(self._dense.values())))
                for name in self._sparse:
                    self._rows[name] = _SparseRows(self._folder.folder, name, n_done)
                self.n_done = n_done
                if self._container is not None:
                    self._container.discard(n_done)
                    # From now on a kill may damage the rows that are written together with the next.
                    self._note(self._n_safe())
                logger.info("out=%r: going on after %d cells.", str(self.path), n_done)
                return True
            level, why = logging.WARNING, "was left by another request"
        except (OSError, KeyError, ValueError, TypeError) as error:
            level, why = logging.INFO, f"cannot be read ({error})"
        self._close()
        self._folder.clear()
        self._rows = {}
        logger.log(level, "out=%r: an unfinished file %s; beginning anew.", str(self.path), why)
        return False

    def _finish(self) -> None:
        if self._sparse:
            self._container = container(self._folder.data, self._frame)
            for name, element in self._sparse.items():
                self._rows[name].write(self._container, element, self._frame.n_vars)
        self._close()
        self._folder.publish()

    def _stop(self) -> None:
        """Keep what is complete for another try."""
        n_kept = self.n_done
        try:
            if self._is_damaged:
                n_kept = self._n_safe()
            else:
                self._note(n_kept)
            self._close()
        except OSError as error:
            n_kept = self._n_safe()
            logger.debug("out=%r: %s", str(self.path), error)
        if n_kept == 0:
            self._folder.remove()
            return
        self._folder.release()
        logger.warning(
            "out=%r: stopped after %d of %d cells. Make the same call again to go on, or delete %s.",
            str(self.path), n_kept, self._frame.n_obs, self._folder.folder,
        )  # fmt: skip

    def _n_safe(self) -> int:
        """Number of complete cells that no write touches any more."""
        if self._container is None or self.n_done == self._frame.n_obs:
            return self.n_done
        return self.n_done - self.n_done % self._container.rows_at_once

    def _note(self, n_done: int) -> None:
        self._folder.write_progress({"request": self._request, "n_done": n_done})

    def _keep(self, begun: Container) -> None:
        """Go on with a container if there are matrices to be written as they come."""
        if self._dense:
            self._container = begun
        else:
            begun.close()

    def _close(self) -> None:
        begun, self._container = self._container, None
        for rows in self._rows.values():
            rows.close()
        if begun is not None:
            begun.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors of the operating system name the result; what is written when one comes may be damaged."""
        try:
            yield
        except OSError as error:
            self._is_damaged = True
            if error.errno is None:
                raise
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class _SparseRows:
    """Rows of a sparse matrix in three files that only grow, so that no kill damages what was there.

    Parameters
    ----------
    folder, name
        Folder and beginning of the files' names.
    n_rows
        Number of rows that are there; more are dropped.

    Raises
    ------
    ValueError
        If there are fewer.
    """

    def __init__(self, folder: Path, name: str, n_rows: int) -> None:
        self._paths = {part: folder / f"{name}.{part}" for part in ("lengths", "values", "columns")}
        self._files = {part: path.open("ab", buffering=0) for part, path in self._paths.items()}
        lengths = np.fromfile(self._paths["lengths"], np.int64, n_rows)
        sizes = {"lengths": 8 * n_rows, "values": 4 * int(lengths.sum()), "columns": 4 * int(lengths.sum())}
        for part, size in sizes.items():
            if self._paths[part].stat().st_size < size:
                self.close()
                raise ValueError(f"{self._paths[part].name} is too short")
            self._files[part].truncate(size)

    def append(self, rows: sp.csr_matrix) -> None:
        """Write more rows."""
        lengths = np.diff(rows.indptr).astype(np.int64)
        values, columns = rows.data.astype(np.float32), rows.indices.astype(np.int32)
        parts: dict[str, NDArray[Any]] = {"values": values, "columns": columns, "lengths": lengths}
        for part, array in parts.items():
            left = memoryview(array.tobytes())
            while len(left):
                left = left[self._files[part].write(left) :]

    def write(self, begun: Container, element: str, width: int) -> None:
        """Write the whole matrix to a container."""
        lengths = np.fromfile(self._paths["lengths"], np.int64)
        begun.write_sparse(element, lengths, self._paths["values"], self._paths["columns"], width)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


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
        if path.with_name(f".{path.name}.unfinished").is_dir():
            # A kill just before its writer was done left it; if not, it stays.
            with suppress(RuntimeError, FileExistsError):
                UnfinishedFolder(path)
        raise FileExistsError(f"out={str(out)!r} exists and is not replaced: choose another path, or delete it.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"out={str(out)!r}: the folder {str(path.absolute().parent)!r} may not be written to.")
    if path.suffix == ".zarr":
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
