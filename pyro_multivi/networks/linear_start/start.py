"""Start of training from a linear model of the cells; see :mod:`pyro_multivi.networks.linear_start`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import RNA, Modality, modelled
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.networks.encoders import NormalHead, SharedFirstLayer
from pyro_multivi.networks.layers import CovariateStack
from pyro_multivi.networks.linear_start.components import Array, Components, components
from pyro_multivi.networks.linear_start.factors import Factors, all_signal, shared_signal
from pyro_multivi.networks.linear_start.weights import (
    effects_on_means,
    start_expert,
    start_first_layer,
    start_readout,
)

logger = logging.getLogger("pyro_multivi")

# Cells that components are taken from at most, and entries of their counts (50 MB each time they are held).
_MOST, _ENTRIES = 8192, 2**22
# Fewer cells say little about components.
_FEWEST = 50
_AT_ONCE = 512


class _Part(NamedTuple):
    """A modality in the cells that have it."""

    modality: Modality
    places: NDArray[np.int64]  # of the cells among all, (n,)
    depth: Array  # (n,)
    inputs: sp.csr_array
    counts: sp.csr_array
    found: Components


@torch.no_grad()
def start_linearly(program: Any, train: Minibatches) -> int:
    """Set weights of encoders and decoders; return the number of dimensions of z that they use.

    Nothing is set, and 0 returned, if loadings are no longer where construction put them, at zero; for networks of
    other classes than those of this package or with batch normalisation; for ``latent_distribution="ln"``; where
    features are masked by batch; and if fewer than fifty cells have a modality, or none of its components lies above
    the noise.

    Parameters
    ----------
    train
        Cells to train on; some thousand of them are read.
    """
    modalities = modelled(program.config)
    if not all(_is_as_constructed(program, modality) for modality in modalities):
        return 0
    if program.config.latent_distribution != "normal" or program.config.use_batch_norm != "none":
        return 0
    if any(modality.panels_in(train.table) is not None for modality in modalities):
        return 0
    index = _some(train, modalities)
    cells = train.cut(index)
    design = cells.design.cpu().double().numpy()
    parts = []
    for modality in modalities:
        part = _part(program, cells, modality, design)
        if part is None:
            return 0
        parts.append(part)
    was_training, kept = program.training, [value.clone() for value in program.parameters()]
    program.eval()
    try:
        return _start(program, [train.cut(some) for some in index.split(_AT_ONCE)], parts, design)
    except BaseException:
        # Ctrl-C too: half a start is none.
        for parameter, value in zip(program.parameters(), kept, strict=True):
            parameter.copy_(value)
        raise
    finally:
        program.train(was_training)


def _start(program: Any, minibatches: list[Cells], parts: list[_Part], design: Array) -> int:
    own, found = [part.found.scores for part in parts], [part.found for part in parts]
    pair = None
    if len(parts) == 2:
        _, *rows = np.intersect1d(parts[0].places, parts[1].places, return_indices=True)
        pair = (own[0][rows[0]], own[1][rows[1]])
    if pair is None or program.config.fully_paired:
        model = all_signal(found, pair, program.config.latent)
    else:
        model = shared_signal(found, pair, program.config.latent)
    k = model.n_latent
    if k == 0:
        return 0
    mean, covariance = _posterior(model, parts, len(design))
    for place, part in enumerate(parts):
        # The average of experts is a half of each: where all cells have both modalities, each gives twice its part.
        together = len(parts) if program.config.fully_paired else 1
        seen = range(len(parts)) if program.config.fully_paired else [place]
        of_expert = model.covariance(list(seen))
        wanted = together * model.evidence(place, own[place]) @ of_expert
        key = part.modality.key
        first_layer: SharedFirstLayer = getattr(program, f"{key}_first_layer")
        start_first_layer(first_layer, part.found, part.inputs)
        expert: NormalHead = getattr(program, f"{key}_expert")
        start_expert(expert, _hidden(program, minibatches, part, expert), wanted, together * np.diag(of_expert))
        effects = effects_on_means(
            part.counts, part.depth, design[part.places, : program.config.n_batch].argmax(1), mean[part.places],
            covariance[part.places], _overdispersion(program, part),
        )  # fmt: skip
        decoder = getattr(program, f"{part.modality.name}_decoder")
        layer = getattr(decoder, part.modality.decoded)
        slope = _slope(program, part.modality, layer.bias.detach().cpu().double().numpy())
        start_readout(decoder.stack, layer, design, effects / slope[:, None], program.config.latent)
    logger.debug("training starts from %d dimensions of a linear model", k)
    return k


def _is_as_constructed(program: Any, modality: Modality) -> bool:
    decoder = getattr(program, f"{modality.name}_decoder", None)
    layer, stack = getattr(decoder, modality.decoded, None), getattr(decoder, "stack", None)
    networks_are_known = (
        isinstance(layer, torch.nn.Linear)
        and type(stack) is CovariateStack
        and type(getattr(program, f"{modality.key}_first_layer", None)) is SharedFirstLayer
        and type(getattr(program, f"{modality.key}_expert", None)) is NormalHead
    )
    return networks_are_known and isinstance(layer, torch.nn.Linear) and not bool(layer.weight.any())


def _some(train: Minibatches, modalities: Sequence[Modality]) -> Tensor:
    """Positions of some of the cells, spread over all, so many that their counts are within bounds."""
    index = train.index
    first = train.cut(index[:_AT_ONCE])
    per_cell = sum(_csr(modality.counts_in(first)).nnz for modality in modalities) / max(len(first), 1)
    n = min(len(index), _MOST, max(_FEWEST, int(_ENTRIES / max(per_cell, 1.0))))
    return index[torch.linspace(0, len(index) - 1, n).long()]


def _part(program: Any, cells: Cells, modality: Modality, design: Array) -> _Part | None:
    measured = modality.measured_in(cells).cpu().numpy()
    places = np.flatnonzero(measured)
    if len(places) < _FEWEST:
        return None
    counts, binary = _csr(modality.counts_in(cells))[places], modality.in_model(program.config).binary
    if binary:
        counts.data[:] = 1.0
    inputs = program.rna_input(cells.x) if modality is RNA else program.atac_input(cells.y)
    inputs = _csr(inputs)[places]
    depth: Array = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    found = components(inputs, depth, design[places], program.config.latent)
    return _Part(modality, places, depth, inputs, counts, found) if len(found.signal) else None


def _posterior(model: Factors, parts: list[_Part], n: int) -> tuple[Array, Array]:
    """Posterior mean and covariance of z in each cell from what was measured, (n, K) and (n, K, K)."""
    evidence = np.zeros((n, model.n_latent))
    code = np.zeros(n, dtype=int)
    for place, part in enumerate(parts):
        evidence[part.places] += model.evidence(place, part.found.scores)
        code[part.places] += 2**place
    patterns = [[place for place in range(len(parts)) if pattern >> place & 1] for pattern in range(2 ** len(parts))]
    covariances = np.stack([model.covariance(measured) for measured in patterns])
    covariance = covariances[code]
    return np.einsum("nk,nkl->nl", evidence, covariance), covariance


def _hidden(program: Any, minibatches: list[Cells], part: _Part, expert: NormalHead) -> Tensor:
    """Input of an expert's last layers in the cells that have the modality, (n, H)."""
    states = (getattr(program.encode(cells, cells.design), part.modality.key) for cells in minibatches)
    return torch.cat([expert.stack(state.hidden, state.s) for state in states])


def _overdispersion(program: Any, part: _Part) -> Array:
    """Variance of a count over its mean at the mean count, (F,)."""
    mean = np.asarray(part.counts.mean(0)).ravel()
    if part.modality is RNA and hasattr(program, "log_theta"):
        theta = program.log_theta.detach().exp().mean(0).cpu().double().numpy()
        return 1 + mean / theta
    return np.ones_like(mean)


def _slope(program: Any, modality: Modality, logit: Array) -> Array:
    """Derivative of the log of what is decoded by its logit, (F,)."""
    if modality is not RNA:
        return 1 / (1 + np.exp(logit))
    if program.config.library == "size_factor":
        return 1 / (1 + np.exp(-logit)) / np.logaddexp(0, logit).clip(1e-12)
    return np.ones_like(logit)


def _csr(counts: Tensor) -> sp.csr_array:
    if not isinstance(counts, SparseCounts):
        return sp.csr_array(counts.cpu().double().numpy())
    entries = tuple(part.cpu().numpy() for part in (counts.val.double(), counts.col, counts.crow))
    return sp.csr_array(entries, shape=(counts.shape[0], counts.shape[1]))
