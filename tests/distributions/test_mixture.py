"""The mixture of background and foreground against SciPy and torch's own mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import distributions as td

from pyro_multivi.distributions.mixture import NegativeBinomialMixture


@pytest.fixture
def parameters():
    noise = torch.Generator().manual_seed(0)
    background = torch.rand(6, 4, generator=noise, dtype=torch.float64) * 10 + 0.1
    foreground = background * (1 + 5 * torch.rand(6, 4, generator=noise, dtype=torch.float64))
    theta = torch.rand(4, generator=noise, dtype=torch.float64) * 5 + 0.2
    logits = 2 * torch.randn(6, 4, generator=noise, dtype=torch.float64)
    return [part.requires_grad_() for part in (background, foreground, theta, logits)]


@pytest.fixture
def counts():
    return torch.tensor([0.0, 1.0, 7.0, 300.0], dtype=torch.float64).expand(6, 4)


def test_density_is_that_of_scipy(parameters, counts):
    background, foreground, theta, logits = (part.detach().numpy() for part in parameters)

    def nb(mean):
        return stats.nbinom.logpmf(counts.numpy(), theta, theta / (theta + mean))

    pi = special.expit(-logits)
    expected = np.logaddexp(np.log(pi) + nb(background), np.log1p(-pi) + nb(foreground))
    np.testing.assert_allclose(NegativeBinomialMixture(*parameters).log_prob(counts).detach(), expected, rtol=1e-9)


def test_gradients_are_those_of_torchs_mixture(parameters, counts):
    background, foreground, theta, logits = parameters
    means = torch.stack([background, foreground], -1)
    component = td.NegativeBinomial(theta[:, None], logits=(means / theta[:, None]).log())
    share = torch.stack([torch.zeros_like(logits), logits], -1)
    torchs = td.MixtureSameFamily(td.Categorical(logits=share), component).log_prob(counts)
    ours = NegativeBinomialMixture(*parameters).log_prob(counts)
    torch.testing.assert_close(ours, torchs)
    weight = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4)
    expected = torch.autograd.grad((weight * torchs).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad((weight * ours).sum(), parameters), expected)


def test_moments_are_those_of_its_draws(parameters):
    torch.manual_seed(0)
    d = NegativeBinomialMixture(*(part.detach() for part in parameters))
    draws = d.sample((40_000,))
    assert draws.shape == (40_000, 6, 4)
    error = (d.variance / 40_000).sqrt()
    assert ((draws.mean(0) - d.mean).abs() < 5 * error).all()
    torch.testing.assert_close(draws.var(0), d.variance, rtol=0.15, atol=0.1)


def test_extreme_odds_leave_one_component(parameters, counts):
    background, foreground, theta, _ = (part.detach() for part in parameters)
    never = NegativeBinomialMixture(background, foreground, theta, torch.tensor(-200.0, dtype=torch.float64))
    only = NegativeBinomialMixture(background, background, theta, torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(never.log_prob(counts), only.log_prob(counts))


def test_it_expands_and_checks_values(parameters):
    d = NegativeBinomialMixture(*(part.detach() for part in parameters)).expand((3, 6, 4))
    assert d.batch_shape == (3, 6, 4)
    assert d.mask(torch.ones(6, 4, dtype=torch.bool)).to_event(1).batch_shape == (3, 6)
    checked = NegativeBinomialMixture(*(part.detach() for part in parameters), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        checked.log_prob(torch.full((6, 4), 0.5, dtype=torch.float64))
