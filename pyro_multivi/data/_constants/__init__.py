"""Constants that tests for scvi-tools import from ``scvi.data._constants``."""

from pyro_multivi.utils import ADATA_MINIFY_TYPE

__all__ = ["ADATA_MINIFY_TYPE"]
