"""Count distributions over a cell's whole gene vector, by mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from pyro_multivi.distributions.base import (
    CellDistribution,
    ParameterRows,
    ValueRows,
    dense_rows,
    nonnegative_vector,
    positive_vector,
    real_vector,
)
from pyro_multivi.distributions.kernels.counts import counts_log_prob
from pyro_multivi.distributions.kernels.log_gamma import LARGE_COUNT, log_rising
from pyro_multivi.distributions.kernels.readout import Link, Readout


def _has_large(x: Tensor) -> bool:
    """Whether counts are so large that single precision will not do."""
    return x.dtype != torch.float64 and x.numel() > 0 and bool(x.max() >= LARGE_COUNT)


def log_poisson(x: Tensor, mu: Tensor) -> Tensor:
    """Log-probability of counts x under mean mu; 0 at x = mu = 0, elementwise."""
    if _has_large(x):
        return log_poisson(x.double(), mu.double()).to(mu.dtype)
    # The clamp only meets x > 0 = mu, and keeps the slope x / mu at x = 0 from being 0 / 0.
    return torch.xlogy(x, mu.clamp_min(torch.finfo(mu.dtype).tiny)) - mu - torch.lgamma(x + 1)


def negative_binomial_log_prob(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """Log-probability of counts x under mean mu and inverse dispersion theta, elementwise."""
    if _has_large(x):
        return negative_binomial_log_prob(x.double(), mu.double(), theta.double()).to(mu.dtype)
    rising, is_large = log_rising(x, theta)
    return rising - torch.lgamma(x + 1) + log_prob_of_mean(x, mu, theta, is_large)


def negative_binomial_log_probs(x: Tensor, mus: Sequence[Tensor], theta: Tensor) -> list[Tensor]:
    """:func:`negative_binomial_log_prob` under each of several means, whose gamma functions are evaluated once."""
    if _has_large(x):
        return [negative_binomial_log_prob(x, mu, theta) for mu in mus]
    rising, is_large = log_rising(x, theta)
    of_count = rising - torch.lgamma(x + 1)
    return [of_count + log_prob_of_mean(x, mu, theta, is_large) for mu in mus]


def log_prob_of_mean(x: Tensor, mu: Tensor, theta: Tensor, is_large: Tensor) -> Tensor:
    """The part of a negative binomial's log-probability that depends on its mean, in the form that goes with a count.

    ``is_large`` says which, as :func:`log_rising` returns it.
    """
    log_ratio = torch.log1p(mu / theta)
    at_mean = torch.xlogy(x, mu.clamp_min(torch.finfo(mu.dtype).tiny))
    # x log(theta) is large and cancels: one form has it inside `rising`, the other leaves it out of both terms.
    as_poisson = at_mean - (x + theta) * log_ratio
    as_odds = at_mean - torch.xlogy(x, mu + theta) - theta * log_ratio
    return torch.where(is_large, as_poisson, as_odds)


def negative_binomial_means(mu: Tensor, theta: Tensor, shape: torch.Size) -> Tensor:
    """Gamma draws with mean mu: Poisson counts with these means are negative binomial."""
    theta = theta.expand(shape)
    gamma = torch.distributions.Gamma(theta, torch.ones_like(theta), validate_args=False).sample()
    return gamma / theta * mu


class _Counts(CellDistribution):
    """Base class of the three families of counts."""

    rho: Tensor
    library: Tensor

    cell_parameters = ("library",)
    links: ClassVar[dict[str, tuple[Link, ...]]] = {"rho": ("softmax", "softplus"), "gate_logits": ("identity",)}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "rho": nonnegative_vector,
        "library": constraints.nonnegative,
    }

    def _mu(self) -> Tensor:
        """Mean of the count component, batch shape + (G,)."""
        return self._full(self.library.unsqueeze(-1) * dense_rows(self.rho))

    @property
    def mean(self) -> Tensor:
        """Expected counts, shape batch + (G,)."""
        return self._mu()

    def _of_features(self, features: Tensor) -> CellDistribution:
        new = super()._of_features(features)
        if isinstance(self.rho, Readout) and self.rho.link == "softmax":
            # Shares among these genes, and their part of the library.
            assert isinstance(new, _Counts)
            assert isinstance(new.rho, Readout)
            new.library = self.library * (new.rho.log_normalizer() - self.rho.log_normalizer()).exp()
        return new

    def _dense_log_prob(self, x: Tensor, mu: Tensor, parameters: ParameterRows) -> Tensor:
        """Log-probability of every count, shape (n, G)."""
        raise NotImplementedError

    def _log_prob_rows(self, value: ValueRows, parameters: ParameterRows) -> Tensor:
        rho, gate = parameters["rho"], parameters.get("gate_logits")
        if isinstance(rho, Readout) and (gate is None or isinstance(gate, Readout)):
            theta = parameters.get("theta")
            return counts_log_prob(rho, parameters["library"], value.entries(), theta, gate)
        dense = {name: dense_rows(given) for name, given in parameters.items()}
        mu = dense["library"].unsqueeze(-1) * dense["rho"]
        return self._dense_log_prob(value.dense(), mu, dense).sum(-1)


class PoissonCounts(_Counts):
    """Poisson counts with mean ``library * rho``.

    Parameters
    ----------
    rho
        Share of each gene, shape (..., G): a :class:`Readout` with link "softmax" or
        "softplus", or dense and nonnegative.
    library
        Size factor of each cell, shape (...).

    Raises
    ------
    ValueError
        If shapes do not broadcast, a readout has another link, or (with validation on) a value
        is out of bounds.

    Examples
    --------
    >>> d = PoissonCounts(torch.tensor([[0.25, 0.75]]), torch.tensor([8.0]))
    >>> d.mean
    tensor([[2., 6.]])
    >>> d.log_prob(torch.tensor([[0.0, 0.0]]))
    tensor([-8.])
    """

    feature_parameters = ("rho",)

    def __init__(self, rho: Tensor, library: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"rho": rho, "library": library}, validate_args)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, shape batch + (G,)."""
        return self._mu()

    def _draw(self, shape: torch.Size) -> Tensor:
        return torch.poisson(self._mu().expand(shape))

    def _dense_log_prob(self, x: Tensor, mu: Tensor, parameters: ParameterRows) -> Tensor:
        return log_poisson(x, mu)


