r"""Prior of the weights of a decoder's last layer, of which the data choose the widths (adaptive shrinkage).

Most features hardly differ between cells, some differ a lot: one width for all draws the latter towards the former, and
lets the former follow noise. Here the weight of feature j in direction k of the last hidden layer
(:mod:`pyro_multivi.posterior.calibration.last_layer`) has the prior

.. math:: w_{jk} \sim \mathrm{Normal}(0, \alpha_{c_j} \beta_k), \qquad P(c_j = c) = \pi_c

with a width of the class c of the feature, from a fixed grid, and one of the direction. The shares :math:`\pi` and the
widths :math:`\beta` of directions are those under which the counts of all features are likeliest (empirical Bayes, by
expectation maximisation).

References
----------
Stephens (2017), False discovery rates: a new deal, Biostatistics 18: a mixture of Normals on a grid of widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.loader import spread

# Prior variance of the effects of a class of features: a logit that moves by 0.06 to 6 between cells.
_GRID = tuple(2.0**power for power in range(-8, 6))
#: Prior variance of a weight at most: hardly a feature differs between cells by more than three nats.
WIDEST = 9.0
_NARROWEST = 1e-9
_ROUNDS = 60
# Features that the prior is fitted to at most, and the number that each class has beforehand.
_MOST, _BEFORE = 8192, 0.1
# Classes with a smaller share of the features are left out.
_LEAST_SHARE = 1e-3


def log_evidence(information_fk: Tensor, pull_fk: Tensor, variance: Tensor) -> Tensor:
    """Log-likelihood of each feature's counts if its weights are Normal(0, variance), less that if they are 0, (F,).

    ``variance`` is that of each weight, (F, K), or of all features, (K,).

    Examples
    --------
    A weight that is likeliest to be 2, with an error of 1:

    >>> log_evidence(torch.ones(1, 1), torch.full((1, 1), 2.0), torch.tensor([3.0]))
    tensor([0.8069])
    >>> known = [torch.distributions.Normal(0.0, sd).log_prob(torch.tensor(2.0)) for sd in (2.0, 1.0)]
    >>> round(float(known[0] - known[1]), 4)
    0.8069
    """
    spread_fk = information_fk * variance
    found: Tensor = 0.5 * (pull_fk.square() * variance / (1 + spread_fk) - spread_fk.log1p()).sum(1)
    return found


class AdaptivePrior(NamedTuple):
    """Prior of the weights of features in directions.

    Attributes
    ----------
    variance_ck
        Variance of a weight in each class of features, (C, K).
    share_c
        Share of the features in each class, (C,).
    """

    variance_ck: Tensor
    share_c: Tensor

    @classmethod
    def fitted(cls, information_fk: Tensor, pull_fk: Tensor) -> AdaptivePrior:
        """Fit the prior to all features.

        Parameters
        ----------
        information_fk
            Information of the counts of each feature on its weight in each direction.
        pull_fk
            That times the weight for which the counts are likeliest.

        Examples
        --------
        Of a hundred features ten differ between cells, in the first of two directions:

        >>> effect = torch.zeros(100, 2)
        >>> effect[:10, 0] = torch.linspace(-3, 3, 10)
        >>> information = torch.full((100, 2), 100.0)
        >>> prior = AdaptivePrior.fitted(information, information * effect)
        >>> mean, variance = prior.posterior(information, information * effect)
        >>> round(float(mean[0, 0]), 2), round(float(mean[50].abs().max()), 2)
        (-2.99, 0.0)
        """
        chosen = spread(torch.arange(len(information_fk), device=information_fk.device), _MOST)
        information, pull = information_fk[chosen], pull_fk[chosen]
        grid = torch.tensor(_GRID, dtype=information.dtype, device=information.device)
        of_direction = torch.ones_like(information[0])
        prior = cls(grid[:, None] * of_direction, torch.full_like(grid, 1 / len(grid)))
        for _ in range(_ROUNDS):
            class_fc = prior.classes(information, pull)
            squares = torch.zeros_like(of_direction)
            for place, width in enumerate(grid):
                mean, variance = prior._given_class(place, information, pull)
                squares += class_fc[:, place] @ (mean.square() + variance) / width
            counted = class_fc.sum(0) + _BEFORE
            of_direction = squares / len(information)
            prior = cls((grid[:, None] * of_direction).clamp(_NARROWEST, WIDEST), counted / counted.sum())
        is_used = prior.share_c >= _LEAST_SHARE
        return cls(prior.variance_ck[is_used], prior.share_c[is_used] / prior.share_c[is_used].sum())

    def classes(self, information_fk: Tensor, pull_fk: Tensor) -> Tensor:
        """Probability of each class given the counts of a feature, (F, C)."""
        evidence = [log_evidence(information_fk, pull_fk, variance) for variance in self.variance_ck]
        return (torch.stack(evidence, 1) + self.share_c.log()).softmax(1)

    def posterior(self, information_fk: Tensor, pull_fk: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each weight given the counts, (F, K) each, as if directions were independent."""
        class_fc = self.classes(information_fk, pull_fk)
        mean_fk, square_fk = torch.zeros_like(pull_fk), torch.zeros_like(pull_fk)
        for place in range(len(self.share_c)):
            mean, variance = self._given_class(place, information_fk, pull_fk)
            mean_fk += class_fc[:, place, None] * mean
            square_fk += class_fc[:, place, None] * (mean.square() + variance)
        return mean_fk, square_fk - mean_fk.square()

    def _given_class(self, place: int, information_fk: Tensor, pull_fk: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each weight if all features were of one class."""
        variance = self.variance_ck[place] / (1 + information_fk * self.variance_ck[place])
        return pull_fk * variance, variance
