"""ELBO, reconstruction error and marginal likelihood."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.special
import scipy.stats
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_multivi import MultiVIProgram
from pyro_multivi.posterior.calibration.fit_scale import gradients
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.traces import TRAINING_SITES, measure

SIZES = {"n_genes": 4, "n_regions": 5}


def integrable(make_program, **choices):
    """A program whose guide is wide enough for importance sampling: for any cell near its prior over z."""
    program = make_program(torch.float64, **SIZES, **choices)
    with torch.no_grad():
        for expert in (program.rna_expert, program.atac_expert):
            for part in (expert.loc.weight, expert.loc.bias, expert.log_variance.weight):
                part.mul_(0.2)
            # The average of two experts of variance 2 has variance 1.
            expert.log_variance.bias.fill_(np.log(2.0))
        # Depths are those that were observed, with wide errors.
        for head in (program.library_head, program.cell_factor_head):
            head.out.weight.zero_()
            head.out.bias.zero_()
        program.cell_factor_log_scale.fill_(np.log(2.0))
    return program


def log_marginal(program, cells, n_z=61, n_l=81):
    """Log marginal likelihood of each cell by the trapezoidal rule over z, log l and logit d, with SciPy."""
    k = program.config.latent
    axis = np.linspace(-6, 6, n_z)
    z = np.stack(np.meshgrid(*[axis] * k, indexing="ij"), -1).reshape(-1, k)
    log_prior = scipy.stats.norm.logpdf(z).sum(-1) + k * np.log(axis[1] - axis[0])
    batch = cells.design[:, : program.config.n_batch].argmax(1)
    found = []
    for n in range(len(cells)):
        s = cells.design[n].expand(len(z), -1)
        with torch.no_grad():
            decoded = program.expression(torch.from_numpy(z), s)
            rho, p = decoded.rho.dense().numpy(), program.accessibility(torch.from_numpy(z), s).dense().numpy()
            pi = None if decoded.pi_logits is None else decoded.pi_logits.dense().sigmoid().numpy()
            theta, r = program.log_theta[0].exp().numpy(), program.region_factors().numpy()
            loc, scale = (part[n].item() for part in program.library_moments(cells.design))
        log_p = log_prior.copy()
        if cells.has_rna[n]:
            x = cells.x.to_dense()[n].numpy()
            log_l = np.linspace(loc - 7 * scale, loc + 7 * scale, n_l)
            mu = np.exp(log_l)[:, None, None] * rho
            each = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mu))
            if pi is not None:
                each = np.where(x == 0, np.logaddexp(np.log(pi), np.log1p(-pi) + each), np.log1p(-pi) + each)
            weight = scipy.stats.norm.logpdf(log_l, loc, scale) + np.log(log_l[1] - log_l[0])
            log_p += np.logaddexp.reduce(each.sum(-1) + weight[:, None], 0)
        if cells.has_atac[n]:
            centre, sd = program.cell_factor_loc[batch[n]].item(), program.cell_factor_sd[batch[n]].item()
            logit_d = np.linspace(centre - 7 * sd, centre + 7 * sd, n_l)
            q = scipy.special.expit(logit_d)[:, None, None] * p * r
            each = np.where(cells.y.to_dense()[n].numpy() > 0, np.log(q), np.log1p(-q)).sum(-1)
            weight = scipy.stats.norm.logpdf(logit_d, centre, sd) + np.log(logit_d[1] - logit_d[0])
            log_p += np.logaddexp.reduce(each + weight[:, None], 0)
        found.append(np.logaddexp.reduce(log_p))
    return np.array(found)


@pytest.mark.parametrize(("n_latent", "likelihood"), [(1, "nb"), (1, "zinb"), (2, "nb")])
def test_marginal_likelihood_is_the_integral(make_program, make_cells, n_latent, likelihood):
    program = integrable(make_program, n_latent=n_latent, gene_likelihood=likelihood)
    cells = make_cells((2, 1, 1), dtype=torch.float64, **SIZES)
    exact = log_marginal(program, cells)
    found = marginal_likelihood(program, [cells], 6000, seed=1)
    assert (found.standard_error < 0.1).all()
    assert (np.abs(found.log_likelihood - exact) < 4 * found.standard_error).all()
    bound = elbo_parts(program, [cells], 500).elbo
    assert (bound < exact).all()
    # A single draw is the ELBO's own estimate: lower on average.
    single = np.array([marginal_likelihood(program, [cells], 1, seed=seed).log_likelihood for seed in range(200)])
    chance = single.std(0) * np.sqrt(1 / 200 + 1 / 500)
    assert (np.abs(single.mean(0) - bound) < 4 * chance).all()


def test_the_standard_error_is_that_of_repetition(make_program, make_cells):
    program = integrable(make_program, n_latent=1, gene_likelihood="nb")
    cells = make_cells((2, 1, 1), dtype=torch.float64, **SIZES)
    exact = log_marginal(program, cells)
    runs = [marginal_likelihood(program, [cells], 400, seed=seed) for seed in range(60)]
    z = np.array([(run.log_likelihood - exact) / run.standard_error for run in runs])
    assert 0.8 < z.std() < 1.25
    assert np.abs(z.mean(0)).max() < 0.6


def test_no_cell_depends_on_the_batch_size_or_on_chunks(fitted):
    rows = [0, 1, 100, 101, 150, 151]
    whole = fitted.get_marginal_ll(indices=rows, n_mc_samples=100, return_mean=False, seed=3)
    for batch_size in (1, 4):
        part = fitted.get_marginal_ll(indices=rows, n_mc_samples=100, return_mean=False, batch_size=batch_size, seed=3)
        np.testing.assert_allclose(part, whole, rtol=1e-5)
    elbo = fitted.get_elbo(return_mean=False, n_particles=3)
    np.testing.assert_allclose(fitted.get_elbo(return_mean=False, n_particles=3, batch_size=9), elbo, rtol=1e-5)


def test_marginal_likelihood_lies_above_the_elbo(fitted):
    rows = np.r_[0:20, 100:110, 150:160]
    value, error = fitted.get_marginal_ll(indices=rows, n_mc_samples=300, return_se=True)
    assert value > fitted.get_elbo(indices=rows, n_particles=50)
    each, errors = fitted.get_marginal_ll(indices=rows, n_mc_samples=300, return_mean=False, return_se=True)
    assert value == pytest.approx(each.mean())
    assert error == pytest.approx(np.sqrt((errors**2).sum()) / len(rows))
    assert 0 < error < 0.2
    # More draws raise it on average and never below the bound.
    few = np.mean([fitted.get_marginal_ll(indices=rows, n_mc_samples=2, seed=seed) for seed in range(20)])
    assert few < value


def test_the_elbo_is_that_of_the_terms_without_the_alignment(fitted):
    cells = fitted.minibatch()
    terms = [measure(fitted.program, cells) for _ in range(50)]
    expected = np.mean([term.elbo for term in terms]) / len(cells)
    assert fitted.get_elbo(n_particles=50) == pytest.approx(expected, abs=0.2)
    assert all(term.training["alignment"] > 0 for term in terms)
    per_cell = fitted.get_elbo(return_mean=False, n_particles=50)
    assert per_cell.mean() == pytest.approx(fitted.get_elbo(n_particles=50))


def test_reconstruction_error_is_over_measured_cells(fitted):
    modality = fitted.adata.obs["modality"].to_numpy()
    mean = fitted.get_reconstruction_error(n_particles=5)
    each = fitted.get_reconstruction_error(n_particles=5, return_mean=False)
    for name, other in (("expression", "accessibility"), ("accessibility", "expression")):
        values = each[f"reconstruction_loss_{name}"]
        assert np.array_equal(np.isnan(values), modality == other)
        assert mean[f"reconstruction_loss_{name}"] == pytest.approx(np.nanmean(values))
        assert np.nanmin(values) > 0
    assert set(fitted.get_reconstruction_error(indices=modality == "expression")) == {"reconstruction_loss_expression"}
    # Without the noise of the draw, a cell's error has nothing to do with which others are there.
    np.testing.assert_allclose(
        fitted.get_reconstruction_error(indices=[3], n_particles=5)["reconstruction_loss_expression"],
        each["reconstruction_loss_expression"][3], rtol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize(("method", "arguments", "message"), [
    ("get_marginal_ll", {"n_mc_samples": 0}, "n_mc_samples=0 is not allowed: give a whole number of at least 1"),
    ("get_marginal_ll", {"n_mc_samples": 1, "return_se": True}, "n_mc_samples=1 is not allowed.*at least 2"),
    ("get_elbo", {"n_particles": 0}, "n_particles=0 is not allowed"),
    ("get_reconstruction_error", {"n_particles": 1.5}, "n_particles=1.5 is not allowed"),
    ("get_elbo", {"batch_size": 0}, "batch_size=0 is not allowed"),
])  # fmt: skip
def test_bad_numbers(fitted, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(fitted, method)(**arguments)


@pytest.mark.usefixtures("global_rng_untouched")
def test_global_state_is_left_alone(fitted):
    fitted.get_elbo(seed=1)
    fitted.get_marginal_ll(n_mc_samples=3, indices=[0, 120, 199])


def test_cells_that_share_a_latent_have_no_likelihood_of_their_own(make_program, make_cells):
    class Shared(MultiVIProgram):
        def model(self, cells):
            pyro.sample("level", dist.Normal(0.0, 1.0))
            super().model(cells)

        def guide(self, cells):
            pyro.sample("level", dist.Normal(0.0, 1.0))
            super().guide(cells)

    with pytest.raises(
        ValueError, match="shares 'level' among cells, so that cells have no likelihood of their own.*TRAINING_SITES"
    ):
        elbo_parts(Shared(make_program().config), [make_cells()])


class Masked(MultiVIProgram):
    """Hides every third cell from model and guide; in some others a number is observed, by Pyro's obs_mask."""

    def shown(self, cells):
        return poutine.mask(mask=cells.index % 3 > 0)

    def model(self, cells):
        with self.shown(cells):
            super().model(cells)

    def guide(self, cells):
        with self.shown(cells):
            super().guide(cells)

    def observe_extra(self, cells, z, s):
        of_number = dist.Normal(z.sum(-1), 1.0)
        pyro.sample("number", of_number, obs=torch.full((len(cells),), 7.0).to(z), obs_mask=cells.index % 2 > 0)

    def guide_extra(self, cells, s):
        with poutine.mask(mask=cells.index % 2 == 0):
            pyro.sample("number_unobserved", dist.Normal(s.new_zeros(len(cells)), 2.0))


