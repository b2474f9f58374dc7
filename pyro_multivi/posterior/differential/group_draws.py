"""Posterior draws of groups of cells: decoded up to the last layer once, evaluated block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import AnyModality, Cells
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.data.table import CellTable
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.differential.request import DifferentialRequest
from pyro_multivi.posterior.engine.decode import Average, DecodedDraws, decode, features_at_a_time
from pyro_multivi.posterior.engine.draws import cells_at_a_time, feature_blocks, model_trace
from pyro_multivi.posterior.engine.likelihood import LIKELIHOOD_ROWS, log_weights, scored_traces
from pyro_multivi.processes.group import current
from pyro_multivi.processes.shares import Arrays, shared_map
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

Array = NDArray[np.float64]

# Draws of a cell of which some are chosen by importance weights.
_CANDIDATES = 64


class DrawKey(NamedTuple):
    """Name of a set of draws: a part of the cells, and the batches they are decoded in (None: each in its own).

    With ``measured_only`` they are of the cells of the part in which the modality was measured. ``covariates`` are
    columns of the design, and the value that all of them are decoded with there.
    """

    part: int
    batches: tuple[int, ...] | None
    measured_only: bool = False
    covariates: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class GroupDraws:
    """n posterior draws of a set of cells.

    Attributes
    ----------
    values
        Draws of rho or p, (n, F); lazy, unless a custom program decodes to dense values.
    gate_logits
        Logits of the probability that a count is dropped, (n, F), if the observation model has one.
    cell_factors
        Depth of the cell of each draw, (n,): draws of d, or of counts its total; NaN without any.
    measured
        Whether each draw is of a cell in which the modality was measured, (n,).
    """

    values: Tensor
    gate_logits: Tensor | None
    cell_factors: Array
    measured: NDArray[np.bool_]

    @property
    def cell_factor(self) -> float:
        """Mean depth over the draws of measured cells, or of all if there is none."""
        return float(self.cell_factors[self.measured if self.measured.any() else slice(None)].mean())

    def arrays(self) -> Arrays:
        """What :meth:`with_arrays` makes draws from: those of pairs of cells, which need no gate."""
        values = self.values.hidden if isinstance(self.values, Readout) else self.values
        return {"values": values.cpu().numpy(), "cell_factors": self.cell_factors, "measured": self.measured}

    def with_arrays(self, arrays: Arrays) -> GroupDraws:
        """Draws of the same kind, of other cells."""
        values = torch.from_numpy(arrays["values"]).to(self.values.device)
        if isinstance(self.values, Readout):
            values = self.values.with_hidden(values)
        return GroupDraws(values, None, arrays["cell_factors"], arrays["measured"])

    def statistics(self, largest: bool) -> dict[str, Array]:
        """Moments by name, and the mean depth as ``"factor"``."""
        return {**self.moments(largest)._asdict(), "factor": np.array(self.cell_factor)}

    def moments(self, largest: bool) -> Moments:
        """Statistics of all features, a block at a time; ``largest`` tells whether to find the largest draw too."""
        n, n_features = self.values.shape
        found = Moments(*(np.empty(n_features) for _ in range(4 if largest else 3)))
        weight = np.where(self.measured, np.where(np.isnan(self.cell_factors), 1.0, self.cell_factors), 0.0)
        weight_n = torch.as_tensor(
            weight / max(1, self.measured.sum()), dtype=self.values.dtype, device=self.values.device
        )
        width = features_at_a_time(n)
        gates = repeat(None) if self.gate_logits is None else feature_blocks(self.gate_logits, None, width)
        for (block, values), gate in zip(feature_blocks(self.values, None, width), gates, strict=False):
            expected = values if gate is None else values * torch.sigmoid(-gate[1])
            found.expected[block] = (weight_n @ expected).cpu().numpy()
            # By hand: torch's own variance along this axis takes several times longer on a CPU.
            mean = values.mean(0)
            found.mean[block] = mean.cpu().numpy()
            if largest:
                found.largest[block] = values.amax(0).cpu().numpy()
            found.var[block] = (values - mean).square_().sum(0).cpu().numpy() / (n - 1)
        return found


class Moments(NamedTuple):
    """Statistics of the draws of a group, (F,) each.

    Attributes
    ----------
    mean, var
        Mean and variance of rho or p.
    expected
        Mean over measured cells of a number to which their expected counts are proportional: rho times the
        probability that no count is dropped, times the total of the cell, or p d.
    largest
        Largest draw; empty if not wanted.
    """

    mean: Array
    var: Array
    expected: Array
    largest: Array = np.empty(0)

    @classmethod
    def of_union(cls, moments: list[Moments], sizes: list[int]) -> Moments:
        """Statistics of a random cell of a union of parts, from theirs and their numbers of cells."""
        if len(moments) == 1:
            return moments[0]
        share = np.array(sizes) / sum(sizes)
        mean: Array = np.sum([w * one.mean for w, one in zip(share, moments, strict=True)], axis=0)
        var = np.sum([w * (one.var + (one.mean - mean) ** 2) for w, one in zip(share, moments, strict=True)], axis=0)
        expected = np.sum([w * one.expected for w, one in zip(share, moments, strict=True)], axis=0)
        return cls(mean, var, expected, np.maximum.reduce([one.largest for one in moments]))


@dataclass(frozen=True)
class DrawSource:
    """Source of the draws that a request needs."""

    program: MultiVIProgram
    table: CellTable
    request: DifferentialRequest
    device: torch.device

    def strata(self, batches: tuple[int, ...] | None) -> list[slice]:
        """Draws that are decoded in each batch, as evenly as can be."""
        parts = np.array_split(np.arange(self.request.n_draws), len(batches or (0,)))
        return [slice(int(part[0]), int(part[-1]) + 1) for part in parts]

    def draw_in_turn(
        self, cells: Mapping[DrawKey, Tensor], largest: bool, silent: bool
    ) -> tuple[dict[DrawKey, GroupDraws], dict[DrawKey, Array]]:
        """Draw sets of cells, of which each process draws every n-th, and all have the draws of all.

        Parameters
        ----------
        cells
            Positions of the cells of each set, int64.
        largest
            Whether to find the largest draw of each feature, (F,), too; none is returned otherwise.
        silent
            Show no progress bar.
        """
        mine: dict[DrawKey, GroupDraws] = {}

        def draw(key: DrawKey) -> Arrays:
            drawn = mine[key] = self.draw(cells[key], key)
            return {**drawn.arrays(), **({"largest": drawn.moments(largest=True).largest} if largest else {})}

        keys = list(cells)
        found = dict(zip(keys, shared_map(draw, keys, "decoding", silent), strict=True))
        # A process without a set of its own learns from one cell how draws are laid out.
        like = next(iter(mine.values())) if mine else self.draw(cells[keys[0]][:1], keys[0])
        draws = {key: mine[key] if key in mine else like.with_arrays(arrays) for key, arrays in found.items()}
        return draws, {key: arrays["largest"] for key, arrays in found.items() if largest}

    def key_of_counts(self, key: DrawKey, index: Tensor) -> DrawKey:
        """Draws by which the counts of a part with these cells are judged, of each measured cell in its own batch.

        Draws of all cells hold those, unless there are more cells than draws: then few of them would be of measured
        cells, or none.
        """
        measured = self.request.modality.measured_in(self.table)[index]
        some_of_many = len(index) > self.request.n_draws and bool(measured.any()) and not bool(measured.all())
        return DrawKey(key.part, None, some_of_many)

    def cells_of(self, key: DrawKey, index: Tensor) -> Tensor:
        """Positions of the cells that are drawn, of a part with these, int64."""
        return index[self.request.modality.measured_in(self.table)[index]] if key.measured_only else index

    def draw(self, index: Tensor, key: DrawKey) -> GroupDraws:
        """Draw cells, one posterior draw of each, and decode them.

        With ``weights="importance"``, 64 draws are made of each cell, and some of them taken with replacement by
        importance weights.

        Parameters
        ----------
        index
            Positions of the cells, int64. The draws depend on them and the seed alone.
        key
            Batches and covariates that the draws are decoded in, those of one batch after those of another.
        """
        batches = key.batches
        modality, n, seed = self.request.modality, self.request.n_draws, self.request.seed
        # Parts share no cell: their first cells distinguish them.
        rng = np.random.default_rng([seed, int(index[0])])
        chosen, number = choose_evenly(rng, len(index), n)
        stratum = np.empty(n, dtype=np.int64)
        for code, rows_of in enumerate(self.strata(batches)):
            stratum[rows_of] = code
        by_weight = self.request.weights == "importance"
        n_of_cell = _CANDIDATES if by_weight else int(number.max()) + 1
        at_once = cells_at_a_time(self.request.batch_size, n_of_cell)
        if by_weight:
            at_once = min(at_once, LIKELIHOOD_ROWS // _CANDIDATES)
        average = Average(n_of_cell, use_mean=False, batches=batches, covariates=key.covariates, seed=seed)
        cells_drawn = np.unique(chosen)
        gathered, gates = _GatheredDraws(n), _GatheredDraws(n)
        factor_n, measured_n = np.full(n, np.nan), np.zeros(n, dtype=bool)
        # Before the cells are cut into minibatches, on which draws do not depend.
        unit_n = rng.random(n)
        for start in range(0, len(cells_drawn), at_once):
            part = cells_drawn[start : start + at_once]
            rows = np.flatnonzero((chosen >= part[0]) & (chosen <= part[-1]))
            place = np.searchsorted(part, chosen[rows])
            cells = self.table.batch(index[torch.from_numpy(part)]).to(self.device)
            with evaluation_mode(self.program):
                decoded = decode(self.program, cells, average, (modality.decoded,))
                draw = number[rows]
                if by_weight:
                    scored = log_weights(*scored_traces(self.program, cells, decoded.latents))
                    draw = _choose_by_weight(unit_n[rows], scored.cpu().numpy(), place)
                measured_n[rows] = modality.measured_in(cells).cpu().numpy()[place]
                if modality == ATAC:
                    factor_n[rows] = _cell_factors(self.program, modality, decoded)[draw, place]
                elif batches is None and modality == RNA:
                    # Counts are summed over cells: the deeper a cell, the more it counts.
                    depth = modality.counts_in(cells).row_sums().clamp(min=1.0)
                    if not modality.compositional:
                        depth = modality.size_factor_in(cells)
                    factor_n[rows] = depth.double().cpu().numpy()[place]
                    gates.put(rows, _gate_logits(modality, self.program, cells, decoded), draw, place)
                for code, sites in enumerate(decoded.sites):
                    mine = stratum[rows] == code
                    gathered.put(rows[mine], sites[modality.decoded], draw[mine], place[mine])
        values = gathered.tensor()
        assert values is not None
        return GroupDraws(values, gates.tensor(), factor_n, measured_n)


class _GatheredDraws:
    """n draws of a wide site, gathered from minibatches; of a readout only the hidden layer."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._rows: Tensor | None = None
        self._like: Tensor | None = None

    def put(
        self, rows: NDArray[np.int64], values: Tensor | None, draw: NDArray[np.int64], place: NDArray[np.int64]
    ) -> None:
        """Store draws of cells of (S, B, F) in their rows; None if the site does not exist."""
        if values is None:
            return
        inner = values.hidden if isinstance(values, Readout) else values
        taken = inner[torch.from_numpy(draw), torch.from_numpy(place)]
        if self._rows is None:
            self._rows, self._like = taken.new_empty(self.n, taken.shape[-1]), values
        self._rows[torch.from_numpy(rows)] = taken

    def tensor(self) -> Tensor | None:
        """All draws, (n, F)."""
        like = self._like
        if self._rows is None or not isinstance(like, Readout):
            return self._rows
        return like.with_hidden(self._rows)


