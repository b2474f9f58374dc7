"""Posterior of minified cells, whose counts are gone: read where a guide would encode them."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.minified.layout import FACTOR_SD, stored_part
from pyro_multivi.data.modality import modelled
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
                factor = stored_part(stored, "factor")[:, 0]
                if program.config.counts_fragments:
                    pyro.sample("d", dist.LogNormal(factor, stored_part(stored, FACTOR_SD)[:, 0]))
                else:
                    pyro.sample("d", dist.Delta(factor))
            # Their values stay beside the posterior.
            for modality in program.modelled_extra:
                modality.guide(cells, cells.design)

    return guide


def stored_experts(program: MultiVIProgram, cells: Cells, stored: Tensor) -> dict[str, Expert]:
    """q(z) given each modality, of cells whose counts are gone."""
    experts = {}
    for modality in modelled(program.config):
        loc, scale = stored_part(stored, modality.name).chunk(2, -1)
        experts[modality.name] = Expert(loc, scale, modality.measured_in(cells))
    return {**experts, **{extra.name: extra.expert(cells, cells.design) for extra in program.modelled_extra}}
