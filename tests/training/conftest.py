"""Fixtures of training: short runs, and a check that a model is left in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import pyro_multivi as pm


def _train(model: pm.MULTIVI, max_epochs: int = 3, **options: Any) -> pm.MULTIVI:
    model.train(max_epochs, **{"progress_bar": False, "batch_size": 16, **options})
    return model


@pytest.fixture
def train() -> Callable[..., pm.MULTIVI]:
    """Train a model for some epochs, and return it."""
    return _train


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
