"""Exchange with ArviZ."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.posterior.engine.draws import draw


def test_to_inference_data(fitted):
    pytest.importorskip("xarray")
    rows = [0, 1, 2, 110, 160]  # paired, RNA only, ATAC only
    found = fitted.to_inference_data(indices=rows, n_samples=30, gene_list=[4, 2], region_list=[0], seed=2)
    assert set(found.groups()) == {
        "posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data",
    }  # fmt: skip
    assert found.posterior["z"].shape == (1, 30, 5, 3)
    assert found.posterior["l"].dims == ("chain", "draw", "cell")
    assert found.posterior_predictive["x"].dims == ("chain", "draw", "cell", "gene")
    assert found.posterior_predictive["x"].gene.values.tolist() == ["gene_04", "gene_02"]
    observed = found.observed_data["x"].values
    assert np.isnan(observed[4]).all()
    np.testing.assert_array_equal(observed[:4], fitted.adata.X[rows[:4]][:, [4, 2]].toarray())
    likelihood = found.log_likelihood["x"].values[0]
    assert likelihood.shape == (30, 5)
    assert (likelihood[:, 4] == 0).all()
    # Draws have corrected standard deviations, those of the ELBO have not.
    factors = fitted.program.posterior_scale, fitted.program.depth_scale
    kept = [factor.clone() for factor in factors]
    for factor in factors:
        factor.fill_(1.0)
    likelihood = fitted.to_inference_data(indices=rows, n_samples=30, seed=2).log_likelihood["x"].values[0]
    for factor, value in zip(factors, kept, strict=True):
        factor.copy_(value)
    parts = fitted.get_reconstruction_error(indices=rows, n_particles=30, seed=2, return_mean=False)
    np.testing.assert_allclose(-likelihood[:, :4].mean(0), parts["reconstruction_loss_expression"][:4], rtol=1e-4)
    assert found.constant_data["has_atac"].values.tolist() == [True, True, True, False, True]


class Effects(pm.MultiVIProgram):
    """Region factors that all cells share, and an effect of two numbers of each cell."""

    def region_factors(self):
        normal = dist.Normal(torch.zeros(self.config.n_regions), 1.0).to_event(1)
        return pyro.sample("r_logit", normal).sigmoid()

    def guide_shared(self):
        pyro.sample("r_logit", dist.Normal(self.region_logit, 0.5).to_event(1))

    def observe_extra(self, cells, z, s):
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 2), 1.0).to_event(1))

    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Normal(torch.zeros(len(cells), 2), 1.0).to_event(1))


def test_latents_that_cells_share_are_exported_once(build):
    pytest.importorskip("xarray")
    model = build(program_class=Effects)
    model.is_trained = True
    found = model.to_inference_data(indices=range(12), n_samples=70, batch_size=5).posterior
    shared = draw(model.program, model.minibatch([0]), ("r_logit",), n_samples=70)["r_logit"][:, 0]
    np.testing.assert_array_equal(found["r_logit"].values[0], shared.numpy())
    assert found["w"].dims == ("chain", "draw", "cell", "w_dim_1")
    assert found["w"].shape == (1, 70, 12, 2)
    assert set(found.sizes) == {"chain", "draw", "cell", "latent", "w_dim_1", "r_logit_dim_0"}
