r"""Estimate of the decoders' last layers under a prior of which the data choose the widths.

After training, with hidden layers and posteriors held, the weights and intercept of each feature move towards their
posterior mean under the prior of :mod:`pyro_multivi.posterior.calibration.adaptive_prior`, in two Newton steps. The
states z were inferred from the counts that the prior is chosen by, so that in sparse data it finds more differences
than there are. Held-out cells therefore choose how far the weights go, from nothing to all of the way: so far that
their counts are likeliest, given their own states and given what the other modality tells of them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from pyro_multivi.data.loader import Minibatches, measured, never_measured, paired, spread
from pyro_multivi.data.modality import Modality, modelled
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.posterior.calibration.adaptive_prior import AdaptivePrior
from pyro_multivi.posterior.calibration.last_layer import Decoded, Evidence, LastLayer
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace
from pyro_multivi.posterior.engine.replicates import hide
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode, log_density

logger = logging.getLogger("pyro_multivi")

_DIRECTIONS, _NEWTON_STEPS = 10, 2
# Step in a direction at most: a logit moves by about as much between cells.
_LARGEST_STEP = 1.0
# Shares of the way among which held-out cells choose.
_SHARES = (0.25, 0.5, 0.75, 1.0)
# Held-out cells that are used at most; fewer than the other number say too little.
_MOST, _FEWEST = 2048, 10
_DRAWS, _AT_ONCE = 2, 128
_FEATURES_AT_ONCE = 4096


@torch.no_grad()
@tells_if_interrupted("the decoders' last layers stay as they were trained")
def fit_loadings(program: MultiVIProgram, train: Minibatches, held_out: Minibatches | None = None) -> None:
    """Move the weights and intercepts of the layers that decode rho and p.

    A layer stays as it is with fewer than ten training or held-out cells that have the modality, where it is not
    trained as a whole, where the likelihood is not one of this package given rho or p itself, or where rho or p is not
    a readout of it.

    Parameters
    ----------
    train
        Cells that it was trained on.
    held_out
        Cells that decide how far it moves; without them it stays.
    """
    if held_out is None:
        return
    for modality in modelled(program.config):
        linear = _layer(program, modality)
        if linear is None:
            continue
        trained = linear.weight.clone(), linear.bias.clone()
        try:
            share = _fit(program, train, held_out, modality, linear)
        except BaseException:
            _set(linear, trained)
            raise
        logger.info("last layer of %s: %.0f %% of the way to its posterior mean", modality.name, 100 * share)


def newton_step(evidence: Evidence) -> Tensor:
    """Step of each feature's weights and intercept to their posterior mean, (F, K + 1).

    The intercept has a unit prior around where training put it.

    Examples
    --------
    With as much information as here the prior does not matter, and the step is the solution of the normal equations:

    >>> joint = 1e5 * torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    >>> score = (joint @ torch.tensor([0.3, -0.2]))
    >>> newton_step(Evidence(joint.diagonal(dim1=1, dim2=2), score, torch.ones(1, 1), joint))
    tensor([[ 0.3000, -0.2000]])
    """
    assert evidence.joint_frr is not None
    information_fk, pull_fk = evidence.of_slopes()
    prior = AdaptivePrior.fitted(information_fk, pull_fk)
    steps = []
    for features in torch.arange(len(pull_fk), device=pull_fk.device).split(_FEATURES_AT_ONCE):
        joint, fitted = evidence.joint_frr[features], torch.nn.functional.pad(evidence.fitted_fk[features], (0, 1))
        pull = (joint @ fitted[:, :, None])[:, :, 0] + evidence.score_fr[features]
        class_fc = prior.classes(information_fk[features], pull_fk[features])
        mean = torch.zeros_like(fitted)
        for place, variance in enumerate(prior.variance_ck):
            precision = torch.nn.functional.pad(1 / variance, (0, 1), value=1.0)
            mean += class_fc[:, place, None] * torch.linalg.solve(joint + precision.diag(), pull)
        steps.append(mean - fitted)
    return torch.cat(steps).clamp(-_LARGEST_STEP, _LARGEST_STEP)


def _fit(
    program: MultiVIProgram, train: Minibatches, held_out: Minibatches, modality: Modality, linear: nn.Linear
) -> float:
    """Move one layer; return the share of the way that it went."""
    layer = LastLayer.of(program, train, modality, _DIRECTIONS)
    if layer is None or not _decodes(program, train, layer, linear):
        return 0.0
    likelihood = _log_likelihood(program, held_out, modality)
    if likelihood is None:
        return 0.0
    trained = best = linear.weight.clone(), linear.bias.clone()
    for _ in range(_NEWTON_STEPS):
        step = newton_step(layer.evidence(program, train, joint=True))
        # Of them the data say nothing: what a reference learned stays.
        step[never_measured(train, modality).to(step.device)] = 0.0
        linear.weight.add_(step[:, :-1] @ layer.vectors)
        linear.bias.add_(step[:, :-1] @ layer.offset + step[:, -1])
    end, gone = (linear.weight.clone(), linear.bias.clone()), 0.0
    for share in _SHARES:
        values = trained[0].lerp(end[0], share), trained[1].lerp(end[1], share)
        _set(linear, values)
        found = _log_likelihood(program, held_out, modality)
        if found is not None and found > likelihood:
            likelihood, best, gone = found, values, share
    _set(linear, best)
    return gone


def _layer(program: MultiVIProgram, modality: Modality) -> nn.Linear | None:
    """Layer that decodes a modality; None if it is not one, or not trained as a whole."""
    name = f"{modality.name}_decoder.{modality.decoded}"
    decoder = getattr(program, f"{modality.name}_decoder", None)
    linear = getattr(decoder, modality.decoded, None)
    if not isinstance(linear, nn.Linear) or linear.bias is None:
        return None
    is_trained = linear.weight.requires_grad and linear.bias.requires_grad
    is_whole = not any(f"{name}.{part}" in program.partly_trained for part in ("weight", "bias"))
    return linear if is_trained and is_whole else None


def _decodes(program: MultiVIProgram, train: Minibatches, layer: LastLayer, linear: nn.Linear) -> bool:
    """Whether the readout's weight is that of the layer, not one that a program makes of it."""
    decoded = Decoded.of(program, train.cut(layer.cells[:1]), layer.modality)
    return decoded is not None and decoded.readout.weight.data_ptr() == linear.weight.data_ptr()


