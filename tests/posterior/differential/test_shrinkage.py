"""A prior learnt from all features, and the posteriors it gives."""

from __future__ import annotations

import numpy as np
import pytest

from pyro_multivi.isolation import isolated
from pyro_multivi.posterior.differential.effect import estimated_delta
from pyro_multivi.posterior.differential.shrinkage import ShrinkagePrior, unshrunk
from pyro_multivi.posterior.differential.tables import expected_fdr_calls


def test_shrinkage_controls_false_discoveries_where_a_flat_prior_does_not():
    realised = {"flat": [], "shrunk": []}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = np.where(rng.random(2000) < 0.2, rng.normal(0, 0.3, 2000), 0.0)
        error = rng.uniform(0.05, 0.2, 2000)
        estimate = truth + error * rng.standard_normal(2000)
        prior = ShrinkagePrior.fit(estimate, error, rng)
        for name, posterior in (("flat", unshrunk), ("shrunk", prior.posterior)):
            changes = posterior(estimate, error)
            called = expected_fdr_calls(np.maximum(changes.above(0.05), changes.below(-0.05)), 0.05)
            assert called.sum() > 50
            realised[name].append((called & (np.abs(truth) < 0.05)).sum() / called.sum())
    assert np.mean(realised["shrunk"]) < 0.06
    assert np.mean(realised["flat"]) > 0.12


def test_draws_of_a_posterior_follow_it():
    rng = np.random.default_rng(0)
    estimate, error = np.linspace(-1, 1, 50), np.full(50, 0.2)
    changes = ShrinkagePrior.fit(estimate, error, rng).posterior(estimate, error)
    draws = changes.draws(20_000, rng)
    np.testing.assert_allclose(draws.mean(0), changes.mean(), atol=0.01)
    np.testing.assert_allclose(draws.std(0), changes.std(), atol=0.01)
    np.testing.assert_allclose((draws >= 0.3).mean(0), changes.above(0.3), atol=0.02)


def test_the_centre_is_what_shares_of_a_whole_have_in_common():
    """Where a few features take a larger share of a whole, all others go down by one factor."""
    rng = np.random.default_rng(0)
    truth = np.where(np.arange(2000) < 200, 2.0, -0.4)
    error = np.full(2000, 0.3)
    estimate = truth + error * rng.standard_normal(2000)
    assert ShrinkagePrior.fit(estimate, error, rng).centre == 0
    prior = ShrinkagePrior.fit(estimate, error, rng, common_error=0.02)
    assert prior.centre == pytest.approx(-0.4, abs=0.03)
    changes = prior.posterior(estimate, error)
    assert (changes.below(-0.25)[200:] > 0.9).mean() > 0.9
    assert (changes.above(0.25)[:200] > 0.9).mean() > 0.9


def test_a_common_change_near_the_bound_makes_nothing_sure():
    """All features err together: if their common change is known to 0.03 only, none is known to be beyond."""
    rng = np.random.default_rng(0)
    error = np.full(2000, 0.3)
    estimate = -0.27 + error * rng.standard_normal(2000)
    below = ShrinkagePrior.fit(estimate, error, rng, common_error=0.03).posterior(estimate, error).below(-0.25)
    assert below.max() < 0.95
    assert 0.5 < below.mean() < 0.9


def test_little_to_learn_from():
    estimate, error = np.array([1.0, 1.1]), np.array([0.5, 0.5])
    assert 0 < ShrinkagePrior.fit(estimate, error, np.random.default_rng(0), common_error=0.1).centre < 0.3
    empty = np.array([np.nan])
    prior = ShrinkagePrior.fit(empty, empty, np.random.default_rng(0), common_error=0.1)
    assert prior.centre == 0
    assert np.isfinite(prior.share).all()


def test_densities_that_are_0_are_no_error():
    rng = np.random.default_rng(0)
    change = np.concatenate([rng.normal(0, 0.01, 300), [5.0, -5.0]])
    error = np.full(302, 0.01)
    # As within every method of a model.
    with np.errstate(all="raise"), isolated():
        changes = ShrinkagePrior.fit(change, error, rng).posterior(change, error)
        assert changes.above(0.1)[300] == changes.below(-0.1)[301] == 1
        assert np.isfinite([changes.mean(), changes.std()]).all()
        assert estimated_delta(change, 0.05) >= 0.05
