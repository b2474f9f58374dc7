"""Normalized expression and accessibility: expectations over the posterior, block by block.

For each minibatch the guide gives draws of the latents, the model decodes them, and blocks of
features are evaluated, summarised over the draws and handed to a sink. What is in memory at any
time is a minibatch's draws of one block (``decode.BLOCK`` numbers), and a few copies of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.fragments import open_probability
from pyro_multivi.posterior.engine.decode import Average, DecodedDraws, decode, features_at_a_time
from pyro_multivi.posterior.engine.draws import feature_blocks
from pyro_multivi.posterior.quantities.array_sink import Sink
from pyro_multivi.posterior.quantities.summary import summarise
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode


@dataclass(frozen=True)
class Quantity:
    """A site of the model, some of its features, and factors.

    Attributes
    ----------
    site
        ``"rho"`` or ``"p"``, or one of an extra modality.
    features
        Positions, (k,), int64; None for all.
    by_cell
        Factor of each cell: a number, one number per cell, (n,), or a latent site
        (``"l"``, ``"d"``), whose draws are multiplied with those of the quantity.
    by_feature
        Factor of each of the features, (k,); None for 1.
    threshold
        Estimates below it become 0 and the result is sparse; None keeps all.
    of_sum
        Whether values are divided by their sum over all features of the site.
    detection
        Whether the result is the probability of at least one fragment rather than their expected number.
    inverse_dispersion
        That of the counts of the features, (k,), if ``detection``; None for Poisson counts.
    """

    site: str
    features: Tensor | None = None
    by_cell: float | Tensor | str = 1.0
    by_feature: Tensor | None = None
    threshold: float | None = None
    of_sum: bool = False
    detection: bool = False
    inverse_dispersion: Tensor | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites of the model that it is made of."""
        return (self.site, self.by_cell) if isinstance(self.by_cell, str) else (self.site,)


def blocks(
    decoded: DecodedDraws, quantity: Quantity, average: Average, start: int, rows: Tensor | None = None
) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    """Summaries of a quantity, block by block of its features.

    Parameters
    ----------
    start
        Position of the minibatch's first cell among all cells of the result.
    rows
        Positions of the wanted cells in the minibatch; None for all.

    Yields
    ------
    slice, dict
        Positions among the features of the quantity, and the summaries by name, (B, W).
    """
    values = [_of_cells(sites[quantity.site], rows) for sites in decoded.sites]
    if quantity.of_sum:
        # A draw without any protein has no shares.
        values = [part / part.sum(-1, keepdim=True).clamp(min=1e-12) for part in values]
    n_rows = values[0].shape[:-1].numel()
    if n_rows == 0:
        return
    factor = _cell_factor(decoded, quantity, start, rows)
    streams = [feature_blocks(value, quantity.features, features_at_a_time(n_rows)) for value in values]
    towards = decoded.means.get(quantity.site)
    if towards is not None:
        towards = towards.some(quantity.features, rows)
    for parts in zip(*streams, strict=True):
        block = parts[0][0]
        by_batch = [values if towards is None else towards.shrink(values, block) for _, values in parts]
        if quantity.detection:
            detected = torch.stack([_detected(values, quantity, factor, block) for values in by_batch]).mean(0)
            yield block, summarise(detected, average.level, average.keep_draws)
            continue
        mean_sbw = sum(by_batch[1:], start=by_batch[0])
        if len(by_batch) > 1:
            mean_sbw = mean_sbw / len(by_batch)
        if factor is not None:
            mean_sbw = mean_sbw * factor
        if quantity.by_feature is not None:
            mean_sbw = mean_sbw * quantity.by_feature[block]
        if towards is not None:
            mean_sbw = mean_sbw.clamp(max=towards.ceiling)
        yield block, summarise(mean_sbw, average.level, average.keep_draws)


def _detected(values: Tensor, quantity: Quantity, factor: Tensor | None, block: slice) -> Tensor:
    """Probability of at least one fragment, of draws of a block of features in one batch."""
    mean = values if factor is None else values * factor
    if quantity.by_feature is not None:
        mean = mean * quantity.by_feature[block]
    theta = quantity.inverse_dispersion
    return open_probability(mean, None if theta is None else theta[block])


def estimate(
    program: MultiVIProgram, minibatches: Iterable[Cells], quantity: Quantity, average: Average, sink: Sink
) -> None:
    """Stream a quantity of all cells into a sink, which may hold the first of them already."""
    start = sink.n_done
    for cells in minibatches:
        rows = slice(start, start + len(cells))
        pieces = []
        with evaluation_mode(program):
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


def _of_cells(values: Tensor, rows: Tensor | None) -> Tensor:
    """Some of the cells of (S, B, F); all without ``rows``."""
    if rows is None:
        return values
    if isinstance(values, Readout):
        return values.of_cells(rows)
    return values[:, rows]


def _cell_factor(decoded: DecodedDraws, quantity: Quantity, start: int, rows: Tensor | None) -> Tensor | None:
    """Factor of each draw of each cell, (S, B, 1) or (B, 1); None for 1."""
    by_cell = quantity.by_cell
    if isinstance(by_cell, str):
        return _of_cells(decoded.sites[0][by_cell][..., None], rows)
    if isinstance(by_cell, Tensor):
        n_cells = decoded.sites[0][quantity.site].shape[-2]
        factor = by_cell[start : start + n_cells, None]
        return factor if rows is None else factor[rows]
    return None if by_cell == 1 else torch.tensor(float(by_cell))
