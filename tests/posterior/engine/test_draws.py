"""Draws of the latents, replayed by the model."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.base import CellDistribution
from pyro_multivi.posterior.engine.draws import (
    draw,
    draw_latents,
    feature_blocks,
    mean_latents,
    region_factors,
    replay,
)
from pyro_multivi.posterior.engine.replicates import replicate
from pyro_multivi.traces import evaluation_mode

RNA_ONLY = slice(5, 8)  # of make_cells' 5 paired, 3 RNA-only, 4 ATAC-only cells


def at(cells, index):
    index = torch.as_tensor(index)
    return cells.replace(
        index=cells.index[index],
        x=cells.x.select_rows(index),
        y=cells.y.select_rows(index),
        has_rna=cells.has_rna[index],
        has_atac=cells.has_atac[index],
        design=cells.design[index],
        label=cells.label[index],
    )


def other_batch(cells):
    design = cells.design.clone()
    design[:, :2] = 1 - design[:, :2]
    return design


def test_shapes_and_what_the_draws_are_of(make_program, make_cells):
    program, cells = make_program(), make_cells()
    drawn = draw(program, cells, ("s", "z", "l", "d", "rho", "p", "x", "y"), n_samples=4)
    shapes = {name: tuple(value.shape) for name, value in drawn.items()}
    one = (4, 12)
    assert shapes == {
        "s": (*one, 3), "z": (*one, 3), "l": one, "d": one,
        "rho": (*one, 7), "p": (*one, 9), "x": (*one, 7), "y": (*one, 9),
    }  # fmt: skip
    assert isinstance(drawn["rho"], Readout)
    assert not drawn["rho"].requires_grad
    with torch.no_grad():
        expected = program.expression(drawn["z"], cells.design).rho.dense()
    torch.testing.assert_close(drawn["rho"].dense(), expected)
    torch.testing.assert_close(drawn["rho"].dense().sum(-1), torch.ones(one))


def test_draws_follow_the_guide(make_program, make_cells):
    program, cells = make_program(), make_cells()
    drawn = draw(program, cells, ("z", "l", "d"), n_samples=4000)
    with evaluation_mode(program):
        nodes = pyro.poutine.trace(program.guide).get_trace(cells).nodes
    q = nodes["z"]["fn"]
    torch.testing.assert_close(drawn["z"].mean(0), q.mean, atol=0.1, rtol=0.0)
    torch.testing.assert_close(drawn["z"].std(0), q.variance.sqrt(), atol=0.06, rtol=0.0)
    log_l = nodes["l"]["fn"].base_dist
    torch.testing.assert_close(drawn["l"].log().mean(0), log_l.loc, atol=0.1, rtol=0.0)
    logit_d = nodes["d"]["fn"].base_dist
    torch.testing.assert_close(drawn["d"].logit().mean(0), logit_d.loc, atol=0.1, rtol=0.0)
    torch.testing.assert_close(drawn["d"].logit().std(0), logit_d.scale, atol=0.06, rtol=0.0)
    # Where ATAC was not measured it follows its prior.
    prior = program.cell_factor_prior(cells, cells.design).base_dist
    torch.testing.assert_close(logit_d.loc[RNA_ONLY], prior.loc[RNA_ONLY])
    torch.testing.assert_close(logit_d.scale[RNA_ONLY], prior.scale[RNA_ONLY])
    with evaluation_mode(program):
        mean = mean_latents(program, cells).trace.nodes["d"]["value"][0]
    torch.testing.assert_close(drawn["d"].mean(0), mean, atol=0.02, rtol=0.0)


def test_a_cells_draws_do_not_depend_on_the_others(make_program, make_cells):
    program, cells = make_program(modality_weights="cell"), make_cells()
    whole = draw(program, cells, ("z", "l", "d", "p"), n_samples=6, seed=9)
    part = draw(program, at(cells, [6, 1]), ("z", "l", "d", "p"), n_samples=3, seed=9)
    for name, value in part.items():
        torch.testing.assert_close(value + 0, (whole[name] + 0)[:3][:, [6, 1]], msg=name)
    assert not torch.equal(draw(program, cells, ("z",), 6, seed=8)["z"], whole["z"])


def test_another_batch_changes_the_model_alone(make_program, make_cells):
    program, cells = make_program(encode_covariates=True), make_cells()
    factual = draw(program, cells, ("s", "z", "l", "rho", "p"), n_samples=5)
    there = draw(program, cells, ("s", "z", "l", "rho", "p"), 5, intervene={"s": other_batch(cells)})
    assert torch.equal(there["z"], factual["z"])
    assert torch.equal(there["l"], factual["l"])
    assert torch.equal(there["s"][0], other_batch(cells))
    with torch.no_grad():
        expected = program.expression(factual["z"], other_batch(cells)).rho.dense()
    torch.testing.assert_close(there["rho"].dense(), expected)
    assert (there["p"].dense() - factual["p"].dense()).abs().max() > 1e-3
    # The cells re-encoded under that batch would have had another state.
    moved = draw(program, cells.replace(design=other_batch(cells)), ("z",), n_samples=5)
    assert (moved["z"] - factual["z"]).abs().max() > 1e-3


def test_any_site_can_be_forced(make_program, make_cells):
    program, cells = make_program(), make_cells()
    z = torch.zeros(12, 3)
    found = draw(program, cells, ("z", "rho"), n_samples=2, intervene={"z": z})
    assert torch.equal(found["z"], z.expand(2, 12, 3))
    with torch.no_grad():
        torch.testing.assert_close(found["rho"].dense()[1], program.expression(z, cells.design).rho.dense())


def test_counts_are_predicted_for_measured_and_missing_alike(make_program, make_cells):
    program, cells = make_program(), make_cells()
    drawn = draw(program, cells, ("x", "y", "l", "rho", "d", "p"), n_samples=3000)
    assert not torch.equal(drawn["x"][0], cells.x.to_dense())
    for modality in (slice(0, 5), RNA_ONLY, slice(8, 12)):
        detected = drawn["y"][:, modality].mean((0, 1))
        r = program.region_factors().detach()
        expected = (drawn["d"][..., None] * drawn["p"].dense() * r)[:, modality].mean((0, 1))
        torch.testing.assert_close(detected, expected, atol=0.03, rtol=0.0)
    again = draw(program, cells, ("x",), n_samples=3000)
    assert torch.equal(again["x"], drawn["x"])


@pytest.mark.parametrize("sites", [("rho", "p"), ("x", "y")])
@pytest.mark.parametrize("shape", [(12, 3), (1, 12, 3), (3,)], ids=str)
def test_a_state_forced_in_every_draw_alike_broadcasts(make_program, make_cells, sites, shape):
    program, cells, z = make_program(), make_cells(), torch.linspace(-1.0, 1.0, 3).expand(shape)
    once = draw(program, cells, sites, n_samples=5, intervene={"z": z})
    repeated = draw(program, cells, sites, n_samples=5, intervene={"z": z.expand(5, 12, 3)})
    for site in sites:
        assert once[site].shape == repeated[site].shape
        torch.testing.assert_close(once[site] + 0, repeated[site] + 0)


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_of_a_known_state(make_program, make_cells, parallel):
    program, cells = make_program(), make_cells()
    known = pyro.do(pyro.poutine.uncondition(program.model), {"z": torch.zeros(12, 3)})
    guide = pyro.poutine.block(program.guide, hide=["z"])
    predicted = pyro.infer.Predictive(known, guide=guide, num_samples=4, parallel=parallel)(cells)
    assert predicted["x"].shape == (4, 12, 7)


def test_no_likelihood_is_evaluated_and_nothing_wide_is_made(make_program, make_cells, monkeypatch):
    program, cells = make_program(), make_cells()

    def never(*_, **__):
        raise AssertionError("made something of size cells x features, or a likelihood")

    monkeypatch.setattr(CellDistribution, "log_prob", never)
    monkeypatch.setattr(SparseCounts, "to_dense", never)
    for name in ("dense", "logits"):
        monkeypatch.setattr(Readout, name, never)
    drawn = draw(program, cells, n_samples=3, intervene={"s": other_batch(cells)})
    assert drawn["p"].select(torch.tensor([2, 5])).shape == (3, 12, 2)
    assert drawn["rho"].select(torch.tensor([2, 5])).shape == (3, 12, 2)


@pytest.mark.parametrize("site", ["rho", "p"])
def test_blocks_of_features_are_the_columns_of_all(make_program, make_cells, site):
    drawn = draw(make_program(), make_cells(), (site,), n_samples=2)[site]
    features = torch.tensor([6, 0, 3, 5, 2])
    for values in (drawn, drawn.dense()):
        for chosen, expected in ((None, drawn.dense()), (features, drawn.dense()[..., features])):
            for width in (2, 100):
                found = torch.empty_like(expected)
                for block, part in feature_blocks(values, chosen, width):
                    assert part.shape[-1] <= width
                    found[..., block] = part
                torch.testing.assert_close(found, expected)


class ByHand(MultiVIProgram):
    """A guide of one's own: a Gamma on l, a hierarchy, and a site that all cells share."""

    def guide(self, cells):
        shared = pyro.sample("shared", dist.Normal(1.0, 2.0))
        with pyro.plate("cells", cells.n_total, subsample=cells.index):
            near = dist.Normal(shared * torch.ones(len(cells)), 0.1)
            first = pyro.sample("first", near, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(first[..., None] + torch.zeros(3), 0.1).to_event(1))
            pyro.sample("l", dist.Gamma(torch.full((len(cells),), 50.0), 1.0))
            pyro.sample("d", dist.Delta(torch.full((len(cells),), 0.3)))


