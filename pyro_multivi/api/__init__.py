"""Interface for analysts: AnnData or MuData in, frames and arrays out."""

from pyro_multivi.api.multivi import MULTIVI

__all__ = ["MULTIVI"]
