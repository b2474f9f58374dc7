"""Fragment counts of a cell's regions, by mean: Poisson and negative binomial."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_multivi.distributions.base import (
    CellDistribution,
    ParameterRows,
    ValueRows,
    dense_rows,
    nonnegative_vector,
    positive_vector,
    unit_vector,
)
from pyro_multivi.distributions.counts import log_poisson, negative_binomial_log_prob, negative_binomial_means
from pyro_multivi.distributions.kernels.fragments import fragments_log_prob
from pyro_multivi.distributions.kernels.readout import Link, Readout


class FragmentCounts(CellDistribution):
    """Base class of the distributions of fragment counts: region j has mean ``size * p_j * rate_j``."""

    p: Tensor
    size: Tensor
    rate: Tensor
    theta: Tensor | None = None

    cell_parameters = ("size",)
    links: ClassVar[dict[str, tuple[Link, ...]]] = {"p": ("sigmoid",)}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "p": unit_vector,
        "size": constraints.nonnegative,
        "rate": nonnegative_vector,
    }

    @property
    def mean(self) -> Tensor:
        """Expected fragments, shape batch + (M,)."""
        return self._full(self.size.unsqueeze(-1) * dense_rows(self.p) * self.rate)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, shape batch + (M,)."""
        mean = self.mean
        return mean if self.theta is None else mean + mean.square() / self.theta

    @property
    def open_probability(self) -> Tensor:
        """Probability of at least one fragment, shape batch + (M,)."""
        return open_probability(self.mean, self.theta)

    def _draw(self, shape: torch.Size) -> Tensor:
        mean = self.mean
        return torch.poisson(
            mean.expand(shape) if self.theta is None else negative_binomial_means(mean, self.theta, shape)
        )

    def _log_prob_rows(self, value: ValueRows, parameters: ParameterRows) -> Tensor:
        p, size, rate = (parameters[name] for name in ("p", "size", "rate"))
        theta = parameters.get("theta")
        if isinstance(p, Readout) and rate.dim() == 1 and (theta is None or theta.dim() == 1):
            return fragments_log_prob(p, size, rate, theta, value.entries())
        mean, x = size.unsqueeze(-1) * dense_rows(p) * rate, value.dense()
        return (log_poisson(x, mean) if theta is None else negative_binomial_log_prob(x, mean, theta)).sum(-1)


class PoissonFragments(FragmentCounts):
    """Poisson counts of fragments with mean ``size * p * rate``.

    Parameters
    ----------
    p
        Accessibility of each region, shape (..., M): a :class:`Readout` with link "sigmoid", or dense in [0, 1].
    size
        Size factor of each cell (its sequencing depth), shape (...).
    rate
        Fragments of each region where p and size are 1, shape (M,), nonnegative.

    Raises
    ------
    ValueError
        If shapes do not broadcast, a readout has another link, or (with validation on) a value
        is out of bounds.

    Examples
    --------
    >>> d = PoissonFragments(torch.tensor([[0.5, 1.0]]), torch.tensor([2.0]), torch.tensor([1.0, 0.25]))
    >>> d.mean
    tensor([[1.0000, 0.5000]])
    >>> d.open_probability
    tensor([[0.6321, 0.3935]])
    >>> d.log_prob(torch.tensor([[0.0, 0.0]]))
    tensor([-1.5000])
    """

    feature_parameters = ("p", "rate")

    def __init__(self, p: Tensor, size: Tensor, rate: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"p": p, "size": size, "rate": rate}, validate_args)


class NegativeBinomialFragments(FragmentCounts):
    """Negative binomial counts of fragments with mean mu = ``size * p * rate`` and variance mu + mu^2 / theta.

    Parameters
    ----------
    p, size, rate
        As in :class:`~pyro_multivi.distributions.PoissonFragments`, which raises the same errors.
    theta
        Inverse dispersion, shape (M,), positive. Large means close to Poisson.

    Examples
    --------
    >>> one = torch.ones(1)
    >>> d = NegativeBinomialFragments(torch.tensor([[0.5, 1.0]]), 2 * one, one.expand(2), one.expand(2))
    >>> d.variance
    tensor([[2., 6.]])
    """

    theta: Tensor

    feature_parameters = ("p", "rate", "theta")
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        **FragmentCounts.arg_constraints,
        "theta": positive_vector,
    }

    def __init__(self, p: Tensor, size: Tensor, rate: Tensor, theta: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"p": p, "size": size, "rate": rate, "theta": theta}, validate_args)


def open_probability(mean: Tensor, theta: Tensor | None) -> Tensor:
    """Probability of at least one fragment by the mean and the inverse dispersion; without it of a Poisson.

    Examples
    --------
    >>> open_probability(torch.tensor([0.0, 1.0]), None), open_probability(torch.tensor([1.0]), torch.tensor([1.0]))
    (tensor([0.0000, 0.6321]), tensor([0.5000]))
    """
    log_zero = -mean if theta is None else -theta * torch.log1p(mean / theta)
    return -torch.expm1(log_zero)
