r"""How far what was measured of a cell is trusted where something is decoded that was not.

A posterior is as narrow as the measured counts make it. What they say of *other* counts is less: an encoder
that has read a cell again and again is surer of it than of a new one, and what tells two accessibility profiles
apart need not tell two expression profiles apart. So where expression of a cell without RNA, or accessibility of a
cell without ATAC, is decoded,

.. math:: q_t(z_n) = t\, q(z_n) + (1-t)\, \frac{1}{|P_n|} \sum_{m \in P_n} q(z_m)

stands for q, with :math:`P_n` the training cells of the same batch in which that modality was measured, or those
of all batches where fewer than ten are known: with probability t the cell is what its own counts say, else it is
a random one of those. With t = 1 all is as the guide has it; the smaller t, the nearer the estimate is to the mean
of the others. Comparisons of groups leave q as it is: in the mean of many cells the errors of each average out, a
pull towards the mean of all does not. Cells in which nothing was measured keep their prior.

t belongs to the program (``rna_mixture_weight``, ``atac_mixture_weight``), as does one draw from the posteriors of
some of the others (``rna_population``, ``atac_population``: 512 in all, or 32 of each batch if that is more). Both
are learned by
:mod:`pyro_multivi.posterior.calibration.fit_mixture`, t from cells of both modalities: it speaks of these, and less
of a batch that lacks a modality altogether.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributions as torchdist
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.program import MultiVIProgram

#: The numbers t among the program's buffers, and the states of others, by site of what is decoded.
MIXTURE_WEIGHT = {"x": "rna_mixture_weight", "y": "atac_mixture_weight"}
POPULATION = {"x": "rna_population", "y": "atac_population"}
# A batch of which fewer cells are known is no population: all batches stand for it.
_FEWEST = 10


class AggregatePosterior(NamedTuple):
    """States of cells in which a modality was measured.

    Attributes
    ----------
    z
        Draws from their posteriors, (P, K), batch after batch.
    start, size
        Where those that stand for each batch begin, and how many they are, (n_batch,), int64.
    """

    z: Tensor
    start: Tensor
    size: Tensor

    @classmethod
    def of(cls, program: MultiVIProgram, site: str) -> AggregatePosterior | None:
        """What a program knows of others; None if it knows none."""
        stored: Tensor = getattr(program, POPULATION[site])
        code = stored[:, 0].long()
        size = torch.bincount(code[code >= 0], minlength=program.config.n_batch)
        n = int(size.sum())
        if n == 0:
            return None
        start = size.cumsum(0) - size
        enough = size >= _FEWEST
        return cls(stored[:n, 1:], torch.where(enough, start, 0), torch.where(enough, size, n))

    def draw(self, place: Tensor, batch: Tensor) -> Tensor:
        """The state of one of a batch's cells, (..., B, K).

        Parameters
        ----------
        place
            Which one, in [0, 1), (..., B).
        batch
            Code of the batch, (B,).
        """
        row = (place * self.size[batch]).long()
        return self.z[self.start[batch] + row.clamp(max=self.size[batch] - 1)]

    def mean(self, batch: Tensor) -> Tensor:
        """Mean state of a batch's cells, (B, K)."""
        codes, place = batch.unique(return_inverse=True)
        ends = zip(self.start[codes].tolist(), self.size[codes].tolist(), strict=True)
        return torch.stack([self.z[start : start + size].mean(0) for start, size in ends])[place]


def mixed(z: Tensor, population: AggregatePosterior, trust: float, batch: Tensor, noise: CellNoise | None) -> Tensor:
    """Draws of a posterior, some of them exchanged for states of other cells.

    Parameters
    ----------
    z
        Draws, (S, B, K), or the mean, (1, B, K).
    population
        The other cells.
    trust
        t, in [0, 1].
    batch
        Code of each cell's batch, (B,).
    noise
        What z was drawn with; None where it is the mean, and then so is the result.

    Examples
    --------
    >>> two = AggregatePosterior(torch.tensor([[0.0], [4.0]]), start=torch.tensor([0]), size=torch.tensor([2]))
    >>> z, batch = torch.full((1, 3, 1), 10.0), torch.zeros(3, dtype=torch.long)
    >>> mixed(z, two, 0.75, batch, None).squeeze()
    tensor([8., 8., 8.])
    >>> drawn = mixed(z.expand(8, 3, 1), two, 0.75, batch, CellNoise(torch.arange(3), seed=0))
    >>> (drawn == 10).sum(0).squeeze()
    tensor([6, 6, 6])
    """
    if noise is None:
        return trust * z + (1 - trust) * population.mean(batch)
    chance, place = noise.evenly("trust", len(z)).unbind(-1)
    return torch.where((chance < trust)[..., None], z, population.draw(place, batch))


def normal_in(fn: Any) -> torchdist.Normal | None:
    """The Normal over single numbers that a distribution is made of; None if it is made of something else."""
    while isinstance(fn, (torchdist.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, torchdist.Normal) else None
