"""Objective of training: minus the ELBO."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO, JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions.kernels.gradients import equal_weights
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import Terms, measure, terms_of
from pyro_multivi.training.adversary import Adversary
from pyro_multivi.training.schedules import AnnealLatents


class MeanFieldELBO(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO`` without waiting for a GPU.

    Pyro reads the value of the loss twice a step, for which the host has to wait. Value and
    gradients are the same, and so are its checks while validation is on.

    Examples
    --------
    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(torch.tensor(1.0), 1.0))
    >>> with pyro.validation_enabled(False):
    ...     MeanFieldELBO().differentiable_loss(model, guide)
    tensor(1.5439)
    """

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Minus the ELBO, a scalar to differentiate."""
        if is_validation_enabled():
            return super().differentiable_loss(model, guide, *args, **kwargs)
        loss: Any = 0.0
        for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
            loss = loss - _elbo(model_trace, guide_trace) / self.num_particles
        return loss


def _elbo(model_trace: Trace, guide_trace: Trace) -> Any:
    """Evidence lower bound of a pair of traces, KL terms in closed form where there is one."""
    sites: dict[str, Any] = {name: site for name, site in model_trace.nodes.items() if site["type"] == "sample"}
    drawn: dict[str, Any] = {name: site for name, site in guide_trace.nodes.items() if site["type"] == "sample"}
    elbo: Any = 0.0
    for name, site in sites.items():
        if site["is_observed"]:
            elbo = elbo + site["log_prob_sum"]
            continue
        guided = drawn[name]
        try:
            kl = scale_and_mask(kl_divergence(guided["fn"], site["fn"]), guided["scale"], guided["mask"])
            elbo = elbo - kl.sum()
        except NotImplementedError:
            elbo = elbo + site["log_prob_sum"] - guided["score_parts"].entropy_term.sum()
    for name, guided in drawn.items():
        if name not in sites:
            # A factor of the guide.
            elbo = elbo - guided["score_parts"].entropy_term.sum()
    return elbo


class NegativeELBO(nn.Module):
    """Minus the ELBO in nats per cell (plus the guide's training terms), as a module.

    Being a module that owns the program, it is what DistributedDataParallel or any torch trainer wraps.

    Parameters
    ----------
    elbo
        A Pyro ELBO. Default: ``TraceMeanField_ELBO``, with KL terms in closed form. A guide that
        is not mean-field needs ``Trace_ELBO()``.
    adversary
        Adds its penalty to the loss. It is no part of the module: its classifier is not trained by this loss.

    Raises
    ------
    TypeError
        If the ELBO has no differentiable loss, or one of Pyro's that are compiled.
    """

    def __init__(self, program: MultiVIProgram, elbo: ELBO | None = None, adversary: Adversary | None = None) -> None:
        super().__init__()
        self.program = program
        self.adversary = adversary
        if elbo is not None and not hasattr(elbo, "differentiable_loss"):
            raise TypeError(
                f"elbo={type(elbo).__name__} has no differentiable_loss(model, guide, cells): use Trace_ELBO, "
                "TraceMeanField_ELBO or a class of your own that has one, or train with pyro.infer.SVI."
            )
        if isinstance(elbo, (JitTrace_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)):
            raise TypeError(
                f"elbo={type(elbo).__name__} compiles a model of tensors, and this one is of Cells: use "
                "Trace_ELBO or TraceMeanField_ELBO."
            )
        # A copy: an ELBO object remembers the first model it sees, and ours also keeps its traces.
        self.elbo: Any = copy.copy(elbo if elbo is not None else MeanFieldELBO())
        self._traces: tuple[Trace, Trace] | None = None
        make_traces = self.elbo._get_trace

        def keep_traces(*args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
            self._traces = make_traces(*args, **kwargs)
            return self._traces

        self.elbo._get_trace = keep_traces  # type: ignore[method-assign,unused-ignore]

    def forward(self, cells: Cells, kl_weight: float = 1.0) -> Tensor:
        """Loss of a minibatch, an unbiased estimate of the loss of all ``cells.n_total`` cells."""
        with AnnealLatents(kl_weight), self._equal_weights(cells):
            loss: Tensor = self.elbo.differentiable_loss(self.program.model, self.program.guide, cells)
        loss = loss / cells.n_total
        return loss if self.adversary is None else loss + self._adversarial(self.adversary, cells, kl_weight)

    def _adversarial(self, adversary: Adversary, cells: Cells, kl_weight: float) -> Tensor:
        """Weighted penalty of the adversary at the z of the latest traces."""
        if self._traces is None:
            raise TypeError(
                f"adversarial_mixing=True reads z from the traces of the ELBO, and elbo={type(self.elbo).__name__} "
                "keeps none: derive it from Trace_ELBO, or leave adversarial_mixing out."
            )
        site: Any = self._traces[1].nodes["z"]
        options = adversary.options
        weight = options.adversarial_weight * (kl_weight if options.adversarial_schedule == "warmup" else 1.0)
        return weight * adversary.penalty(self.program.transform(site["value"]), cells)

    def _equal_weights(self, cells: Cells) -> AbstractContextManager[None]:
        """Promise that each cell's likelihood enters the loss with weight -1 / B.

        Block-wise likelihoods then form final gradients on the way. On the CPU they check it; elsewhere
        checking would stall the device, so the promise is only made for a program and an ELBO without weights of
        their own.
        """
        plain = (Trace_ELBO, TraceMeanField_ELBO, MeanFieldELBO)
        if cells.device.type != "cpu" and not (type(self.program) is MultiVIProgram and type(self.elbo) in plain):
            return nullcontext()
        return equal_weights(-1.0 / len(cells))

    def last_terms(self, cells: Cells) -> Terms:
        """Terms of the latest minibatch, without evaluating anything again; frees its traces.

        A custom ELBO that does not make its traces by ``_get_trace`` leaves none, and those of an ELBO that enumerates
        hold every value of a site, also unlikely ones: then the terms are those of another draw.
        """
        traces, self._traces = self._traces, None
        if traces is None or any(_is_enumerated(site) for site in traces[1].nodes.values()):
            return measure(self.program, cells)
        return terms_of(cells, *traces)


def _is_enumerated(site: Any) -> bool:
    return site["type"] == "sample" and site["infer"].get("_enumerate_dim") is not None
