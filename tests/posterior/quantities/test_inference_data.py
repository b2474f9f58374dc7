"""Exchange with ArviZ."""

from __future__ import annotations

import numpy as np
import pytest


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
