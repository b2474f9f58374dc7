"""The latent state and the depth variables of cells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.networks.experts import Expert
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


@torch.no_grad()
def latent_state(
    program: MultiVIProgram, cells: Iterable[Cells], modality: str = "joint", n_samples: int = 0, seed: int = 0
) -> LatentState:
    """q(z) given all measured modalities of a cell, or one of them.

    Rows of cells in which ``modality`` was not measured are NaN.
    """
    means, variances, points, draws = [], [], [], []
    noise = torch.Generator(device=next(program.parameters()).device).manual_seed(seed)
    with pyro.validation_enabled(False):
        for minibatch in cells:
            loc, scale, measured = _joint(program, minibatch) if modality == "joint" else _single(
                program, minibatch, modality
            )
            hole = torch.where(measured, 0.0, torch.nan)[:, None]
            means.append(loc + hole)
            variances.append(scale.square() + hole)
            points.append(program.transform(loc) + hole)
            if n_samples:
                shape = (n_samples, *loc.shape)
                unit = torch.randn(shape, generator=noise, device=loc.device, dtype=loc.dtype)
                draws.append(program.transform(loc + scale * unit) + hole)
    return LatentState(
        _gather(means), _gather(variances), _gather(points), _gather(draws, 1) if n_samples else None
    )


def _joint(program: MultiVIProgram, cells: Cells) -> tuple[Tensor, Tensor, Tensor]:
    # From the guide's trace, not from its parts, so that an overridden guide is honoured.
    q: Any = poutine.trace(program.guide).get_trace(cells).nodes["z"]["fn"]
    return q.mean, q.variance.sqrt(), torch.ones_like(cells.has_rna)


def _single(program: MultiVIProgram, cells: Cells, modality: str) -> tuple[Tensor, Tensor, Tensor]:
    expert: Expert = program.experts(cells, cells.design, program.read(cells, cells.design))[modality]
    return expert.loc, expert.scale, expert.measured


@torch.no_grad()
def depth_factors(program: MultiVIProgram, cells: Iterable[Cells]) -> dict[str, NDArray[np.float32]]:
    """Posterior mean of the library size and the cell factor of accessibility, NaN where unmeasured."""
    library, factor = [], []
    with pyro.validation_enabled(False):
        for minibatch in cells:
            nodes: Any = poutine.trace(program.guide).get_trace(minibatch).nodes
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
