"""Neighbour purity of latent spaces."""

from __future__ import annotations

import numpy as np
import pytest

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
