r"""Gaussian factor model of the components of all modalities: the latent state that training starts from.

The scores of a modality are :math:`t_m = W_m z + \epsilon_m` with z ~ Normal(0, I) and the noise of each component. W
follows from the signal variances, and between modalities from the covariance of the scores of cells that have both, of
which what chance alone gives is taken away. Dimensions are those of the largest variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyro_multivi.networks.linear_start.components import Array, Components

# No two modalities say the same.
_MOST_CORRELATED = 0.98


class Factors(NamedTuple):
    """Loadings of the components of each modality, (k_m, K), and their noise, (k_m,)."""

    loadings: list[Array]
    noise: list[Array]

    @property
    def n_latent(self) -> int:
        """Number of dimensions K."""
        return int(self.loadings[0].shape[1])

    def covariance(self, measured: Sequence[int]) -> Array:
        """Posterior covariance of z given some modalities, (K, K)."""
        precision: Array = np.eye(self.n_latent)
        for place in measured:
            precision = precision + (self.loadings[place] / self.noise[place][:, None]).T @ self.loadings[place]
        found: Array = np.linalg.inv(precision)
        return found

    def evidence(self, place: int, scores: Array) -> Array:
        """What the scores of one modality add to precision times mean, (n, K)."""
        found: Array = (scores / self.noise[place]) @ self.loadings[place]
        return found


def factors(parts: Sequence[Components], pairs: Sequence[tuple[Array, Array]], n_latent: int) -> Factors:
    """Fit the model.

    Parameters
    ----------
    parts
        Components of one or two modalities.
    pairs
        Scores of the cells that have both, in the same order, for two modalities.
    n_latent
        Number of dimensions at most.
    """
    sizes = [len(part.signal) for part in parts]
    covariance = np.diag(np.concatenate([part.signal for part in parts]))
    for one, other in pairs:
        between = _covariance_between(one, other, parts[0], parts[1])
        covariance[: sizes[0], sizes[0] :] = between
        covariance[sizes[0] :, : sizes[0]] = between.T
    values, vectors = np.linalg.eigh(covariance)
    chosen = np.argsort(-values)[:n_latent]
    chosen = chosen[values[chosen] > 1e-6]
    loadings = vectors[:, chosen] * np.sqrt(values[chosen])
    return Factors(list(np.split(loadings, np.cumsum(sizes)[:-1])), [part.noise for part in parts])


def _covariance_between(one: Array, other: Array, of_one: Components, of_other: Components) -> Array:
    """Covariance of the signals of two modalities from their scores in the same cells, (k, l)."""
    n = len(one)
    total = [np.sqrt(part.signal + part.noise) for part in (of_one, of_other)]
    if n == 0 or min(map(len, total)) == 0:
        return np.zeros((len(total[0]), len(total[1])))
    left, correlations, right = np.linalg.svd((one / total[0]).T @ (other / total[1]) / n, full_matrices=False)
    by_chance = (np.sqrt(len(total[0])) + np.sqrt(len(total[1]))) / np.sqrt(n)
    correlations = np.sqrt((correlations**2 - by_chance**2).clip(0))
    # Of the signals alone, whose correlations have to stay below one.
    share = [np.sqrt(part.signal) / sd for part, sd in zip((of_one, of_other), total, strict=True)]
    between = (left * correlations) @ right / np.outer(*share)
    left, correlations, right = np.linalg.svd(between, full_matrices=False)
    between = (left * correlations.clip(max=_MOST_CORRELATED)) @ right
    found: Array = between * np.outer(np.sqrt(of_one.signal), np.sqrt(of_other.signal))
    return found
