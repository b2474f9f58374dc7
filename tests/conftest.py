"""Fixtures for every test: validation on, nothing left over from another test."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from anndata import AnnData

from pyro_multivi.data.simulate import simulate_multiome


def pytest_configure() -> None:
    # Tiny tensors: threads cost more than they save.
    torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def isolated() -> Iterator[None]:
    """An empty parameter store, validation on, fixed seeds; and the global state found again afterwards."""
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    defaults = _torch_defaults()
    pyro.clear_param_store()
    torch.manual_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)
    assert _torch_defaults() == defaults, "the test changed a default of torch for all that follow"


def _torch_defaults() -> dict[str, object]:
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def global_rng_untouched() -> Iterator[None]:
    """Fails the test if it reads or changes the global random state of Python, NumPy or torch."""

    def states() -> tuple[object, ...]:
        name, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), name, keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()

    before = states()
    yield
    assert states() == before, "the global random state was used"


@pytest.fixture(scope="session")
def _mosaic() -> AnnData:
    return simulate_multiome((30, 15, 15), n_genes=40, n_regions=60, n_batches=2, seed=0)


@pytest.fixture
def mosaic(_mosaic: AnnData) -> AnnData:
    """A tiny mosaic: 30 paired, 15 RNA-only, 15 ATAC-only cells; 40 genes, 60 regions; 2 batches, 4 types."""
    return _mosaic.copy()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real cells that are not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PYRO_MULTIVI_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; point PYRO_MULTIVI_DATA at the shared data sets")
    return folder
