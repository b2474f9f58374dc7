r"""How far what was measured of a cell is trusted where something is decoded that was not.

A posterior is as narrow as the measured counts make it. What they say of *other* counts is less: an encoder
that has read a cell again and again is surer of it than of a new one, and what tells two accessibility profiles
apart need not tell two expression profiles apart. So where expression of a cell without RNA, or accessibility of a
cell without ATAC, is decoded,

.. math:: q_t(z) \propto q(z)^t\, p(z)^{1-t}

stands for q: with t = 1 all is as the guide has it, with t = 0 nothing is known of the cell. Comparisons of groups
leave q as it is: in the mean of many cells the errors of each average out, a pull towards the mean of all does
not. t belongs to the program (``rna_temper``, ``atac_temper``) and is chosen by
:mod:`pyro_multivi.posterior.choosing_temper`.
"""

from __future__ import annotations

from typing import Any

import torch.distributions as torchdist
from pyro.distributions import MaskedDistribution
from torch import Tensor


def normal_in(fn: Any) -> torchdist.Normal | None:
    """The Normal over single numbers that a distribution is made of; None if it is made of something else."""
    while isinstance(fn, (torchdist.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, torchdist.Normal) else None


def temper(z: Tensor, posterior: torchdist.Normal, prior: torchdist.Normal, weight: float) -> Tensor:
    """Draws of a posterior, moved to where its ``weight``-th power times what is left of the prior has them.

    Parameters
    ----------
    z
        Draws from the posterior, or its mean.
    posterior, prior
        Of each number of z.
    weight
        t, in (0, 1].

    Examples
    --------
    >>> import torch
    >>> posterior, prior = torchdist.Normal(3.0, 0.5), torchdist.Normal(0.0, 1.0)
    >>> [round(temper(torch.tensor(3.0), posterior, prior, t).item(), 2) for t in (1.0, 0.25, 0.01)]
    [3.0, 1.71, 0.12]
    """
    told, known = weight / posterior.scale.square(), (1 - weight) / prior.scale.square()
    mean = (told * posterior.loc + known * prior.loc) / (told + known)
    return mean + (z - posterior.loc) / (posterior.scale * (told + known).sqrt())
