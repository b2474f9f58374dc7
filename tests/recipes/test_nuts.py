"""The guide against the exact posterior of a few cells."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import pyro_multivi as pm

pytestmark = pytest.mark.slow


def test_the_guide_agrees_with_nuts(recipes, caplog):
    """Posterior means of z agree to 0.4 posterior sd on average (measured: 0.21); variances are reported."""
    adata = pm.simulate_multiome(
        (300, 0, 0), 15, 30, n_latent=2, n_types=1, mean_library=100, differential_fraction=1.0, seed=1
    )
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    choices = {"modality_penalty": None, "dropout_rate": 0.0, "gene_likelihood": "nb", "n_layers_decoder": 1}
    model = pm.MULTIVI(adata, n_hidden=32, n_latent=2, **choices)
    model.train(60, lr=1e-2, batch_size=32, n_epochs_kl_warmup=10, progress_bar=False)
    torch.manual_seed(0)
    exact, q = recipes.nuts(model.program, model.minibatch(range(4)), n_samples=200, warmup=150)
    z, mean, variance = exact["z"], q.mean.detach(), q.variance.detach()
    gap = ((mean - z.mean(0)) / z.std(0)).abs()
    ratio = (variance / z.var(0)).numpy()
    with caplog.at_level(logging.INFO):
        logging.getLogger("pyro_multivi").info(
            "gap of means in posterior sd: %.2f (largest %.2f); variance of the guide / of NUTS: %.2f (%.2f to %.2f)",
            gap.mean(), gap.max(), np.median(ratio), ratio.min(), ratio.max(),
        )  # fmt: skip
    assert np.corrcoef(mean.flatten(), z.mean(0).flatten())[0, 1] > 0.95
    assert gap.mean() < 0.4
    assert 0.4 < np.median(ratio) < 1.6
    # The program itself stays trainable.
    assert all(p.requires_grad for p in model.program.parameters())