@pytest.fixture
def masked(make_program):
    def make(program_class=Masked):
        plain = make_program(torch.float64)
        program = program_class(plain.config).double().eval()
        program.load_state_dict(plain.state_dict())
        return program

    return make


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()], ids=["at the draw", "in closed form"])
def test_masks_of_pyro_count_as_in_its_elbos(masked, make_cells, elbo, monkeypatch):
    program, cells = masked(), make_cells(dtype=torch.float64)
    if isinstance(elbo, Trace_ELBO) and not isinstance(elbo, TraceMeanField_ELBO):

        def no_closed_form(q, p):
            raise NotImplementedError

        monkeypatch.setattr("pyro_multivi.traces.kl_divergence", no_closed_form)
    torch.manual_seed(0)
    terms = measure(program, cells)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = -elbo.loss(program.model, poutine.block(program.guide, hide=list(TRAINING_SITES)), cells)
    assert terms.elbo * cells.n_total / len(cells) == pytest.approx(expected, rel=1e-9)
    shown, observed = cells.index % 3 > 0, cells.index % 2 > 0
    assert terms.n_measured["x"] == (cells.has_rna & shown).sum()
    assert terms.n_measured["number_observed"] == (observed & shown).sum()
    parts = elbo_parts(program, [cells], 3)
    assert not parts.elbo[~shown].any()
    np.testing.assert_array_equal(parts.measured["number_observed"], observed & shown)
    assert not marginal_likelihood(program, [cells], 3).log_likelihood[~shown].any()


