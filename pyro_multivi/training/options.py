"""Options of training, and the device that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro.infer import ELBO

from pyro_multivi.data.checks import check_choice, check_fields, check_number, check_type, checked, shown, unwrapped
from pyro_multivi.networks.modules import PRECISIONS
from pyro_multivi.processes.group import current, local_rank
from pyro_multivi.program import MultiVIProgram

#: Called after each epoch with its number, its row of the history and the program, which has the weights that it would
#: have if training ended now; True stops training.
Callback = Callable[[int, dict[str, float], MultiVIProgram], bool | None]

#: Words of Lightning, which scvi-tools hands on, for our ones. 16 bits are bfloat16, as Lightning's are on a CPU.
_PRECISIONS = {"32": "fp32", "32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "bf16", "16": "bf16"}


@dataclass(frozen=True)
class FitOptions:
    """Options of :func:`~pyro_multivi.training.fit`, checked when they are made.

    Each field is an argument of :meth:`pyro_multivi.MULTIVI.train`, where it is described, with the same default; only
    ``early_stopping`` is False by default, and ``max_epochs`` does not depend on the model.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range or of the wrong type.

    Examples
    --------
    >>> FitOptions(max_epochs=50, early_stopping=True, early_stopping_patience=10).lr
    0.002
    >>> FitOptions(max_epochs=-1)
    Traceback (most recent call last):
    ValueError: max_epochs=-1 is not allowed: give a whole number of at least 0.
    """

    max_epochs: int = 500
    lr: float = 2e-3
    weight_decay: float = 1e-3
    eps: float = 1e-8
    early_stopping: bool = False
    check_val_every_n_epoch: int | None = 1
    n_steps_kl_warmup: int | None = None
    n_epochs_kl_warmup: int | None = 1
    early_stopping_monitor: str = "elbo_validation"
    early_stopping_patience: int | None = None
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
        object.__setattr__(self, "callbacks", _functions(self.callbacks))
        object.__setattr__(self, "precision", _PRECISIONS.get(str(self.precision), self.precision))
        if self.elbo is not None:
            check_type("elbo", self.elbo, ELBO, ": give an ELBO of Pyro, or None")
        check_fields(self, FitOptions)
        # None is the default of Lightning: every epoch.
        object.__setattr__(self, "check_val_every_n_epoch", self.check_val_every_n_epoch or 1)
        check_number("eps", self.eps, above=0)
        for name in ("lr", "weight_decay", "early_stopping_min_delta"):
            check_number(name, getattr(self, name), least=0)
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
            value = getattr(self, name)
            if not isinstance(value, str) or value not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"{name}={shown(value)} is not allowed: choose {choices}.")
        check_number("adversarial_weight", self.adversarial_weight, least=0)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> FitOptions:
        """Pick the options by name from the arguments of a call, its ``locals()``."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls)})


def _functions(callbacks: Any) -> tuple[Callback, ...]:
    """Callbacks as a tuple; None is none."""
    several = callbacks is None or isinstance(callbacks, Iterable)
    found = tuple(callbacks or ()) if several else (callbacks,)
    wrong = [each for each in found if not callable(each)]
    if not several or wrong:
        raise TypeError(
            f"callbacks={shown(callbacks)} is not allowed: give a list of functions of (epoch, row, program)"
            f"{f'; {shown(wrong[0])} is no function' if several else ''}."
        )
    return found


@checked
def resolve_device(accelerator: str, devices: int | str = "auto") -> torch.device:
    """The torch device meant by scvi-tools' ``accelerator`` and ``devices``.

    Raises
    ------
    ValueError
        If there is no such accelerator, or no GPU.
    """
    check_choice("accelerator", accelerator, ("auto", "cpu", "gpu", "cuda"))
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and n_gpus > 0)
    if on_gpu and not n_gpus:
        raise ValueError(f"accelerator={accelerator!r}, but torch finds no GPU: use accelerator='cpu' or 'auto'.")
    # Numbers of devices in scvi-tools. 1: as everywhere here. -1: all that there are for this process.
    default = ("auto", "1", "-1")
    known = default[:2] if on_gpu and n_gpus > 1 and not current().are_several else default
    wanted = unwrapped(devices)
    if on_gpu and isinstance(wanted, (list, tuple)) and len(wanted) == 1 and wanted[0] in range(n_gpus):
        return torch.device(f"cuda:{wanted[0]}")  # Of a list the entries are numbers of GPUs, also 1.
    valid = isinstance(wanted, (int, str)) and not isinstance(wanted, bool)
    text = str(wanted)
    if not valid or text not in (*known, *(map(str, range(n_gpus)) if on_gpu else ())):
        allowed = f", or the number of a GPU below {n_gpus}" if on_gpu else " (training runs on one processor)"
        if on_gpu and n_gpus > 1:
            allowed += f". To train on {n_gpus} at once: torchrun --nproc-per-node {n_gpus}"
        raise ValueError(f"devices={shown(devices)} is not allowed: give 'auto' or 1{allowed}.")
    number = "" if text in known else f":{text}"
    if on_gpu and not number and current().are_several:
        number = f":{local_rank()}"
        if local_rank() >= n_gpus:
            raise ValueError(
                f"LOCAL_RANK={local_rank()} has no GPU of its own: there are {n_gpus}. Start no more processes on this "
                "machine (torchrun --nproc-per-node), or give accelerator='cpu'."
            )
    return torch.device(f"cuda{number}" if on_gpu else "cpu")
