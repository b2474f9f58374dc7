"""Calls that neither depend on the state of the process (modes of torch, Pyro, signals) nor leave it changed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import runtime

logger = logging.getLogger("pyro_multivi")

# Pyro's stack of handlers and its validation are global: one thread at a time.
_LOCK = threading.RLock()
# What the thread that holds the lock found when it took it.
_found: list[PyroState] = []


@contextmanager
def isolated() -> Iterator[None]:
    """Run with float32, gradients and Pyro as if nothing were around; used as a context or a decorator.

    A default dtype or device, ``no_grad``, ``inference_mode`` and ``autocast`` of the caller do not act inside and are
    as they were afterwards. An error or Ctrl-C inside leaves neither handlers and plates in Pyro's stack nor its
    validation changed. Calls of several threads run one after the other.

    Examples
    --------
    >>> with torch.no_grad(), isolated():
    ...     torch.is_grad_enabled()
    True
    """
    with _LOCK:
        before, modes = PyroState(), ExitStack()
        _found.append(before)
        try:
            with uninterrupted():
                _enter_neutral_modes(modes)
            yield
        except BaseException:
            # Only then: what ends well leaves Pyro as it was, and a handler of another thread's is not touched.
            before.restore()
            raise
        finally:
            _found.pop()
            with uninterrupted():
                modes.close()


def _after_fork() -> None:
    """In a child process, let go of a lock that another thread held, which the child does not have."""
    global _LOCK
    if _LOCK.acquire(blocking=False):
        _LOCK.release()
        return
    _LOCK = threading.RLock()
    if _found:
        _found[0].restore()
    _found.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


def _enter_neutral_modes(modes: ExitStack) -> None:
    dtype = torch.get_default_dtype()
    if dtype != torch.float32:
        modes.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
    # torch.get_default_device() knows nothing of the context torch.device() before torch 2.5.
    if torch.empty(0).device.type != "cpu":
        modes.enter_context(torch.device("cpu"))
    modes.enter_context(torch.inference_mode(False))
    modes.enter_context(torch.enable_grad())
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        modes.enter_context(torch.autocast(device, enabled=False))
    # A density far out is 0, also where the caller makes an error of numbers that are too small.
    modes.enter_context(np.errstate(under="ignore"))


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Leave torch's generators of random numbers, of the CPU and of a GPU that is used, as they were found."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class PyroState:
    """Handlers and plates in Pyro's stack, and its validation, to be restored after an error at any place."""

    def __init__(self) -> None:
        self._handlers = list(runtime._PYRO_STACK)
        self._plates = list(runtime._DIM_ALLOCATOR._stack)
        self._settings = {name: value for name, value in pyro.settings.get().items() if name.startswith("validate_")}

    def restore(self) -> None:
        """Bring back what was found."""
        with uninterrupted():
            runtime._PYRO_STACK[:] = self._handlers
            runtime._DIM_ALLOCATOR._stack[:] = self._plates
            pyro.settings.set(**self._settings)


class Interruption:
    """A handler of a signal that keeps the first and passes on the second."""

    def __init__(self, number: int, handler: Any) -> None:
        self.number, self.handler = number, handler
        #: Whether a signal was kept that has not acted yet.
        self.waits = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Take a signal, as Python hands it over."""
        self.waits = not self.waits
        if not self.waits:
            self.handler(number, frame)

    def act(self) -> None:
        """Let a signal that was kept act now."""
        if self.waits:
            self(self.number, None)


@contextmanager
def uninterrupted(number: int = signal.SIGINT) -> Iterator[Interruption]:
    """Let Ctrl-C act when the block is left or says so, so that nothing stays half done; a second one acts at once.

    Within another such block, outside the main thread (where Python never delivers signals) and where SIGINT has no
    Python handler this does nothing.

    Parameters
    ----------
    number
        Another signal in its place. SIGTERM need not have a Python handler: as without this, it ends the process.
    """
    before = signal.getsignal(number)
    if isinstance(before, Interruption):
        yield before
        return
    ends = number == signal.SIGTERM and before == signal.SIG_DFL
    interruption = Interruption(number, _end_process if ends else before)
    if threading.current_thread() is not threading.main_thread() or not callable(interruption.handler):
        yield interruption
        return
    signal.signal(number, interruption)
    try:
        yield interruption
    finally:
        signal.signal(number, before)
        interruption.act()


@contextmanager
def tells_if_interrupted(consequence: str) -> Iterator[None]:
    """Log what Ctrl-C leaves out of the calibration of a trained model; a decorator of that part of it."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning("interrupted after training: %s", consequence)
        raise


def _end_process(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
