"""Divergence: losses and gradients that are not finite, found without waiting for a GPU, and where they come from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import MultiVIProgram, is_of_cells
from pyro_multivi.traces import random_sites

#: Steps on a GPU after which the host looks at what has become of them: rarely enough that the wait is
#: nothing beside them, often enough that a run that diverged does not go on for long.
STEPS_UNSEEN = 100
REMEDY = "Try a smaller lr, gradient_clip=10.0, or look at the cells named."
# Parameters of more elements are not looked at in every step.
_WIDE = 1_000_000


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass
class _Step:
    """What is known of a step, on its device: its loss, its cells and, by parameter, whether a gradient is bad."""

    place: int
    loss: Tensor
    index: Tensor
    bad_gradients: Tensor | None = None


class DivergenceMonitor:
    """Looks for losses and gradients that are not finite.

    On a CPU it looks at each at once. On a GPU that would make the host wait in every step, so numbers are
    judged there: from the first bad one on the optimiser changes nothing, by the same flag as in
    mixed-precision training. When the host looks, the weights that led there and the cells are still to be found.

    Parameters
    ----------
    program
        What is trained.
    optimizer
        A fused optimiser of torch, which heeds ``found_inf``.
    train
        Where the minibatches come from.
    check_gradients
        Also look at gradients: without weights to go back to, none may be spoiled.
    steps_unseen
        Steps after which the host looks; 1 is at once. Default: by device.
    """

    def __init__(
        self,
        program: MultiVIProgram,
        optimizer: torch.optim.Optimizer,
        train: Minibatches,
        *,
        check_gradients: bool,
        steps_unseen: int | None = None,
    ) -> None:
        self.program, self.train = program, train
        if steps_unseen is None:
            steps_unseen = STEPS_UNSEEN if train.device.type == "cuda" else 1
        self._steps_unseen = steps_unseen
        self._epoch = 0
        self._last: _Step | None = None
        self._unseen: list[_Step] = []
        self._losses: list[float] = []
        # Whatever spoils a gradient of a wide layer's weights also spoils that of its bias, a thousandth of the size.
        self._watched = {
            name: parameter
            for name, parameter in program.named_parameters()
            if check_gradients and parameter.requires_grad and parameter.numel() <= _WIDE
        }
        self._spoiled: Tensor | None = None
        if steps_unseen > 1:
            self._spoiled = torch.zeros((), device=train.device)
            optimizer.found_inf = self._spoiled  # type: ignore[attr-defined]

    def begin(self, epoch: int) -> None:
        """An epoch begins."""
        self._epoch, self._last, self._unseen, self._losses = epoch, None, [], []

    def loss(self, loss: Tensor, cells: Cells, place: int) -> None:
        """The loss of a minibatch, before its gradient is formed.

        Raises
        ------
        TrainingDiverged
            If one of the losses or gradients looked at is not finite.
        """
        if len(self._unseen) >= self._steps_unseen:
            self._look()
        self._last = _Step(place, loss.detach(), cells.index)
        self._unseen.append(self._last)
        if self._spoiled is None:
            self._look()
        else:
            self._refuse(self._spoiled, ~torch.isfinite(loss.detach()))

    def gradients(self) -> None:
        """The gradients of the latest minibatch, before the optimiser takes them.

        Raises
        ------
        TrainingDiverged
            As in :meth:`loss`.
        """
        norms = [
            parameter.new_zeros(()) if parameter.grad is None else torch.linalg.vector_norm(parameter.grad)
            for parameter in self._watched.values()
        ]
        if not norms:
            return
        assert self._last is not None, "gradients() follows loss()"
        self._last.bad_gradients = ~torch.isfinite(torch.stack(norms))
        if self._spoiled is None:
            self._check_gradients(self._last.place, self._last.bad_gradients.tolist())
        else:
            self._refuse(self._spoiled, self._last.bad_gradients.any())

    def end(self) -> list[float]:
        """An epoch is over: the loss of each of its minibatches.

        Raises
        ------
        TrainingDiverged
            As in :meth:`loss`, or if the last step has spoiled a parameter, which no loss has seen yet.
        """
        self._look()
        norms = torch.stack([torch.linalg.vector_norm(parameter.detach()) for parameter in self.program.parameters()])
        if self._last is not None and not bool(torch.isfinite(norms).all()):
            raise self._diagnosis(self._last)
        return self._losses

    @staticmethod
    def _refuse(spoiled: Tensor, bad: Tensor) -> None:
        torch.maximum(spoiled, bad.to(spoiled.dtype), out=spoiled)

    def _look(self) -> None:
        """Read, in one go, what has become of the steps not seen yet."""
        steps, self._unseen = self._unseen, []
        if not steps:
            return
        losses = torch.stack([step.loss for step in steps]).tolist()
        flags = [step.bad_gradients for step in steps if step.bad_gradients is not None]
        bad_gradients = iter(torch.stack(flags).tolist() if flags else [])
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise self._diagnosis(step)
            if step.bad_gradients is not None:
                self._check_gradients(step.place, next(bad_gradients))
        self._losses += losses

    def _check_gradients(self, place: int, bad: list[bool]) -> None:
        for name, is_bad in zip(self._watched, bad, strict=True):
            if is_bad:
                raise TrainingDiverged(
                    f"Training diverged in epoch {self._epoch + 1}, minibatch {place + 1}: the gradient of parameter "
                    f"{name!r} is not finite. {REMEDY}"
                )

    def _diagnosis(self, step: _Step) -> TrainingDiverged:
        return diagnose(self.program, self.train.cut(step.index.cpu()), self._epoch, step.place)


@torch.no_grad()
def diagnose(program: MultiVIProgram, cells: Cells, epoch: int, place: int) -> TrainingDiverged:
    """Find the first parameter or site that is not finite and describe it in an error."""
    where = f"epoch {epoch + 1}, minibatch {place + 1}"
    for name, parameter in program.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return TrainingDiverged(f"Training diverged in {where}: parameter {name!r} is not finite. {REMEDY}")
    with pyro.validation_enabled(False):
        guide_trace = poutine.trace(program.guide).get_trace(cells)
        model_trace = poutine.trace(poutine.replay(program.model, trace=guide_trace)).get_trace(cells)
        guide_trace.compute_log_prob()
        model_trace.compute_log_prob()
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in random_sites(trace).items():
            bad = _bad_cells(site["unscaled_log_prob"])
            if len(bad) and not is_of_cells(site):
                return TrainingDiverged(
                    f"Training diverged in {where}: site {name!r} of the {role}, which all cells share, is not "
                    f"finite. {REMEDY}"
                )
            if len(bad):
                which = cells.index.cpu()[bad.cpu()].tolist()
                return TrainingDiverged(
                    f"Training diverged in {where}: site {name!r} of the {role} is not finite for {len(which)} "
                    f"cells, the first at positions {which[:5]} of the data. {REMEDY}"
                )
    return TrainingDiverged(f"Training diverged in {where}: the loss is not finite. {REMEDY}")


def _bad_cells(log_prob: Tensor) -> Tensor:
    flat = log_prob.reshape(-1, log_prob.shape[-1]) if log_prob.dim() else log_prob.reshape(1, 1)
    return (~torch.isfinite(flat)).any(0).nonzero().squeeze(-1)
