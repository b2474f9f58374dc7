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

from collections.abc import Iterator, Sequence
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
    return _given_variance(information_fk.T, pull_fk.T, variance.T if variance.ndim == 2 else variance[:, None])[0]


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
        # Features last: sums over a few directions are slow where they lie beside each other in memory.
        information, pull = information_fk[chosen].T.contiguous(), pull_fk[chosen].T.contiguous()
        grid = torch.tensor(_GRID, dtype=information.dtype, device=information.device)
        of_direction = torch.ones_like(information[:, 0])
        prior = cls(grid[:, None] * of_direction, torch.full_like(grid, 1 / len(grid)))
        for _ in range(_ROUNDS):
            evidence, means, variances = zip(*prior._given_classes(information, pull), strict=True)
            class_cf = prior._of_evidence(evidence)
            squares = torch.zeros_like(of_direction)
            for place, width in enumerate(grid):
                squares += (means[place].square() + variances[place]) @ class_cf[place] / width
            counted = class_cf.sum(1) + _BEFORE
            of_direction = squares / len(chosen)
            prior = cls((grid[:, None] * of_direction).clamp(_NARROWEST, WIDEST), counted / counted.sum())
        is_used = prior.share_c >= _LEAST_SHARE
        return cls(prior.variance_ck[is_used], prior.share_c[is_used] / prior.share_c[is_used].sum())

    def classes(self, information_fk: Tensor, pull_fk: Tensor) -> Tensor:
        """Probability of each class given the counts of a feature, (F, C)."""
        return self._of_evidence([found for found, _, _ in self._given_classes(information_fk.T, pull_fk.T)]).T

    def posterior(self, information_fk: Tensor, pull_fk: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of each weight given the counts, (F, K) each, as if directions were independent."""
        class_fc = self.classes(information_fk, pull_fk)
        mean_fk, square_fk = torch.zeros_like(pull_fk), torch.zeros_like(pull_fk)
        # Once more: of all features and classes together they would need much memory.
        for place, (_, mean_kf, variance_kf) in enumerate(self._given_classes(information_fk.T, pull_fk.T)):
            mean_fk += class_fc[:, place, None] * mean_kf.T
            square_fk += class_fc[:, place, None] * (mean_kf.square() + variance_kf).T
        return mean_fk, square_fk - mean_fk.square()

    def _given_classes(self, information_kf: Tensor, pull_kf: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Log evidence, and mean and variance of each weight, if all features were of one class, for each class."""
        return (_given_variance(information_kf, pull_kf, variance[:, None]) for variance in self.variance_ck)

    def _of_evidence(self, evidence: Sequence[Tensor]) -> Tensor:
        """Probability of each class, (C, F), by the log evidence of each, (F,)."""
        return (torch.stack(list(evidence)) + self.share_c.log()[:, None]).softmax(0)


def _given_variance(information_kf: Tensor, pull_kf: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log evidence of each feature, (F,), and mean and variance of its weights, (K, F), under Normal(0, variance)."""
    spread_kf = information_kf * variance
    variance_kf = variance / (1 + spread_kf)
    mean_kf = pull_kf * variance_kf
    return 0.5 * (pull_kf * mean_kf - spread_kf.log1p()).sum(0), mean_kf, variance_kf
