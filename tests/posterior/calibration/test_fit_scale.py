"""Fit of the factors of posterior standard deviations."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.calibration import fit_scale
from pyro_multivi.posterior.calibration.fit_scale import fit_posterior_scale, gradients, scale_factor
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace
from pyro_multivi.posterior.engine.posterior_scale import normal_behind, normal_in
from pyro_multivi.traces import evaluation_mode, random_sites


@pytest.mark.parametrize(("sd", "shift"), [(1.0, 0.0), (0.9, 0.7), (1.4, 0.6), (0.8, 1.0)])
def test_the_factor_is_that_of_a_normal_posterior(sd, shift):
    """The mean squared distance of Normal(shift, sd) from 0, in each dimension on its own."""
    noise = torch.randn(32, 400, 2, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([[shift, 0.0], [sd, 1.0]])
    found = scale_factor(noise, (target[0] - noise) / target[1] ** 2)
    assert found.tolist() == pytest.approx([(sd**2 + shift**2) ** 0.5, 1.0], abs=0.04)


def test_distances_of_cells_in_opposite_directions_do_not_cancel():
    noise = torch.randn(32, 400, 1, generator=torch.Generator().manual_seed(1))
    shift = torch.where(torch.arange(400) % 2 == 0, 0.8, -0.8)[:, None]
    assert scale_factor(noise, shift - noise).item() == pytest.approx((1 + 0.64) ** 0.5, abs=0.04)


@pytest.mark.parametrize(("gradient", "factor"), [(0.0, 2.0), (1.0, 2.0), (-100.0, 1.0)])
def test_factors_stay_within_bounds(gradient, factor):
    """Also where the log-posterior is flat or convex and its curvature has the wrong sign."""
    noise = torch.randn(32, 10, 1, generator=torch.Generator().manual_seed(1))
    assert scale_factor(noise, gradient * noise).item() == factor


def test_gradients_are_those_of_the_joint_density(make_program, make_cells):
    program, cells = make_program(torch.float64), make_cells(dtype=torch.float64)
    noise, gradient = gradients(program, cells, ["z", "l", "d"])["z"]
    with evaluation_mode(program):
        latents = draw_latents(program, cells, fit_scale._N_SAMPLES, as_trained=True)
        normal = normal_in(latents.trace.nodes["z"]["fn"])
        z = latents.trace.nodes["z"]["value"]
        torch.testing.assert_close(normal.loc + normal.scale * noise, z)

        def log_joint(step):
            trace = model_trace(program.model, cells, latents.at("z", z + step))
            trace.compute_log_prob()
            return sum(site["unscaled_log_prob"] for site in random_sites(trace).values())

        for k in range(3):
            step = 1e-5 * torch.eye(3, dtype=torch.float64)[k]
            slope = (log_joint(step) - log_joint(-step)) / 2e-5
            torch.testing.assert_close(gradient[..., k], slope * normal.scale[..., k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("site", "to_normal"), [("l", torch.log), ("d", torch.logit)])
def test_gradients_of_depths_are_those_of_their_normal(make_program, make_cells, site, to_normal):
    """By differences of log p(counts, latents) plus the log-slope of the transformation."""
    program, cells = make_program(torch.float64), make_cells(dtype=torch.float64)
    noise, gradient = gradients(program, cells, ["z", "l", "d"])[site]
    with evaluation_mode(program):
        latents = draw_latents(program, cells, fit_scale._N_SAMPLES, as_trained=True)
        normal, value = normal_behind(latents.trace.nodes[site]["fn"]), latents.trace.nodes[site]["value"]
        at = to_normal(value)
        torch.testing.assert_close(normal.loc + normal.scale * noise[..., 0], at)

        def log_joint(step):
            moved = (at + step).exp() if site == "l" else (at + step).sigmoid()
            log_slope = at + step if site == "l" else (moved * (1 - moved)).log()
            trace = model_trace(program.model, cells, latents.at(site, moved))
            trace.compute_log_prob()
            return sum(each["unscaled_log_prob"] for each in random_sites(trace).values()) + log_slope

        slope = (log_joint(1e-5) - log_joint(-1e-5)) / 2e-5
        torch.testing.assert_close(gradient[..., 0], slope * normal.scale, rtol=1e-4, atol=1e-5)


def test_depths_of_modalities_that_were_not_measured_are_left_alone(build):
    model = build()
    model.train(max_epochs=2, progress_bar=False)
    # Rows: nothing, RNA only, ATAC only, both. Columns: library size, cell factor.
    assert (model.program.depth_scale[[0, 0, 1, 2], [0, 1, 1, 0]] == 1).all()
    assert (model.program.depth_scale[[1, 2, 3, 3], [0, 1, 0, 1]] > 1).any()


def test_known_library_sizes_have_no_factor(build):
    model = build(library="observed")
    model.train(max_epochs=1, progress_bar=False)
    assert (model.program.depth_scale[:, 0] == 1).all()


def test_patterns_of_few_cells_keep_their_standard_deviations(build, monkeypatch):
    model = build()
    monkeypatch.setattr(fit_scale, "_FEWEST", 20)
    model.train(max_epochs=2, progress_bar=False, train_size=1.0)
    # 30 paired cells, 15 of either modality; no row but that of paired cells is fitted.
    assert (model.program.posterior_scale[:3] == 1).all()
    assert (model.program.posterior_scale[3] != 1).any()


def test_a_posterior_that_is_not_normal_is_left_alone(build):
    class Flow(MultiVIProgram):
        def mix(self, experts):
            loc, scale = self.averaged(experts)
            base = dist.Normal(loc, scale).to_event(1)
            return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(0.0, 2.0)])

    model = build(program_class=Flow)
    model.train(max_epochs=1, progress_bar=False)
    assert (model.program.posterior_scale == 1).all()


def test_further_training_fits_anew_and_a_failure_restores(build):
    model = build()
    model.train(max_epochs=2, progress_bar=False)
    before = model.program.posterior_scale.clone()
    assert (before[1:] != 1).any()

    def fail(*_: object) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        model.train(max_epochs=1, progress_bar=False, callbacks=[fail])
    model.program.posterior_scale.fill_(7.0)
    model.train(max_epochs=1, progress_bar=False)
    assert (model.program.posterior_scale <= 2).all()


def test_one_minibatch_of_cells_at_a_time_changes_nothing(fitted, monkeypatch):
    program, cells = MultiVIProgram(fitted.program.config), Minibatches(fitted._table)
    program.load_state_dict(fitted.program.state_dict())
    found = []
    for at_once in (7, 1000):
        monkeypatch.setattr(fit_scale, "_AT_ONCE", at_once)
        fit_posterior_scale(program, cells)
        found.append(torch.cat([program.posterior_scale, program.depth_scale], 1))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


class KnownFactor(MultiVIProgram):
    """The cell factor is a number, observed in the model, which the guide does not draw."""

    def model(self, cells):
        pyro.condition(super().model, {"d": torch.full((len(cells),), 0.3)})(cells)

    def guide(self, cells):
        pyro.poutine.block(super().guide, hide=["d"])(cells)


class WithoutAccessibility(MultiVIProgram):
    """The counts of ATAC are left out of the model; their encoder is not trained by them."""

    def model(self, cells):
        pyro.poutine.block(super().model, hide=["y"])(cells)


@pytest.mark.filterwarnings("ignore:Parameters of")
@pytest.mark.parametrize("program_class", [KnownFactor, WithoutAccessibility])
def test_a_site_that_a_handler_takes_away_is_not_calibrated(build, program_class):
    model = build(program_class=program_class)
    model.train(2, batch_size=32, progress_bar=False)
    assert model.is_trained
    assert (model.program.posterior_scale[1:] >= 1).all()
    assert np.isfinite(model.get_normalized_expression(n_samples=3, use_z_mean=False, return_numpy=True)).all()
