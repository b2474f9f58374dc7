"""Divergence of training: a monitor that finds it without waiting for a GPU, and the diagnosis of its origin."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import is_of_cells, log_density, random_sites, traces_of
from pyro_multivi.training.objective import NegativeELBO

#: Steps on a GPU from one check by the host to the next: rarely enough that the wait is nothing beside them, often
#: enough that a run that diverged does not go on for long.
STEPS_BETWEEN_CHECKS = 100
# Gradients of more elements are not checked in every step.
_WIDE = 1_000_000


class TrainingDiverged(ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass
class _Step:
    """A step that the host has not checked yet: position of its minibatch, loss, cells, gradients not finite."""

    place: int
    loss: Tensor
    index: Tensor
    bad_gradients: Tensor | None = None


class DivergenceMonitor:
    """Monitor of losses and gradients that are not finite.

    On a CPU each is checked at once. On a GPU that would make the host wait in every step, so the check
    runs there: from the first bad number on the optimiser changes nothing, by the same flag as in mixed-precision
    training. When the host reads the results, the weights that led there and the cells are still to be found.

    Parameters
    ----------
    optimizer
        A fused optimiser of torch, which heeds ``found_inf``.
    check_gradients
        Also check gradients: without weights to go back to, no step may be taken along a bad one.
    check_every
        Steps from one check by the host to the next; 1 is at once. Default: by device.
    """

    def __init__(
        self,
        program: MultiVIProgram,
        optimizer: torch.optim.Optimizer,
        train: Minibatches,
        *,
        check_gradients: bool,
        check_every: int | None = None,
    ) -> None:
        self.program, self.train = program, train
        if check_every is None:
            check_every = STEPS_BETWEEN_CHECKS if train.device.type == "cuda" else 1
        self._check_every = check_every
        self._epoch = 0
        self._last: _Step | None = None
        self._unchecked: list[_Step] = []
        self._losses: list[float] = []
        # A bad gradient of a wide layer's weights shows in that of its bias, which is a thousandth of the size.
        self._parameters = {
            name: parameter
            for name, parameter in program.named_parameters()
            if check_gradients and parameter.requires_grad and parameter.numel() <= _WIDE
        }
        self._found_inf: Tensor | None = None
        if check_every > 1:
            self._found_inf = torch.zeros((), device=train.device)
            optimizer.found_inf = self._found_inf  # type: ignore[attr-defined]

    def begin_epoch(self, epoch: int, losses: Sequence[float] = ()) -> None:
        """Start an epoch, or go on with one of whose first minibatches the losses are given."""
        self._epoch, self._last, self._unchecked, self._losses = epoch, None, [], [*losses]

    @property
    def losses(self) -> list[float]:
        """Loss of each minibatch of the epoch so far, all of them checked."""
        self._read()
        return self._losses

    def check_loss(self, loss: Tensor, cells: Cells, place: int) -> None:
        """Check the loss of the minibatch at position ``place`` of the epoch, before its gradient is formed.

        Raises
        ------
        TrainingDiverged
            If one of the losses or gradients checked is not finite.
        """
        if len(self._unchecked) >= self._check_every:
            self._read()
        self._last = _Step(place, loss.detach(), cells.index)
        self._unchecked.append(self._last)
        if self._found_inf is None:
            self._read()
        else:
            self._flag(self._found_inf, ~torch.isfinite(loss.detach()))

    def check_gradients(self) -> None:
        """Check the gradients of the latest minibatch as :meth:`check_loss`, before the optimiser applies them."""
        norms = [
            parameter.new_zeros(()) if parameter.grad is None else torch.linalg.vector_norm(parameter.grad)
            for parameter in self._parameters.values()
        ]
        if not norms:
            return
        assert self._last is not None, "check_gradients() follows check_loss()"
        self._last.bad_gradients = ~torch.isfinite(torch.stack(norms))
        if self._found_inf is None:
            self._refuse_gradients(self._last.place, self._last.bad_gradients.tolist())
        else:
            self._flag(self._found_inf, self._last.bad_gradients.any())

    def end_epoch(self) -> list[float]:
        """Check the rest of an epoch, and return the loss of each of its minibatches.

        Raises
        ------
        TrainingDiverged
            As in :meth:`check_loss`, or if a parameter is not finite after the last step, which no loss shows yet.
        """
        self._read()
        norms = torch.stack([torch.linalg.vector_norm(parameter.detach()) for parameter in self.program.parameters()])
        if self._last is not None and not bool(torch.isfinite(norms).all()):
            raise self._diagnosis(self._last)
        return self._losses

    @staticmethod
    def _flag(found_inf: Tensor, bad: Tensor) -> None:
        torch.maximum(found_inf, bad.to(found_inf.dtype), out=found_inf)

    def _read(self) -> None:
        """Read losses and gradient checks of the steps not checked yet from the device, in one go."""
        steps, self._unchecked = self._unchecked, []
        if not steps:
            return
        losses = torch.stack([step.loss for step in steps]).tolist()
        flags = [step.bad_gradients for step in steps if step.bad_gradients is not None]
        bad_gradients = iter(torch.stack(flags).tolist() if flags else [])
        for step, loss in zip(steps, losses, strict=True):
            if not math.isfinite(loss):
                raise self._diagnosis(step)
            if step.bad_gradients is not None:
                self._refuse_gradients(step.place, next(bad_gradients))
        self._losses += losses

    def _refuse_gradients(self, place: int, bad: list[bool]) -> None:
        for name, is_bad in zip(self._parameters, bad, strict=True):
            if is_bad:
                raise _error(self._epoch, place, f"the gradient of parameter {name!r} is not finite")

    def _diagnosis(self, step: _Step) -> TrainingDiverged:
        return diagnose(self.program, self.train.cut(step.index.cpu()), self._epoch, step.place)


def loss_of(
    objective: NegativeELBO, cells: Cells, kl_weight: float, epoch: int, place: int, *, validate: bool
) -> Tensor:
    """Loss of a minibatch, at position ``place`` of the epoch; ``validate`` has Pyro check shapes and supports.

    Raises
    ------
    TrainingDiverged
        If Pyro's checks refuse a number that is not finite. Without them such a loss is returned.
    """
    try:
        with pyro.validation_enabled(validate), _no_nan_warning():
            return objective(cells, kl_weight)
    except ValueError as error:
        # Pyro's words for it name no cell.
        if validate and not _is_finite(objective, cells, kl_weight):
            raise diagnose(objective.program, cells, epoch, place) from error
        raise


@torch.no_grad()
def _is_finite(objective: NegativeELBO, cells: Cells, kl_weight: float) -> bool:
    with pyro.validation_enabled(False), _no_nan_warning():
        return math.isfinite(objective(cells, kl_weight).item())


@contextmanager
def _no_nan_warning() -> Iterator[None]:
    """Without Pyro's warning of a NaN loss: the error that training ends with says more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|.*inf)", category=UserWarning)
        yield


