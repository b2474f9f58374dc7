r"""The cell factor d of accessibility, and the depth of a cell in general: priors and posteriors.

Where regions are open or closed d is in (0, 1) and, of a cell n of batch s in which f of the measured regions are open,

.. math::

    p(d_n \mid s_n) = \mathrm{LogitNormal}(m_s, \tau_s), \qquad
    q(d_n \mid y_n) = \mathrm{LogitNormal}\big(\operatorname{logit} f_\ell(y_n),\;
        c\, (\tau_s^{-2} + i_n)^{-1/2}\big), \qquad i_n = f (1 - f_\ell(y_n))^2

with :math:`i_n` the information that the regions have of the logit: the sum over regions of :math:`q (1 - d)^2 / (1 -
q)` at probabilities q = p d r, which are small and add up to f. So the width is that of the Laplace approximation, and
the factor c, which is learned, starts at 1. The data determine p r d, but not d: a smaller d of all cells is as good as
a smaller r of all regions. So :math:`m_s` is learned, and follows d wherever it goes.

Where it starts matters, as d, p and r stay below 1: with a large d the deepest cells cannot have all their open
regions, with a small one the most open regions cannot be as open as they are. A typical cell starts between the two, at
:func:`typical_factor`, whose logit :math:`f_\ell` has as ``cell_factor_offset``. It is so small that d reaches 1 three
standard deviations deeper than the mean of a batch, but so large that the regions with 90 % of all detections may be
four times as open in a type of cells as they are on average. :math:`\tau_s` is that of the data, as the variance of the
library size is: there the logit varies 1 / (1 - d) times as much as the log number of open regions does. A new batch of
a query starts at the mean of logit :math:`f_\ell` over its cells, around which its prior is best. Of factors that the
data give the typical one is their mean.

Where ``accessibility_likelihood`` is not "bernoulli", d is the number of fragments of a cell, with a LogNormal prior
for each batch as the library size has, and region j has mean :math:`p_{nj} r_j d_n / \bar d`, with
:math:`\bar d` the number of fragments of a typical cell. So r is the count of a region in such a cell where p is 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_multivi.data.marginals import FragmentMarginals, Marginals
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import ATAC
from pyro_multivi.distributions.fragments import FragmentCounts, NegativeBinomialFragments, PoissonFragments
from pyro_multivi.distributions.logit_normal import LogitNormal
from pyro_multivi.networks.encoders import HiddenState
from pyro_multivi.networks.panels import n_open

# exp of more would overflow a depth long after it stopped being one (1e13 counts).
_MAX_LOG_DEPTH = 30.0
# Log of the standard deviation of a log depth; at e^2 = 7 no draw around that mean overflows either.
_MAX_LOG_SD = 2.0
# Accessibility from which regions start: a type of cells may have four times the mean count.
_START = 0.25
# Closest to 0 and 1 that a cell factor comes: nearer to 1 float32 has few numbers.
_MARGIN = 1e-6
# With p r at most this in a typical cell, a type of cells may have a region open four times as often, short of p r = 1.
_MOST_OPEN = 0.95 / 4
# Share of all detections that are in regions of which that holds.
_SHARE_IN_REACH = 0.9
# Standard deviations of the log depth from a batch's mean to its deepest cells.
_DEEPEST_SDS = 3.0
_LEAST_TYPICAL, _MOST_TYPICAL = 0.1, 0.5
# Logit of a number that is uniform in (0, 1): its standard deviation.
_UNIFORM_SD = math.pi / math.sqrt(3)


def unlearned_cell_factor(n_batch: int) -> dict[str, Tensor]:
    """Parameters and buffers of d by name, before anything is known: the prior is nearly uniform."""
    return {
        "cell_factor_loc": torch.zeros(n_batch),
        "cell_factor_log_scale": torch.tensor(0.0),
        "cell_factor_offset": torch.tensor(0.0),
        "cell_factor_sd": torch.full((n_batch,), _UNIFORM_SD),
    }


def batch_prior(program: Any, s: Tensor) -> LogitNormal | dist.LogNormal:
    """d ~ LogitNormal of the batch, or LogNormal as the number of fragments of its cells is, (..., B)."""
    batch = s[..., : program.config.n_batch]
    if program.config.counts_fragments:
        return dist.LogNormal(batch @ program.fragments_log_mean, (batch @ program.fragments_log_var).sqrt())
    return LogitNormal(batch @ program.cell_factor_loc, batch @ program.cell_factor_sd)


def factor_posterior(program: Any, cells: Cells, d: Tensor, prior: LogitNormal) -> LogitNormal:
    """q(d | y) around a number in (0, 1) of each cell, (B,); the prior of cells without ATAC."""
    # Of regions that were not measured nothing is known, however deep a cell would be with them.
    information = n_open(ATAC.counts_in(cells)) * (1 - d).square()
    sd = program.cell_factor_log_scale.exp() * (prior.scale**-2 + information).rsqrt()
    loc = torch.logit(d, _MARGIN)
    return LogitNormal(torch.where(cells.has_atac, loc, prior.loc), torch.where(cells.has_atac, sd, prior.scale))


@torch.no_grad()
def start_cell_factor(program: Any, marginals: Marginals) -> float:
    """Start d and its prior at the numbers of open regions, around that of a typical cell, which is returned."""
    typical = typical_factor(marginals)
    offset = torch.logit(typical)
    program.cell_factor_offset.copy_(offset)
    program.cell_factor_loc.copy_(marginals.atac_log_mean - marginals.atac_log_depth_mean + offset)
    set_factor_spread(program, marginals)
    return typical.item()


def typical_factor(marginals: Marginals) -> Tensor:
    """Cell factor that a cell of typical depth starts with, (), between 0.1 and 0.5 if inferred; see the module."""
    if marginals.atac_size_mean is not None:
        return torch.tensor(marginals.atac_size_mean)
    deepest = (marginals.atac_log_mean + _DEEPEST_SDS * marginals.atac_log_var.sqrt()).max()
    of_depths = (marginals.atac_log_depth_mean - deepest).exp()
    rate = marginals.detection_rate.double().sort().values
    share = rate.cumsum(0) / rate.sum()
    of_regions = rate[share >= _SHARE_IN_REACH][0] / _MOST_OPEN
    return torch.maximum(of_depths.double(), of_regions).clamp(_LEAST_TYPICAL, _MOST_TYPICAL).float()


@torch.no_grad()
def set_factor_spread(program: Any, marginals: Marginals, first: int = 0) -> None:
    """Take the spread of d from the numbers of open regions, for batches from a first one on."""
    d = program.cell_factor_offset.sigmoid().item()
    program.cell_factor_sd[first:] = marginals.atac_log_var[first:].sqrt() / (1 - d)


@torch.no_grad()
def set_factor_mean(program: Any, blocks: Iterable[Cells], first: int) -> None:
    """Take the mean of logit d from f_l of the cells with ATAC, for batches from a first one on that have any."""
    n_batch = program.config.n_batch
    total, n_cells = torch.zeros(2, n_batch, dtype=torch.double)
    for cells in blocks:
        logit = torch.logit(program.cell_factor(cells, program.encode(cells, cells.design)), _MARGIN).double()
        batch = cells.design[cells.has_atac, :n_batch].double()
        total += logit[cells.has_atac] @ batch
        n_cells += batch.sum(0)
    known = n_cells > 0
    known[:first] = False
    program.cell_factor_loc[known] = (total / n_cells)[known].to(program.cell_factor_loc)


def library_prior(program: Any, cells: Cells, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of log l under its prior, (B,) each; a prior of another family has the batch's."""
    with poutine.block():  # what an override draws is drawn by the model
        prior = program.library_prior(cells, s)
    moments = (prior.loc, prior.scale) if isinstance(prior, dist.LogNormal) else program.library_moments(s)
    return moments[0].expand(len(cells)), moments[1].expand(len(cells))


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
def start_fragments(program: Any, marginals: FragmentMarginals) -> Tensor:
    """Start at the mean count of each region in a cell of typical depth, and at the dispersion of its counts.

    The accessibility p that all regions are to start with is returned, ().
    """
    program.atac_log_depth.fill_(marginals.log_depth_mean)
    program.fragments_log_mean.copy_(marginals.log_mean)
    program.fragments_log_var.copy_(marginals.log_var)
    p = torch.tensor(_START)
    program.region_log_rate.copy_(marginals.region_share.log() + marginals.log_depth_mean - p.log())
    if program.config.accessibility_likelihood == "nb":
        program.region_log_theta.copy_(marginals.inverse_dispersion.log())
    return p
