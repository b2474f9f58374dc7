r"""Decoding of the latents of some cells, once for every batch they are put into.

What is decoded from a state that was inferred from one modality says more about the other than it knows: the
encoders tell cells apart by what the modalities do not share. So where a modality was not measured in a cell, its
expression and its accessibility are

.. math:: (1 - w)\ E_q[f(z, s)] + w\ \bar f(s)

with :math:`\bar f(s)` the mean of the cells in which the modality was measured, under the cell's design s, and a
weight w for each modality that is learned on held-out cells of both
(:mod:`pyro_multivi.posterior.calibration.fit_shrinkage`). Both are buffers of the program: ``rna_mean_weight`` and
``atac_mean_weight``, 0 before that and without such cells, and ``rna_mean_bias`` and ``atac_mean_bias``: the profile is
what the decoder makes of z = 0 with these in place of the bias of its last layer, so it moves with the batch as the
decoder does. Set the weights to zero to have the decoder's values alone. Draws of the latents, counts that are drawn,
densities and the ELBO are not affected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.engine.draws import (
    ROWS,
    Latents,
    draw_latents,
    feature_blocks,
    mean_latents,
    mirrored_latents,
    replay,
)
from pyro_multivi.posterior.engine.weight_posterior import with_weight_noise
from pyro_multivi.program import MultiVIProgram

#: Draws x cells x features evaluated at a time: 16 MB in float32, small beside any cache of a file.
BLOCK = 2**22
#: Points of the posterior over which the hidden layer of a decoder is averaged where its modality was not measured.
IMPUTATION_POINTS = 24
# Narrower blocks would cost more in calls than in arithmetic.
_LEAST_WIDTH = 128


def block_width(n_rows: int) -> int:
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
class MeanProfiles:
    """Mean profile of a modality, towards which values of some cells are drawn; not multiplied out yet.

    Attributes
    ----------
    profiles
        One for each design among the cells, (U, F).
    code_b
        Design of each cell, (B,), int64.
    weight_b
        Weight of the profile in each cell, (B,); 0 leaves what was decoded.
    """

    profiles: Readout
    code_b: Tensor
    weight_b: Tensor

    def shrink(
        self, blocks: Iterator[tuple[slice, Tensor]], features: Tensor | None, width: int, rows: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of decoded values, (S, B, W), drawn towards the profiles.

        Parameters
        ----------
        blocks, features, width
            :func:`~pyro_multivi.posterior.engine.draws.feature_blocks` of these features and this width.
        rows
            Positions of the cells of the blocks among those of the profiles, (k,), int64; None for all.
        """
        code, weight = (values if rows is None else values[rows] for values in (self.code_b, self.weight_b))
        means = feature_blocks(self.profiles, features, width)
        for (block, values_sbw), (_, mean_uw) in zip(blocks, means, strict=True):
            yield block, torch.lerp(values_sbw, mean_uw[code], weight[:, None])


@dataclass(frozen=True)
class DecodedDraws:
    """Latents of some cells, and values of sites by name, once for every batch the cells are put into.

    ``means`` are the profiles towards which estimates of a site are drawn, by name; none of a site that is not.
    """

    latents: Latents
    sites: Sequence[dict[str, Tensor]]
    means: Sequence[dict[str, MeanProfiles]]


