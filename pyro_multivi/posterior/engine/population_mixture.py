r"""Mixture of a cell's own posterior with the aggregate posterior of its batch, to impute what was not measured.

A posterior is as narrow as the measured counts make it, but for *other* counts it is too narrow: the encoder is more
certain of a cell that it was trained on than of a new one, and features that distinguish two accessibility profiles
need not distinguish two expression profiles. So where expression of a cell without RNA, or accessibility of a
cell without ATAC, is decoded,

.. math:: q_t(z_n) = t\, q(z_n) + (1-t)\, \frac{1}{|P_n|} \sum_{m \in P_n} q(z_m)

replaces q. The population :math:`P_n` holds training cells of the same batch in which that modality was measured, or
those of all batches if fewer than ten of the batch are stored. With t = 1 this is the guide's posterior; the smaller
t, the nearer an estimate is to the mean of the population. Comparisons of groups do not use the mixture: the errors
of single cells average out in the mean of many, a bias towards the population would not. Cells in which nothing was
measured keep their prior.

The weight t is a buffer of the program (``rna_mixture_weight``, ``atac_mixture_weight``), and so is one draw from the
posterior of each cell of the populations (``rna_population``, ``atac_population``: 512 in all, or 32 of each batch if
that is more). Both are set by :mod:`pyro_multivi.posterior.calibration.fit_mixture`. It estimates t from cells of both
modalities, so t may be less suited to a batch that lacks a modality altogether.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import Modality
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.program import MultiVIProgram

# A batch with fewer stored cells has no population of its own.
_FEWEST = 10
# Name of the stream of random numbers. Another one would change the draws of every seed.
_STREAM = "trust"


def weight_buffer(program: MultiVIProgram, modality: Modality) -> Tensor:
    """Buffer with the weight t of a cell's own posterior, a scalar in [0, 1]."""
    buffer: Tensor = getattr(program, f"{modality.key}_mixture_weight")
    return buffer


def population_buffer(program: MultiVIProgram, modality: Modality) -> Tensor:
    """Buffer with the batch code and the latent state of each stored cell, (P, 1 + K); unused rows hold -1."""
    buffer: Tensor = getattr(program, f"{modality.key}_population")
    return buffer


class AggregatePosterior(NamedTuple):
    """Latent states of training cells in which a modality was measured.

    Attributes
    ----------
    z
        Draws from their posteriors, (P, K), batch after batch.
    start, size
        First row and number of rows of the population of each batch, (n_batch,), int64.
    """

    z: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, program: MultiVIProgram, modality: Modality) -> AggregatePosterior | None:
        """Read the populations that are stored in a program; None if it has none."""
        stored = population_buffer(program, modality)
        code = stored[:, 0].long()
        size = torch.bincount(code[code >= 0], minlength=program.config.n_batch)
        n = int(size.sum())
        if n == 0:
            return None
        start = size.cumsum(0) - size
        enough = size >= _FEWEST
        return cls(stored[:n, 1:], torch.where(enough, start, 0), torch.where(enough, size, n))

    def draw(self, place: Tensor, batch: Tensor) -> Tensor:
        """State of one cell from the population of each batch, (..., B, K).

        Parameters
        ----------
        place
            Relative position of that cell in the population, in [0, 1), (..., B).
        batch
            Code of the batch, (B,).
        """
        row = (place * self.size[batch]).long()
        return self.z[self.start[batch] + row.clamp(max=self.size[batch] - 1)]

    def mean(self, batch: Tensor) -> Tensor:
        """Mean state of the population of each batch, (B, K)."""
        codes, place = batch.unique(return_inverse=True)
        ends = zip(self.start[codes].tolist(), self.size[codes].tolist(), strict=True)
        return torch.stack([self.z[start : start + size].mean(0) for start, size in ends])[place]


def imputation_state(
    program: MultiVIProgram, cells: Cells, modality: Modality, nodes: dict[str, Any], noise: CellNoise | None
) -> Tensor | None:
    """z from the mixture, to decode a modality of cells that lack it, (S, B, K); None if it is the posterior itself.

    Arguments are those of :func:`~pyro_multivi.posterior.engine.depth_regression.imputation_depth`.
    """
    weight = float(weight_buffer(program, modality))
    population = AggregatePosterior.of(program, modality) if weight != 1 else None
    if population is None:
        return None
    batch = cells.design[:, : program.config.n_batch].argmax(1)
    return draw_from_mixture(nodes["z"]["value"], population, weight, batch, noise)


def draw_from_mixture(
    z: Tensor, population: AggregatePosterior, weight: float, batch: Tensor, noise: CellNoise | None
) -> Tensor:
    """Draws of a posterior, some of them replaced by states of the population.

    Parameters
    ----------
    z
        Draws, (S, B, K), or the mean, (1, B, K).
    population
        Populations of the batches.
    weight
        t, in [0, 1].
    batch
        Code of each cell's batch, (B,).
    noise
        Noise of the draws; None if z is the mean, and then the mean of the mixture is returned.

    Examples
    --------
    >>> two = AggregatePosterior(torch.tensor([[0.0], [4.0]]), start=torch.tensor([0]), size=torch.tensor([2]))
    >>> z, batch = torch.full((1, 3, 1), 10.0), torch.zeros(3, dtype=torch.long)
    >>> draw_from_mixture(z, two, 0.75, batch, None).squeeze()
    tensor([8., 8., 8.])
    >>> drawn = draw_from_mixture(z.expand(8, 3, 1), two, 0.75, batch, CellNoise(torch.arange(3), seed=0))
    >>> (drawn == 10).sum(0).squeeze()
    tensor([6, 6, 6])
    """
    if noise is None:
        return weight * z + (1 - weight) * population.mean(batch)
    chance, place = noise.evenly(_STREAM, len(z)).unbind(-1)
    return torch.where((chance < weight)[..., None], z, population.draw(place, batch))
