"""Terms that each recipe adds to the ELBO, against NumPy and SciPy."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import special, stats

from pyro_multivi import MultiVIProgram
from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.traces import TRAINING_SITES, measure
from pyro_multivi.training import NegativeELBO


def traced(program, cells):
    """Traces of guide and model at one draw, with their log densities."""
    guide = poutine.trace(program.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
    guide.compute_log_prob()
    model.compute_log_prob()
    return guide.nodes, model.nodes


def array(value):
    return (value.dense() if hasattr(value, "dense") else value).detach().numpy()


def log_density(node):
    return node["unscaled_log_prob"].detach().numpy()


def log_mixture(z_nk, weights_c, loc_ck, scale_ck):
    each_nc = stats.norm.logpdf(z_nk[:, None], loc_ck, scale_ck).sum(-1)
    return special.logsumexp(np.log(weights_c) + each_nc, axis=1)


def test_mixture_prior(recipes, randomised, stained):
    program = randomised(recipes.MixturePrior)
    _, model = traced(program, stained)
    weights = special.softmax(array(program.mixture_logits))
    loc, scale = array(program.mixture_loc), np.exp(array(program.mixture_log_scale))
    expected = log_mixture(array(model["z"]["value"]), weights, loc, scale)
    np.testing.assert_allclose(log_density(model["z"]), expected)
    assert len(np.unique(loc)) == 12


def test_a_prior_without_closed_form_enters_at_the_draw(recipes, randomised, stained):
    """KL(q | p) becomes log q - log p, in the loss and in the terms."""
    program = randomised(recipes.MixturePrior)
    losses = {}
    of_the_model = poutine.block(program.guide, hide=list(TRAINING_SITES))
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(3)
        losses[type(elbo)] = float(elbo.loss(program.model, of_the_model, stained))
    torch.manual_seed(3)
    guide, model = traced(program, stained)
    difference = log_density(guide["z"]) - log_density(model["z"])
    torch.manual_seed(3)
    terms = measure(program, stained)
    assert float(terms.kl["z"]) == pytest.approx(difference.sum(), rel=1e-9)
    # Only depths have a closed form here: the two losses differ by what it makes of l and d.
    at_draw = sum((log_density(guide[name]) - log_density(model[name])).sum() for name in ("l", "d"))
    gap = (float(terms.kl["l"] + terms.kl["d"]) - at_draw) * 60 / 12
    assert losses[TraceMeanField_ELBO] - losses[Trace_ELBO] == pytest.approx(gap, rel=1e-6)


def test_vamp_prior_is_the_mixture_of_posteriors_of_pseudo_cells(recipes, randomised, stained):
    program = randomised(recipes.VampPrior)
    # Counts of a cell of typical depth, which the encoder takes as they are.
    counts = torch.rand(4, 7, dtype=torch.float64)
    counts *= program.rna_log_depth.exp() / counts.sum(1, keepdim=True)
    with torch.no_grad():
        program.pseudo_x.copy_(counts.log1p())
        program.pseudo_y.copy_((torch.rand(4, 9) < 0.5).double())
    yes = torch.ones(4, dtype=torch.bool)
    pseudo = stained.replace(
        index=torch.arange(4), x=counts, y=program.pseudo_y.detach(), has_rna=yes,
        has_atac=yes, design=torch.eye(3, dtype=torch.float64)[[0] * 4], label=yes.long(), extra={},
    )  # fmt: skip
    q = poutine.trace(program.guide).get_trace(pseudo).nodes["z"]["fn"]
    _, model = traced(program, stained)
    expected = log_mixture(array(model["z"]["value"]), np.full(4, 0.25), array(q.mean), array(q.stddev))
    np.testing.assert_allclose(log_density(model["z"]), expected, rtol=1e-6)


def kl_normal(m, s, mean, sd):
    return (np.log(sd / s) + (s**2 + (m - mean) ** 2) / (2 * sd**2) - 0.5).sum()


def open_probability(model, r):
    p, d = array(model["p"]["value"]), array(model["d"]["value"])
    return p * d[:, None] * r


def test_random_region_factors(recipes, randomised, stained):
    program = randomised(recipes.RandomRegionFactors)
    _, model = traced(program, stained)
    r_logit = array(model["r_logit"]["value"])
    mean, log_sd = array(program.r_prior)
    assert log_density(model["r_logit"]) == pytest.approx(stats.norm.logpdf(r_logit, mean, np.exp(log_sd)).sum())
    q = open_probability(model, special.expit(r_logit))
    opened = stained.y.to_dense().numpy() > 0
    expected = stats.bernoulli.logpmf(opened, q).sum(1) * stained.has_atac.numpy()
    np.testing.assert_allclose(log_density(model["y"]), expected)
    # Once for all cells, of which the minibatch holds 12 in 60.
    kl = kl_normal(array(program.region_logit), np.exp(array(program.r_log_scale)), mean, np.exp(log_sd))
    torch.manual_seed(5)
    terms = measure(program, stained)
    assert float(terms.kl["r_logit"]) == pytest.approx(kl * 12 / 60)
    torch.manual_seed(5)
    loss = NegativeELBO(program)(stained)
    assert loss.item() == pytest.approx(float(sum(terms.training.values()) - terms.elbo) / 12)


@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label"])
def test_random_dispersions(recipes, randomised, stained, dispersion):
    program = randomised(recipes.RandomDispersions, dispersion=dispersion, gene_likelihood="nb")
    _, model = traced(program, stained)
    log_theta = array(model["log_theta"]["value"])
    mean, log_sd = array(program.theta_prior)
    assert log_density(model["log_theta"]) == pytest.approx(stats.norm.logpdf(log_theta, mean, np.exp(log_sd)).sum())
    row = {"gene": 0, "gene-batch": stained.design[:, :2].argmax(1).numpy(), "gene-label": stained.label.numpy()}
    theta = np.exp(log_theta[row[dispersion]])
    mu = array(model["l"]["value"])[:, None] * array(model["rho"]["value"])
    expected = stats.nbinom.logpmf(stained.x.to_dense().numpy(), theta, theta / (theta + mu)).sum(1)
    np.testing.assert_allclose(log_density(model["x"]), expected * stained.has_rna.numpy())
    # Each draw of several has dispersions of its own.
    with pyro.plate("particles", 3, dim=-2):
        several = traced(program, stained)[1]
    theta_sg = np.exp(array(several["log_theta"]["value"]))[:, 0][:, row[dispersion]]
    theta_sg = theta_sg if theta_sg.ndim == 3 else theta_sg[:, None]
    mu = array(several["l"]["value"])[..., None] * array(several["rho"]["value"])
    expected = stats.nbinom.logpmf(stained.x.to_dense().numpy(), theta_sg, theta_sg / (theta_sg + mu)).sum(-1)
    np.testing.assert_allclose(log_density(several["x"]), expected * stained.has_rna.numpy())


def test_random_batch_effects(recipes, randomised, stained):
    program = randomised(recipes.RandomBatchEffects)
    guide, model = traced(program, stained)
    b, s = array(model["b"]["value"]), array(stained.design)
    np.testing.assert_allclose(log_density(model["b"]), stats.t.logpdf(b, 3, scale=0.2).sum())
    loc, scale = array(program.b_loc), np.exp(array(program.b_log_scale))
    np.testing.assert_allclose(log_density(guide["b"]), stats.norm.logpdf(b, loc, scale).sum())
    without = MultiVIProgram.expression(program, model["z"]["value"], stained.design).rho
    expected = special.softmax(np.log(array(without)) + b[s[:, :2].argmax(1)], axis=1)
    np.testing.assert_allclose(array(model["rho"]["value"]), expected)
    # Each draw of the posterior has its own effects, the same in all cells; and the program can be copied.
    drawn = draw(copy.deepcopy(program), stained, ("b", "rho", "z"), n_samples=3)
    assert drawn["b"].shape == (3, 1, 2, 7)
    for b, rho, z in zip(*(drawn[name] for name in ("b", "rho", "z")), strict=True):
        without = MultiVIProgram.expression(program, z, stained.design).rho
        expected = special.softmax(np.log(array(without)) + array(b)[0][s[:, :2].argmax(1)], axis=1)
        np.testing.assert_allclose(array(rho), expected)


def test_labels_of_some_cells(recipes, randomised, stained):
    program = randomised(recipes.Labelled)
    _, model = traced(program, stained)
    logits = array(program.classifier(model["z"]["value"]))
    label = array(stained.label)
    expected = special.log_softmax(logits, 1)[np.arange(len(label)), np.maximum(label - 1, 0)] * (label > 0)
    np.testing.assert_allclose(log_density(model["label"]), expected)
    assert set(label) == {0, 1, 2}
    drawn = array(draw(program, stained, ("label",), n_samples=4000)["label"])
    assert drawn.shape == (4000, 12)
    assert set(drawn.ravel()) == {0, 1}


def test_dense_values_have_second_derivatives(recipes, randomised, stained):
    """Those are differences of the block-wise first derivatives, of the same density."""
    programs = {kind: randomised(kind) for kind in (MultiVIProgram, recipes.Dense)}
    guide, _ = traced(programs[MultiVIProgram], stained)
    latents = {name: guide[name]["value"].detach() for name in ("z", "l", "d")}
    z, direction = latents.pop("z"), torch.randn(12, 3, dtype=torch.float64)

    def slope(kind, z):
        z = z.requires_grad_()
        return torch.autograd.grad(recipes.log_joint(programs[kind], stained, z=z, **latents), z, create_graph=True)[0]

    first = [slope(kind, z.clone()) for kind in programs]
    torch.testing.assert_close(*first)
    at = z.clone()
    second = torch.autograd.grad((slope(recipes.Dense, at) * direction).sum(), at)[0]
    ahead, behind = (slope(MultiVIProgram, z.detach() + step * direction) for step in (1e-5, -1e-5))
    torch.testing.assert_close(second, (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-4)


def test_covariate_effect(recipes, randomised, stained):
    program = randomised(recipes.CovariateEffect)
    z = torch.randn(2, 12, 3, dtype=torch.float64)
    with torch.no_grad():
        rho = program.expression(z, stained.design).rho
        effect = program.effect.clone()
        program.effect.zero_()
        without = program.expression(z, stained.design).rho.logits().numpy()
    logits = without + stained.design.numpy() @ array(effect).T
    np.testing.assert_allclose(array(rho), special.softmax(logits, -1))


def test_linear_decoder(recipes, randomised, stained):
    program = randomised(recipes.LinearExpression)
    assert program.loadings().shape == (7, 3)
    z = torch.randn(2, 12, 3, dtype=torch.float64)
    rho = array(program.expression(z, stained.design).rho)
    layer = program.expression_decoder.rho
    logits = z.numpy() @ array(program.loadings()).T + array(layer.bias)
    logits = logits + stained.design.numpy() @ array(layer.weight)[:, 3:].T
    np.testing.assert_allclose(rho, special.softmax(logits, -1))


def test_protein_likelihood_and_expert(recipes, randomised, stained):
    program = randomised(recipes.Protein)
    guide, model = traced(program, stained)
    values, measured = (part.numpy() for part in stained.extra["protein"])
    z_s = np.column_stack([array(model["z"]["value"]), stained.design.numpy()])
    mean = np.exp(z_s @ array(program.protein_decoder.weight).T + array(program.protein_decoder.bias))
    theta = np.exp(array(program.protein_log_theta))
    expected = stats.nbinom.logpmf(values, theta, theta / (theta + mean)).sum(1) * measured
    np.testing.assert_allclose(log_density(model["protein"]), expected)
    # z is the average of the experts that were measured.
    experts = program.experts(stained, stained.design, program.encode(stained, stained.design))
    has = np.stack([stained.has_rna, stained.has_atac, measured], -1) * 1.0
    loc = np.stack([array(expert.loc) for expert in experts.values()], -1)
    scale = np.stack([array(expert.scale) for expert in experts.values()], -1)
    weight = (has / has.sum(1, keepdims=True))[:, None]
    np.testing.assert_allclose(array(guide["z"]["fn"].mean), (weight * loc).sum(-1))
    np.testing.assert_allclose(array(guide["z"]["fn"].variance), (weight**2 * scale**2).sum(-1))
    assert measure(program, stained).n_measured["protein"] == measured.sum()


def test_proteins_that_were_not_measured_count_for_nothing(recipes, randomised, stained):
    program = randomised(recipes.Protein)
    values, measured = stained.extra["protein"]
    garbage = type(stained.extra["protein"])(values + ~measured[:, None], measured)
    other = stained.replace(extra={"protein": garbage})
    found = []
    for cells in (stained, other):
        torch.manual_seed(0)
        program.zero_grad()
        loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)
        loss.backward()
        found.append([loss, *(p.grad for p in program.parameters() if p.grad is not None)])
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


def test_poisson_fragments(recipes, randomised, stained):
    program = randomised(recipes.PoissonFragments)
    _, model = traced(program, stained)
    q = open_probability(model, special.expit(array(program.region_logit)))
    counts = stained.y.to_dense().numpy()
    assert counts.max() > 1
    expected = stats.poisson.logpmf(counts, -np.log1p(-q)).sum(1) * stained.has_atac.numpy()
    np.testing.assert_allclose(log_density(model["y"]), expected)
    np.testing.assert_allclose(array(program.open_probability(model["y"]["fn"])), q)


def test_flow_guide_has_the_density_of_the_change_of_variables(recipes, randomised, stained):
    program = randomised(recipes.FlowGuide)
    guide, _ = traced(program, stained)
    q, z = guide["z"]["fn"], guide["z"]["value"].detach()
    base = q.base_dist
    # Planar flows are inverted by remembering: draw again to know where a draw came from.
    z0 = base.sample()
    z = z0
    log_det = 0.0
    for planar in program.flow:
        jacobian = torch.stack([torch.autograd.functional.jacobian(planar, row) for row in z])
        log_det = log_det + torch.linalg.slogdet(jacobian).logabsdet
        z = planar(z)
    expected = stats.norm.logpdf(z0, array(base.mean), array(base.stddev)).sum(1) - log_det.detach().numpy()
    np.testing.assert_allclose(array(q.log_prob(z)), expected)


# ---------------------------------------------------------------------- bounds


def gaussian(x):
    """z ~ N(0, 1), x ~ N(z, 1), and a guide that is wrong; x ~ N(0, 2) altogether."""

    class Seen(SimpleNamespace):
        def __len__(self):
            return len(self.x)

    def model(cells):
        with pyro.plate("cells", len(cells)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(cells)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=cells.x)

    def guide(cells):
        with pyro.plate("cells", len(cells)):
            pyro.sample("z", dist.Normal(torch.zeros(len(cells)), 1.3))

    return model, guide, Seen(x=x, n_total=2 * len(x))


def test_the_bound_of_many_particles_is_the_evidence(recipes):
    x = torch.tensor([-1.0, 0.0, 2.0])
    model, guide, cells = gaussian(x)
    evidence = stats.norm.logpdf(x, 0, math.sqrt(2)).sum()
    with torch.no_grad():
        found = recipes.CellRenyiELBO(num_particles=20_000).differentiable_loss(model, guide, cells)
    # The minibatch stands for twice as many cells. Error of the mean weight: below 1 % per cell.
    assert -found.item() == pytest.approx(2 * evidence, abs=0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0])
def test_renyi_bounds_are_power_means_of_the_weights(recipes, alpha):
    model, guide, cells = gaussian(torch.tensor([-1.0, 0.0, 2.0]))
    elbo = recipes.CellRenyiELBO(alpha, num_particles=6)
    torch.manual_seed(0)
    loss = elbo.differentiable_loss(model, guide, cells)
    torch.manual_seed(0)
    with pyro.plate("particles", 6, dim=-2):
        z = poutine.trace(guide).get_trace(cells).nodes["z"]["value"].numpy()
    log_w = stats.norm.logpdf(z) + stats.norm.logpdf(cells.x.numpy(), z) - stats.norm.logpdf(z, 0, 1.3)
    bound = np.log((np.exp(log_w) ** (1 - alpha)).mean(0)) / (1 - alpha)
    assert loss.item() == pytest.approx(-2 * bound.sum(), rel=1e-5)


def test_the_bound_heeds_masks(recipes):
    model, guide, cells = gaussian(torch.tensor([-1.0, 0.0, 2.0]))
    shown = torch.tensor([True, False, True])
    losses = []
    for elbo in (recipes.CellRenyiELBO(num_particles=1), Trace_ELBO()):
        torch.manual_seed(2)
        with poutine.mask(mask=shown):
            losses.append(elbo.differentiable_loss(model, guide, cells).item())
    # The cells of the recipe stand for twice as many.
    assert losses[0] == pytest.approx(2 * losses[1])


def test_one_particle_is_the_elbo(recipes, randomised, stained):
    program = randomised(recipes.MixturePrior)
    losses = []
    for elbo in (recipes.CellRenyiELBO(num_particles=1), Trace_ELBO()):
        torch.manual_seed(2)
        losses.append(elbo.differentiable_loss(program.model, program.guide, stained).item())
    assert losses[0] == pytest.approx(losses[1])
