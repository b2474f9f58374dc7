"""Where to train."""

from __future__ import annotations

import torch


def resolve_device(accelerator: str, devices: int | str = "auto") -> torch.device:
    """The torch device meant by scvi-tools' ``accelerator`` and ``devices``."""
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
