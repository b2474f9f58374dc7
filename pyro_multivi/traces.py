"""Traces of a program: evaluation mode, and the terms of the ELBO that a pair of traces holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
import torch.distributions as torchdist
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.isolation import generators_kept, isolated, uninterrupted
from pyro_multivi.program import CELLS, MultiVIProgram

#: Key of a site of a trace with the scale that it has without KL warm-up.
UNANNEALED = "unannealed_scale"
#: Sites that are terms of training, not of the model.
TRAINING_SITES = ("alignment", "mixing", "distillation")


def is_of_cells(site: Any) -> bool:
    """Whether a site of a trace lies in the plate of cells, rather than being shared by all of them."""
    # No generator: closing one that is not used up would lose a Ctrl-C of that moment.
    return CELLS in [frame.name for frame in site["cond_indep_stack"]]


@contextmanager
def evaluation_mode(program: MultiVIProgram) -> Iterator[None]:
    """Evaluate a program without gradients, dropout or validation; all states, also torch's random one, come back.

    Ctrl-C acts when it is left.
    """
    device = next(program.parameters()).device
    with (
        uninterrupted(),
        isolated(),
        torch.no_grad(),
        pyro.validation_enabled(False),
        generators_kept(device),
    ):
        modes = [(module, module.training) for module in program.modules()]
        program.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


@dataclass
class Terms:
    """Terms of the ELBO: sums over cells, in nats, and the number of cells in each sum.

    The sums are scalars (float64) on the device that made them, which is only waited for when one of them is read.

    Attributes
    ----------
    log_likelihood
        Sum of log p(site | ...) for each observed site (``"x"``, ``"y"``).
    kl
        Sum of KL(q | prior) for each latent site (``"z"``, ``"l"``, ``"d"``).
    training
        Sum of each training-only term (``"alignment"``, ``"mixing"``, and of a fully paired model ``"distillation"``).
    n_measured
        Number of cells in which an observed site was measured.
    n_cells
        Number of cells.
    """

    log_likelihood: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[str, Tensor] = field(default_factory=dict)
    training: dict[str, Tensor] = field(default_factory=dict)
    n_measured: dict[str, Tensor] = field(default_factory=dict)
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
        log_likelihood, kl, _, _ = self._read()
        return sum(log_likelihood.values()) - sum(kl.values())

    def _read(self) -> tuple[dict[str, float], ...]:
        """All sums as numbers: log_likelihood, kl, training, n_measured. They come from the device in one go."""
        groups = (self.log_likelihood, self.kl, self.training, self.n_measured)
        values = [value for group in groups for value in group.values()]
        numbers = iter(torch.stack(values).tolist() if values else [])
        return tuple({name: next(numbers) for name in group} for group in groups)

    def per_cell(self) -> dict[str, float]:
        """Named losses (lower is better) in nats per cell.

        ``elbo`` and ``reconstruction_loss`` carry the sign that scvi-tools gives them: they are the
        negative of what their names say. ``reconstruction_expression`` and
        ``reconstruction_accessibility`` are per *measured* cell, everything else is per cell.
        """
        n = max(self.n_cells, 1)
        log_likelihood, kl, training, n_measured = self._read()
        row = {
            "elbo": (sum(kl.values()) - sum(log_likelihood.values())) / n,
            "reconstruction_loss": -sum(log_likelihood.values()) / n,
            "kl_local": sum(kl.values()) / n,
        }
        names = {modality.counts: modality.name for modality in MODALITIES}
        for site, value in log_likelihood.items():
            row[f"reconstruction_{names.get(site, site)}"] = -value / max(n_measured[site], 1)
        row.update({f"kl_{site}": value / n for site, value in kl.items()})
        row.update({site: value / n for site, value in training.items()})
        return row


def terms_of(cells: Cells, model_trace: Trace, guide_trace: Trace) -> Terms:
    """Read the terms off a pair of traces whose log probabilities have been computed."""
    terms = Terms(n_cells=len(cells))
    for name, site in random_sites(model_trace).items():
        if not site["is_observed"]:
            # A latent that all cells share belongs to each of them in equal parts: summed over a pass, once.
            share = 1.0 if is_of_cells(site) else len(cells) / cells.n_total
            terms.kl[name] = share * _total(kl(guide_trace.nodes[name], site), site)
        else:
            terms.log_likelihood[name] = _total(log_density(site), site)
            terms.n_measured[name] = measured_at(name, site, cells).sum().double()
    for name, site in auxiliary_sites(model_trace, guide_trace).items():
        terms.kl[name] = (1.0 if is_of_cells(site) else len(cells) / cells.n_total) * _total(log_density(site), site)
    for name in TRAINING_SITES:
        if name in guide_trace.nodes:
            # A factor in the guide counts as minus log q: adding it raises the loss.
            site = guide_trace.nodes[name]
            terms.training[name] = _total(log_density(site), site)
    return terms


@torch.no_grad()
def measure(program: MultiVIProgram, cells: Cells) -> Terms:
    """Terms of one minibatch with one draw of the latents per cell."""
    return terms_of(cells, *traces_of(program, cells))


def traces_of(program: MultiVIProgram, cells: Cells) -> tuple[Trace, Trace]:
    """Traces of the model and of the guide with one draw of the latents per cell, and their log densities."""
    guide_trace = poutine.trace(program.guide).get_trace(cells)
    model_trace = poutine.trace(poutine.replay(program.model, trace=guide_trace)).get_trace(cells)
    guide_trace.compute_log_prob()
    model_trace.compute_log_prob()
    return model_trace, guide_trace


def _total(values: Tensor, site: Any) -> Tensor:
    """Sum over cells; the mean over the particles of a vectorised ELBO."""
    particles = {frame.size for frame in site["cond_indep_stack"] if frame.name == "num_particles_vectorized"}
    return values.detach().sum().double() / max(particles, default=1)


def random_sites(trace: Trace) -> dict[str, Any]:
    """Latents and data of a trace by name: its sample sites without deterministic ones and plates."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not is_deterministic(site)
    }


