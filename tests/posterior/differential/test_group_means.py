"""Test of the counts of two groups where nothing differs, and where a known share does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import binom, kstest, mannwhitneyu, norm

from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.posterior.differential.effect import Change, StatisticsByBlock
from pyro_multivi.posterior.differential.group_means import (
    GroupCounts,
    change_by_counts,
    compare_counts,
    counts_of_group,
)
from pyro_multivi.posterior.differential.raw_counts import PseudobulkSums
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


def open_cells(k, n, expected, mean):
    """Numbers of open cells of n as evidence, by the model's share of open cells and its mean."""
    k, expected, mean = (np.broadcast_to(np.asarray(values, float), np.shape(k)) for values in (k, expected, mean))
    sums = PseudobulkSums(n, np.ones(len(k), dtype=bool), k[None], float(n), float(n))
    return counts_of_group([sums], [mean], [expected], [n], ATAC)


@pytest.mark.parametrize("n", [3, 60, 3000])
@pytest.mark.parametrize("depths", [(1.0, 1.0), (1.2, 0.9), (0.7, 2.5)])
def test_scores_of_open_cells_are_those_of_a_binomial_density(n, depths):
    n1, n2 = n, 2 * n
    share1, share2 = (part.ravel() for part in np.meshgrid([0.0, 0.1, 0.5, 0.9, 1.0], [0.0, 0.2, 0.6, 0.95, 1.0]))
    k1, k2 = np.rint(n1 * share1), np.rint(n2 * share2)
    # A model by which a share of 0.3 is closed, and of a cell of another depth a power of that.
    found = compare_counts(
        tuple(open_cells(k, m, 1 - 0.3**depth, 0.7) for k, m, depth in zip((k1, k2), (n1, n2), depths, strict=True)),
        ATAC,
    )
    for j in range(len(k1)):
        both = np.clip((k1[j] + k2[j] + 0.5) / (n1 + n2), 0.5 / (n1 + n2), 1 - 0.5 / (n1 + n2))
        closed = (1 - both) ** ((n1 + n2) / (n1 * depths[0] + n2 * depths[1]))
        parts = [(k[j] + 1 - closed**d, m + 1, d) for k, m, d in zip((k1, k2), (n1, n2), depths, strict=True)]

        def deviance(rate, parts=parts):
            """Twice the log ratio of densities of k, and of n - k, of which SciPy takes whole numbers alone."""
            opened = [-np.expm1(-rate * d) for _, _, d in parts]
            return sum(
                2 * (k * np.log(k / m / p) + (m - k) * (np.log1p(-k / m) + rate * d))
                for (k, m, d), p in zip(parts, opened, strict=True)
            )

        own = [-np.log1p(-k / m) / d for k, m, d in parts]
        best = minimize_scalar(deviance, bounds=sorted(own), method="bounded", options={"xatol": 1e-12})
        score = np.sign(own[0] - own[1]) * np.sqrt(max(deviance(best.x), 0.0))
        assert found.score[j] == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert [mean[j] for mean in found.means] == pytest.approx([1 - np.exp(-rate) for rate in own], rel=1e-6)
        low, high = sorted(mean[j] for mean in found.means)
        assert low - 1e-12 <= found.common[j] <= high + 1e-12
        if high - low > 1e-6:
            assert deviance(-np.log1p(-found.common[j])) == pytest.approx(best.fun, rel=1e-4, abs=1e-6)


def test_exposure_of_rare_regions_multiplies_their_mean():
    k1, k2 = np.array([8.0, 30.0, 0.0]), np.array([5.0, 11.0, 4.0])
    groups = open_cells(k1, 20_000, 0.003, 0.002), open_cells(k2, 10_000, 0.001, 0.002)
    found = compare_counts(groups, ATAC)
    rate = (k1 + k2 + 0.5) / 35_000
    first, second = (k1 + 1.5 * rate) / 30_001.5, (k2 + 0.5 * rate) / 5_000.5
    np.testing.assert_allclose(found.means, (first, second), rtol=2e-3)
    # Given both numbers, the first is binomial with its share of the exposure.
    share = 30_000 / 35_000
    sign, total = np.sign(first - second), k1 + k2
    deviance = 2 * (binom.logpmf(k1, total, k1 / total) - binom.logpmf(k1, total, share))
    np.testing.assert_allclose(found.score, sign * np.sqrt(deviance), rtol=0.02, atol=0.02)


