"""Counts that are background or foreground: a mixture of two negative binomials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid

from pyro_multivi.distributions.counts import negative_binomial_log_probs, negative_binomial_means


class NegativeBinomialMixture(TorchDistribution):
    r"""Counts that are foreground with probability :math:`1 - \pi` and background otherwise, elementwise.

    .. math:: y \sim \pi\, \mathrm{NB}(\beta, \phi) + (1 - \pi)\, \mathrm{NB}(\mu, \phi)

    each with variance mean + mean^2 / phi: the likelihood of proteins of Gayoso et al. (2021). Every count is a draw of
    its own; ``.mask(measured).to_event(1)`` makes a cell's vector of them.

    Parameters
    ----------
    background, foreground
        Means beta and mu, (...), positive.
    theta
        Inverse dispersion phi, (...), positive.
    logits
        Log odds of the foreground, log((1 - pi) / pi), (...).

    Examples
    --------
    >>> d = NegativeBinomialMixture(torch.tensor(2.0), torch.tensor(10.0), torch.tensor(4.0), torch.tensor(0.0))
    >>> d.mean, d.foreground_probability
    (tensor(6.), tensor(0.5000))
    """

    background: Tensor
    foreground: Tensor
    theta: Tensor
    logits: Tensor

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "background": constraints.nonnegative,
        "foreground": constraints.nonnegative,
        "theta": constraints.positive,
        "logits": constraints.real,
    }
    support = constraints.nonnegative_integer

    def __init__(
        self, background: Tensor, foreground: Tensor, theta: Tensor, logits: Tensor, validate_args: bool | None = None
    ) -> None:
        self.background, self.foreground, self.theta, self.logits = broadcast_all(background, foreground, theta, logits)
        super().__init__(self.logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> NegativeBinomialMixture:
        """The same distribution with a larger batch shape."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self  # every plate calls this
        background, foreground, theta, logits = (
            part.expand(shape) for part in (self.background, self.foreground, self.theta, self.logits)
        )
        return NegativeBinomialMixture(background, foreground, theta, logits, validate_args=False)

    @property
    def foreground_probability(self) -> Tensor:
        """Probability of the foreground before the count is seen, 1 - pi."""
        return self.logits.sigmoid()

    @property
    def mean(self) -> Tensor:
        """Expected counts."""
        return torch.lerp(self.background, self.foreground, self.foreground_probability)

    @property
    def variance(self) -> Tensor:
        """Variance of the counts: within the components, and between their means."""
        share = self.foreground_probability
        within = [mean + mean.square() / self.theta for mean in (self.background, self.foreground)]
        apart = (self.foreground - self.background).square()
        return torch.lerp(within[0], within[1], share) + share * (1 - share) * apart

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts, sample shape + batch shape."""
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            is_foreground = torch.bernoulli(self.foreground_probability.expand(shape)).bool()
            mean = torch.where(is_foreground, self.foreground, self.background)
            return torch.poisson(negative_binomial_means(mean, self.theta, shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of counts, elementwise."""
        if self._validate_args:
            self._validate_sample(value)
        means = (self.background, self.foreground)
        background, foreground = negative_binomial_log_probs(value, means, self.theta)
        return torch.logaddexp(logsigmoid(-self.logits) + background, logsigmoid(self.logits) + foreground)
