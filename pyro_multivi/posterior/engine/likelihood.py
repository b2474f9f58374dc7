"""Likelihood of cells: the ELBO, its parts, and the marginal likelihood."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import ATAC
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.engine.draws import Latents, draw_latents, model_trace
from pyro_multivi.posterior.engine.readings import READINGS
from pyro_multivi.processes.shares import Arrays, by_minibatch, joined
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import (
    auxiliary_sites,
    equal_scales,
    evaluation_mode,
    is_of_cells,
    is_point,
    kl,
    log_density,
    measured_at,
    random_sites,
    scale_of,
)

#: Draws x cells whose likelihood is evaluated together: each brings a copy of its cell's counts.
LIKELIHOOD_ROWS = 1024
#: Draws of each cell among them; the rest of the rows are cells.
LIKELIHOOD_DRAWS = 64


@dataclass
class ElboParts:
    """Terms of the ELBO of each of n cells, in nats; the training-only alignment is no part of it.

    Attributes
    ----------
    log_likelihood
        E_q log p(site | ...) by observed site, (n,); 0 where it was not measured.
    measured
        Whether the site was measured, (n,), bool.
    kl
        KL(q | prior) by latent site, (n,).
    """

    log_likelihood: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    measured: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    kl: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    @property
    def elbo(self) -> NDArray[np.float64]:
        """Evidence lower bound of each cell, (n,)."""
        total: NDArray[np.float64] = np.sum(list(self.log_likelihood.values()), axis=0)
        return total - np.sum(list(self.kl.values()), axis=0)


def elbo_parts(program: MultiVIProgram, minibatches: Iterable[Cells], n_particles: int = 1, seed: int = 0) -> ElboParts:
    """ELBO of each cell, term by term.

    Parameters
    ----------
    n_particles
        Draws per cell over which expectations are averaged. KL terms are exact where Pyro knows
        their closed form.
    seed
        Seed of the draws.
    """

    def of_minibatch(cells: Cells) -> Arrays:
        found: dict[str, Tensor] = {}
        with evaluation_mode(program):
            latents = draw_latents(program, cells, n_particles, seed, as_trained=True)
            model, guide = scored_traces(program, cells, latents)
            for name, site in _sites(model):
                if site["is_observed"]:
                    found[f"log_likelihood {name}"] = log_density(site).double().mean(0)
                    found[f"measured {name}"] = measured_at(name, site, cells)
                else:
                    found[f"kl {name}"] = kl(guide.nodes[name], site).double().mean(0)
            for name, site in auxiliary_sites(model, guide).items():
                found[f"kl {name}"] = log_density(site).double().mean(0)
        return {name: values.cpu().numpy() for name, values in found.items()}

    parts: dict[str, Arrays] = {"log_likelihood": {}, "measured": {}, "kl": {}}
    for name, values in joined(by_minibatch(of_minibatch, minibatches)).items():
        kind, _, site = name.partition(" ")
        parts[kind][site] = values
    return ElboParts(**parts)


class MarginalLikelihood(NamedTuple):
    """Log p(counts) of each of n cells.

    Attributes
    ----------
    log_likelihood
        Estimate in nats, (n,).
    standard_error
        Its Monte Carlo error, (n,).
    """

    log_likelihood: NDArray[np.float64]
    standard_error: NDArray[np.float64]


def marginal_likelihood(
    program: MultiVIProgram,
    minibatches: Iterable[Cells],
    n_samples: int = 1000,
    seed: int = 0,
    reading: str | None = None,
) -> MarginalLikelihood:
    r"""Importance sampling estimate of the marginal likelihood of each cell.

    .. math:: \log p(x_n, y_n \mid s_n) \approx \log \frac{1}{S} \sum_s
        \frac{p(x_n, y_n, z_s, \ell_s, d_s)}{q(z_s, \ell_s, d_s)}, \quad z_s, \ell_s, d_s \sim q

    The standard error of the logarithm is, to first order, the
    relative error of the mean weight. The logarithm of a mean is low by half its square on average.

    With ``reading``, ``"open"`` or ``"counts"``, accessibility is read as :mod:`.readings` tells.
    """

    def of_minibatch(cells: Cells) -> Arrays:
        weights = []
        for first in range(0, n_samples, LIKELIHOOD_DRAWS):
            size = min(LIKELIHOOD_DRAWS, n_samples - first)
            with evaluation_mode(program):
                latents = draw_latents(program, cells, size, seed, first, as_trained=True)
                model, guide = scored_traces(program, cells, latents)
                if reading is not None and ATAC.counts in model.nodes:
                    _read_as(reading, model.nodes[ATAC.counts], cells)
                weights.append(log_weights(model, guide))
        log_w = torch.cat(weights)  # (S, B)
        log_mean = log_w.logsumexp(0) - math.log(n_samples)
        relative = (log_w - log_mean).exp()
        spread = relative.std(0) if n_samples > 1 else torch.full_like(log_mean, math.nan)
        error = spread / math.sqrt(n_samples)
        return {"log_likelihood": log_mean.cpu().numpy(), "standard_error": error.cpu().numpy()}

    return MarginalLikelihood(**joined(by_minibatch(of_minibatch, minibatches)))


def _read_as(reading: str, site: Any, cells: Cells) -> None:
    """Score the site of accessibility by another reading, in the cells that have it."""
    found = READINGS[reading](site["fn"], SparseCounts.of(cells.y))
    site["unscaled_log_prob"] = torch.where(cells.has_atac, found, 0.0).expand_as(site["unscaled_log_prob"])


def cells_for_likelihood(batch_size: int, n_samples: int) -> int:
    """Number of cells of a minibatch such that the rows whose likelihood is evaluated stay within bounds."""
    return min(batch_size, max(1, LIKELIHOOD_ROWS // min(n_samples, LIKELIHOOD_DRAWS)))


def scored_traces(program: MultiVIProgram, cells: Cells, latents: Latents) -> tuple[Trace, Trace]:
    """Traces of model and guide at the same draws, with their log probabilities."""
    model = model_trace(program.model, cells, latents)
    model.compute_log_prob()
    latents.trace.compute_log_prob()
    return model, latents.trace


def observed_sites(program: MultiVIProgram, cells: Cells) -> list[str]:
    """Names of the sites whose likelihood is evaluated, in the order of the model."""
    with evaluation_mode(program):
        model = model_trace(program.model, cells, draw_latents(program, cells, as_trained=True))
    return [name for name, site in random_sites(model).items() if site["is_observed"]]


def _sites(model: Trace) -> Iterable[tuple[str, Any]]:
    """Observed counts and latents of each cell."""
    for name, site in random_sites(model).items():
        if not is_of_cells(site):
            raise ValueError(
                f"The model shares {name!r} among cells, so that cells have no likelihood of their own: evaluate a "
                "Pyro ELBO of program.model and poutine.block(program.guide, hide=list(TRAINING_SITES)), from "
                "pyro_multivi.traces: the guide's training terms are no part of an ELBO."
            )
        yield name, site


def log_weights(model: Trace, guide: Trace) -> Tensor:
    """log p(counts, latents) - log q(latents), (S, B), in double precision: S terms of like size are added.

    Raises
    ------
    ValueError
        If the guide scales the density of a latent, or puts one at a point where the model has a density.
    """
    total = torch.zeros((), dtype=torch.float64)
    for _, site in _sites(model):
        total = total + log_density(site).double()
    counted = auxiliary_sites(model, guide)
    for name, site in random_sites(guide).items():
        if not counted and is_point(site["fn"]) and name in model.nodes and not is_point(model.nodes[name]["fn"]):
            raise ValueError(
                f"The guide puts {name!r} at a point (Delta), and importance weights need a density that it is drawn "
                "from: there is no marginal likelihood, nor weights='importance', of this program. Use get_elbo, or "
                "give the guide a distribution with a density."
            )
        if name in counted or not site["infer"].get("is_auxiliary"):
            if not equal_scales(scale_of(site), 1.0):
                raise ValueError(
                    f"The guide scales {name!r} by poutine.scale, and importance weights need the density that it is "
                    "drawn from: there is no marginal likelihood, nor weights='importance', of this program. Use "
                    "get_elbo, or scale sites of the model alone, which takes elbo=Trace_ELBO() in train."
                )
            total = total - log_density(site).double()
    return total
