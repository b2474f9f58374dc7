"""Start of training from a linear model of the cells; see :mod:`pyro_multivi.networks.linear_start`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, paired, spread
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import RNA, Modality, modelled
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.networks.decoders import intercept_scale, intercepts_of
from pyro_multivi.networks.encoders import NormalHead, SharedFirstLayer
from pyro_multivi.networks.layers import CovariateStack
from pyro_multivi.networks.linear_start.components import Components, components
from pyro_multivi.networks.linear_start.factors import Factors, factors
from pyro_multivi.networks.linear_start.partly_measured import Array
from pyro_multivi.networks.linear_start.weights import (
    effects_of_groups,
    effects_on_means,
    start_expert,
    start_first_layer,
    start_intercepts,
    start_readout,
)
from pyro_multivi.networks.panels import measured_share

logger = logging.getLogger("pyro_multivi")

# Cells that components are taken from at most, and entries of their counts (50 MB each time they are held).
_MOST, _ENTRIES = 8192, 2**22
# Fewer cells say little about components, and fewer pairs about what modalities share.
_FEWEST = 50
_AT_ONCE = 512


class _Part(NamedTuple):
    """A modality in the n cells that have it."""

    modality: Modality
    places: NDArray[np.int64]  # of these cells among all that are read, (n,)
    depth: Array  # (n,), of all features
    inputs: sp.csr_array
    counts: sp.csr_array
    measured: NDArray[np.bool_]  # features of each panel, (P, F)
    panel: NDArray[np.int64]  # of each cell, (n,)
    found: Components


@torch.no_grad()
def start_linearly(program: Any, train: Minibatches) -> int:
    """Set weights of encoders and decoders; return the number of dimensions of z that they use.

    The linear model is of RNA and ATAC. Experts of proteins and other :class:`ExtraModality` start at what these tell
    of its state by regression, and their decoders where construction put them.

    Nothing is set, and 0 returned, if loadings are no longer where construction put them, at zero; for networks of
    other classes than those of this package, with batch normalisation or with frozen weights; for programs with an
    ``expression`` or ``accessibility`` of their own, of which z may have to hold more, or with an extra modality that
    is no :class:`ExtraModality` or has an ``expert`` of its own; with fewer than fifty cells of RNA or ATAC, or fifty
    that have both; and if no component lies above the noise, of both of them where cells lack one.

    Parameters
    ----------
    train
        Cells to train on; some thousand of them are read.
    """
    config, modalities = program.config, modelled(program.config)
    if config.use_batch_norm != "none" or not all(_is_as_constructed(program, each) for each in modalities):
        return 0
    if {extra.name for extra in program.modelled_extra if _starts(extra)} != set(config.extra):
        return 0
    index = _some(train, modalities)
    cells = train.cut(index)
    measured = [modality.measured_in(cells).cpu().numpy() for modality in modalities]
    if min(np.all(measured, 0).sum(), *(of_one.sum() for of_one in measured)) < _FEWEST:
        return 0
    design = cells.design.cpu().double().numpy()
    parts = [_part(program, cells, *each, design) for each in zip(modalities, measured, strict=True)]
    has_signal = [len(part.found.signal) > 0 for part in parts]
    if not (any if config.fully_paired else all)(has_signal):
        return 0
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
    model = factors([part.found for part in parts], _pairs(parts), program.config.latent)
    mean, covariance = _posterior(model, parts, len(design))
    group = design[:, : program.config.n_batch].argmax(1)
    # z is the average of the experts: where every cell has all modalities, each gives its part of the posterior that
    # many times, and otherwise the posterior given its modality alone.
    is_together = program.config.fully_paired
    times = len(parts) + len(program.modelled_extra) if is_together else 1
    for place, part in enumerate(parts):
        of_expert = model.covariance(range(len(parts)) if is_together else [place])
        key = part.modality.key
        first_layer: SharedFirstLayer = getattr(program, f"{key}_first_layer")
        start_first_layer(first_layer, part.found, part.inputs)
        expert: NormalHead = getattr(program, f"{key}_expert")
        wanted = model.evidence(place, part.found.scores) @ of_expert
        start_expert(expert, _hidden(program, minibatches, key, expert), times * wanted, times * np.diag(of_expert))
        if is_together:
            alone: NormalHead = getattr(program, f"{key}_alone_expert")
            of_alone = model.covariance([place])
            wanted = model.evidence(place, part.found.scores) @ of_alone
            start_expert(alone, _hidden(program, minibatches, key, alone), wanted, np.diag(of_alone))
        effects = _effects(program, part, group[part.places], mean[part.places], covariance[part.places])
        decoder = getattr(program, f"{part.modality.name}_decoder")
        layer = getattr(decoder, part.modality.decoded)
        slope = _slope(program, part.modality, layer.bias.detach().cpu().double().numpy())
        hidden = _decoder_hidden(program, decoder.stack)
        start_readout(hidden, layer, design, effects / slope[:, None], program.config.latent)
        n_intercepts = intercepts_of(decoder, layer)
        if n_intercepts:
            found = _batch_effects(program, part, group[part.places], n_intercepts) / slope[:, None]
            start_intercepts(layer, found / intercept_scale(layer.in_features - n_intercepts))
    is_known = np.zeros(len(design), dtype=bool)
    is_known[np.concatenate([part.places for part in parts])] = True
    for extra in program.modelled_extra:
        together = times * np.diag(model.covariance(range(len(parts)))) if is_together else None
        _start_extra(extra, minibatches, mean, is_known, together)
    logger.info("training starts from %d dimensions of a linear model", model.n_latent)
    return model.n_latent


def _start_extra(
    extra: Any, minibatches: list[Cells], mean: Array, is_known: NDArray[np.bool_], together: Array | None
) -> None:
    """Set the expert of an extra modality: q(z) given it alone is the regression of z on its hidden layer.

    Parameters
    ----------
    mean, is_known
        Posterior mean of z given the other modalities, (n, K), and whether a cell has one of them, (n,).
    together
        Variances of the expert in a posterior from all modalities, to which it adds nothing at first, (K,); None if
        its one expert is that given this modality alone.
    """
    measured = torch.cat([extra.measurement(cells).measured for cells in minibatches]).cpu().numpy()
    if (measured & is_known).sum() < _FEWEST:
        return
    states = [extra.encode(cells, cells.design) for cells in minibatches]
    for head in (extra.head, extra.alone_head):
        if head is None:
            continue
        hidden = torch.cat([head.stack(state.hidden, state.s) for state in states])[is_known[measured]]
        wanted = mean[measured & is_known]
        if head is extra.head and together is not None:
            start_expert(head, hidden, np.zeros_like(wanted), together)
        else:
            start_expert(head, hidden, wanted)


def _pairs(parts: list[_Part]) -> tuple[Array, Array] | None:
    """Scores of the cells that have both modalities, in the same order; None if there is one modality."""
    if len(parts) < 2:
        return None
    one, other = parts
    _, rows, other_rows = np.intersect1d(one.places, other.places, return_indices=True)
    return one.found.scores[rows], other.found.scores[other_rows]


def _posterior(model: Factors, parts: list[_Part], n: int) -> tuple[Array, Array]:
    """Posterior mean and covariance of z from what was measured in each cell, (n, K) and (n, K, K)."""
    evidence: Array = np.zeros((n, model.n_latent))
    pattern = np.zeros(n, dtype=int)
    for place, part in enumerate(parts):
        evidence[part.places] += model.evidence(place, part.found.scores)
        pattern[part.places] += 2**place
    places = range(len(parts))
    of_patterns = [
        model.covariance([place for place in places if code >> place & 1]) for code in range(2 ** len(parts))
    ]
    covariance: Array = np.stack(of_patterns)[pattern]
    return np.einsum("nk,nkl->nl", evidence, covariance), covariance


def _effects(program: Any, part: _Part, group: NDArray[np.int64], mean: Array, covariance: Array) -> Array:
    """Change of the log mean of each feature with z, (F, K), from the cells in which it was measured."""
    effects: Array = np.zeros((part.counts.shape[1], mean.shape[1]))
    for cells, features, counts, overdispersion in _measured_together(program, part):
        effects[features] = effects_on_means(
            counts, part.depth[cells], group[cells], mean[cells], covariance[cells], overdispersion
        )
    return effects


def _batch_effects(program: Any, part: _Part, group: NDArray[np.int64], n_batch: int) -> Array:
    """Change of the log mean of each feature with the batch, (F, n_batch)."""
    effects: Array = np.zeros((part.counts.shape[1], n_batch))
    for cells, features, counts, overdispersion in _measured_together(program, part):
        effects[features] = effects_of_groups(counts, part.depth[cells], group[cells], n_batch, overdispersion)
    return effects


def _measured_together(
    program: Any, part: _Part
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], sp.csr_array, Array]]:
    """Cells, the features that the same panels have and are read from them, their counts and overdispersion."""
    patterns, pattern = np.unique(part.measured, axis=1, return_inverse=True)
    theta = _inverse_dispersion(program, part)
    for code, of_panels in enumerate(patterns.T):
        cells, features = np.flatnonzero(of_panels[part.panel]), np.flatnonzero(pattern.ravel() == code)
        if len(cells):
            counts = part.counts[cells][:, features]
            yield cells, features, counts, 1 + np.asarray(counts.mean(0)).ravel() / theta[features]


def _is_as_constructed(program: Any, modality: Modality) -> bool:
    decoder = getattr(program, f"{modality.name}_decoder", None)
    layer, stack = getattr(decoder, modality.decoded, None), getattr(decoder, "stack", None)
    decode = getattr(type(program), modality.name)
    experts = [f"{modality.key}_expert"] + [f"{modality.key}_alone_expert"] * program.config.fully_paired
    names = (f"{modality.name}_decoder", f"{modality.key}_first_layer", *experts)
    return (
        decode.__module__.startswith("pyro_multivi.")
        and isinstance(layer, torch.nn.Linear)
        and layer.bias is not None
        and not bool(layer.weight.any())
        and type(stack) is CovariateStack
        and type(getattr(program, f"{modality.key}_first_layer", None)) is SharedFirstLayer
        and all(_is_linear_head(getattr(program, name, None)) for name in experts)
        and all(value.requires_grad for name in names for value in getattr(program, name).parameters())
    )


def _starts(extra: Any) -> bool:
    """Whether the expert of an extra modality can be started."""
    heads = [head for head in (extra.head, extra.alone_head) if head is not None]
    trained = all(value.requires_grad for head in heads for value in head.parameters())
    return bool(extra.has_own_head) and trained and all(_is_linear_head(head) for head in heads)


def _is_linear_head(expert: Any) -> bool:
    last = (expert.loc, expert.log_variance) if type(expert) is NormalHead else (None,)
    return all(isinstance(layer, torch.nn.Linear) and layer.bias is not None for layer in last)


def _some(train: Minibatches, modalities: Sequence[Modality]) -> Tensor:
    """Positions of some of the cells, spread over all, so many that their counts are within bounds.

    Where not all are taken a fifth are pairs, if there are so many, for they alone tell what modalities share.
    """
    index = train.index
    first = train.cut(index[:_AT_ONCE])
    per_cell = sum(_csr(modality.counts_in(first)).nnz for modality in modalities) / max(len(first), 1)
    n = min(_MOST, max(_FEWEST, int(_ENTRIES / max(per_cell, 1.0))))
    some = spread(index, n)
    if len(some) == len(index) or len(modalities) == 1:
        return some
    return torch.cat([some, spread(paired(train), n // 4)]).unique()


def _part(program: Any, cells: Cells, modality: Modality, measured: NDArray[np.bool_], design: Array) -> _Part:
    places = np.flatnonzero(measured)
    counts = _csr(modality.counts_in(cells))[places]
    if modality.in_model(program.config).binary:
        counts.data[:] = 1.0
    panels = modality.panels_in(cells)
    depth: Array = np.asarray(counts.sum(1), dtype=np.float64).ravel()
    of_panels, options = (np.ones((1, counts.shape[1]), dtype=bool), np.zeros(len(places), dtype=np.int64)), {}
    if panels is not None:
        share: Any = measured_share(program, cells, modality)
        of_panels = panels.measured.cpu().numpy(), panels.code.cpu().numpy()[places]
        depth, options = depth / share.cpu().double().numpy()[places], {"share": share}
    inputs = _csr(program.rna_input(cells.x, **options) if modality == RNA else program.atac_input(cells.y))[places]
    found = components(inputs, depth, design[places], program.config.latent, *of_panels)
    return _Part(modality, places, depth, inputs, counts, *of_panels, found)


def _hidden(program: Any, minibatches: list[Cells], key: str, expert: NormalHead) -> Tensor:
    """Input of an expert's last layers in the cells that have its modality, (n, H)."""
    states = (getattr(program.encode(cells, cells.design), key) for cells in minibatches)
    return torch.cat([expert.stack(state.hidden, state.s) for state in states])


