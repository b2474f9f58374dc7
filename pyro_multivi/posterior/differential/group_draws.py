"""Posterior draws of sets of cells: decoded up to the last layer once, evaluated block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.table import CellTable
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.engine.decode import BLOCK, Average, DecodedDraws, decode
from pyro_multivi.posterior.engine.draws import cells_at_a_time, feature_blocks, model_trace
from pyro_multivi.posterior.engine.likelihood import LIKELIHOOD_ROWS, log_weights, scored_traces
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

Array = NDArray[np.float64]

WEIGHTS = ("uniform", "importance")
# Draws of a cell out of which importance weights choose.
_CANDIDATES = 64
# Narrower blocks would cost more in calls than in arithmetic.
_LEAST_WIDTH = 128


class Key(NamedTuple):
    """What is drawn: a part, and the batches that its cells are decoded in (None: each in its own)."""

    part: int
    batches: tuple[int, ...] | None


@dataclass(frozen=True)
class GroupDraws:
    """Draws of a part.

    Attributes
    ----------
    values
        (n, F); lazy, unless a model of one's own decodes to dense values.
    gate_logits
        Logits of the probability that a count is dropped, (n, F), if the observation model has one.
    cell_factors
        d, (n,), or NaN without any.
    measured
        Whether each draw is of a cell in which the modality was measured, (n,).
    """

    values: Tensor
    gate_logits: Tensor | None
    cell_factors: Array
    measured: NDArray[np.bool_]

    @property
    def cell_factor(self) -> float:
        """Mean of d over the draws of measured cells, or of all if there is none."""
        return float(self.cell_factors[self.measured if self.measured.any() else slice(None)].mean())

    def moments(self, largest: bool) -> Moments:
        """Statistics of every feature, a block at a time; with the largest draw if asked for."""
        n, n_features = self.values.shape
        found = Moments(*(np.empty(n_features) for _ in range(4 if largest else 3)))
        weight = np.where(self.measured, np.where(np.isnan(self.cell_factors), 1.0, self.cell_factors), 0.0)
        weight_n = torch.as_tensor(
            weight / max(1, self.measured.sum()), dtype=self.values.dtype, device=self.values.device
        )
        gates = repeat(None) if self.gate_logits is None else feature_blocks(self.gate_logits, None, _width(n))
        for (block, values), gate in zip(feature_blocks(self.values, None, _width(n)), gates, strict=False):
            seen = values if gate is None else values * torch.sigmoid(-gate[1])
            found.expected[block] = (weight_n @ seen).cpu().numpy()
            # By hand: torch's own variance along this axis takes several times longer on a CPU.
            mean = values.mean(0)
            found.mean[block] = mean.cpu().numpy()
            if largest:
                found.largest[block] = values.amax(0).cpu().numpy()
            found.var[block] = (values - mean).square_().sum(0).cpu().numpy() / (n - 1)
        return found


class Moments(NamedTuple):
    """Statistics of the draws of a part or group, (F,) each.

    Attributes
    ----------
    mean, var
        Of rho or p.
    expected
        Mean over measured cells of what their counts are expected to be proportional to: rho times the
        probability that no count is dropped, or p d.
    largest
        Empty unless asked for.
    """

    mean: Array
    var: Array
    expected: Array
    largest: Array = np.empty(0)

    @classmethod
    def of_union(cls, moments: list[Moments], sizes: list[int]) -> Moments:
        """Of a random cell of several parts together, from theirs and their numbers of cells."""
        if len(moments) == 1:
            return moments[0]
        share = np.array(sizes) / sum(sizes)
        mean: Array = np.sum([w * one.mean for w, one in zip(share, moments, strict=True)], axis=0)
        var = np.sum([w * (one.var + (one.mean - mean) ** 2) for w, one in zip(share, moments, strict=True)], axis=0)
        expected = np.sum([w * one.expected for w, one in zip(share, moments, strict=True)], axis=0)
        return cls(mean, var, expected, np.maximum.reduce([one.largest for one in moments]))


@dataclass(frozen=True)
class DrawSource:
    """Where draws come from and how many are wanted.

    Attributes
    ----------
    program, table
        The model and the data.
    site
        ``"rho"`` or ``"p"``.
    n_samples
        Draws n of a part.
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

    def strata(self, batches: tuple[int, ...] | None) -> list[slice]:
        """Which of the draws are decoded in each batch: as evenly as can be."""
        parts = np.array_split(np.arange(self.n_samples), len(batches or (0,)))
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]

    def draw(self, index: Tensor, batches: tuple[int, ...] | None) -> GroupDraws:
        """Draw cells of a part, one posterior draw of each, and decode them.

        Parameters
        ----------
        index
            Positions of the cells, int64. The draws depend on them and the seed alone.
        batches
            Codes of the batches that the draws are decoded in, those of one batch after those of
            another; None leaves each cell in its own.
        """
        # Parts share no cell: their first cells tell them apart.
        rng = np.random.default_rng([self.seed, int(index[0])])
        chosen, number = _evenly(rng, len(index), self.n_samples)
        stratum = np.empty(self.n_samples, dtype=np.int64)
        for code, rows_of in enumerate(self.strata(batches)):
            stratum[rows_of] = code
        n_draws = int(number.max()) + 1
        by_weight = self.weights == "importance"
        if by_weight:
            n_draws = _CANDIDATES
        at_once = cells_at_a_time(self.batch_size, n_draws)
        if by_weight:
            at_once = min(at_once, LIKELIHOOD_ROWS // _CANDIDATES)
        # In the mean of a group what is too sure of each cell averages out; what is drawn to the mean of all would not.
        average = Average(n_samples=n_draws, use_mean=False, batches=batches, seed=self.seed, plain=True)
        cells_drawn = np.unique(chosen)
        gathered, gates = _Rows(self.n_samples), _Rows(self.n_samples)
        factor_n, measured_n = np.full(self.n_samples, np.nan), np.zeros(self.n_samples, dtype=bool)
        for start in range(0, len(cells_drawn), at_once):
            part = cells_drawn[start : start + at_once]
            rows = np.flatnonzero((chosen >= part[0]) & (chosen <= part[-1]))
            place = np.searchsorted(part, chosen[rows])
            cells = self.table.batch(index[torch.from_numpy(part)]).to(self.device)
            with evaluation_mode(self.program):
                decoded = decode(self.program, cells, average, (self.site,))
                draw = number[rows]
                if by_weight:
                    scored = log_weights(*scored_traces(self.program, cells, decoded.latents))
                    draw = _by_weight(rng, scored.cpu().numpy(), place)
                measured = cells.has_rna if self.site == "rho" else cells.has_atac
                measured_n[rows] = measured.cpu().numpy()[place]
                if self.site == "p":
                    factor_n[rows] = _cell_factors(decoded)[draw, place]
                elif batches is None:
                    gates.put(rows, _gate_logits(self.program, cells, decoded), draw, place)
                for code, sites in enumerate(decoded.sites):
                    mine = stratum[rows] == code
                    gathered.put(rows[mine], sites[self.site], draw[mine], place[mine])
        values = gathered.tensor()
        assert values is not None
        return GroupDraws(values, gates.tensor(), factor_n, measured_n)


class _Rows:
    """Draws of cells of a wide site, gathered into one tensor of n rows; of a readout only the hidden layer."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._rows: Tensor | None = None
        self._like: Tensor | None = None

    def put(self, rows: NDArray[np.int64], values: Tensor | None, draw: Any, place: Any) -> None:
        """Take draws of cells of (S, B, F) to their rows; None if the site is not there."""
        if values is None:
            return
        inner = values.hidden if isinstance(values, Readout) else values
        taken = inner[torch.from_numpy(draw), torch.from_numpy(place)]
        if self._rows is None:
            self._rows, self._like = taken.new_empty(self.n, taken.shape[-1]), values
        self._rows[torch.from_numpy(rows)] = taken

    def tensor(self) -> Tensor | None:
        """All rows, (n, F)."""
        like = self._like
        if self._rows is None or not isinstance(like, Readout):
            return self._rows
        return Readout(self._rows, like.weight, like.bias, like.link, like.gemm_dtype)


def blocks_of(pools: Mapping[Key, GroupDraws], features: Tensor | None) -> Iterator[tuple[slice, dict[Key, Tensor]]]:
    """Each block of features (default: of all), and the values of all pools in it, (n, f) each."""
    width = _width(sum(len(pool.values) for pool in pools.values()))
    streams = [feature_blocks(pool.values, features, width) for pool in pools.values()]
    for parts in zip(*streams, strict=True):
        yield parts[0][0], {key: values for key, (_, values) in zip(pools, parts, strict=True)}


def _width(n_rows: int) -> int:
    """Features of a block."""
    return max(_LEAST_WIDTH, BLOCK // n_rows)


def _cell_factors(decoded: DecodedDraws) -> Array:
    """Draws of d of a minibatch, (S, B); NaN if the guide has none."""
    nodes: dict[str, Any] = dict(decoded.latents.trace.nodes)
    n_cells = next(iter(decoded.sites[0].values())).shape[-2]
    shape = (decoded.latents.n_samples, n_cells)
    if "d" not in nodes:
        return np.full(shape, np.nan)
    found: Array = nodes["d"]["value"].expand(shape).double().cpu().numpy()
    return found


def _gate_logits(program: MultiVIProgram, cells: Cells, decoded: DecodedDraws) -> Tensor | None:
    """Logits of dropping a count, (S, B, G); None if the observation model has no such gate."""
    nodes: dict[str, Any] = dict(model_trace(program.model, cells, decoded.latents).nodes)
    fn = nodes["x"]["fn"]
    gate: Tensor | None = getattr(getattr(fn, "base_dist", fn), "gate_logits", None)
    if gate is None:
        return None
    rho = decoded.sites[0]["rho"]
    return gate.detach().expand(rho.shape)


def _evenly(rng: np.random.Generator, n_cells: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which cell each draw is of, and the how-manieth of that cell it is.

    All cells in random order, then all in another, and so on: of any so many draws in a row, each cell
    has as many as any other, up to two. They follow the part no worse than cells drawn independently
    with replacement, and their means scatter less.
    """
    rounds = [rng.permutation(n_cells) for _ in range(-(-n // n_cells))]
    return np.concatenate(rounds)[:n], np.arange(n) // n_cells


def _by_weight(rng: np.random.Generator, log_w: Array, place: NDArray[np.int64]) -> NDArray[np.int64]:
    """A candidate for each wanted draw, chosen with the importance weights of its cell's, (S, B)."""
    share = np.exp(log_w - log_w.max(0))
    upto = (share / share.sum(0)).cumsum(0)
    unit = rng.random(len(place))
    number = (upto[:, place] < unit).sum(0)
    return np.minimum(number, len(log_w) - 1).astype(np.int64)
