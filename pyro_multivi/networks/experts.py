"""Experts, one Normal per modality over the same latent state, their weighted average, and a mixture as its prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import modelled
from pyro_multivi.networks.encoders import HiddenState, HiddenStates

# Normals of a mixture prior, and the standard deviation of their centres at first.
_COMPONENTS, _START_SPREAD = 20, 0.7


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


def experts_of(program: Any, cells: Cells, s: Tensor, hidden: HiddenStates) -> dict[str, Expert]:
    """Expert of each modality, by its name; of a fully paired program those of :func:`alone_of` in cells that lack one.

    Where such a cell has several, their average is the :func:`product` of the posteriors given each alone.
    """
    experts = _experts(program, cells, hidden, "expert")
    of_extra = {extra.name: extra.expert(cells, s) for extra in program.modelled_extra}
    experts.update(of_extra)
    if not program.config.fully_paired:
        return experts
    if all(state is None or state.rows is None for state in hidden) and (not of_extra or bool(in_all(of_extra).all())):
        return experts
    alone = alone_of(program, cells, s, hidden)
    has_all = in_all(alone)[:, None]
    for name, expert in (product(alone) if len(alone) > 2 else alone).items():
        loc = torch.where(has_all, experts[name].loc, expert.loc)
        experts[name] = replace(expert, loc=loc, scale=torch.where(has_all, experts[name].scale, expert.scale))
    return experts


def alone_of(program: Any, cells: Cells, s: Tensor, hidden: HiddenStates) -> dict[str, Expert]:
    """q(z) given one modality alone, by its name, of a fully paired program."""
    experts = _experts(program, cells, hidden, "alone_expert")
    own = [extra for extra in program.modelled_extra if extra.alone_head is not None]
    return {**experts, **{extra.name: extra.expert_alone(cells, s) for extra in own}}


def product(alone: dict[str, Expert]) -> dict[str, Expert]:
    r"""Experts whose average is the product of posteriors given each measured modality alone, divided by the prior.

    .. math:: q(z) \propto p(z) \prod_k \frac{q_k(z)}{p(z)}, \qquad p(z) = \mathrm{Normal}(0, 1),

    the posterior given several modalities that are independent given z. With one it is :math:`q_k`. The average is that
    of equal weights; learned ones (``modality_weights``) shift it towards the modality that they favour.

    Examples
    --------
    >>> a = Expert(torch.full((2, 1), 0.5), torch.full((2, 1), 0.5).sqrt(), torch.tensor([True, True]))
    >>> b = Expert(torch.tensor([[0.5], [0.0]]), torch.tensor([[0.5], [1.0]]).sqrt(), torch.tensor([True, False]))
    >>> weights = expert_weights(torch.zeros(2, 2), torch.stack([a.measured, b.measured], -1))
    >>> loc, scale = average([*product({"a": a, "b": b}).values()], weights)
    >>> loc.flatten(), scale.square().flatten()
    (tensor([0.6667, 0.5000]), tensor([0.3333, 0.5000]))
    """
    # (E, B, K). What was not measured is the prior, which adds nothing; an expert that is wider counts as wide as that.
    precision = torch.stack([expert.scale for expert in alone.values()]).clamp(max=1).square().reciprocal()
    evidence = precision * torch.stack([expert.loc for expert in alone.values()])
    variance = (1 + (precision - 1).sum(0)).reciprocal()
    number = torch.stack([expert.measured for expert in alone.values()]).sum(0)[:, None]
    scale = (number * variance).sqrt()
    return {
        name: replace(
            expert,
            loc=torch.where(number > 1, number * variance * part, expert.loc),
            scale=torch.where(number > 1, scale, expert.scale),
        )
        for (name, expert), part in zip(alone.items(), evidence, strict=True)
    }


def in_all(experts: Mapping[str, Expert]) -> Tensor:
    """Whether every one of some modalities was measured in a cell, (B,), bool."""
    return torch.stack([expert.measured for expert in experts.values()]).all(0)


def _experts(program: Any, cells: Cells, hidden: HiddenStates, head: str) -> dict[str, Expert]:
    experts: dict[str, Expert] = {}
    zero = cells.design.new_zeros(len(cells), program.config.latent)
    for modality in modelled(program.config):
        state: HiddenState = getattr(hidden, modality.key)
        loc, scale = getattr(program, f"{modality.key}_{head}")(state)
        loc, scale = state.scatter(loc, zero), state.scatter(scale, torch.ones_like(zero))
        experts[modality.name] = Expert(loc, scale, modality.measured_in(cells))
    return experts


def seen_from_one(experts: dict[str, Expert], share: float = 0.5) -> dict[str, Expert]:
    """Experts as if a random share of the paired cells had one of their modalities alone.

    Parameters
    ----------
    experts
        Experts by modality. Only ``measured`` changes.
    share
        Share of the cells with several modalities that keep one of them, each with the same chance.

    Examples
    --------
    >>> flags = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    >>> both = {name: Expert(torch.zeros(3, 1), torch.ones(3, 1), flag) for name, flag in zip("ab", flags)}
    >>> one = seen_from_one(both, share=1.0)
    >>> sum(expert.measured.long() for expert in one.values())
    tensor([1, 1, 1])
    """
    measured_ne = torch.stack([expert.measured for expert in experts.values()], -1)
    chance_ne = torch.rand(measured_ne.shape, device=measured_ne.device).masked_fill(~measured_ne, -1.0)
    kept_ne = torch.nn.functional.one_hot(chance_ne.argmax(-1), len(experts)).bool()
    is_dropped_n = torch.rand(len(measured_ne), device=measured_ne.device) < share
    measured_ne = measured_ne & (kept_ne | ~is_dropped_n[:, None])
    return {
        name: replace(expert, measured=measured_ne[:, place]) for place, (name, expert) in enumerate(experts.items())
    }


def expert_weights(logits: Tensor, measured: Tensor) -> Tensor:
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
        (B, E), from :func:`expert_weights`.

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


class LatentMixture(nn.Module):
    r"""Prior of the latent state: a mixture of Normals that all batches share, with weights of each batch.

    .. math::

        p(z \mid s) = \sum_{c} \pi_{sc}\, \mathrm{Normal}\big(z \mid m_c, \mathrm{diag}(t_c^2)\big)

    Under Normal(0, I) the term :math:`\mathrm{KL}(q \Vert p)` is least where the states of each batch have mean 0, so
    that a batch without a type of cells comes to lie beside the others. Here that batch can weigh less what the type
    needs. A mixture prior was proposed by Dilokthanakul et al. (2016) and Tomczak and Welling (2018); weights of each
    batch are ours. All of it is learned with the decoders (empirical Bayes), and KL terms are sampled.

    Attributes
    ----------
    centre, log_scale
        :math:`m_c` and :math:`\log t_c`, (C, K).
    logits
        Logarithms of the weights, (n_batch, C), up to a constant in each batch; 0 at first.

    Examples
    --------
    >>> prior = LatentMixture(n_batch=2, n_latent=3)(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> prior.batch_shape, prior.event_shape
    (torch.Size([2]), torch.Size([3]))
    """

    def __init__(self, n_batch: int, n_latent: int, n_components: int = _COMPONENTS) -> None:
        super().__init__()
        self.centre = nn.Parameter(_START_SPREAD * torch.randn(n_components, n_latent))
        # So that the variance of the whole is about 1 at first.
        self.log_scale = nn.Parameter(torch.full_like(self.centre, math.log(1 - _START_SPREAD**2) / 2))
        self.logits = nn.Parameter(torch.zeros(n_batch, n_components))

    def forward(self, s: Tensor) -> dist.TorchDistribution:
        """Prior of cells of a design (..., S), event shape (K,)."""
        logits = s[..., : len(self.logits)] @ self.logits
        shape = *logits.shape, self.centre.shape[-1]
        components = dist.Normal(self.centre.expand(shape), self.log_scale.exp().expand(shape)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