def test_an_overridden_guide_is_used(make_program, make_cells):
    program = ByHand(make_program().config)
    cells = make_cells()
    drawn = draw(program, cells, ("z", "l", "d"), n_samples=500)
    # What cells share is one number per draw, the same for any cells.
    state = drawn["z"].mean(-1)
    assert state.std(1).mean() < 0.3
    assert 1.5 < state.mean(1).std() < 2.5
    assert abs(drawn["l"].mean() - 50) < 1
    # The mean over the components holds the shared number and the cell's own.
    few = draw(program, at(cells, [3, 9]), ("z",), n_samples=500)["z"]
    torch.testing.assert_close(few, drawn["z"][:, [3, 9]])


def test_a_guide_without_a_mean_asks_for_draws(make_program, make_cells):
    class Flow(MultiVIProgram):
        def mix(self, experts):
            base = super().mix(experts)
            return dist.TransformedDistribution(base, [dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)])

    program = Flow(make_program().config)
    with evaluation_mode(program), pytest.raises(ValueError, match="'z' has no mean: ask for draws"):
        mean_latents(program, make_cells())
    assert draw(program, make_cells(), ("z",), n_samples=3)["z"].shape == (3, 12, 3)


class ByLength(MultiVIProgram):
    """A program that takes the design for (B, S), as it is in training."""

    def z_prior(self, s):
        assert s.dim() == 2
        return dist.Laplace(torch.zeros(len(s), self.config.latent), 1.0).to_event(1)


