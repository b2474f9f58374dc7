"""Draws with corrected standard deviations."""

from __future__ import annotations

import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.posterior.engine.draws import draw, draw_latents, mean_latents
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.posterior.engine.posterior_scale import normal_in
from pyro_multivi.traces import evaluation_mode


def test_draws_are_scaled_around_the_same_means(make_program, make_cells):
    program, cells = make_program(), make_cells((2, 3, 4))
    with evaluation_mode(program):
        plain = draw_latents(program, cells, 50).trace.nodes["z"]
        loc, mean = normal_in(plain["fn"]).loc, mean_latents(program, cells).trace.nodes["z"]["value"]
        program.posterior_scale.copy_(torch.tensor([9.0, 0.5, 2.0, 1.5])[:, None].expand(4, 3))
        scaled = draw_latents(program, cells, 50).trace.nodes["z"]
        as_trained = draw_latents(program, cells, 50, as_trained=True).trace.nodes["z"]
        torch.testing.assert_close(mean_latents(program, cells).trace.nodes["z"]["value"], mean)
    factor = torch.tensor([1.5] * 2 + [0.5] * 3 + [2.0] * 4)[:, None]
    torch.testing.assert_close(scaled["value"] - loc, factor * (plain["value"] - loc))
    torch.testing.assert_close(normal_in(scaled["fn"]).scale, factor * normal_in(plain["fn"]).scale)
    assert torch.equal(as_trained["value"], plain["value"])
    torch.testing.assert_close(draw(program, cells, ("z",), 50)["z"], scaled["value"])


def test_elbo_and_marginal_likelihood_are_those_of_the_guide(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = elbo_parts(program, [cells], 3).elbo, marginal_likelihood(program, [cells], 20).log_likelihood
    program.posterior_scale.fill_(1.7)
    assert (elbo_parts(program, [cells], 3).elbo == before[0]).all()
    assert (marginal_likelihood(program, [cells], 20).log_likelihood == before[1]).all()


def test_a_model_saved_before_has_factors_of_one(make_program):
    program = make_program()
    state = {name: value for name, value in program.state_dict().items() if name != "posterior_scale"}
    other = MultiVIProgram(program.config)
    other.posterior_scale.fill_(3.0)
    other.load_state_dict(state)
    assert (other.posterior_scale == 1).all()
