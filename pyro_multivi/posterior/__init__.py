"""What a trained program says of cells: tensors in, arrays out."""

from pyro_multivi.posterior.draws import draw
from pyro_multivi.posterior.summary import Estimate

__all__ = ["Estimate", "draw"]
