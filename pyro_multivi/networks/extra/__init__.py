"""Extra modalities, those besides RNA and ATAC: each one object with its networks and its statements."""

from pyro_multivi.networks.extra.modality import ExtraModality
from pyro_multivi.networks.extra.proteins import Proteins

__all__ = ["ExtraModality", "Proteins"]
