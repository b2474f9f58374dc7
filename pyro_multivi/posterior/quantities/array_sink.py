"""Destinations of a streamed result: the protocol, and arrays in memory. A file is in file_sink.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray


class Sink(Protocol):
    """Destination of rows of cells, which come in order: dense ones block by block, sparse ones whole."""

    @property
    def n_done(self) -> int:
        """Number of cells that are complete."""

    def put(self, name: str, rows: slice, features: slice, values: NDArray[Any]) -> None:
        """Take a dense block, (B, W), or (S, B, W) for all draws."""

    def append(self, name: str, rows: sp.csr_matrix) -> None:
        """Take the next rows of a sparse result."""

    def commit(self, n_done: int) -> None:
        """Note that the first ``n_done`` cells are complete."""


class Recorder:
    """A sink that keeps what it is given, for the sink of another process.

    Parameters
    ----------
    n_done
        Number of cells before those that it is given.
    """

    def __init__(self, n_done: int) -> None:
        self.n_done = n_done
        #: What it was given, in order: each with a name that says where it belongs.
        self.calls: list[dict[str, NDArray[Any]]] = []

    def put(self, name: str, rows: slice, features: slice, values: NDArray[Any]) -> None:
        """See :class:`Sink`."""
        place = np.array([rows.start, rows.stop, features.start, features.stop])
        self.calls.append({"values": values, f"put {name}": place})

    def append(self, name: str, rows: sp.csr_matrix) -> None:
        """See :class:`Sink`."""
        parts = {"data": rows.data, "indices": rows.indices, "indptr": rows.indptr}
        self.calls.append({**parts, f"append {name}": np.array(rows.shape)})

    def commit(self, n_done: int) -> None:
        """See :class:`Sink`."""
        self.calls.append({"commit ": np.array(n_done)})

    @staticmethod
    def replay(calls: Sequence[dict[str, NDArray[Any]]], sink: Sink) -> None:
        """Give a sink what a recorder was given."""
        for call in calls:
            (*parts, (key, place)) = call.items()
            kind, _, name = key.partition(" ")
            arrays = dict(parts)
            if kind == "put":
                first, last, left, right = place.tolist()
                sink.put(name, slice(first, last), slice(left, right), arrays["values"])
            elif kind == "append":
                csr = (arrays["data"], arrays["indices"], arrays["indptr"])
                sink.append(name, sp.csr_matrix(csr, shape=tuple(place.tolist())))
            else:
                sink.commit(int(place))


class ArraySink:
    """A result in memory.

    Parameters
    ----------
    shape
        (cells, features) or (draws, cells, features).
    dense, sparse
        Names of the results of each kind.
    """

    def __init__(self, shape: tuple[int, ...], dense: Sequence[str] = (), sparse: Sequence[str] = ()) -> None:
        self.n_done = 0
        self._dense = {name: np.empty(shape, np.float32) for name in dense}
        self._sparse: dict[str, list[sp.csr_matrix]] = {name: [] for name in sparse}

    def put(self, name: str, rows: slice, features: slice, values: NDArray[Any]) -> None:
        """See :class:`Sink`."""
        # By torch, on all its threads: most of the time goes into touching the result's memory for the first time.
        place = torch.from_numpy(self._dense[name])[..., rows, features]
        place.copy_(torch.from_numpy(values))

    def append(self, name: str, rows: sp.csr_matrix) -> None:
        """See :class:`Sink`."""
        self._sparse[name].append(rows)

    def commit(self, n_done: int) -> None:
        """See :class:`Sink`."""
        self.n_done = n_done

    def __getitem__(self, name: str) -> Any:
        """Result of that name: ndarray or csr matrix."""
        if name in self._dense:
            return self._dense[name]
        return sp.vstack(self._sparse[name], format="csr")
