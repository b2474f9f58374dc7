r"""Background of a cell given a count, under each component of the mixture of proteins.

With :math:`\eta = \log m + s u` the log mean of a component and u ~ Normal(0, 1), the log-posterior of u given the
count y of a negative binomial is, but for a constant,

.. math:: h(u) = y \eta - (y + \phi) \log(\phi + e^\eta) - u^2 / 2

which is concave: a few Newton steps give its mode, its curvature there a Normal, and both together the probability of
the count under the component, by Laplace's approximation or a quadrature around the mode (Gauss-Hermite). They start
at the mode for a count that is LogNormal with variance :math:`1 / y + 1 / \phi`: away from it h bends so much less
than at it that steps from u = 0 would lead ever further, for a count of a hundred times the mean.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Each step squares the error: where s is far below 1 the second is good to a per cent.
_STEPS = 4
# Longest step of the log mean, over which the curvature changes several times.
_LONGEST = 2.0


class GivenCount(NamedTuple):
    """Posterior of u given a count and a component, elementwise.

    Attributes
    ----------
    mode, sd
        Of the Normal that approximates it.
    log_evidence
        Log-probability of the count with u integrated out, without what depends on count and dispersion alone.
    """

    mode: Tensor
    sd: Tensor
    log_evidence: Tensor


def given_count(
    y: Tensor, measured: Tensor, log_mean: Tensor, log_sd: Tensor, log_theta: Tensor, n_nodes: int = 1
) -> GivenCount:
    """Posterior of u; its prior where nothing was measured. Gradients are those of the evidence.

    Parameters
    ----------
    y, measured
        Counts, and whether each was measured, (..., F).
    log_mean
        Log mean count of the component at u = 0, (..., F).
    log_sd
        Log standard deviation of the background's logarithm.
    log_theta
        Log inverse dispersion.
    n_nodes
        Nodes of the quadrature; one is Laplace's approximation.

    Examples
    --------
    A count of four times the mean, of a background that varies by a fifth, moves it by two standard deviations:

    >>> found = given_count(torch.tensor(40.0), torch.tensor(True), torch.tensor(10.0).log(), torch.tensor(0.2).log(),
    ...                     torch.tensor(10.0).log())
    >>> found.mode.round(decimals=2), found.sd.round(decimals=2)
    (tensor(2.0100), tensor(0.8200))
    """
    known = measured.to(log_mean.dtype)
    with torch.no_grad():
        sd, total, offset = log_sd.exp(), y + log_theta.exp(), log_mean - log_theta
        log_ratio, log_variance = (y + 0.5).log() - log_mean, 1 / (y + 0.5) + (-log_theta).exp()
        mode, precision = known * sd * log_ratio / (sd.square() + log_variance), torch.ones_like(offset)
        for _ in range(_STEPS + 1):
            share = (offset + sd * mode).sigmoid()
            precision = 1 + known * sd.square() * total * share * (1 - share)
            step = (known * sd * (y - total * share) - mode) / precision
            mode = mode + torch.minimum(torch.maximum(step, -_LONGEST / sd), _LONGEST / sd)
    width = precision.rsqrt()
    points, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    parts = []
    for x, weight in zip(points, weights / np.sqrt(2 * np.pi), strict=True):
        u = mode + float(x) * width
        odds = log_mean - log_theta + log_sd.exp() * u
        likelihood = y * logsigmoid(odds) + log_theta.exp() * logsigmoid(-odds)
        parts.append(known * likelihood - 0.5 * u.square() + float(np.log(weight) + x * x / 2))
    return GivenCount(mode, width, torch.stack(parts).logsumexp(0) + width.log())
