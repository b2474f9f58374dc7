"""States given one modality, against those of cells that have no other."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.posterior.engine.draws import draw

PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 30), slice(30, 45), slice(45, 60)


class ProductOfExperts(MultiVIProgram):
    """q(z) is the product of the prior and the measured experts."""

    def averaged(self, experts):
        weights = torch.stack([expert.measured[:, None] / expert.scale.square() for expert in experts.values()])
        locs = torch.stack([expert.loc for expert in experts.values()])
        precision = 1 + weights.sum(0)
        return (weights * locs).sum(0) / precision, precision.rsqrt()


@pytest.mark.parametrize("program_class", [MultiVIProgram, ProductOfExperts])
def test_a_modality_alone_is_mixed_and_corrected_as_all_are(build, program_class):
    model = build(program_class=program_class)
    model.train(max_epochs=2, progress_bar=False)
    model.program.posterior_scale.copy_(torch.arange(1.0, 5.0)[:, None])
    given = {"give_mean": False, "n_samples": 3}
    for modality, only in (("expression", RNA_ONLY), ("accessibility", ATAC_ONLY)):
        for asked in ({}, {"return_dist": True}, given):
            joint, alone = (model.get_latent_representation(modality=each, **asked) for each in ("joint", modality))
            np.testing.assert_array_equal(np.asarray(alone)[..., only, :], np.asarray(joint)[..., only, :])
    cells = model.minibatch()
    mean, variance = model.get_latent_representation(modality="expression", return_dist=True)
    with torch.no_grad():
        hidden = model.program.eval().encode(cells, cells.design)
        expert = model.program.experts(cells, cells.design, hidden)["expression"]
    precision, prior = (part.numpy() for part in (expert.scale**-2, expert.scale * 0))
    if program_class is ProductOfExperts:
        prior = prior + 1
    expected = expert.loc.numpy() * precision / (prior + precision)
    np.testing.assert_allclose(mean[PAIRED], expected[PAIRED], rtol=1e-5)
    np.testing.assert_allclose(variance[PAIRED], 1 / (prior + precision)[PAIRED], rtol=1e-5)


class Shifted(MultiVIProgram):
    """The state of each cell lies around a number of its own and one that all cells share."""

    def guide_shared(self):
        self.shared = pyro.sample("shared", dist.Normal(3.0, 2.0))

    def region_factors(self):
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        return super().region_factors()

    def z_prior(self, s):
        pyro.sample("own", dist.Normal(torch.zeros(len(s)), 1.0))
        return super().z_prior(s)

    def mix(self, experts):
        q = super().mix(experts).base_dist
        own = pyro.sample("own", dist.Normal(torch.full((len(q.loc),), 0.5), 2.0))
        return dist.Normal(q.loc + (self.shared + own)[..., None], q.scale).to_event(1)

    def guide_extra(self, cells, s):
        pyro.sample("type", dist.Categorical(torch.ones(len(cells), 3)))  # has no mean

    def observe_extra(self, cells, z, s):
        pyro.sample("type", dist.Categorical(torch.ones(len(cells), 3)))


def test_a_state_that_depends_on_other_latents(build):
    model, plain = build(program_class=Shifted), build()
    plain.program.load_state_dict(model.program.state_dict())
    model.is_trained = plain.is_trained = True
    expected, variance = plain.get_latent_representation(return_dist=True)
    for seed in (1, 2):
        torch.manual_seed(seed)
        found = model.get_latent_representation(return_dist=True)
        np.testing.assert_allclose(found[0], expected + 3.5, rtol=1e-4)
        np.testing.assert_array_equal(found[1], variance)
    drawn = model.get_latent_representation(give_mean=False, n_samples=2000)
    np.testing.assert_allclose(drawn.var(0), variance + 8, rtol=0.2)
    again = draw(model.program, model.minibatch(), ("z",), n_samples=2000)["z"]
    np.testing.assert_array_equal(drawn, again.numpy())


class Typed(MultiVIProgram):
    """The state of each cell comes from one of three types, which the guide infers beside it."""

    offset = 0.0

    def z_prior(self, s):
        c = pyro.sample("c", dist.Categorical(s.new_ones(s.shape[-2], 3)))
        centres = torch.tensor([-1.0, 0.0, 1.0])[c][..., None].expand(*c.shape, self.config.latent)
        return dist.Normal(centres, 1.0).to_event(1)

    def mix(self, experts):
        q = super().mix(experts).base_dist
        c = pyro.sample("c", dist.Categorical(torch.ones(len(q.loc), 3)))
        return dist.Normal(q.loc + self.offset * c[..., None], q.scale).to_event(1)


class TypedState(Typed):
    """The same where the state is inferred given the type."""

    offset = 1.0


def test_a_category_beside_the_state_needs_no_mean(build):
    model, plain, given = build(program_class=Typed), build(), build(program_class=TypedState)
    for each in (model, plain, given):
        each.program.load_state_dict(model.program.state_dict())
        each.is_trained = True
    np.testing.assert_array_equal(model.get_latent_representation(), plain.get_latent_representation())
    with pytest.raises(ValueError, match="'c' has no mean: ask for draws"):
        given.get_latent_representation()
    drawn = given.get_latent_representation(give_mean=False, n_samples=2000).mean(0)
    np.testing.assert_allclose(drawn, plain.get_latent_representation() + 1, atol=0.15)
