"""Callbacks of ``scvi.train``: taken where nothing is lost without them, else refused with what to use."""

from __future__ import annotations

from typing import Any

from pyro_multivi.data.checks import caution


class ScibCallback:
    """Taken by ``train(callbacks=[ScibCallback()])``, with a warning, since it does nothing.

    In scvi-tools it hands the model to ``scvi.autotune``, which is not here.
    """

    def __init__(self) -> None:
        caution(
            "ScibCallback() does nothing here: it serves scvi.autotune. For metrics of integration hand "
            "model.get_latent_representation() to scib-metrics after training."
        )

    def __call__(self, epoch: int, row: dict[str, float], program: Any) -> None:
        """Do nothing after an epoch."""


class SaveCheckpoint:
    """Refused: what it kept is kept by ``train()`` itself, or by a callback that saves the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "SaveCheckpoint is a callback of Lightning, by which nothing is trained here. The best epoch is kept by "
            "train(early_stopping=True, early_stopping_monitor=...); train(checkpoint=folder) keeps what a killed "
            "process had learned, and train(checkpoint=folder, resume=True) goes on from it."
        )
