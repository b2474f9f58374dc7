"""The ELBO of some cells, term by term, with the training-only alignment left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import MultiVIProgram

#: Sites that are terms of training, not of the model.
TRAINING_SITES = ("alignment",)


@dataclass
class Terms:
    """Sums over cells of each term, in nats, and over how many cells each was summed.

    Attributes
    ----------
    log_likelihood
        Sum of log p(site | ...) for each observed site (``"x"``, ``"y"``).
    kl
        Sum of KL(q | prior) for each latent site (``"z"``, ``"l"``, ``"d"``).
    training
        Sum of each training-only term (``"alignment"``).
    n_cells
        Number of cells; ``n_measured`` counts those in which an observed site was measured.
    """

    log_likelihood: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    n_measured: dict[str, int] = field(default_factory=dict)
    n_cells: int = 0

    def __iadd__(self, other: Terms) -> Terms:
        for name in ("log_likelihood", "kl", "training", "n_measured"):
            mine, theirs = getattr(self, name), getattr(other, name)
            for site, value in theirs.items():
                mine[site] = mine.get(site, 0) + value
        self.n_cells += other.n_cells
        return self

    @property
    def elbo(self) -> float:
        """Evidence lower bound summed over cells, in nats."""
        return sum(self.log_likelihood.values()) - sum(self.kl.values())

    def per_cell(self) -> dict[str, float]:
        """Named losses (lower is better) in nats per cell.

        ``elbo`` and ``reconstruction_loss`` carry the sign that scvi-tools gives them: they are the
        negative of what their names say. ``reconstruction_expression`` and
        ``reconstruction_accessibility`` are per *measured* cell, everything else is per cell.
        """
        n = max(self.n_cells, 1)
        row = {
            "elbo": -self.elbo / n,
            "reconstruction_loss": -sum(self.log_likelihood.values()) / n,
            "kl_local": sum(self.kl.values()) / n,
        }
        for site, value in self.log_likelihood.items():
            name = {"x": "expression", "y": "accessibility"}.get(site, site)
            row[f"reconstruction_{name}"] = -value / max(self.n_measured[site], 1)
        row.update({f"kl_{site}": value / n for site, value in self.kl.items()})
        row.update({site: value / n for site, value in self.training.items()})
        return row


def terms_of(cells: Cells, model_trace: Trace, guide_trace: Trace) -> Terms:
    """Read the terms off a pair of traces whose log probabilities have been computed."""
    terms = Terms(n_cells=len(cells))
    measured = {"x": cells.has_rna, "y": cells.has_atac}
    for name, site in model_trace.nodes.items():
        if site["type"] != "sample" or site_is_subsample(site):
            continue
        if not site["is_observed"]:
            terms.kl[name] = _total(_kl(guide_trace.nodes[name], site), site)
        elif not (site["infer"] or {}).get("_deterministic", False):
            terms.log_likelihood[name] = _total(site["unscaled_log_prob"], site)
            terms.n_measured[name] = int(measured[name].sum()) if name in measured else len(cells)
    for name in TRAINING_SITES:
        if name in guide_trace.nodes:
            # A factor in the guide counts as minus log q: adding it raises the loss.
            site = guide_trace.nodes[name]
            terms.training[name] = _total(site["unscaled_log_prob"], site)
    return terms


@torch.no_grad()
def measure(program: MultiVIProgram, cells: Cells) -> Terms:
    """Terms of one minibatch with one draw of the latents per cell."""
    guide_trace = poutine.trace(program.guide).get_trace(cells)
    model_trace = poutine.trace(poutine.replay(program.model, trace=guide_trace)).get_trace(cells)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return terms_of(cells, model_trace, guide_trace)


def _total(values: Tensor, site: Any) -> float:
    """Sum over cells; the mean over the particles of a vectorised ELBO."""
    particles = {frame.size for frame in site["cond_indep_stack"] if frame.name == "num_particles_vectorized"}
    return values.sum().item() / max(particles, default=1)


def _kl(guide_site: Any, model_site: Any) -> Tensor:
    """KL(q | p) of each cell in closed form where there is one, else at the draw."""
    try:
        return kl_divergence(guide_site["fn"], model_site["fn"]).detach()
    except NotImplementedError:
        difference: Tensor = guide_site["unscaled_log_prob"] - model_site["unscaled_log_prob"]
        return difference.detach()
