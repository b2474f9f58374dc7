"""The likelihoods and readouts inside Pyro: plates, ELBOs, handlers, prediction, inspection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_model_relations
from torch import Tensor, nn

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout, ScaledBernoulli, ZeroInflatedNegativeBinomialCounts

pytestmark = pytest.mark.usefixtures("small_blocks")
B, G, M, H, N = 4, 7, 9, 3, 20
ELBOS = {
    f"{elbo.__name__}-{name}": lambda elbo=elbo, settings=settings: elbo(max_plate_nesting=1, **settings)
    for elbo in (Trace_ELBO, TraceMeanField_ELBO)
    for name, settings in {
        "one": {},
        "three": {"num_particles": 3},
        "vectorised": {"num_particles": 3, "vectorize_particles": True},
    }.items()
}


class Program(nn.Module):
    """A small MultiVI. ``lazy=False`` builds it of dense values; ``own_mask`` masks by ``.mask``."""

    def __init__(self, lazy: bool = True, own_mask: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.lazy, self.own_mask, self.scale = lazy, own_mask, scale
        self.hidden = nn.Linear(2, H)
        self.readouts = nn.ModuleDict({"rho": nn.Linear(H, G), "pi": nn.Linear(H, G), "p": nn.Linear(H, M)})
        self.loc, self.theta = nn.Parameter(torch.zeros(B, 2)), nn.Parameter(torch.ones(G))
        self.region = nn.Parameter(torch.zeros(M))
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).double()
        x = torch.poisson(torch.full((B, G), 1.0), generator=generator).double()
        y = torch.poisson(torch.full((B, M), 0.4), generator=generator).double()
        self.x, self.y = SparseCounts.from_dense(x), SparseCounts.from_dense(y)
        self.has_rna = torch.tensor([True, False, True, True])
        self.has_atac = torch.tensor([True, True, False, True])

    def readout(self, name: str, hidden: Tensor, link: str) -> Tensor:
        layer = self.readouts[name]
        made = Readout(hidden, layer.weight, layer.bias, link)  # type: ignore[arg-type]
        return made if self.lazy else made.dense()

    def observe(self, name: str, fn: Any, has: Tensor, obs: Tensor) -> None:
        if self.own_mask:
            pyro.sample(name, fn.mask(has), obs=obs)
        else:
            with poutine.mask(mask=has):
                pyro.sample(name, fn, obs=obs)

    def model(self) -> None:
        with pyro.plate("cells", N, subsample=torch.arange(B)), poutine.scale(scale=self.scale):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            library = pyro.sample("l", dist.LogNormal(torch.tensor(2.0).double(), 0.5))
            hidden = self.hidden(z)
            rho = pyro.deterministic("rho", self.readout("rho", hidden, "softmax"), event_dim=1)
            gate = self.readout("pi", hidden, "identity")
            x = ZeroInflatedNegativeBinomialCounts(rho, library, self.theta.exp(), gate)
            self.observe("x", x, self.has_rna, self.x)
            p = pyro.deterministic("p", self.readout("p", hidden, "sigmoid"), event_dim=1)
            d = pyro.sample("d", dist.Uniform(torch.tensor(0.0).double(), 1.0))
            self.observe("y", ScaledBernoulli(p, d, self.region.sigmoid()), self.has_atac, self.y)

    def guide(self) -> None:
        with pyro.plate("cells", N, subsample=torch.arange(B)), poutine.scale(scale=self.scale):
            pyro.sample("z", dist.Normal(self.loc, 0.3).to_event(1))
            pyro.sample("l", dist.LogNormal(self.loc[:, 0], 0.2))
            pyro.sample("d", dist.Delta(self.loc[:, 1].sigmoid()))


def loss_and_gradients(program: Program, elbo: Any) -> tuple[float, list[Tensor]]:
    pyro.set_rng_seed(0)
    program.zero_grad()
    loss = elbo.differentiable_loss(program.model, program.guide)
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in program.parameters()]


@pytest.mark.parametrize("make", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("own_mask", [True, False], ids=["mask", "poutine"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_elbo_is_that_of_dense_values(make: Callable[[], Any], own_mask: bool, scale: float) -> None:
    loss, found = loss_and_gradients(Program(own_mask=own_mask, scale=scale), make())
    expected_loss, expected = loss_and_gradients(Program(lazy=False, own_mask=not own_mask, scale=scale), make())
    assert loss == pytest.approx(expected_loss, rel=1e-9)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("make", ELBOS.values(), ids=ELBOS)
@pytest.mark.parametrize("validate", [True, False])
def test_elbo_never_multiplies_out(make: Callable[[], Any], validate: bool) -> None:
    program = Program()
    with pyro.validation_enabled(validate):
        loss, _ = loss_and_gradients(program, make())
        pyro.set_rng_seed(0)
        assert make().loss(program.model, program.guide) == pytest.approx(loss, rel=1e-9)


def test_both_masks_on_one_site() -> None:
    program, plain = Program(), Program(lazy=False)
    also = torch.tensor([True, True, True, False])
    found = loss_and_gradients(program, _masked(also))
    expected = loss_and_gradients(plain, _masked(also))
    assert found[0] == pytest.approx(expected[0], rel=1e-9)
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class _masked:
    """An ELBO under a mask from outside."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def differentiable_loss(self, model: Any, guide: Any) -> Tensor:
        masked = [poutine.mask(part, mask=self.mask) for part in (model, guide)]
        loss: Tensor = Trace_ELBO(max_plate_nesting=1).differentiable_loss(*masked)
        return loss