def test_means_of_open_cells_do_not_depend_on_how_a_group_is_divided():
    rng, n, mean = np.random.default_rng(0), 120, np.linspace(0.02, 0.95, N_FEATURES)
    opened = rng.random((n, N_FEATURES)) < 1 - (1 - mean) ** 1.5
    everything = np.ones(N_FEATURES, dtype=bool)

    def group(size):
        parts = [opened[at : at + size] for at in range(0, n, size)]
        sums = [PseudobulkSums(size, everything, part.sum(0)[None].astype(float), size, size) for part in parts]
        many = len(parts)
        return counts_of_group(sums, [mean] * many, [1 - (1 - mean) ** 1.5] * many, [size] * many, ATAC)

    whole = group(n)
    np.testing.assert_allclose(whole.mean, 1 - (1 - opened.mean(0)) ** (1 / 1.5), rtol=1e-9)
    for size in (1, 3):
        np.testing.assert_allclose(group(size).mean, whole.mean, rtol=1e-9)
        np.testing.assert_allclose(group(size).exposure, 1.5 * n, rtol=1e-9)


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_a_part_of_which_few_cells_were_measured_counts_by_these(modality):
    """Scores of groups that do not differ are standard Normal, also where a large part of one was hardly measured."""
    rng, scores = np.random.default_rng(0), []
    mean = np.full(N_FEATURES, 1 / N_FEATURES if modality is RNA else 0.3)
    everything = np.ones(N_FEATURES, dtype=bool)

    def part(n_measured):
        if modality is ATAC:
            counts = rng.binomial(n_measured, mean)[None].astype(float)
            return PseudobulkSums(n_measured, everything, counts, n_measured, n_measured)
        counts = rng.poisson(500 * mean, (n_measured, N_FEATURES)).astype(float)
        total = counts.sum(1, keepdims=True)
        sums = [(counts > 0).sum(0), counts.sum(0), 1e4 * (counts / total).sum(0), (counts**2 / total).sum(0)]
        return PseudobulkSums(n_measured, everything, np.stack(sums), total.sum(), (total**2).sum())

    def group(n_measured, sizes):
        many = len(sizes)
        return counts_of_group(list(map(part, n_measured)), [mean] * many, [mean] * many, sizes, modality)

    for _ in range(20):
        rest, own = group([4, 60], [400, 60]), group([60], [60])
        np.testing.assert_allclose(rest.exposure, 64 * (500 if modality is RNA else 1), rtol=0.05)
        scores.append(compare_counts((own, rest), modality).score)
    assert np.std(scores) == pytest.approx(1.0, abs=0.1)


def test_parts_that_were_not_measured_keep_the_means_of_the_model():
    half = np.arange(6) < 3
    sums = [
        PseudobulkSums(10, half, np.where(half, 6.0, 0.0)[None], 10, 10),
        PseudobulkSums(0, np.ones(6, dtype=bool), np.zeros((1, 6)), 0, 0),
    ]
    found = counts_of_group(sums, [np.full(6, 0.5), np.full(6, 0.2)], [np.full(6, 0.5)] * 2, [10, 30], ATAC)
    np.testing.assert_allclose(found.mean, np.where(half, (0.6 + 3 * 0.2) / 4, 0.2))
    nothing = counts_of_group(sums[:1], [np.full(6, 0.5)], [np.full(6, 0.5)], [10], ATAC)
    np.testing.assert_allclose(nothing.mean, np.where(half, 0.6, 0.5))
    assert nothing.n_cells.tolist() == [10, 10, 10, 0, 0, 0]


@pytest.mark.parametrize("fit", ["saturating", "proportional"])
def test_depth_alone_changes_no_region_however_open(fit):
    rng, n, rate, shallow, deep = np.random.default_rng(0), 300, np.geomspace(0.02, 4, N_FEATURES), 0.56, 0.78
    scores, calls, doubled = [], 0, 1 - np.exp(-2 * rate)
    for _ in range(5):
        k1, k2 = rng.binomial(n, doubled), rng.binomial(n, 1 - np.exp(-rate))
        mean = (k1 + k2) / (2 * n)
        expected = doubled, 1 - np.exp(-rate)
        if fit == "proportional":
            # As a model fits such regions: p d, with p at most 1 and depths closer to each other than they are.
            p = np.minimum(mean / (shallow + deep) * 2, 0.998)
            mean, expected = p * (shallow + deep) / 2, (p * deep, p * shallow)
        tested = compare_counts(tuple(open_cells(k, n, e, mean) for k, e in zip((k1, k2), expected, strict=True)), ATAC)
        scores.append(tested.score)
        change, error = change_by_counts(Change.of("difference"), 1e-3, tested)
        found = ShrinkagePrior.fit(change, error, rng).posterior(change, error)
        calls += expected_fdr_calls(np.maximum(found.above(0.05), found.below(-0.05)), 0.05).sum()
    assert calls <= {"saturating": 0, "proportional": 0.02 * 5 * N_FEATURES}[fit]
    if fit == "saturating":
        # Of 1000 scores; those of regions open in next to all cells hardly scatter.
        assert 0.85 < np.std(scores) < 1.1
        assert abs(np.mean(scores)) < 0.2


@pytest.mark.parametrize("n", [2, 30, 1000])
@pytest.mark.parametrize("ratio", [1.0, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("name", ["difference", "log-odds", "log-fold"])
def test_regions_open_in_every_cell_or_in_none_are_not_called(n, ratio, name):
    """Whatever the model says of the depths."""
    k = np.array([0.0, 1.0, 1.0])
    with np.errstate(all="raise"):
        tested = compare_counts(
            (open_cells(n * k, n, np.array([0.2, 0.2, 0.7]) * ratio / 3, 0.3), open_cells(3 * n * k, 3 * n, 0.2, 0.3)),
            ATAC,
        )
        change, error = change_by_counts(Change.of(name), 1e-3, tested)
    assert all(np.isfinite(values).all() for values in (tested.score, *tested.means, *tested.errors, change, error))
    delta = 0.05 if name == "difference" else 0.5
    assert (np.abs(change) < delta).all() or (np.abs(change) / error < 2).all(), (change, error)


def test_blocks_of_statistics_keep_nothing_of_what_they_were_taken_from():
    ordered = np.arange(6.0).reshape(3, 2)
    found = StatisticsByBlock(5)
    found.put(slice(3, 5), {"min": torch.tensor([7.0, 8.0])})
    found.put(slice(0, 3), {"min": ordered[:, 0]})
    ordered[:] = np.nan
    assert found.of_all()["min"].tolist() == [0.0, 2.0, 4.0, 7.0, 8.0]
    assert all(array.base is None for block in found._blocks for array in block.values())
