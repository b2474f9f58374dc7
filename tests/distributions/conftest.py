"""Fixtures of the likelihoods' tests: small blocks, and every likelihood beside its textbook formula."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions import (
    NegativeBinomialCounts,
    NegativeBinomialFragments,
    PoissonCounts,
    PoissonFragments,
    Readout,
    ScaledBernoulli,
    ZeroInflatedNegativeBinomialCounts,
)
from pyro_multivi.distributions.kernels import blocks
from pyro_multivi.distributions.kernels.numba.switch import compiled_loops

Inputs = dict[str, Tensor]
N_FEATURES, N_HIDDEN = 23, 3


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of few features, so that tiny tensors take several, the last of them shorter."""
    monkeypatch.setattr(blocks, "CPU_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(blocks, "DEVICE_BLOCK_ELEMENTS", 1)
    monkeypatch.setattr(blocks, "MIN_WIDTH", 5)


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a readout is multiplied out."""

    def dense(readout: Readout) -> Tensor:
        raise AssertionError("a readout was multiplied out")

    monkeypatch.setattr(Readout, "dense", dense)


@pytest.fixture(params=["eager", "compiled"])
def eager_or_compiled(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test operation by operation, then with compiled loops where there are any."""
    if request.param == "eager":
        yield request.param
        return
    with compiled_loops():
        yield request.param


@dataclass(frozen=True)
class Case:
    """A likelihood with random inputs, and its formula written plainly for autograd."""

    family: str
    link: str = "softmax"
    per_cell_theta: bool = False
    region_factor: bool = True

    def inputs(self, *lead: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Inputs:
        """Leaves that require gradients, by name."""

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype)

        made = {
            "hidden": normal(*lead, N_HIDDEN),
            "weight": normal(N_FEATURES, N_HIDDEN),
            "bias": normal(N_FEATURES),
        }
        if self.family == "accessibility":
            made["cell_factor"] = 0.05 + 0.9 * torch.rand(*lead, dtype=dtype)
            if self.region_factor:
                made["region_factor"] = 0.05 + 0.9 * torch.rand(N_FEATURES, dtype=dtype)
        elif self.family.startswith("fragments"):
            made["size"] = 0.1 + 3 * torch.rand(*lead, dtype=dtype)
            made["rate"] = (2 * normal(N_FEATURES)).exp()
        else:
            made["library"] = 1 + 50 * torch.rand(*lead, dtype=dtype)
        if self.family in ("nb", "zinb", "fragments-nb"):
            # On both sides of the switch to Stirling's series.
            shape = (*lead, N_FEATURES) if self.per_cell_theta else (N_FEATURES,)
            made["theta"] = (6 * torch.rand(shape, dtype=dtype) - 1).exp()
        if self.family == "zinb":
            made["gate_hidden"] = normal(*lead, N_HIDDEN)
            made["gate_weight"] = normal(N_FEATURES, N_HIDDEN)
            made["gate_bias"] = normal(N_FEATURES)
        return {name: value.to(device).requires_grad_() for name, value in made.items()}

    def value(self, *lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Counts with many zeros, an empty cell, and a large count."""
        value = torch.poisson(torch.full((*lead, N_FEATURES), 0.7)).to(dtype)
        value[..., 0, :] = 0
        value[..., -1, 3] = 400
        return value

    @staticmethod
    def upstream(name: str, shape: tuple[int, ...]) -> Tensor:
        """Weights of the cells in an objective."""
        if name == "random":
            return torch.randn(shape)
        return torch.full(shape, {"ones": 1.0, "constant": -2.5, "zero": 0.0}[name])

    @staticmethod
    def gradients(output: Tensor, inputs: Inputs, upstream: Tensor) -> Inputs:
        """Gradients by the name of the input."""
        found = torch.autograd.grad(output, list(inputs.values()), upstream.to(output))
        return dict(zip(inputs, found, strict=True))

    @staticmethod
    def assert_gradients(found: Inputs, expected: Inputs, rtol: float = 1e-7) -> None:
        for name, gradient in expected.items():
            assert found[name].shape == gradient.shape, name
            off = (found[name] - gradient).abs() - rtol * gradient.abs()
            assert (off <= rtol * gradient.abs().max()).all(), f"{name} is off by up to {off.max():.1e}"

    def build(self, inputs: Inputs, lazy: bool = True, gemm_dtype: torch.dtype | None = None):  # type: ignore[no-untyped-def]
        """The distribution, over readouts or dense values."""

        def readout(prefix: str, link: str) -> Tensor:
            factors = [inputs[prefix + name] for name in ("hidden", "weight", "bias")]
            made = Readout(*factors, link, gemm_dtype)  # type: ignore[arg-type]
            return made if lazy else made.dense()

        if self.family == "accessibility":
            return ScaledBernoulli(readout("", "sigmoid"), inputs["cell_factor"], inputs.get("region_factor"))
        if self.family.startswith("fragments"):
            mean = readout("", "sigmoid"), inputs["size"], inputs["rate"]
            return NegativeBinomialFragments(*mean, inputs["theta"]) if "theta" in inputs else PoissonFragments(*mean)
        rho = readout("", self.link)
        if self.family == "poisson":
            return PoissonCounts(rho, inputs["library"])
        if self.family == "nb":
            return NegativeBinomialCounts(rho, inputs["library"], inputs["theta"])
        gate = readout("gate_", "identity")
        return ZeroInflatedNegativeBinomialCounts(rho, inputs["library"], inputs["theta"], gate)

    def plain(self, inputs: Inputs, x: Tensor) -> Tensor:
        """Textbook log-probability of each cell; its numerics are fine for ordinary inputs in float64."""
        logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
        if self.family == "accessibility":
            q = logits.sigmoid() * inputs["cell_factor"].unsqueeze(-1) * inputs.get("region_factor", 1.0)
            return torch.where(x > 0, q.log(), (1 - q).log()).sum(-1)
        if self.family.startswith("fragments"):
            mu = logits.sigmoid() * inputs["rate"] * inputs["size"].unsqueeze(-1)
        else:
            rho = logits.softmax(-1) if self.link == "softmax" else softplus(logits)
            mu = rho * inputs["library"].unsqueeze(-1)
        if self.family in ("poisson", "fragments-poisson"):
            return (x * mu.log() - mu - torch.lgamma(x + 1)).sum(-1)
        theta = inputs["theta"]
        log_nb = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        log_nb = log_nb + theta * (theta / (theta + mu)).log() + x * (mu / (theta + mu)).log()
        if self.family in ("nb", "fragments-nb"):
            return log_nb.sum(-1)
        pi = (inputs["gate_hidden"] @ inputs["gate_weight"].T + inputs["gate_bias"]).sigmoid()
        return torch.where(x == 0, (pi + (1 - pi) * log_nb.exp()).log(), (1 - pi).log() + log_nb).sum(-1)


CASES = {
    "poisson": Case("poisson"),
    "poisson-softplus": Case("poisson", "softplus"),
    "nb": Case("nb"),
    "nb-softplus-cell": Case("nb", "softplus", per_cell_theta=True),
    "zinb": Case("zinb"),
    "zinb-cell": Case("zinb", per_cell_theta=True),
    "zinb-softplus": Case("zinb", "softplus"),
    "fragments-poisson": Case("fragments-poisson"),
    "fragments-nb": Case("fragments-nb"),
    "accessibility": Case("accessibility"),
    "accessibility-no-region": Case("accessibility", region_factor=False),
}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]
