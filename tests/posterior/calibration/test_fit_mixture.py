"""How far a modality is trusted about the other, and whose states stand in: what is learned after training."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, ProgramConfig, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.calibration import fit_mixture as learning_trust
from pyro_multivi.posterior.calibration.fit_mixture import GRID, fit_mixture, gather, nearest_to_neutral, scores
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.population_mixture import MIXTURE_WEIGHT, AggregatePosterior
from pyro_multivi.posterior.engine.replicates import expected_counts
from pyro_multivi.traces import evaluation_mode


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
    expression, accessibility = float(model.program.rna_mixture_weight), float(model.program.atac_mixture_weight)
    if unrelated:
        # Of accessibility hardly anything is decoded there, whatever the weight.
        assert expression <= 0.175
    else:
        assert min(expression, accessibility) >= 0.7


@pytest.mark.parametrize("site", ["x", "y"])
def test_the_choice_is_right_for_other_cells(chosen, site):
    """Of all that was tried it predicts new cells best, up to noise, better than whole trust where that is wrong."""
    model, unrelated, cells = chosen
    trust = getattr(model.program, MIXTURE_WEIGHT[site])
    taken, found = float(trust), {}
    for tried in GRID[1::2]:
        trust.fill_(tried)
        found[tried] = scores(cells, site, expected_counts(model.program, cells, site, 50))
    trust.fill_(taken)
    nearest = min(found, key=lambda tried: abs(tried - taken))
    best = max(found, key=lambda tried: found[tried].mean())
    lost = found[best] - found[nearest]
    assert lost.mean() <= 3 * lost.std() / len(lost) ** 0.5
    if unrelated and site == "x":
        gain = found[nearest] - found[1.0]
        assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def _set_up(make_model=MULTIVI, n=(60, 20, 20), **choices):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    return make_model(adata, n_hidden=8, n_latent=2, **choices)


def _train(model, **arguments):
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return float(model.program.rna_mixture_weight), float(model.program.atac_mixture_weight)


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
        asked.append((site, cells, float(program.rna_mixture_weight), float(program.atac_mixture_weight)))
        return torch.full((len(cells), 2), float(getattr(program, MIXTURE_WEIGHT[site])))

    def scored(cells, site, expected):
        return -np.abs(expected[:, 0].numpy() - 0.75)

    monkeypatch.setattr(learning_trust, "expected_counts", recorded)
    monkeypatch.setattr(learning_trust, "scores", scored)
    monkeypatch.setattr(learning_trust, "_FEWEST", 12)
    monkeypatch.setattr(learning_trust, "_ENTRIES", 70 * 20)
    program = MultiVIProgram(fitted.program.config)
    table = fitted._table
    train, held_out = (Minibatches(table, torch.arange(*ends), batch_size=32) for ends in ((0, 20), (20, 160)))
    fit_mixture(program, train, held_out)
    assert (float(program.rna_mixture_weight), float(program.atac_mixture_weight)) == (0.75, 0.75)
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
    population = AggregatePosterior.of(program, site)
    for code in (0, 1):
        members = has[table.batch_code[has] == code]
        with evaluation_mode(program):
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
    assert AggregatePosterior.of(model.program, "x").size.tolist() == [170, 170, 20]
    # Anew, nothing of before is left.
    model.program.rna_population.fill_(-1.0)
    gather(model.program, Minibatches(model._table, torch.arange(490, 510)), "x")
    assert AggregatePosterior.of(model.program, "x").size.tolist() == [10, 10, 20]


def test_many_batches_have_a_population_of_their_own():
    program = MultiVIProgram(ProgramConfig(n_genes=5, n_regions=5, n_hidden=4, n_latent=2, n_batch=60))
    assert len(program.rna_population) // 60 >= 10


def test_training_forgets_what_was_learned_of_other_weights():
    model = _set_up(n=(200, 0, 0))
    seen = []
    _train(model)
    assert AggregatePosterior.of(model.program, "x") is not None
    model.program.rna_mixture_weight.fill_(0.4)
    model.program.rna_depth_regression.fill_(1.0)
    # Without held-out cells nothing is learned anew; nor is it there while training goes on.
    _train(model, train_size=1.0, callbacks=[lambda *_: seen.append(float(model.program.rna_mixture_weight))])
    assert seen == [1.0]
    assert (float(model.program.rna_mixture_weight), float(model.program.atac_mixture_weight)) == (1.0, 1.0)
    assert AggregatePosterior.of(model.program, "x") is None
    assert not bool(model.program.rna_depth_regression.any())


def test_scores_that_are_no_numbers_leave_whole_trust(monkeypatch, caplog):
    monkeypatch.setattr(learning_trust, "scores", lambda cells, site, expected: np.full(len(cells), np.nan))
    assert _train(_set_up(n=(200, 0, 0))) == (1.0, 1.0)
    assert "held-out counts at 'y' have scores that are no numbers" in caplog.text


@pytest.mark.parametrize("arguments", [{"adversarial_mixing": True}, {"early_stopping_monitor": "nothing"}])
def test_a_call_that_fails_forgets_nothing(arguments):
    model = _set_up(n=(200, 0, 0))
    _train(model)
    learned = {name: value.clone() for name, value in model.program.state_dict().items()}
    # All cells are of one origin; or there is no such column.
    with pytest.raises(ValueError, match="adversarial|monitor"):
        _train(model, **arguments)
    assert AggregatePosterior.of(model.program, "x") is not None
    for name, value in model.program.state_dict().items():
        assert torch.equal(value, learned[name]), name


def test_a_call_that_fails_after_an_epoch_has_other_weights():
    def refuses(epoch, row, program):
        if epoch == 2:
            raise RuntimeError("enough")

    model = _set_up(n=(200, 0, 0))
    _train(model)
    assert AggregatePosterior.of(model.program, "x") is not None
    with pytest.raises(RuntimeError, match="enough"):
        model.train(max_epochs=3, progress_bar=False, callbacks=[refuses])
    assert AggregatePosterior.of(model.program, "x") is None
