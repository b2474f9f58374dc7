"""Experts, one Normal per modality over the same latent state, and their weighted average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Expert:
    """Normal over the latent state of each cell, from one modality.

    Attributes
    ----------
    loc, scale
        Mean and standard deviation, (B, K). Rows of unmeasured cells hold the prior.
    measured
        Whether the modality was measured, (B,), bool.
    """

    loc: Tensor
    scale: Tensor
    measured: Tensor


def mixing_weights(logits: Tensor, measured: Tensor) -> Tensor:
    """Softmax over the measured modalities of each cell.

    Parameters
    ----------
    logits, measured
        (B, E): one column per expert.

    Returns
    -------
    Tensor
        (B, E); rows sum to one, or are zero where nothing was measured.
    """
    masked = logits.masked_fill(~measured, -torch.inf)
    # A row of -inf would give NaN: it gets any finite value, its weights are zeroed below.
    masked = masked.masked_fill(~measured.any(-1, keepdim=True), 0.0)
    return masked.softmax(-1) * measured


def average(experts: list[Expert], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the weighted average of independent Normals.

    The average of independent Normals has mean sum w mu and variance sum w^2 sigma^2. A cell in
    which nothing was measured gets the standard Normal prior.

    Parameters
    ----------
    experts
        E experts of shape (B, K).
    weights
        (B, E), from :func:`mixing_weights`.

    Examples
    --------
    >>> one = Expert(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([True]))
    >>> other = Expert(torch.full((1, 1), 2.0), torch.ones(1, 1), torch.tensor([True]))
    >>> loc, scale = average([one, other], torch.tensor([[0.5, 0.5]]))
    >>> loc.item(), round(scale.item() ** 2, 3)
    (1.0, 0.5)
    """
    w_nek = weights[..., None]
    loc = (w_nek * torch.stack([expert.loc for expert in experts], -2)).sum(-2)
    variance = (w_nek.square() * torch.stack([expert.scale for expert in experts], -2).square()).sum(-2)
    # where, not addition: the square root has no gradient at a variance of zero.
    nothing = (weights.sum(-1, keepdim=True) == 0).expand_as(variance)
    variance = torch.where(nothing, torch.ones_like(variance), variance)
    return loc, variance.sqrt()


def measurement_patterns(experts: list[Expert]) -> Tensor:
    """Measurement pattern of each cell (first modality only, second only, both, ...), one-hot, (B, 2^E - 1).

    A cell in which nothing was measured has a row of zeros.

    Examples
    --------
    >>> flags = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    >>> measurement_patterns([Expert(torch.zeros(4, 1), torch.ones(4, 1), measured) for measured in flags])
    tensor([[0, 0, 1],
            [1, 0, 0],
            [0, 1, 0],
            [0, 0, 0]])
    """
    code = sum(2**place * expert.measured.long() for place, expert in enumerate(experts))
    assert isinstance(code, Tensor)
    return torch.nn.functional.one_hot(code, 2 ** len(experts))[:, 1:]
