r"""Fit of the variation between cells that the latent state does not explain.

Where cells differ too little for their number, a direction is lost in training: z stays at its prior, the decoders do
not respond, and draws of z and of the decoders' weights leave it out. How large it is can still be told. The scores
:math:`s_{nj}` of counts on the logits of features (derivatives of their log-likelihood, at the posterior mean of z) are
independent between features if nothing is left. Effects :math:`\sum_k u_{nk} a_{jk}` in K directions, with
:math:`u \sim Normal(0, 1)` and :math:`a_{jk} \sim Normal(0, b\, \tau_j^2)`, make them alike in pairs of cells
:math:`n \ne m`:

.. math::

    E\Big[\sum_{i \ne j} \tau_i^2 \tau_j^2\, s_{ni} s_{mi} s_{nj} s_{mj}\Big] = K b^2 \sum_{i \ne j}
    \tau_i^4 \tau_j^4\, f_{ni} f_{mi} f_{nj} f_{mj}

with f the information of a count. :math:`\tau_j^2` is the variance of the feature's logit between states under the
prior that the data have chosen (:mod:`pyro_multivi.posterior.calibration.adaptive_prior`): features that differ along
directions that were found are expected to differ along others. The mean over pairs of cells estimates
:math:`K b^2`. As z is one state for all modalities, their estimates are also pooled, weighted by precision, and each
modality has the larger one of its own and the pooled estimate.

The standard deviation of a logit among cells of one state is :math:`\sqrt{K b}\, \tau_j`. K is not known: at least 1,
at most the number of dimensions in which posteriors of z are the prior. The geometric mean is taken. As standard
deviations grow with the fourth root of K, both ends are within a factor of 1.5 for 20 dimensions.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, spread
from pyro_multivi.data.modality import Modality, modelled
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.posterior.calibration.adaptive_prior import AdaptivePrior
from pyro_multivi.posterior.calibration.last_layer import Decoded, LastLayer
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.posterior_scale import normal_in
from pyro_multivi.posterior.engine.weight_posterior import residual_buffer
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

_DIRECTIONS = 15
# Cells that are compared in pairs, and the features that differ most: matrices of 32 MB.
_CELLS, _FEATURES = 1024, 8192
_AT_ONCE = 128
# A logit hardly moves by more among cells of one state.
_LARGEST = 2.0


class Likeness(NamedTuple):
    """Likeness of the scores of pairs of cells.

    Attributes
    ----------
    found, error
        Mean over pairs of cells, and its standard error.
    expected
        What it would be for K b² = 1.
    """

    found: float
    error: float
    expected: float

    @classmethod
    def of(cls, score_nf: Tensor, information_nf: Tensor, variance_f: Tensor) -> Likeness:
        """Compare cells.

        Parameters
        ----------
        score_nf, information_nf
            Score of each count on its logit, and its information, (n, F).
        variance_f
            Variance of the logit of each feature between states, (F,).

        Examples
        --------
        Cells that differ in two directions, along which each of 400 logits has effects with a variance of 0.1:

        >>> generator = torch.Generator().manual_seed(0)
        >>> state = torch.randn(300, 2, generator=generator)
        >>> effect = 0.1**0.5 * torch.randn(2, 400, generator=generator)
        >>> score = state @ effect + torch.randn(300, 400, generator=generator)
        >>> found = Likeness.of(score, torch.ones(300, 400), torch.ones(400))
        >>> round(found.squared_share, 3)
        0.02
        """
        found_n = _of_pairs(score_nf, score_nf, variance_f)
        expected_n = _of_pairs(information_nf * variance_f, information_nf, variance_f)
        # Each pair counts in the means of two cells.
        error = 2 * found_n.std() / len(found_n) ** 0.5
        return cls(float(found_n.mean()), float(error), float(expected_n.mean()))

    @property
    def squared_share(self) -> float:
        """Estimate of K b², at least 0; 0 where no feature differs between states."""
        return max(0.0, self.found / self.expected) if self.expected > 0 else 0.0


@torch.no_grad()
@tells_if_interrupted("intervals leave out what the latent state does not explain")
def fit_residuals(program: MultiVIProgram, train: Minibatches) -> None:
    """Set ``rna_residual_sd`` and ``atac_residual_sd``.

    They stay zero where fewer than ten cells were measured, where q(z) is not Normal, where the likelihood is not one
    of this package given rho or p itself, and where rho or p is not decoded by a readout of the decoder's layer of
    that name.

    Parameters
    ----------
    train
        Cells that it was trained on.
    """
    clear_residuals(program)
    compared = [_compare(program, train, modality) for modality in modelled(program.config)]
    found = [each for each in compared if each is not None]
    shared = pooled([each.likeness for each in found])
    for modality, variance_f, likeness, n_unknown in found:
        squared_share = max(likeness.squared_share, shared.squared_share)
        sd_f = (variance_f * (squared_share * n_unknown**0.5) ** 0.5).sqrt().clamp(max=_LARGEST)
        residual_buffer(program, modality).copy_(sd_f)
        logger.info("logits of %s differ by %.2f among cells of one state", modality.name, sd_f.mean())


def clear_residuals(program: MultiVIProgram) -> None:
    """Return to cells that differ by their state alone."""
    for modality in modelled(program.config):
        residual_buffer(program, modality).zero_()


def pooled(several: list[Likeness]) -> Likeness:
    """Likeness in all modalities, each weighted by its precision.

    Examples
    --------
    >>> sure, unsure = Likeness(2.0, 0.1, 10.0), Likeness(-1.0, 10.0, 10.0)
    >>> round(pooled([sure, unsure]).squared_share, 2)
    0.2
    """
    # An error of 0 is that of scores that are all 0.
    weights = [each.expected / max(each.error, 1e-30) ** 2 for each in several]
    found = sum(weight * each.found for weight, each in zip(weights, several, strict=True))
    expected = sum(weight * each.expected for weight, each in zip(weights, several, strict=True))
    return Likeness(found, expected**0.5, expected)


class _Compared(NamedTuple):
    """Variance of each feature's logit between states, (F,), likeness of cells, and dimensions left at the prior."""

    modality: Modality
    variance_f: Tensor
    likeness: Likeness
    n_unknown: float


