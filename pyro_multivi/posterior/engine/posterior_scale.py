r"""Standard deviation of a cell's posterior, corrected after training.

An encoder shared by all cells leaves the mean of q(z) beside the posterior mean of a single cell, and the penalties
that align measurement patterns move it further; the standard deviations, which were trained with them, do not make up
for it. So draws from the posterior are

.. math:: z_{nk} \sim Normal(\mu_{nk},\ (f_{ck}\, \sigma_{nk})^2)

with one factor f of 1 to 2 for each measurement pattern c (RNA only, ATAC only, both) and latent dimension k, the
buffer ``posterior_scale`` of the program: set by :mod:`pyro_multivi.posterior.calibration.fit_scale`, 1 before that.
Posterior means do not change. Draws of the library size and of the cell factor are widened in the same way, on the
scale on which their posterior is Normal, by one factor for each pattern that measures them (``depth_scale``). The
guide itself stays as it was trained, and so do its moments, the ELBO and the marginal likelihood.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch.distributions as torchdist
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyro_multivi.data.minibatch import Cells, pattern_code
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.program import MultiVIProgram


class NoMeanError(ValueError):
    """A distribution of the guide does not know its mean, and a result needs it."""

    @classmethod
    def of(cls, site: str, remedy: str = "") -> NoMeanError:
        """Name the site and what to do; the constructor is left to Pyro, which adds shapes to messages."""
        draws = "ask for draws (n_samples above 1, use_z_mean=False or give_mean=False)"
        return cls(f"The guide's distribution of {site!r} has no mean: {remedy or draws}.")


def mean_of(name: str, fn: Any) -> Tensor:
    """Mean of a site of the guide.

    Raises
    ------
    NoMeanError
        If the distribution does not know its mean, as a normalising flow, or has none.
    """
    try:
        mean: Tensor = fn.mean
    except NotImplementedError as error:
        raise NoMeanError.of(name) from error
    if mean.numel() and not bool(mean.isfinite().any()):
        raise NoMeanError.of(name)
    return mean


def variance_of(name: str, fn: Any) -> Tensor:
    """Variance of a site of the guide.

    Raises
    ------
    ValueError
        If the distribution does not know its variance.
    """
    try:
        variance: Tensor = fn.variance
    except NotImplementedError as error:
        raise ValueError(
            f"The guide's distribution of {name!r}, {type(fn).__name__}, knows no variance: leave return_dist out, or "
            "ask for draws (give_mean=False)."
        ) from error
    return variance


def corrected(program: MultiVIProgram, cells: Cells, fn: Any) -> Any:
    """q(z) of some cells with corrected standard deviations; as it is unless it is Normal in each dimension."""
    normal = normal_in(fn)
    if normal is None or normal.loc.shape[-1:] != program.posterior_scale.shape[-1:]:
        return fn
    factor_nk = program.posterior_scale[pattern_code(cells)]
    return dist.Normal(normal.loc, normal.scale * factor_nk, validate_args=False).to_event(1)


def corrected_depth(program: MultiVIProgram, cells: Cells, name: str, fn: Any) -> Any:
    """q(l) or q(d) of some cells with corrected standard deviations; any other site, and points, as they are."""
    place = next((place for place, modality in enumerate(MODALITIES) if modality.depth == name), None)
    normal = None if place is None else normal_behind(fn)
    if normal is None:
        return fn
    factor_n = program.depth_scale[pattern_code(cells), place]
    base = dist.Normal(normal.loc, normal.scale * factor_n, validate_args=False)
    return dist.TransformedDistribution(base, fn.transforms, validate_args=False)


def normal_behind(fn: Any) -> torchdist.Normal | None:
    """Normal of which a distribution, such as a LogNormal, is a transformation; None if there is none.

    Examples
    --------
    >>> import torch
    >>> float(normal_behind(dist.LogNormal(1.0, torch.tensor(2.0))).scale)
    2.0
    """
    return normal_in(fn.base_dist) if isinstance(fn, torchdist.TransformedDistribution) else None


def normal_in(fn: Any) -> torchdist.Normal | None:
    """Normal over single numbers that a distribution is made of; None if it is made of something else.

    Examples
    --------
    >>> import torch
    >>> normal_in(dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)).loc.shape
    torch.Size([3, 2])
    """
    while isinstance(fn, (torchdist.Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn if isinstance(fn, torchdist.Normal) else None