def test_masks_of_pyro_leave_other_cells_as_they_are(masked, make_cells):
    class Shown(Masked):
        def shown(self, cells):
            return nullcontext()

    cells = make_cells(dtype=torch.float64)
    shown = (cells.index % 3 > 0).numpy()
    hidden, whole = masked(), masked(Shown)
    elbos = [elbo_parts(program, [cells], 3).elbo for program in (hidden, whole)]
    evidence = [marginal_likelihood(program, [cells], 3).log_likelihood for program in (hidden, whole)]
    for found, expected in (elbos, evidence):
        np.testing.assert_allclose(found[shown], expected[shown])
    # What calibration differentiates is the same density.
    (_, found), (_, expected) = (gradients(program, cells, ["z"])["z"] for program in (hidden, whole))
    torch.testing.assert_close(found[:, shown], expected[:, shown])
    assert not found[:, ~shown].any()


def test_observed_and_known_depths(make_program, make_cells):
    cells = make_cells()
    observed = make_program(library="observed")
    assert np.isfinite(marginal_likelihood(observed, [cells], 5).log_likelihood).all()
    known = cells.replace(rna_size=torch.full((12,), 1.5), atac_size=torch.full((12,), 0.4))
    fixed = make_program(library="size_factor")
    parts = elbo_parts(fixed, [known])
    assert np.isfinite(parts.elbo).all()
    assert not parts.kl["l"].any()


def test_a_guide_that_is_a_point_has_no_marginal_likelihood(make_program, make_cells):
    """Its weights would be densities of counts and z, of which the second is one more thing for each dimension."""

    class AtThePoint(MultiVIProgram):
        def mix(self, experts):
            return dist.Delta(self.averaged(experts)[0], event_dim=1)

    cells, program = make_cells(), AtThePoint(make_program().config)
    assert np.isfinite(elbo_parts(program, [cells]).elbo).all()
    with pytest.raises(ValueError, match=r"puts 'z' at a point \(Delta\), .* no marginal likelihood.*Use get_elbo"):
        marginal_likelihood(program, [cells], 5)
