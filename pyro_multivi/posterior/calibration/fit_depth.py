"""Learn from cells of both modalities how deeply one of them is read where the other was."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.engine.depth_regression import LINK, TRANSFORM, Link, features, is_inferred
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.population_mixture import normal_in
from pyro_multivi.posterior.engine.replicates import DEPTH_SITE, MODALITY, hide, observed_sites
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

#: What is tried for the coefficients of z, as variances of the errors per variance of a coefficient; the
#: last leaves z out.
GRID = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, torch.inf)
# The same for depth and batch, of which nothing was memorised: next to none.
_WEAK = 1.0
# Cells that are read, and fewest that say something.
_MOST, _TOO_FEW = 4096, 10
_AT_ONCE = 512


def clear_depth_regressions(program: MultiVIProgram) -> None:
    """Leave depths to their priors."""
    for name in LINK.values():
        getattr(program, name).zero_()


def fit_depth_regressions(program: MultiVIProgram, train: Minibatches, held_out: Minibatches) -> None:
    """Set ``rna_depth_regression`` and ``atac_depth_regression`` of a program.

    The coefficients are those of ridge regressions on pairs that were trained on. Their encodings were fitted to
    both modalities and know more of the other one than those of new cells do, so held-out pairs say how much z is to be
    believed: regressions with penalties of z from weak to infinite are averaged with their likelihoods for the
    held-out pairs as weights. With fewer than ten pairs in either set nothing is learned and depths keep their priors.

    Parameters
    ----------
    program
        A trained program.
    train, held_out
        Cells that it was and was not trained on; those of both modalities count.
    """
    clear_depth_regressions(program)
    if len(observed_sites(program)) < 2:
        return
    pairs = [_pairs(cells) for cells in (train, held_out)]
    if min(map(len, pairs)) < _TOO_FEW:
        return
    for counts, site in DEPTH_SITE.items():
        try:
            known = [_read(program, cells, at, counts) for cells, at in zip((train, held_out), pairs, strict=True)]
        except KeyboardInterrupt:
            logger.warning("interrupted after training: depths of what was not measured keep their priors")
            return
        if known[0] is None or known[1] is None:
            continue
        link, explained = regress(*known[0], *known[1], n_latent=program.config.latent)
        link.store(program, site)
        logger.info("depth of %s: %.0f %% of its variance is told by the other", MODALITY[counts], 100 * explained)


def regress(
    train_nf: Tensor, target_n: Tensor, held_out_nf: Tensor, held_out_n: Tensor, n_latent: int
) -> tuple[Link, float]:
    """The averaged regression, and the share of the variance of held-out targets that it explains.

    Parameters
    ----------
    train_nf, held_out_nf
        :func:`~pyro_multivi.posterior.engine.depth_regression.features`: a depth, z, and the batch, of which one
        column is 1.
    target_n, held_out_n
        What is predicted.
    n_latent
        Number K of the columns of z.
    """
    x, y, new_x, new_y = (values.double() for values in (train_nf, target_n, held_out_nf, held_out_n))
    mean = y.mean()
    coefficients = torch.stack([_ridge(x, y - mean, penalty, n_latent) for penalty in GRID])
    squared = (new_y - mean - coefficients @ new_x.T).square()
    # All with the error of the best one, so that a poor fit is not its own excuse.
    weights = (-0.5 * squared.sum(1) / squared.mean(1).min().clamp(min=1e-12)).softmax(0)
    averaged = weights @ coefficients
    # The batch columns sum to one: the intercept is spread over them.
    averaged[1 + n_latent :] += mean
    errors = [(targets - rows @ averaged).square().mean() for rows, targets in ((x, y), (new_x, new_y))]
    explained = 1 - errors[1] / (new_y - mean).square().mean().clamp(min=1e-12)
    sd = torch.stack(errors).amax().sqrt().clamp(min=1e-3)
    return Link(averaged.to(train_nf.dtype), sd.to(train_nf.dtype)), float(explained)


def _ridge(x_nf: Tensor, y_n: Tensor, penalty: float, n_latent: int) -> Tensor:
    """Coefficients (F,), those of z being penalised by ``penalty``, or 0 where that is infinite."""
    weight = torch.full((x_nf.shape[1],), _WEAK, dtype=x_nf.dtype)
    weight[1 : 1 + n_latent] = penalty
    kept = weight.isfinite()
    x = x_nf[:, kept]
    found = torch.zeros_like(weight)
    found[kept] = torch.linalg.solve(x.T @ x + weight[kept].diag(), x.T @ y_n)
    return found


def _pairs(cells: Minibatches) -> Tensor:
    """Positions of cells of both modalities, at most so many, spread over all of them."""
    table, index = cells.table, cells.index
    pairs = index[(table.has_rna & table.has_atac)[index]]
    if len(pairs) <= _MOST:
        return pairs
    return pairs[torch.linspace(0, len(pairs) - 1, _MOST).long()]


def _read(
    program: MultiVIProgram, minibatches: Minibatches, pairs: Tensor, hidden: str
) -> tuple[Tensor, Tensor] | None:
    """What the depth of a hidden modality is predicted from, (n, F), and a draw of it given the modality, (n,).

    None where it is not inferred, or z has no Normal posterior.
    """
    site = DEPTH_SITE[hidden]
    found, targets = [], []
    for index in pairs.split(_AT_ONCE):
        cells = minibatches.cut(index)
        rest = hide(cells, hidden)
        with evaluation_mode(program):
            seen: dict[str, Any] = dict(draw_latents(program, rest).trace.nodes)
            both: dict[str, Any] = dict(draw_latents(program, cells).trace.nodes)
        posterior = normal_in(seen["z"]["fn"])
        if posterior is None or not is_inferred(program, cells, site, both):
            return None
        loc = posterior.loc.expand(1, len(cells), -1)[0]
        found.append(features(program, rest, site, loc).cpu())
        # A draw, so that what the counts leave open counts among the errors.
        value = both[site]["value"].expand(1, len(cells))[0]
        targets.append(TRANSFORM[site].inv(value).cpu())
    return torch.cat(found), torch.cat(targets)
