"""Latent state and depth variables of cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_multivi.data.checks import NotInModelError
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.minified.layout import FACTOR_SD, packed
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.distributions.logit_normal import LogitNormal
from pyro_multivi.networks.panels import depth
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.draws import Fill, draw_latents
from pyro_multivi.posterior.engine.posterior_scale import NoMeanError, corrected, mean_of, normal_in, variance_of
from pyro_multivi.posterior.engine.stored_posterior import guide_of, stored_experts
from pyro_multivi.processes.shares import Arrays, by_minibatch, joined
from pyro_multivi.program import CELLS, MultiVIProgram
from pyro_multivi.traces import evaluation_mode, random_sites


def latent_points(program: MultiVIProgram, cells: Iterable[Cells], modality: str = "joint") -> NDArray[np.float32]:
    """Input of the decoders at the posterior mean of z, (n, K), given all measured modalities of a cell, or one.

    Rows of cells in which ``modality`` was not measured are NaN.

    Raises
    ------
    ValueError
        If there is no expert of that modality, or q(z) has no mean.
    """
    return _of_posteriors(program, cells, modality, lambda q: {"point": program.transform(mean_of("z", q))})["point"]


def latent_moments(
    program: MultiVIProgram, cells: Iterable[Cells], modality: str = "joint"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and variance of q(z) of each cell as it was trained, (n, K); see :func:`latent_points`."""
    found = _of_posteriors(
        program, cells, modality, lambda q: {"mean": mean_of("z", q), "variance": variance_of("z", q)}
    )
    return found["mean"], found["variance"]


def _of_posteriors(
    program: MultiVIProgram, cells: Iterable[Cells], modality: str, statistics: Callable[[Any], dict[str, Tensor]]
) -> Arrays:
    """Statistics of q(z) of each cell, (n, K), by name."""

    def of_minibatch(minibatch: Cells) -> Arrays:
        with evaluation_mode(program):
            q, hole = _posterior(program, minibatch, modality)
            return {name: (value + hole).cpu().numpy() for name, value in statistics(q).items()}

    return joined(by_minibatch(of_minibatch, cells))


def latent_draws(
    program: MultiVIProgram, cells: Iterable[Cells], modality: str, n_samples: int, seed: int = 0
) -> NDArray[np.float32]:
    """Draws of the input of the decoders, (S, n, K), the same that every posterior quantity of that seed uses.

    Rows of cells in which ``modality`` was not measured are NaN.
    """

    def of_minibatch(minibatch: Cells) -> Arrays:
        with evaluation_mode(program):
            if modality == "joint":
                # Together with what the state depends on.
                nodes: dict[str, Any] = dict(draw_latents(program, minibatch, n_samples, seed).trace.nodes)
                z_sbk = nodes["z"]["value"].expand(n_samples, len(minibatch), -1)
                return {"z": program.transform(z_sbk).cpu().numpy()}
            q, hole = _posterior(program, minibatch, modality)
            q = corrected(program, _seen(minibatch, modality), q)
            z_sbk = CellNoise(minibatch.index, seed).draw("z", q.expand((n_samples, len(minibatch))))
            return {"z": (program.transform(z_sbk) + hole).cpu().numpy()}

    return joined(by_minibatch(of_minibatch, cells), axis=1)["z"]


def _posterior(program: MultiVIProgram, cells: Cells, modality: str) -> tuple[Any, Tensor]:
    """q(z) of each cell, and 0, or NaN where the modality was not measured, (B, 1)."""
    if modality == "joint":
        # From the guide, not from its parts, so that an overridden guide is used.
        return _joint(program, cells), cells.design.new_zeros(len(cells), 1)
    if cells.posterior is None:
        experts = program.experts_alone(cells, cells.design, program.encode(cells, cells.design))
    else:
        experts = stored_experts(program, cells, cells.posterior)
    if modality not in experts:
        known = ", ".join(map(repr, ("joint", *experts)))
        raise NotInModelError(f"modality={modality!r}: this model has no expert of that name; choose one of {known}.")
    measured = experts[modality].measured
    nowhere = torch.zeros_like(measured)
    # The average, or whatever an override mixes experts to, of this one alone.
    alone = {name: each if name == modality else replace(each, measured=nowhere) for name, each in experts.items()}
    return program.mix(alone), torch.where(measured, 0.0, torch.nan)[:, None]


def _joint(program: MultiVIProgram, cells: Cells) -> Any:
    """q(z) of each cell as it was trained; where it depends on other latents, at their means."""
    found: list[Any] = []
    for place in (0, -1):
        with _BeforeState(program, cells, None, as_trained=True) as before:
            before.place = place
            guide_of(program, cells)(cells)
        found.append(before.state)
        if not before.categories:
            return before.state
    # A category has no mean, and needs none where the state is the same whatever it is.
    if not all(torch.equal(getattr(found[0], moment), getattr(found[1], moment)) for moment in ("mean", "variance")):
        raise NoMeanError.of(before.categories[0])
    return found[0]


class _BeforeState(Fill):
    """Handler that sets the sites of a guide that come before z, and keeps q(z)."""

    state: Any = None

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z":
            self.state = msg["fn"]
        elif self.state is None:
            super()._pyro_sample(msg)


def _seen(cells: Cells, modality: str) -> Cells:
    """Cells that have no more than one modality, for what depends on the measurement pattern."""
    if modality == "joint":
        return cells
    nowhere = torch.zeros_like(cells.has_rna)
    return cells.replace(
        **{each.mask: each.measured_in(cells) if each.name == modality else nowhere for each in MODALITIES}
    )


