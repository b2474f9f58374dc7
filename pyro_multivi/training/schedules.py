"""Schedules: weight of the KL terms, early stopping. The model is unaware of either."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample

from pyro_multivi.traces import UNANNEALED
from pyro_multivi.training.options import FitOptions


class AnnealLatents(Messenger):
    """Scale log p and log q of every latent site; likelihoods and factors are left alone.

    Wrapped around an ELBO it multiplies the KL terms by ``weight``, also of latents that an
    extension adds. ``weight`` may be 0.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not site_is_subsample(msg):
            msg[UNANNEALED] = msg["scale"]
            msg["scale"] = self.weight * msg["scale"]


def kl_weight(epoch: int, step: int, n_epochs: int | None, n_steps: int | None) -> float:
    """Weight of the KL terms in a linear warm-up from 0 to 1, over steps if ``n_steps`` is given, else epochs.

    Examples
    --------
    >>> kl_weight(epoch=5, step=0, n_epochs=10, n_steps=None)
    0.5
    """
    if n_steps is not None:
        return min(1.0, step / n_steps) if n_steps else 1.0
    return min(1.0, epoch / n_epochs) if n_epochs else 1.0


def default_patience(n_held_out: int) -> int:
    """Scored epochs without improvement before stopping: the fewer cells are held out, the noisier their score.

    Examples
    --------
    >>> [default_patience(n_cells) for n_cells in (20, 50, 100, 100_000)]
    [30, 20, 10, 10]
    """
    return min(30, max(10, round(1000 / max(1, n_held_out))))


@dataclass
class EarlyStopping:
    """Stop when a loss no longer falls.

    Parameters
    ----------
    monitor
        Column of the history; lower is better.
    patience
        Epochs without improvement before stopping.
    min_delta
        Smallest fall that counts as an improvement, in the unit of the loss (nats per cell).
    """

    monitor: str
    patience: int
    min_delta: float
    best: float = math.inf
    waited: int = 0

    @classmethod
    def wanted(cls, options: FitOptions, n_held_out: int | None) -> EarlyStopping:
        """As the options ask for; of endless patience without held-out cells (None), which there are no scores of."""
        patience = options.early_stopping_patience
        if n_held_out is None or not options.early_stopping:
            patience = options.max_epochs + 1
        elif patience is None:
            patience = default_patience(n_held_out)
        return cls(options.early_stopping_monitor, patience, options.early_stopping_min_delta)

    def update(self, value: float) -> bool:
        """Take in the loss of an epoch; return whether it is the best so far."""
        if value < self.best - self.min_delta:
            self.best, self.waited = value, 0
            return True
        self.waited += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.waited >= self.patience
