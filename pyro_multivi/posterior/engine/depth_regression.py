r"""Predicted sequencing depth of a modality that was not measured in a cell.

In the model the depth of a modality (l of expression, d of accessibility) depends neither on the state of
the cell nor on the depth of the other modality. In real cells it does: a large cell gives more of both, and cell types
differ in how much of their chromatin is open. So where a modality is decoded that was not measured in a cell,

.. math::

    \log \ell_n \sim Normal(a_s + b\, t_n + c^T \bar z_n,\ \sigma^2), \qquad
    \operatorname{logit} d_n \sim Normal(a'_s + b'\, t'_n + c'^T \bar z_n,\ \sigma'^2)

replace the priors, with s the batch, t the log depth of the modality that *was* measured (less a typical one) and
:math:`\bar z` the mean of the posterior. The coefficients are buffers of the program (``rna_depth_regression``,
``atac_depth_regression``), fitted to cells of both modalities by
:mod:`pyro_multivi.posterior.calibration.fit_depth`; before that, and for cells in which nothing was measured, the
priors stay. Set the buffers to zero to have the priors everywhere, as a model with a depth prior of its own may want.
Densities and the ELBO are not affected.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
import torch.distributions as torchdist
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import Modality, modelled
from pyro_multivi.distributions.logit_normal import LogitNormal
from pyro_multivi.networks.panels import log_depth
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.posterior_scale import normal_in
from pyro_multivi.program import MultiVIProgram

# Ending of the names of streams of random numbers. Another one would change the draws of every seed.
_STREAM = "told"


def regression_buffer(program: MultiVIProgram, modality: Modality) -> Tensor:
    """Buffer with the standard deviation and the coefficients of a modality's regression; zeros before it is fitted."""
    return getattr(program, f"{modality.key}_depth_regression")


class DepthRegression(NamedTuple):
    """Linear regression, with Normal errors, of log l or logit d.

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
    def of(cls, program: MultiVIProgram, modality: Modality) -> DepthRegression | None:
        """Read the regression that is stored in a program; None before it is fitted."""
        stored = regression_buffer(program, modality)
        return cls(stored[1:], stored[0]) if float(stored[0]) > 0 else None

    def store(self, program: MultiVIProgram, modality: Modality) -> None:
        """Keep it in a program."""
        regression_buffer(program, modality).copy_(torch.cat([self.sd.reshape(1), self.coefficients]))


def features(program: MultiVIProgram, cells: Cells, modality: Modality, loc: Tensor) -> Tensor:
    """Predictors of a modality's depth: depth of the other, mean of z, batch, (..., B, 1 + K + n_batch).

    Parameters
    ----------
    modality
        The one that was not measured.
    loc
        Mean of z, (..., B, K).
    """
    shape = loc.shape[:-1]
    others = [_log_depth(program, cells, other) for other in modelled(program.config) if other != modality]
    batch = cells.design[:, : program.config.n_batch]
    columns = [*(depth[:, None].expand(*shape, 1) for depth in others), loc, batch.expand(*shape, batch.shape[-1])]
    return torch.cat(columns, -1)


def predicted_depth(program: MultiVIProgram, cells: Cells, modality: Modality, loc: Tensor) -> dist.Normal | None:
    """Distribution of log l or logit d in cells that lack the modality, (..., B); None before it is fitted."""
    regression = DepthRegression.of(program, modality)
    if regression is None:
        return None
    return dist.Normal(features(program, cells, modality, loc) @ regression.coefficients, regression.sd)


def imputation_depth(
    program: MultiVIProgram,
    cells: Cells,
    modality: Modality,
    nodes: dict[str, Any],
    n_samples: int,
    noise: CellNoise | None,
) -> Tensor | None:
    """l or d to decode a modality of cells that lack it, (S, B); None where its prior stays.

    Parameters
    ----------
    nodes
        Sites of the guide's trace.
    noise
        Noise of the draws in the trace; None if they are posterior means, and then the mean is returned.
    """
    if not is_inferred(program, cells, modality, nodes):
        return None
    posterior = normal_in(nodes["z"]["fn"])
    normal = None if posterior is None else predicted_depth(program, cells, modality, posterior.loc)
    if normal is None:
        return None
    normal = normal.expand((n_samples, len(cells)))
    if noise is None:
        return mean_depth(modality.in_model(program.config), normal)
    return depth_transform(modality.in_model(program.config))(noise.draw(f"{modality.depth} {_STREAM}", normal))


def depth_transform(modality: Modality) -> torchdist.Transform:
    """Transform from the real line to depths: exp to a library size, sigmoid to a factor of probabilities."""
    return torchdist.transforms.SigmoidTransform() if modality.binary else torchdist.transforms.ExpTransform()


def mean_depth(modality: Modality, normal: dist.Normal) -> Tensor:
    """Mean of a depth whose logarithm (logit, if the modality is binary) is Normal.

    Examples
    --------
    >>> from pyro_multivi.data.modality import ATAC, RNA
    >>> normal = dist.Normal(torch.tensor([0.0, 1.0]), 1.5)
    >>> mean_depth(ATAC, normal), mean_depth(RNA, normal)
    (tensor([0.5000, 0.6707]), tensor([3.0802, 8.3729]))
    """
    kind = LogitNormal if modality.binary else dist.LogNormal
    return kind(normal.loc, normal.scale).mean


def is_inferred(program: MultiVIProgram, cells: Cells, modality: Modality, nodes: dict[str, Any]) -> bool:
    """Whether a depth is a latent of the guide, rather than known for every cell."""
    if modality.depth not in nodes:
        return False
    return modality.size_factor_in(cells) is None if modality.binary else program.config.library == "latent"


def _log_depth(program: MultiVIProgram, cells: Cells, modality: Modality) -> Tensor:
    """Log depth of what was measured, less that of a typical cell, (B,)."""
    typical: Tensor = getattr(program, f"{modality.key}_log_depth")
    return log_depth(program, cells, modality) - typical
