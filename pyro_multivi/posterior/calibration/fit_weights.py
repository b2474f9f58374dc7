r"""Fit of the posterior of the decoders' last layers.

Directions of the hidden layer that all features share, and each feature's information :math:`F_{jk}` in them, are
those of :mod:`pyro_multivi.posterior.calibration.last_layer`.

In them the weights have the prior that the data choose (:mod:`pyro_multivi.posterior.calibration.adaptive_prior`). The
posterior mean under it may lie away from the fitted weight, around which draws stay: their squared standard deviation
is the variance of the posterior and the square of that distance.

That is too sure of itself, for states z were inferred from the same counts, and hidden layers have errors too. Counts
of held-out cells say how far the weights are off: all standard deviations of a modality are multiplied by one factor,
the mean of its posterior given the scores of these counts.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, measured, spread
from pyro_multivi.data.modality import Modality, modelled
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.posterior.calibration.adaptive_prior import WIDEST, AdaptivePrior, log_evidence
from pyro_multivi.posterior.calibration.last_layer import Evidence, LastLayer
from pyro_multivi.posterior.engine.weight_posterior import weight_buffers
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")

# Held-out cells that are used at most; fewer than the other number say too little.
_MOST, _FEWEST = 2048, 10
# Training cells are never too unsure: the weights were fitted to them.
_FACTORS = tuple(2 ** (eighth / 8) for eighth in range(17))


def clear_weight_posteriors(program: MultiVIProgram) -> None:
    """Return the last layers to their fitted weights."""
    program.size_weight_directions()
    for modality in modelled(program.config):
        for buffer in weight_buffers(program, modality):
            buffer.zero_()


@torch.no_grad()
@tells_if_interrupted("intervals are those of the fitted decoder, and too narrow")
def fit_weight_posteriors(program: MultiVIProgram, train: Minibatches, held_out: Minibatches | None = None) -> None:
    """Set ``rna_weight_directions``, ``rna_weight_sd`` and those of ATAC.

    They stay zero where fewer than ten cells were measured, where the likelihood is not one of this package given
    rho or p itself, and where rho or p is not decoded by a readout of the decoder's layer of that name.

    Parameters
    ----------
    train
        Cells that it was trained on.
    held_out
        Cells that tell how far the weights are off; with fewer than ten of a modality the factor is 1.
    """
    clear_weight_posteriors(program)
    for modality in modelled(program.config):
        try:
            _fit(program, train, held_out, modality)
        except KeyboardInterrupt:
            clear_weight_posteriors(program)
            raise


def _fit(program: MultiVIProgram, train: Minibatches, held_out: Minibatches | None, modality: Modality) -> None:
    directions, sd = weight_buffers(program, modality)
    # A narrow layer has fewer; what is left of the buffers stays zero.
    layer = LastLayer.of(program, train, modality, min(len(directions), directions.shape[1]) - 1)
    if layer is None or not layer.fits_buffers(program):
        return
    k = len(layer.vectors)
    directions[:k, :-1], directions[:k, -1] = layer.vectors, layer.offset
    directions[-1, -1] = 1.0
    found = posterior_sd(layer.evidence(program, train))
    if held_out is not None and len(index := measured(held_out, modality)) >= _FEWEST:
        of_held_out = layer._replace(cells=spread(index, _MOST), share=1.0)
        factor = inflation(of_held_out.evidence(program, held_out), found)
        logger.info("weights of %s are %.1f times as uncertain as training cells say", modality.name, factor)
        found = factor * found
    sd[:, :k], sd[:, -1] = found[:, :-1], found[:, -1]


def posterior_sd(evidence: Evidence) -> Tensor:
    """Standard deviation of each feature's weight in each direction, (F, R), the last that of the intercept.

    Examples
    --------
    A likelihood that has its mode 0.5 from the fitted weight, and so much information that the prior does not matter:

    >>> information = torch.full((1, 3), 1e4)
    >>> posterior_sd(Evidence(information, 0.5 * information, torch.zeros(1, 2)))
    tensor([[0.4999, 0.4999, 0.5001]])
    """
    information_fk, pull_fk = evidence.of_slopes()
    mean_fk, variance_fk = AdaptivePrior.fitted(information_fk, pull_fk).posterior(information_fk, pull_fk)
    of_intercept = 1 / (evidence.information_fr[:, -1:] + 1)
    variance = torch.cat([variance_fk, of_intercept], 1)
    distance = torch.cat([mean_fk - evidence.fitted_fk, evidence.score_fr[:, -1:] * of_intercept], 1)
    # A step is one of Newton's, which far from the mode, and with little information, may go anywhere.
    return (variance + distance.square().clamp(max=WIDEST)).sqrt()


def inflation(held_out: Evidence, sd_fr: Tensor) -> float:
    """Factor by which standard deviations have to be multiplied for the scores of held-out counts.

    It is the posterior mean, all factors from 1 to 4 being as likely beforehand on a scale of logarithms.

    Examples
    --------
    Weights that are off by a standard deviation of 0.6, where 0.3 was expected:

    >>> generator = torch.Generator().manual_seed(0)
    >>> error, noise = torch.randn(2, 500, 4, generator=generator)
    >>> information = torch.full((500, 4), 25.0)
    >>> held_out = Evidence(information, information * 0.6 * error + 5 * noise, torch.zeros(500, 3))
    >>> round(inflation(held_out, torch.full((500, 4), 0.3)), 1)
    2.0
    """
    information, score = held_out.information_fr, held_out.score_fr
    factors = torch.tensor(_FACTORS, dtype=torch.float64, device=sd_fr.device)
    evidence = [log_evidence(information, score, (factor * sd_fr).square()).double().sum() for factor in _FACTORS]
    return float(torch.stack(evidence).softmax(0) @ factors)
