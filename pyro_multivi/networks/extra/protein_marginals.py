"""Background and foreground of proteins in the data, before any model: where a program's parameters start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_multivi.data.minibatch import Measurement

# Cells of a batch that are looked at: the mean of a component of a tenth of them is good to a few per cent.
_CELLS = 4096
_ITERATIONS, _COUNT_ITERATIONS = 100, 15
# Standard deviation of log(1 + count) of a component at least: that of Poisson counts around 25.
_LEAST_SD = 0.2
# A foreground is at least twice the background; where none is seen, it starts with a twentieth of the cells at four
# times the background.
_LEAST_LOG_RATIO, _LEAST_SHARE = 0.7, 0.01
_UNSEEN_LOG_RATIO, _UNSEEN_SHARE = 1.4, 0.05
# Mean background at least, in counts: of a protein without any, exp(m) has to stay positive.
_LEAST_MEAN = 0.05
_LEAST_THETA, _MOST_THETA = 0.5, 100.0
_MOST_LOGIT = 4.0


@dataclass(frozen=True)
class ProteinMarginals:
    """Statistics of the counts of F proteins, by a mixture of two negative binomials of each in each batch.

    The mixture starts at one of two Normals of log(1 + count). Those alone put the background of simulated cells
    5 to 9 % too high: logs of counts are skewed, and the lowest of the foreground pass for background.

    Attributes
    ----------
    background_log_mean
        Log of the mean count of the lower component, (n_batch, F); of a protein that a batch did not measure, the mean
        over those that did.
    foreground_log_ratio
        Log of the mean of the upper over that of the lower component, (F,).
    foreground_logit
        Log odds of the share of the upper component, (F,).
    log_theta
        Log inverse dispersion within the components, (F,).
    log1p_mean
        Mean of log(1 + count), (F,).
    n_cells
        Number of cells of each batch by which each protein was judged, (n_batch, F).
    """

    background_log_mean: Tensor
    foreground_log_ratio: Tensor
    foreground_logit: Tensor
    log_theta: Tensor
    log1p_mean: Tensor
    n_cells: Tensor

    @classmethod
    def of(cls, measurement: Measurement, batch_code: Tensor, n_batch: int) -> ProteinMarginals:
        """Statistics of counts, (n, F), NaN where not measured, of cells in batches, (n,)."""
        values = torch.where(measurement.measured[:, None], measurement.values, torch.nan)
        parts = []
        for code in range(n_batch):
            of_batch = values[measurement.measured & (batch_code == code)]
            # Evenly spread, so that no random state is used.
            parts.append(_of_batch(of_batch[:: max(1, len(of_batch) // _CELLS)]))
        size, background, ratio, logit, theta = (torch.stack(part) for part in zip(*parts, strict=True))
        weight = size / size.sum(0).clamp(min=1)

        def over_batches(part: Tensor) -> Tensor:
            return (weight * part).sum(0)

        log1p = values.log1p().nanmean(0).nan_to_num(0.0)
        return cls(
            background_log_mean=torch.where(size > 0, background, over_batches(background)),
            foreground_log_ratio=over_batches(ratio),
            foreground_logit=over_batches(logit),
            log_theta=over_batches(theta),
            log1p_mean=log1p,
            n_cells=size,
        )


def _of_batch(values: Tensor) -> tuple[Tensor, ...]:
    """Cells, log background, log ratio, logit of the foreground's share and log theta of each protein, (F,) each."""
    known = ~values.isnan()
    size = known.sum(0).float()
    y = torch.where(known, values, 0.0)
    upper = _of_counts(y, known, _upper_component(y.log1p(), known))
    lower = known.float() - upper
    n_lower, n_upper = lower.sum(0), upper.sum(0)
    mean_lower = ((lower * y).sum(0) / n_lower.clamp(min=1e-6)).clamp(min=_LEAST_MEAN)
    mean_upper = ((upper * y).sum(0) / n_upper.clamp(min=1e-6)).clamp(min=_LEAST_MEAN)
    share = n_upper / size.clamp(min=1)
    ratio = (mean_upper / mean_lower).log()
    apart = (ratio > _LEAST_LOG_RATIO) & (share > _LEAST_SHARE) & (share < 1 - _LEAST_SHARE)
    # Without a gap between them both are one background.
    together = (y.sum(0) / size.clamp(min=1)).clamp(min=_LEAST_MEAN)
    mean_lower = torch.where(apart, mean_lower, together)
    mean_upper = torch.where(apart, mean_upper, together)
    both = ((lower, mean_lower), (upper, mean_upper))
    excess = sum((member * ((y - mean).square() - mean) for member, mean in both), torch.zeros_like(y)).sum(0)
    squared = n_lower * mean_lower.square() + n_upper * mean_upper.square()
    theta = (squared / excess.clamp(min=1e-6)).clamp(_LEAST_THETA, _MOST_THETA)
    ratio = torch.where(apart, ratio, _UNSEEN_LOG_RATIO)
    logit = torch.where(apart, share, _UNSEEN_SHARE).clamp(1e-3, 1 - 1e-3).logit()
    return size, mean_lower.log(), ratio, logit.clamp(-_MOST_LOGIT, _MOST_LOGIT), theta.log()


def _upper_component(x: Tensor, known: Tensor) -> Tensor:
    """Probability that each value belongs to the upper of two Normals, (n, F), 0 where not known, by EM."""
    weight = known.float()
    n = weight.sum(0).clamp(min=1)
    low = torch.where(known, x, torch.inf).amin(0).nan_to_num(0.0, 0.0, 0.0) if len(x) else x.new_zeros(x.shape[1])
    high = torch.where(known, x, -torch.inf).amax(0).nan_to_num(0.0, 0.0, 0.0) if len(x) else low
    upper = weight * (x > (low + high) / 2)
    for _ in range(_ITERATIONS):
        parts = []
        for member in (weight - upper, upper):
            size = member.sum(0)
            mean = (member * x).sum(0) / size.clamp(min=1e-6)
            variance = (member * (x - mean).square()).sum(0) / size.clamp(min=1e-6)
            sd = variance.sqrt().clamp(min=_LEAST_SD)
            parts.append((size / n).clamp(min=1e-6).log() - sd.log() - 0.5 * ((x - mean) / sd).square())
        upper = weight * (parts[1] - parts[0]).sigmoid()
    return upper


def _of_counts(y: Tensor, known: Tensor, upper: Tensor) -> Tensor:
    """Probability of the upper of two negative binomials, (n, F), by EM from ``upper``; dispersions by moments."""
    weight = known.float()
    n = weight.sum(0).clamp(min=1)
    for _ in range(_COUNT_ITERATIONS):
        parts = []
        for member in (weight - upper, upper):
            size = member.sum(0)
            mean = ((member * y).sum(0) / size.clamp(min=1e-6)).clamp(min=_LEAST_MEAN)
            excess = (member * ((y - mean).square() - mean)).sum(0) / size.clamp(min=1e-6)
            theta = (mean.square() / excess.clamp(min=1e-6)).clamp(_LEAST_THETA, _MOST_THETA)
            of_theta = torch.lgamma(y + theta) - torch.lgamma(theta)
            log_prob = of_theta + theta * logsigmoid((theta / mean).log()) + y * logsigmoid((mean / theta).log())
            parts.append((size / n).clamp(min=1e-6).log() + log_prob)
        upper = weight * (parts[1] - parts[0]).sigmoid()
    return upper
