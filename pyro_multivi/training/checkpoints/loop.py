"""State of the training loop between two steps: out to a checkpoint, and in again."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.processes.group import current
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import Terms
from pyro_multivi.training.adversary import Adversary
from pyro_multivi.training.averaging import RunningAverage
from pyro_multivi.training.divergence import DivergenceMonitor
from pyro_multivi.training.history import History, Stopwatch
from pyro_multivi.training.schedules import EarlyStopping


@dataclass
class Position:
    """Place of training between two steps, and sums over the epoch so far.

    Attributes
    ----------
    first, epoch
        Numbers of epochs before this call of training, and before the one that is going on.
    place, step
        Numbers of minibatches of this epoch, and of all, that are done.
    kl_weight
        Weight of the KL terms in the latest step.
    kept, reason
        For the last line of training: the weights it leaves as of now, and why it ended, if it has.
    terms, sizes
        Sums over the cells of this epoch so far, and the numbers of cells of its minibatches.
    order
        State of the generator from which the order of cells in this epoch was drawn.
    started
        When this epoch began, by :func:`time.perf_counter`; earlier by the time that went into it before a resume.
    """

    first: int
    epoch: int
    step: int
    kept: str
    reason: str = ""
    place: int = 0
    kl_weight: float = 0.0
    terms: Terms = field(default_factory=Terms)
    sizes: list[int] = field(default_factory=list)
    order: Tensor = field(default_factory=lambda: torch.zeros(0))
    started: float = 0.0

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch, self.place, self.terms, self.sizes = self.epoch + 1, 0, Terms(), []


@dataclass
class Loop:
    """Everything that training changes. Its state is complete between two steps, and read into one made alike."""

    position: Position
    program: MultiVIProgram
    elbo: ELBO
    optimizer: torch.optim.Optimizer
    average: RunningAverage
    best: dict[str, Tensor] | None
    stopping: EarlyStopping
    monitor: DivergenceMonitor
    adversary: Adversary | None
    history: History
    train: Minibatches
    watch: Stopwatch

    def state(self) -> dict[str, Any]:
        """Tensors, which are not copied, and plain values; all processes have the same but for the noise of each."""
        at, device = self.position, self.train.device
        # Between two epochs the order of the next is not drawn yet.
        order = at.order if at.place else self.train.order_state
        position = {**vars(at), "terms": vars(at.terms), "order": order, "started": time.perf_counter() - at.started}
        return {
            "position": position,
            "program": dict(self.program.state_dict()),
            # Found by a draw at the first step, which must not be made once more.
            "max_plate_nesting": self.elbo.max_plate_nesting,
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state(),
            "best": self.best,
            "stopping": (self.stopping.best, self.stopping.waited),
            "losses": self.monitor.losses if at.place else [],
            "adversary": None if self.adversary is None else self.adversary.state(),
            "history": [{name: float(value) for name, value in row.items()} for row in self.history.rows],
            "watch": self.watch.seconds,
            "noise": current().gather(torch.get_rng_state()),
            "noise_cuda": current().gather(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> list[float]:
        """Go on from a state, but for the noise; return the losses of the minibatches of the epoch that are done."""
        at, device = state["position"], self.train.device
        terms = tree_map(lambda part: part.to(device) if isinstance(part, Tensor) else part, at["terms"])
        began = time.perf_counter() - at["started"]
        vars(self.position).update({**at, "terms": Terms(**terms), "started": began})
        self.train.order_state = at["order"]
        self.program.load_state_dict(state["program"])
        self.elbo.max_plate_nesting = state["max_plate_nesting"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.restore(state["average"])
        for name, value in (self.best or {}).items():
            value.copy_(state["best"][name])
        self.stopping.best, self.stopping.waited = state["stopping"]
        if self.adversary is not None:
            self.adversary.restore(state["adversary"])
        self.history.rows[:] = state["history"]
        self.watch.seconds.update(state["watch"])
        return state["losses"]

    def restore_noise(self, state: dict[str, Any]) -> None:
        """Set torch's generators to those of a state."""
        rank = current().rank
        torch.set_rng_state(state["noise"][rank])
        if self.train.device.type == "cuda":
            torch.cuda.set_rng_state(state["noise_cuda"][rank], self.train.device)
