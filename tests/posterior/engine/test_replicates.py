"""Replicated counts, the sums made of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.modality import RNA
from pyro_multivi.posterior.checks.scoring import LEVELS, Coverage, Imputation, Reliability
from pyro_multivi.posterior.checks.statistics import FeatureSums, compare
from pyro_multivi.posterior.engine import replicates as predictive
from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.posterior.engine.replicates import hide, observed_matrix, replicate


def drawn(program, cells, n_samples, **choices):
    """All draws of both sites, (S, B, F), and their expectations."""
    parts = list(replicate(program, cells, n_samples, **choices))
    assert [draws.start for draws, _ in parts] == sorted(draws.start for draws, _ in parts)
    return {
        site: tuple(torch.cat(side) for side in zip(*((f[site].values, f[site].mean()) for _, f in parts), strict=True))
        for site in ("x", "y")
    }


def test_replicates_are_counts_of_measured_and_missing_cells_alike(make_program, make_cells):
    program, cells = make_program(), make_cells()
    found = drawn(program, cells, 400)
    x, y = found["x"][0], found["y"][0]
    assert x.shape == (400, 12, 7)
    assert y.shape == (400, 12, 9)
    assert bool((x == x.round()).all() and (x >= 0).all())
    assert set(y.unique().tolist()) == {0.0, 1.0}
    missing = ~cells.has_rna
    assert bool((x[:, missing].sum((0, 2)) > 0).all())
    # Their mean is that of the distributions they were drawn from.
    for values, mean in found.values():
        values, mean = values.sum(-1), mean.sum(-1)
        error = values.std(0) / 400**0.5
        assert bool(((values.mean(0) - mean.mean(0)).abs() < 5 * error).all())


def test_draws_do_not_depend_on_their_number_nor_on_where_blocks_end(make_program, make_cells, monkeypatch):
    program, cells = make_program(), make_cells()
    many = drawn(program, cells, 30)["x"][1]
    monkeypatch.setattr(predictive, "_BLOCK", 12 * 9 * 7)
    # Expectations depend on latents alone.
    torch.testing.assert_close(drawn(program, cells, 10)["x"][1], many[:10])


def test_same_seed_same_replicates_and_no_global_state(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = torch.get_rng_state()
    first, again, other = (drawn(program, cells, 5, seed=seed)["x"][0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("site", "other"), [("x", "y"), ("y", "x")])
def test_hidden_counts_are_not_seen(make_program, make_cells, site, other):
    program, cells = make_program(), make_cells((6, 0, 0))
    changed = cells.replace(**{site: getattr(make_cells((6, 0, 0), seed=1), site)})
    before, after = (drawn(program, these, 20, hidden=site, hidden_depth="prior") for these in (cells, changed))
    for name in (site, other):
        assert torch.equal(before[name][1], after[name][1])
    seen = drawn(program, cells, 20)
    assert not torch.equal(seen[other][1], before[other][1])


def test_depth_of_a_hidden_modality_is_that_inferred_from_it(make_program, make_cells):
    program, cells = make_program(), make_cells((6, 0, 0))
    hidden = drawn(program, cells, 20, hidden="x")["x"][1]
    shares = draw(program, hide(cells, RNA), ("rho",), 20)["rho"].dense()
    library = draw(program, cells, ("l",), 20)["l"]
    # Zero inflation takes part of the mean away; the rest is depth times profile.
    ratio = hidden / (shares * library[..., None])
    assert bool((ratio <= 1 + 1e-4).all())
    assert bool((ratio > 0).all())
    by_prior = drawn(program, cells, 20, hidden="x", hidden_depth="prior")["x"][1]
    assert not torch.allclose(by_prior, hidden)


def test_sample_returns_sparse_counts_of_the_features_asked_for(fitted):
    found = fitted.posterior_predictive_sample(
        indices=range(30), n_samples=4, gene_list=[3, 1], region_list=["region_05"], seed=1
    )
    assert {site: [part.shape for part in parts] for site, parts in found.items()} == {
        "x": [(30, 2)] * 4, "y": [(30, 1)] * 4,
    }  # fmt: skip
    assert all(sp.issparse(part) for parts in found.values() for part in parts)
    whole = fitted.posterior_predictive_sample(indices=range(30), n_samples=4, sites="x", seed=1)
    assert list(whole) == ["x"]
    assert (whole["x"][2].toarray()[:, [3, 1]] == found["x"][2].toarray()).all()


def test_too_many_samples_are_refused_with_the_alternative(fitted, monkeypatch):
    monkeypatch.setattr(predictive, "MEMORY_LIMIT", 10_000)
    with pytest.raises(MemoryError, match=r"900 replicates of 200 cells would take .* ask for fewer n_samples"):
        fitted.posterior_predictive_sample(n_samples=900)
    with pytest.raises(MemoryError, match="Statistics of 100 replicates of 110 features"):
        fitted.posterior_predictive_check()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sites": ["z"]}, r"sites=\['z'\] is not allowed: choose from 'x', 'y'"),
    ({"sites": []}, r"sites=\[\] is not allowed"),
    ({"n_samples": 0}, "n_samples=0 is not allowed"),
    ({"gene_list": ["gene_99"]}, "gene_list holds 'gene_99': no gene of the model"),
])  # fmt: skip
def test_sample_refuses(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted.posterior_predictive_sample(**arguments)


def test_sums_are_statistics_of_each_group():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (3, 20, 5))
    group = rng.integers(0, 2, 20)
    sums = FeatureSums("x", 2, 3, 5)
    for rows in (slice(0, 7), slice(7, 20)):
        for draws in (slice(0, 2), slice(2, 3)):
            sums.add(group[rows], draws, torch.from_numpy(counts[draws, rows]).float())
    for code in (0, 1):
        part = counts[:, group == code]
        found = sums.statistics(code)
        np.testing.assert_allclose(found["mean"], part.mean(1))
        np.testing.assert_allclose(found["variance"], part.var(1, ddof=1))
        np.testing.assert_allclose(found["cv"], part.std(1, ddof=1) / part.mean(1))
        np.testing.assert_allclose(found["zero_fraction"], (part == 0).mean(1))


def test_p_value_counts_ties_by_half_and_leaves_out_what_is_undefined():
    observed = np.array([1.0, 5.0, np.nan, 2.0])
    replicated = np.array([[1, 1, 1, np.nan], [0, 2, 1, 3], [1, 3, 1, 1], [2, 4, 1, 3]], float)
    found = compare(observed, replicated, 0.5)
    np.testing.assert_allclose(found["p_value"], [0.5, 0.0, np.nan, 2 / 3])
    np.testing.assert_allclose(found["replicated"], [1.0, 2.5, 1.0, 7 / 3])
    assert (found["lower"] <= found["replicated"]).all()
    assert (found["upper"] >= found["replicated"]).all()


def test_coverage_of_the_right_model_is_nominal_even_for_mostly_zero_counts():
    rng = np.random.default_rng(0)
    coverage = Coverage()
    for mean in (0.05, 1.0, 30.0):
        counts, replicates = rng.poisson(mean, 20_000), rng.poisson(mean, (19, 20_000))
        below, equal = (replicates < counts).sum(0)[None], (replicates == counts).sum(0)[None]
        coverage.add(below, equal, 19, np.full(below.shape, mean))
    curve = coverage.curve()
    assert curve["nominal"].tolist() == 2 * list(LEVELS)
    assert curve["n"].unique().tolist() == [60_000, 40_000]
    assert curve["covered"].to_numpy() == pytest.approx(curve["nominal"].to_numpy(), abs=0.01)
    narrow = Coverage()
    counts, replicates = rng.negative_binomial(1, 0.1, 20_000), rng.poisson(9.0, (99, 20_000))
    below, equal = (replicates < counts).sum(0)[None], (replicates == counts).sum(0)[None]
    narrow.add(below, equal, 99, np.full(below.shape, 9.0))
    assert narrow.scores()["coverage_90"] == narrow.scores()["coverage_90_expected_1"] < 0.5


def test_reliability_of_right_and_of_wrong_probabilities():
    rng = np.random.default_rng(0)
    probability = rng.beta(0.5, 2.0, (2000, 30))
    is_open = (rng.random(probability.shape) < probability).astype(float)
    right, wrong = Reliability(30), Reliability(30)
    for rows in (slice(0, 900), slice(900, 2000)):
        right.add(probability[rows], is_open[rows])
        wrong.add(np.sqrt(probability[rows]), is_open[rows])
    scores = right.scores()
    assert scores["ece"] < 0.005
    assert scores["brier"] == pytest.approx(((probability - is_open) ** 2).mean())
    assert scores["brier"] < scores["brier_of_region_rates"]
    assert wrong.scores()["ece"] == pytest.approx((np.sqrt(probability) - probability).mean(), abs=0.01)
    curve = right.curve()
    assert curve["n"].sum() == probability.size
    assert (curve["predicted"] >= curve["from"]).all()
    assert (curve["predicted"] <= curve["to"]).all()


def test_imputation_correlates_feature_by_feature():
    rng = np.random.default_rng(0)
    measured = rng.poisson(3.0, (50, 4)).astype(float)
    predicted = measured * [1.0, -1.0, 0.0, 2.0] + [0.0, 10.0, 3.0, 1.0]
    imputation = Imputation(4)
    imputation.add(predicted[:20], measured[:20])
    imputation.add(predicted[20:], measured[20:])
    table = imputation.table()
    np.testing.assert_allclose(table["measured"], measured.mean(0))
    np.testing.assert_allclose(table["correlation"], [1.0, -1.0, np.nan, 1.0], atol=1e-9)


def test_observed_matrix_is_the_data_as_the_model_sees_them(fitted):
    matrix = observed_matrix(fitted.program, Minibatches(fitted._table, batch_size=64)).toarray()
    counts = fitted.adata.X.toarray()
    n_genes = fitted.spec.n_genes
    assert (matrix[:, :n_genes] == counts[:, :n_genes]).all()
    assert (matrix[:, n_genes:] == (counts[:, n_genes:] > 0)).all()
