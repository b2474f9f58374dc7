"""Penalties that draw modalities together in latent space: terms of training, not of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pyro_multivi.networks.experts import Expert

# Bandwidths of the kernels of a maximum mean discrepancy, in units of the median squared distance. Most pairs of cells
# are of different types, so the median is a distance between types: wider kernels see little but the distance between
# the means of two sets of cells, narrower ones their arrangement within a type.
_BANDWIDTHS = (0.05, 0.1, 0.25, 0.5, 1.0)

#: Weight of :func:`distillation`. The networks that it teaches learn alike with any; the first layers, which they share
#: with the posterior from both modalities, attend more to what each modality says alone.
DISTILLATION_WEIGHT = 3.0


def jeffreys(a: Expert, b: Expert) -> Tensor:
    """Jeffreys divergence KL(a|b) + KL(b|a) of each cell, in nats, (B,)."""
    va, vb = a.scale.square(), b.scale.square()
    gap = (a.loc - b.loc).square()
    return 0.5 * ((va + gap) / vb + (vb + gap) / va - 2.0).sum(-1)


def mmd(a: Expert, b: Expert) -> Tensor:
    """Squared maximum mean discrepancy between two sets of cells, a scalar.

    Unbiased estimate (Gretton et al. 2012, equation 3), so its expectation does not depend on
    the number of cells, with Gaussian kernels of five bandwidths up to the median squared distance.
    Cells are represented by their means. Fewer than two cells give zero.
    """
    n = len(a.loc)
    if n < 2:
        return (a.loc.sum() + b.loc.sum()) * 0.0
    kernel = _kernel(torch.cat([a.loc, b.loc]))
    off = ~torch.eye(n, dtype=torch.bool, device=kernel.device)
    within = kernel[:n, :n][off].mean() + kernel[n:, n:][off].mean()
    # The cells are paired: the diagonal between the sets is left out as it is within them.
    return within - 2.0 * kernel[:n, n:][off].mean()


def mmd_between_patterns(loc_nk: Tensor, pattern_nc: Tensor) -> Tensor:
    r"""Squared maximum mean discrepancy between measurement patterns, summed over pairs of patterns, a scalar.

    .. math:: \sum_{b < c} \left(k_{bb} + k_{cc} - 2 k_{bc}\right)

    with :math:`k_{bc}` the mean of the kernel over pairs of different cells, one of pattern b, the other of
    pattern c. If two patterns (paired, RNA-only, ATAC-only) hold the same mixture of states it is zero on
    average, whatever their numbers of cells. Patterns of fewer than two cells are left out.

    Parameters
    ----------
    loc_nk
        Latent position of each cell, (n, K).
    pattern_nc
        1 for the pattern of the cell, 0 for the others, (n, C); a row of zeros takes no part. See
        :func:`~pyro_multivi.networks.experts.measurement_patterns`.

    Examples
    --------
    >>> pattern = torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])
    >>> near, far = torch.tensor([[0.0], [1.0], [1.0], [0.0]]), torch.tensor([[0.0], [1.0], [9.0], [8.0]])
    >>> bool(mmd_between_patterns(near, pattern) < 0 < mmd_between_patterns(far, pattern))
    True
    """
    kernel_nn = _kernel(loc_nk)
    pattern_nc = pattern_nc.to(kernel_nn.dtype)
    size_c = pattern_nc.sum(0)
    total_cc = pattern_nc.T @ kernel_nn @ pattern_nc
    # The kernel of a cell with itself is 1.
    within_c = (total_cc.diagonal() - size_c) / (size_c * (size_c - 1)).clamp(min=1)
    between_cc = total_cc / (size_c[:, None] * size_c).clamp(min=1)
    apart_cc = within_c[:, None] + within_c - 2 * between_cc
    counted_c = size_c >= 2
    return torch.where(counted_c[:, None] & counted_c, apart_cc, 0.0).triu(1).sum()


def _kernel(loc_nk: Tensor) -> Tensor:
    """Mean of Gaussian kernels of five bandwidths up to the median squared distance, (n, n)."""
    squared = (loc_nk[:, None] - loc_nk[None]).square().sum(-1)
    bandwidth = _bandwidth(squared)
    return torch.stack([torch.exp(-squared / (bandwidth * factor)) for factor in _BANDWIDTHS]).mean(0)


def _bandwidth(squared_nn: Tensor) -> Tensor:
    # Detached: the median pair of cells is not moved for being that pair.
    return squared_nn.detach().median().clamp(min=1e-12)


def contrast(a: Expert, b: Expert, batch: Tensor) -> Tensor:
    r"""Contrastive penalty of a cell's two experts against those of the paired cells of its batch, in nats, (B,).

    .. math:: -\tfrac12 \log \frac{e^{-\|a_n - b_n\|^2}}{\sum_m e^{-\|a_n - b_m\|^2}}
              -\tfrac12 \log \frac{e^{-\|a_n - b_n\|^2}}{\sum_m e^{-\|a_m - b_n\|^2}}

    over the means, m running over the paired cells of the minibatch that are of the cell's batch: InfoNCE (van den
    Oord et al. 2018) in both directions. A divergence alone is also small if the experts do not depend on the cell;
    this is not. Cells of other batches take no part: to tell them apart the experts would only have to encode the
    batch. Rows that are not paired hold a number without meaning.

    Parameters
    ----------
    a, b
        Experts of the same cells.
    batch
        Code of each cell's batch, (B,).

    Examples
    --------
    >>> measured, same, other = torch.tensor([True, True]), torch.tensor([0, 0]), torch.tensor([0, 1])
    >>> apart = Expert(torch.tensor([[0.0], [9.0]]), torch.ones(2, 1), measured)
    >>> constant = Expert(torch.zeros(2, 1), torch.ones(2, 1), measured)
    >>> contrast(apart, apart, same), contrast(constant, constant, same), contrast(constant, constant, other)
    (tensor([-0., -0.]), tensor([0.6931, 0.6931]), tensor([-0., -0.]))
    """
    score_nn = -(a.loc[:, None] - b.loc[None]).square().sum(-1)
    # The cell itself stays, so that no row is empty.
    paired = a.measured & b.measured
    own = torch.eye(len(paired), dtype=torch.bool, device=paired.device)
    same_batch = batch[:, None] == batch
    left_out = -torch.inf
    by_row = score_nn.masked_fill(~(paired & same_batch | own), left_out).log_softmax(1).diagonal()
    by_column = score_nn.masked_fill(~(paired[:, None] & same_batch | own), left_out).log_softmax(0).diagonal()
    return -0.5 * (by_row + by_column)


def mmd_of_paired(a: Expert, b: Expert) -> Tensor:
    """Value of :func:`mmd` over the paired cells of a minibatch, the same for each cell, (B,)."""
    rows = (a.measured & b.measured).nonzero().squeeze(-1)
    paired = (Expert(expert.loc[rows], expert.scale[rows], expert.measured[rows]) for expert in (a, b))
    return mmd(*paired).expand(len(a.loc))


#: Divergences between the two experts of each cell, in nats, (B,), by their name in ``modality_penalty``.
DIVERGENCES: dict[str, Callable[[Expert, Expert], Tensor]] = {
    "contrastive": jeffreys,
    "Jeffreys": jeffreys,
    "MMD": mmd_of_paired,
}


def distillation(joint: Expert, alone: Iterable[Expert]) -> Tensor:
    r"""Divergence of the posteriors from one modality from that of both, in nats, (B,); zero unless both were measured.

    .. math:: \sum_k \mathrm{KL}\big(q(z_n \mid x_n, y_n) \,\|\, q_k(z_n)\big)

    as in JMVAE-kl (Suzuki, Nakayama, Matsuo 2016, arXiv 1611.01891), but that it has no gradient for the posterior from
    both. The :math:`q(z \mid x)` for which it is least has the mean and variance that draws of q(z | x, y) have over
    the y that go with x.

    Parameters
    ----------
    joint
        Posterior from all modalities.
    alone
        Posteriors from one modality each, of the same cells.

    Examples
    --------
    >>> paired = torch.tensor([True, False])
    >>> joint = Expert(torch.zeros(2, 1), torch.ones(2, 1), paired)
    >>> distillation(joint, [Expert(torch.ones(2, 1), torch.ones(2, 1), paired)] * 2)
    tensor([1., 0.])
    """
    # Rows that are not paired may hold anything, also NaN.
    target = Normal(joint.loc.detach(), joint.scale.detach(), validate_args=False)
    drawn = [Normal(each.loc, each.scale, validate_args=False) for each in alone]
    total = torch.stack([kl_divergence(target, each).sum(-1) for each in drawn]).sum(0)
    return torch.where(joint.measured, total, 0.0)


def penalty(a: Expert, b: Expert, divergence: str, contrast_weight: float, batch: Tensor) -> Tensor:
    """Penalty that draws two experts of a cell together, in nats, (B,); zero unless both were measured.

    Parameters
    ----------
    a, b
        Experts of the same cells.
    divergence
        One of :data:`DIVERGENCES`, or ``"None"``.
    contrast_weight
        Weight of :func:`contrast` beside it.
    batch
        Code of each cell's batch, (B,).

    Examples
    --------
    >>> paired, single = torch.tensor([True, True]), torch.tensor([True, False])
    >>> a = Expert(torch.tensor([[0.0], [1.0]]), torch.ones(2, 1), paired)
    >>> b = Expert(torch.tensor([[0.5], [0.0]]), torch.ones(2, 1), single)
    >>> penalty(a, b, "Jeffreys", contrast_weight=0.0, batch=torch.tensor([0, 0]))
    tensor([0.2500, 0.0000])
    """
    total = a.loc.new_zeros(len(a.loc))
    if divergence in DIVERGENCES:
        total = total + DIVERGENCES[divergence](a, b)
    if contrast_weight:
        total = total + contrast_weight * contrast(a, b, batch)
    # Rows that are not paired may hold anything, also NaN.
    return torch.where(a.measured & b.measured, total, total.new_zeros(()))
