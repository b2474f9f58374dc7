r"""How deeply a modality would have been read in a cell in which it was not measured.

In the model the depth of a modality (l of expression, d of accessibility) depends neither on the state of
the cell nor on the depth of the other modality. Of real cells it does: a large cell gives more of both, and types
differ in how much of their chromatin is open. So where something is decoded that was not measured of a cell,

.. math::

    \log \ell_n \sim Normal(a_s + b\, t_n + c^T \bar z_n,\ \sigma^2), \qquad
    \operatorname{logit} d_n \sim Normal(a'_s + b'\, t'_n + c'^T \bar z_n,\ \sigma'^2)

stand for the priors, with s the batch, t the log depth of the modality that *was* measured (less a typical one) and
:math:`\bar z` the mean of the posterior. The coefficients belong to the program (``rna_depth_regression``,
``atac_depth_regression``) and are learned from cells of both modalities by
:mod:`pyro_multivi.posterior.calibration.fit_depth`; before that, and for cells of which nothing was measured, the
priors stay.
Set them to zero to have the priors everywhere, as a model with a prior of its own for depth may want. Densities and
the ELBO never see any of this.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
import torch.distributions as torchdist
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.program import MultiVIProgram, open_regions, rna_totals

#: The link of each latent depth among the program's buffers.
LINK = {"l": "rna_depth_regression", "d": "atac_depth_regression"}
#: From where the Normal lives to the depth itself.
TRANSFORM: dict[str, torchdist.Transform] = {
    "l": torchdist.transforms.ExpTransform(),
    "d": torchdist.transforms.SigmoidTransform(),
}

# Gauss-Hermite: the mean of a sigmoid of a Normal to 1e-5 up to a standard deviation of 3.
_NODES, _WEIGHTS = (torch.from_numpy(values).float() for values in np.polynomial.hermite_e.hermegauss(32))


class Link(NamedTuple):
    """A linear prediction with Normal errors.

    Attributes
    ----------
    coefficients
        Of :func:`features`, (F,).
    sd
        Standard deviation of the errors.
    """

    coefficients: Tensor
    sd: Tensor

    @classmethod
    def of(cls, program: MultiVIProgram, site: str) -> Link | None:
        """What a program has learned of a depth; None if it has not."""
        stored: Tensor = getattr(program, LINK[site])
        return cls(stored[1:], stored[0]) if float(stored[0]) > 0 else None

    def store(self, program: MultiVIProgram, site: str) -> None:
        """Keep it in the program."""
        getattr(program, LINK[site]).copy_(torch.cat([self.sd.reshape(1), self.coefficients]))


def features(program: MultiVIProgram, cells: Cells, site: str, loc: Tensor) -> Tensor:
    """What a depth is predicted from: the other depth, the mean of z, the batch, (..., B, 1 + K + n_batch).

    Parameters
    ----------
    site
        ``"l"`` or ``"d"``, whose modality was not measured.
    loc
        Mean of z, (..., B, K).
    """
    if site == "l":
        other = open_regions(cells).log1p() - program.atac_log_depth
    else:
        other = rna_totals(cells.x).clamp(min=1.0).log() - program.rna_log_depth
    batch = cells.design[:, : program.config.n_batch]
    shape = loc.shape[:-1]
    return torch.cat([other[:, None].expand(*shape, 1), loc, batch.expand(*shape, batch.shape[-1])], -1)


def predicted(program: MultiVIProgram, cells: Cells, site: str, loc: Tensor) -> dist.Normal | None:
    """log l or logit d of cells of which the other modality was measured, (..., B); None before it was learned."""
    link = Link.of(program, site)
    if link is None:
        return None
    return dist.Normal(features(program, cells, site, loc) @ link.coefficients, link.sd)


def mean_depth(site: str, normal: dist.Normal) -> Tensor:
    """Mean of l or d whose logarithm or logit is Normal.

    Examples
    --------
    >>> normal = dist.Normal(torch.tensor([0.0, 1.0]), 1.5)
    >>> mean_depth("d", normal), mean_depth("l", normal)
    (tensor([0.5000, 0.6707]), tensor([3.0802, 8.3729]))
    """
    if site == "l":
        return (normal.loc + normal.variance / 2).exp()
    nodes, weights = _NODES.to(normal.loc), _WEIGHTS.to(normal.loc)
    mean: Tensor = (normal.loc[..., None] + normal.scale[..., None] * nodes).sigmoid() @ weights
    return mean / weights.sum()


def is_inferred(program: MultiVIProgram, cells: Cells, site: str, nodes: dict[str, Any]) -> bool:
    """Whether a depth is a latent of the guide, rather than known for every cell."""
    if site not in nodes:
        return False
    return program.config.library == "latent" if site == "l" else cells.atac_size is None
