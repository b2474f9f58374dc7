"""Namespace of scvi-tools' scripts, ``scvi.train``; training itself is in :mod:`pyro_multivi.training`."""

from typing import TYPE_CHECKING, Any

from pyro_multivi.train._callbacks import SaveCheckpoint, ScibCallback

__all__ = ["SaveCheckpoint", "ScibCallback"]

if not TYPE_CHECKING:  # A type checker would take every name for one that is here.

    def __getattr__(name: str) -> Any:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}: nothing is trained by Lightning here. MULTIVI.train() "
            "stops early and keeps the best weights itself (early_stopping, early_stopping_monitor, "
            "early_stopping_patience), and its callbacks are functions of (epoch, row, program)."
        )