def test_svi_step_trains() -> None:
    program = Program()

    def model() -> None:
        pyro.module("program", program)
        program.model()

    svi = SVI(model, program.guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO(num_particles=5))
    losses = [svi.step() for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("sites", [("rho",), ("p",), ("rho", "x", "y"), ("x",)], ids=str)
def test_predictive(parallel: bool, sites: tuple[str, ...]) -> None:
    program = Program()
    predictive = Predictive(
        poutine.uncondition(program.model),
        guide=program.guide,
        num_samples=5,
        parallel=parallel,
        return_sites=(*sites, "z"),
    )
    drawn = predictive()
    for site in sites:
        assert type(drawn[site]) is Tensor
        assert drawn[site].shape == (5, B, M if site in ("p", "y") else G)
    if "rho" in sites:
        layer = program.readouts["rho"]
        expected = layer(program.hidden(drawn["z"])).softmax(-1)
        torch.testing.assert_close(drawn["rho"].reshape(expected.shape), expected)


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_returns_what_was_observed(parallel: bool) -> None:
    program = Program()
    drawn = Predictive(program.model, guide=program.guide, num_samples=3, parallel=parallel, return_sites=("x", "y"))()
    for name in ("x", "y"):
        observed = getattr(program, name).to_dense()
        torch.testing.assert_close(drawn[name].reshape(-1, *observed.shape)[0], observed)


def test_intervention_on_a_decoder() -> None:
    program = Program()
    rho = torch.full((B, G), 1 / G).double()
    dense = poutine.do(program.model, data={"rho": rho})
    trace = poutine.trace(dense).get_trace()
    torch.testing.assert_close(trace.nodes["x"]["fn"].rho, rho)
    assert TraceMeanField_ELBO().loss(dense, program.guide) > 0
    assert torch.isfinite(Trace_ELBO().differentiable_loss(dense, program.guide))


def test_condition_and_substitute_values() -> None:
    program = Program()
    x = torch.ones(B, G).double()
    trace = poutine.trace(poutine.condition(poutine.uncondition(program.model), data={"x": x})).get_trace()
    trace.compute_log_prob()
    fn = trace.nodes["x"]["fn"]
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], fn.log_prob(x) * N / B)
    assert fn.mean.shape == (B, G)
    assert type(fn) is ZeroInflatedNegativeBinomialCounts
    assert (fn.log_prob(x)[~program.has_rna] == 0).all()


def test_replay_detach_and_format() -> None:
    program = Program()
    trace = poutine.trace(program.model).get_trace()
    trace.detach_()
    assert isinstance(trace.nodes["rho"]["value"], Readout)
    assert not trace.nodes["rho"]["value"].requires_grad
    again = poutine.trace(poutine.replay(program.model, trace=trace)).get_trace()
    torch.testing.assert_close(again.log_prob_sum(), trace.log_prob_sum())
    again.compute_log_prob()
    assert "rho" in again.format_shapes()


def test_relations() -> None:
    program = Program()
    relations = get_model_relations(program.model)
    assert relations["observed"] == ["rho", "x", "p", "y"]
    upstream = {name: set(sites) for name, sites in relations["sample_sample"].items()}
    assert upstream["x"] == {"z", "l"}
    assert upstream["y"] == {"z", "d"}
    with_deterministic = get_model_relations(program.model, include_deterministic=True)
    upstream = {name: set(sites) for name, sites in with_deterministic["sample_sample"].items()}
    assert upstream["x"] >= {"rho", "l"}
    assert upstream["rho"] == {"z"}
