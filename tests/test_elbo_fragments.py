"""The ELBO of models that count fragments, against distributions of Pyro on dense tensors and autograd through them."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import measure

LIKELIHOODS = ("poisson", "nb")


@pytest.fixture(params=LIKELIHOODS)
def likelihood(request):
    return request.param


@pytest.fixture(params=["all regions", "panels"])
def cells(request, make_cells):
    """Cells of all patterns; counts up to 6, in panels none of what a cell was not measured for."""
    made = make_cells(dtype=torch.float64, n_total=60)
    y = made.y.to_dense() * torch.tensor([1, 2, 3], dtype=torch.float64).repeat(3)
    if request.param == "all regions":
        return made.replace(y=SparseCounts.from_dense(y))
    panels = Panels(torch.rand(3, 9) < 0.6, torch.arange(len(made)) % 3)
    y = y * panels.measured[panels.code]
    # What is not measured in a panel is filled in by what a typical cell has.
    return made.replace(y=SparseCounts.from_dense(y), atac_panels=panels)


@pytest.fixture
def program(make_program, likelihood):
    made = make_program(torch.float64, accessibility_likelihood=likelihood)
    made.fragments_log_mean.copy_(torch.tensor([1.0, 2.0]))
    made.fragments_log_var.copy_(torch.tensor([0.4, 0.9]))
    made.atac_typical.copy_(torch.rand(2, 9, dtype=torch.float64))
    made.atac_typical[0] /= made.atac_typical[0].sum()
    return made


def traces(program, cells, seed=3):
    torch.manual_seed(seed)
    guide = poutine.trace(program.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
    guide.compute_log_prob()
    model.compute_log_prob()
    return model, guide


def log_y(program, cells, z, d):
    """Each measured region of each cell by a distribution of Pyro, summed; the mean is p r d over the typical total."""
    decoder = program.accessibility_decoder
    hidden, n_batch = decoder.stack(z, cells.design), program.config.n_batch
    if n_batch > 1:
        hidden = torch.cat([hidden, hidden.shape[1] ** 0.5 * cells.design[:, :n_batch]], 1)
    logits = hidden @ decoder.p.weight.T + decoder.p.bias
    mean = logits.sigmoid() * program.region_log_rate.exp() * (d / program.atac_log_depth.exp())[:, None]
    if program.config.accessibility_likelihood == "poisson":
        fn = dist.Poisson(mean)
    else:
        theta = program.region_log_theta.exp()
        fn = dist.GammaPoisson(theta, theta / mean)
    counted = cells.has_atac[:, None].expand(mean.shape)
    if cells.atac_panels is not None:
        counted = counted & cells.atac_panels.measured[cells.atac_panels.code]
    return torch.where(counted, fn.log_prob(cells.y.to_dense()), 0.0).sum(1)


def test_values_of_all_terms(program, cells):
    model, guide = traces(program, cells)
    z, d = (guide.nodes[name]["value"] for name in ("z", "d"))
    torch.testing.assert_close(model.nodes["y"]["unscaled_log_prob"], log_y(program, cells, z, d))
    batch = cells.design[:, :2]
    mean, sd = batch @ program.fragments_log_mean, (batch @ program.fragments_log_var).sqrt()
    prior = dist.Normal(mean, sd).log_prob(d.log()) - d.log()
    torch.testing.assert_close(model.nodes["d"]["unscaled_log_prob"], prior)
    q = guide.nodes["d"]["fn"]
    torch.testing.assert_close(q.loc[~cells.has_atac], mean[~cells.has_atac])
    torch.testing.assert_close(q.scale[~cells.has_atac], sd[~cells.has_atac])
    terms = measure(program, cells)
    kl = ((q.scale**2 + (q.loc - mean) ** 2) / sd**2 - 1).sum() / 2 + (sd / q.scale).log().sum()
    assert float(terms.kl["d"]) == pytest.approx(kl.item())
    assert float(terms.n_measured["y"]) == 9


def test_gradients_are_those_of_autograd_through_pyros_distributions(program, cells):
    """Of every parameter that the likelihood depends on, also through z and d and so through the encoders."""
    model, guide = traces(program, cells)
    z, d = (guide.nodes[name]["value"] for name in ("z", "d"))
    parameters = dict(program.named_parameters())
    weight = torch.rand(len(cells), dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((weight * value).sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
        for value in (model.nodes["y"]["unscaled_log_prob"], log_y(program, cells, z, d))
    )
    used = {name for name, gradient in zip(parameters, expected, strict=True) if gradient is not None}
    wanted = {
        "accessibility_decoder.p.weight",
        "region_log_rate",
        "cell_factor_head.out.weight",
        "atac_expert.loc.bias",
    }
    assert wanted <= used
    assert ("region_log_theta" in used) == (program.config.accessibility_likelihood == "nb")
    for name, one, other in zip(parameters, found, expected, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8 * float(other.abs().max()), msg=name)


def test_loss_is_the_sum_of_the_terms_and_its_gradient_their_slope(program, cells, monkeypatch):
    monkeypatch.setattr(MultiVIProgram, "depth_hidden_state", lambda self, state: state)
    monkeypatch.setattr("pyro_multivi.networks.alignment._bandwidth", lambda squared: squared.new_tensor(0.7))

    def loss():
        torch.manual_seed(3)
        return TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)

    torch.manual_seed(3)
    terms = measure(program, cells)
    expected = -terms.elbo + sum(float(value) for value in terms.training.values())
    assert loss().item() == pytest.approx(60 / 12 * expected, rel=1e-9)
    loss().backward()
    directions = [torch.randn_like(parameter) for parameter in program.parameters()]
    slope = sum((p.grad * way).sum().item() for p, way in zip(program.parameters(), directions, strict=True))
    values = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for parameter, way in zip(program.parameters(), directions, strict=True):
                parameter += step * way
            values.append(loss().item())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=2e-5)


def test_cells_without_atac_contribute_nothing(program, make_cells):
    """Masked is absent: what stands in the rows of unmeasured cells changes neither value nor gradient."""
    cells = make_cells(dtype=torch.float64, sparse=False)
    garbage = torch.where(cells.has_atac[:, None], cells.y, 5.0)
    found = []
    for y in (cells.y, garbage):
        model, _ = traces(program, cells.replace(y=y))
        value = model.nodes["y"]["unscaled_log_prob"]
        assert bool((value[~cells.has_atac] == 0).all())
        found.append(
            [value, *torch.autograd.grad(value.sum(), [program.region_log_rate, program.atac_expert.loc.bias])]
        )
    assert all(map(torch.equal, *found))


def test_no_size_is_too_small_or_too_large(make_program, make_cells, likelihood):
    """In single precision, with depths and rates over many orders of magnitude."""
    program, cells = make_program(accessibility_likelihood=likelihood), make_cells()
    for log_rate in (-60.0, 12.0):
        with torch.no_grad():
            program.region_log_rate.fill_(log_rate)
        model, _ = traces(program, cells)
        value = model.nodes["y"]["unscaled_log_prob"]
        gradients = torch.autograd.grad(value.sum(), [program.region_log_rate, program.accessibility_decoder.p.weight])
        assert all(bool(part.isfinite().all()) for part in (value, *gradients))
    assert math.isfinite(measure(program, cells).elbo)
