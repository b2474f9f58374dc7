"""Switch from PyTorch's operations to compiled loops, for likelihoods and first layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_multivi._optional import require

_LOOPS: ContextVar[ModuleType | None] = ContextVar("compiled_loops", default=None)


@contextmanager
def compiled_loops() -> Iterator[None]:
    """Run the element-wise part of likelihoods as compiled loops, where there are any: float32 on a CPU.

    The loops use torch's number of threads; Numba's own number is restored afterwards. Counts with a dispersion
    per cell, Poisson counts, and blocks in which a probability underflows are evaluated without them. Numba aborts
    a process that runs loops and was forked after the threads were started: start such a process by ``spawn``.

    Raises
    ------
    ImportError
        Without Numba, which the extra ``compile`` installs.
    RuntimeError
        If there is no folder in which Numba could keep what it compiles.

    Examples
    --------
    >>> with compiled_loops():
    ...     pass
    """
    numba = require("numba", "compile")
    try:
        from pyro_multivi.distributions.kernels.numba import loops as compiled
    except RuntimeError as error:
        raise RuntimeError(
            f"Numba cannot keep what it compiles ({error}): set the environment variable NUMBA_CACHE_DIR to a folder "
            "that can be written, or train with compile=False."
        ) from error

    threads, before = torch.get_num_threads(), _start_threads(numba)
    # If they are OpenMP's, starting Numba's threads has changed torch's number.
    torch.set_num_threads(threads)
    token = _LOOPS.set(compiled)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        _LOOPS.reset(token)
        numba.set_num_threads(before)


def _start_threads(numba: ModuleType) -> int:
    """Start Numba's threads if need be and return their number.

    They are OpenMP's where possible: those are torch's own, which would otherwise spin beside others.
    """
    priority = numba.config.THREADING_LAYER_PRIORITY
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    try:
        return int(numba.get_num_threads())
    finally:
        numba.config.THREADING_LAYER_PRIORITY = priority


def loops_for(tensor: Tensor) -> ModuleType | None:
    """Module of the compiled loops if they are switched on and can take ``tensor``."""
    fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return _LOOPS.get() if fits else None


def can_read(gemm_dtype: torch.dtype | None) -> bool:
    """True if the loops take matrix products of this precision."""
    return gemm_dtype in (None, torch.float32, torch.bfloat16)


def halves(product: Tensor) -> np.ndarray[Any, Any] | None:
    """View of a bfloat16 product for the loops, as whole numbers of 16 bits; None in float32."""
    return None if product.dtype == torch.float32 else product.view(torch.uint16).numpy()