def _compare(program: MultiVIProgram, train: Minibatches, modality: Modality) -> _Compared | None:
    layer = LastLayer.of(program, train, modality, _DIRECTIONS)
    if layer is None or not layer.fits_buffers(program):
        return None
    variance_f = _variance_between_states(program, train, layer)
    chosen = variance_f.topk(min(_FEATURES, len(variance_f))).indices
    scores, information, unknown = [], [], []
    for part in spread(layer.cells, _CELLS).split(_AT_ONCE):
        cells = train.cut(part)
        with evaluation_mode(program):
            latents = draw_latents(program, cells)
        nodes: dict[str, Any] = dict(latents.trace.nodes)
        normal = normal_in(nodes["z"]["fn"])
        if normal is None:
            return None
        unknown.append(normal.variance.clamp(max=1).sum(-1).flatten())
        decoded = Decoded.of(program, cells, modality, latents.at("z", normal.loc.expand_as(nodes["z"]["value"])))
        assert decoded is not None
        _, found, of_cells = zip(*decoded.evidence(), strict=True)
        found_bf, score_bf = torch.cat(found, 1), torch.cat(of_cells, 1)
        # Less the error of the cell's depth, a draw, which all features share.
        score_bf = score_bf - found_bf * (score_bf.sum(1) / found_bf.sum(1).clamp(min=1e-12))[:, None]
        information.append(found_bf[:, chosen])
        scores.append(score_bf[:, chosen])
    likeness = Likeness.of(torch.cat(scores), torch.cat(information), variance_f[chosen])
    return _Compared(modality, variance_f, likeness, max(1.0, float(torch.cat(unknown).mean())))


def _variance_between_states(program: MultiVIProgram, train: Minibatches, layer: LastLayer) -> Tensor:
    """Expected variance of each feature's logit between states, (F,)."""
    evidence = layer.evidence(program, train)
    slopes = evidence.of_slopes()
    prior = AdaptivePrior.fitted(*slopes)
    # Mean squared coordinates of the cells, each counting by its information.
    information_r = evidence.information_fr.sum(0)
    return prior.classes(*slopes) @ (prior.variance_ck @ (information_r[:-1] / information_r[-1].clamp(min=1e-12)))


def _of_pairs(a_nf: Tensor, b_nf: Tensor, weight_f: Tensor) -> Tensor:
    """Sum over pairs of different features, the mean over the other cells of each cell, (n,)."""
    weighted = a_nf * weight_f
    both_nn = (weighted @ b_nf.T).square() - weighted.square() @ b_nf.square().T
    both_nn = both_nn.double().fill_diagonal_(0.0)
    return both_nn.sum(1) / max(1, len(both_nn) - 1)
