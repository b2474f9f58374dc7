"""Predicted depth of a modality that was not measured, and where it is used."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
import torch

from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.posterior.engine.decode import Average, decode
from pyro_multivi.posterior.engine.depth_regression import (
    DepthRegression,
    features,
    mean_depth,
    normal_in,
    predicted_depth,
    regression_buffer,
)
from pyro_multivi.posterior.engine.draws import draw, draw_latents
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.posterior.engine.replicates import hide, replicate
from pyro_multivi.posterior.quantities.estimates import Quantity, blocks
from pyro_multivi.traces import evaluation_mode

PAIRED, LACKS_ATAC, LACKS_RNA = slice(0, 5), slice(5, 8), slice(8, 12)  # of make_cells' cells


def _with_regressions(program, sd=0.5):
    generator = torch.Generator().manual_seed(0)
    for modality in MODALITIES:
        coefficients = torch.randn(len(regression_buffer(program, modality)) - 1, generator=generator) / 2
        DepthRegression(coefficients, torch.tensor(sd)).store(program, modality)
    return program


@pytest.mark.parametrize("scale", [0.01, 0.8, 3.0])
@pytest.mark.parametrize("loc", [-4.0, 0.3, 2.5])
def test_mean_depths_are_those_of_the_integrals(loc, scale):
    normal = dist.Normal(torch.tensor([loc]), torch.tensor([scale]))

    def at(x):
        return scipy.stats.norm.pdf(x, loc, scale) / (1 + np.exp(-x))

    ends = (loc - 12 * scale, loc + 12 * scale)
    assert mean_depth(ATAC, normal).item() == pytest.approx(scipy.integrate.quad(at, *ends, limit=500)[0], rel=1e-4)
    assert mean_depth(RNA, normal).item() == pytest.approx(scipy.stats.lognorm.mean(scale, scale=np.exp(loc)), rel=1e-5)


def test_a_depth_is_predicted_from_the_other_the_state_and_the_batch(make_program, make_cells):
    program, cells = _with_regressions(make_program()), make_cells()
    program.rna_log_depth.fill_(2.0)
    program.atac_log_depth.fill_(1.0)
    with evaluation_mode(program):
        loc = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"]).loc[0]
        found = {modality: predicted_depth(program, cells, modality, loc) for modality in MODALITIES}
    x, y = (counts.to_dense() if hasattr(counts, "to_dense") else counts for counts in (cells.x, cells.y))
    z, batch = loc.numpy(), cells.design[:, :2].argmax(1).numpy()
    for modality, other in (
        (ATAC, np.log(np.maximum(x.numpy().sum(1), 1)) - 2.0),
        (RNA, np.log1p((y.numpy() > 0).sum(1)) - 1.0),
    ):
        stored = regression_buffer(program, modality).numpy()
        sd, slope, of_z, of_batch = stored[0], stored[1], stored[2:-2], stored[-2:]
        expected = slope * other + z @ of_z + of_batch[batch]
        np.testing.assert_allclose(found[modality].loc, expected, rtol=1e-4, atol=1e-5)
        assert found[modality].scale.unique().item() == pytest.approx(sd)


def test_only_depths_that_were_not_measured_change(make_program, make_cells):
    program, cells = make_program(), make_cells()
    sites = ("z", "l", "d", "rho", "p")
    before = draw(program, cells, sites, n_samples=200)
    found = draw(_with_regressions(program), cells, sites, n_samples=200)
    for site in ("z", "rho", "p"):
        values = [drawn[site].dense() if site in ("rho", "p") else drawn[site] for drawn in (before, found)]
        assert torch.equal(*values)
    for modality, changed in ((RNA, LACKS_RNA), (ATAC, LACKS_ATAC)):
        site = modality.depth
        rest = torch.ones(12, dtype=torch.bool)
        rest[changed] = False
        assert torch.equal(found[site][:, rest], before[site][:, rest])
        with evaluation_mode(program):
            loc = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"]).loc[0]
            expected = predicted_depth(program, cells, modality, loc)
        depth = found[site][:, changed].double()
        normal = torch.logit(depth) if modality.binary else depth.log()
        for number, cell in enumerate(range(12)[changed]):
            of_cell = scipy.stats.norm(expected.loc[cell].item(), 0.5).cdf(normal[:, number].numpy())
            assert scipy.stats.kstest(of_cell, "uniform").pvalue > 1e-3
    # Each cell has noise of its own, and few draws are the first of many.
    torch.testing.assert_close(draw(program, cells, ("d",), n_samples=3)["d"], found["d"][:3])
    assert abs(np.corrcoef(torch.logit(found["d"][:, LACKS_ATAC]).T.numpy())[0, 1]) < 0.3


def test_a_cell_of_which_nothing_was_measured_keeps_the_priors(make_program, make_cells):
    program = _with_regressions(make_program())
    nothing = hide(hide(make_cells((3, 0, 0)), RNA), ATAC)
    found = draw(program, nothing, ("l", "d"), n_samples=5)
    for modality in MODALITIES:
        regression_buffer(program, modality).zero_()
    for site, values in draw(program, nothing, ("l", "d"), n_samples=5).items():
        assert torch.equal(found[site], values)


def test_estimates_are_multiplied_with_the_mean_or_the_draws(make_program, make_cells):
    program, cells = _with_regressions(make_program()), make_cells()

    def estimate(quantity, average):
        with evaluation_mode(program):
            decoded = decode(program, cells, average, quantity.sites)
            return np.concatenate([found["mean"] for _, found in blocks(decoded, quantity, average, 0)], 1)

    with evaluation_mode(program):
        loc = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"]).loc[0]
    for modality, lacks in ((RNA, LACKS_RNA), (ATAC, LACKS_ATAC)):
        site, depth = modality.decoded, modality.depth
        ratio = estimate(Quantity(site, by_cell=depth), Average()) / estimate(Quantity(site), Average())
        with evaluation_mode(program):
            mean = mean_depth(modality, predicted_depth(program, cells, modality, loc)).numpy()
        np.testing.assert_allclose(ratio[lacks], np.repeat(mean[lacks, None], ratio.shape[1], 1), rtol=1e-4)
        many = Average(n_samples=50)
        drawn = draw(program, cells, (site, depth), n_samples=50)
        expected = (drawn[site].dense() * drawn[depth][..., None]).mean(0)
        np.testing.assert_allclose(estimate(Quantity(site, by_cell=depth), many), expected, rtol=1e-4)


def test_densities_do_not_change(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = [marginal_likelihood(program, [cells], 20), elbo_parts(program, [cells], 20)]
    _with_regressions(program)
    after = [marginal_likelihood(program, [cells], 20), elbo_parts(program, [cells], 20)]
    np.testing.assert_array_equal(after[0].log_likelihood, before[0].log_likelihood)
    for kind in ("log_likelihood", "kl"):
        np.testing.assert_equal(getattr(after[1], kind), getattr(before[1], kind))


@pytest.mark.parametrize("hidden", MODALITIES, ids=lambda modality: modality.key)
def test_depth_of_a_hidden_modality(make_program, make_cells, hidden):
    program, cells = _with_regressions(make_program()), make_cells((6, 0, 0))
    depth = hidden.depth

    def depth_of(hidden_depth):
        [(_, found)] = replicate(program, cells, 10, hidden=hidden.counts, hidden_depth=hidden_depth)
        fn = found[hidden.counts].fn
        return fn.cell_factor if hidden.binary else fn.mean.sum(-1)

    known = draw(program, cells, (depth,), 10)[depth]
    predicted = draw(program, hide(cells, hidden), (depth,), 10)[depth]
    with evaluation_mode(program):
        prior = draw_latents(program, hide(cells, hidden), 10).trace.nodes[depth]["value"]
    by_prior = depth_of("prior")
    for name, expected in (("observed", known), ("predicted", predicted)):
        ratio = depth_of(name) / by_prior
        torch.testing.assert_close(ratio, (expected / prior).expand(ratio.shape), rtol=1e-3, atol=1e-4)


def test_known_depths_stay(make_program, make_cells):
    program = _with_regressions(make_program(library="observed"))
    cells = make_cells()
    cells = cells.replace(atac_size=torch.full((12,), 0.25))
    found = draw(program, cells, ("l", "d"), n_samples=3)
    assert bool((found["d"] == 0.25).all())
    with evaluation_mode(program):
        assert torch.equal(found["l"], draw_latents(program, cells, 3).trace.nodes["l"]["value"].expand(3, 12))


def test_features_follow_draws(make_program, make_cells):
    """The mean of z may differ from draw to draw, where the guide draws what all cells share."""
    program, cells = make_program(), make_cells()
    loc = torch.randn(4, 12, program.config.latent)
    found = features(program, cells, ATAC, loc)
    assert found.shape == (4, 12, 1 + program.config.latent + program.config.n_batch)
    assert torch.equal(found[2], features(program, cells, ATAC, loc[2]))