def test_the_design_has_no_dimension_of_draws_where_counts_are_drawn(make_program, make_cells):
    program, cells = ByLength(make_program().config), make_cells()
    drawn = draw(program, cells, ("x", "y", "s"), n_samples=5)
    assert [tuple(drawn[site].shape) for site in ("x", "y", "s")] == [(5, 12, 7), (5, 12, 9), (5, 12, 3)]
    for draws, replicates in replicate(program, cells, 5):
        assert replicates["x"].values.shape == (draws.stop - draws.start, 12, 7)


class SharedWithoutMean(MultiVIProgram):
    """Region factors, and an effect of each cell, whose posteriors know no mean."""

    def region_factors(self):
        normal = dist.Normal(torch.zeros(self.config.n_regions), 1.0).to_event(1)
        return pyro.sample("r_logit", normal).sigmoid()

    def guide_shared(self):
        normal = dist.Normal(self.region_logit, 0.1).to_event(1)
        shift = dist.transforms.AffineTransform(0.0, 2.0, event_dim=1)
        pyro.sample("r_logit", dist.TransformedDistribution(normal, [shift]))

    def observe_extra(self, cells, z, s):
        w = pyro.sample("w", dist.StudentT(3.0, torch.zeros(len(cells)), 1.0))
        pyro.deterministic("v", w + z.sum(-1))

    def guide_extra(self, cells, s):
        pyro.sample("w", dist.Cauchy(torch.zeros(len(cells)), 1.0))


