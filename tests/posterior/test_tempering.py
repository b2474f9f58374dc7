"""How far evidence is trusted where something is decoded that was not measured, and how that is chosen."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.evaluating import evaluating
from pyro_multivi.posterior import choosing_temper, predictive
from pyro_multivi.posterior.choosing_temper import GRID, choose_tempers, scores
from pyro_multivi.posterior.draws import by_trust, draw, draw_latents
from pyro_multivi.posterior.predictive import hide, replicate
from pyro_multivi.posterior.tempering import normal_in, temper

LACKS_RNA, LACKS_ATAC = slice(8, 12), slice(5, 8)  # of make_cells' 5 paired, 3 RNA-only, 4 ATAC-only cells


@pytest.mark.parametrize("weight", [1.0, 0.6, 0.1])
def test_tempered_draws_have_the_moments_of_the_powers(weight):
    posterior, prior = torch.distributions.Normal(1.7, 0.4), torch.distributions.Normal(-0.5, 1.3)
    grid = np.linspace(-12, 12, 200_001)
    told, known = scipy.stats.norm.logpdf(grid, 1.7, 0.4), scipy.stats.norm.logpdf(grid, -0.5, 1.3)
    log_density = weight * told + (1 - weight) * known
    share = np.exp(log_density - log_density.max())
    share /= share.sum()
    mean = (share * grid).sum()
    sd = np.sqrt((share * (grid - mean) ** 2).sum())
    at_mean, above = (temper(torch.tensor(1.7 + 0.4 * step), posterior, prior, weight) for step in (0.0, 1.0))
    assert at_mean.item() == pytest.approx(mean, abs=1e-5)
    assert (above - at_mean).item() == pytest.approx(sd, rel=1e-5)


def test_only_what_was_not_measured_is_decoded_from_tempered_latents(make_program, make_cells):
    program, cells = make_program(), make_cells()
    sites = ("z", "l", "d", "rho", "p")
    plain = draw(program, cells, sites, n_samples=5)
    program.rna_temper.fill_(0.3)
    found = draw(program, cells, sites, n_samples=5)
    assert list(found) == list(sites)
    for site in ("z", "l", "d"):
        assert torch.equal(found[site], plain[site])
    assert torch.equal(found["p"].dense(), plain["p"].dense())
    assert torch.equal(found["rho"].dense()[:, :8], plain["rho"].dense()[:, :8])
    with evaluating(program):
        posterior = normal_in(draw_latents(program, cells).trace.nodes["z"]["fn"])
        moved = temper(found["z"], posterior, normal_in(program.z_prior(cells.design)), 0.3)
        expected = program.expression(moved, cells.design).rho.dense()[:, LACKS_RNA]
    torch.testing.assert_close(found["rho"].dense()[:, LACKS_RNA], expected)
    assert not torch.allclose(expected, plain["rho"].dense()[:, LACKS_RNA])
    program.atac_temper.fill_(0.5)
    both = draw(program, cells, ("p", "rho"), n_samples=5)
    assert torch.equal(both["rho"].dense(), found["rho"].dense())
    changed = (both["p"].dense() != plain["p"].dense()).flatten(2).any(-1).any(0)
    assert changed.nonzero().squeeze(-1).tolist() == [5, 6, 7]


def test_counts_are_drawn_from_what_is_imputed(make_program, make_cells):
    program, cells = make_program(), make_cells((0, 0, 4))
    program.rna_temper.fill_(0.2)
    drawn = draw(program, cells, ("x", "y", "rho"), n_samples=4000)
    found = [part["x"] for _, part in replicate(program, cells, 4000)]
    torch.testing.assert_close(torch.cat([part.fn.rho.dense() for part in found]), drawn["rho"].dense())
    expected = torch.cat([part.mean() for part in found]).mean(0)
    for values in (drawn["x"], torch.cat([part.values for part in found])):
        assert bool(((values.mean(0) - expected).abs() < 5 * values.std(0) / 4000**0.5).all())


def test_a_posterior_or_prior_that_is_no_normal_is_left_as_it_is(make_program, make_cells):
    class Mixture(MultiVIProgram):
        def z_prior(self, s):
            loc = torch.stack([torch.zeros(3), torch.ones(3)]).expand(len(s), 2, 3)
            return dist.MixtureSameFamily(
                dist.Categorical(torch.ones(len(s), 2)), dist.Normal(loc, torch.ones_like(loc)).to_event(1)
            )

    class Heavy(MultiVIProgram):
        def mix(self, experts):
            return dist.StudentT(5.0, *self.averaged(experts)).to_event(1)

    for kind in (Mixture, Heavy):
        program = kind(make_program().config).eval()
        program.rna_temper.fill_(0.3)
        cells = make_cells()
        with evaluating(program):
            [(sites, latents)] = by_trust(program, cells, (drawn := draw_latents(program, cells)), ("rho", "p", "x"))
        assert sites == ["rho", "p", "x"]
        assert latents is drawn


@pytest.fixture
def tempered_model(fitted):
    """The model of all tests with other weights, and as it was afterwards."""
    before = float(fitted.program.rna_temper), float(fitted.program.atac_temper)
    fitted.program.rna_temper.fill_(0.2)
    fitted.program.atac_temper.fill_(0.4)
    yield fitted
    fitted.program.rna_temper.fill_(before[0])
    fitted.program.atac_temper.fill_(before[1])


def test_all_results_impute_the_same(tempered_model):
    model = tempered_model
    lacks_rna = np.flatnonzero((model.adata.obs["modality"] == "accessibility").to_numpy())
    cells = model.minibatch(lacks_rna)
    rho = draw(model.program, cells, ("rho",), n_samples=8)["rho"].dense().mean(0).numpy()
    given = {"indices": lacks_rna, "n_samples": 8}
    np.testing.assert_allclose(model.get_normalized_expression(return_numpy=True, **given), rho, rtol=2e-5)
    filled = model.impute(**given)
    np.testing.assert_allclose(filled.layers["imputed"].toarray()[:, : rho.shape[1]], rho, rtol=2e-5)
    # One estimate at the mean of the latents is tempered too.
    at_mean = model.get_normalized_expression(indices=lacks_rna, return_numpy=True)
    profile = model.get_normalized_expression(return_numpy=True).mean(0)
    model.program.rna_temper.fill_(1.0)
    whole = model.get_normalized_expression(indices=lacks_rna, return_numpy=True)
    assert np.abs(np.log(at_mean / profile)).mean() < 0.8 * np.abs(np.log(whole / profile)).mean()


def test_groups_are_compared_without(tempered_model):
    model = tempered_model
    types, kind = (model.adata.obs[name].astype(str).to_numpy() for name in ("cell_type", "modality"))
    first = (types == "type_0") & (kind == "accessibility")
    asked = {"idx1": first, "idx2": types == "type_1", "seed": 2, "silent": True}
    with_weights = model.differential_expression(**asked)
    model.program.rna_temper.fill_(1.0)
    pd.testing.assert_frame_equal(with_weights, model.differential_expression(**asked))


def test_scores_are_the_log_probabilities_of_hidden_counts(make_program, make_cells):
    program, cells = make_program(), make_cells((6, 0, 0))
    for site in ("x", "y"):
        mean = torch.cat([found[site].mean() for _, found in replicate(program, cells, 25, hidden=site)]).mean(0)
        mean = mean.double().numpy()
        if site == "x":
            counts = cells.x.to_dense().double().numpy()
            share = mean / mean.sum(1, keepdims=True)
            whole = scipy.stats.multinomial.logpmf(counts, counts.sum(1), share)
            flat = scipy.stats.multinomial.logpmf(counts, counts.sum(1), np.full(7, 1 / 7))
            found = scores(program, cells, site) - counts.sum(1) * np.log(1 / 7)
            np.testing.assert_allclose(found, whole - flat, rtol=1e-4, atol=1e-4)
        else:
            is_open = cells.y.to_dense().numpy() > 0
            expected = scipy.stats.bernoulli.logpmf(is_open, mean).sum(1)
            np.testing.assert_allclose(scores(program, cells, site), expected, rtol=1e-4)


def test_scores_do_not_depend_on_how_many_draws_are_decoded_at_once(make_program, make_cells, monkeypatch):
    program, cells = make_program(), make_cells((6, 0, 0))
    program.rna_temper.fill_(0.4)
    program.atac_temper.fill_(0.3)
    at_once = {site: scores(program, cells, site) for site in ("x", "y")}
    monkeypatch.setattr(predictive, "_BLOCK", 6 * 9 * 4)
    for site, expected in at_once.items():
        np.testing.assert_allclose(scores(program, cells, site), expected, rtol=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["related", "unrelated"])
def chosen(request):
    """A model of modalities that tell much about each other, or nothing; which of both; and cells it never saw."""
    adata = simulate_multiome((700, 0, 0), 60, 120, n_latent=3, effect_size=1.5, differential_fraction=0.6, seed=3)
    if request.param:
        # Accessibility is that of another cell.
        of_others = adata.X[np.random.default_rng(0).permutation(adata.n_obs), 60:]
        adata.X = sp.hstack([adata.X[:, :60], of_others], format="csr")
    seen, new = adata[:400].copy(), adata[400:].copy()
    MULTIVI.setup_anndata(seen, modality_key="modality")
    model = MULTIVI(seen, n_hidden=32, n_latent=3)
    model.train(max_epochs=25, lr=5e-3, progress_bar=False)
    return model, request.param, model.minibatch(adata=new)


def test_what_tells_nothing_is_not_trusted(chosen):
    model, unrelated, _ = chosen
    expression, accessibility = float(model.program.rna_temper), float(model.program.atac_temper)
    if unrelated:
        # Of accessibility hardly anything is decoded there, whatever the weight.
        assert expression <= 0.175
    else:
        assert min(expression, accessibility) >= 0.5


@pytest.mark.parametrize(("site", "name"), [("x", "rna_temper"), ("y", "atac_temper")])
def test_the_choice_is_right_for_other_cells(chosen, site, name):
    """Of all that was tried it predicts new cells best, up to noise, better than whole trust where that is wrong."""
    model, unrelated, cells = chosen
    temper = getattr(model.program, name)
    weight = float(temper)
    found = {}
    for tried in GRID:
        temper.fill_(tried)
        found[tried] = scores(model.program, cells, site)
    temper.fill_(weight)
    nearest = min(GRID, key=lambda tried: abs(tried - weight))
    for values in found.values():
        gain = found[nearest] - values
        assert gain.mean() >= -3 * gain.std() / len(gain) ** 0.5
    if unrelated and site == "x":
        gain = found[nearest] - found[1.0]
        assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def _set_up(make_model=MULTIVI, n=(60, 20, 20), **choices):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    return make_model(adata, n_hidden=8, n_latent=2, **choices)


def _train(model, **arguments):
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return float(model.program.rna_temper), float(model.program.atac_temper)


def test_without_enough_pairs_all_is_trusted():
    # 6 pairs are held out, or none.
    for arguments in ({}, {"train_size": 1.0}):
        assert _train(_set_up(), **arguments) == (1.0, 1.0)
    assert _train(_set_up(n=(0, 60, 60))) == (1.0, 1.0)


def test_a_likelihood_without_a_mean_is_left_alone_and_the_other_is_not(monkeypatch, caplog):
    def scored(program, cells, site):
        if site == "x":
            raise NotImplementedError
        return np.array([-float(program.atac_temper)])

    monkeypatch.setattr(choosing_temper, "scores", scored)
    assert _train(_set_up(n=(200, 0, 0))) == (1.0, pytest.approx(GRID[-1]))
    assert "expression is imputed with whole trust in what else was measured: the likelihood at 'x'" in caplog.text


def test_a_likelihood_that_knows_no_probability_trains(caplog):
    class Nameless(MultiVIProgram):
        def open_probability(self, y):
            raise NotImplementedError

    assert _train(_set_up(n=(200, 0, 0), program_class=Nameless))[1] == 1.0
    assert "the likelihood at 'y' has no mean" in caplog.text


def test_an_interrupted_choice_leaves_a_usable_model(monkeypatch, caplog):
    def interrupted(program, cells, site):
        raise KeyboardInterrupt

    monkeypatch.setattr(choosing_temper, "scores", interrupted)
    model = _set_up(n=(200, 0, 0))
    assert _train(model) == (1.0, 1.0)
    assert model.is_trained
    assert caplog.text.count("interrupted after training") == 1


def test_cells_scored_are_held_out_pairs_and_few_of_them_if_wide(monkeypatch, fitted):
    asked = []

    def recorded(program, cells, site):
        asked.append((site, cells, float(program.rna_temper), float(program.atac_temper)))
        return np.array([{0.25: 1.0}.get(float(getattr(program, {"x": "rna_temper", "y": "atac_temper"}[site])), 0.0)])

    monkeypatch.setattr(choosing_temper, "scores", recorded)
    monkeypatch.setattr(choosing_temper, "_FEWEST", 12)
    monkeypatch.setattr(choosing_temper, "_ENTRIES", 70 * 20)
    program = MultiVIProgram(fitted.program.config)
    table = fitted._table
    held_out = Minibatches(table, torch.arange(20, 160), batch_size=32)
    choose_tempers(program, held_out)
    assert (float(program.rna_temper), float(program.atac_temper)) == (0.25, 0.25)
    # Two worse ones in a row are enough.
    tried = [weight for site, _, weight, _ in asked if site == "x"]
    np.testing.assert_allclose(tried, GRID[: GRID.index(0.25) + 3])
    assert [site for site, *_ in asked] == ["x"] * len(tried) + ["y"] * len(tried)
    pairs = set(range(20, 160)) & set((table.has_rna & table.has_atac).nonzero().squeeze(-1).tolist())
    for site, cells, *_ in asked:
        assert len(cells) == min(len(pairs), {"x": 1400 // 40, "y": 20}[site])
        assert set(cells.index.tolist()) <= pairs


def test_the_choice_is_saved_and_models_of_before_are_read(tmp_path, fitted):
    program = MultiVIProgram(fitted.program.config)
    program.atac_temper.fill_(0.35)
    fitted_again = MultiVIProgram(fitted.program.config)
    fitted_again.load_state_dict(program.state_dict())
    assert float(fitted_again.atac_temper) == pytest.approx(0.35)
    old = {name: value for name, value in program.state_dict().items() if not name.endswith("_temper")}
    before = dict(old)
    fitted_again.load_state_dict(old)
    assert (float(fitted_again.rna_temper), float(fitted_again.atac_temper)) == (1.0, 1.0)
    assert old.keys() == before.keys()


def test_a_hidden_modality_is_predicted_as_a_missing_one(make_program, make_cells):
    """What checks on held-out cells judge is what is imputed."""
    program, cells = make_program(), make_cells((4, 0, 0))
    program.rna_temper.fill_(0.2)
    [(_, found)] = replicate(program, cells, 10, hidden="x", hidden_depth="prior")
    expected = draw(program, hide(cells, "x"), ("rho", "l"), 10)
    torch.testing.assert_close(found["x"].fn.rho.dense(), expected["rho"].dense())
