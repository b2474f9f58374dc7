"""Fit of the mixture weights: each modality is hidden from held-out cells and predicted from the other."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES, Modality, modelled
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.population_mixture import AggregatePosterior, population_buffer, weight_buffer
from pyro_multivi.posterior.engine.replicates import counts_of, expected_counts, paired, spread
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

#: Candidate weights t of a cell's own posterior.
WEIGHTS = tuple(k / 20 for k in range(1, 21))
# Equal shares of the cell and the population, unless the data decide otherwise.
_NEUTRAL = 0.5
# Draws of a cell whose mean is scored.
_N_SAMPLES = 100
# Cells x features that are scored, and bounds of the number of cells: this takes seconds.
_ENTRIES = 2**21
_LEAST, _MOST = 32, 512
# With fewer pairs the choice would be random.
_FEWEST_PAIRS = 10
_AT_ONCE = 512


def clear_mixture(program: MultiVIProgram) -> None:
    """Set the weights to 1 and clear the stored populations, whose states other network weights would not encode."""
    for modality in MODALITIES:
        weight_buffer(program, modality).fill_(1.0)
        population_buffer(program, modality).fill_(-1.0)


def fit_mixture(program: MultiVIProgram, train: Minibatches, held_out: Minibatches) -> None:
    """Set ``rna_mixture_weight`` and ``atac_mixture_weight`` of a program, and the populations they need.

    Held-out pairs (cells of both modalities) are predicted with every candidate t. Of those that are worse than the
    best by less than one standard error, the one nearest to 1/2 is taken, so that few pairs do not decide for an
    extreme. t is 1 without enough pairs, without one of the modalities, and where a custom likelihood has no mean or
    its scores are not finite. Ctrl-C leaves 1 where no weight was chosen yet.

    Parameters
    ----------
    train, held_out
        Cells that it was and was not trained on. The former make the populations, pairs among the latter are predicted.
    """
    clear_mixture(program)
    modalities, pairs = modelled(program.config), paired(held_out)
    if len(modalities) < 2 or len(pairs) < _FEWEST_PAIRS:
        return
    for modality in modalities:
        try:
            store_population(program, train, modality)
            if AggregatePosterior.of(program, modality) is not None:
                weight_buffer(program, modality).fill_(_best_weight(program, held_out, pairs, modality))
        except NotImplementedError:
            # Raised by torch and Pyro for a mean that is not known, as of a custom likelihood.
            _warn(modality, f"the likelihood at {modality.counts!r} has no mean to be scored")
        except KeyboardInterrupt:
            _warn(modality, "interrupted after training")
            break


def store_population(program: MultiVIProgram, train: Minibatches, modality: Modality) -> None:
    """Store states of training cells in which a modality was measured, as many of each batch as there is room for."""
    table, index = train.table, train.index
    index = index[modality.measured_in(table)[index]]
    stored = population_buffer(program, modality)
    stored.fill_(-1.0)
    code = table.batch_code[index]
    batches = code.unique()
    if not len(batches):
        return
    room = max(1, len(stored) // len(batches))
    first = 0
    for batch in batches[: len(stored)].tolist():
        members = spread(index[code == batch], room)
        z = torch.cat([_states(program, train.cut(part)) for part in members.split(_AT_ONCE)])
        rows = stored[first : first + len(members)]
        rows[:, 0] = batch
        rows[:, 1:] = z
        first += len(members)


def _states(program: MultiVIProgram, cells: Cells) -> Tensor:
    """A draw of z of each cell, (B, K)."""
    with evaluation_mode(program):
        nodes: dict[str, Any] = dict(draw_latents(program, cells).trace.nodes)
    z: Tensor = nodes["z"]["value"]
    return z.expand(1, len(cells), -1)[0]


def _best_weight(program: MultiVIProgram, held_out: Minibatches, pairs: Tensor, modality: Modality) -> float:
    most = min(_MOST, max(_LEAST, _ENTRIES // modality.n_features_in(program.config)))
    cells = held_out.cut(spread(pairs, most))
    weight = weight_buffer(program, modality)
    try:
        expected = []
        for extreme in (1.0, 0.0):
            weight.fill_(extreme)
            expected.append(expected_counts(program, cells, modality, _N_SAMPLES))
    finally:
        weight.fill_(1.0)
    own, population = expected
    # Expectations are linear in t, so that no further draws are needed, nor is their noise added.
    found_tn = np.stack([scores(cells, modality, t * own + (1 - t) * population) for t in WEIGHTS])
    if not np.isfinite(found_tn).all():
        _warn(modality, f"held-out counts at {modality.counts!r} have scores that are not finite")
        return 1.0
    best = nearest_to_neutral(found_tn)
    logger.info("%s of %d held-out pairs: weight %.2f of the cell's own posterior", modality.name, len(cells), best)
    return best


def _warn(modality: Modality, reason: str) -> None:
    logger.warning("%s is imputed without a population mixture: %s", modality.name, reason)


def nearest_to_neutral(scores_tn: NDArray[np.float64]) -> float:
    """Weight nearest to 1/2 among those that are not worse than the best by a standard error.

    Examples
    --------
    >>> clear, vague = np.array([1.0, 1.1, 0.9]), np.array([30.0, -30.0, 1.0])
    >>> grid = np.array(WEIGHTS)[:, None]
    >>> nearest_to_neutral(grid * clear), nearest_to_neutral(grid * vague)
    (1.0, 0.5)
    """
    gain_tn = scores_tn - scores_tn[scores_tn.mean(1).argmax()]
    error_t = gain_tn.std(1, ddof=1) / gain_tn.shape[1] ** 0.5
    fit = [t for t, gain, error in zip(WEIGHTS, gain_tn.mean(1), error_t, strict=True) if gain >= -error]
    return min(fit, key=lambda t: abs(t - _NEUTRAL))


def scores(cells: Cells, modality: Modality, expected: Tensor) -> NDArray[np.float64]:
    """Log-probability of counts given their expectations, (B,), in nats.

    Bernoulli for a binary modality; otherwise multinomial given the total of a cell, without the coefficient, which
    does not depend on the prediction.
    """
    counts = counts_of(cells, modality.counts)[0]
    if modality.binary:
        # 1 - p is 0 in float32 from p = 1 - 6e-8 on.
        p = expected.clamp(torch.finfo(expected.dtype).tiny, 1 - 1e-7)
        terms = torch.xlogy(counts, p) + torch.xlogy(1 - counts, 1 - p)
    else:
        share = expected / expected.sum(-1, keepdim=True)
        terms = torch.xlogy(counts, share.clamp(min=torch.finfo(share.dtype).tiny))
    found: NDArray[np.float64] = terms.sum(-1, dtype=torch.float64).cpu().numpy()
    return found
