"""Latent state and depth variables of cells."""

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
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.draws import mean_of
from pyro_multivi.posterior.engine.posterior_scale import corrected
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode


@dataclass(frozen=True)
class LatentState:
    """Moments of q(z) of each cell, as it was trained.

    Attributes
    ----------
    mean, variance
        Moments of z, (n, K).
    point
        Input of the decoders at the posterior mean of z, (n, K).
    """

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    point: NDArray[np.float32]


def latent_state(program: MultiVIProgram, cells: Iterable[Cells], modality: str = "joint") -> LatentState:
    """Moments of q(z) given all measured modalities of a cell, or one of them.

    Rows of cells in which ``modality`` was not measured are NaN.

    Raises
    ------
    ValueError
        If there is no expert of that modality, or q(z) has no mean.
    """
    means, variances, points = [], [], []
    for minibatch in cells:
        with evaluation_mode(program):
            q, hole = _posterior(program, minibatch, modality)
            mean = mean_of("z", q)
            means.append(mean + hole)
            variances.append(q.variance + hole)
            points.append(program.transform(mean) + hole)
    return LatentState(_gather(means), _gather(variances), _gather(points))


def latent_draws(
    program: MultiVIProgram, cells: Iterable[Cells], modality: str, n_samples: int, seed: int = 0
) -> NDArray[np.float32]:
    """Draws of the input of the decoders, (S, n, K), the same that every posterior quantity of that seed uses.

    Rows of cells in which ``modality`` was not measured are NaN.
    """
    draws = []
    for minibatch in cells:
        with evaluation_mode(program):
            q, hole = _posterior(program, minibatch, modality)
            if modality == "joint":
                q = corrected(program, minibatch, q)
            z_sbk = CellNoise(minibatch.index, seed).draw("z", q.expand((n_samples, len(minibatch))))
            draws.append(program.transform(z_sbk) + hole)
    return _gather(draws, 1)


def _posterior(program: MultiVIProgram, cells: Cells, modality: str) -> tuple[Any, Tensor]:
    """q(z) of each cell, and 0, or NaN where the modality was not measured, (B, 1)."""
    if modality == "joint":
        # From the guide's trace, not from its parts, so that an overridden guide is used.
        return poutine.trace(program.guide).get_trace(cells).nodes["z"]["fn"], cells.design.new_zeros(len(cells), 1)
    experts = program.experts(cells, cells.design, program.encode(cells, cells.design))
    if modality not in experts:
        known = ", ".join(map(repr, ("joint", *experts)))
        raise ValueError(f"modality={modality!r}: this model has no expert of that name; choose one of {known}.")
    expert = experts[modality]
    hole = torch.where(expert.measured, 0.0, torch.nan)[:, None]
    return dist.Normal(expert.loc, expert.scale).to_event(1), hole


def depth_factors(program: MultiVIProgram, cells: Iterable[Cells]) -> dict[str, NDArray[np.float32]]:
    """Posterior mean of the library size and the cell factor of accessibility, NaN where unmeasured."""
    parts: dict[str, list[Tensor]] = {}
    for minibatch in cells:
        with evaluation_mode(program):
            nodes: dict[str, Any] = dict(poutine.trace(program.guide).get_trace(minibatch).nodes)
            for modality in MODALITIES:
                if modality.depth in nodes:
                    site = nodes[modality.depth]
                    # The cell factor is a point estimate.
                    depth = site["value"] if modality.binary else site["fn"].mean
                    depth = depth.masked_fill(~modality.measured_in(minibatch), torch.nan)
                    parts.setdefault(modality.name, []).append(depth)
    return {name: _gather(depths) for name, depths in parts.items()}


def _gather(parts: list[Tensor], axis: int = 0) -> NDArray[np.float32]:
    return np.concatenate([part.cpu().numpy() for part in parts], axis)
