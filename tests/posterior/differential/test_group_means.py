"""Test of the counts of two groups where nothing differs, and where a known share does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, mannwhitneyu, norm

from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.posterior.differential.effect import Change, StatisticsByBlock
from pyro_multivi.posterior.differential.group_means import GroupCounts, change_by_counts, compare_counts
from pyro_multivi.posterior.differential.shrinkage import ShrinkagePrior
from pyro_multivi.posterior.differential.tables import expected_fdr_calls

N_FEATURES = 200


def of_cells(x, binary):
    """Counts of cells as evidence, from their definitions."""
    n, depth = len(x), np.ones(len(x)) if binary else x.sum(1)
    rate = x.sum(0) / depth.sum()
    excess = ((x - np.outer(depth, rate)) ** 2 / depth[:, None]).sum(0) - (n - 1) * rate
    exposure = np.full(x.shape[1], depth.sum())
    base = rate**2 * depth.sum() * (n - 1) / n
    return GroupCounts(n, n - 1, rate, exposure, depth.sum() ** 2 / (depth**2).sum(), excess, base)


def compared(first, second, modality):
    return compare_counts((of_cells(first, modality.binary), of_cells(second, modality.binary)), modality)


def called(first, second, modality):
    name, delta = ("difference", 0.05) if modality.binary else ("log-fold", 0.25)
    change, error = change_by_counts(Change.of(name), 1e-6, compared(first, second, modality))
    found = ShrinkagePrior.fit(change, error, np.random.default_rng(0)).posterior(change, error)
    return expected_fdr_calls(np.maximum(found.above(delta), found.below(-delta)), 0.05)


def drawn(rng, modality, n, factor=1.0):
    """Cells whose rates spread; a share of the features has them times ``factor``."""
    level = np.random.default_rng(0)
    if modality.binary:
        p = level.uniform(0.02, 0.6, N_FEATURES)
        return (rng.random((n, N_FEATURES)) < np.minimum(p * factor, 1)).astype(float)
    mean = np.exp(level.normal(0.5, 1, N_FEATURES))
    mean[20:40] = mean[:20]
    mean = mean * factor
    depth = np.exp(0.4 * rng.standard_normal((n, 1)))
    return rng.poisson(depth * mean * rng.gamma(2, 0.5, (n, N_FEATURES))).astype(float)


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_scores_of_groups_that_do_not_differ_are_normal(modality):
    rng = np.random.default_rng(1)
    scores = [compared(drawn(rng, modality, 60), drawn(rng, modality, 300), modality).score for _ in range(10)]
    scores = np.concatenate(scores)
    # Of 2000 scores: a distance of 0.04 has a probability of 0.003; that of counts is not quite continuous.
    assert kstest(scores, norm.cdf).statistic < 0.05
    assert 0.9 < scores.std() < 1.05


@pytest.mark.parametrize("n", [3, 5, 10, 30])
@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_few_cells_call_nothing_that_does_not_differ(modality, n):
    rng = np.random.default_rng(n)
    some = [called(drawn(rng, modality, n), drawn(rng, modality, 400), modality).any() for _ in range(40)]
    # Target 5 %: of 40, more than 5 have a probability of 0.014 even at the target itself.
    assert np.sum(some) <= 5


@pytest.mark.parametrize("n", [10, 30, 100])
def test_power_is_that_of_a_wilcoxon_test_or_more(n):
    rng, found = np.random.default_rng(n), {"ours": [], "wilcoxon": []}
    # As much more as less: the shares of all others stay.
    factor = np.repeat([1.6, 0.4, 1.0], [20, 20, N_FEATURES - 40])
    for _ in range(6):
        first, second = drawn(rng, RNA, n, factor), drawn(rng, RNA, 400)
        scores = {"ours": np.abs(compared(first, second, RNA).score)}
        logs = [np.log1p(500 * x / x.sum(1, keepdims=True)) for x in (first, second)]
        scores["wilcoxon"] = -np.nan_to_num(mannwhitneyu(*logs).pvalue, nan=1.0)
        for name, score in scores.items():
            # Share of the changed features above all but 5 % of the others.
            found[name].append((score[:40] > np.quantile(score[40:], 0.95)).mean())
    assert np.mean(found["ours"]) >= np.mean(found["wilcoxon"]) - 0.02, found
    assert np.mean(found["ours"]) > 0.3


def test_blocks_of_statistics_keep_nothing_of_what_they_were_taken_from():
    ordered = np.arange(6.0).reshape(3, 2)
    found = StatisticsByBlock(5)
    found.put(slice(3, 5), {"min": torch.tensor([7.0, 8.0])})
    found.put(slice(0, 3), {"min": ordered[:, 0]})
    ordered[:] = np.nan
    assert found.of_all()["min"].tolist() == [0.0, 2.0, 4.0, 7.0, 8.0]
    assert all(array.base is None for block in found._blocks for array in block.values())
