"""Encoders and decoders: plain ``nn.Module``s that know neither AnnData nor training."""

from pyro_multivi.networks.decoders import AccessibilityDecoder, Decoded, ExpressionDecoder
from pyro_multivi.networks.encoders import LibraryHead, ModalityReader, NormalHead
from pyro_multivi.networks.layers import CountsLinear, CovariateStack

__all__ = [
    "AccessibilityDecoder",
    "CountsLinear",
    "CovariateStack",
    "Decoded",
    "ExpressionDecoder",
    "LibraryHead",
    "ModalityReader",
    "NormalHead",
]
