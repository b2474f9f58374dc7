"""Distribution of accessibility against SciPy, Pyro and extended precision."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout, ScaledBernoulli

pytestmark = pytest.mark.usefixtures("small_blocks")
B, M = 5, 17


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 3, dtype=dtype), torch.randn(M, 3, dtype=dtype), torch.randn(M, dtype=dtype)


@pytest.mark.parametrize("lazy", [True, False], ids=["readout", "dense"])
@pytest.mark.parametrize("with_region", [True, False])
def test_against_scipy_and_pyro(lazy: bool, with_region: bool) -> None:
    readout = Readout(*factors(), "sigmoid")
    d, r = torch.rand(B).double(), torch.rand(M).double() if with_region else None
    y = torch.poisson(torch.full((B, M), 0.4)).double()
    y[1] = 0
    found = ScaledBernoulli(readout if lazy else readout.dense(), d, r)
    q = readout.dense() * d.unsqueeze(-1) * (1.0 if r is None else r)
    torch.testing.assert_close(found.mean, q)
    torch.testing.assert_close(found.variance, q * (1 - q))
    is_open = (y > 0).double()
    for value in (y, SparseCounts.from_dense(y), is_open, SparseCounts.from_dense(is_open)):
        log_prob = found.log_prob(value)
        np.testing.assert_allclose(log_prob, scipy.stats.bernoulli.logpmf(is_open, q).sum(-1), rtol=1e-9)
        expected = dist.Bernoulli(q).to_event(1).log_prob(is_open)
        torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=0)


def exact(logit: float, d: float, r: float, is_open: bool) -> float:
    """log p in extended precision, from 1 - q = (e + 1 - d r) / (1 + e)."""
    e = np.exp(np.longdouble(-logit))
    dr = np.longdouble(d) * np.longdouble(r)
    return float(np.log(dr / (1 + e)) if is_open else np.log((e + 1 - dr) / (1 + e)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize("d", [1e-6, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("r", [None, 1e-6, 0.3, 1.0])
@pytest.mark.usefixtures("eager_or_compiled")
def test_extremes(d: float, r: float | None, is_open: bool, dtype: torch.dtype) -> None:
    logits = torch.tensor([-100, -30, -5, 0, 5, 30, 60, 100], dtype=dtype)
    n = len(logits)
    hidden = torch.zeros(1, 2, dtype=dtype, requires_grad=True)
    weight = torch.randn(n, 2, dtype=dtype, requires_grad=True)
    leaf = logits.clone().requires_grad_()
    cell = torch.tensor([d], dtype=dtype, requires_grad=True)
    region = None if r is None else torch.full((n,), r, dtype=dtype, requires_grad=True)
    readout = Readout(hidden, weight, leaf, "sigmoid")
    y = SparseCounts.from_dense(torch.full((1, n), float(is_open), dtype=dtype))
    found = ScaledBernoulli(readout, cell, region).log_prob(y)
    rounded = cell.item(), 1.0 if region is None else region[0].item()
    # The sum over regions is dominated by its largest term: look at them one by one.
    for i in range(n):
        one = ScaledBernoulli(
            Readout(hidden, weight[i : i + 1], leaf[i : i + 1], "sigmoid"),
            cell,
            None if region is None else region[i : i + 1],
        ).log_prob(SparseCounts.from_dense(torch.full((1, 1), float(is_open), dtype=dtype)))
        expected = exact(logits[i].item(), *rounded, is_open)
        # Only log(1 - q) of a tiny q is at the mercy of rounding near 1.
        torch.testing.assert_close(one.item(), expected, rtol=2e-6, atol=1e-7 if dtype == torch.float32 else 1e-15)
    leaves = [t for t in (hidden, weight, leaf, cell, region) if t is not None]
    assert found.isfinite().all()
    for gradient in torch.autograd.grad(found.sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.usefixtures("eager_or_compiled")
def test_gradient_by_logit_keeps_its_digits_in_both_tails(dtype: torch.dtype) -> None:
    """Closed: -q (1 - p) / (1 - q). Formed from e = exp(-a), it is relatively exact at any logit."""
    logits = torch.tensor([-60, -20, -8, 0, 8, 20, 60], dtype=dtype, requires_grad=True)
    n = len(logits)
    readout = Readout(torch.zeros(1, 1, dtype=dtype), torch.zeros(n, 1, dtype=dtype), logits, "sigmoid")
    d, r = torch.tensor([0.999], dtype=dtype), torch.full((n,), 0.9995, dtype=dtype)
    (found,) = torch.autograd.grad(
        ScaledBernoulli(readout, d, r).log_prob(torch.zeros(1, n, dtype=dtype)).sum(), logits
    )
    e = np.exp(-logits.detach().double().numpy().astype(np.longdouble))
    dr = np.longdouble(d.item()) * np.longdouble(r[0].item())
    expected = (-dr * e / ((1 + e) * (e + 1 - dr))).astype(np.float64)
    np.testing.assert_allclose(found.double(), expected, rtol=2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.usefixtures("eager_or_compiled")
def test_certain_probabilities_that_the_data_contradict() -> None:
    p = torch.tensor([[0.0, 1.0]], requires_grad=True)
    d = torch.ones(1, requires_grad=True)
    found = ScaledBernoulli(p, d).log_prob(torch.tensor([[1.0, 0.0]]))
    assert found.isfinite().all()
    assert found < -100
    readout = Readout(torch.ones(1, 1), torch.tensor([[200.0], [-200.0]]), torch.zeros(2), "sigmoid")
    assert ScaledBernoulli(readout, d).log_prob(torch.tensor([[0.0, 1.0]])).isfinite().all()
    assert ScaledBernoulli(readout, d * 0).log_prob(torch.tensor([[1.0, 0.0]])).isfinite().all()


def test_region_factor_per_particle() -> None:
    """A latent region factor of several particles: the dense formula takes over."""
    readout, d, r = Readout(*factors(), "sigmoid"), torch.rand(B).double(), torch.rand(3, 1, M).double()
    y = torch.poisson(torch.full((B, M), 0.4)).double()
    found = ScaledBernoulli(readout, d, r).log_prob(SparseCounts.from_dense(y))
    expected = torch.stack([ScaledBernoulli(readout, d, one[0]).log_prob(y) for one in r])
    torch.testing.assert_close(found, expected)


def test_samples_and_shapes() -> None:
    readout = Readout(*factors(torch.float32), "sigmoid")
    d = ScaledBernoulli(readout, torch.full((3, 1), 0.9), torch.full((M,), 0.8))
    assert d.batch_shape == (3, B)
    draws = d.mask(False).sample((2000,))
    assert draws.shape == (2000, 3, B, M)
    assert ((draws == 0) | (draws == 1)).all()
    assert (draws.mean(0) - d.mean).abs().max() < 0.08
    assert d.expand([3, B]) is d
    assert repr(d) == "ScaledBernoulli(batch=(3, 5), features=17)"


def test_refuses_what_is_out_of_bounds() -> None:
    p, d, r = torch.full((B, M), 0.5), torch.full((B,), 0.5), torch.full((M,), 0.5)
    with pytest.raises(ValueError, match="parameter p"):
        ScaledBernoulli(p * 3, d, r)
    with pytest.raises(ValueError, match="parameter cell_factor"):
        ScaledBernoulli(p, d * 3, r)
    with pytest.raises(ValueError, match="parameter region_factor"):
        ScaledBernoulli(p, d, r * 3)
    with pytest.raises(ValueError, match="value of ScaledBernoulli must be nonnegative"):
        ScaledBernoulli(p, d, r).log_prob(-p)