def auxiliary_sites(model_trace: Trace, guide_trace: Trace) -> dict[str, Any]:
    """Auxiliary sites of a guide (``infer={"is_auxiliary": True}``) whose density is part of log q.

    So it is where latents are functions of them: a Delta, with the change of volume for its log density. Where latents
    have a density given an auxiliary draw, each draw gives a bound, and a weight, of its own.
    """
    drawn, latents = random_sites(guide_trace), random_sites(model_trace)
    pairs = [(site, latents[name]) for name, site in drawn.items() if name in latents]
    if not any(is_point(site["fn"]) and not is_point(other["fn"]) for site, other in pairs):
        return {}
    # A factor has no value: it is a term of training.
    return {
        name: site
        for name, site in drawn.items()
        if site["infer"].get("is_auxiliary") and not isinstance(site["fn"], dist.Unit)
    }


def is_point(fn: Any) -> bool:
    """Whether a distribution is a Delta, of one number or of an event."""
    while isinstance(fn, (torchdist.Independent, MaskedDistribution, ExpandedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def is_deterministic(site: Any) -> bool:
    """Whether a site holds a value that follows from others (``pyro.deterministic``)."""
    return bool((site["infer"] or {}).get("_deterministic", False))


class Uncondition(UnconditionMessenger):
    """Draw what is observed, as :func:`pyro.poutine.uncondition`, and leave what follows from other sites as it is.

    Drawn anew, a deterministic site takes on the shape of its plates: the design would be (S, B, ...).
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


def log_density(site: Any) -> Tensor:
    """Log probability of a site at its value, as handlers scale and mask it, without the scale of plates."""
    return scale_and_mask(site["unscaled_log_prob"], scale=scale_of(site), mask=site["mask"])


def scale_of(site: Any) -> float | Tensor:
    """Factor of :func:`pyro.poutine.scale` at a site, without the scale of plates and of KL warm-up."""
    scale = site.get(UNANNEALED, site["scale"])
    for frame in site["cond_indep_stack"]:
        scale = scale * frame.size / (frame.full_size or frame.size)
    # To rounding errors of the plates' own.
    return scale if isinstance(scale, Tensor) or not math.isclose(scale, 1.0) else 1.0


def measured_at(name: str, site: Any, cells: Cells) -> Tensor:
    """Whether an observed site was measured, and is not hidden by a mask, in each cell, (B,), bool."""
    measured, mask = cells.measured(name), site["mask"]
    if mask is None:
        return measured
    seen = torch.as_tensor(mask, device=measured.device)
    return measured & seen.expand(*seen.shape[:-1], len(measured)).reshape(-1, len(measured)).any(0)


def kl(guide_site: Any, model_site: Any) -> Tensor:
    """KL(q | p) of each draw and cell, in closed form if there is one, else at the draw; scaled, masked as in Pyro."""
    scale = scale_of(guide_site)
    closed = _closed_kl(guide_site, model_site) if equal_scales(scale, scale_of(model_site)) else None
    if closed is None:
        return log_density(guide_site) - log_density(model_site)
    return scale_and_mask(closed, scale=scale, mask=guide_site["mask"])


def _closed_kl(guide_site: Any, model_site: Any) -> Tensor | None:
    """KL(q | p) in closed form; None if there is none."""
    try:
        closed: Tensor = kl_divergence(guide_site["fn"], model_site["fn"])
    except NotImplementedError:
        return None
    # The log density of a point is that of a change of volume, which Pyro leaves out.
    return closed + guide_site["unscaled_log_prob"] if is_point(guide_site["fn"]) else closed


def equal_scales(one: float | Tensor, other: float | Tensor) -> bool:
    """Whether two factors of sites are the same."""
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return one == other
    return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())
