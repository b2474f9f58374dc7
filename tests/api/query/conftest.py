"""A reference of two batches, trained for a moment, and a query of a third."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import pyro_multivi as pm


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    adata = pm.simulate_multiome((90, 20, 20), n_genes=24, n_regions=30, n_batches=3, n_types=2, seed=0)
    is_query = adata.obs["batch"] == "batch_2"
    reference, query = adata[~is_query].copy(), adata[is_query].copy()
    pm.MULTIVI.setup_anndata(reference, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(reference, n_hidden=8, n_latent=3, encode_covariates=True)
    model.train(4, progress_bar=False)
    return SimpleNamespace(reference=reference, query=query, model=model, adata=adata)
