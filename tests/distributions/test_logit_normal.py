"""LogitNormal against numerical integration and the Normal that it transforms."""

from __future__ import annotations

import numpy as np
import pyro
import pytest
import torch
from scipy import integrate, special, stats
from torch.distributions import kl_divergence

from pyro_multivi.distributions.logit_normal import LogitNormal


@pytest.mark.parametrize(("loc", "scale"), [(0.0, 0.05), (-2.0, 1.0), (1.5, 2.5)])
def test_density_mean_and_divergence(loc, scale):
    d = LogitNormal(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    x = np.array([0.01, 0.3, 0.5, 0.97])
    density = stats.norm.logpdf(special.logit(x), loc, scale) - np.log(x * (1 - x))
    np.testing.assert_allclose(d.log_prob(torch.from_numpy(x)), density, rtol=1e-9)
    ends = loc - 10 * scale, loc + 10 * scale
    mean, _ = integrate.quad(lambda t: special.expit(t) * stats.norm.pdf(t, loc, scale), *ends, points=[loc])
    assert float(d.mean) == pytest.approx(mean, abs=1e-5)
    other = LogitNormal(torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    expected = np.log(0.7 / scale) + (scale**2 + (loc - 0.3) ** 2) / (2 * 0.7**2) - 0.5
    assert float(kl_divergence(d, other)) == pytest.approx(expected)


def test_shapes_and_gradients_in_a_plate():
    loc = torch.zeros(3, requires_grad=True)
    with pyro.plate("draws", 4, dim=-2), pyro.plate("cells", 3, dim=-1):
        value = pyro.sample("d", LogitNormal(loc, torch.tensor(0.5)))
    assert value.shape == (4, 3)
    assert bool(((value > 0) & (value < 1)).all())
    value.sum().backward()
    assert bool((loc.grad > 0).all())
    assert LogitNormal(loc, torch.tensor(0.5)).expand([4, 3]).mean.shape == (4, 3)