def posterior_to_store(program: MultiVIProgram, cells: Iterable[Cells]) -> NDArray[np.float32]:
    """All that posterior quantities need of some cells in place of their counts, (n, P).

    It is read back by :func:`pyro_multivi.data.minified.layout.stored_part`.

    Raises
    ------
    ValueError
        If the posterior of z, l or d is of a family of which two numbers are not all, or the guide has other latents.
    """
    rows = []
    for minibatch in cells:
        with evaluation_mode(program):
            guide = poutine.trace(program.guide).get_trace(minibatch)
            nodes: dict[str, Any] = dict(guide.nodes)
            _check_latents(program, minibatch, guide)
            hidden = program.encode(minibatch, minibatch.design)
            experts = program.experts_alone(minibatch, minibatch.design, hidden)
        _check_families(program, minibatch, nodes)
        n, stored = len(minibatch), {}
        stored["measured"] = torch.stack([modality.measured_in(minibatch) for modality in MODALITIES], -1).float()
        stored["total"] = torch.stack([depth(program, minibatch, modality) for modality in MODALITIES], -1)
        fn = nodes[RNA.depth]["fn"] if RNA.depth in nodes else None
        # A library that is not inferred is known from the totals or the size factors.
        of_library = [fn.loc, fn.scale] if isinstance(fn, dist.LogNormal) else [torch.zeros(n), torch.ones(n)]
        stored["library"] = torch.stack(of_library, -1)
        factor = nodes[ATAC.depth]["value"] if ATAC.depth in nodes else torch.full((n,), 0.5)
        known = minibatch.has_atac if minibatch.atac_size is None else torch.ones_like(minibatch.has_atac)
        # Of other cells the guide draws it from the prior, and posterior quantities do so anew.
        stored["factor"] = torch.where(known, factor.to(known.device), 0.5)[:, None]
        fn = nodes[ATAC.depth]["fn"] if ATAC.depth in nodes else None
        if isinstance(fn, (LogitNormal, dist.LogNormal)):
            stored["factor"], stored[FACTOR_SD] = fn.loc[:, None], fn.scale[:, None]
        normal = normal_in(nodes["z"]["fn"])
        assert normal is not None  # by _check_families
        stored["z"] = torch.cat([normal.loc, normal.scale], -1)
        for modality in MODALITIES:
            expert = experts.get(modality.name)
            parts = (torch.zeros_like(normal.loc), torch.ones_like(normal.loc))
            stored[modality.name] = torch.cat(parts if expert is None else (expert.loc, expert.scale), -1)
        rows.append(packed(stored))
    return np.concatenate(rows)


def _check_latents(program: MultiVIProgram, cells: Cells, guide: Trace) -> None:
    """Refuse a guide with latents that neither the stored posterior nor an extra modality draws."""
    with pyro.plate(CELLS, cells.n_total, subsample=cells.index), poutine.trace() as of_extra:
        for modality in program.modelled_extra:
            modality.guide(cells, cells.design)
    kept = {"z", RNA.depth, ATAC.depth, *of_extra.trace.nodes}
    lost = [name for name, site in random_sites(guide).items() if not site["is_observed"] and name not in kept]
    if lost:
        raise ValueError(
            f"The guide of {type(program).__name__} draws {', '.join(map(repr, lost))} beside z, l and d, and minified "
            "data keep the posterior of these alone. Keep the data as they are."
        )


def _check_families(program: MultiVIProgram, cells: Cells, nodes: Mapping[str, Any]) -> None:
    """Refuse a guide whose posterior would not be read back as what it is."""
    config = program.config
    of_factor = (dist.LogNormal if config.counts_fragments else LogitNormal, dist.Delta)
    families: dict[str, tuple[type, ...]] = {
        RNA.depth: (dist.LogNormal if config.library == "latent" else dist.Delta,),
        ATAC.depth: of_factor if cells.atac_size is None else (dist.Delta,),
    }
    for name in ("z", *families):
        if name not in nodes:
            continue
        fn = nodes[name]["fn"]
        if name == "z":
            is_kept, allowed = normal_in(fn) is not None, "Normal(...).to_event(1)"
        else:
            is_kept, allowed = isinstance(fn, families[name]), " or ".join(each.__name__ for each in families[name])
        if not is_kept:
            found = type(fn.base_dist if isinstance(fn, dist.Independent) else fn).__name__
            raise ValueError(
                f"The guide of {type(program).__name__} has a {found} for {name!r}, of which minified data keep mean "
                f"and standard deviation alone: they can hold {allowed}. Keep the data as they are."
            )


def depth_factors(program: MultiVIProgram, cells: Iterable[Cells]) -> dict[str, NDArray[np.float32]]:
    """Posterior mean of the library size and the cell factor of accessibility, NaN where unmeasured."""

    def of_minibatch(minibatch: Cells) -> Arrays:
        parts: Arrays = {}
        with evaluation_mode(program):
            nodes: dict[str, Any] = dict(poutine.trace(guide_of(program, minibatch)).get_trace(minibatch).nodes)
            for modality in MODALITIES:
                if modality.depth in nodes:
                    known = modality.size_factor_in(minibatch)
                    found = mean_of(modality.depth, nodes[modality.depth]["fn"]) if known is None else known
                    found = found.masked_fill(~modality.measured_in(minibatch), torch.nan)
                    parts[modality.name] = found.cpu().numpy()
        return parts

    return joined(by_minibatch(of_minibatch, cells))
