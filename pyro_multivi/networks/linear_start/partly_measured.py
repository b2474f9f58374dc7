r"""Principal components of cells that were measured with different panels of features.

With zeros in place of what was not measured a single component would become several, one for each set of features that
the same panels have. So components are found one after the other as in NIPALS (Wold 1966), which leaves missing entries
out of both of its regressions: a cell's score is that of its panel's features on their loadings, a loading that of the
cells that measured the feature on their scores. What a component explains of the measured entries is taken away before
the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

# Regressions of a component at most, and change of its direction at which they end.
_MOST_STEPS, _CHANGE = 200, 1e-3
# Part of a component that a panel is taken to hold at least: a score from less is mostly noise.
_LEAST_HELD = 0.1


def largest_of_panels(
    x: sp.csr_array,
    others: Array,
    fitted: Array,
    measured: NDArray[np.bool_],
    panel: NDArray[np.integer[Any]],
    most: int,
) -> tuple[Array, Array]:
    """Largest components of x - others @ fitted, one by one until noise: root sums of squares, and directions (k, F).

    Parameters
    ----------
    x, others, fitted
        Features, (n, F), and what is taken away from them, (n, q) and (q, F); the difference is zero where a feature
        was not measured, and has a mean square of 1 where it was.
    measured
        Whether each feature belongs to each panel, (P, F).
    panel
        Panel of each cell, (n,).
    most
        Number of components at most.
    """
    n, n_features = x.shape
    of_panel = sp.csr_array((np.ones(n), (panel, np.arange(n))), shape=(len(measured), n))
    scores, directions, values = np.zeros((n, 0)), np.zeros((0, n_features)), np.zeros(0)
    total = float(measured.sum(1)[panel].mean())
    bound = (1 + np.sqrt(float(measured.sum(1).max()) / n)) ** 2
    rng = np.random.default_rng(0)

    def project(v: Array) -> Array:
        explained = ((measured * v) @ directions.T)[panel]
        return x @ v - others @ (fitted @ v) - (scores * explained).sum(1)

    def regress(t: Array) -> Array:
        weights = np.asarray(of_panel @ (scores * t[:, None]))
        explained = (measured * (weights @ directions)).sum(0)
        # A loading's prior has the variance that loadings of length 1 have.
        found: Array = x.T @ t - fitted.T @ (others.T @ t) - explained
        return found / ((of_panel @ np.square(t)) @ measured + n_features)

    for _ in range(most):
        v = rng.standard_normal(n_features) / np.sqrt(n_features)
        for _ in range(_MOST_STEPS):
            before = v
            v = regress(project(v) / (measured @ v**2).clip(_LEAST_HELD)[panel])
            v = v / max(float(np.linalg.norm(v)), 1e-12)
            if np.linalg.norm(v - before) < _CHANGE:
                break
        projected = project(v)
        value = np.linalg.norm(projected)
        noise = (total - (value**2 + np.square(values).sum()) / n) / total
        if value**2 / n < bound * noise:
            break
        scores = np.column_stack([scores, projected / (measured @ v**2).clip(_LEAST_HELD)[panel]])
        directions, values = np.vstack([directions, v]), np.append(values, value)
    return values, directions


def scores_of_panels(
    projected: Array, directions: Array, signal_to_noise: Array, measured: NDArray[np.bool_], panel: NDArray[Any]
) -> Array:
    """Scores as if all features had been measured, (n, k): the regression of each cell's features on their loadings.

    Parameters
    ----------
    projected
        Sums over the measured features, (n, k).
    directions
        (k, F), of length 1.
    signal_to_noise
        Variance of each component over that of its noise, (k,): what a panel holds little of is drawn to zero.
    """
    scores, ridge = np.empty_like(projected), np.diag(1 / signal_to_noise.clip(1e-3))
    for code, features in enumerate(measured):
        cells = panel == code
        gram = directions[:, features] @ directions[:, features].T
        scores[cells] = projected[cells] @ np.linalg.solve(gram + ridge, np.eye(len(gram)) + ridge)
    return scores
