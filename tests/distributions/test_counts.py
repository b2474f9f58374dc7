"""Count distributions against SciPy and Pyro."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import (
    NegativeBinomialCounts,
    PoissonCounts,
    Readout,
    ZeroInflatedNegativeBinomialCounts,
)
from pyro_multivi.distributions.kernels.numba.switch import compiled_loops

pytestmark = pytest.mark.usefixtures("small_blocks")
B, G = 5, 17
Factors = tuple[Tensor, Tensor, Tensor]


def factors(dtype: torch.dtype = torch.float64) -> Factors:
    return torch.randn(B, 3, dtype=dtype), torch.randn(G, 3, dtype=dtype), torch.randn(G, dtype=dtype)


def counts(dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.poisson(torch.full((B, G), 1.5)).to(dtype)
    x[1], x[2, 2] = 0, 3000
    return x


@pytest.fixture(params=[True, False], ids=["readout", "dense"])
def lazy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def share(parts: Factors, link: str, lazy: bool) -> Tensor:
    readout = Readout(*parts, link)  # type: ignore[arg-type]
    return readout if lazy else readout.dense()


def distribution(family: str, rho: Tensor, library: Tensor, theta: Tensor, gate: Tensor) -> dist.TorchDistribution:
    if family == "poisson":
        return PoissonCounts(rho, library)
    if family == "nb":
        return NegativeBinomialCounts(rho, library, theta)
    return ZeroInflatedNegativeBinomialCounts(rho, library, theta, gate)


@pytest.mark.parametrize("link", ["softmax", "softplus"])
@pytest.mark.parametrize("per_cell", [False, True])
def test_against_scipy_and_pyro(link: str, per_cell: bool, lazy: bool) -> None:
    rho, library, x = share(factors(), link, lazy), 1 + 30 * torch.rand(B).double(), counts()
    theta = (9 * torch.rand((B, G) if per_cell else (G,)).double() - 3).exp()
    gate = share(factors(), "identity", lazy)
    mu = library.unsqueeze(-1) * (rho * 1)
    value = SparseCounts.from_dense(x)

    found = PoissonCounts(rho, library).log_prob(value)
    np.testing.assert_allclose(found, scipy.stats.poisson.logpmf(x, mu).sum(-1), rtol=1e-9)
    torch.testing.assert_close(found, dist.Poisson(mu).log_prob(x).sum(-1), rtol=1e-9, atol=0)

    found = NegativeBinomialCounts(rho, library, theta).log_prob(value)
    expected = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu))
    np.testing.assert_allclose(found, expected.sum(-1), rtol=1e-9)
    nb = dist.NegativeBinomial(theta.expand(B, G), logits=mu.log() - theta.log())
    torch.testing.assert_close(found, nb.log_prob(x).sum(-1), rtol=1e-9, atol=0)

    found = ZeroInflatedNegativeBinomialCounts(rho, library, theta, gate).log_prob(value)
    pi = (gate * 1).sigmoid().numpy()
    expected = np.where(x == 0, np.log(pi + (1 - pi) * np.exp(expected)), np.log1p(-pi) + expected)
    np.testing.assert_allclose(found, expected.sum(-1), rtol=1e-9)
    zinb = dist.ZeroInflatedNegativeBinomial(theta.expand(B, G), logits=mu.log() - theta.log(), gate_logits=gate * 1)
    torch.testing.assert_close(found, zinb.log_prob(x).sum(-1), rtol=1e-9, atol=0)


def test_rho_and_gate_may_share_their_hidden_layer() -> None:
    hidden, weight, bias = factors()
    hidden.requires_grad_()
    _, gate_weight, gate_bias = factors()
    library, theta, x = torch.ones(B).double(), torch.ones(G).double(), counts()

    def gradient(lazy: bool) -> Tensor:
        rho = share((hidden, weight, bias), "softmax", lazy)
        gate = share((hidden, gate_weight, gate_bias), "identity", lazy)
        total = ZeroInflatedNegativeBinomialCounts(rho, library, theta, gate).log_prob(x).sum()
        return torch.autograd.grad(total, hidden)[0]

    torch.testing.assert_close(gradient(True), gradient(False), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("theta", [1e-8, 1e-3, 29.9, 30.1, 1e4, 1e8])
@pytest.mark.usefixtures("eager_or_compiled")
def test_extreme_dispersion(theta: float, dtype: torch.dtype, lazy: bool) -> None:
    parts, library, x = factors(dtype), torch.full((B,), 20.0, dtype=dtype), counts(dtype)
    leaf = torch.full((G,), theta, dtype=dtype, requires_grad=True)
    inputs = [part.requires_grad_() for part in parts]
    found = NegativeBinomialCounts(share(parts, "softmax", lazy), library, leaf).log_prob(x)
    mu = (library.unsqueeze(-1) * share(parts, "softmax", False)).detach().double()
    t = torch.tensor(theta, dtype=dtype).double()
    if theta < 1e7:  # beyond, SciPy's own formula cancels
        expected = torch.from_numpy(scipy.stats.nbinom.logpmf(x, t, t / (t + mu)).sum(-1))
    else:
        expected = torch.from_numpy(scipy.stats.poisson.logpmf(x, mu).sum(-1))
    # In float32 each of three gamma functions of a count of 3000 (some 20 000) is rounded by up to 1e-3.
    close = {"rtol": 1e-5, "atol": 3e-3} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 0.0}
    if theta > 1e7:
        close["rtol"] = 1e-5  # NB at 1e8 is not quite Poisson when x is 3000
    torch.testing.assert_close(found.double(), expected, **close)
    for gradient in torch.autograd.grad(found.sum(), [*inputs, leaf]):
        assert gradient.isfinite().all()


def test_poisson_limit_of_the_gradient() -> None:
    parts, library, x = factors(), torch.full((B,), 20.0).double(), counts()
    inputs = [part.requires_grad_() for part in parts]
    rho = Readout(*parts, "softmax")
    limit = PoissonCounts(rho, library).log_prob(x).sum()
    nearly = NegativeBinomialCounts(rho, library, torch.full((G,), 1e10).double()).log_prob(x).sum()
    for a, b in zip(torch.autograd.grad(nearly, inputs), torch.autograd.grad(limit, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("link", ["softmax", "softplus"])
@pytest.mark.parametrize("family", ["poisson", "nb", "zinb"])
@pytest.mark.usefixtures("eager_or_compiled")
def test_extreme_logits(family: str, link: str, dtype: torch.dtype) -> None:
    """Logits from -150 to 100, and library sizes from 0 on: finite value and gradient."""
    hidden, weight, bias = factors(dtype)
    bias = torch.linspace(-150, 100 if link == "softmax" else 10, G, dtype=dtype)
    gate_bias = torch.linspace(100, -100, G, dtype=dtype)
    library = torch.tensor([0.0, 1e-6, 1.0, 1e3, 1e6], dtype=dtype)
    x = counts(dtype)
    x[0] = 0
    leaves = [t.requires_grad_() for t in (hidden, weight, bias, library, gate_bias)]
    rho, gate = Readout(hidden, weight, bias, link), Readout(hidden, weight, gate_bias, "identity")  # type: ignore[arg-type]
    theta = torch.logspace(-8, 8, G, dtype=dtype).requires_grad_()
    found = distribution(family, rho, library, theta, gate).log_prob(SparseCounts.from_dense(x))
    assert found.isfinite().all()
    for gradient in torch.autograd.grad(found.sum(), [*leaves, theta], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("family", ["poisson", "nb", "zinb"])
def test_dense_share_of_exactly_zero(family: str) -> None:
    rho = torch.tensor([[0.0, 0.5], [0.0, 0.5]], requires_grad=True)
    theta, gate = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    x, library = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.ones(2)
    found = distribution(family, rho, library, theta, gate).log_prob(x)
    assert found.isfinite().all()
    assert found[1] < found[0] - 100  # a count of 2 where none can be
    for gradient in torch.autograd.grad(found.sum(), [rho, theta, gate], allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("family", ["poisson", "nb", "zinb"])
def test_samples_have_the_stated_moments(family: str, lazy: bool) -> None:
    torch.manual_seed(1)
    rho = share(factors(torch.float32), "softmax", lazy)
    gate = share(factors(torch.float32), "identity", lazy)
    library, theta = torch.full((B,), 60.0), 1 + 3 * torch.rand(G)
    d = distribution(family, rho, library, theta, gate)
    n = 4000
    draws = d.mask(torch.zeros(B).bool()).sample((n,))  # sampling ignores the mask
    assert draws.shape == (n, B, G)
    assert d.support.check(draws).all()
    error = (d.variance / n).sqrt()
    assert ((draws.mean(0) - d.mean).abs() < 6 * error + 1e-3).all()
    wide = d.mean > 0.5
    ratio = draws.var(0)[wide] / d.variance[wide]
    assert ratio.sub(1).abs().max() < 0.6
    assert ratio.mean().sub(1).abs() < 0.05
    assert d.expand([7, B]).sample().shape == (7, B, G)


def test_one_gate_for_all_genes() -> None:
    hidden, weight, bias = factors()
    rho, library = Readout(hidden, weight, bias, "softmax"), torch.ones(B).double()
    gate, theta = Readout(hidden, weight[:1], bias[:1], "identity"), torch.ones(1).double()
    x = counts()
    found = ZeroInflatedNegativeBinomialCounts(rho, library, theta, gate).log_prob(x)
    wide = ZeroInflatedNegativeBinomialCounts(rho, library, theta.expand(G), gate.dense().expand(B, G))
    torch.testing.assert_close(found, wide.log_prob(x))


def test_shapes_expand_and_repr() -> None:
    rho, library = torch.full((B, G), 1 / G), torch.ones(3, 1)
    d = NegativeBinomialCounts(rho, library, torch.ones(1))
    assert d.batch_shape == (3, B)
    assert d.event_shape == (G,)
    assert d.mean.shape == d.variance.shape == (3, B, G)
    assert d.expand([3, B]) is d
    wide = d.mask(torch.ones(B).bool()).expand([2, 3, B])
    assert wide.batch_shape == (2, 3, B)
    assert wide.log_prob(torch.ones(B, G)).shape == (2, 3, B)
    assert repr(wide) == "NegativeBinomialCounts(batch=(2, 3, 5), features=17, masked)"
    with pytest.raises(ValueError, match=r"cannot expand a batch of shape \(3, 5\) to \(5,\)"):
        d.expand([B])


def test_refuses_what_is_out_of_bounds() -> None:
    rho, library, theta = torch.full((B, G), 1 / G), torch.ones(B), torch.ones(G)
    with pytest.raises(ValueError, match="parameter library"):
        PoissonCounts(rho, -library)
    with pytest.raises(ValueError, match="parameter rho"):
        PoissonCounts(-rho, library)
    with pytest.raises(ValueError, match="parameter theta"):
        NegativeBinomialCounts(rho, library, theta * 0)
    with pytest.raises(ValueError, match="parameter gate_logits"):
        ZeroInflatedNegativeBinomialCounts(rho, library, theta, theta * math.nan)
    with pytest.raises(ValueError, match="theta of NegativeBinomialCounts has 4 features"):
        NegativeBinomialCounts(rho, library, torch.ones(4))
    with pytest.raises(ValueError, match="must have link 'softmax' or 'softplus', got .* 'sigmoid'"):
        PoissonCounts(share(factors(), "sigmoid", True), library.double())
    d = PoissonCounts(rho, library)
    with pytest.raises(ValueError, match="17 features in its last dimension"):
        d.log_prob(torch.zeros(B, 4))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.full((B, G), 0.5))
    unchecked = PoissonCounts(rho, library, validate_args=False)
    assert unchecked.log_prob(torch.full((B, G), 0.5)).isfinite().all()


def test_softplus_that_underflows_keeps_its_logarithm() -> None:
    """softplus(-120) is 0 in float32; its logarithm is -120, and its slope by the logit 1."""
    bias = torch.tensor([-120.0, -60.0, 3.0], requires_grad=True)
    rho = Readout(torch.zeros(1, 1), torch.zeros(3, 1), bias, "softplus")
    found = PoissonCounts(rho, torch.tensor([2.0])).log_prob(torch.tensor([[5.0, 1.0, 0.0]]))
    mean = 2 * math.log1p(math.exp(3))
    expected = 5 * (math.log(2) - 120) - math.log(120) + (math.log(2) - 60) - mean
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=1e-6, atol=0)
    (by_bias,) = torch.autograd.grad(found.sum(), bias)
    torch.testing.assert_close(by_bias, torch.tensor([5.0, 1.0, -2 / (1 + math.exp(-3))]))


@pytest.mark.parametrize("family", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_large_counts_in_single_precision(family, dense, compiled):
    if compiled:
        pytest.importorskip("numba")
    n_genes = 8
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(n_genes, generator=generator).requires_grad_()
    theta = torch.full((n_genes,), 1000.0).requires_grad_()
    for count in (5e3, 1e5, 1e6):
        counts = torch.zeros(1, n_genes)
        counts[0, 3] = count
        library = torch.tensor([1.1 * count / float(bias.detach().softmax(0)[3])])

        def log_prob(dtype, counts=counts, library=library):
            rho = Readout(
                torch.zeros(1, 1, dtype=dtype), torch.zeros(n_genes, 1, dtype=dtype), bias.to(dtype), "softmax"
            )
            gate = Readout(rho.hidden, rho.weight, torch.full((n_genes,), -1.0, dtype=dtype), "identity")
            if dense:
                rho, gate = bias.to(dtype).softmax(0).unsqueeze(0), gate.bias
            made = distribution(family, rho, library.to(dtype), theta.to(dtype), gate)
            given = counts.to(dtype)
            return made.log_prob(given if dense else SparseCounts.from_dense(given)).sum()

        with compiled_loops() if compiled else nullcontext():
            found = log_prob(torch.float32)
            slopes = torch.autograd.grad(found, [bias, theta], allow_unused=True)
        exact = log_prob(torch.float64)
        # The means themselves are good to 1e-7.
        assert abs(float(found.detach() - exact.detach())) < 1e-3 * abs(float(exact.detach())) + 1e-7 * count
        for slope, other in zip(slopes, torch.autograd.grad(exact, [bias, theta], allow_unused=True), strict=True):
            if other is not None:
                torch.testing.assert_close(slope, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))
