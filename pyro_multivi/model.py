"""Namespace of scvi-tools' scripts, ``scvi.model.MULTIVI``, after ``import pyro_multivi as scvi``."""

from typing import TYPE_CHECKING, Any

from pyro_multivi.api.multivi import MULTIVI

__all__ = ["MULTIVI"]

if not TYPE_CHECKING:  # A type checker would take every name for one that is here.

    def __getattr__(name: str) -> Any:
        what = "for other models import scvi-tools itself, under another name"
        if name == "utils":
            what = "in place of utils.mde call scanpy.tl.umap"
        raise AttributeError(f"module {__name__!r} has MULTIVI and no attribute {name!r}: {what}.")
