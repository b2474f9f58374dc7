r"""Counts of fragments in place of open regions: depth, rates of regions and likelihood of a program.

Where ``accessibility_likelihood`` is not "bernoulli", d of a cell is its number of fragments, with a LogNormal prior
for each batch as the library size has, and region j has mean :math:`p_{nj} r_j d_n / \bar d`, with
:math:`\bar d` the number of fragments of a typical cell. So r is the count of a region in such a cell where p is 1.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_multivi.data.marginals import FragmentMarginals
from pyro_multivi.distributions.fragments import FragmentCounts, NegativeBinomialFragments, PoissonFragments
from pyro_multivi.networks.encoders import HiddenState

# exp of more would overflow a depth long after it stopped being one (1e13 counts).
_MAX_LOG_DEPTH = 30.0
# Log of the standard deviation of a log depth; at e^2 = 7 no draw around that mean overflows either.
_MAX_LOG_SD = 2.0
# Accessibility from which regions start: a type of cells may have four times the mean count.
_START = 0.25


def fragments_prior(program: Any, s: Tensor) -> dist.LogNormal:
    """d ~ LogNormal with the mean and variance of the log number of fragments of the batch, (..., B)."""
    batch = s[..., : program.config.n_batch]
    return dist.LogNormal(batch @ program.fragments_log_mean, (batch @ program.fragments_log_var).sqrt())


def fragments_likelihood(program: Any, p: Tensor, d: Tensor, r: Tensor) -> FragmentCounts:
    """y ~ Poisson or negative binomial with mean p r d over the number of fragments of a typical cell."""
    size = d / program.atac_log_depth.exp()
    if program.config.accessibility_likelihood == "poisson":
        return PoissonFragments(p, size, r)
    return NegativeBinomialFragments(p, size, r, program.region_log_theta.exp())


def depth_posterior(
    head: Any, state: HiddenState, centre: Tensor, prior_loc: Tensor, prior_sd: Tensor
) -> dist.LogNormal:
    """LogNormal around the observed depth, for a library or a number of fragments; the prior where it is missing.

    Parameters
    ----------
    head
        :class:`~pyro_multivi.networks.encoders.LibraryHead` with two arguments.
    centre
        Log depth of a typical cell.
    """
    arguments = head(state, centre)
    loc = arguments[:, 0].clamp(-_MAX_LOG_DEPTH, _MAX_LOG_DEPTH)
    sd = arguments[:, 1].clamp(-10.0, _MAX_LOG_SD).exp()
    return dist.LogNormal(state.scatter(loc, prior_loc), state.scatter(sd, prior_sd))


@torch.no_grad()
def start_fragments(program: Any, marginals: FragmentMarginals) -> None:
    """Start at the mean count of each region in a cell of typical depth, and at the dispersion of its counts."""
    program.atac_log_depth.fill_(marginals.log_depth_mean)
    program.fragments_log_mean.copy_(marginals.log_mean)
    program.fragments_log_var.copy_(marginals.log_var)
    p = torch.tensor(_START)
    program.accessibility_decoder.p.bias.fill_(torch.logit(p))
    program.region_log_rate.copy_(marginals.region_share.log() + marginals.log_depth_mean - p.log())
    if program.config.accessibility_likelihood == "nb":
        program.region_log_theta.copy_(marginals.inverse_dispersion.log())
