"""Factors that scale estimates, and their intervals."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from pyro_multivi.data.checks import least_draws
from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.posterior.quantities.summary import Estimate, summarise

METHODS = ["get_normalized_expression", "get_accessibility_estimates"]
SOME = [3, 120, 121, 199]  # paired, RNA-only twice, ATAC-only


@contextmanager
def without_regressions(program):
    """As if depths that were not measured had not been predicted."""
    stored = [program.rna_depth_regression, program.atac_depth_regression]
    kept = [regression.clone() for regression in stored]
    for regression in stored:
        regression.zero_()
    try:
        yield
    finally:
        for regression, before in zip(stored, kept, strict=True):
            regression.copy_(before)


def test_library_sizes_scale_expression(fitted_weights):
    get = fitted_weights.get_normalized_expression
    rho = get(indices=SOME, n_samples=40, return_mean=False, seed=1)
    np.testing.assert_allclose(get(indices=SOME, library_size=1e4), 1e4 * get(indices=SOME), rtol=1e-5)
    sizes = np.array([10.0, 20.0, 30.0, 40.0])
    for batch_size in (1, 3, 512):
        found = get(indices=SOME, library_size=sizes, n_samples=40, seed=1, batch_size=batch_size)
        np.testing.assert_allclose(found, sizes[:, None] * rho.mean(0), rtol=1e-4)
    drawn = draw(fitted_weights.program, fitted_weights.minibatch(SOME), ("l",), n_samples=40, seed=1)["l"].numpy()
    found = get(indices=SOME, library_size="latent", n_samples=40, seed=1, return_mean=False)
    np.testing.assert_allclose(found, drawn[..., None] * rho, rtol=1e-4)
    # At the mean it is the posterior mean of l, for an ATAC-only cell that of its prior, or predicted from ATAC.
    sums = get(indices=SOME, library_size="latent").sum(axis=1)
    expected = fitted_weights.get_library_size_factors(indices=SOME)["expression"]
    np.testing.assert_allclose(sums[:3], expected[:3], rtol=1e-4)
    with without_regressions(fitted_weights.program):
        l = get(indices=SOME, library_size="latent").sum(axis=1)
    prior = fitted_weights.program.library_prior(fitted_weights.minibatch(SOME), fitted_weights.minibatch(SOME).design)
    np.testing.assert_allclose(l[:3], sums[:3], rtol=1e-6)
    np.testing.assert_allclose(l.iloc[3], prior.mean[3], rtol=1e-4)
    assert abs(sums.iloc[3] / l.iloc[3] - 1) > 1e-3


def test_factors_scale_accessibility(fitted_weights):
    get = fitted_weights.get_accessibility_estimates
    p, r = get(return_numpy=True), fitted_weights.get_region_factors()
    d = fitted_weights.get_library_size_factors()["accessibility"]
    np.testing.assert_allclose(get(normalize_regions=True), p * r, rtol=1e-5)
    np.testing.assert_allclose(get(normalize_regions=True, region_list=[7, 3]), (p * r)[:, [7, 3]], rtol=1e-5)
    # Without ATAC and without a regression, d has its prior.
    with torch.no_grad():
        cells = fitted_weights.minibatch(np.arange(len(d)))
        prior = fitted_weights.program.cell_factor_prior(cells, cells.design)
        d = np.where(np.isnan(d), prior.mean.numpy(), d)
        of_prior = prior.sample((20_000,))[:, 120]
    with without_regressions(fitted_weights.program):
        np.testing.assert_allclose(get(normalize_cells=True), p * d[:, None], rtol=1e-5)
        both = get(normalize_cells=True, normalize_regions=True)
        np.testing.assert_allclose(both, p * d[:, None] * r, rtol=1e-5)
        some = get(indices=[120], n_samples=2000, normalize_cells=True, return_mean=False)
        plain = get(indices=[120], n_samples=2000, return_mean=False)
        assert abs((some / plain).std() / of_prior.std() - 1) < 0.07


def test_a_threshold_makes_it_sparse(fitted):
    get = fitted.get_accessibility_estimates
    p = get(return_numpy=True)
    found = get(threshold=0.3, return_numpy=True, batch_size=17)
    assert isinstance(found, sp.csr_matrix)
    np.testing.assert_allclose(found.toarray(), np.where(p >= 0.3, p, 0), rtol=1e-5)
    assert found.nnz == (p >= 0.3).sum() < p.size
    frame = get(threshold=0.3)
    assert all(isinstance(kind, pd.SparseDtype) for kind in frame.dtypes)
    np.testing.assert_allclose(frame.to_numpy(), found.toarray(), rtol=1e-5)
    assert list(frame.index) == list(fitted.adata.obs_names)
    assert get(threshold=1.0, return_numpy=True).nnz == 0
    np.testing.assert_array_equal(get(threshold=0, return_numpy=True).toarray(), p)


# ---------------------------------------------------------------------- uncertainty


@pytest.mark.parametrize("method", METHODS)
def test_intervals_are_quantiles_of_the_draws(fitted, method):
    get = getattr(fitted, method)
    draws = get(n_samples=40, return_mean=False).astype(float)
    found = get(n_samples=40, return_interval=0.9, batch_size=13)
    assert isinstance(found, Estimate)
    for frame in found:
        assert isinstance(frame, pd.DataFrame)
        assert list(frame.index) == list(fitted.adata.obs_names)
    np.testing.assert_allclose(found.mean, draws.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.sd, draws.std(0, ddof=1), rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.lower, np.quantile(draws, 0.05, axis=0), rtol=1e-4)
    np.testing.assert_allclose(found.upper, np.quantile(draws, 0.95, axis=0), rtol=1e-4)


def test_what_was_not_measured_is_less_certain(continuum):
    modality = continuum.adata.obs["modality"].to_numpy()
    sd = continuum.get_accessibility_estimates(n_samples=50, return_interval=0.9).sd.mean(axis=1)
    assert sd[modality == "expression"].mean() > sd[modality == "paired"].mean()


@pytest.mark.parametrize(("level", "least"), [(0.5, 4), (0.9, 20), (0.95, 40), (0.99, 200)])
def test_least_draws(level, least):
    assert least_draws(level) == least


def test_quantiles_of_two_draws():
    values = torch.tensor([[[3.0]], [[1.0]]])
    found = summarise(values, level=0.5)
    assert {name: value.item() for name, value in found.items()} == {
        "mean": 2.0, "sd": pytest.approx(2**0.5), "lower": 1.5, "upper": 2.5
    }  # fmt: skip
