"""Likelihoods of the features that were measured in each cell."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import (
    NegativeBinomialCounts,
    PoissonCounts,
    Readout,
    ScaledBernoulli,
    ZeroInflatedNegativeBinomialCounts,
    measured_only,
)

N, F, H = 6, 9, 4


def readout(link, seed):
    noise = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(shape, generator=noise, dtype=torch.double) for shape in ((N, H), (F, H), (F,)))
    return Readout(hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), link)


def likelihood(name, dense):
    rho, gate, p = (readout(link, seed) for seed, link in enumerate(("softmax", "identity", "sigmoid")))
    factors = [part for each in (rho, gate, p) for part in (each.hidden, each.weight, each.bias)]
    rho, gate, p = (each.dense() if dense else each for each in (rho, gate, p))
    library, theta = torch.linspace(5, 20, N, dtype=torch.double), torch.linspace(0.5, 3, F, dtype=torch.double)
    made = {
        "poisson": lambda: PoissonCounts(rho, library),
        "nb": lambda: NegativeBinomialCounts(rho, library, theta),
        "zinb": lambda: ZeroInflatedNegativeBinomialCounts(rho, library, theta, gate),
        "bernoulli": lambda: ScaledBernoulli(p, library / 40, theta / 4),
    }[name]()
    return made, factors


def each_feature(fn, name, value):
    """Log-probability of every feature, from a formula elsewhere."""
    if name == "bernoulli":
        return dist.Bernoulli(fn.mean).log_prob((value > 0).double())
    mu = fn.library[:, None] * (fn.rho.dense() if isinstance(fn.rho, Readout) else fn.rho)
    if name == "poisson":
        return dist.Poisson(mu).log_prob(value)
    gate = None
    if name == "zinb":
        gate = fn.gate_logits.dense() if isinstance(fn.gate_logits, Readout) else fn.gate_logits
    counts = dist.GammaPoisson(fn.theta, fn.theta / mu)
    return (
        counts.log_prob(value)
        if gate is None
        else dist.ZeroInflatedDistribution(counts, gate_logits=gate).log_prob(value)
    )


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("name", ["poisson", "nb", "zinb", "bernoulli"])
def test_features_of_no_panel_do_not_count(name, dense):
    noise = torch.Generator().manual_seed(7)
    measured = torch.rand(2, F, generator=noise) < 0.6
    panels = Panels(measured, torch.tensor([0, 1, 0, 1, 1, 0]))
    kept = measured[panels.code]
    value = torch.randint(0, 4, (N, F), generator=noise).double() * kept
    has = torch.tensor([True, True, True, False, True, True])
    value = value * has[:, None]
    fn, factors = likelihood(name, dense)
    expected = (each_feature(fn, name, value) * kept).sum(1) * has
    (slopes,) = [torch.autograd.grad(expected.sum(), factors, allow_unused=True)]
    fn, factors = likelihood(name, dense)
    rows = has.nonzero().squeeze(1)
    masked = measured_only(fn, has, rows, panels)
    found = masked.log_prob(value if dense else SparseCounts.from_dense(value))
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.sum(), factors, allow_unused=True), slopes, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other)
    # One panel alone, for all cells.
    single = Panels(measured[:1], torch.zeros(N, dtype=torch.int64))
    fn, _ = likelihood(name, dense)
    alone = value * measured[0]
    found = measured_only(fn, has, rows, single).log_prob(alone if dense else SparseCounts.from_dense(alone))
    torch.testing.assert_close(found, (each_feature(fn, name, alone) * measured[0]).sum(1) * has)
    assert masked.sample().shape == (N, F)
    assert masked.mean.shape == (N, F)


def test_distributions_of_pyro_count_panels_too():
    panels = Panels(torch.tensor([[True, False, True]]), torch.zeros(2, dtype=torch.int64))
    has, value = torch.ones(2, dtype=torch.bool), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    fn = dist.Poisson(torch.full((2, 3), 1.5))
    found = measured_only(fn.to_event(1), has, None, panels).log_prob(value)
    torch.testing.assert_close(found, fn.log_prob(value)[:, [0, 2]].sum(1))
    joint = dist.MultivariateNormal(torch.zeros(2, 3), torch.eye(3))
    with pytest.raises(ValueError, match="MultivariateNormal is one event over all features"):
        measured_only(joint, has, None, panels)
