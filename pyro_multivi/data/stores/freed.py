"""Memory of blocks that were read and are done with, returned to the system."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

#: Bytes of blocks after which memory is returned; a call takes some milliseconds.
EVERY = 2**25
_lock = threading.Lock()
_read = 0


def count_read(n_bytes: int) -> None:
    """Note that blocks of so many bytes were read; from time to time, return what was freed to the system.

    The GNU C library keeps freed memory for the next block, which rarely fits between what is still in use: over a
    pass, a process would grow with the number of cells.
    """
    global _read
    with _lock:
        _read += n_bytes
        due = _read >= EVERY
        if due:
            _read = 0
    if due:
        _trim()(0)


@cache
def _trim() -> Callable[[int], int]:
    """The library's ``malloc_trim``; other systems have none, nor its habit."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda _: 0
    return found
