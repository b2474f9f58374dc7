"""Fit of the depth regressions: sequencing depth of one modality, predicted from the other."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches, paired, spread
from pyro_multivi.data.modality import MODALITIES, Modality, modelled
from pyro_multivi.isolation import tells_if_interrupted
from pyro_multivi.posterior.engine.depth_regression import (
    DepthRegression,
    depth_transform,
    features,
    is_inferred,
    regression_buffer,
)
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.posterior_scale import normal_in
from pyro_multivi.posterior.engine.replicates import hide
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

#: Candidate penalties of the coefficients of z, as variances of the errors per variance of a coefficient; the
#: last leaves z out.
PENALTIES = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, torch.inf)
# Penalty of depth and batch, which the encoder cannot overfit: next to none.
_WEAK = 1.0
# Most pairs that are used, and fewest that are enough: to learn from, and to choose a penalty by.
_MOST, _FEWEST = 4096, 10
_AT_ONCE = 512


def clear_depth_regressions(program: MultiVIProgram) -> None:
    """Return depths to their priors."""
    for modality in MODALITIES:
        regression_buffer(program, modality).zero_()


@tells_if_interrupted("depths of what was not measured keep their priors")
def fit_depth_regressions(program: MultiVIProgram, train: Minibatches, held_out: Minibatches | None) -> None:
    """Set ``rna_depth_regression`` and ``atac_depth_regression`` of a program.

    The coefficients are those of ridge regressions on pairs (cells of both modalities) that were trained on. There z
    is fitted to both modalities and predicts the other one better than in new cells. Held-out pairs correct for that:
    regressions with penalties of z from weak to infinite are averaged with their likelihoods for the
    held-out pairs as weights; with fewer than ten held-out pairs they are averaged with equal weights. With fewer than
    ten pairs to train on nothing is fitted and depths keep their priors, which a log line says.

    Parameters
    ----------
    train, held_out
        Cells that it was and was not trained on; only those of both modalities are used. None: no cells.
    """
    clear_depth_regressions(program)
    modalities = modelled(program.config)
    if len(modalities) < 2:
        return
    train_pairs = spread(paired(train), _MOST)
    if len(train_pairs) < _FEWEST:
        logger.info(
            "depths of what was not measured have their priors: %d cells of both modalities were trained on, and %d "
            "are needed to predict them", len(train_pairs), _FEWEST,
        )  # fmt: skip
        return
    held_out_pairs = train_pairs[:0] if held_out is None else spread(paired(held_out), _MOST)
    enough = len(held_out_pairs) >= _FEWEST
    for modality in modalities:
        fitted = _regression_data(program, train, train_pairs, modality)
        scored = _regression_data(program, held_out, held_out_pairs, modality) if enough and held_out else None
        if fitted is None:
            continue
        regression, explained = regress(fitted, scored, n_latent=program.config.latent)
        regression.store(program, modality)
        logger.info(
            "depth of %s: the other modality explains %.0f %% of its variance in cells that were %s",
            modality.name, 100 * explained, "held out" if scored else "trained on",
        )  # fmt: skip


def regress(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor] | None, n_latent: int
) -> tuple[DepthRegression, float]:
    """Average ridge regression, and the share of the variance of held-out (else training) targets that it explains.

    Parameters
    ----------
    train, held_out
        :func:`~pyro_multivi.posterior.engine.depth_regression.features`, (n, F): a depth, z, and the batch, of which
        one column is 1; and log l or logit d of the same cells, (n,). None: too few were held out, and all penalties
        count alike.
    n_latent
        Number K of the columns of z.
    """
    x, y = (values.double() for values in train)
    mean = y.mean()
    coefficients = torch.stack([_ridge(x, y - mean, penalty, n_latent) for penalty in PENALTIES])
    if held_out is None:
        new_x, new_y = x, y
        averaged = coefficients.mean(0)
    else:
        new_x, new_y = (values.double() for values in held_out)
        squared = (new_y - mean - coefficients @ new_x.T).square()
        # All with the error variance of the best one: with its own, a poor fit would look likelier.
        weights = (-0.5 * squared.sum(1) / squared.mean(1).min().clamp(min=1e-12)).softmax(0)
        averaged = weights @ coefficients
    # The batch columns sum to one: the intercept is spread over them.
    averaged[1 + n_latent :] += mean
    errors = [(targets - rows @ averaged).square().mean() for rows, targets in ((x, y), (new_x, new_y))]
    explained = 1 - errors[1] / (new_y - mean).square().mean().clamp(min=1e-12)
    sd = torch.stack(errors).amax().sqrt().clamp(min=1e-3)
    return DepthRegression(averaged.to(train[0].dtype), sd.to(train[0].dtype)), float(explained)


def _ridge(x_nf: Tensor, y_n: Tensor, penalty: float, n_latent: int) -> Tensor:
    """Coefficients (F,), those of z being penalised by ``penalty``, or 0 where that is infinite."""
    weight = torch.full((x_nf.shape[1],), _WEAK, dtype=x_nf.dtype)
    weight[1 : 1 + n_latent] = penalty
    kept = weight.isfinite()
    x = x_nf[:, kept]
    found = torch.zeros_like(weight)
    found[kept] = torch.linalg.solve(x.T @ x + weight[kept].diag(), x.T @ y_n)
    return found


def _regression_data(
    program: MultiVIProgram, minibatches: Minibatches, pairs: Tensor, hidden: Modality
) -> tuple[Tensor, Tensor] | None:
    """Predictors of the depth of a hidden modality, (n, F), and a draw of it given the modality, (n,).

    None where the depth is not inferred, or z has no Normal posterior.
    """
    predictors, targets = [], []
    for index in pairs.split(_AT_ONCE):
        cells = minibatches.cut(index)
        rest = hide(cells, hidden)
        with evaluation_mode(program):
            seen: dict[str, Any] = dict(draw_latents(program, rest).trace.nodes)
            both: dict[str, Any] = dict(draw_latents(program, cells).trace.nodes)
        posterior = normal_in(seen["z"]["fn"])
        if posterior is None or not is_inferred(program, cells, hidden, both):
            return None
        loc = posterior.loc.expand(1, len(cells), -1)[0]
        predictors.append(features(program, rest, hidden, loc).cpu())
        # A draw, so that the errors include the uncertainty of the depth given the counts.
        value = both[hidden.depth]["value"].expand(1, len(cells))[0]
        targets.append(depth_transform(hidden).inv(value).cpu())
    return torch.cat(predictors), torch.cat(targets)
