"""Scores of predictions that are right and of some that are wrong."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_multivi.posterior.checks.scoring import LEVELS, Coverage, Imputation, Reliability


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
