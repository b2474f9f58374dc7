r"""Fit of what intervals of proteins need beside the state: spread of the background, posterior of the decoder.

The background of a cell, :math:`\exp(m + s u)`, and the dispersion :math:`\phi` of its counts both make counts differ
between cells of one state. The ELBO favours :math:`\phi`, whose effect the likelihood integrates exactly, over u, whose
posterior is approximated, so that training leaves s too small. Here u is integrated out
(:mod:`pyro_multivi.networks.extra.given_count`), and the likelihood of the counts at the posterior means of z tells
s from :math:`\phi` by the shape of their distribution: one factor of s for all proteins, a factor of :math:`\phi` and
shifts of m for each. Curvature of the profile likelihood gives the error of the factor of s.

The two last layers of the decoder, log odds and log ratio, get the Normal posterior in a few directions of the hidden
layer that the last layers of genes and regions have (:mod:`pyro_multivi.posterior.calibration.fit_weights`), the
information being the squared score of the counts.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.networks.extra.given_count import given_count
from pyro_multivi.networks.extra.proteins import START_SD, Proteins
from pyro_multivi.posterior.calibration.fit_weights import posterior_sd
from pyro_multivi.posterior.engine.draws import mean_latents
from pyro_multivi.posterior.engine.replicates import spread
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

# Cells x proteins that it is fitted to: their shape tells the spread of the background to a tenth.
_ENTRIES, _MOST = 2**16, 4096
_FEWEST = 50
_STEPS, _PROFILE_STEPS = 40, 15
# With fewer the error of the integral, small as it is, depends on the spread as much as the likelihood does.
_NODES = 5
# Standard deviation of the log of the spread before any data, around that of the start of training.
_PRIOR_SD = 0.5
_WEAK = 0.05
# Distance at which the profile likelihood is taken, and bounds of the factors, as logs.
_APART, _LARGEST = 0.2, 1.5


def clear_proteins(program: MultiVIProgram) -> None:
    """Return the draws of proteins to the parameters of training."""
    for proteins in proteins_of(program):
        for buffer in proteins.calibrated:
            buffer.zero_()


def fit_proteins(program: MultiVIProgram, train: Minibatches) -> None:
    """Set the calibrated buffers of :class:`~pyro_multivi.networks.extra.Proteins`.

    They stay zero where fewer than fifty cells were measured, and for a class with statements of its own.

    Parameters
    ----------
    train
        Cells that it was trained on.
    """
    clear_proteins(program)
    for proteins in proteins_of(program):
        if not proteins.is_as_written:
            continue
        try:
            _fit(program, proteins, train)
        except KeyboardInterrupt:
            clear_proteins(program)
            logger.warning("interrupted after training: intervals of proteins are too narrow")
            return


def proteins_of(program: MultiVIProgram) -> list[Proteins]:
    """Extra modalities of a program that are proteins."""
    return [modality for modality in program.modelled_extra if isinstance(modality, Proteins)]


def _fit(program: MultiVIProgram, proteins: Proteins, train: Minibatches) -> None:
    measured = train.index[proteins.measurement(train.table).measured.cpu()[train.index]]
    index = spread(measured, min(_MOST, max(_FEWEST, _ENTRIES // proteins.n_features)))
    if len(index) < _FEWEST:
        return
    likelihood, hidden = _Likelihood.of(program, proteins, train, index)
    n_features = proteins.n_features
    zero = likelihood.y.new_zeros
    found = likelihood.fitted(zero(()), [zero(n_features), zero(proteins.config.n_batch, n_features)], _STEPS)
    shift, (theta_shift, mean_shift) = found
    # Of the profile likelihood, by a parabola through three points.
    profile = [
        likelihood.fitted(shift + step, [theta_shift, mean_shift], _PROFILE_STEPS, fixed=True)
        for step in (-_APART, _APART)
    ]
    if not (bool(shift.isfinite()) and bool(theta_shift.isfinite().all())):
        return
    middle = likelihood.total(shift, theta_shift, mean_shift)
    ends = sum(likelihood.total(at, *rest) for at, rest in profile)
    curvature = (2 * middle - ends) / _APART**2
    proteins.calibrated_log_sd[0] = shift
    proteins.calibrated_log_sd[1] = curvature.clamp(min=_PRIOR_SD**-2).rsqrt()
    proteins.calibrated_log_theta.copy_(theta_shift)
    _fit_weights(proteins, likelihood, hidden, shift, theta_shift, mean_shift, len(measured) / len(index))


class _Likelihood(NamedTuple):
    """Counts of n cells, (n, F), and what is decoded of their posterior means, in float64."""

    y: Tensor
    measured: Tensor
    batch: Tensor
    log_mean: Tensor
    log_sd: Tensor
    log_theta: Tensor
    log_ratio: Tensor
    logits: Tensor

    @classmethod
    def of(
        cls, program: MultiVIProgram, proteins: Proteins, train: Minibatches, index: Tensor
    ) -> tuple[_Likelihood, Tensor]:
        """Likelihood of the cells at some positions, and their hidden layer, (n, H)."""
        cells = train.cut(index)
        with torch.no_grad(), evaluation_mode(program):
            nodes: dict[str, Any] = dict(mean_latents(program, cells).trace.nodes)
            z, s = program.transform(nodes["z"]["value"])[0], cells.design
            hidden = proteins.decode(z, s)
            log_ratio, logits = proteins.log_ratio(hidden), proteins.odds(hidden)
            log_mean, log_sd = proteins.moments(s, torch.zeros_like(s[:1, :1]))
            log_theta = proteins.theta(cells, s).log()
        y, measured = proteins.seen(cells)
        found = cls(
            _wide(y), measured.cpu(), _wide(s[:, : proteins.config.n_batch]), _wide(log_mean), _wide(log_sd),
            _wide(log_theta), _wide(log_ratio).exp().log1p(), _wide(logits),
        )  # fmt: skip
        return found, _wide(hidden)

    def log_prob(
        self, shift: Tensor, theta_shift: Tensor, mean_shift: Tensor, log_ratio: Tensor, logits: Tensor
    ) -> Tensor:
        """Log-likelihood of each count, (n, F), 0 where not measured, without what depends on counts alone."""
        log_theta, log_mean = self.log_theta + theta_shift, self.log_mean + self.batch @ mean_shift
        log_sd = self.log_sd + shift
        background, foreground = (
            given_count(self.y, self.measured, mean, log_sd, log_theta, _NODES).log_evidence
            for mean in (log_mean, log_mean + log_ratio)
        )
        theta = log_theta.exp()
        both = torch.logaddexp(logsigmoid(-logits) + background, logsigmoid(logits) + foreground)
        return torch.where(self.measured, both + torch.lgamma(self.y + theta) - torch.lgamma(theta), 0.0)

    def total(self, shift: Tensor, theta_shift: Tensor, mean_shift: Tensor) -> Tensor:
        """Log-posterior of the shifts."""
        prior = ((self.log_sd.mean() + shift - math.log(START_SD)) / _PRIOR_SD).square()
        likelihood = self.log_prob(shift, theta_shift, mean_shift, self.log_ratio, self.logits).sum()
        # Of shifts that no count speaks about: proteins that were measured in no cell of a batch.
        weak = _WEAK * (theta_shift.square().sum() + mean_shift.square().sum())
        return likelihood - 0.5 * (prior + weak)

    @torch.enable_grad()
    def fitted(
        self, shift: Tensor, rest: list[Tensor], n_steps: int, fixed: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Shifts of the largest log-posterior; with ``fixed`` that of s stays."""
        shift, rest = shift.clone().requires_grad_(not fixed), [part.clone().requires_grad_() for part in rest]
        moving = rest if fixed else [shift, *rest]
        optimizer = torch.optim.LBFGS(moving, max_iter=n_steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = -self.total(shift, *rest) / len(self.y)
            value.backward()
            return value

        optimizer.step(loss)
        return shift.detach().clamp(-_LARGEST, _LARGEST), [part.detach().clamp(-_LARGEST, _LARGEST) for part in rest]


def _wide(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _fit_weights(
    proteins: Proteins,
    likelihood: _Likelihood,
    hidden: Tensor,
    shift: Tensor,
    theta_shift: Tensor,
    mean_shift: Tensor,
    share: float,
) -> None:
    """Set directions of the hidden layer and standard deviations of the weights in them."""
    directions = proteins.weight_directions
    unit = proteins.config.hidden**-0.5
    centre = hidden.mean(0)
    _, vectors = torch.linalg.eigh((hidden - centre).T @ (hidden - centre))
    vectors = vectors.flip(1)[:, : len(directions) - 1].T
    made = torch.cat([vectors * unit, -unit * (vectors @ centre)[:, None]], 1)
    last = torch.nn.functional.pad(made.new_ones(1, 1), (made.shape[1] - 1, 0))
    directions.copy_(torch.cat([made, last]))
    phi = torch.cat([(hidden - centre) @ vectors.T * unit, hidden.new_ones(len(hidden), 1)], 1)
    with torch.enable_grad():
        decoded = [likelihood.log_ratio.clone().requires_grad_(), likelihood.logits.clone().requires_grad_()]
        total = likelihood.log_prob(shift, theta_shift, mean_shift, *decoded).sum()
        scores = list(torch.autograd.grad(total, decoded))
    # Of the layer's value a, where the log ratio is log(1 + exp(a)).
    scores[0] = scores[0] * -(-likelihood.log_ratio).expm1()
    for place, (name, score) in enumerate(zip(proteins.readouts, scores, strict=True)):
        weight = getattr(proteins, name).weight.detach().cpu().double()
        sd = posterior_sd(score.square().T @ phi.square() * share, score.T @ phi * share, weight @ vectors.T / unit)
        proteins.weight_sd[place] = sd.to(proteins.weight_sd)
