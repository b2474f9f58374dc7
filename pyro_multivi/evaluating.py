"""Looking at a program without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch

from pyro_multivi.program import MultiVIProgram


@contextmanager
def evaluating(program: MultiVIProgram) -> Iterator[None]:
    """No gradients, no dropout, no validation; every state, also torch's random one, as before afterwards."""
    modes = [(module, module.training) for module in program.modules()]
    device = next(program.parameters()).device
    program.eval()
    try:
        with (
            torch.no_grad(),
            pyro.validation_enabled(False),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
