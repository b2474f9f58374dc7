"""Sums of counts become statistics, and statistics become p-values."""

from __future__ import annotations

import numpy as np
import torch

from pyro_multivi.data.modality import RNA
from pyro_multivi.posterior.checks.statistics import FeatureSums, compare


def test_sums_are_statistics_of_each_group():
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (3, 20, 5))
    group = rng.integers(0, 2, 20)
    sums = FeatureSums(RNA, 2, 3, 5)
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
