"""Whether likelihoods and first layers run as compiled loops."""

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

    They have torch's number of threads, and Numba has its own again afterwards. Counts with a dispersion
    per cell, Poisson counts, and blocks in which a probability underflows go on without. Numba stops a process that
    was forked after its threads were started and runs loops too: start such a process by ``spawn``.

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
    # Where they are OpenMP's, starting Numba's threads has changed torch's number.
    torch.set_num_threads(threads)
    token = _LOOPS.set(compiled)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        _LOOPS.reset(token)
        numba.set_num_threads(before)


def _start_threads(numba: ModuleType) -> int:
    """Start Numba's threads unless it has them, OpenMP's if it can be: those are torch's own, which else would spin."""
    priority = numba.config.THREADING_LAYER_PRIORITY
    numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    try:
        return int(numba.get_num_threads())
    finally:
        numba.config.THREADING_LAYER_PRIORITY = priority


def loops_for(tensor: Tensor) -> ModuleType | None:
    """The module of loops if they are wanted and can take ``tensor``."""
    fits = tensor.dtype == torch.float32 and tensor.device.type == "cpu"
    return _LOOPS.get() if fits else None


def can_read(gemm_dtype: torch.dtype | None) -> bool:
    """Whether products of this precision can be handed to the loops."""
    return gemm_dtype in (None, torch.float32, torch.bfloat16)


def halves(product: Tensor) -> np.ndarray[Any, Any] | None:
    """A product in bfloat16 as the loops read and write it, whole numbers of that many bits; None in float32."""
    return None if product.dtype == torch.float32 else product.view(torch.uint16).numpy()
