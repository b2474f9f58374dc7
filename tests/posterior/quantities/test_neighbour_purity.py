"""Neighbour purity of latent spaces."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pyro_multivi.posterior.quantities import neighbour_purity as purity
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity


def test_neighbour_purity_of_separate_and_of_mixed_cells():
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], 100)
    apart = rng.normal(size=(200, 2)) + 50 * (labels == "b")[:, None]
    assert neighbour_purity(apart, labels, k=10) == 1.0
    assert neighbour_purity(rng.normal(size=(200, 2)), labels, k=10) == pytest.approx(0.5, abs=0.06)
    with pytest.raises(ValueError, match="one per cell"):
        neighbour_purity(apart, labels[:3], k=10)
    with pytest.raises(ValueError, match="choose a smaller k"):
        neighbour_purity(apart[:5], labels[:5], k=10)


def test_memory_does_not_grow_with_the_length_of_labels(monkeypatch):
    rng = np.random.default_rng(0)
    z, kind = rng.normal(size=(5000, 2)), rng.integers(0, 3, 5000)
    kind[np.argsort(z[:, 0])[:2500]] = 0
    labels = [f"type {number} of a long name {'-' * 200}" for number in kind]
    tracemalloc.start()
    found = neighbour_purity(z, labels, k=20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The labels of all neighbours would take 90 MB.
    assert peak < 15e6
    monkeypatch.setattr(purity, "_AT_ONCE", 777)
    assert neighbour_purity(z, kind, k=20) == found > 0.5


def test_cells_without_a_label_are_like_no_other():
    z = np.array([[0.0], [0.1], [5.0], [5.1]])
    assert neighbour_purity(z, np.array(["a", "a", None, np.nan], dtype=object), k=1) == 0.5


def test_a_cell_is_no_neighbour_of_itself_where_others_have_its_state():
    # Twins have one state and two labels; then all cells have one state, and each a label of its own.
    labels = np.tile(["a", "b"], 50)
    twins = np.repeat(np.random.default_rng(0).normal(size=(50, 2)), 2, axis=0)
    assert neighbour_purity(twins, labels, k=1) == 0.0
    assert neighbour_purity(np.zeros((100, 2)), np.arange(100), k=5) == 0.0
