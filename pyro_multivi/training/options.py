"""Options of training, and the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_multivi.data.checks import check_choice
from pyro_multivi.networks.modules import PRECISIONS
from pyro_multivi.program import MultiVIProgram

#: Called after each epoch with its number, its row of the history and the program, which has the weights that it would
#: have if training ended now; True stops training.
Callback = Callable[[int, dict[str, float], MultiVIProgram], bool | None]


@dataclass(frozen=True)
class FitOptions:
    """Options of :func:`~pyro_multivi.training.fit`, checked when they are made.

    Each field is an argument of :meth:`pyro_multivi.MULTIVI.train`, where it is described, with the same default; only
    ``early_stopping`` is False by default.

    Raises
    ------
    ValueError
        If an option is out of range.

    Examples
    --------
    >>> FitOptions(max_epochs=50, early_stopping=True, early_stopping_patience=10).lr
    0.001
    >>> FitOptions(max_epochs=0)
    Traceback (most recent call last):
    ValueError: max_epochs=0 is not allowed: give at least 1.
    """

    max_epochs: int = 500
    lr: float = 1e-3
    weight_decay: float = 1e-3
    eps: float = 1e-8
    early_stopping: bool = False
    check_val_every_n_epoch: int = 1
    n_steps_kl_warmup: int | None = None
    n_epochs_kl_warmup: int | None = 1
    early_stopping_monitor: str = "elbo_validation"
    early_stopping_patience: int = 30
    early_stopping_min_delta: float = 0.0
    gradient_clip: float | None = None
    seed: int = 0
    callbacks: Sequence[Callback] = ()
    progress_bar: bool = True
    elbo: ELBO | None = None
    precision: str = "fp32"
    compile: bool = False
    effect_sd: float | None = 1.0
    average_steps: int | None = 100
    adversarial_mixing: bool | None = None
    adversarial_target: str = "modality"
    adversarial_weight: float = 1.0
    adversarial_schedule: str = "warmup"

    def __post_init__(self) -> None:
        object.__setattr__(self, "callbacks", tuple(self.callbacks))
        for name, least in (
            ("max_epochs", 1),
            ("check_val_every_n_epoch", 1),
            ("early_stopping_patience", 1),
            ("average_steps", 1),
            ("n_epochs_kl_warmup", 0),
            ("n_steps_kl_warmup", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} is not allowed: give at least {least}.")
        if self.effect_sd is not None and not self.effect_sd > 0:
            raise ValueError(
                f"effect_sd={self.effect_sd} is not allowed: give a standard deviation above 0, or None for no prior."
            )
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"gradient_clip={self.gradient_clip} is not allowed: give a norm above 0, or None.")
        check_choice("precision", self.precision, list(PRECISIONS))
        for name, allowed in (
            ("adversarial_target", ("modality", "batch")),
            ("adversarial_schedule", ("warmup", "constant")),
        ):
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"{name}={getattr(self, name)!r} is not allowed: choose {choices}.")
        if not 0 < self.adversarial_weight < float("inf"):
            raise ValueError(
                f"adversarial_weight={self.adversarial_weight} is not allowed: give a finite number above 0, "
                "or adversarial_mixing=False for no adversary."
            )

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> FitOptions:
        """Pick the options by name from the arguments of a call, its ``locals()``."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})


def resolve_device(accelerator: str, devices: int | str = "auto") -> torch.device:
    """The torch device meant by scvi-tools' ``accelerator`` and ``devices``.

    Raises
    ------
    ValueError
        If there is no such accelerator, or no GPU.
    """
    number = "" if devices in ("auto", 1, "1") else f":{devices}"
    if accelerator == "auto":
        return torch.device(f"cuda{number}" if torch.cuda.is_available() else "cpu")
    if accelerator == "cpu":
        return torch.device("cpu")
    if accelerator in ("gpu", "cuda"):
        if not torch.cuda.is_available():
            raise ValueError(f"accelerator={accelerator!r}, but torch finds no GPU: use accelerator='cpu' or 'auto'.")
        return torch.device(f"cuda{number}")
    raise ValueError(f"accelerator={accelerator!r} is not allowed: choose 'auto', 'cpu', 'gpu' or 'cuda'.")
