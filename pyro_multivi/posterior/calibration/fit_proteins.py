r"""Fit of what intervals of proteins need beside the state: spread of the background, posterior of the decoder.

The background of a cell, :math:`\exp(m + s u)`, and the dispersion :math:`\phi` of its counts both make counts differ
between cells of one state. The ELBO favours :math:`\phi`, whose effect the likelihood integrates exactly, over u, whose
posterior is approximated, so that training leaves s too small. Here u is integrated out
(:mod:`pyro_multivi.networks.extra.given_count`), and the likelihood of the counts tells s from :math:`\phi` by the
shape of their distribution: one factor of s for all proteins, a factor of :math:`\phi` and shifts of m for each.
Curvature of the profile likelihood gives the error of the factor of s.

State and decoder were fitted to the same counts, which therefore differ less from what is decoded at the posterior
means than from the truth: there s comes out a fifth too small. The log-likelihood is averaged over draws of z and of
the last layers instead. By Fisher's identity the gradient of the marginal likelihood is that average under the exact
posterior.

The two last layers of the decoder, log odds and log ratio, get the Normal posterior in a few directions of the hidden
layer that the last layers of genes and regions have (:mod:`pyro_multivi.posterior.calibration.fit_weights`), the
information being the squared score of the counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_multivi.data.loader import Minibatches, spread
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.networks.extra.given_count import given_count
from pyro_multivi.networks.extra.proteins import START_SD, Proteins
from pyro_multivi.posterior.calibration.fit_weights import posterior_sd
from pyro_multivi.posterior.calibration.last_layer import Evidence
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

# Cells x proteins that it is fitted to: their shape tells the spread of the background to a tenth.
_ENTRIES, _MOST = 2**16, 4096
_FEWEST = 50
_STEPS, _PROFILE_STEPS = 40, 15
# With fewer the error of the integral, small as it is, depends on the spread as much as the likelihood does.
_NODES = 5
# Draws of z and of the last layers that the likelihood is averaged over.
_DRAWS = 4
# Standard deviation of the log of the spread before any data, around that of the start of training.
_PRIOR_SD = 0.5
_WEAK = 0.05
# Distance at which the profile likelihood is taken, and bounds of the factors, as logs.
_APART, _LARGEST = 0.2, 1.5


def clear_proteins(program: MultiVIProgram) -> None:
    """Return the draws of proteins to the parameters of training."""
    for proteins in proteins_of(program):
        _clear(proteins)


def _clear(proteins: Proteins) -> None:
    for buffer in proteins.calibrated:
        buffer.zero_()


@tells_if_interrupted("intervals of proteins are too narrow")
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
            raise


def proteins_of(program: MultiVIProgram) -> list[Proteins]:
    """Extra modalities of a program that are proteins."""
    return [modality for modality in program.modelled_extra if isinstance(modality, Proteins)]


def _fit(program: MultiVIProgram, proteins: Proteins, train: Minibatches) -> None:
    measured = train.index[proteins.measurement(train.table).measured.cpu()[train.index]]
    index = spread(measured, min(_MOST, max(_FEWEST, _ENTRIES // proteins.n_features)))
    if len(index) < _FEWEST:
        return
    cells = train.cut(index)
    _fit_weights(proteins, _Likelihood.of(program, proteins, cells), len(measured) / len(index))
    likelihood = _Likelihood.of(program, proteins, cells)
    found = likelihood.fitted(_no_shifts(proteins), _STEPS)
    # Of the profile likelihood, by a parabola through three points.
    ends = sum(
        likelihood.total(likelihood.fitted(found._replace(sd=found.sd + step), _PROFILE_STEPS, fixed=True))
        for step in (-_APART, _APART)
    )
    if not all(bool(part.isfinite().all()) for part in found):
        _clear(proteins)
        return
    curvature = (2 * likelihood.total(found) - ends) / _APART**2
    proteins.calibrated_log_sd[0] = found.sd
    proteins.calibrated_log_sd[1] = curvature.clamp(min=_PRIOR_SD**-2).rsqrt()
    proteins.calibrated_log_theta.copy_(found.theta)


class _Shifts(NamedTuple):
    """Shifts of the log of s, (), of phi, (F,), and of the background's mean in each batch, (batches, F)."""

    sd: Tensor
    theta: Tensor
    mean: Tensor


def _no_shifts(proteins: Proteins) -> _Shifts:
    zeros = partial(torch.zeros, dtype=torch.float64)
    return _Shifts(zeros(()), zeros(proteins.n_features), zeros(proteins.config.n_batch, proteins.n_features))


