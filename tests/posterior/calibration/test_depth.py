"""How deep a modality is where it was not measured: what is predicted, what it is used for, how it is learned."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.integrate
import scipy.sparse as sp
import scipy.stats
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.calibration import fit_depth as learning_depth
from pyro_multivi.posterior.calibration.fit_depth import GRID, fit_depth_regressions, regress
from pyro_multivi.posterior.engine.decode import Average, decode
from pyro_multivi.posterior.engine.depth_regression import Link, features, mean_depth, predicted
from pyro_multivi.posterior.engine.draws import draw, draw_latents
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.posterior.engine.population_mixture import normal_in
from pyro_multivi.posterior.engine.replicates import hide, replicate
from pyro_multivi.posterior.quantities.estimates import Quantity, blocks
from pyro_multivi.traces import evaluation_mode

PAIRED, LACKS_ATAC, LACKS_RNA = slice(0, 5), slice(5, 8), slice(8, 12)  # of make_cells' cells


def _give_links(program, sd=0.5):
    generator = torch.Generator().manual_seed(0)
    for site, name in (("l", "rna_depth_regression"), ("d", "atac_depth_regression")):
        stored = getattr(program, name)
        coefficients = torch.randn(len(stored) - 1, generator=generator) / 2
        Link(coefficients, torch.tensor(sd)).store(program, site)
    return program


@pytest.mark.parametrize("scale", [0.01, 0.8, 3.0])
@pytest.mark.parametrize("loc", [-4.0, 0.3, 2.5])
def test_mean_depths_are_those_of_the_integrals(loc, scale):
    normal = dist.Normal(torch.tensor([loc]), torch.tensor([scale]))

    def at(x):
        return scipy.stats.norm.pdf(x, loc, scale) / (1 + np.exp(-x))

    ends = (loc - 12 * scale, loc + 12 * scale)
    assert mean_depth("d", normal).item() == pytest.approx(scipy.integrate.quad(at, *ends, limit=500)[0], rel=1e-4)
    assert mean_depth("l", normal).item() == pytest.approx(scipy.stats.lognorm.mean(scale, scale=np.exp(loc)), rel=1e-5)


def test_a_depth_is_predicted_from_the_other_the_state_and_the_batch(make_program, make_cells):
    program, cells = _give_links(make_program()), make_cells()
    program.rna_log_depth.fill_(2.0)
    program.atac_log_depth.fill_(1.0)
    with evaluation_mode(program):
        loc = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"]).loc[0]
        found = {site: predicted(program, cells, site, loc) for site in ("l", "d")}
    x, y = (counts.to_dense() if hasattr(counts, "to_dense") else counts for counts in (cells.x, cells.y))
    z, batch = loc.numpy(), cells.design[:, :2].argmax(1).numpy()
    for site, other in (
        ("d", np.log(np.maximum(x.numpy().sum(1), 1)) - 2.0),
        ("l", np.log1p((y.numpy() > 0).sum(1)) - 1.0),
    ):
        stored = getattr(program, {"l": "rna_depth_regression", "d": "atac_depth_regression"}[site]).numpy()
        sd, slope, of_z, of_batch = stored[0], stored[1], stored[2:-2], stored[-2:]
        np.testing.assert_allclose(found[site].loc, slope * other + z @ of_z + of_batch[batch], rtol=1e-4, atol=1e-5)
        assert found[site].scale.unique().item() == pytest.approx(sd)


def test_only_depths_that_were_not_measured_change(make_program, make_cells):
    program, cells = make_program(), make_cells()
    sites = ("z", "l", "d", "rho", "p")
    before = draw(program, cells, sites, n_samples=200)
    found = draw(_give_links(program), cells, sites, n_samples=200)
    for site in ("z", "rho", "p"):
        values = [drawn[site].dense() if site in ("rho", "p") else drawn[site] for drawn in (before, found)]
        assert torch.equal(*values)
    for site, changed in (("l", LACKS_RNA), ("d", LACKS_ATAC)):
        rest = torch.ones(12, dtype=torch.bool)
        rest[changed] = False
        assert torch.equal(found[site][:, rest], before[site][:, rest])
        with evaluation_mode(program):
            loc = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"]).loc[0]
            expected = predicted(program, cells, site, loc)
        told = found[site][:, changed].double()
        normal = told.log() if site == "l" else torch.logit(told)
        for number, cell in enumerate(range(12)[changed]):
            of_cell = scipy.stats.norm(expected.loc[cell].item(), 0.5).cdf(normal[:, number].numpy())
            assert scipy.stats.kstest(of_cell, "uniform").pvalue > 1e-3
    # Each cell has noise of its own, and few draws are the first of many.
    assert torch.equal(draw(program, cells, ("d",), n_samples=3)["d"], found["d"][:3])
    assert abs(np.corrcoef(torch.logit(found["d"][:, LACKS_ATAC]).T.numpy())[0, 1]) < 0.3


def test_a_cell_of_which_nothing_was_measured_keeps_the_priors(make_program, make_cells):
    program = _give_links(make_program())
    nothing = hide(hide(make_cells((3, 0, 0)), "x"), "y")
    found = draw(program, nothing, ("l", "d"), n_samples=5)
    for name in ("rna_depth_regression", "atac_depth_regression"):
        getattr(program, name).zero_()
    for site, values in draw(program, nothing, ("l", "d"), n_samples=5).items():
        assert torch.equal(found[site], values)


def test_estimates_are_multiplied_with_the_mean_or_the_draws(make_program, make_cells):
    program, cells = _give_links(make_program()), make_cells()

    def estimate(quantity, average):
        with evaluation_mode(program):
            decoded = decode(program, cells, average, quantity.sites)
            return np.concatenate([found["mean"] for _, found in blocks(decoded, quantity, average, 0)], 1)

    with evaluation_mode(program):
        loc = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"]).loc[0]
    for site, depth, lacks in (("rho", "l", LACKS_RNA), ("p", "d", LACKS_ATAC)):
        ratio = estimate(Quantity(site, by_cell=depth), Average()) / estimate(Quantity(site), Average())
        with evaluation_mode(program):
            mean = mean_depth(depth, predicted(program, cells, depth, loc)).numpy()
        np.testing.assert_allclose(ratio[lacks], np.repeat(mean[lacks, None], ratio.shape[1], 1), rtol=1e-4)
        many = Average(n_samples=50)
        drawn = draw(program, cells, (site, depth), n_samples=50)
        expected = (drawn[site].dense() * drawn[depth][..., None]).mean(0)
        np.testing.assert_allclose(estimate(Quantity(site, by_cell=depth), many), expected, rtol=1e-4)
    # Groups are compared by what was measured of their cells.
    with evaluation_mode(program):
        plain = decode(program, cells, Average(n_samples=50, plain=True), ("p", "d")).sites[0]["d"]
        guide = draw_latents(program, cells, 50).trace.nodes["d"]["value"]
    assert torch.equal(plain, guide.expand(plain.shape))


def test_densities_see_nothing_of_it(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = [marginal_likelihood(program, [cells], 20), elbo_parts(program, [cells], 20)]
    _give_links(program)
    after = [marginal_likelihood(program, [cells], 20), elbo_parts(program, [cells], 20)]
    np.testing.assert_array_equal(after[0].log_likelihood, before[0].log_likelihood)
    for kind in ("log_likelihood", "kl"):
        np.testing.assert_equal(getattr(after[1], kind), getattr(before[1], kind))


@pytest.mark.parametrize(("hidden", "depth"), [("x", "l"), ("y", "d")])
def test_how_deep_a_hidden_modality_is(make_program, make_cells, hidden, depth):
    program, cells = _give_links(make_program()), make_cells((6, 0, 0))
    site = {"l": "mean", "d": "cell_factor"}[depth]

    def depth_of(hidden_depth):
        [(_, found)] = replicate(program, cells, 10, hidden=hidden, hidden_depth=hidden_depth)
        fn = found[hidden].fn
        return fn.cell_factor if site == "cell_factor" else fn.mean.sum(-1)

    known = draw(program, cells, (depth,), 10)[depth]
    told = draw(program, hide(cells, hidden), (depth,), 10)[depth]
    with evaluation_mode(program):
        prior = draw_latents(program, hide(cells, hidden), 10).trace.nodes[depth]["value"]
    by_prior = depth_of("prior")
    for name, expected in (("observed", known), ("predicted", told)):
        ratio = depth_of(name) / by_prior
        torch.testing.assert_close(ratio, (expected / prior).expand(ratio.shape), rtol=1e-3, atol=1e-4)


def test_known_depths_stay(make_program, make_cells):
    program = _give_links(make_program(library="observed"))
    cells = make_cells()
    cells = cells.replace(atac_size=torch.full((12,), 0.25))
    found = draw(program, cells, ("l", "d"), n_samples=3)
    assert bool((found["d"] == 0.25).all())
    with evaluation_mode(program):
        assert torch.equal(found["l"], draw_latents(program, cells, 3).trace.nodes["l"]["value"].expand(3, 12))


# ---------------------------------------------------------------------------------------------- learning it


def test_the_regression_is_the_average_of_ridge_regressions():
    rng = np.random.default_rng(0)
    batch = np.eye(2)[rng.integers(0, 2, 80)]
    x = np.c_[rng.normal(size=(80, 4)), batch]
    y = x @ [0.8, 0.5, -0.4, 0.0, 1.0, 2.0] + 0.7 * rng.normal(size=80)
    link, explained = regress(*(torch.tensor(v).float() for v in (x[:60], y[:60], x[60:], y[60:])), n_latent=3)
    solutions, losses = [], []
    for penalty in GRID:
        weights = np.array([1.0, *[min(penalty, 1e12)] * 3, 1.0, 1.0])
        # Ridge as least squares with rows added.
        rows = np.r_[x[:60], np.diag(np.sqrt(weights))]
        solutions.append(np.linalg.lstsq(rows, np.r_[y[:60] - y[:60].mean(), np.zeros(6)], rcond=None)[0])
        losses.append((y[60:] - y[:60].mean() - x[60:] @ solutions[-1]) ** 2)
    losses = np.array(losses)
    log_weight = -losses.sum(1) / (2 * losses.mean(1).min())
    weight = np.exp(log_weight - log_weight.max())
    expected = weight @ np.array(solutions) / weight.sum()
    expected[-2:] += y[:60].mean()
    np.testing.assert_allclose(link.coefficients, expected, rtol=1e-3, atol=1e-4)
    errors = [np.mean((t - r @ expected) ** 2) for r, t in ((x[:60], y[:60]), (x[60:], y[60:]))]
    assert link.sd.item() == pytest.approx(max(errors) ** 0.5, rel=1e-4)
    assert explained == pytest.approx(1 - errors[1] / np.mean((y[60:] - y[:60].mean()) ** 2), rel=1e-3)


def _mosaic(related: bool, seed: int = 5):
    """Cells whose depths are related or not, and the depths of what is then hidden."""
    adata = simulate_multiome((900, 0, 0), 40, 120, n_latent=3, mean_accessibility=0.4, library_sd=0.5, seed=seed)
    rng = np.random.default_rng(seed)
    x, y = adata.X[:, :40].tocsr(), adata.X[:, 40:].tocsr()
    kept = np.full(900, 0.5)
    if related:
        size = np.log(adata.obs["true_library"].to_numpy())
        kept = 1 / (1 + np.exp(-2.0 * (size - size.mean()) / size.std()))
    y.data = (rng.random(y.nnz) < np.repeat(kept, np.diff(y.indptr))).astype(np.float32)
    y.eliminate_zeros()
    n_counts, n_open = np.asarray(x.sum(1)).ravel(), np.diff(y.indptr)
    kind = np.repeat(["paired", "expression", "accessibility"], 300)
    x, y = (
        sp.diags_array((kind != lacks).astype(np.float32)) @ counts
        for counts, lacks in ((x, "accessibility"), (y, "expression"))
    )
    adata.X = sp.csr_matrix(sp.hstack([x, y]))
    adata.X.eliminate_zeros()
    adata.obs["modality"] = kind
    return adata, n_counts, n_open


@pytest.fixture(scope="module", params=[True, False], ids=["related", "unrelated"])
def learned(request):
    adata, n_counts, n_open = _mosaic(request.param)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=32, n_latent=3)
    model.train(max_epochs=40, lr=5e-3, progress_bar=False)
    return model, request.param, n_counts, n_open


def test_depths_are_told_if_they_are_related(learned):
    model, related, n_counts, n_open = learned
    drawn = {"d": (slice(300, 600), n_open), "l": (slice(600, 900), n_counts)}
    for site, (cells, truth) in drawn.items():
        told = draw(model.program, model.minibatch(np.arange(900)[cells]), (site,), 100)[site].log().mean(0).numpy()
        correlation = np.corrcoef(told, np.log(truth[cells] + 1.0))[0, 1]
        assert correlation > 0.5 if related else abs(correlation) < 0.25


@pytest.mark.parametrize(("site", "cells"), [("y", slice(300, 600)), ("x", slice(600, 900))])
def test_replicates_are_as_deep_as_what_was_hidden(learned, site, cells):
    """Intervals of 90 % for the depth of hidden cells hold what they say, and are narrower than by the prior."""
    model, related, n_counts, n_open = learned
    truth = (n_open if site == "y" else n_counts)[cells]
    program, these = model.program, model.minibatch(np.arange(900)[cells])

    def interval():
        totals = torch.cat([found[site].values.sum(-1) for _, found in replicate(program, these, 200)])
        return np.quantile(totals.numpy(), [0.05, 0.95], axis=0)

    lower, upper = interval()
    covered = np.mean((lower <= truth) & (truth <= upper))
    # 300 cells: a standard error of 2 %, the model's own error beside it. d is a point estimate, so that the scatter of
    # a dozen open regions counts twice: intervals of accessibility are rather too wide.
    assert 0.83 < covered < 0.99
    link = getattr(program, {"y": "atac_depth_regression", "x": "rna_depth_regression"}[site])
    kept = link.clone()
    link.zero_()
    by_prior = np.subtract(*interval()[::-1])
    link.copy_(kept)
    if related or site == "y":
        assert np.mean(upper - lower) < 0.9 * np.mean(by_prior)


def test_z_counts_as_far_as_held_out_pairs_say():
    """What training pairs alone make of z is noise that was memorised; held-out pairs tell."""
    rng = np.random.default_rng(1)
    x = np.c_[rng.normal(size=(400, 9)), np.ones(400)]
    y = 0.5 * x[:, 0] + rng.normal(size=400)
    memorised = y.copy()
    memorised[:200] += x[:200, 1:9] @ np.full(8, 0.5)
    parts = [torch.tensor(v).float() for v in (x[:200], memorised[:200], x[200:], y[200:])]
    link, _ = regress(*parts, n_latent=8)
    plain = np.linalg.lstsq(x[:200], memorised[:200], rcond=None)[0]
    assert np.abs(link.coefficients[1:9].numpy()).sum() < 0.05 * np.abs(plain[1:9]).sum()
    assert link.coefficients[0].item() == pytest.approx(0.5, abs=0.25)


def _set_up(n=(60, 20, 20), make_model=MULTIVI, setup=None, **choices):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality", **(setup or {}))
    return make_model(adata, n_hidden=8, n_latent=2, **choices)


def _learned(model, **arguments):
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return [bool(link[0] > 0) for link in (model.program.rna_depth_regression, model.program.atac_depth_regression)]


def test_without_enough_pairs_nothing_is_learned():
    assert _learned(_set_up()) == [False, False]  # 6 are held out
    assert _learned(_set_up((200, 0, 0)), train_size=1.0) == [False, False]
    assert _learned(_set_up((0, 60, 60))) == [False, False]
    model = _set_up((200, 0, 0))
    assert _learned(model) == [True, True]
    assert _learned(model, train_size=0.02, validation_size=0.9) == [False, False]  # 4 are trained on


def test_depths_that_are_known_are_not_learned():
    assert _learned(_set_up((200, 0, 0), library="observed")) == [False, True]


def test_a_posterior_that_is_no_normal_is_left_alone():
    class StudentT(MultiVIProgram):
        def mix(self, experts):
            loc, scale = self.averaged(experts)
            return dist.StudentT(5.0 * torch.ones_like(loc), loc, scale).to_event(1)

    from pyro.infer import Trace_ELBO

    model = _set_up((200, 0, 0), program_class=StudentT)
    assert _learned(model, elbo=Trace_ELBO()) == [False, False]


def test_interrupted_learning_leaves_a_usable_model(monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning_depth, "_read", interrupted)
    model = _set_up((200, 0, 0))
    assert _learned(model) == [False, False]
    assert model.is_trained
    assert "interrupted after training: depths of what was not measured keep their priors" in caplog.text


def test_it_is_learned_from_pairs_of_the_right_cells(monkeypatch, fitted):
    read = []

    def recorded(program, cells, pairs, hidden):
        read.append((hidden, pairs.tolist()))

    monkeypatch.setattr(learning_depth, "_read", recorded)
    monkeypatch.setattr(learning_depth, "_MOST", 25)
    table = fitted._table
    both = set((table.has_rna & table.has_atac).nonzero().squeeze(-1).tolist())
    train, held_out = (Minibatches(table, torch.arange(*ends), batch_size=16) for ends in ((0, 60), (60, 100)))
    fit_depth_regressions(MultiVIProgram(fitted.program.config), train, held_out)
    assert [hidden for hidden, _ in read] == ["x", "x", "y", "y"]
    for (_, pairs), (first, last) in zip(read, [(0, 60), (60, 100)] * 2, strict=True):
        allowed = both & set(range(first, last))
        assert set(pairs) <= allowed
        assert len(pairs) == min(25, len(allowed))


def test_the_regressions_are_saved(tmp_path):
    model = _set_up((200, 20, 20))
    assert _learned(model) == [True, True]
    model.save(tmp_path / "model", save_anndata=True)
    again = MULTIVI.load(tmp_path / "model")
    assert torch.equal(again.program.atac_depth_regression, model.program.atac_depth_regression)
    factors = [
        m.get_accessibility_estimates(normalize_cells=True, n_samples=5, return_numpy=True) for m in (model, again)
    ]
    np.testing.assert_array_equal(*factors)


def test_features_follow_draws(make_program, make_cells):
    """The mean of z may differ from draw to draw, where the guide draws what all cells share."""
    program, cells = make_program(), make_cells()
    loc = torch.randn(4, 12, program.config.latent)
    found = features(program, cells, "d", loc)
    assert found.shape == (4, 12, 1 + program.config.latent + program.config.n_batch)
    assert torch.equal(found[2], features(program, cells, "d", loc[2]))
