"""The recipes of ``tutorials/recipes.md``: they exist there, and the tests take them from there."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.minibatch import Cells, Measurement

PAGE = Path(__file__).parents[2] / "tutorials" / "recipes.md"


def python_blocks() -> list[tuple[int, str]]:
    """Line number and source of each block fenced as python."""
    text = PAGE.read_text(encoding="utf-8")
    pattern = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in pattern.finditer(text)]


def definitions() -> str:
    """Imports, classes and functions of the page; nothing of what it does with them."""
    statements = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
    found = [node for _, source in python_blocks() for node in ast.parse(source).body if isinstance(node, statements)]
    return ast.unparse(ast.Module(found, []))


@pytest.fixture(scope="session")
def page() -> list[tuple[int, str]]:
    """Line number and source of each block of the page."""
    return python_blocks()


@pytest.fixture(scope="session")
def source() -> str:
    """Definitions of the page, as the text of a module."""
    return definitions()


@pytest.fixture(scope="session")
def recipes(source: str) -> Iterator[ModuleType]:
    """The recipes as a module of that name."""
    module = ModuleType("recipes")
    sys.modules["recipes"] = module
    exec(compile(source, str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules["recipes"]


@pytest.fixture
def stained(make_cells) -> Cells:
    """5 paired, 3 RNA-only and 4 ATAC-only cells in double precision; every third lacks the 4 proteins."""
    cells = make_cells(dtype=torch.float64, n_total=60)
    measured = torch.arange(len(cells)) % 3 > 0
    values = torch.poisson(torch.full((len(cells), 4), 6.0, dtype=torch.float64)) * measured[:, None]
    return cells.replace(extra={"protein": Measurement(values, measured)})


@pytest.fixture
def randomised() -> Callable[..., pm.MultiVIProgram]:
    """Programs for :func:`stained`: no parameter is at its start, none is zero."""

    def make(program_class: type[pm.MultiVIProgram], dtype: torch.dtype = torch.float64, **choices: object):
        sizes = {"n_genes": 7, "n_regions": 9, "n_hidden": 5, "n_latent": 3}
        widths = {"n_batch": 2, "n_labels": 3, "n_covariates": 3, "extra": {"protein": 4}}
        program = program_class(pm.ProgramConfig(**{**sizes, **widths, **choices})).to(dtype).eval()
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in program.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=noise, dtype=dtype))
            program.library_log_mean.copy_(torch.tensor([2.0, 3.0]))
            program.library_log_var.copy_(torch.tensor([0.3, 0.8]))
        return program

    return make


@pytest.fixture
def fitted(mosaic) -> Callable[..., pm.MULTIVI]:
    """A model of the mosaic, trained for two epochs; its proteins follow the cell type, a third is missing."""
    types = torch.as_tensor(mosaic.obs["cell_type"].astype("category").cat.codes.to_numpy(copy=True)).long()
    generator = torch.Generator().manual_seed(0)
    rates = 5.0 + 40.0 * torch.rand(int(types.max()) + 1, 4, generator=generator)
    proteins = torch.poisson(rates[types], generator=generator)
    proteins[::3] = torch.nan
    mosaic.obsm["protein"] = proteins.numpy()
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality", extra_obsm_keys=["protein"])

    def make(program_class: type[pm.MultiVIProgram], epochs: int = 2, elbo=None, **choices: object) -> pm.MULTIVI:
        model = pm.MULTIVI(mosaic, n_hidden=8, n_latent=2, program_class=program_class, **choices)
        model.train(epochs, n_epochs_kl_warmup=1, batch_size=32, progress_bar=False, elbo=elbo)
        return model

    return make
