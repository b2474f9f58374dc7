"""Devices by the words of scvi-tools: ``use_gpu`` and ``accelerator``, of its older and newer versions."""

from __future__ import annotations

from typing import Any

from pyro_multivi.data.checks import shown, unwrapped


def of_use_gpu(value: Any) -> tuple[str, int | None]:
    """The accelerator that ``use_gpu`` means, and the number of the GPU if it names one."""
    wanted = unwrapped(value)
    if wanted is None or isinstance(wanted, bool):
        return ("auto" if wanted is None else "gpu" if wanted else "cpu"), None
    if isinstance(wanted, int) and wanted >= 0:
        return "gpu", wanted
    if isinstance(wanted, str):
        name, _, number = wanted.partition(":")
        if name in ("cuda", "gpu") and number.isdecimal():
            return "gpu", int(number)
        if wanted in ("auto", "cpu", "gpu", "cuda"):
            return wanted, None
    raise ValueError(
        f"use_gpu={shown(value)} is not allowed: give True, False, the number of a GPU, its name 'cuda:0', or None."
    )


def load_arguments(given: dict[str, Any]) -> list[str]:
    """``accelerator`` and ``use_gpu`` of ``load`` as a device, and a device by its number."""
    wanted = given.pop("accelerator", None)
    number = unwrapped(given.get("device", "auto"))
    if "use_gpu" in given:
        accelerator, named = of_use_gpu(given.pop("use_gpu"))
        wanted = wanted if accelerator == "auto" else accelerator
        number = number if named is None else named
    numbered = isinstance(number, int) and not isinstance(number, bool)
    if wanted in ("gpu", "cuda"):
        given["device"] = f"cuda:{number}" if numbered else "cuda" if number in ("auto", 1) else number
    elif wanted == "cpu":
        given["device"] = "cpu"
    elif wanted not in (None, "auto"):
        raise ValueError(
            f"accelerator={shown(wanted)} is not allowed: give 'auto', 'cpu' or 'gpu', or device='cuda:0'."
        )
    elif numbered:
        given["device"] = f"cuda:{number}"
    return []