def _log_likelihood(program: MultiVIProgram, held_out: Minibatches, modality: Modality) -> float | None:
    """Mean log-likelihood of a modality's counts in the cells that have it; None for fewer than ten.

    Where ten of them have all modalities, that of their counts with z inferred from the other modalities is added.
    """
    index = measured(held_out, modality)
    if len(index) < _FEWEST:
        return None
    found = _mean_log_likelihood(program, held_out, spread(index, _MOST), modality, is_hidden=False)
    is_predicted = len(modelled(program.config)) > 1
    pairs = paired(held_out) if is_predicted else index[:0]
    if len(pairs) >= _FEWEST:
        found += _mean_log_likelihood(program, held_out, spread(pairs, _MOST), modality, is_hidden=True)
    return found


def _mean_log_likelihood(
    program: MultiVIProgram, held_out: Minibatches, index: Tensor, modality: Modality, *, is_hidden: bool
) -> float:
    """Mean over cells and draws of z and depths, which are the same for all weights of the decoder."""
    total = 0.0
    with evaluation_mode(program):
        for part in index.split(_AT_ONCE):
            cells = held_out.cut(part)
            latents = draw_latents(program, cells, _DRAWS)
            if is_hidden:
                others: dict[str, Any] = dict(draw_latents(program, hide(cells, modality), _DRAWS).trace.nodes)
                latents = latents.at("z", others["z"]["value"])
            model = model_trace(program.model, cells, latents)
            model.compute_log_prob()
            total += float(log_density(model.nodes[modality.counts]).mean(0).double().sum())
    return total / len(index)


def _set(linear: nn.Linear, values: tuple[Tensor, Tensor]) -> None:
    linear.weight.copy_(values[0])
    linear.bias.copy_(values[1])
