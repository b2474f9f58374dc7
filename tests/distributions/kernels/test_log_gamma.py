"""Gamma functions against torch's and SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch

from pyro_multivi.distributions.kernels.log_gamma import digamma, gamma_functions, log_rising, log_rising_and_slope


def test_rising_gamma_meets_at_the_switch_and_has_its_slope() -> None:
    x = torch.tensor([1.0, 2.0, 17.0, 4000.0]).double().unsqueeze(1)
    theta = torch.tensor([1e-8, 0.3, 29.999999, 30.000001, 500.0, 1e9]).double().requires_grad_()
    rising, is_large = log_rising(x, theta)
    reference = torch.lgamma(x + theta) - torch.lgamma(theta)
    whole = rising + torch.where(is_large, x * theta.log(), 0.0)
    torch.testing.assert_close(whole, reference, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        again, large_again, slope = log_rising_and_slope(*torch.broadcast_tensors(x, theta), gamma_functions(theta))
    torch.testing.assert_close(again, rising.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(large_again.expand_as(again), is_large.expand_as(again))
    (by_theta,) = torch.autograd.grad(whole.sum(), theta)
    torch.testing.assert_close(slope.sum(0), (by_theta * theta - x.sum()).detach(), rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(slope[:, 0], 1 - x[:, 0], rtol=1e-5, atol=1e-5)
    assert slope[0, -1].abs() < 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digamma_against_scipy(dtype: torch.dtype) -> None:
    z = torch.cat([torch.logspace(-8, 6, 500), torch.linspace(0.5, 30, 500)]).to(dtype)
    close = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(digamma(z).numpy(), scipy.special.digamma(z.double().numpy()), **close)
