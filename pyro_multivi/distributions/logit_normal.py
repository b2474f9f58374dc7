"""LogitNormal: a probability whose logit is Normal."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import SigmoidTransform

# Gauss-Hermite: the mean of a sigmoid of a Normal to 1e-5 up to a standard deviation of 3.
_NODES, _WEIGHTS = (torch.from_numpy(values).float() for values in np.polynomial.hermite_e.hermegauss(32))


class LogitNormal(dist.TransformedDistribution):
    """A number in (0, 1) whose logit is Normal. Between two of them the KL divergence is that of the Normals.

    Parameters
    ----------
    loc, scale
        Mean and standard deviation of the logit, of shapes that broadcast.

    Raises
    ------
    ValueError
        If (with validation on) a parameter is out of bounds.

    Examples
    --------
    >>> d = LogitNormal(torch.tensor([0.0, 1.0]), torch.tensor(1.5))
    >>> d.mean
    tensor([0.5000, 0.6707])
    >>> torch.distributions.kl_divergence(d, LogitNormal(torch.zeros(2), torch.tensor(1.5)))
    tensor([0.0000, 0.2222])
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.unit_interval
    has_rsample = True

    base_dist: dist.Normal

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        base = dist.Normal(loc, scale, validate_args=validate_args)
        super().__init__(base, SigmoidTransform(), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogitNormal:
        """Copy of another batch shape."""
        new = self._get_checked_instance(LogitNormal, _instance)
        return super().expand(batch_shape, _instance=new)

    @property
    def loc(self) -> Tensor:
        """Mean of the logit."""
        return self.base_dist.loc

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the logit."""
        return self.base_dist.scale

    @property
    def mean(self) -> Tensor:
        """Mean, by quadrature."""
        nodes, weights = _NODES.to(self.loc), _WEIGHTS.to(self.loc)
        mean: Tensor = (self.loc[..., None] + self.scale[..., None] * nodes).sigmoid() @ weights
        return mean / weights.sum()
