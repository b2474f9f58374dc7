"""Likelihoods of accessibility read as those of other data, against distributions of Pyro on dense tensors."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import NegativeBinomialFragments, PoissonFragments, Readout, ScaledBernoulli
from pyro_multivi.posterior.engine import readings

S, B, M, H = 3, 4, 6, 2


@pytest.fixture
def parts():
    hidden, weight, bias = (torch.randn(*shape).double() for shape in ((S, B, H), (M, H), (M,)))
    y = torch.poisson(torch.full((B, M), 0.8)).double()
    y[1] = 0
    return Readout(hidden, weight, bias, "sigmoid"), torch.rand(S, B).double(), torch.rand(M).double(), y


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("at_once", [2**24, 7])
@pytest.mark.parametrize("family", ["poisson", "nb"])
def test_counts_read_as_open(parts, family, lazy, at_once, monkeypatch):
    monkeypatch.setattr(readings, "_AT_ONCE", at_once)
    p, size, rate, y = parts
    p, size, rate, theta = p if lazy else p.dense(), 4 * size, 2 * rate, torch.rand(M).double()
    fn = PoissonFragments(p, size, rate) if family == "poisson" else NegativeBinomialFragments(p, size, rate, theta)
    mean = size[..., None] * (p * 1) * rate
    of_counts = dist.Poisson(mean) if family == "poisson" else dist.GammaPoisson(theta, theta / mean)
    zero = of_counts.log_prob(torch.zeros(())).exp()
    expected = dist.Bernoulli(1 - zero).log_prob((y > 0).double()).sum(-1)
    found = readings.log_prob_as_open(fn, SparseCounts.from_dense(y))
    torch.testing.assert_close(found, expected)
    assert torch.equal(
        readings.log_prob_as_counts(fn, SparseCounts.from_dense(y)), fn.log_prob(SparseCounts.from_dense(y))
    )


@pytest.mark.parametrize("factors", [True, False])
def test_open_read_as_counts(parts, factors):
    p, size, rate, y = parts
    fn = ScaledBernoulli(p, size, rate if factors else None)
    q = size[..., None] * (p * 1) * (rate if factors else 1.0)
    expected = dist.Poisson(-torch.log1p(-q)).log_prob(y).sum(-1)
    torch.testing.assert_close(readings.log_prob_as_counts(fn, SparseCounts.from_dense(y)), expected)
    assert torch.equal(
        readings.log_prob_as_open(fn, SparseCounts.from_dense(y)), fn.log_prob(SparseCounts.from_dense(y))
    )


def test_what_was_not_measured_is_left_out(parts):
    p, size, rate, y = parts
    panels = Panels(torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool(), torch.tensor([0, 1, 0, 1]))
    measured = panels.measured[panels.code]
    value = SparseCounts.from_dense(y * measured)
    whole = 1 - (-size[..., None] * (p * 1) * rate).exp()
    expected = torch.where(measured, dist.Bernoulli(whole).log_prob((y > 0).double()), 0.0).sum(-1)
    found = readings.log_prob_as_open(PoissonFragments(p, size, rate).count_panels(panels), value)
    torch.testing.assert_close(found, expected)


def test_likelihoods_of_ones_own_are_refused(parts):
    for read in readings.READINGS.values():
        with pytest.raises(ValueError, match="accessibility is a Independent, of which no other reading is known"):
            read(dist.Poisson(parts[2]).to_event(1), SparseCounts.from_dense(parts[3]))
