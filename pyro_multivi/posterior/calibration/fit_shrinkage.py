r"""Fit of the weights of mean profiles: how far what is decoded of a modality that was not measured is trusted.

In held-out cells of both modalities one is hidden, and counts of feature j in cell n are predicted in proportion to

.. math:: (1 - w)\, a_{nj} + w\, b_{nj}

with a what is decoded from the other modality and b the mean of the training cells that have it. Given the cell's
total, whose prediction is a matter of its own, the counts are multinomial; their log-likelihood is concave in w. Counts
of a cell vary together, so it is tempered as in a sandwich estimate: multiplied by its curvature over the variance of
the cells' scores, if that is below 1. The weight is the posterior mean under a uniform prior.

A few pairs are enough to see that hundreds of counts are predicted worse than by the mean; of two, w is near 1/2 unless
both say otherwise. Cells that were trained on would not do: the encoders are overfitted to the halves of their pairs,
and w would be 0.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, measured, paired, spread
from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.modality import ATAC, Modality, modelled
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.networks.panels import depth
from pyro_multivi.posterior.engine.decode import Average, decode, features_at_a_time, mean_buffers
from pyro_multivi.posterior.engine.draws import feature_blocks, mean_latents, region_factors
from pyro_multivi.posterior.engine.replicates import counts_of, hide, where_measured
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

#: Weights that are compared.
GRID = torch.linspace(0, 1, 41)
# Most held-out pairs, and fewest, for scores of one cell have no variance; cells whose decoded values tell the level
# of the mean profile.
_MOST, _FEWEST, _LEVEL_CELLS = 1024, 2, 256
_AT_ONCE = 64
# Of a rate, that its logarithm be finite.
_LEAST = 1e-30


def clear_shrinkage(program: MultiVIProgram) -> None:
    """Return to what is decoded alone."""
    for modality in modelled(program.config):
        for buffer in mean_buffers(program, modality):
            buffer.zero_()


@torch.no_grad()
@tells_if_interrupted("what is imputed is not drawn towards the mean of the measured")
def fit_shrinkage(program: MultiVIProgram, train: Minibatches, held_out: Minibatches | None) -> None:
    """Set ``rna_mean``, ``rna_mean_weight`` and those of ATAC of a program.

    With fewer than two pairs (cells of both modalities) held out nothing is fitted, and weights are 0, which a log line
    says; so they are where a latent variable has no posterior mean, from which estimates are made by default, and of a
    modality without training cells. The weight is that of the mean over the training cells; the mean that is kept is
    over the held-out cells too.

    Parameters
    ----------
    train, held_out
        Cells that it was and was not trained on. None: no cells.
    """
    clear_shrinkage(program)
    if len(modelled(program.config)) < 2:
        return
    pairs = paired(train)[:0] if held_out is None else spread(paired(held_out), _MOST)
    if held_out is None or len(pairs) < _FEWEST:
        logger.info(
            "what is imputed is not drawn towards the mean of the measured: %d cells of both modalities were held out, "
            "and %d are needed to say how far", len(pairs), _FEWEST,
        )  # fmt: skip
        return
    if not _has_means(program, held_out.cut(pairs[:1])):
        return
    for modality in modelled(program.config):
        if not len(measured(train, modality)):
            continue  # Nothing of it was learned.
        mean, weight = mean_buffers(program, modality)
        trained, more = (_Measured.of(program, cells, modality) for cells in (train, held_out))
        # On the scale of what is decoded: rates of such a sum, without the factors of features.
        level, factor = _level(program, train, modality), _feature_factor(program, modality)
        scale = level if factor is None else level / factor
        fitted, kept = (scale * sums.share for sums in (trained, trained + more))
        scores = [log_scores(program, held_out.cut(part), modality, fitted) for part in pairs.split(_AT_ONCE)]
        mean.copy_(kept)
        weight.fill_(weight_of(torch.cat(scores)))
        logger.info("imputed %s: the mean of the measured has weight %.2f", modality.name, float(weight))


def weight_of(score_nw: Tensor) -> float:
    """Posterior mean of the weight.

    Parameters
    ----------
    score_nw
        Log-likelihood of the counts of each held-out cell at each weight of :data:`GRID`, (n, W), float64.

    Examples
    --------
    Cells whose likeliest weights lie around 0.3:

    >>> best = 0.3 + 0.1 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    >>> round(weight_of(-1e4 * (GRID - best[:, None]).double().square()), 2)
    0.3
    """
    grid = GRID.to(score_nw)
    total = score_nw.sum(0)
    # The curvature at an end is that beside it.
    place = int(total.argmax().clamp(1, len(grid) - 2))
    step = float(grid[1] - grid[0])
    slope_n = (score_nw[:, place + 1] - score_nw[:, place - 1]) / (2 * step)
    curvature = -(total[place + 1] - 2 * total[place] + total[place - 1]) / step**2
    temper = (curvature / (slope_n.var() * len(slope_n)).clamp(min=1e-12)).clamp(0, 1)
    return float((temper * total).softmax(0) @ grid)


def log_scores(program: MultiVIProgram, cells: Cells, modality: Modality, mean: Tensor) -> Tensor:
    """Log-likelihood of a modality's counts given their total, predicted from the other, at each weight, (B, W).

    Parameters
    ----------
    mean
        Mean of the measured cells, (F,), on the scale of what is decoded.
    """
    counts, _ = counts_of(program, cells, modality.counts)
    known = where_measured(cells, modality.counts)
    factor = _feature_factor(program, modality)
    grid = GRID.to(counts.device).double()
    log_rate = torch.zeros(len(cells), len(grid), dtype=torch.float64, device=counts.device)
    sums = torch.zeros(2, len(cells), 1, dtype=torch.float64, device=counts.device)
    with evaluation_mode(program):
        decoded = decode(program, hide(cells, modality), Average(), (modality.decoded,)).sites[0][modality.decoded]
        for block, own_sbw in feature_blocks(decoded, None, features_at_a_time(len(cells))):
            scale = known if known.shape[1] == 1 else known[:, block]
            scale = scale if factor is None else scale * factor[block]
            own, other = own_sbw[0] * scale, mean[block] * scale
            sums += torch.stack([own, other]).double().sum(-1, keepdim=True)
            rows, columns = (counts[:, block] > 0).nonzero(as_tuple=True)
            one, two = (values[rows, columns].double()[:, None] for values in (own, other))
            rate = torch.lerp(one, two, grid).clamp(min=_LEAST).log()
            log_rate.index_add_(0, rows, counts[:, block][rows, columns].double()[:, None] * rate)
    total = counts.double().sum(-1, keepdim=True)
    return log_rate - total * torch.lerp(sums[0], sums[1], grid).clamp(min=_LEAST).log()


def _level(program: MultiVIProgram, train: Minibatches, modality: Modality) -> float:
    """Sum over features of what is decoded, times the factors of features, mean over some training cells."""
    sample = spread(measured(train, modality), _LEVEL_CELLS)
    factor, total = _feature_factor(program, modality), 0.0
    for part in sample.split(_AT_ONCE):
        with evaluation_mode(program):
            decoded = decode(program, train.cut(part), Average(), (modality.decoded,)).sites[0][modality.decoded]
            for block, values in feature_blocks(decoded, None, features_at_a_time(len(part))):
                total += float((values if factor is None else values * factor[block]).sum())
    return total / max(len(sample), 1)


def _has_means(program: MultiVIProgram, cells: Cells) -> bool:
    """Whether every latent variable has a posterior mean, from which estimates are made by default."""
    with evaluation_mode(program):
        try:
            return not mean_latents(program, cells).without_mean
        except ValueError:
            return False


def _feature_factor(program: MultiVIProgram, modality: Modality) -> Tensor | None:
    """Factor of each feature in its expected count beside what is decoded, (F,); None for 1."""
    return region_factors(program) if modality == ATAC else None


class _Measured(NamedTuple):
    """Counts of each feature, (F,), and the depth of the cells that measured it, (F,), summed over cells."""

    counts: Tensor
    depth: Tensor

    @classmethod
    def of(cls, program: MultiVIProgram, minibatches: Minibatches, modality: Modality) -> _Measured:
        """Sums over cells, of ATAC over open regions where only these are modelled."""
        device = mean_buffers(program, modality)[1].device
        counted = torch.zeros(modality.n_features_in(program.config), dtype=torch.float64, device=device)
        depths = torch.zeros_like(counted)
        for cells in minibatches:
            counts, has_counts = modality.counts_in(cells), modality.measured_in(cells)
            if modality.in_model(program.config).binary:
                counts = counts.binary() if isinstance(counts, SparseCounts) else (counts > 0).double()
            if isinstance(counts, SparseCounts):
                counted += torch.bincount(counts.col, weights=counts.val.double(), minlength=counts.shape[1])
            else:
                counted += counts[has_counts].double().sum(0)
            depth_b = depth(program, cells, modality).double() * has_counts
            panels: Panels | None = modality.panels_in(cells)
            if panels is None:
                depths += depth_b.sum()
            else:
                by_panel = torch.zeros(len(panels.measured), dtype=torch.float64, device=device)
                depths += by_panel.index_add_(0, panels.code, depth_b) @ panels.measured.double()
        return cls(counted, depths)

    def __add__(self, other: Any) -> _Measured:
        return _Measured(self.counts + other.counts, self.depth + other.depth)

    @property
    def share(self) -> Tensor:
        """Share of each feature, (F,), half a count more in each; sums to 1."""
        rate = (self.counts + 0.5) / self.depth.clamp(min=1.0)
        return (rate / rate.sum()).float()
