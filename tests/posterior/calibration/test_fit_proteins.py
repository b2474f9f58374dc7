"""Intervals of proteins: the posterior given a count, the fit of what it needs, and what it covers."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import special, stats

from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.extra.given_count import given_count
from pyro_multivi.networks.extra.proteins import Proteins
from pyro_multivi.posterior.calibration import fit_proteins as fitting
from pyro_multivi.posterior.calibration.fit_proteins import clear_proteins, fit_proteins
from pyro_multivi.posterior.calibration.refit import refit
from pyro_multivi.posterior.engine.decode import Average, decode
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

N, F, SD, THETA, RATIO = 1500, 15, 0.25, 12.0, 8.0


@pytest.mark.parametrize("y", [0.0, 3.0, 40.0, 400.0])
@pytest.mark.parametrize("sd", [0.1, 0.4])
def test_posterior_given_a_count_is_that_of_quadrature(y, sd):
    mean, theta = 25.0, 6.0
    u = np.linspace(-8, 8, 4001)
    joint = stats.nbinom.pmf(y, theta, theta / (theta + mean * np.exp(sd * u))) * stats.norm.pdf(u)
    found = given_count(*map(torch.tensor, (y, True)), *torch.tensor([mean, sd, theta]).double().log())
    expected = (joint * u).sum() / joint.sum()
    assert found.mode.item() == pytest.approx(expected, abs=0.06)
    assert found.sd.item() == pytest.approx(np.sqrt((joint * (u - expected) ** 2).sum() / joint.sum()), rel=0.03)
    evidence = np.log(joint.sum() * (u[1] - u[0]))
    of_counts = stats.nbinom.logpmf(y, theta, 0.5) - (y + theta) * np.log(0.5)
    assert found.log_evidence.item() + of_counts == pytest.approx(evidence, abs=0.02)
    exact = given_count(*map(torch.tensor, (y, True)), *torch.tensor([mean, sd, theta]).double().log(), n_nodes=5)
    assert exact.log_evidence.item() + of_counts == pytest.approx(evidence, abs=2e-4)


@pytest.mark.parametrize(("mean", "y"), [(1.0, 100.0), (1.0, 1000.0), (1000.0, 1.0), (5000.0, 0.0), (10.0, 10_000.0)])
@pytest.mark.parametrize(("sd", "theta"), [(0.5, 10.0), (1.0, 50.0), (2.0, 10.0)])
def test_counts_far_from_the_mean_have_a_mode_too(mean, y, sd, theta):
    u = np.linspace(-40, 40, 160_001)
    odds = np.log(mean / theta) + sd * u
    joint = y * odds - (y + theta) * np.logaddexp(0, odds) - u**2 / 2
    found = given_count(*map(torch.tensor, (y, True)), *torch.tensor([mean, sd, theta]).double().log())
    assert sd * found.mode.item() == pytest.approx(sd * u[joint.argmax()], abs=0.05)
    expected = joint.max() + np.log(np.exp(joint - joint.max()).sum() * (u[1] - u[0]) / np.sqrt(2 * np.pi))
    assert found.log_evidence.item() == pytest.approx(expected, abs=0.1)


def test_without_a_count_it_is_the_prior():
    found = given_count(torch.tensor(50.0), torch.tensor(False), *torch.tensor([25.0, 0.3, 6.0]).log())
    assert [part.item() for part in found] == [0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def simulated():
    """Cells of one state, whose backgrounds differ, in a program that has learned too little of that."""
    rng = np.random.default_rng(0)
    is_foreground = rng.random((N, F)) < 0.4
    background = 10 * np.exp(SD * rng.standard_normal((N, F)))
    mean = background * np.where(is_foreground, RATIO, 1.0)
    counts = torch.from_numpy(rng.poisson(mean * rng.gamma(THETA, 1 / THETA, mean.shape))).float()
    measured = torch.arange(N) % 3 > 0

    nothing = SparseCounts.from_dense(torch.zeros(N, 2))
    table = CellTable(
        x=nothing, y=None, n_genes=2, n_regions=0, batch_code=torch.zeros(N, dtype=torch.long),
        has_rna=torch.ones(N, dtype=torch.bool), has_atac=torch.zeros(N, dtype=torch.bool),
        design=torch.ones(N, 1), cell_names=[f"cell_{place}" for place in range(N)],
        extra={"protein": Measurement(counts, measured)},
    )  # fmt: skip
    torch.manual_seed(0)
    sizes = {"n_genes": 2, "n_regions": 0, "n_hidden": 8, "n_latent": 2}
    program = MultiVIProgram(ProgramConfig(**sizes, extra={"protein": F}, proteins=True)).eval()
    proteins = program.extra["protein"]
    with torch.no_grad():
        for layer, value in ((proteins.log_ratio, np.log(RATIO - 1)), (proteins.odds, np.log(0.4 / 0.6))):
            layer.weight.zero_()
            layer.bias.fill_(value)
        proteins.background_log_mean.fill_(np.log(10.0))
        proteins.background_log_sd.fill_(np.log(0.1))
        proteins.log_theta.fill_(np.log(7.0))
    return SimpleNamespace(
        program=program, proteins=proteins, cells=Minibatches(table, torch.arange(N)), mean=mean,
        is_foreground=is_foreground, background=background, measured=measured.numpy(),
    )  # fmt: skip


def draws(simulated, site, **average):
    with evaluation_mode(simulated.program):
        found = [
            decode(simulated.program, cells, Average(100, False, level=0.9, **average), [site]).sites
            for cells in simulated.cells
        ]
    return torch.cat([one[0][site] for one in found], 1).numpy()


def test_spread_and_dispersion_are_told_apart_and_intervals_cover(simulated):
    proteins = simulated.proteins
    fit_proteins(simulated.program, simulated.cells)
    shift, error = proteins.calibrated_log_sd.tolist()
    assert 0.02 < error < 0.3
    assert 0.1 * np.exp(shift) == pytest.approx(SD, rel=0.2)
    assert (7 * proteins.calibrated_log_theta.exp()).median().item() == pytest.approx(THETA, rel=0.2)
    assert (proteins.weight_sd[..., -1] > 0).all()
    expected = simulated.mean
    for site, truth in (("protein_mean", expected), ("protein_background_mean", simulated.background)):
        lower, upper = np.quantile(draws(simulated, site), [0.05, 0.95], axis=0)
        held = (lower <= truth) & (truth <= upper)
        for cells in (simulated.measured, ~simulated.measured):
            assert held[cells].mean() == pytest.approx(0.9, abs=0.07)  # 86 to 91 % over seeds
    # Without its background a protein that is not there has no expression.
    alone = draws(simulated, "protein_foreground_mean")
    lower, upper = np.quantile(alone, [0.05, 0.95], axis=0)
    truth = expected * simulated.is_foreground
    assert ((lower <= truth) & (truth <= upper)).mean() > 0.88
    assert (upper[simulated.measured & (alone == 0).all((0, 2))] == 0).all()
    share = draws(simulated, "protein_foreground_probability")
    assert share.mean() == pytest.approx(0.4, abs=0.02)

    clear_proteins(simulated.program)
    lower, upper = np.quantile(draws(simulated, "protein_mean"), [0.05, 0.95], axis=0)
    assert ((lower <= expected) & (expected <= upper)).mean() < 0.75


def test_its_likelihood_is_the_average_over_draws_of_counts_with_u_integrated_out(simulated):
    fit_proteins(simulated.program, simulated.cells)
    cells = simulated.cells.cut(torch.arange(40))
    likelihood = fitting._Likelihood.of(simulated.program, simulated.proteins, cells)
    assert likelihood.logits.std(0).min() > 0
    one = torch.ones(1, F, dtype=torch.float64)
    shifts = fitting._Shifts(0.3 * one[0, 0], 0.2 * one[0], 0.1 * one)
    u = np.linspace(-8, 8, 2001)
    log_mean, log_sd, log_theta, log_ratio, logits, y = (
        part.numpy()[..., None]
        for part in (
            likelihood.log_mean + 0.1, likelihood.log_sd + 0.3, likelihood.log_theta.expand(40, F) + 0.2,
            likelihood.log_ratio, likelihood.logits, likelihood.y,
        )
    )  # fmt: skip
    theta, share = np.exp(log_theta), 1 / (1 + np.exp(-logits))
    mixture = sum(
        weight * stats.nbinom.pmf(y, theta, theta / (theta + np.exp(log_mean + ratio + np.exp(log_sd) * u)))
        for weight, ratio in ((1 - share, 0.0), (share, log_ratio))
    )
    log_prob = np.log((mixture * stats.norm.pdf(u)).sum(-1) * (u[1] - u[0]))
    # Of counts and dispersion alone: what the likelihood leaves out.
    log_prob = log_prob + special.gammaln(y + 1)[..., 0]
    expected = np.where(simulated.measured[:40, None], log_prob, 0).mean(0).sum()
    prior, *draws = likelihood.terms(shifts)
    assert sum(draws).item() == pytest.approx(expected, abs=0.05)
    sd = 0.1 * np.exp(0.3)
    at_prior = stats.norm.logpdf(np.log(sd), np.log(0.25), 0.5) - stats.norm.logpdf(0, 0, 0.5)
    assert prior.item() == pytest.approx(at_prior - 0.5 * 0.05 * F * (0.2**2 + 0.1**2), rel=1e-5)


def test_training_on_clears_it_and_an_error_brings_it_back(simulated):
    fit_proteins(simulated.program, simulated.cells)
    before = [buffer.clone() for buffer in simulated.proteins.calibrated]
    cleared = []

    def interrupted():
        with refit(simulated.program, lambda: 0):
            cleared.extend(bool(buffer.any()) for buffer in simulated.proteins.calibrated)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert cleared == [False] * 4
    assert all(map(torch.equal, before, simulated.proteins.calibrated))


def test_few_cells_and_statements_of_ones_own_leave_the_fitted_program(simulated):
    few = Minibatches(simulated.cells.table, torch.arange(60))
    fit_proteins(simulated.program, few)
    assert not any(buffer.any() for buffer in simulated.proteins.calibrated)

    class Own(Proteins):
        def observe(self, cells, z, s):
            super().observe(cells, z, s)

    own = Own("protein", simulated.program.config)
    assert not own.is_as_written
    assert own.realised("mean", None, None, None, None) is None
