"""Fit of the mixture weights and of the populations they need."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, ProgramConfig, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.posterior.calibration import fit_mixture as fitting
from pyro_multivi.posterior.calibration.fit_mixture import (
    WEIGHTS,
    fit_mixture,
    nearest_to_neutral,
    scores,
    store_population,
)
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.population_mixture import AggregatePosterior, weight_buffer
from pyro_multivi.posterior.engine.replicates import expected_counts
from pyro_multivi.traces import evaluation_mode

EACH_MODALITY = pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.key)


def test_scores_are_the_log_probabilities_of_hidden_counts(make_cells):
    cells, rng = make_cells((6, 0, 0)), np.random.default_rng(0)
    expected = torch.as_tensor(rng.gamma(2.0, 1.0, (6, 7)))
    counts = cells.x.to_dense().double().numpy()
    share = expected.numpy() / expected.numpy().sum(1, keepdims=True)
    whole = scipy.stats.multinomial.logpmf(counts, counts.sum(1), share)
    flat = scipy.stats.multinomial.logpmf(counts, counts.sum(1), np.full(7, 1 / 7))
    found = scores(cells, RNA, expected) - counts.sum(1) * np.log(1 / 7)
    np.testing.assert_allclose(found, whole - flat, rtol=1e-6, atol=1e-6)
    p = torch.as_tensor(rng.random((6, 9)))
    is_open = cells.y.to_dense().numpy() > 0
    expected = scipy.stats.bernoulli.logpmf(is_open, p.numpy()).sum(1)
    np.testing.assert_allclose(scores(cells, ATAC, p), expected, rtol=1e-6)


def test_impossible_predictions_have_a_finite_score(make_cells):
    cells = make_cells((6, 0, 0))
    for modality, shape in ((RNA, (6, 7)), (ATAC, (6, 9))):
        for value in (0.0, 1.0):
            expected = torch.full(shape, value)
            expected[:, 0] = 1.0
            assert np.isfinite(scores(cells, modality, expected)).all()


def test_of_numbers_that_are_as_good_the_neutral_one_is_taken():
    rng, grid = np.random.default_rng(0), np.array(WEIGHTS)[:, None]
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
    """A model of modalities that predict each other well, or not at all; which of both; and other cells."""
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


def test_unrelated_modalities_get_a_small_weight(chosen):
    model, unrelated, _ = chosen
    expression, accessibility = float(model.program.rna_mixture_weight), float(model.program.atac_mixture_weight)
    if unrelated:
        # Accessibility of unrelated cells is predicted as badly with any weight.
        assert expression <= 0.175
    else:
        assert min(expression, accessibility) >= 0.7


@EACH_MODALITY
def test_the_choice_is_right_for_other_cells(chosen, modality):
    """It predicts new cells best of all candidates, up to noise, and better than no mixture where that is wrong."""
    model, unrelated, cells = chosen
    weight = weight_buffer(model.program, modality)
    taken, found = float(weight), {}
    for tried in WEIGHTS[1::2]:
        weight.fill_(tried)
        found[tried] = scores(cells, modality, expected_counts(model.program, cells, modality, 50))
    weight.fill_(taken)
    nearest = min(found, key=lambda tried: abs(tried - taken))
    best = max(found, key=lambda tried: found[tried].mean())
    lost = found[best] - found[nearest]
    assert lost.mean() <= 3 * lost.std() / len(lost) ** 0.5
    if unrelated and modality is RNA:
        gain = found[nearest] - found[1.0]
        assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5


def _set_up(make_model=MULTIVI, n=(60, 20, 20), **choices):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    return make_model(adata, n_hidden=8, n_latent=2, **choices)


def _train(model, **arguments):
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return float(model.program.rna_mixture_weight), float(model.program.atac_mixture_weight)


def test_without_enough_pairs_there_is_no_mixture():
    # 6 pairs are held out, or none.
    for arguments in ({}, {"train_size": 1.0}):
        assert _train(_set_up(), **arguments) == (1.0, 1.0)
    assert _train(_set_up(n=(0, 60, 60))) == (1.0, 1.0)


def test_a_likelihood_without_a_mean_is_left_alone_and_the_other_is_not(monkeypatch, caplog):
    def scored(cells, modality, expected):
        if modality is RNA:
            raise NotImplementedError
        # Each better than the one before, of two cells alike.
        return np.full(2, float(next(order)))

    order = iter(range(len(WEIGHTS)))
    monkeypatch.setattr(fitting, "scores", scored)
    monkeypatch.setattr(fitting, "WEIGHTS", WEIGHTS[::-1])
    assert _train(_set_up(n=(200, 0, 0))) == (1.0, pytest.approx(WEIGHTS[0]))
    assert "expression is imputed without a population mixture: the likelihood at 'x' has no mean" in caplog.text


def test_a_likelihood_without_open_probability_trains(caplog):
    class Nameless(MultiVIProgram):
        def open_probability(self, y):
            raise NotImplementedError

    assert _train(_set_up(n=(200, 0, 0), program_class=Nameless))[1] == 1.0
    assert "the likelihood at 'y' has no mean" in caplog.text


def test_an_interrupted_choice_leaves_a_usable_model(monkeypatch, caplog):
    def interrupted(cells, modality, expected):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "scores", interrupted)
    model = _set_up(n=(200, 0, 0))
    assert _train(model) == (1.0, 1.0)
    assert model.is_trained
    assert caplog.text.count("interrupted after training") == 1


def test_pairs_held_out_decide_and_few_of_them_if_wide(monkeypatch, fitted):
    calls = []

    def recorded(program, cells, modality, n_samples):
        calls.append((modality, cells, float(program.rna_mixture_weight), float(program.atac_mixture_weight)))
        return torch.full((len(cells), 2), float(weight_buffer(program, modality)))

    def scored(cells, modality, expected):
        return -np.abs(expected[:, 0].numpy() - 0.75)

    monkeypatch.setattr(fitting, "expected_counts", recorded)
    monkeypatch.setattr(fitting, "scores", scored)
    monkeypatch.setattr(fitting, "_LEAST", 12)
    monkeypatch.setattr(fitting, "_ENTRIES", 70 * 20)
    program = MultiVIProgram(fitted.program.config)
    table = fitted._table
    train, held_out = (Minibatches(table, torch.arange(*ends), batch_size=32) for ends in ((0, 20), (20, 160)))
    fit_mixture(program, train, held_out)
    assert (float(program.rna_mixture_weight), float(program.atac_mixture_weight)) == (0.75, 0.75)
    assert [modality for modality, *_ in calls] == [RNA, RNA, ATAC, ATAC]
    # Both extremes of each, while the weight of the next is not chosen yet.
    assert [weights for *_, rna, atac in calls for weights in [(rna, atac)]] == [(1, 1), (0, 1), (0.75, 1), (0.75, 0)]
    pairs = set(range(20, 160)) & set((table.has_rna & table.has_atac).nonzero().squeeze(-1).tolist())
    for modality, cells, *_ in calls:
        assert len(cells) == min(len(pairs), {RNA: 1400 // 40, ATAC: 20}[modality])
        assert set(cells.index.tolist()) <= pairs


@EACH_MODALITY
def test_a_population_is_the_training_cells_in_which_a_modality_was_measured(fitted, modality):
    program = MultiVIProgram(fitted.program.config)
    program.load_state_dict(fitted.program.state_dict())
    table, index = fitted._table, torch.arange(0, 200, 2)
    store_population(program, Minibatches(table, index), modality)
    measured = index[modality.measured_in(table)[index]]
    population = AggregatePosterior.of(program, modality)
    for code in (0, 1):
        members = measured[table.batch_code[measured] == code]
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
    store_population(model.program, Minibatches(model._table), RNA)
    assert AggregatePosterior.of(model.program, RNA).size.tolist() == [170, 170, 20]
    # Anew, nothing of before is left.
    model.program.rna_population.fill_(-1.0)
    store_population(model.program, Minibatches(model._table, torch.arange(490, 510)), RNA)
    assert AggregatePosterior.of(model.program, RNA).size.tolist() == [10, 10, 20]


def test_many_batches_have_a_population_of_their_own():
    program = MultiVIProgram(ProgramConfig(n_genes=5, n_regions=5, n_hidden=4, n_latent=2, n_batch=60))
    assert len(program.rna_population) // 60 >= 10


def test_training_clears_the_calibration():
    model = _set_up(n=(200, 0, 0))
    seen = []
    _train(model)
    assert AggregatePosterior.of(model.program, RNA) is not None
    model.program.rna_mixture_weight.fill_(0.4)
    model.program.rna_depth_regression.fill_(1.0)
    # Without held-out cells nothing is fitted anew, and during training nothing is there.
    _train(model, train_size=1.0, callbacks=[lambda *_: seen.append(float(model.program.rna_mixture_weight))])
    assert seen == [1.0]
    assert (float(model.program.rna_mixture_weight), float(model.program.atac_mixture_weight)) == (1.0, 1.0)
    assert AggregatePosterior.of(model.program, RNA) is None
    assert not bool(model.program.rna_depth_regression.any())


def test_without_finite_scores_there_is_no_mixture(monkeypatch, caplog):
    monkeypatch.setattr(fitting, "scores", lambda cells, modality, expected: np.full(len(cells), np.nan))
    assert _train(_set_up(n=(200, 0, 0))) == (1.0, 1.0)
    assert "held-out counts at 'y' have scores that are not finite" in caplog.text


@pytest.mark.parametrize("arguments", [{"adversarial_mixing": True}, {"early_stopping_monitor": "nothing"}])
def test_a_call_that_fails_restores_the_calibration(arguments):
    model = _set_up(n=(200, 0, 0))
    _train(model)
    before = {name: value.clone() for name, value in model.program.state_dict().items()}
    # All cells are of one origin; or there is no such column.
    with pytest.raises(ValueError, match="adversarial|monitor"):
        _train(model, **arguments)
    assert AggregatePosterior.of(model.program, RNA) is not None
    for name, value in model.program.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_call_that_fails_after_an_epoch_has_other_weights():
    def refuses(epoch, row, program):
        if epoch == 2:
            raise RuntimeError("enough")

    model = _set_up(n=(200, 0, 0))
    _train(model)
    assert AggregatePosterior.of(model.program, RNA) is not None
    with pytest.raises(RuntimeError, match="enough"):
        model.train(max_epochs=3, progress_bar=False, callbacks=[refuses])
    assert AggregatePosterior.of(model.program, RNA) is None