class NegativeBinomialCounts(_Counts):
    """Negative binomial counts with mean mu = ``library * rho`` and variance mu + mu^2 / theta.

    Parameters
    ----------
    rho, library
        As in :class:`~pyro_multivi.distributions.PoissonCounts`, which raises the same errors.
    theta
        Inverse dispersion, shape (G,) or (..., G), positive. Large means close to Poisson.

    Examples
    --------
    >>> d = NegativeBinomialCounts(torch.tensor([[0.5, 0.5]]), torch.tensor([8.0]), torch.tensor([2.0, 4.0]))
    >>> d.variance
    tensor([[12.,  8.]])
    """

    theta: Tensor

    feature_parameters = ("rho", "theta")
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {**_Counts.arg_constraints, "theta": positive_vector}

    def __init__(self, rho: Tensor, library: Tensor, theta: Tensor, validate_args: bool | None = None) -> None:
        super().__init__({"rho": rho, "library": library, "theta": theta}, validate_args)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, shape batch + (G,)."""
        mu = self._mu()
        return mu + mu.square() / self.theta

    def _draw(self, shape: torch.Size) -> Tensor:
        return torch.poisson(negative_binomial_means(self._mu(), self.theta, shape))

    def _dense_log_prob(self, x: Tensor, mu: Tensor, parameters: ParameterRows) -> Tensor:
        return negative_binomial_log_prob(x, mu, parameters["theta"])


class ZeroInflatedNegativeBinomialCounts(_Counts):
    """Negative binomial counts of mean mu = ``library * rho``, replaced by 0 with probability pi.

    Parameters
    ----------
    rho, library, theta
        As in :class:`~pyro_multivi.distributions.NegativeBinomialCounts`, which raises the same errors.
    gate_logits
        Logit of the dropout probability pi, shape (..., G): a :class:`Readout` with link
        "identity", or dense.

    Examples
    --------
    >>> d = ZeroInflatedNegativeBinomialCounts(
    ...     torch.tensor([[0.5, 0.5]]), torch.tensor([8.0]), torch.tensor([2.0, 4.0]), torch.zeros(2))
    >>> d.mean
    tensor([[2., 2.]])
    """

    theta: Tensor
    gate_logits: Tensor

    feature_parameters = ("rho", "theta", "gate_logits")
    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        **_Counts.arg_constraints,
        "theta": positive_vector,
        "gate_logits": real_vector,
    }

    def __init__(
        self, rho: Tensor, library: Tensor, theta: Tensor, gate_logits: Tensor, validate_args: bool | None = None
    ) -> None:
        super().__init__({"rho": rho, "library": library, "theta": theta, "gate_logits": gate_logits}, validate_args)

    @property
    def mean(self) -> Tensor:
        """Expected counts (1 - pi) mu, shape batch + (G,)."""
        return torch.sigmoid(-dense_rows(self.gate_logits)) * self._mu()

    @property
    def variance(self) -> Tensor:
        """Variance of the counts, shape batch + (G,)."""
        gate, mu = dense_rows(self.gate_logits), self._mu()
        return torch.sigmoid(-gate) * mu * (1 + mu * (self.theta.reciprocal() + gate.sigmoid()))

    def _draw(self, shape: torch.Size) -> Tensor:
        means = negative_binomial_means(self._mu(), self.theta, shape)
        kept = torch.bernoulli(torch.sigmoid(-dense_rows(self.gate_logits)).expand(shape))
        return kept * torch.poisson(means)

    def _dense_log_prob(self, x: Tensor, mu: Tensor, parameters: ParameterRows) -> Tensor:
        gate = parameters["gate_logits"]
        counted = negative_binomial_log_prob(x, mu, parameters["theta"])
        return torch.where(x == 0, torch.logaddexp(gate, counted), counted) - softplus(gate, threshold=40.0)
