"""Fixtures for every test: validation on, nothing left over from another test."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from anndata import AnnData

import pyro_multivi as pm
from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.datasets.simulate import simulate_multiome
from pyro_multivi.program import MultiVIProgram


def pytest_configure() -> None:
    # Tiny tensors: threads cost more than they save, so there are more only where they are asked for.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    # Shells start what runs in the background with Ctrl-C ignored, and so without Python's handler.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture
def mosaic_file(mosaic: AnnData, tmp_path: Path) -> Path:
    """The mosaic in a file."""
    path = tmp_path / "mosaic.h5ad"
    mosaic.write_h5ad(path)
    return path


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn by commands and reports, for tests of what else they do: pictures take most of their time."""
    monkeypatch.setattr("pyro_multivi.cli.train.first_picture", lambda *_: None)
    monkeypatch.setattr("pyro_multivi.plots.report.pictures", lambda *_: [])


@pytest.fixture
def build(mosaic: AnnData) -> Callable[..., pm.MULTIVI]:
    """Models of one small mosaic, alike unless told otherwise."""
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")

    def make(**choices: Any) -> pm.MULTIVI:
        return pm.MULTIVI(mosaic, **{"n_hidden": 6, "n_latent": 2, **choices})

    return make


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real cells that are not part of the project."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PYRO_MULTIVI_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}; point PYRO_MULTIVI_DATA at the shared data sets")
    return folder


@pytest.fixture
def make_cells() -> Callable[..., Cells]:
    """Cells of 7 genes and 9 regions, no data set behind them; the design is 2 batches and a number.

    ``n`` are the numbers of paired, RNA-only and ATAC-only cells, in this order.
    """

    def make(
        n: tuple[int, int, int] = (5, 3, 4),
        n_genes: int = 7,
        n_regions: int = 9,
        dtype: torch.dtype = torch.float32,
        sparse: bool = True,
        n_total: int | None = None,
        seed: int = 0,
    ) -> Cells:
        rng = np.random.default_rng(seed)
        total = sum(n)
        has_rna, has_atac = np.arange(total) < n[0] + n[1], (np.arange(total) < n[0])
        has_atac[n[0] + n[1] :] = True
        x = rng.poisson(rng.gamma(1.0, 3.0, (total, n_genes))) * has_rna[:, None]
        y = rng.binomial(2, 0.3, (total, n_regions)) * has_atac[:, None]
        batch = rng.permutation(np.arange(total) % 2)
        design = np.column_stack([batch == 0, batch == 1, rng.standard_normal(total)])
        counts = [torch.as_tensor(part, dtype=dtype) for part in (x, y)]
        return Cells(
            index=torch.arange(total),
            n_total=total if n_total is None else n_total,
            x=SparseCounts.from_dense(counts[0]) if sparse else counts[0],
            y=SparseCounts.from_dense(counts[1]) if sparse else counts[1],
            has_rna=torch.as_tensor(has_rna),
            has_atac=torch.as_tensor(has_atac),
            design=torch.as_tensor(design, dtype=dtype),
            label=torch.as_tensor(rng.permutation(np.arange(total) % 3)),
        )

    return make


@pytest.fixture
def make_program() -> Callable[..., MultiVIProgram]:
    """Programs for the cells of :func:`make_cells`: no parameter is at its start, none is zero."""

    def make(dtype: torch.dtype = torch.float32, seed: int = 0, **choices: object) -> MultiVIProgram:
        sizes = {"n_genes": 7, "n_regions": 9, "n_hidden": 5, "n_latent": 3}
        widths = {"n_batch": 2, "n_labels": 3, "n_covariates": 3}
        program = MultiVIProgram(ProgramConfig(**{**sizes, **widths, **choices})).to(dtype).eval()  # type: ignore[arg-type]
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in program.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=noise, dtype=dtype))
            program.rna_log_depth.fill_(2.5)
            program.atac_log_depth.fill_(1.2)
            program.library_log_mean.copy_(torch.tensor([2.0, 3.0]))
            program.library_log_var.copy_(torch.tensor([0.3, 0.8]))
            if hasattr(program, "cell_factor_sd"):
                program.cell_factor_sd.copy_(torch.tensor([0.7, 1.2]))
                program.cell_factor_offset.fill_(-0.4)
        return program

    return make
