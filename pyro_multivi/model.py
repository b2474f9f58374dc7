"""Namespace of scvi-tools' scripts, ``scvi.model.MULTIVI``, after ``import pyro_multivi as scvi``."""

from pyro_multivi.api.multivi import MULTIVI

__all__ = ["MULTIVI"]
