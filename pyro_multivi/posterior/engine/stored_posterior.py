"""Posterior of minified cells, whose counts are gone: read where a guide would encode them."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.minified.layout import FACTOR_SD, has_factor_sd, stored_part
from pyro_multivi.data.modality import modelled
from pyro_multivi.distributions.logit_normal import LogitNormal
from pyro_multivi.networks.experts import Expert
from pyro_multivi.program import CELLS, MultiVIProgram


def guide_of(program: MultiVIProgram, cells: Cells) -> Callable[[Cells], None]:
    """Guide to draw the latents of some cells from: the program's, or that of their stored posterior."""
    if cells.posterior is None:
        return program.guide
    stored = cells.posterior

    def guide(cells: Cells) -> None:
        with pyro.plate(CELLS, cells.n_total, subsample=cells.index):
            pyro.sample("z", dist.Normal(*stored_part(stored, "z").chunk(2, -1)).to_event(1))
            if program.config.n_genes:
                known = program.known_library(cells, cells.design)
                inferred = dist.LogNormal(*stored_part(stored, "library").unbind(-1))
                pyro.sample("l", inferred if known is None else dist.Delta(known))
            if program.config.n_regions:
                pyro.sample("d", _cell_factor(program, stored))
            # Their values stay beside the posterior.
            for modality in program.modelled_extra:
                modality.guide(cells, cells.design)

    return guide


def _cell_factor(program: MultiVIProgram, stored: Tensor) -> dist.TorchDistribution:
    """q(d) of cells whose counts are gone: a point where it was known, and as earlier versions stored it."""
    factor = stored_part(stored, "factor")[:, 0]
    if not has_factor_sd(stored):
        return dist.Delta(factor)
    kind = dist.LogNormal if program.config.counts_fragments else LogitNormal
    return kind(factor, stored_part(stored, FACTOR_SD)[:, 0])


def stored_experts(program: MultiVIProgram, cells: Cells, stored: Tensor) -> dict[str, Expert]:
    """q(z) given each modality, of cells whose counts are gone."""
    experts = {}
    for modality in modelled(program.config):
        loc, scale = stored_part(stored, modality.name).chunk(2, -1)
        experts[modality.name] = Expert(loc, scale, modality.measured_in(cells))
    return {**experts, **{extra.name: extra.expert_alone(cells, cells.design) for extra in program.modelled_extra}}
