"""Decoding of the latents of some cells, once for every batch they are put into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.posterior.engine.draws import Latents, draw_latents, mean_latents, replay
from pyro_multivi.program import MultiVIProgram

#: Draws x cells x features evaluated at a time: 16 MB in float32, small beside any cache of a file.
BLOCK = 2**22
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
        With a single draw, take the latents at their posterior means instead.
    batches
        Codes of the batches that every cell is put into in turn; None leaves each in its own.
    level
        Probability of the interval to return; None for the expectation alone.
    keep_draws
        Return all draws instead of their average.
    seed
        Seed of the draws.
    plain
        Decode the latents of the guide also where a modality was not measured, instead of those of
        :func:`~pyro_multivi.posterior.engine.draws.imputation_latents`, which predict single cells better.
    """

    n_samples: int = 1
    use_mean: bool = True
    batches: tuple[int, ...] | None = None
    level: float | None = None
    keep_draws: bool = False
    seed: int = 0
    plain: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the summaries: mean, sd, lower, upper; or draws."""
        if self.keep_draws:
            return ("draws",)
        return ("mean",) if self.level is None else ("mean", "sd", "lower", "upper")


@dataclass(frozen=True)
class DecodedDraws:
    """Latents of some cells, and values of sites by name, once for every batch the cells are put into."""

    latents: Latents
    sites: Sequence[dict[str, Tensor]]


def decode(program: MultiVIProgram, cells: Cells, average: Average, sites: Sequence[str]) -> DecodedDraws:
    """Decode sites of some cells. Call it within :func:`~pyro_multivi.traces.evaluation_mode`."""
    if average.use_mean and average.n_samples == 1:
        latents = mean_latents(program, cells)
    else:
        latents = draw_latents(program, cells, average.n_samples, average.seed)
    interventions: list[dict[str, Tensor]] = [{}]
    if average.batches is not None:
        # Of the model alone: the latents are those under the observed design.
        interventions = [{"s": _in_batch(cells.design, code, program.config.n_batch)} for code in average.batches]
    return DecodedDraws(
        latents, [replay(program, cells, latents, sites, forced, plain=average.plain) for forced in interventions]
    )


def _in_batch(design: Tensor, code: int, n_batch: int) -> Tensor:
    moved = design.clone()
    moved[:, :n_batch] = 0
    moved[:, code] = 1
    return moved
