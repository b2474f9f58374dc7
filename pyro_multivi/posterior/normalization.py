"""Normalized expression and accessibility: expectations over the posterior, block by block.

For each minibatch the guide gives draws of the latents, the model decodes them, and blocks of
features are evaluated, summarised over the draws and handed to a sink. What is in memory at any
time is a minibatch's draws of one block: at most ``BLOCK`` numbers, and a few copies of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions import Readout
from pyro_multivi.evaluating import evaluating
from pyro_multivi.posterior.draws import Latents, draw_latents, feature_blocks, mean_latents, replay
from pyro_multivi.posterior.sinks import Sink
from pyro_multivi.posterior.summary import summarise
from pyro_multivi.program import MultiVIProgram

#: Draws x cells x features evaluated at a time: 16 MB in float32, small beside any cache of a file.
BLOCK = 2**22
# Narrower blocks would cost more in calls than in arithmetic.
_LEAST_WIDTH = 128


@dataclass(frozen=True)
class Average:
    """Over what a quantity is averaged.

    Attributes
    ----------
    n_samples
        Draws from the posterior.
    use_mean
        With a single draw, take the latents at their posterior means instead.
    batches
        Codes of the batches that every cell is put into in turn; None leaves each in its own.
    level
        Probability of the interval to return; None for the expectation alone.
    keep_draws
        Return all draws instead of their average.
    seed
        Of the draws.
    plain
        Decode the posterior as the guide has it, also what was not measured of a cell. Otherwise that is trusted as
        far as it predicts (:mod:`~pyro_multivi.posterior.trust`) and has a predicted depth
        (:mod:`~pyro_multivi.posterior.depth`), which estimates the cell best.
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
        """Names of what is computed: mean, sd, lower, upper; or draws."""
        if self.keep_draws:
            return ("draws",)
        return ("mean",) if self.level is None else ("mean", "sd", "lower", "upper")


@dataclass(frozen=True)
class Quantity:
    """A site of the model, some of its features, and factors.

    Attributes
    ----------
    site
        ``"rho"`` or ``"p"``.
    features
        Positions, (k,), int64; None for all.
    by_cell
        Factor of each cell: a number, one number per cell asked for, (n,), or a latent site
        (``"l"``, ``"d"``), of which each draw is multiplied with its own.
    by_feature
        Factor of each of the features, (k,); None for 1.
    threshold
        Estimates below it become 0 and the result is sparse; None keeps all.
    """

    site: str
    features: Tensor | None = None
    by_cell: float | Tensor | str = 1.0
    by_feature: Tensor | None = None
    threshold: float | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """All sites of the model that it is made of."""
        return (self.site, self.by_cell) if isinstance(self.by_cell, str) else (self.site,)


@dataclass(frozen=True)
class Decoded:
    """What the model makes of some cells, once for every batch they are put into."""

    latents: Latents
    sites: Sequence[dict[str, Tensor]]


def decode(program: MultiVIProgram, cells: Cells, average: Average, sites: Sequence[str]) -> Decoded:
    """Decode sites of some cells. Call it within :func:`~pyro_multivi.evaluating.evaluating`."""
    if average.use_mean and average.n_samples == 1:
        latents = mean_latents(program, cells)
    else:
        latents = draw_latents(program, cells, average.n_samples, average.seed)
    asked: list[dict[str, Tensor]] = [{}]
    if average.batches is not None:
        # The guide has spoken under the observed design: only the model is asked what would be elsewhere.
        asked = [{"s": _in_batch(cells.design, code, program.config.n_batch)} for code in average.batches]
    return Decoded(latents, [replay(program, cells, latents, sites, s, plain=average.plain) for s in asked])


def blocks(
    decoded: Decoded, quantity: Quantity, average: Average, start: int, rows: Tensor | None = None
) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    """Summaries of a quantity, block by block of its features.

    Parameters
    ----------
    decoded
        A minibatch.
    quantity, average
        What is asked.
    start
        Position of the minibatch's first cell among all cells asked for.
    rows
        Which cells of the minibatch are wanted; None for all.
    """
    values = [_of_cells(sites[quantity.site], rows) for sites in decoded.sites]
    n_rows = values[0].shape[:-1].numel()
    if n_rows == 0:
        return
    factor = _cell_factor(decoded, quantity, start, rows)
    width = max(_LEAST_WIDTH, BLOCK // n_rows)
    for parts in zip(*(feature_blocks(value, quantity.features, width) for value in values), strict=True):
        block = parts[0][0]
        mean_sbw = parts[0][1]
        for _, further in parts[1:]:
            mean_sbw = mean_sbw + further
        if len(parts) > 1:
            mean_sbw = mean_sbw / len(parts)
        if factor is not None:
            mean_sbw = mean_sbw * factor
        if quantity.by_feature is not None:
            mean_sbw = mean_sbw * quantity.by_feature[block]
        yield block, summarise(mean_sbw, average.level, average.keep_draws)


def estimate(
    program: MultiVIProgram, minibatches: Iterable[Cells], quantity: Quantity, average: Average, sink: Sink
) -> None:
    """Stream a quantity of all cells into a sink, which may hold the first of them already."""
    start = sink.n_done
    for cells in minibatches:
        rows = slice(start, start + len(cells))
        pieces = []
        with evaluating(program):
            for block, found in blocks(decode(program, cells, average, quantity.sites), quantity, average, start):
                if quantity.threshold is None:
                    for name, values in found.items():
                        sink.put(name, rows, block, values)
                else:
                    pieces.append(compress(found["mean"], quantity.threshold))
        if pieces:
            sink.append("mean", sp.hstack(pieces, format="csr"))
        start = rows.stop
        sink.commit(start)


def compress(values: NDArray[np.float32], threshold: float = 0.0) -> sp.csr_matrix:
    """Rows of the values that are not below a threshold and not 0."""
    kept = (values >= threshold) & (values != 0)
    indptr = np.zeros(len(values) + 1, dtype=np.int64)
    np.cumsum(kept.sum(1), out=indptr[1:])
    return sp.csr_matrix((values[kept], np.nonzero(kept)[1].astype(np.int32), indptr), shape=values.shape)


def _in_batch(design: Tensor, code: int, n_batch: int) -> Tensor:
    moved = design.clone()
    moved[:, :n_batch] = 0
    moved[:, code] = 1
    return moved


def _of_cells(values: Tensor, rows: Tensor | None) -> Tensor:
    """Some cells of (S, B, F)."""
    if rows is None:
        return values
    if isinstance(values, Readout):
        return Readout(values.hidden[:, rows], values.weight, values.bias, values.link, values.gemm_dtype)
    return values[:, rows]


def _cell_factor(decoded: Decoded, quantity: Quantity, start: int, rows: Tensor | None) -> Tensor | None:
    """What each draw of each cell is multiplied with, (S, B, 1) or (B, 1); None for 1."""
    by_cell = quantity.by_cell
    if isinstance(by_cell, str):
        return _of_cells(decoded.sites[0][by_cell][..., None], rows)
    if isinstance(by_cell, Tensor):
        n_cells = decoded.sites[0][quantity.site].shape[-2]
        factor = by_cell[start : start + n_cells, None]
        return factor if rows is None else factor[rows]
    return None if by_cell == 1 else torch.tensor(float(by_cell))
