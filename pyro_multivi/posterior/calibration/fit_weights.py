r"""Fit of the posterior of the decoders' last layers.

For feature j the information of the counts of cell n on its logit is :math:`f_{nj} = (\partial\mu/\partial a)^2 / v`,
with :math:`\mu` and v the mean and variance of a count: exact for Poisson, negative binomial and Bernoulli counts, a
little low with zero inflation. Directions are the leading eigenvectors of :math:`\sum_n f_n h_n h_n^T` of the hidden
layers h under the prior of the weights, :math:`f_n` summed over features, so that all features share them (as in
Kronecker-factored Laplace approximations; Ritter et al. 2018). In them each feature has its own information
:math:`F_{jk} = \sum_n f_{nj} \phi_k(h_n)^2`.

The prior of training has one width for all features, and draws those that differ between cells towards those that do
not; early stopping leaves weights on their way. For the posterior each feature has a width of its own,
:math:`\alpha_j`, by evidence (expectation maximisation), and its mean lies a Newton step from the fitted weight. The
squared standard deviation of the draws, which stay around the fitted weight, is
:math:`1 / (F_{jk} + 1 / \alpha_j)` and the squared length of that step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, spread
from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.modality import Modality, modelled
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.base import CellDistribution
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace
from pyro_multivi.posterior.engine.replicates import counts_of
from pyro_multivi.posterior.engine.weight_posterior import weight_buffers
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

# Cells that directions and information are taken from: more change the standard deviations by a few per cent. Their
# entries are bounded too, which keeps the fit within the time of an epoch.
_DIRECTION_CELLS, _MOST, _ENTRIES = 512, 4096, 2**28
_AT_ONCE = 128
# Fewer cells say nothing about a layer of 128 units.
_FEWEST = 10
# Features of a block: 2 MB for 128 cells.
_WIDTH = 4096
# Effects of one nat between cells, which the width of a feature's prior counts beside its own directions.
_PRIOR_DIRECTIONS = 2
_ROUNDS = 30
# Variance of the effects of a feature at most: hardly one differs between cells by more than three nats.
_WIDEST = 9.0


def clear_weight_posteriors(program: MultiVIProgram) -> None:
    """Return the last layers to their fitted weights."""
    program.size_weight_directions()
    for modality in modelled(program.config):
        for buffer in weight_buffers(program, modality):
            buffer.zero_()


@torch.no_grad()
def fit_weight_posteriors(program: MultiVIProgram, train: Minibatches) -> None:
    """Set ``rna_weight_directions``, ``rna_weight_sd`` and those of ATAC.

    They stay zero where fewer than ten cells were measured, where the likelihood is not one of this package, and where
    rho or p is not decoded by a readout of the decoder's layer of that name.

    Parameters
    ----------
    train
        Cells that it was trained on.
    """
    clear_weight_posteriors(program)
    for modality in modelled(program.config):
        try:
            _fit(program, train, modality)
        except KeyboardInterrupt:
            clear_weight_posteriors(program)
            logger.warning("interrupted after training: intervals are those of the fitted decoder, and too narrow")
            return


def _fit(program: MultiVIProgram, train: Minibatches, modality: Modality) -> None:
    measured = train.index[modality.measured_in(train.table)[train.index]]
    n_features = modality.n_features_in(program.config)
    index = spread(measured, min(_MOST, max(_DIRECTION_CELLS, _ENTRIES // n_features)))
    directions, sd = weight_buffers(program, modality)
    # A narrow layer has fewer; what is left of the buffers stays zero.
    n_directions = min(len(directions), directions.shape[1]) - 1
    if len(index) < _FEWEST:
        return
    # Of a unit prior: weights have variance 1 / H.
    unit = program.config.hidden**-0.5
    hidden_parts, weights = [], []
    for part in spread(index, _DIRECTION_CELLS).split(_AT_ONCE):
        decoded = _Decoded.of(program, train.cut(part), modality)
        if decoded is None or decoded.readout.hidden.shape[-1] != directions.shape[1] - 1:
            return
        hidden_parts.append(decoded.readout.hidden[0] * unit)
        weights.append(torch.stack([found.sum(1) for _, found, _ in decoded.evidence()]).sum(0))
    hidden, weight = torch.cat(hidden_parts).double(), torch.cat(weights).double()
    # Around the mean, which belongs to the intercept.
    centre = weight @ hidden / weight.sum().clamp(min=1e-12)
    centred = hidden - centre
    _, vectors = torch.linalg.eigh((centred * weight[:, None]).T @ centred)
    vectors = vectors.flip(1)[:, :n_directions].T.to(directions.dtype)
    directions[:n_directions, :-1] = vectors * unit
    directions[:n_directions, -1] = -(vectors @ centre.to(vectors.dtype))
    directions[-1, -1] = 1.0

    information_fr, score_fr = torch.zeros_like(sd), torch.zeros_like(sd)
    for part in index.split(_AT_ONCE):
        decoded = _Decoded.of(program, train.cut(part), modality)
        assert decoded is not None
        phi = torch.nn.functional.linear(decoded.readout.hidden[0], directions[:, :-1], directions[:, -1])
        for features, found, score in decoded.evidence():
            information_fr[features] += found.T @ phi.square()
            score_fr[features] += score.T @ phi
        # In units of the prior.
        fitted_fk = decoded.readout.weight @ vectors.T / unit
        fitted_fk = torch.nn.functional.pad(fitted_fk, (0, sd.shape[1] - 1 - n_directions))
    share = len(measured) / len(index)
    sd.copy_(posterior_sd(information_fr * share, score_fr * share, fitted_fk))


def posterior_sd(information_fr: Tensor, score_fr: Tensor, fitted_fk: Tensor) -> Tensor:
    """Standard deviation of each feature's weight in each direction, (F, R), the last that of the intercept.

    Parameters
    ----------
    information_fr, score_fr
        Information of the counts, and gradient of their log-likelihood at the fitted weights, (F, R).
    fitted_fk
        Weights in units of their prior, without the intercept, (F, R - 1).

    Examples
    --------
    A likelihood that has its mode 0.5 from the fitted weight, and so much information that the prior does not matter:

    >>> information = torch.full((1, 3), 1e4)
    >>> posterior_sd(information, 0.5 * information, torch.zeros(1, 2))
    tensor([[0.5000, 0.5000, 0.5001]])
    """
    slopes, intercepts = information_fr[:, :-1], information_fr[:, -1:]
    # Where the likelihood would have its mode, times its information: a step of Newton's from the fitted weight.
    pull = slopes * fitted_fk + score_fr[:, :-1]
    width = torch.ones_like(slopes[:, :1])
    for _ in range(_ROUNDS):
        variance = 1 / (slopes + 1 / width)
        squares = ((pull * variance).square() + variance).sum(1, keepdim=True)
        width = ((squares + _PRIOR_DIRECTIONS) / (slopes.shape[1] + _PRIOR_DIRECTIONS)).clamp(max=_WIDEST)
    variance = torch.cat([1 / (slopes + 1 / width), 1 / (intercepts + 1)], 1)
    distance = torch.cat([pull * variance[:, :-1] - fitted_fk, score_fr[:, -1:] * variance[:, -1:]], 1)
    # A step is one of Newton's, which far from the mode, and with little information, may go anywhere.
    return (variance + distance.square().minimum(width)).sqrt()


class _Decoded(NamedTuple):
    """A modality in B cells that have it, at a draw of their latents: last layer, distribution of counts, counts."""

    readout: Readout
    name: str
    fn: CellDistribution
    counts: Tensor
    counted: Panels | None

    @classmethod
    def of(cls, program: MultiVIProgram, cells: Cells, modality: Modality) -> _Decoded | None:
        """Decode some cells; None where the last layer of the decoder, or the likelihood, is unknown."""
        with evaluation_mode(program):
            nodes: dict[str, Any] = dict(model_trace(program.model, cells, draw_latents(program, cells)).nodes)
        name = modality.decoded
        readout, fn = nodes[name]["value"], nodes[modality.counts]["fn"]
        if not (isinstance(readout, Readout) and isinstance(fn, CellDistribution) and hasattr(fn, name)):
            return None
        return cls(readout, name, fn, counts_of(program, cells, modality.counts)[0], modality.panels_in(cells))

    def evidence(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of features: information and score of the counts of each cell on the logit of each, (B, W)."""
        for features, fn in self.fn.blocks(_WIDTH):
            values, mean = getattr(fn, self.name), fn.mean
            # Of log rho or log p: the count's mean is proportional to it.
            slope = -(-values).expm1() / values.clamp(min=1e-12) if self.readout.link == "softplus" else 1 - values
            slope = mean * slope
            relative = slope / fn.variance.clamp(min=1e-12)
            if self.counted is not None:
                relative = relative * self.counted.measured[self.counted.code][:, features]
            yield features, (relative * slope)[0], (relative * (self.counts[:, features] - mean))[0]