def test_latents_without_a_mean_matter_to_what_depends_on_them_alone(make_program, make_cells):
    program, cells = SharedWithoutMean(make_program().config), make_cells()
    plain = MultiVIProgram(program.config)
    plain.load_state_dict(program.state_dict())
    with evaluation_mode(program), evaluation_mode(plain):
        mean, expected = mean_latents(program, cells), mean_latents(plain, cells)
        assert mean.without_mean == ["r_logit", "w"]
        for site in ("rho", "p"):
            found = replay(program, cells, mean, (site,))[site]
            torch.testing.assert_close(found.dense(), replay(plain, cells, expected, (site,))[site].dense())
        for site in ("v", "w", "r_logit", "y"):
            with pytest.raises(ValueError, match="'(r_logit|w)' has no mean: ask for draws"):
                replay(program, cells, mean, ("rho", site))
    with pytest.raises(ValueError, match="'r_logit' has no mean: tests of regions and get_region_factors need one"):
        region_factors(program)


class Assigned(MultiVIProgram):
    def observe_extra(self, cells, z, s):
        c = pyro.sample("c", dist.Categorical(torch.ones(len(cells), 3)))
        pyro.deterministic("v", torch.tensor([1.0, 2.0, 3.0])[c])

    def guide_extra(self, cells, s):
        pyro.sample("c", dist.Categorical(torch.ones(len(cells), 3)))


def test_a_category_has_no_mean_and_matters_to_what_depends_on_it(make_program, make_cells):
    program, cells = Assigned(make_program().config), make_cells()
    with evaluation_mode(program):
        latents = mean_latents(program, cells)
        assert latents.without_mean == ["c"]
        assert replay(program, cells, latents, ("rho", "p"))["rho"].shape == (1, 12, 7)
        for site in ("c", "v"):
            with pytest.raises(ValueError, match="^The guide's distribution of 'c' has no mean: ask for draws"):
                replay(program, cells, latents, ("rho", site))


@pytest.mark.parametrize("n_samples", [0, -1])
def test_too_few_draws(make_program, make_cells, n_samples):
    with pytest.raises(ValueError, match=f"n_samples={n_samples} is not allowed"):
        draw(make_program(), make_cells(), n_samples=n_samples)


@pytest.mark.parametrize("kwargs", [{"sites": ("mu",)}, {"intervene": {"mu": torch.ones(2)}}])
def test_an_unknown_site_is_named_with_those_there_are(make_program, make_cells, kwargs):
    with pytest.raises(ValueError, match="'mu' is no site of this model: choose from s, z, l, rho, x, p, d, y"):
        draw(make_program(), make_cells(), **kwargs)


def test_every_state_is_as_before_also_after_an_error(make_program, make_cells):
    program = make_program(use_batch_norm="both", dropout_rate=0.5).train()
    program.accessibility_decoder.eval()
    modes = [module.training for module in program.modules()]
    cells, generator = make_cells(), torch.get_rng_state()
    first = draw(program, cells, n_samples=2)["rho"].dense()
    # No dropout, no batch statistics: the same numbers from a part of the cells.
    torch.testing.assert_close(draw(program, at(cells, [4]), n_samples=2)["rho"].dense(), first[:, [4]])
    draw(program, cells, ("x", "y"), n_samples=2)
    with pytest.raises(ValueError, match="no site"):
        draw(program, cells, ("nothing",))
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in program.modules()] == modes
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="constraint"):
        dist.Normal(0.0, -1.0)  # validation is on again


def test_latents_are_replayed_many_times(make_program, make_cells):
    program, cells = make_program(), make_cells()
    with evaluation_mode(program):
        latents = draw_latents(program, cells, 3, seed=2)
        here = replay(program, cells, latents, ("rho",))
        there = replay(program, cells, latents, ("rho",), {"s": other_batch(cells)})
        again = replay(program, cells, latents, ("rho",))
    assert torch.equal(here["rho"].dense(), again["rho"].dense())
    assert not torch.equal(here["rho"].dense(), there["rho"].dense())
