"""Likelihoods over a cell's whole feature vector, evaluated block by block."""

from pyro_multivi.distributions.accessibility import ScaledBernoulli
from pyro_multivi.distributions.base import measured_only
from pyro_multivi.distributions.counts import NegativeBinomialCounts, PoissonCounts, ZeroInflatedNegativeBinomialCounts
from pyro_multivi.distributions.fragments import NegativeBinomialFragments, PoissonFragments
from pyro_multivi.distributions.kernels.readout import Readout

__all__ = [
    "NegativeBinomialCounts",
    "NegativeBinomialFragments",
    "PoissonCounts",
    "PoissonFragments",
    "Readout",
    "ScaledBernoulli",
    "ZeroInflatedNegativeBinomialCounts",
    "measured_only",
]
