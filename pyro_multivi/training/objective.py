"""The loss that training minimises."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pyro.infer import ELBO, TraceMeanField_ELBO
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions.blockwise import equal_weights
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.terms import Terms, terms_of
from pyro_multivi.training.schedules import AnnealLatents


class NegativeELBO(nn.Module):
    """Minus the ELBO in nats per cell (plus the guide's training terms), as a module.

    Being a module that owns the program, it is what DistributedDataParallel or any torch
    trainer wraps.

    Parameters
    ----------
    program
        Model and guide.
    elbo
        A Pyro ELBO. Default: ``TraceMeanField_ELBO``, with KL terms in closed form. A guide that
        is not mean-field needs ``Trace_ELBO()``.
    """

    def __init__(self, program: MultiVIProgram, elbo: ELBO | None = None) -> None:
        super().__init__()
        self.program = program
        # A copy: an ELBO object remembers the first model it sees, and ours also keeps its traces.
        self.elbo: Any = copy.copy(elbo if elbo is not None else TraceMeanField_ELBO())
        self._traces: tuple[Trace, Trace] | None = None
        make_traces = self.elbo._get_trace

        def keep_traces(*args: Any, **kwargs: Any) -> tuple[Trace, Trace]:
            self._traces = make_traces(*args, **kwargs)
            return self._traces

        self.elbo._get_trace = keep_traces  # type: ignore[method-assign,unused-ignore]

    def forward(self, cells: Cells, kl_weight: float = 1.0) -> Tensor:
        """Loss of a minibatch, an unbiased estimate of the loss of all ``cells.n_total`` cells."""
        with AnnealLatents(kl_weight), self._weights(cells):
            loss: Tensor = self.elbo.differentiable_loss(self.program.model, self.program.guide, cells)
        return loss / cells.n_total

    def _weights(self, cells: Cells) -> AbstractContextManager[None]:
        # Knowing that a cell's likelihood will enter with -1 / B, the block-wise likelihoods form final
        # gradients on the way. On the CPU they check it; elsewhere checking would stall the device, so the
        # promise is only made for a program without weights of its own.
        if cells.device.type != "cpu" and type(self.program) is not MultiVIProgram:
            return nullcontext()
        return equal_weights(-1.0 / len(cells))

    def last_terms(self, cells: Cells) -> Terms:
        """Terms of the latest minibatch, without evaluating anything again; frees its traces."""
        assert self._traces is not None, "last_terms() follows forward()"
        model_trace, guide_trace = self._traces
        self._traces = None
        return terms_of(cells, model_trace, guide_trace)
