"""Functions that tests for scvi-tools import from ``scvi.data._utils``."""

__all__ = []
