"""Memory for large tensors that are needed again at every step."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes: one cache line, one vector register


class BufferPool:
    """Memory for tensors, kept and used again once they are released.

    The gradient of a wide decoder is tens of megabytes. Fresh memory of that size comes as
    untouched pages, and touching them for the first time costs as much as the arithmetic.
    A tensor from the pool is the caller's for as long as anything refers to its storage
    (a view, a parameter's ``.grad``, an autograd node): only then is its memory used again.
    Nothing needs to be returned. Away from the CPU this is plain :func:`torch.empty`.

    Parameters
    ----------
    max_bytes
        Bound on the memory kept. Tensors beyond it are allocated as usual.

    Examples
    --------
    >>> pool = BufferPool()
    >>> gradient = pool.take((3, 4), torch.float32, torch.device("cpu"))
    >>> gradient.shape, pool.kept_bytes > 0
    (torch.Size([3, 4]), True)
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        self.max_bytes = max_bytes
        self._blocks: list[np.ndarray[Any, np.dtype[np.uint8]]] = []  # least recently used first
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        # A copy, also in another process, starts empty: memory and lock stay with their owner.
        return BufferPool, (self.max_bytes,)

    @property
    def kept_bytes(self) -> int:
        """Memory held, in use or not."""
        return sum(block.nbytes for block in self._blocks)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor that shares its memory with no living one."""
        if device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        with self._lock:
            block = self._free_block(n_bytes)
            if block is None:
                return torch.empty(tuple(shape), dtype=dtype)
            start = -block.ctypes.data % _ALIGNMENT
            # The view refers to the block and torch's storage to the view: see _is_free.
            return torch.from_numpy(block[start : start + n_bytes]).view(dtype).view(tuple(shape))

    def _free_block(self, n_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        """A kept block of suitable size that no tensor uses, a new one, or None if that is too much."""
        wanted = n_bytes + _ALIGNMENT
        best = -1
        for i in range(len(self._blocks)):
            size = self._blocks[i].nbytes
            fits = wanted <= size <= wanted + wanted // 4 and (best < 0 or size < self._blocks[best].nbytes)
            if fits and _is_free(self._blocks, i):
                best = i
        if best >= 0:
            self._blocks.append(self._blocks.pop(best))
            return self._blocks[-1]
        excess = self.kept_bytes + wanted - self.max_bytes
        i = 0
        while excess > 0 and i < len(self._blocks):
            if _is_free(self._blocks, i):
                excess -= self._blocks.pop(i).nbytes
            else:
                i += 1
        if excess > 0:
            return None
        self._blocks.append(np.empty(wanted, dtype=np.uint8))
        return self._blocks[-1]


def _references(blocks: list[np.ndarray[Any, np.dtype[np.uint8]]], i: int) -> int:
    return sys.getrefcount(blocks[i])


# Number of references that the interpreter counts when the list is the only holder; depends on its version.
_UNUSED = _references([np.empty(1, dtype=np.uint8)], 0)


def _is_free(blocks: list[np.ndarray[Any, np.dtype[np.uint8]]], i: int) -> bool:
    return _references(blocks, i) == _UNUSED


# Shared by all likelihoods of the process.
POOL = BufferPool()
