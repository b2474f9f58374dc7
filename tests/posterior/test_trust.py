"""How far evidence is trusted where something is decoded that was not measured, and how that is learned."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, ProgramConfig, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.evaluating import evaluating
from pyro_multivi.posterior import learning_trust, predictive
from pyro_multivi.posterior.draws import by_trust, draw, draw_latents, mean_latents, replay
from pyro_multivi.posterior.learning_trust import GRID, gather, learn_trust, nearest_to_neutral, scores
from pyro_multivi.posterior.noise import CellNoise
from pyro_multivi.posterior.predictive import expected_counts, hide, replicate
from pyro_multivi.posterior.trust import TRUST, Population, mixed, normal_in

LACKS_RNA, LACKS_ATAC = slice(8, 12), slice(5, 8)  # of make_cells' 5 paired, 3 RNA-only, 4 ATAC-only cells


def _populated(program, site, sizes=(12, 30), seed=0):
    """Random states of so many cells of each batch, kept in a program; returned by batch."""
    stored = getattr(program, {"x": "rna_population", "y": "atac_population"}[site])
    stored.fill_(-1.0)
    n_latent = stored.shape[1] - 1
    noise = torch.Generator().manual_seed(seed)
    of_batches = [3.0 * torch.randn(n, n_latent, generator=noise) for n in sizes]
    first = 0
    for code, z in enumerate(of_batches):
        stored[first : first + len(z), 0] = code
        stored[first : first + len(z), 1:] = z
        first += len(z)
    return of_batches


def test_a_program_at_its_start_knows_nobody(make_program):
    assert Population.of(make_program(), "x") is None


def test_a_batch_of_few_cells_has_all_cells_for_a_population(make_program):
    program = make_program()
    few, many = _populated(program, "x", (9, 30))
    population = Population.of(program, "x")
    assert (population.start.tolist(), population.size.tolist()) == ([0, 9], [39, 30])
    torch.testing.assert_close(population.mean(torch.tensor([0, 1]))[0], torch.cat([few, many]).mean(0))
    _populated(program, "y", (10, 0))
    population = Population.of(program, "y")
    assert (population.start.tolist(), population.size.tolist()) == ([0, 0], [10, 10])


def test_a_place_in_a_population_is_a_cell(make_program):
    program = make_program()
    of_batches = _populated(program, "x", (12, 30))
    population = Population.of(program, "x")
    place, batch = torch.tensor([0.0, 0.49, 1 - 1e-12, 1 - 1e-17]), torch.tensor([0, 1, 1, 0])
    expected = [of_batches[0][0], of_batches[1][14], of_batches[1][29], of_batches[0][11]]
    assert torch.equal(population.draw(place, batch), torch.stack(expected))


@pytest.mark.parametrize("trust", [0.0, 0.3, 0.85, 1.0])
def test_draws_are_those_of_the_mixture(make_program, trust):
    """Own draws with probability t, each of the others with the same share of the rest."""
    program = make_program()
    of_batches = _populated(program, "x", (12, 30))
    n, batch = 4000, torch.tensor([0, 1, 1])
    own = 100.0 + torch.arange(n)[:, None, None].expand(n, 3, 3)
    drawn = mixed(own, Population.of(program, "x"), trust, batch, CellNoise(torch.tensor([3, 4, 9]), seed=1))
    for cell, code in enumerate(batch.tolist()):
        is_own = (drawn[:, cell] == own[:, cell]).all(-1)
        # Evenly spread numbers: far less than the 30 that independent draws would be off by.
        assert abs(int(is_own.sum()) - trust * n) <= 2
        same = (drawn[~is_own, cell, None] == of_batches[code]).all(-1)
        assert bool((same.sum(1) == 1).all())
        times = same.sum(0)
        assert bool(((times - (1 - trust) * n / len(times)).abs() <= 12).all())


def test_the_mean_is_that_of_the_mixture(make_program):
    program = make_program()
    of_batches = _populated(program, "x", (12, 30))
    mean, batch = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]]]), torch.tensor([1, 0])
    found = mixed(mean, Population.of(program, "x"), 0.7, batch, None)
    expected = 0.7 * mean[0] + 0.3 * torch.stack([of_batches[1].mean(0), of_batches[0].mean(0)])
    torch.testing.assert_close(found[0], expected)


def test_evenly_spread_numbers_belong_to_a_cell_and_are_uniform():
    noise = CellNoise(torch.arange(2000), seed=3)
    found = noise.evenly("trust", 40)
    assert found.shape == (40, 2000, 2)
    later = CellNoise(torch.tensor([7, 1999]), seed=3, first=30).evenly("trust", 10)
    torch.testing.assert_close(later, found[30:, [7, 1999]], rtol=0, atol=1e-12)
    for number in (0, 17):
        for column in found[number].T.numpy():
            assert scipy.stats.kstest(column, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(found[number].T.numpy())[0, 1]) < 0.08
    # Within a cell any box holds its share of the draws, up to a few.
    boxes = ((found < torch.tensor([0.5, 0.25])).all(-1)).sum(0)
    assert bool(((boxes - 40 / 8).abs() <= 3).all())


def test_only_what_was_not_measured_is_decoded_by_trust(make_program, make_cells):
    program, cells = make_program(), make_cells()
    for site in ("x", "y"):
        _populated(program, site)
    sites = ("z", "l", "d", "rho", "p")
    plain = draw(program, cells, sites, n_samples=5)
    program.rna_trust.fill_(0.3)
    found = draw(program, cells, sites, n_samples=5)
    assert list(found) == list(sites)
    for site in ("z", "l", "d"):
        assert torch.equal(found[site], plain[site])
    assert torch.equal(found["p"].dense(), plain["p"].dense())
    assert torch.equal(found["rho"].dense()[:, :8], plain["rho"].dense()[:, :8])
    with evaluating(program):
        batch = cells.design[:, 1].long()
        moved = mixed(found["z"], Population.of(program, "x"), 0.3, batch, CellNoise(cells.index, 0))
        expected = program.expression(moved, cells.design).rho.dense()[:, LACKS_RNA]
    torch.testing.assert_close(found["rho"].dense()[:, LACKS_RNA], expected)
    assert not torch.allclose(expected, plain["rho"].dense()[:, LACKS_RNA])
    program.atac_trust.fill_(0.2)
    both = draw(program, cells, ("p", "rho"), n_samples=5)
    assert torch.equal(both["rho"].dense(), found["rho"].dense())
    changed = (both["p"].dense() != plain["p"].dense()).flatten(2).any(-1).any(0)
    assert changed.nonzero().squeeze(-1).tolist() == [5, 6, 7]
    with evaluating(program):
        latents = draw_latents(program, cells, 5)
        left = replay(program, cells, latents, ("rho", "p"), plain=True)
    for site, values in left.items():
        assert torch.equal(values.dense(), plain[site].dense())


def test_without_a_population_all_is_as_the_guide_has_it(make_program, make_cells):
    program, cells = make_program(), make_cells()
    program.rna_trust.fill_(0.3)
    with evaluating(program):
        [(sites, latents)] = by_trust(program, cells, (drawn := draw_latents(program, cells)), ("rho", "p", "x"))
    assert sites == ["rho", "p", "x"]
    assert latents is drawn


def test_counts_are_drawn_from_what_is_imputed(make_program, make_cells):
    program, cells = make_program(), make_cells((0, 0, 4))
    _populated(program, "x")
    program.rna_trust.fill_(0.2)
    drawn = draw(program, cells, ("x", "y", "rho"), n_samples=4000)
    found = [part["x"] for _, part in replicate(program, cells, 4000)]
    torch.testing.assert_close(torch.cat([part.fn.rho.dense() for part in found]), drawn["rho"].dense())
    expected = torch.cat([part.mean() for part in found]).mean(0)
    for values in (drawn["x"], torch.cat([part.values for part in found])):
        assert bool(((values.mean(0) - expected).abs() < 5 * values.std(0) / 4000**0.5).all())


def test_a_posterior_need_not_be_normal(make_program, make_cells):
    class Heavy(MultiVIProgram):
        def mix(self, experts):
            return dist.StudentT(5.0, *self.averaged(experts)).to_event(1)

    program, cells = Heavy(make_program().config).eval(), make_cells()
    _populated(program, "x")
    program.rna_trust.fill_(0.3)
    with evaluating(program):
        drawn = draw_latents(program, cells, 50)
        assert normal_in(drawn.trace.nodes["z"]["fn"]) is None
        (sites, trusted), rest = by_trust(program, cells, drawn, ("rho", "p"))
        mean = by_trust(program, cells, mean_latents(program, cells), ("rho",))[0][1].trace.nodes["z"]["value"]
    assert (sites, rest) == (["rho"], (["p"], drawn))
    z, before = (latents.trace.nodes["z"]["value"] for latents in (trusted, drawn))
    same = (z == before).all(-1)
    assert bool(same[:, :8].all())
    assert set(same[:, LACKS_RNA].sum(0).tolist()) <= {14, 15, 16}
    assert mean.shape == (1, 12, 3)


@pytest.fixture
def trusting(fitted):
    """The model of all tests with other numbers, and as it was afterwards."""
    before = {name: value.clone() for name, value in fitted.program.state_dict().items()}
    for site in ("x", "y"):
        _populated(fitted.program, site, (40, 40))
    fitted.program.rna_trust.fill_(0.2)
    fitted.program.atac_trust.fill_(0.4)
    yield fitted
    fitted.program.load_state_dict(before)


def test_all_results_impute_the_same(trusting):
    model = trusting
    lacks_rna = np.flatnonzero((model.adata.obs["modality"] == "accessibility").to_numpy())
    cells = model.minibatch(lacks_rna)
    rho = draw(model.program, cells, ("rho",), n_samples=8)["rho"].dense().mean(0).numpy()
    given = {"indices": lacks_rna, "n_samples": 8}
    np.testing.assert_allclose(model.get_normalized_expression(return_numpy=True, **given), rho, rtol=2e-5)
    filled = model.impute(**given)
    np.testing.assert_allclose(filled.layers["imputed"].toarray()[:, : rho.shape[1]], rho, rtol=2e-5)
    # One estimate at the mean of the latents is drawn to the others too.
    at_mean = model.get_normalized_expression(indices=lacks_rna, return_numpy=True)
    model.program.rna_trust.fill_(1.0)
    whole = model.get_normalized_expression(indices=lacks_rna, return_numpy=True)
    spread = [np.log(found).std(0).mean() for found in (at_mean, whole)]
    assert spread[0] < 0.5 * spread[1]


def test_groups_are_compared_without(trusting):
    model = trusting
    types, kind = (model.adata.obs[name].astype(str).to_numpy() for name in ("cell_type", "modality"))
    first = (types == "type_0") & (kind == "accessibility")
    asked = {"idx1": first, "idx2": types == "type_1", "seed": 2, "silent": True}
    with_weights = model.differential_expression(**asked)
    model.program.rna_trust.fill_(1.0)
    pd.testing.assert_frame_equal(with_weights, model.differential_expression(**asked))


def test_scores_are_the_log_probabilities_of_hidden_counts(make_cells):
    cells, rng = make_cells((6, 0, 0)), np.random.default_rng(0)
    expected = torch.as_tensor(rng.gamma(2.0, 1.0, (6, 7)))
    counts = cells.x.to_dense().double().numpy()
    share = expected.numpy() / expected.numpy().sum(1, keepdims=True)
    whole = scipy.stats.multinomial.logpmf(counts, counts.sum(1), share)
    flat = scipy.stats.multinomial.logpmf(counts, counts.sum(1), np.full(7, 1 / 7))
    found = scores(cells, "x", expected) - counts.sum(1) * np.log(1 / 7)
    np.testing.assert_allclose(found, whole - flat, rtol=1e-6, atol=1e-6)
    p = torch.as_tensor(rng.random((6, 9)))
    is_open = cells.y.to_dense().numpy() > 0
    expected = scipy.stats.bernoulli.logpmf(is_open, p.numpy()).sum(1)
    np.testing.assert_allclose(scores(cells, "y", p), expected, rtol=1e-6)


def test_impossible_predictions_have_a_finite_score(make_cells):
    cells = make_cells((6, 0, 0))
    for site, shape in (("x", (6, 7)), ("y", (6, 9))):
        for value in (0.0, 1.0):
            expected = torch.full(shape, value)
            expected[:, 0] = 1.0
            assert np.isfinite(scores(cells, site, expected)).all()


@pytest.mark.parametrize("site", ["x", "y"])
def test_expectations_are_linear_in_trust(make_program, make_cells, site, monkeypatch):
    """What the choice relies on: it scores every t from the two extremes."""
    program, cells = make_program(), make_cells((6, 0, 0))
    _populated(program, site)
    trust = getattr(program, TRUST[site])
    found = {}
    for t in (0.0, 0.35, 1.0):
        trust.fill_(t)
        found[t] = expected_counts(program, cells, site, 20_000)
    assert not torch.allclose(found[0.0], found[1.0], rtol=0.05)
    torch.testing.assert_close(found[0.35], 0.35 * found[1.0] + 0.65 * found[0.0], rtol=0.01, atol=1e-3)
    # However few draws are decoded at once.
    trust.fill_(0.35)
    few = expected_counts(program, cells, site, 200)
    monkeypatch.setattr(predictive, "_BLOCK", 6 * 9 * 4)
    torch.testing.assert_close(expected_counts(program, cells, site, 200), few, rtol=1e-5, atol=1e-6)


def test_of_numbers_that_are_as_good_the_neutral_one_is_taken():
    rng, grid = np.random.default_rng(0), np.array(GRID)[:, None]
    # No difference beyond noise, then a little, then enough to be sure that less (or more) is better.
    for slope, chosen in ((0.0, 0.5), (0.1, 0.5), (30.0, 1.0), (-30.0, 0.05)):
        cells = slope + rng.standard_normal(20)
        cells -= cells.mean() - slope
        assert nearest_to_neutral(grid * cells) == chosen
    # A top in between, of which all are sure.
    tops = 0.8 + 0.02 * rng.standard_normal(50)
    assert nearest_to_neutral(-100 * (grid - tops) ** 2) == pytest.approx(0.8, abs=0.051)
    # Sure that it is less than 1/2, but not how much: the largest of these.
    found = nearest_to_neutral(-100 * (grid - rng.normal(0.25, 0.5, 30)) ** 2)
    assert 0.2 <= found < 0.5


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
    expression, accessibility = float(model.program.rna_trust), float(model.program.atac_trust)
    if unrelated:
        # Of accessibility hardly anything is decoded there, whatever the weight.
        assert expression <= 0.25
    else:
        assert min(expression, accessibility) >= 0.7


@pytest.mark.parametrize("site", ["x", "y"])
def test_the_choice_is_right_for_other_cells(chosen, site):
    """It predicts new cells nearly as well as the best of all, better than whole trust where that is wrong."""
    model, unrelated, cells = chosen
    trust = getattr(model.program, TRUST[site])
    taken, found = float(trust), {}
    for tried in GRID[1::2]:
        trust.fill_(tried)
        found[tried] = scores(cells, site, expected_counts(model.program, cells, site, 50))
    trust.fill_(taken)
    nearest = min(found, key=lambda tried: abs(tried - taken))
    best = max(found, key=lambda tried: found[tried].mean())
    # Of what lies between no trust and the best prediction, at most this share is given away.
    worst = min(values.mean() for values in found.values())
    lost = found[best] - found[nearest]
    assert lost.mean() <= max(0.1 * (found[best].mean() - worst), 3 * lost.std() / len(lost) ** 0.5)
    if unrelated and site == "x":
        gain = found[nearest] - found[1.0]
        assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def _set_up(make_model=MULTIVI, n=(60, 20, 20), **choices):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    return make_model(adata, n_hidden=8, n_latent=2, **choices)


def _train(model, **arguments):
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return float(model.program.rna_trust), float(model.program.atac_trust)


def test_without_enough_pairs_all_is_trusted():
    # 6 pairs are held out, or none.
    for arguments in ({}, {"train_size": 1.0}):
        assert _train(_set_up(), **arguments) == (1.0, 1.0)
    assert _train(_set_up(n=(0, 60, 60))) == (1.0, 1.0)


def test_a_likelihood_without_a_mean_is_left_alone_and_the_other_is_not(monkeypatch, caplog):
    def scored(cells, site, expected):
        if site == "x":
            raise NotImplementedError
        # Each better than the one before, of two cells alike.
        return np.full(2, float(next(order)))

    order = iter(range(len(GRID)))
    monkeypatch.setattr(learning_trust, "scores", scored)
    monkeypatch.setattr(learning_trust, "GRID", GRID[::-1])
    assert _train(_set_up(n=(200, 0, 0))) == (1.0, pytest.approx(GRID[0]))
    assert "expression is imputed with whole trust in what else was measured: the likelihood at 'x'" in caplog.text


def test_a_likelihood_that_knows_no_probability_trains(caplog):
    class Nameless(MultiVIProgram):
        def open_probability(self, y):
            raise NotImplementedError

    assert _train(_set_up(n=(200, 0, 0), program_class=Nameless))[1] == 1.0
    assert "the likelihood at 'y' has no mean" in caplog.text


def test_an_interrupted_choice_leaves_a_usable_model(monkeypatch, caplog):
    def interrupted(cells, site, expected):
        raise KeyboardInterrupt

    monkeypatch.setattr(learning_trust, "scores", interrupted)
    model = _set_up(n=(200, 0, 0))
    assert _train(model) == (1.0, 1.0)
    assert model.is_trained
    assert caplog.text.count("interrupted after training") == 1


def test_pairs_held_out_decide_and_few_of_them_if_wide(monkeypatch, fitted):
    asked = []

    def recorded(program, cells, site, n_samples):
        asked.append((site, cells, float(program.rna_trust), float(program.atac_trust)))
        return torch.full((len(cells), 2), float(getattr(program, TRUST[site])))

    def scored(cells, site, expected):
        return -np.abs(expected[:, 0].numpy() - 0.75)

    monkeypatch.setattr(learning_trust, "expected_counts", recorded)
    monkeypatch.setattr(learning_trust, "scores", scored)
    monkeypatch.setattr(learning_trust, "_FEWEST", 12)
    monkeypatch.setattr(learning_trust, "_ENTRIES", 70 * 20)
    program = MultiVIProgram(fitted.program.config)
    table = fitted._table
    train, held_out = (Minibatches(table, torch.arange(*ends), batch_size=32) for ends in ((0, 20), (20, 160)))
    learn_trust(program, train, held_out)
    assert (float(program.rna_trust), float(program.atac_trust)) == (0.75, 0.75)
    assert [site for site, *_ in asked] == ["x", "x", "y", "y"]
    # Each of its extremes, while nothing is known of the other.
    assert [trusts for *_, x, y in asked for trusts in [(x, y)]] == [(1, 1), (0, 1), (0.75, 1), (0.75, 0)]
    pairs = set(range(20, 160)) & set((table.has_rna & table.has_atac).nonzero().squeeze(-1).tolist())
    for site, cells, *_ in asked:
        assert len(cells) == min(len(pairs), {"x": 1400 // 40, "y": 20}[site])
        assert set(cells.index.tolist()) <= pairs


@pytest.mark.parametrize("site", ["x", "y"])
def test_a_population_is_the_training_cells_in_which_a_modality_was_measured(fitted, site):
    program = MultiVIProgram(fitted.program.config)
    program.load_state_dict(fitted.program.state_dict())
    table, index = fitted._table, torch.arange(0, 200, 2)
    gather(program, Minibatches(table, index), site)
    has = index[(table.has_rna if site == "x" else table.has_atac)[index]]
    population = Population.of(program, site)
    for code in (0, 1):
        members = has[table.batch_code[has] == code]
        with evaluating(program):
            nodes = draw_latents(program, fitted.minibatch(members.numpy())).trace.nodes
        expected = nodes["z"]["value"].reshape(-1, 3)
        start, size = int(population.start[code]), int(population.size[code])
        assert size == len(members)
        assert torch.equal(population.z[start : start + size], expected)


def test_batches_share_the_room_of_a_population():
    adata = simulate_multiome((900, 0, 0), 20, 30, n_batches=3, seed=1)
    # Batches of 500, 380 and 20 cells.
    adata.obs["batch"] = np.repeat(["a", "b", "c"], [500, 380, 20])
    MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = MULTIVI(adata, n_hidden=8, n_latent=2)
    gather(model.program, Minibatches(model._table), "x")
    assert Population.of(model.program, "x").size.tolist() == [170, 170, 20]
    # Anew, nothing of before is left.
    model.program.rna_population.fill_(-1.0)
    gather(model.program, Minibatches(model._table, torch.arange(490, 510)), "x")
    assert Population.of(model.program, "x").size.tolist() == [10, 10, 20]


def test_many_batches_have_a_population_of_their_own():
    program = MultiVIProgram(ProgramConfig(n_genes=5, n_regions=5, n_hidden=4, n_latent=2, n_batch=60))
    assert len(program.rna_population) // 60 >= 10


def test_training_forgets_what_was_learned_of_other_weights():
    model = _set_up(n=(200, 0, 0))
    seen = []
    _train(model)
    assert Population.of(model.program, "x") is not None
    model.program.rna_trust.fill_(0.4)
    model.program.rna_depth_link.fill_(1.0)
    # Without held-out cells nothing is learned anew; nor is it there while training goes on.
    _train(model, train_size=1.0, callbacks=[lambda *_: seen.append(float(model.program.rna_trust))])
    assert seen == [1.0]
    assert (float(model.program.rna_trust), float(model.program.atac_trust)) == (1.0, 1.0)
    assert Population.of(model.program, "x") is None
    assert not bool(model.program.rna_depth_link.any())


def test_scores_that_are_no_numbers_leave_whole_trust(monkeypatch, caplog):
    monkeypatch.setattr(learning_trust, "scores", lambda cells, site, expected: np.full(len(cells), np.nan))
    assert _train(_set_up(n=(200, 0, 0))) == (1.0, 1.0)
    assert "held-out counts at 'y' have scores that are no numbers" in caplog.text


def test_cells_in_which_nothing_was_measured_keep_their_prior(make_program, make_cells):
    program, cells = make_program(), make_cells()
    nothing = torch.zeros(12, dtype=torch.bool)
    cells = hide(hide(cells, "x"), "y")
    assert torch.equal(cells.has_rna | cells.has_atac, nothing)
    plain = draw(program, cells, ("rho", "p"), n_samples=4)
    for site in ("x", "y"):
        _populated(program, site)
        getattr(program, TRUST[site]).fill_(0.2)
    for site, values in draw(program, cells, ("rho", "p"), n_samples=4).items():
        assert torch.equal(values.dense(), plain[site].dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_that_lacks_a_modality_is_imputed_from_all_others(make_program, make_cells, dtype):
    program, cells = make_program(dtype), make_cells(dtype=dtype)
    _, many = _populated(program, "x", (0, 30))
    program.rna_trust.fill_(0.0)
    found = draw(program, cells, ("rho",), n_samples=60)["rho"].dense()
    of_first = [cell for cell in range(8, 12) if cells.design[cell, 0] == 1]
    assert of_first
    for cell in of_first:
        expected = program.expression(many.to(dtype), cells.design[[cell]].expand(30, -1)).rho.dense()
        distance = (found[:, cell, None] - expected).abs().amax(-1)
        assert bool((distance.min(1).values < 1e-5).all())
        # Each of the thirty about twice: of independent draws one would come up six times.
        times = torch.bincount(distance.argmin(1), minlength=30)
        assert int(times.max()) <= 4
        assert int((times > 0).sum()) >= 22


def test_what_was_learned_is_saved_and_models_of_before_are_read(fitted):
    program = MultiVIProgram(fitted.program.config)
    _populated(program, "y", (20, 0))
    program.atac_trust.fill_(0.35)
    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(program.state_dict())
    assert float(again.atac_trust) == pytest.approx(0.35)
    assert torch.equal(again.atac_population, program.atac_population)
    old = {name: value for name, value in program.state_dict().items() if "_trust" not in name}
    old = {name: value for name, value in old.items() if "_population" not in name}
    old["rna_temper"] = torch.tensor(0.2)
    before = dict(old)
    again.load_state_dict(old)
    assert (float(again.rna_trust), float(again.atac_trust)) == (1.0, 1.0)
    assert Population.of(again, "y") is None
    assert old.keys() == before.keys()


def test_a_hidden_modality_is_predicted_as_a_missing_one(make_program, make_cells):
    """What checks on held-out cells judge is what is imputed."""
    program, cells = make_program(), make_cells((4, 0, 0))
    _populated(program, "x")
    program.rna_trust.fill_(0.2)
    [(_, found)] = replicate(program, cells, 10, hidden="x", hidden_depth="prior")
    expected = draw(program, hide(cells, "x"), ("rho", "l"), 10)
    torch.testing.assert_close(found["x"].fn.rho.dense(), expected["rho"].dense())
