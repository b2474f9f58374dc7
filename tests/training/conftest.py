"""Fixtures of training: short runs, and a check that a model is left in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.posterior.calibration.refit import calibrated_buffers


def _train(model: pm.MULTIVI, max_epochs: int = 3, **options: Any) -> pm.MULTIVI:
    model.train(max_epochs, **{"progress_bar": False, "batch_size": 16, **options})
    return model


@pytest.fixture
def train() -> Callable[..., pm.MULTIVI]:
    """Train a model for some epochs, and return it."""
    return _train


@pytest.fixture
def learned() -> Callable[[pm.MultiVIProgram], dict[str, torch.Tensor]]:
    """Copy the state of a program, without what is calibrated after training."""

    def copy(program: pm.MultiVIProgram) -> dict[str, torch.Tensor]:
        calibrated = {id(buffer) for buffer in calibrated_buffers(program)}
        named = {**dict(program.named_parameters()), **dict(program.named_buffers())}
        return {name: value.detach().clone() for name, value in named.items() if id(value) not in calibrated}

    return copy


@pytest.fixture
def assert_usable() -> Callable[[pm.MULTIVI], None]:
    """Finite weights, evaluation mode, no gradients left, results, and training that goes on."""

    def check(model: pm.MULTIVI) -> None:
        program = model.program
        assert all(torch.isfinite(p).all() for p in program.parameters())
        assert not program.training
        assert all(p.grad is None for p in program.parameters())
        assert np.isfinite(model.get_latent_representation()).all()
        n = len(next(iter(model.history.values()), []))
        _train(model, 1)
        assert len(model.history["train_loss"]) == n + 1
        assert np.isfinite(model.get_elbo())

    return check
