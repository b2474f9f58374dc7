"""Variants of the program: overridden edges, and a third modality by the two hooks."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import kl_divergence

from pyro_multivi import MultiVIProgram
from pyro_multivi.distributions.logit_normal import LogitNormal
from pyro_multivi.traces import measure


class ProteinProgram(MultiVIProgram):
    """A third modality and its own latent, by the two hooks alone."""

    def observe_extra(self, cells, z, s):
        background = pyro.sample("background", dist.LogNormal(torch.zeros(len(cells)), 1.0))
        rate = (background + z.exp().sum(-1)).unsqueeze(-1).expand(*z.shape[:-1], 2)
        pyro.sample("proteins", dist.Poisson(rate).to_event(1), obs=torch.ones(len(cells), 2))

    def guide_extra(self, cells, s):
        pyro.sample("background", dist.LogNormal(torch.zeros(len(cells)), 0.5))


def test_an_extra_modality_enters_elbo_and_terms(make_program, make_cells):
    plain, cells = make_program(), make_cells()
    extended = ProteinProgram(plain.config).eval()
    extended.load_state_dict(plain.state_dict())
    terms = measure(extended, cells)
    assert set(terms.kl) == {"z", "l", "d", "background"}
    assert set(terms.log_likelihood) == {"x", "y", "proteins"}
    # KL(LogNormal(0, 0.5) | LogNormal(0, 1)) of each of 12 cells.
    one = 0.5 * (0.25 - 1) - torch.tensor(0.5).log().item()
    assert terms.kl["background"] == pytest.approx(12 * one, rel=1e-5)
    assert terms.n_measured["proteins"] == 12


def test_an_overridden_centre_of_the_cell_factor_is_used(make_program, make_cells):
    class Half(MultiVIProgram):
        def cell_factor(self, cells, hidden):
            return cells.design.new_full((len(cells),), 0.5)

    cells, program = make_cells(), Half(make_program().config)
    q = poutine.trace(program.guide).get_trace(cells).nodes["d"]["fn"]
    assert torch.equal(q.loc[cells.has_atac], torch.zeros(int(cells.has_atac.sum())))


@pytest.mark.parametrize(
    ("likelihood", "own"),
    [
        ("bernoulli", dist.Beta(2.0, 3.0)),
        ("bernoulli", LogitNormal(torch.tensor(1.0), torch.tensor(2.0))),
        ("poisson", dist.Gamma(2.0, 3.0)),
        ("poisson", dist.LogNormal(1.0, 2.0)),
    ],
)
def test_an_overridden_prior_of_the_cell_factor_is_used(make_program, make_cells, likelihood, own):
    """Of any family; the posterior of cells without ATAC is it, where it is of its family."""

    class Mine(MultiVIProgram):
        def cell_factor_prior(self, cells, s):
            return own.expand([len(cells)])

    cells, program = make_cells(), Mine(make_program(accessibility_likelihood=likelihood).config)
    loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)
    assert bool(loss.isfinite())
    q = poutine.trace(program.guide).get_trace(cells).nodes["d"]["fn"]
    if type(q) is type(own):
        assert q.base_dist.loc[~cells.has_atac].unique().tolist() == [1.0]
        assert q.base_dist.scale[~cells.has_atac].unique().tolist() == [2.0]


@pytest.mark.parametrize("own", [dist.LogNormal(1.0, 2.0), dist.Gamma(2.0, 3.0)], ids=["same family", "another"])
def test_an_overridden_prior_of_the_library_is_used(make_program, make_cells, own):
    """Cells without RNA have no divergence from it, where the posterior can be of its family."""

    class Mine(MultiVIProgram):
        def library_prior(self, cells, s):
            return own

    cells, program = make_cells(), Mine(make_program().config)
    loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)
    assert bool(loss.isfinite())
    guide = poutine.trace(program.guide).get_trace(cells)
    q = guide.nodes["l"]["fn"].base_dist
    prior = own.base_dist if isinstance(own, dist.LogNormal) else dist.Normal(*program.library_moments(cells.design))
    for found, expected in ((q.loc, prior.loc), (q.scale, prior.scale)):
        assert torch.equal(found[~cells.has_rna], expected.expand(len(cells))[~cells.has_rna])
        assert not torch.isclose(found[cells.has_rna], expected.expand(len(cells))[cells.has_rna]).any()
    if isinstance(own, dist.LogNormal):
        assert not kl_divergence(guide.nodes["l"]["fn"], own.expand([len(cells)]))[~cells.has_rna].any()


def test_an_overridden_edge_is_used(make_program, make_cells):
    class Tight(MultiVIProgram):
        def z_prior(self, s):
            return dist.Normal(s.new_zeros(len(s), self.config.latent), 0.1).to_event(1)

    cells, program = make_cells(), Tight(make_program().config)
    fn = poutine.trace(program.model).get_trace(cells).nodes["z"]["fn"]
    assert torch.equal(fn.stddev, torch.full((12, 3), 0.1))


def test_a_likelihood_that_is_no_event_over_features_is_named(make_program, make_cells):
    class NoEvent(MultiVIProgram):
        def expression_dist(self, l, rho, theta, pi_logits):
            return dist.Poisson(l.unsqueeze(-1) * rho)

    cells, program = make_cells(), NoEvent(make_program().config)
    with pytest.raises(
        ValueError, match=r"is Poisson of batch shape \(12, \d+\) and no event .*\.to_event\(1\) to what"
    ):
        poutine.trace(program.model).get_trace(cells)
