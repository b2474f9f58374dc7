"""Posterior quantities of cells from a trained program: tensors in, arrays out."""

from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.posterior.quantities.summary import Estimate

__all__ = ["Estimate", "draw"]