def decode(program: MultiVIProgram, cells: Cells, average: Average, sites: Sequence[str]) -> DecodedDraws:
    """Decode sites of some cells, and find the profiles that estimates of what was not measured are drawn towards.

    Call it within :func:`~pyro_multivi.traces.evaluation_mode`.
    """
    at_mean = average.use_mean and average.n_samples == 1
    latents = mean_latents(program, cells) if at_mean else draw_latents(program, cells, average.n_samples, average.seed)
    interventions: list[dict[str, Tensor]] = [{}]
    if average.batches is not None:
        # Of the model alone: the latents are those under the observed design.
        interventions = [{"s": _in_batch(cells.design, code, program.config.n_batch)} for code in average.batches]
    decoded = [replay(program, cells, latents, sites, forced) for forced in interventions]
    if average.with_weights and latents.noise is not None:
        decoded = [
            {site: with_weight_noise(program, site, values, latents.noise) for site, values in one.items()}
            for one in decoded
        ]
    if at_mean:
        for site in sites:
            missing = _lacks(program, cells, site)
            if missing is not None and bool(missing.any()):
                points = mirrored_latents(program, cells, IMPUTATION_POINTS)
                for forced, values in zip(interventions, decoded, strict=True):
                    averaged = _averaged(program, cells, points, site, forced)
                    values[site] = _where(missing, averaged, values[site])
    means = [
        {
            site: found
            for site, values in one.items()
            if (found := _means(program, cells, latents, site, values, forced))
        }
        for forced, one in zip(interventions, decoded, strict=True)
    ]
    return DecodedDraws(latents, decoded, means)


def mean_buffers(program: MultiVIProgram, modality: Modality) -> tuple[Tensor, Tensor]:
    """Buffers of the program: weight of a modality's mean profile, (), and the bias that makes it of z = 0, (F,)."""
    return getattr(program, f"{modality.key}_mean_weight"), getattr(program, f"{modality.key}_mean_bias")


def mean_profiles(
    program: MultiVIProgram, cells: Cells, latents: Latents, modality: Modality, forced: dict[str, Tensor], bias: Tensor
) -> tuple[Readout, Tensor] | None:
    """Mean profile of a modality under each design among some cells, (U, F), and the design of each cell, (B,).

    None where the decoder returns no readout. Call it within :func:`~pyro_multivi.traces.evaluation_mode`.

    Parameters
    ----------
    forced
        Values of sites of the model that are forced, such as the design ``"s"``.
    bias
        Takes the place of that of the decoder's last layer, (F,).
    """
    one = latents.some(slice(0, 1))
    nodes: dict[str, Any] = dict(one.trace.nodes)
    decoded = replay(program, cells, one.at("z", torch.zeros_like(nodes["z"]["value"])), (modality.decoded,), forced)
    readout = decoded[modality.decoded]
    if not isinstance(readout, Readout) or len(bias) != len(readout.bias):
        return None
    designs, code_b = forced.get("s", cells.design).unique(dim=0, return_inverse=True)
    first_u = torch.empty(len(designs), dtype=torch.long, device=code_b.device)
    first_u[code_b] = torch.arange(len(code_b), device=code_b.device)
    hidden = readout.hidden[0, first_u]
    return Readout(hidden, readout.weight, bias, readout.link, readout.gemm_dtype), code_b


def _means(
    program: MultiVIProgram, cells: Cells, latents: Latents, site: str, values: Tensor, forced: dict[str, Tensor]
) -> MeanProfiles | None:
    """Profiles for the cells that lack a site's modality; None where there are none."""
    modality = next((one for one in MODALITIES if one.decoded == site), None)
    if modality is None or not isinstance(values, Readout):
        return None
    weight, bias = mean_buffers(program, modality)
    missing = ~modality.measured_in(cells)
    if not bool(weight > 0) or not bool(missing.any()):
        return None
    found = mean_profiles(program, cells, latents, modality, forced, bias)
    return None if found is None else MeanProfiles(*found, weight * missing)


def _lacks(program: MultiVIProgram, cells: Cells, site: str) -> Tensor | None:
    """Whether the modality that a site is decoded of was not measured, (B,); None for any other site."""
    for modality in MODALITIES:
        if site == modality.decoded:
            missing: Tensor = ~modality.measured_in(cells)
            return missing
    for extra in program.modelled_extra:
        if site.startswith(extra.site("")):
            return ~cells.measured(extra.name)
    return None


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


def _in_batch(design: Tensor, code: int, n_batch: int) -> Tensor:
    moved = design.clone()
    moved[:, :n_batch] = 0
    moved[:, code] = 1
    return moved
