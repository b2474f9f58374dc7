r"""Gaussian factor model of the components of all modalities: the latent state that training starts from.

The scores of a modality are :math:`t_m = W_m z + \epsilon_m` with z ~ Normal(0, I) and normal :math:`\epsilon_m`. Where
every cell has both modalities, z holds the signal of each. Otherwise it holds what they share, as in probabilistic
canonical correlation analysis (Bach and Jordan 2005): signal of one modality alone would only set cells apart by what
was measured in them, and counts as noise. What modalities share follows from the covariance of their scores in the
cells that have both, of which what chance alone gives is taken away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyro_multivi.networks.linear_start.components import Array, Components

# No two modalities say the same.
_MOST_CORRELATED = 0.98


class Factors(NamedTuple):
    """Loadings of the components of each modality, (k_m, K), and covariances of the rest, (k_m, k_m)."""

    loadings: Sequence[Array]
    noise: Sequence[Array]

    @property
    def n_latent(self) -> int:
        """Number of dimensions K."""
        return int(self.loadings[0].shape[1])

    def covariance(self, measured: Sequence[int]) -> Array:
        """Posterior covariance of z given some modalities, (K, K)."""
        precision: Array = np.eye(self.n_latent)
        for place in measured:
            precision = precision + self.loadings[place].T @ np.linalg.solve(self.noise[place], self.loadings[place])
        return np.linalg.inv(precision)

    def evidence(self, place: int, scores: Array) -> Array:
        """What the scores of one modality, (n, k), add to precision times mean, (n, K)."""
        return scores @ np.linalg.solve(self.noise[place], self.loadings[place])


def all_signal(parts: Sequence[Components], pair: tuple[Array, Array] | None, n_latent: int) -> Factors:
    """Model of the signal of every modality, in the directions of the largest variance.

    Parameters
    ----------
    parts
        Components of each modality.
    pair
        Scores of the cells that have both, in the same order; None for one modality.
    n_latent
        Number of dimensions at most.
    """
    first = len(parts[0].signal)
    covariance = np.diag(np.concatenate([part.signal for part in parts]))
    if pair is not None:
        left, correlations, right = _shared(parts, pair)
        sd = [np.sqrt(part.signal) for part in parts]
        covariance[:first, first:] = (left * correlations) @ right * np.outer(*sd)
        covariance[first:, :first] = covariance[:first, first:].T
    values, vectors = np.linalg.eigh(covariance)
    chosen = np.argsort(-values)[:n_latent]
    chosen = chosen[values[chosen] > 1e-6]
    loadings = vectors[:, chosen] * np.sqrt(values[chosen])
    return Factors(np.split(loadings, [first])[: len(parts)], [np.diag(part.noise) for part in parts])


def shared_signal(parts: Sequence[Components], pair: tuple[Array, Array], n_latent: int) -> Factors:
    """Model of what two modalities share; arguments as those of :func:`all_signal`."""
    left, correlations, right = _shared(parts, pair)
    chosen = np.flatnonzero(correlations > 0)[:n_latent]
    root = np.sqrt(correlations[chosen])
    loadings, noise = [], []
    for part, directions in zip(parts, (left, right.T), strict=True):
        sd = np.sqrt(part.signal)
        loadings.append(sd[:, None] * directions[:, chosen] * root)
        noise.append(np.diag(part.signal + part.noise) - loadings[-1] @ loadings[-1].T)
    return Factors(loadings, noise)


def _shared(parts: Sequence[Components], pair: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Directions and correlations of two signals, from their scores in the same cells: (k, m), (m,), (m, l)."""
    n = len(pair[0])
    sd = [np.sqrt(part.signal + part.noise) for part in parts]
    by_chance = sum(np.sqrt(len(each)) for each in sd) / np.sqrt(max(n, 1))
    observed = (pair[0] / sd[0]).T @ (pair[1] / sd[1]) / max(n, 1)
    left, correlations, right = np.linalg.svd(observed, full_matrices=False)
    correlations = np.sqrt((correlations**2 - by_chance**2).clip(0))
    # Of the signals alone, whose correlations have to stay below one.
    share = [np.sqrt(part.signal) / each for part, each in zip(parts, sd, strict=True)]
    left, correlations, right = np.linalg.svd((left * correlations) @ right / np.outer(*share), full_matrices=False)
    correlations[correlations < 1e-9] = 0.0
    return left, correlations.clip(max=_MOST_CORRELATED), right
