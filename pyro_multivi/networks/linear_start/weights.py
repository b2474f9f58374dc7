"""Weights of encoders and decoders that start as linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyro_multivi.networks.encoders import NormalHead, SharedFirstLayer
from pyro_multivi.networks.linear_start.components import Components
from pyro_multivi.networks.linear_start.partly_measured import Array

# Ridge penalty of the maps out of hidden layers, relative to the mean square of their units.
_RIDGE = 1e-2
# Draws of the prior by which a decoder's hidden layer is read.
_DRAWS = 4096
# Largest difference between cells in the logit of a feature, per standard deviation of z, and least variance of q(z).
_LARGEST, _LEAST_VARIANCE = 3.0, 0.02


def start_first_layer(layer: SharedFirstLayer, found: Components, inputs: sp.csr_array) -> None:
    """Let the first hidden units stand for the components, and for depth and covariates, with both signs each."""
    weight = layer.counts.weight.detach().cpu().double().numpy()
    n_hidden = weight.shape[1]
    directions = np.concatenate([found.directions, found.nuisance])[: n_hidden // 4]
    # As wide as the units that stay random.
    wanted = (inputs @ weight).std(0).mean()
    spread = (inputs @ directions.T).std(0)
    directions = directions * (wanted / spread.clip(min=1e-12))[:, None]
    both = np.concatenate([directions, -directions])
    _copy(layer.counts.weight[:, : len(both)], both.T)
    _copy(layer.counts.bias[: len(both)], -(both @ found.centre))


def start_expert(expert: NormalHead, hidden: Tensor, mean: Array, variance: Array | None = None) -> None:
    """Let an expert's mean be the linear map from its hidden layer that is nearest, and its variance a constant.

    Without ``variance``, (k,), it is what that map leaves of the prior's.
    """
    values: Array = hidden.detach().cpu().double().numpy()
    coefficients = _ridge(values, mean)
    k = mean.shape[1]
    if variance is None:
        variance = 1 - ((values - values.mean(0)) @ coefficients).var(0)
    _copy(expert.loc.weight[:k], coefficients.T)
    _copy(expert.loc.bias[:k], mean.mean(0) - values.mean(0) @ coefficients)
    expert.log_variance.weight[:k] = 0.0
    _copy(expert.log_variance.bias[:k], np.log(variance.clip(_LEAST_VARIANCE)))


def start_readout(
    hidden_of: Callable[[Tensor, Tensor], Tensor], layer: nn.Linear, design: Array, effects: Array, n_latent: int
) -> None:
    """Let the logits of a decoder's last layer move by ``effects``, (F, k), with the first dimensions of z.

    ``hidden_of`` is the layer's input, (n, H), as a function of z and s.
    """
    rng = np.random.default_rng(0)
    like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    z = rng.standard_normal((_DRAWS, n_latent))
    s = design[rng.integers(0, len(design), _DRAWS)]
    hidden: Array = hidden_of(torch.as_tensor(z, **like), torch.as_tensor(s, **like)).cpu().double().numpy()
    coefficients = _ridge(hidden, z[:, : effects.shape[1]])
    weight: Array = effects.clip(-_LARGEST, _LARGEST) @ coefficients.T
    layer.weight[:, : hidden.shape[1]].add_(torch.as_tensor(weight, **like))
    layer.bias.sub_(torch.as_tensor(weight @ hidden.mean(0), **like))


def start_intercepts(layer: nn.Linear, effects: Array) -> None:
    """Let the last columns of a last layer be the intercepts of batches, (F, n_batch)."""
    _copy(layer.weight[:, -effects.shape[1] :], effects)


def effects_of_groups(
    counts: sp.csr_array, depth: Array, group: NDArray[np.integer[Any]], n_groups: int, overdispersion: Array
) -> Array:
    """Log ratio of the mean of each feature in a group of cells to that in all, (F, n_groups).

    Shrunk by the variance of all of them beyond their errors: where groups are alike they are 0. Arguments as those of
    :func:`effects_on_means`.
    """
    member = sp.csr_array((np.ones(len(group)), (group, np.arange(len(group)))), shape=(n_groups, len(group)))
    total: Array = (member @ counts).toarray()
    expected = np.outer(member @ depth, total.sum(0) / max(depth.sum(), 1e-12))
    found = np.log((total + 0.5) / (expected + 0.5))
    error = overdispersion / (expected + 0.5)
    variance = ((found**2 - error) * expected).sum().clip(min=0) / max(expected.sum(), 1e-12)
    shrunk: Array = found * variance / (variance + error)
    return shrunk.T


def effects_on_means(
    counts: sp.csr_array,
    depth: Array,
    group: NDArray[np.integer[Any]],
    mean: Array,
    covariance: Array,
    overdispersion: Array,
) -> Array:
    """Change of the log mean of each feature with z, (F, K): one step of a Poisson regression from no effect.

    Parameters
    ----------
    counts
        Counts, or zeros and ones, (n, F).
    depth
        Expected total of each cell, (n,).
    group
        Batch of each cell, (n,); each has shares of its own.
    mean, covariance
        Posterior of z in each cell, (n, K), and its covariance, (n, K, K).
    overdispersion
        Variance of a count over its mean, (F,).
    """
    # Counts vary between cells of one state beyond Poisson noise, so that a cell's weight is bounded.
    weight = 2 / (1 + depth / max(depth.mean(), 1e-12))
    counts, depth = sp.diags_array(weight) @ counts, weight * depth
    overdispersion = overdispersion * (weight @ depth) / max(depth.sum(), 1e-12)
    score: Array = counts.T @ mean
    share: Array = np.zeros(counts.shape[1])
    for code in np.unique(group):
        of_group = group == code
        total = np.asarray(counts[of_group].sum(0)).ravel()
        score = score - np.outer(total / max(depth[of_group].sum(), 1e-12), depth[of_group] @ mean[of_group])
        share += total
    share /= max(depth.sum(), 1e-12)
    if not share.any():
        return np.zeros_like(score)
    information = (mean * depth[:, None]).T @ mean + np.tensordot(depth, covariance, 1)
    inverse = np.linalg.inv(information + 1e-9 * np.trace(information) * np.eye(len(information)))
    per_share = 1 / share.clip(min=1e-12)
    found = (score @ inverse) * per_share[:, None]
    error = np.outer(overdispersion * per_share, np.diag(inverse))
    # Shrunk by the size of a feature's effects beyond their errors, so that what does not differ has none.
    signal = (found**2 - error).mean(1, keepdims=True).clip(min=0)
    found *= signal / (signal + error).clip(min=1e-12)
    found[share == 0] = 0.0
    return found


def _ridge(values: Array, wanted: Array) -> Array:
    centred = values - values.mean(0)
    gram = centred.T @ centred
    penalty = _RIDGE * np.trace(gram) / len(gram) + 1e-9
    return np.linalg.solve(gram + penalty * np.eye(len(gram)), centred.T @ (wanted - wanted.mean(0)))


def _copy(place: Tensor, values: Array) -> None:
    place.copy_(torch.as_tensor(values))