@torch.no_grad()
def diagnose(program: MultiVIProgram, cells: Cells, epoch: int, place: int) -> TrainingDiverged:
    """Error that names the first parameter or site that is not finite, and the cells concerned."""
    for name, parameter in program.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return _error(epoch, place, f"parameter {name!r} is not finite")
    with pyro.validation_enabled(False):
        model_trace, guide_trace = traces_of(program, cells)
    for role, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, site in random_sites(trace).items():
            bad = _bad_cells(log_density(site))
            if len(bad) and not is_of_cells(site):
                return _error(epoch, place, f"site {name!r} of the {role}, which all cells share, is not finite")
            if len(bad):
                which = cells.index.cpu()[bad.cpu()].tolist()
                found = f"not finite for {len(which)} cells, the first at positions {which[:5]} of the data"
                return _error(epoch, place, f"site {name!r} of the {role} is {found}", of_cells=True)
    return _error(epoch, place, "the loss is not finite")


def _error(epoch: int, place: int, found: str, *, of_cells: bool = False) -> TrainingDiverged:
    remedy = ", gradient_clip=10.0, or look at these cells" if of_cells else " or gradient_clip=10.0"
    return TrainingDiverged(
        f"Training diverged in epoch {epoch + 1}, minibatch {place + 1}: {found}. Try a smaller lr{remedy}."
    )


def _bad_cells(log_prob: Tensor) -> Tensor:
    flat = log_prob.reshape(-1, log_prob.shape[-1]) if log_prob.dim() else log_prob.reshape(1, 1)
    return (~torch.isfinite(flat)).any(0).nonzero().squeeze(-1)
