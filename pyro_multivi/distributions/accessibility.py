"""Accessibility of a cell's regions: open with probability p * d * r."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_multivi.distributions.base import CellDistribution, ParameterRows, ValueRows, dense_rows, unit_vector
from pyro_multivi.distributions.kernels.accessibility import accessibility_log_prob
from pyro_multivi.distributions.kernels.readout import Link, Readout


class ScaledBernoulli(CellDistribution):
    """Open and closed regions of a cell: region j is open with probability ``p_j * cell_factor * region_factor_j``.

    Values are 0/1 or peak counts: any positive entry means open.

    Parameters
    ----------
    p
        Probability before the factors, shape (..., M): a :class:`Readout` with link "sigmoid",
        or dense in [0, 1].
    cell_factor
        Factor of each cell (its sequencing depth), shape (...), in (0, 1].
    region_factor
        Factor of each region, shape (M,), in (0, 1]; None means 1.

    Raises
    ------
    ValueError
        If shapes do not broadcast, a readout has another link, or (with validation on) a value
        is out of bounds.

    Examples
    --------
    >>> d = ScaledBernoulli(torch.tensor([[0.5, 1.0]]), torch.tensor([0.5]), torch.tensor([1.0, 0.5]))
    >>> d.mean
    tensor([[0.2500, 0.2500]])
    >>> d.log_prob(torch.tensor([[0.0, 3.0]])).exp()
    tensor([0.1875])
    """

    p: Tensor
    cell_factor: Tensor
    region_factor: Tensor | None

    feature_parameters = ("p", "region_factor")
    cell_parameters = ("cell_factor",)
    optional_parameters = ("region_factor",)
    links: ClassVar[dict[str, tuple[Link, ...]]] = {"p": ("sigmoid",)}
    support = constraints.independent(constraints.boolean, 1)
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "p": unit_vector,
        "cell_factor": constraints.unit_interval,
        "region_factor": unit_vector,
    }

    def __init__(
        self, p: Tensor, cell_factor: Tensor, region_factor: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        super().__init__({"p": p, "cell_factor": cell_factor, "region_factor": region_factor}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Probability of being open, shape batch + (M,)."""
        probability = self.cell_factor.unsqueeze(-1) * dense_rows(self.p)
        return self._full(probability if self.region_factor is None else probability * self.region_factor)

    @property
    def variance(self) -> Tensor:
        """Variance of open (1) against closed (0), shape batch + (M,)."""
        mean = self.mean
        return mean * (1 - mean)

    def _draw(self, shape: torch.Size) -> Tensor:
        return torch.bernoulli(self.mean.expand(shape))

    def _validate_sample(self, value: Tensor) -> None:
        if not (value >= 0).all():
            raise ValueError("value of ScaledBernoulli must be nonnegative (0 closed, anything above open)")

    def _log_prob_rows(self, value: ValueRows, parameters: ParameterRows) -> Tensor:
        p, cell_factor, region_factor = (parameters[name] for name in ("p", "cell_factor", "region_factor"))
        if isinstance(p, Readout) and (region_factor is None or region_factor.dim() == 1):
            return accessibility_log_prob(p, cell_factor, region_factor, value.entries())
        q = cell_factor.unsqueeze(-1) * dense_rows(p)
        if region_factor is not None:
            q = q * region_factor
        is_open = value.dense() > 0
        # A probability of exactly 0 or 1 that the data contradict has a finite, very small likelihood.
        tiny = torch.finfo(q.dtype).tiny
        return torch.where(is_open, q.clamp_min(tiny), (1 - q).clamp_min(tiny)).log().sum(-1)
