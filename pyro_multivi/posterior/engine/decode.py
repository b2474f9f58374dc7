r"""Decoding of the latents of some cells, once for every batch they are put into.

A state that was inferred from one modality says more about the other than it knows: encoders tell cells apart by what
the modalities do not share, too. So where a modality was not measured in a cell, the mean of its expression or
accessibility is estimated as

.. math:: (1 - w)\ E_q[f(z, s)] + w\ m

with m the mean of the cells in which the modality was measured and a weight w that held-out cells of both modalities
teach (:mod:`pyro_multivi.posterior.calibration.fit_shrinkage`). Both are buffers of the program: ``rna_mean``,
``atac_mean`` and the weights ``rna_mean_weight``, ``atac_mean_weight``, 0 before that and without such cells. Set the
weights to zero to have what is decoded alone. As m is of all batches, what is imputed for two of them differs by 1 - w
of what is decoded. Draws, intervals, replicated counts, densities and differential tests are those of the model,
without m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES, Modality, modelled
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.engine.draws import ROWS, Latents, draw_latents, mean_latents, mirrored_latents, replay
from pyro_multivi.posterior.engine.weight_posterior import with_weight_noise
from pyro_multivi.program import MultiVIProgram

#: Draws x cells x features evaluated at a time: 16 MB in float32, small beside any cache of a file.
BLOCK = 2**22
#: Points of the posterior over which the hidden layer of a decoder is averaged where its modality was not measured.
IMPUTATION_POINTS = 24
# Narrower blocks would cost more in calls than in arithmetic.
_LEAST_WIDTH = 128


def features_at_a_time(n_rows: int) -> int:
    """Features of a block of so many draws x cells."""
    return max(_LEAST_WIDTH, BLOCK // n_rows)


@dataclass(frozen=True)
class Average:
    """Averaging of a quantity: over which draws and batches, and into which summaries.

    Attributes
    ----------
    n_samples
        Number of draws from the posterior.
    use_mean
        With a single draw, take the latents at their posterior means instead. Where a modality was not measured,
        the last hidden layer of its decoder is then averaged over :data:`IMPUTATION_POINTS` points of the posterior.
    batches
        Codes of the batches that every cell is put into in turn; None leaves each in its own.
    covariates
        Columns of the design, and the value that all cells are given there; the others stay as they are.
    level
        Probability of the interval to return; None for the expectation alone.
    keep_draws
        Return all draws instead of their average.
    seed
        Seed of the draws.
    """

    n_samples: int = 1
    use_mean: bool = True
    batches: tuple[int, ...] | None = None
    covariates: tuple[tuple[int, float], ...] = ()
    level: float | None = None
    keep_draws: bool = False
    seed: int = 0

    @property
    def with_weights(self) -> bool:
        """Whether draws are of the decoder's last layer too: a mean needs none, its uncertainty does."""
        return self.keep_draws or self.level is not None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the summaries: mean, sd, lower, upper; or draws."""
        if self.keep_draws:
            return ("draws",)
        return ("mean",) if self.level is None else ("mean", "sd", "lower", "upper")


@dataclass(frozen=True)
class MeasuredMean:
    """Mean of the cells in which a modality was measured, and how much of it estimates of other cells have.

    Attributes
    ----------
    mean
        On the scale of what is decoded, (F,). That of accessibility may exceed 1, where a region is open more often
        than the factors of cells and regions allow.
    weight
        Weight of the mean in each of some cells, (B, 1); 0 where the modality was measured.
    ceiling
        What an estimate is at most, factors included: 1 of a probability.
    """

    mean: Tensor
    weight: Tensor
    ceiling: float

    def some(self, features: Tensor | None, rows: Tensor | None) -> MeasuredMean:
        """Mean of some features for some cells, at positions (k,), int64; None for all."""
        mean = self.mean if features is None else self.mean[features]
        return MeasuredMean(mean, self.weight if rows is None else self.weight[rows], self.ceiling)

    def shrink(self, values: Tensor, block: slice) -> Tensor:
        """Decoded values of a block of features, (S, B, W), drawn towards the mean."""
        return torch.lerp(values, self.mean[block], self.weight)


@dataclass(frozen=True)
class DecodedDraws:
    """Latents of some cells, and values of sites by name, once for every batch the cells are put into.

    ``means`` has the mean towards which estimates of a site are drawn, by name; none where they are not.
    """

    latents: Latents
    sites: Sequence[dict[str, Tensor]]
    means: dict[str, MeasuredMean]


def mean_buffers(program: MultiVIProgram, modality: Modality) -> tuple[Tensor, Tensor]:
    """Buffers of a program: mean of a modality's measured cells, (F,), and its weight in what is imputed, ()."""
    return getattr(program, f"{modality.key}_mean"), getattr(program, f"{modality.key}_mean_weight")


