"""The latent state and the depth variables of cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.networks.experts import Expert
from pyro_multivi.posterior.draws import evaluating
from pyro_multivi.posterior.noise import CellNoise
from pyro_multivi.program import MultiVIProgram

MODALITIES = ("joint", "expression", "accessibility")


@dataclass(frozen=True)
class LatentState:
    """q(z) of each cell.

    Attributes
    ----------
    mean, variance
        Moments of the Normal over z, (n, K).
    samples
        Draws of what the decoders read of z, (S, n, K); None unless asked for.
    point
        What the decoders read of the posterior mean of z, (n, K).
    """

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    point: NDArray[np.float32]
    samples: NDArray[np.float32] | None


def latent_state(
    program: MultiVIProgram, cells: Iterable[Cells], modality: str = "joint", n_samples: int = 0, seed: int = 0
) -> LatentState:
    """q(z) given all measured modalities of a cell, or one of them.

    The draws are those that every other posterior quantity of the same seed is made of. Rows of
    cells in which ``modality`` was not measured are NaN.
    """
    means, variances, points, draws = [], [], [], []
    for minibatch in cells:
        with evaluating(program):
            q, measured = _joint(program, minibatch) if modality == "joint" else _single(program, minibatch, modality)
            hole = torch.where(measured, 0.0, torch.nan)[:, None]
            means.append(q.mean + hole)
            variances.append(q.variance + hole)
            points.append(program.transform(q.mean) + hole)
            if n_samples:
                many = q.expand((n_samples, len(minibatch)))
                z_sbk = CellNoise(minibatch.index, seed).draw("z", many)
                draws.append(program.transform(z_sbk) + hole)
    return LatentState(
        _gather(means), _gather(variances), _gather(points), _gather(draws, 1) if n_samples else None
    )


def _joint(program: MultiVIProgram, cells: Cells) -> tuple[Any, Tensor]:
    # From the guide's trace, not from its parts, so that an overridden guide is honoured.
    return poutine.trace(program.guide).get_trace(cells).nodes["z"]["fn"], torch.ones_like(cells.has_rna)


def _single(program: MultiVIProgram, cells: Cells, modality: str) -> tuple[Any, Tensor]:
    expert: Expert = program.experts(cells, cells.design, program.read(cells, cells.design))[modality]
    return dist.Normal(expert.loc, expert.scale).to_event(1), expert.measured


def depth_factors(program: MultiVIProgram, cells: Iterable[Cells]) -> dict[str, NDArray[np.float32]]:
    """Posterior mean of the library size and the cell factor of accessibility, NaN where unmeasured."""
    library, factor = [], []
    for minibatch in cells:
        with evaluating(program):
            nodes: dict[str, Any] = dict(poutine.trace(program.guide).get_trace(minibatch).nodes)
            if "l" in nodes:
                library.append(nodes["l"]["fn"].mean.masked_fill(~minibatch.has_rna, torch.nan))
            if "d" in nodes:
                factor.append(nodes["d"]["value"].masked_fill(~minibatch.has_atac, torch.nan))
    found = {}
    if library:
        found["expression"] = _gather(library)
    if factor:
        found["accessibility"] = _gather(factor)
    return found


def _gather(parts: list[Tensor], axis: int = 0) -> NDArray[np.float32]:
    return np.concatenate([part.cpu().numpy() for part in parts], axis)
