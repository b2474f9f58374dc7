"""Functions that tests for scvi-tools import from ``scvi.data._utils``."""

from __future__ import annotations

from typing import Any

from pyro_multivi.data.minified.layout import kind_of

__all__ = ["_is_minified"]


def _is_minified(adata: Any) -> bool:
    """Whether an AnnData or MuData holds a posterior in place of counts."""
    return kind_of(adata) is not None