def _decoder_hidden(program: Any, stack: CovariateStack) -> Callable[[Tensor, Tensor], Tensor]:
    """Last hidden layer of a decoder, (n, H), as a function of z and s."""
    return lambda z, s: stack(program.transform(z), s)


def _inverse_dispersion(program: Any, part: _Part) -> Array:
    """Square of the mean count over that by which the variance exceeds it, (F,)."""
    if part.modality == RNA and hasattr(program, "log_theta"):
        return program.log_theta.detach().exp().mean(0).cpu().double().numpy()
    return np.full(part.counts.shape[1], np.inf)


def _slope(program: Any, modality: Modality, logit: Array) -> Array:
    """Derivative of the log of what is decoded by its logit, (F,)."""
    if modality != RNA:
        return 1 / (1 + np.exp(logit))
    if program.config.library == "size_factor":
        return 1 / (1 + np.exp(-logit)) / np.logaddexp(0, logit).clip(1e-12)
    return np.ones_like(logit)


def _csr(counts: Tensor) -> sp.csr_array:
    if not isinstance(counts, SparseCounts):
        return sp.csr_array(counts.cpu().double().numpy())
    entries = tuple(part.cpu().numpy() for part in (counts.val.double(), counts.col, counts.crow))
    return sp.csr_array(entries, shape=(counts.shape[0], counts.shape[1]))