def decode(program: MultiVIProgram, cells: Cells, average: Average, sites: Sequence[str]) -> DecodedDraws:
    """Decode sites of some cells. Call it within :func:`~pyro_multivi.traces.evaluation_mode`."""
    at_mean = average.use_mean and average.n_samples == 1
    latents = mean_latents(program, cells) if at_mean else draw_latents(program, cells, average.n_samples, average.seed)
    interventions: list[dict[str, Tensor]] = [{}]
    if average.batches is not None or average.covariates:
        # Of the model alone: the latents are those under the observed design.
        design = cells.design.clone()
        for column, value in average.covariates:
            design[:, column] = value
        batches = (None,) if average.batches is None else average.batches
        interventions = [{"s": _in_batch(design, code, program.config.n_batch)} for code in batches]
    decoded = [replay(program, cells, latents, sites, forced) for forced in interventions]
    if average.with_weights and latents.noise is not None:
        decoded = [
            {site: with_weight_noise(program, site, values, latents.noise) for site, values in one.items()}
            for one in decoded
        ]
    if average.level is not None and latents.noise is not None:
        for forced, values in zip(interventions, decoded, strict=True):
            values.update(_realised(program, cells, latents, sites, forced.get("s", cells.design)))
    if at_mean:
        for site in sites:
            missing = _lacks(program, cells, site)
            if missing is not None and bool(missing.any()):
                points = mirrored_latents(program, cells, IMPUTATION_POINTS)
                for forced, values in zip(interventions, decoded, strict=True):
                    averaged = _averaged(program, cells, points, site, forced)
                    values[site] = _where(missing, averaged, values[site])
    return DecodedDraws(latents, decoded, {} if average.with_weights else _means(program, cells, sites))


def _means(program: MultiVIProgram, cells: Cells, sites: Sequence[str]) -> dict[str, MeasuredMean]:
    """Means towards which these cells' estimates of sites are drawn, by site."""
    found = {}
    for modality in modelled(program.config):
        mean, weight = mean_buffers(program, modality)
        missing = ~modality.measured_in(cells)
        if modality.decoded in sites and bool(weight > 0) and bool(missing.any()):
            ceiling = 1.0 if modality.in_model(program.config).binary else torch.inf
            found[modality.decoded] = MeasuredMean(mean, (weight * missing)[:, None], ceiling)
    return found


def _lacks(program: MultiVIProgram, cells: Cells, site: str) -> Tensor | None:
    """Whether the modality that a site is decoded of was not measured, (B,); None for any other site."""
    for modality in MODALITIES:
        if site == modality.decoded:
            return ~modality.measured_in(cells)
    for extra in program.modelled_extra:
        if site.startswith(extra.site("")):
            return ~cells.measured(extra.name)
    return None


def _realised(
    program: MultiVIProgram, cells: Cells, latents: Latents, sites: Sequence[str], design: Tensor
) -> dict[str, Tensor]:
    """Draws of the values of cells themselves, of those sites of extra modalities that have some."""
    found = {}
    nodes: dict[str, Any] = dict(latents.trace.nodes)
    for extra in program.modelled_extra:
        for site in (name for name in sites if name.startswith(extra.site(""))):
            z, part = program.transform(nodes["z"]["value"]), site.removeprefix(extra.site(""))
            values = extra.realised(part, cells, z, design, latents.noise)
            if values is not None:
                found[site] = values
    return found


def _averaged(program: MultiVIProgram, cells: Cells, points: Latents, site: str, forced: dict[str, Tensor]) -> Tensor:
    """Site averaged over points of the posterior, (1, B, F): a readout by its hidden layer, multiplied out once.

    The posterior from one modality alone is wide, and what is decoded from its mean is surer than the posterior is. The
    average of the hidden layer gains most of what the average of decoded draws gains in the likelihood of hidden
    counts, at a fraction of the cost. No noise enters: the points are the same for every cell.
    """
    total: Tensor | None = None
    at_once = max(1, ROWS // len(cells))
    for first in range(0, points.n_samples, at_once):
        part = replay(program, cells, points.some(slice(first, first + at_once)), (site,), forced)[site]
        summed = (part.hidden if isinstance(part, Readout) else part).sum(0, keepdim=True)
        total = summed if total is None else total + summed
    assert total is not None
    mean = total / points.n_samples
    return part.with_hidden(mean) if isinstance(part, Readout) else mean


def _where(chosen_b: Tensor, values: Tensor, otherwise: Tensor) -> Tensor:
    """Values of the chosen cells, (1, B, F), beside others; readouts of one layer stay one."""
    if isinstance(values, Readout) and isinstance(otherwise, Readout):
        return otherwise.with_hidden(torch.where(chosen_b[:, None], values.hidden, otherwise.hidden))
    return torch.where(chosen_b[:, None], values, otherwise)


def _in_batch(design: Tensor, code: int | None, n_batch: int) -> Tensor:
    if code is None:
        return design
    moved = design.clone()
    moved[:, :n_batch] = 0
    moved[:, code] = 1
    return moved
