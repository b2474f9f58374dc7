"""Namespace of scvi-tools' scripts, ``scvi.train``; training itself is in :mod:`pyro_multivi.training`."""

from pyro_multivi.train._callbacks import SaveCheckpoint, ScibCallback

__all__ = ["SaveCheckpoint", "ScibCallback"]
