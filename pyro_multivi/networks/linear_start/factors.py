r"""Gaussian factor model of the components of all modalities: the latent state that training starts from.

The scores of a modality are :math:`t_m = W_m z + \epsilon_m` with z ~ Normal(0, I) and the noise of each component. W
follows from the variances of the signals and, between modalities, from the covariance of the scores in the cells that
have both, of which what chance alone gives is taken away. The dimensions of z are those of the largest variance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from pyro_multivi.networks.linear_start.components import Components
from pyro_multivi.networks.linear_start.partly_measured import Array

# No two modalities say the same.
_MOST_CORRELATED = 0.98


class Factors(NamedTuple):
    """Loadings of the components of each modality, (k_m, K), and variances of their noise, (k_m,)."""

    loadings: Sequence[Array]
    noise: Sequence[Array]

    @property
    def n_latent(self) -> int:
        """Number of dimensions K."""
        return int(self.loadings[0].shape[1])

    def covariance(self, measured: Iterable[int]) -> Array:
        """Posterior covariance of z given the scores of some modalities, by their places, (K, K)."""
        precision: Array = np.eye(self.n_latent)
        for place in measured:
            precision = precision + (self.loadings[place].T / self.noise[place]) @ self.loadings[place]
        return np.linalg.inv(precision)

    def evidence(self, place: int, scores: Array) -> Array:
        """Term that the scores of one modality, (n, k), add to precision times mean, (n, K)."""
        return (scores / self.noise[place]) @ self.loadings[place]


def factors(parts: Sequence[Components], pairs: tuple[Array, Array] | None, n_latent: int) -> Factors:
    """Fit the model to the components of one or two modalities.

    Parameters
    ----------
    parts
        Components of each modality.
    pairs
        Scores of the cells that have both, in the same order: (n, k) and (n, l). None for one modality.
    n_latent
        Number of dimensions at most.

    Examples
    --------
    >>> one = Components(*np.zeros((3, 1, 1)), np.zeros((9, 2)), np.array([3.0, 1.0]), np.array([1.0, 1.0]))
    >>> model = factors([one], None, n_latent=5)
    >>> model.n_latent, np.diag(model.covariance([0]))
    (2, array([0.25, 0.5 ]))
    """
    first = len(parts[0].signal)
    covariance = np.diag(np.concatenate([part.signal for part in parts]))
    if pairs is not None and 0 < first < len(covariance):
        sd = [np.sqrt(part.signal) for part in parts]
        covariance[:first, first:] = _correlations(parts, pairs) * np.outer(*sd)
        covariance[first:, :first] = covariance[:first, first:].T
    values, vectors = np.linalg.eigh(covariance)
    chosen = np.argsort(-values)[:n_latent]
    chosen = chosen[values[chosen] > 1e-6]
    loadings = vectors[:, chosen] * np.sqrt(values[chosen])
    return Factors(np.split(loadings, [first])[: len(parts)], [part.noise for part in parts])


def _correlations(parts: Sequence[Components], pairs: tuple[Array, Array]) -> Array:
    """Correlations of the signals of two modalities, (k, l)."""
    n = len(pairs[0])
    sd = [np.sqrt(part.signal + part.noise) for part in parts]
    by_chance = sum(np.sqrt(len(each)) for each in sd) / np.sqrt(n)
    left, observed, right = np.linalg.svd((pairs[0] / sd[0]).T @ (pairs[1] / sd[1]) / n, full_matrices=False)
    observed = np.sqrt((observed**2 - by_chance**2).clip(0))
    # Of the signals alone, whose correlations have to stay below one.
    share = [np.sqrt(part.signal) / each for part, each in zip(parts, sd, strict=True)]
    left, found, right = np.linalg.svd((left * observed) @ right / np.outer(*share), full_matrices=False)
    return (left * found.clip(max=_MOST_CORRELATED)) @ right
