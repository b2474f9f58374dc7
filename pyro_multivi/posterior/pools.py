"""Posterior draws of the cells of a group: decoded up to the last layer once, evaluated block by block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.table import CellTable
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.draws import cells_at_a_time, evaluating
from pyro_multivi.posterior.evidence import LIKELIHOOD_ROWS, log_weights, scored_traces
from pyro_multivi.posterior.normalization import Average, decode
from pyro_multivi.program import MultiVIProgram

WEIGHTS = ("uniform", "importance")
# Draws of a cell out of which importance weights choose.
_CANDIDATES = 64


@dataclass(frozen=True)
class Source:
    """Where draws come from and how many are wanted.

    Attributes
    ----------
    program, table
        The model and the data.
    site
        ``"rho"`` or ``"p"``.
    n_samples
        Draws n of a group.
    weights
        ``"uniform"``: draws of q(z | x, y). ``"importance"``: of each cell's 64 draws those are
        taken, with replacement, that importance weights choose, so that they follow the posterior
        of the model rather than the encoder's guess at it.
    batch_size
        Most cells read at a time.
    device
        Where the program is.
    seed
        Of the choice of cells and of the draws.
    """

    program: MultiVIProgram
    table: CellTable
    site: str
    n_samples: int
    weights: str
    batch_size: int
    device: torch.device
    seed: int

    def strata(self, n_batches: int) -> list[int]:
        """How many of the draws are decoded in each batch: as evenly as can be."""
        return [len(part) for part in np.array_split(np.arange(self.n_samples), n_batches)]

    def draw(self, index: Tensor, batches: tuple[int, ...] | None, stream: int) -> Tensor:
        """Draw cells of a group, one posterior draw of each, and decode them.

        Parameters
        ----------
        index
            Positions of the cells, int64.
        batches
            Codes of the batches that the draws are decoded in, those of one batch after those of
            another; None leaves each cell in its own.
        stream
            Tells groups apart that are compared, so that their choices of cells are independent.

        Returns
        -------
        Tensor
            (n, F); lazy, unless a model of one's own decodes to dense values.
        """
        rng = np.random.default_rng([self.seed, stream])
        chosen, number = _evenly(rng, len(index), self.n_samples)
        stratum = np.repeat(np.arange(len(batches or (0,))), self.strata(len(batches or (0,))))
        n_draws = int(number.max()) + 1
        by_weight = self.weights == "importance"
        if by_weight:
            n_draws = _CANDIDATES
        at_once = cells_at_a_time(self.batch_size, n_draws)
        if by_weight:
            at_once = min(at_once, LIKELIHOOD_ROWS // _CANDIDATES)
        average = Average(n_samples=n_draws, use_mean=False, batches=batches, seed=self.seed)
        cells_drawn = np.unique(chosen)
        gathered: Tensor | None = None
        for start in range(0, len(cells_drawn), at_once):
            part = cells_drawn[start : start + at_once]
            rows = np.flatnonzero((chosen >= part[0]) & (chosen <= part[-1]))
            place = np.searchsorted(part, chosen[rows])
            cells = self.table.batch(index[torch.from_numpy(part)]).to(self.device)
            with evaluating(self.program):
                decoded = decode(self.program, cells, average, (self.site,))
                draw = number[rows]
                if by_weight:
                    scored = log_weights(*scored_traces(self.program, cells, decoded.latents))
                    draw = _by_weight(rng, scored.cpu().numpy(), place)
                for code, sites in enumerate(decoded.sites):
                    mine = stratum[rows] == code
                    values = sites[self.site]
                    inner = values.hidden if isinstance(values, Readout) else values
                    taken = inner[torch.from_numpy(draw[mine]), torch.from_numpy(place[mine])]
                    if gathered is None:
                        gathered = taken.new_empty(self.n_samples, taken.shape[-1])
                    gathered[torch.from_numpy(rows[mine])] = taken
        assert gathered is not None
        if isinstance(values, Readout):
            return Readout(gathered, values.weight, values.bias, values.link, values.gemm_dtype)
        return gathered


def _evenly(rng: np.random.Generator, n_cells: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which cell each draw is of, in random order, and the how-manieth of that cell it is.

    Each cell is drawn as often as any other, up to one: the draws follow the group no worse than
    cells drawn independently with replacement, and their means scatter less.
    """
    whole, rest = divmod(n, n_cells)
    chosen = np.concatenate([np.tile(np.arange(n_cells), whole), rng.choice(n_cells, rest, replace=False)])
    chosen = rng.permutation(chosen)
    order = np.argsort(chosen, kind="stable")
    ordered = chosen[order]
    first = np.searchsorted(ordered, ordered)
    number = np.empty(n, dtype=np.int64)
    number[order] = np.arange(n) - first
    return chosen, number


def _by_weight(rng: np.random.Generator, log_w: NDArray[np.float64], place: NDArray[np.int64]) -> NDArray[np.int64]:
    """A candidate for each wanted draw, chosen with the importance weights of its cell's, (S, B)."""
    share = np.exp(log_w - log_w.max(0))
    upto = (share / share.sum(0)).cumsum(0)
    unit = rng.random(len(place))
    number = (upto[:, place] < unit).sum(0)
    return np.minimum(number, len(log_w) - 1).astype(np.int64)
