"""Trained models of simulated data, and what public functions take beside them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import pytest
import torch
from anndata import AnnData

import pyro_multivi as pm
from pyro_multivi.datasets.simulate import simulate_multiome


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """One tiny trained model, and what public functions take beside it."""
    mpl.use("agg")
    torch.manual_seed(0)
    adata = simulate_multiome((24, 0, 0), n_genes=8, n_regions=10, n_batches=2, n_types=2, n_proteins=3, seed=0)
    keys = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "protein_expression"}
    pm.MULTIVI.setup_anndata(adata, **keys)
    model = pm.MULTIVI(adata, n_hidden=4, n_latent=2)
    model.train(1, train_size=0.5, progress_bar=False)
    folder = tmp_path_factory.mktemp("arguments")
    model.save(folder / "model")
    adata.write_h5ad(folder / "store.h5ad")
    check = model.posterior_predictive_check(n_samples=40)
    table = model.differential_expression(groupby="cell_type", group1="type_0", n_samples=20)
    table["is_de_fdr_0.05"] = table["lfc_mean"] > 0
    return SimpleNamespace(
        adata=adata, model=model, folder=folder, check=check, table=table,
        plain=simulate_multiome((12, 0, 0), n_genes=4, n_regions=5),
        mdata=simulate_multiome((12, 0, 0), n_genes=4, n_regions=5, return_mudata=True),
        options={"seed": 0, "batch_size": 8},
    )  # fmt: skip


@pytest.fixture
def ready(mosaic: AnnData) -> AnnData:
    """The mosaic, set up."""
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    return mosaic


@pytest.fixture(scope="session")
def small() -> Callable[..., pm.MULTIVI]:
    """Build a small model."""

    def build(adata: AnnData, **choices: Any) -> pm.MULTIVI:
        return pm.MULTIVI(adata, **{"n_hidden": 6, "n_latent": 2, **choices})

    return build


@pytest.fixture(scope="session")
def trained(small: Callable[..., pm.MULTIVI]) -> Callable[..., pm.MULTIVI]:
    """Build a small model and train it a little."""

    def build(adata: AnnData, epochs: int = 2, **choices: Any) -> pm.MULTIVI:
        model = small(adata, **choices)
        model.train(epochs, progress_bar=False, batch_size=32)
        return model

    return build


@pytest.fixture(scope="module")
def shared() -> pm.MULTIVI:
    """One trained model of the mosaic, for tests that only read."""
    adata = pm.simulate_multiome((30, 15, 15), n_genes=40, n_regions=60, n_batches=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    with torch.random.fork_rng():
        model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
        model.train(3, progress_bar=False, batch_size=32)
    return model
