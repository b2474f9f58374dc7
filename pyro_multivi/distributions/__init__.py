"""Likelihoods over a cell's whole feature vector, evaluated block by block."""

from pyro_multivi.distributions.accessibility import ScaledBernoulli
from pyro_multivi.distributions.base import measured_only
from pyro_multivi.distributions.counts import NegativeBinomialCounts, PoissonCounts, ZeroInflatedNegativeBinomialCounts
from pyro_multivi.distributions.kernels.readout import Readout

__all__ = [
    "NegativeBinomialCounts",
    "PoissonCounts",
    "Readout",
    "ScaledBernoulli",
    "ZeroInflatedNegativeBinomialCounts",
    "measured_only",
]
