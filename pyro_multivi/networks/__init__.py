"""Encoders and decoders: plain ``nn.Module``s, independent of AnnData and of training."""

from pyro_multivi.networks.decoders import AccessibilityDecoder, DecodedExpression, ExpressionDecoder
from pyro_multivi.networks.encoders import LibraryHead, NormalHead, SharedFirstLayer
from pyro_multivi.networks.layers import CountsLinear, CovariateStack

__all__ = [
    "AccessibilityDecoder",
    "CountsLinear",
    "CovariateStack",
    "DecodedExpression",
    "ExpressionDecoder",
    "LibraryHead",
    "NormalHead",
    "SharedFirstLayer",
]
