"""Draws with corrected standard deviations."""

from __future__ import annotations

import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.posterior.engine.draws import draw, draw_latents, mean_latents
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.posterior.engine.posterior_scale import normal_behind, normal_in
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


def test_draws_of_depths_are_scaled_on_the_scale_of_their_normal(make_program, make_cells):
    program, cells = make_program(), make_cells((2, 3, 4))
    scales = {"l": (torch.log, 0), "d": (torch.logit, 1)}
    with evaluation_mode(program):
        plain = draw_latents(program, cells, 50).trace.nodes
        means = {site: mean_latents(program, cells).trace.nodes[site]["value"] for site in scales}
        program.depth_scale.copy_(torch.tensor([[9.0, 9.0], [2.0, 1.0], [1.0, 3.0], [1.5, 1.2]]))
        scaled = draw_latents(program, cells, 50).trace.nodes
        as_trained = draw_latents(program, cells, 50, as_trained=True).trace.nodes
        for site, mean in means.items():
            assert torch.equal(mean_latents(program, cells).trace.nodes[site]["value"], mean)
    # Paired, RNA-only and ATAC-only cells.
    code = torch.tensor([3] * 2 + [1] * 3 + [2] * 4)
    for site, (normal, place) in scales.items():
        loc = normal_behind(plain[site]["fn"]).loc
        away, found = (normal(nodes[site]["value"]) - loc for nodes in (plain, scaled))
        torch.testing.assert_close(found, program.depth_scale[code, place] * away, rtol=1e-3, atol=1e-4)
        assert torch.equal(as_trained[site]["value"], plain[site]["value"])
        # Importance weights are of the draws' own density.
        scale = normal_behind(plain[site]["fn"]).scale
        torch.testing.assert_close(normal_behind(scaled[site]["fn"]).scale, program.depth_scale[code, place] * scale)


def test_elbo_and_marginal_likelihood_are_those_of_the_guide(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = elbo_parts(program, [cells], 3).elbo, marginal_likelihood(program, [cells], 20).log_likelihood
    program.posterior_scale.fill_(1.7)
    program.depth_scale.fill_(1.7)
    assert (elbo_parts(program, [cells], 3).elbo == before[0]).all()
    assert (marginal_likelihood(program, [cells], 20).log_likelihood == before[1]).all()


def test_a_model_saved_before_has_factors_of_one(make_program):
    program = make_program()
    state = program.state_dict()
    del state["posterior_scale"], state["depth_scale"]
    other = MultiVIProgram(program.config)
    other.posterior_scale.fill_(3.0)
    other.depth_scale.fill_(3.0)
    other.load_state_dict(state)
    assert (other.posterior_scale == 1).all()
    assert (other.depth_scale == 1).all()
