"""Fixtures of the likelihoods' tests."""

from __future__ import annotations

import pytest
import torch

from pyro_multivi.distributions import Readout, blockwise


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few features, so that tiny tensors take several, the last of them shorter."""
    monkeypatch.setattr(blockwise, "CPU_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(blockwise, "DEVICE_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(blockwise, "MIN_WIDTH", 5)


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a readout is multiplied out."""

    def dense(readout: Readout) -> torch.Tensor:
        raise AssertionError("a readout was multiplied out")

    monkeypatch.setattr(Readout, "dense", dense)
