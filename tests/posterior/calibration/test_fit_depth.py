"""Fit of the depth regressions to cells of both modalities."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, simulate_multiome
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.posterior.calibration import fit_depth
from pyro_multivi.posterior.calibration.fit_depth import PENALTIES, fit_depth_regressions, regress
from pyro_multivi.posterior.engine.depth_regression import regression_buffer
from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.posterior.engine.replicates import replicate


def test_the_regression_is_the_average_of_ridge_regressions():
    rng = np.random.default_rng(0)
    batch = np.eye(2)[rng.integers(0, 2, 80)]
    x = np.c_[rng.normal(size=(80, 4)), batch]
    y = x @ [0.8, 0.5, -0.4, 0.0, 1.0, 2.0] + 0.7 * rng.normal(size=80)
    train, held_out = (
        (torch.tensor(x[part]).float(), torch.tensor(y[part]).float()) for part in (slice(60), slice(60, 80))
    )
    regression, explained = regress(train, held_out, n_latent=3)
    solutions, losses = [], []
    for penalty in PENALTIES:
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
    np.testing.assert_allclose(regression.coefficients, expected, rtol=1e-3, atol=1e-4)
    errors = [np.mean((t - r @ expected) ** 2) for r, t in ((x[:60], y[:60]), (x[60:], y[60:]))]
    assert regression.sd.item() == pytest.approx(max(errors) ** 0.5, rel=1e-4)
    assert explained == pytest.approx(1 - errors[1] / np.mean((y[60:] - y[:60].mean()) ** 2), rel=1e-3)


def test_without_held_out_pairs_all_penalties_count_alike():
    rng = np.random.default_rng(0)
    x = np.c_[rng.normal(size=(60, 4)), np.ones(60)]
    y = x @ [0.8, 0.5, -0.4, 0.0, 1.0] + 0.7 * rng.normal(size=60)
    regression, explained = regress((torch.tensor(x), torch.tensor(y)), None, n_latent=3)
    solutions = []
    for penalty in PENALTIES:
        rows = np.r_[x, np.diag(np.sqrt([1.0, *[min(penalty, 1e12)] * 3, 1.0]))]
        solutions.append(np.linalg.lstsq(rows, np.r_[y - y.mean(), np.zeros(5)], rcond=None)[0])
    expected = np.mean(solutions, axis=0)
    expected[-1] += y.mean()
    np.testing.assert_allclose(regression.coefficients, expected, rtol=1e-6, atol=1e-6)
    assert regression.sd.item() == pytest.approx(np.mean((y - x @ expected) ** 2) ** 0.5)
    assert explained == pytest.approx(1 - np.mean((y - x @ expected) ** 2) / np.var(y))


def test_depths_are_predicted_without_held_out_pairs():
    adata, _, n_open = _mosaic(related=True)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=32, n_latent=3)
    model.train(max_epochs=20, lr=5e-3, train_size=1.0, progress_bar=False)
    hidden = np.arange(300, 600)
    depth = draw(model.program, model.minibatch(hidden), ("d",), 100)["d"].log().mean(0).numpy()
    # 0.88; by the prior these depths are the same but for the noise of the draws.
    assert np.corrcoef(depth, np.log(n_open[hidden] + 1.0))[0, 1] > 0.7


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
def trained(request):
    adata, n_counts, n_open = _mosaic(request.param)
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=32, n_latent=3)
    model.train(max_epochs=40, lr=5e-3, progress_bar=False)
    return model, request.param, n_counts, n_open


def test_depths_are_predicted_if_they_are_related(trained):
    model, related, n_counts, n_open = trained
    drawn = {"d": (slice(300, 600), n_open), "l": (slice(600, 900), n_counts)}
    for site, (cells, truth) in drawn.items():
        depth = draw(model.program, model.minibatch(np.arange(900)[cells]), (site,), 100)[site].log().mean(0).numpy()
        correlation = np.corrcoef(depth, np.log(truth[cells] + 1.0))[0, 1]
        assert correlation > 0.5 if related else abs(correlation) < 0.25


@pytest.mark.parametrize(("modality", "cells"), [(ATAC, slice(300, 600)), (RNA, slice(600, 900))])
def test_replicates_are_as_deep_as_what_was_hidden(trained, modality, cells):
    """Intervals of 90 % for the depth of hidden cells cover it that often, and are narrower than by the prior where
    the other modality tells something."""
    model, related, n_counts, n_open = trained
    truth = (n_open if modality is ATAC else n_counts)[cells]
    program, these = model.program, model.minibatch(np.arange(900)[cells])

    def interval():
        totals = torch.cat([found[modality.counts].values.sum(-1) for _, found in replicate(program, these, 200)])
        return np.quantile(totals.numpy(), [0.05, 0.95], axis=0)

    lower, upper = interval()
    covered = np.mean((lower <= truth) & (truth <= upper))
    # 300 cells: a standard error of 2 %, the model's own error beside it.
    assert 0.83 < covered < 0.99
    stored = regression_buffer(program, modality)
    kept = stored.clone()
    stored.zero_()
    by_prior = np.subtract(*interval()[::-1])
    stored.copy_(kept)
    if related:
        assert np.mean(upper - lower) < 0.9 * np.mean(by_prior)


def test_z_counts_as_far_as_held_out_pairs_say():
    """Coefficients of z that fit training pairs alone fit memorised noise, which held-out pairs reveal."""
    rng = np.random.default_rng(1)
    x = np.c_[rng.normal(size=(400, 9)), np.ones(400)]
    y = 0.5 * x[:, 0] + rng.normal(size=400)
    memorised = y.copy()
    memorised[:200] += x[:200, 1:9] @ np.full(8, 0.5)
    parts = [torch.tensor(v).float() for v in (x[:200], memorised[:200], x[200:], y[200:])]
    regression, _ = regress((parts[0], parts[1]), (parts[2], parts[3]), n_latent=8)
    plain = np.linalg.lstsq(x[:200], memorised[:200], rcond=None)[0]
    assert np.abs(regression.coefficients[1:9].numpy()).sum() < 0.05 * np.abs(plain[1:9]).sum()
    assert regression.coefficients[0].item() == pytest.approx(0.5, abs=0.25)


def _set_up(n=(60, 20, 20), make_model=MULTIVI, setup=None, **choices):
    adata = simulate_multiome(n, 20, 30, seed=1)
    MULTIVI.setup_anndata(adata, modality_key="modality", **(setup or {}))
    return make_model(adata, n_hidden=8, n_latent=2, **choices)


def _fitted(model, **arguments):
    model.train(max_epochs=1, progress_bar=False, **arguments)
    return [bool(regression_buffer(model.program, modality)[0] > 0) for modality in MODALITIES]


def test_few_held_out_pairs_are_enough_to_predict_depth():
    assert _fitted(_set_up()) == [True, True]  # 6 are held out
    assert _fitted(_set_up((200, 0, 0)), train_size=1.0) == [True, True]


def test_without_enough_pairs_nothing_is_fitted():
    assert _fitted(_set_up((0, 60, 60))) == [False, False]
    model = _set_up((200, 0, 0))
    assert _fitted(model) == [True, True]
    model = _set_up((200, 0, 0))
    assert _fitted(model, train_size=0.02, validation_size=0.9) == [False, False]  # 4 are trained on


def test_depths_that_are_known_are_not_fitted():
    assert _fitted(_set_up((200, 0, 0), library="observed")) == [False, True]


def test_a_posterior_that_is_no_normal_is_left_alone():
    class StudentT(MultiVIProgram):
        def mix(self, experts):
            loc, scale = self.averaged(experts)
            return dist.StudentT(5.0 * torch.ones_like(loc), loc, scale).to_event(1)

    from pyro.infer import Trace_ELBO

    model = _set_up((200, 0, 0), program_class=StudentT)
    assert _fitted(model, elbo=Trace_ELBO()) == [False, False]


def test_an_interrupted_fit_leaves_a_usable_model(monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_depth, "_regression_data", interrupted)
    model = _set_up((200, 0, 0))
    assert _fitted(model) == [False, False]
    assert model.is_trained
    assert "interrupted after training: depths of what was not measured keep their priors" in caplog.text


def test_it_is_fitted_to_pairs_of_the_right_cells(monkeypatch, fitted):
    used = []

    def recorded(program, cells, pairs, hidden):
        used.append((hidden, pairs.tolist()))

    monkeypatch.setattr(fit_depth, "_regression_data", recorded)
    monkeypatch.setattr(fit_depth, "_MOST", 25)
    table = fitted._table
    both = set((table.has_rna & table.has_atac).nonzero().squeeze(-1).tolist())
    train, held_out = (Minibatches(table, torch.arange(*ends), batch_size=16) for ends in ((0, 60), (60, 100)))
    fit_depth_regressions(MultiVIProgram(fitted.program.config), train, held_out)
    assert [hidden for hidden, _ in used] == [RNA, RNA, ATAC, ATAC]
    for (_, pairs), (first, last) in zip(used, [(0, 60), (60, 100)] * 2, strict=True):
        allowed = both & set(range(first, last))
        assert set(pairs) <= allowed
        assert len(pairs) == min(25, len(allowed))


def test_the_regressions_are_saved(tmp_path):
    model = _set_up((200, 20, 20))
    assert _fitted(model) == [True, True]
    model.save(tmp_path / "model", save_anndata=True)
    again = MULTIVI.load(tmp_path / "model")
    assert torch.equal(again.program.atac_depth_regression, model.program.atac_depth_regression)
    factors = [
        m.get_accessibility_estimates(normalize_cells=True, n_samples=5, return_numpy=True) for m in (model, again)
    ]
    np.testing.assert_array_equal(*factors)