class _Likelihood(NamedTuple):
    """Counts of n cells, (n, F), and what is decoded for them, in float64.

    Log ratio and log odds, (S, n, F), are decoded from the hidden layers, (S, n, H), of S draws of the state, with
    draws of the last layers where these have a posterior.
    """

    y: Tensor
    measured: Tensor
    batch: Tensor
    log_mean: Tensor
    log_sd: Tensor
    log_theta: Tensor
    log_ratio: Tensor
    logits: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, program: MultiVIProgram, proteins: Proteins, cells: Cells) -> _Likelihood:
        """Likelihood of some cells at draws of the posterior."""
        with torch.no_grad(), evaluation_mode(program):
            latents = draw_latents(program, cells, _DRAWS)
            nodes: dict[str, Any] = dict(latents.trace.nodes)
            decoded = proteins.decoded(program.transform(nodes["z"]["value"]), cells.design, latents.noise)
            s = cells.design
            log_mean, log_sd = proteins.moments(s, torch.zeros_like(s[:1, :1]))
            log_theta = proteins.theta(cells, s).log()
        y, measured = proteins.seen(cells)
        return cls(
            _wide(y), measured.cpu(), _wide(s[:, : proteins.config.n_batch]), _wide(log_mean), _wide(log_sd),
            _wide(log_theta), _wide(decoded.log_ratio), _wide(decoded.logits), _wide(decoded.hidden),
        )  # fmt: skip

    def log_prob(self, shifts: _Shifts, log_ratio: Tensor, logits: Tensor) -> Tensor:
        """Log-likelihood of each count, (S, n, F), 0 where not measured, without what depends on counts alone."""
        log_theta, log_mean = self.log_theta + shifts.theta, self.log_mean + self.batch @ shifts.mean
        log_sd = self.log_sd + shifts.sd
        background, foreground = (
            given_count(self.y, self.measured, mean, log_sd, log_theta, _NODES).log_evidence
            for mean in (log_mean, log_mean + log_ratio)
        )
        theta = log_theta.exp()
        both = torch.logaddexp(logsigmoid(-logits) + background, logsigmoid(logits) + foreground)
        return torch.where(self.measured, both + torch.lgamma(self.y + theta) - torch.lgamma(theta), 0.0)

    @torch.enable_grad()
    def scores(self, shifts: _Shifts, draw: int) -> tuple[Tensor, Tensor]:
        """Gradients of a draw's log-likelihood with respect to the values of both last layers, (n, F)."""
        decoded = [part[draw].clone().requires_grad_() for part in (self.log_ratio, self.logits)]
        of_ratio, of_logits = torch.autograd.grad(self.log_prob(shifts, *decoded).sum(), decoded)
        # The log ratio is log(1 + exp(value of the layer)).
        return of_ratio * -(-self.log_ratio[draw]).expm1(), of_logits

    def terms(self, shifts: _Shifts) -> Iterator[Tensor]:
        """Log-posterior of the shifts in terms: its prior, and the average over the draws, one after another."""
        prior = ((self.log_sd.mean() + shifts.sd - math.log(START_SD)) / _PRIOR_SD).square()
        # Of shifts that no count speaks about: proteins that were measured in no cell of a batch.
        weak = _WEAK * (shifts.theta.square().sum() + shifts.mean.square().sum())
        yield -0.5 * (prior + weak)
        for log_ratio, logits in zip(self.log_ratio, self.logits, strict=True):
            yield self.log_prob(shifts, log_ratio, logits).sum() / len(self.log_ratio)

    def total(self, shifts: _Shifts) -> Tensor:
        """Log-posterior of the shifts, averaged over the draws."""
        return torch.stack(list(self.terms(shifts))).sum()

    @torch.enable_grad()
    def fitted(self, start: _Shifts, n_steps: int, fixed: bool = False) -> _Shifts:
        """Shifts of the largest log-posterior; with ``fixed`` that of s stays."""
        shifts = _Shifts(*(part.clone().requires_grad_() for part in start))
        optimizer = torch.optim.LBFGS(shifts[1:] if fixed else shifts, max_iter=n_steps, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = self.y.new_zeros(())
            for term in self.terms(shifts):
                # Backwards at once, so that memory is that of one draw.
                term = -term / len(self.y)
                term.backward()
                value += term.detach()
            return value

        optimizer.step(loss)
        return _Shifts(*(part.detach().clamp(-_LARGEST, _LARGEST) for part in shifts))


def _wide(values: Tensor) -> Tensor:
    return values.detach().cpu().double()


def _fit_weights(proteins: Proteins, likelihood: _Likelihood, share: float) -> None:
    """Set directions of the hidden layer and standard deviations of the weights in them.

    Layers that are no ``nn.Linear`` are left out. ``share`` is the number of cells that were trained on, relative to
    those of the likelihood.
    """
    directions = proteins.weight_directions
    unit = proteins.config.hidden**-0.5
    hidden = likelihood.hidden.flatten(0, 1)
    centre = hidden.mean(0)
    _, vectors = torch.linalg.eigh((hidden - centre).T @ (hidden - centre))
    vectors = vectors.flip(1)[:, : len(directions) - 1].T
    made = torch.cat([vectors * unit, -unit * (vectors @ centre)[:, None]], 1)
    last = torch.nn.functional.pad(made.new_ones(1, 1), (made.shape[1] - 1, 0))
    directions.copy_(torch.cat([made, last]))
    phi = torch.cat([(hidden - centre) @ vectors.T * unit, hidden.new_ones(len(hidden), 1)], 1)
    information, pull = torch.zeros(2, *proteins.weight_sd.shape, dtype=phi.dtype)
    n_draws = len(likelihood.hidden)
    for draw, phi_nr in enumerate(phi.split(len(likelihood.y))):
        for place, score in enumerate(likelihood.scores(_no_shifts(proteins), draw)):
            information[place] += score.square().T @ phi_nr.square() * share / n_draws
            pull[place] += score.T @ phi_nr * share / n_draws
    for place, name in enumerate(proteins.readouts):
        layer = getattr(proteins, name)
        if not isinstance(layer, torch.nn.Linear):
            continue
        weight = layer.weight.detach().cpu().double()
        sd = posterior_sd(Evidence(information[place], pull[place], weight @ vectors.T / unit))
        proteins.weight_sd[place] = sd.to(proteins.weight_sd)