def feature_blocks_of(
    draws: Mapping[DrawKey, GroupDraws], features: Tensor | None
) -> Iterator[tuple[slice, dict[DrawKey, Tensor]]]:
    """Blocks of features (default: of all), with the values of all draws, (n, f); each process has every n-th block."""
    width = features_at_a_time(sum(len(group.values) for group in draws.values()))
    streams = [feature_blocks(group.values, features, width, current().turn) for group in draws.values()]
    for parts in zip(*streams, strict=True):
        yield parts[0][0], {key: values for key, (_, values) in zip(draws, parts, strict=True)}


def _cell_factors(program: MultiVIProgram, modality: AnyModality, decoded: DecodedDraws) -> Array:
    """Draws of d of a minibatch, of fragments relative to a typical cell, (S, B); NaN if the guide has none."""
    nodes: dict[str, Any] = dict(decoded.latents.trace.nodes)
    shape = (decoded.latents.n_samples, decoded.sites[0][modality.decoded].shape[-2])
    if modality.depth not in nodes:
        return np.full(shape, np.nan)
    found: Array = nodes[modality.depth]["value"].expand(shape).double().cpu().numpy()
    return found if modality.binary else found / program.atac_log_depth.double().exp().item()


def _gate_logits(modality: AnyModality, program: MultiVIProgram, cells: Cells, decoded: DecodedDraws) -> Tensor | None:
    """Logits of dropping a count, (S, B, F); None if the observation model has no such gate."""
    nodes: dict[str, Any] = dict(model_trace(program.model, cells, decoded.latents).nodes)
    fn = nodes[modality.counts]["fn"]
    gate: Tensor | None = getattr(getattr(fn, "base_dist", fn), "gate_logits", None)
    return None if gate is None else gate.detach().expand(decoded.sites[0][modality.decoded].shape)


def choose_evenly(rng: np.random.Generator, n_cells: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cell of each of n draws, and the number of the draw among those of its cell, (n,) each.

    All cells come in random order, then all in another, and so on: of any draws in a row, each cell
    has as many as any other, up to two. They follow the group no worse than cells drawn independently
    with replacement, and their means scatter less.
    """
    rounds = [rng.permutation(n_cells) for _ in range(-(-n // n_cells))]
    return np.concatenate(rounds)[:n], np.arange(n) // n_cells


def _choose_by_weight(unit: Array, log_w: Array, place: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of a candidate for each draw, by a number in (0, 1) and the log importance weights of its cell, (S, B)."""
    share = np.exp(log_w - log_w.max(0))
    upto = (share / share.sum(0)).cumsum(0)
    number = (upto[:, place] < unit).sum(0)
    return np.minimum(number, len(log_w) - 1).astype(np.int64)
