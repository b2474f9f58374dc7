"""Learn how far each modality is trusted about the other: hide one from held-out cells and predict it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.posterior.engine.draws import draw_latents
from pyro_multivi.posterior.engine.population_mixture import MIXTURE_WEIGHT, POPULATION, AggregatePosterior
from pyro_multivi.posterior.engine.replicates import MODALITY, counts_of, expected_counts, observed_sites
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

logger = logging.getLogger("pyro_multivi")

#: What is tried, from next to no trust to whole.
GRID = tuple(k / 20 for k in range(1, 21))
# Without evidence, what the cell says and what others are count the same.
_NEUTRAL = 0.5
# Draws of a cell whose mean is scored.
_N_SAMPLES = 100
# Cells x features that are scored, and bounds of the number of cells: seconds for all.
_ENTRIES = 2**21
_FEWEST, _MOST = 32, 512
# Fewer pairs would choose at random.
_TOO_FEW = 10
_AT_ONCE = 512


def clear_mixture(program: MultiVIProgram) -> None:
    """Trust each modality wholly and know nobody: states of other cells mean nothing to other weights."""
    for site in MIXTURE_WEIGHT:
        getattr(program, MIXTURE_WEIGHT[site]).fill_(1.0)
        getattr(program, POPULATION[site]).fill_(-1.0)


def fit_mixture(program: MultiVIProgram, train: Minibatches, held_out: Minibatches) -> None:
    """Set ``rna_mixture_weight`` and ``atac_mixture_weight`` of a program, and the populations they need.

    Held-out pairs are predicted with every t on a grid. Of those that are worse than the best by less than one standard
    error, the one nearest to 1/2 is taken: few pairs do not decide for an extreme. Without enough pairs,
    without one of the modalities, and where a likelihood of one's own has no mean or scores that are no numbers, t is
    1. Ctrl-C leaves 1 where nothing was learned yet.

    Parameters
    ----------
    program
        A trained program.
    train, held_out
        Cells that it was and was not trained on. The first make the populations, pairs among the others decide.
    """
    clear_mixture(program)
    table, index = held_out.table, held_out.index
    pairs = index[(table.has_rna & table.has_atac)[index]]
    if len(pairs) < _TOO_FEW:
        return
    for site in observed_sites(program):
        try:
            gather(program, train, site)
            if AggregatePosterior.of(program, site) is not None:
                getattr(program, MIXTURE_WEIGHT[site]).fill_(_best(program, held_out, pairs, site))
        except NotImplementedError:
            # Of a model of one's own; what torch and Pyro raise for a mean that is not known.
            _warn(site, f"the likelihood at {site!r} has no mean to be scored")
        except KeyboardInterrupt:
            logger.warning("interrupted after training: %s is imputed with whole trust", MODALITY[site])
            break


def gather(program: MultiVIProgram, train: Minibatches, site: str) -> None:
    """Keep states of training cells in which a site was measured, as many of each batch as there is room for."""
    table, index = train.table, train.index
    index = index[(table.has_rna if site == "x" else table.has_atac)[index]]
    stored: Tensor = getattr(program, POPULATION[site])
    stored.fill_(-1.0)
    code = table.batch_code[index]
    batches = code.unique()
    if not len(batches):
        return
    room = max(1, len(stored) // len(batches))
    first = 0
    for batch in batches[: len(stored)].tolist():
        members = index[code == batch]
        if len(members) > room:
            # Spread over all of them, for they may be in the order of a file.
            members = members[torch.linspace(0, len(members) - 1, room).long()]
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


def _best(program: MultiVIProgram, held_out: Minibatches, pairs: Tensor, site: str) -> float:
    width = program.config.n_genes if site == "x" else program.config.n_regions
    n = min(len(pairs), _MOST, max(_FEWEST, _ENTRIES // width))
    cells = held_out.cut(pairs[torch.linspace(0, len(pairs) - 1, n).long()])
    trust = getattr(program, MIXTURE_WEIGHT[site])
    try:
        expected = []
        for extreme in (1.0, 0.0):
            trust.fill_(extreme)
            expected.append(expected_counts(program, cells, site, _N_SAMPLES))
    finally:
        trust.fill_(1.0)
    own, others = expected
    # Expectations are linear in t: no further draws, and none of their noise.
    found_tn = np.stack([scores(cells, site, t * own + (1 - t) * others) for t in GRID])
    if not np.isfinite(found_tn).all():
        _warn(site, f"held-out counts at {site!r} have scores that are no numbers")
        return 1.0
    best = nearest_to_neutral(found_tn)
    logger.info("%s of %d held-out pairs: %.0f %% of trust in the other modality", MODALITY[site], n, 100 * best)
    return best


def _warn(site: str, reason: str) -> None:
    logger.warning("%s is imputed with whole trust in what else was measured: %s", MODALITY[site], reason)


def nearest_to_neutral(scores_tn: NDArray[np.float64]) -> float:
    """Of the numbers on the grid not worse than the best by a standard error, that nearest to 1/2.

    Examples
    --------
    >>> clear, vague = np.array([1.0, 1.1, 0.9]), np.array([30.0, -30.0, 1.0])
    >>> grid = np.array(GRID)[:, None]
    >>> nearest_to_neutral(grid * clear), nearest_to_neutral(grid * vague)
    (1.0, 0.5)
    """
    gain_tn = scores_tn - scores_tn[scores_tn.mean(1).argmax()]
    error_t = gain_tn.std(1, ddof=1) / gain_tn.shape[1] ** 0.5
    fit = [t for t, gain, error in zip(GRID, gain_tn.mean(1), error_t, strict=True) if gain >= -error]
    return min(fit, key=lambda t: abs(t - _NEUTRAL))


def scores(cells: Cells, site: str, expected: Tensor) -> NDArray[np.float64]:
    """Log-probability of counts given what was expected of them, (B,), in nats.

    Of expression it is the multinomial one of a cell's counts given their total, without the coefficient that
    does not depend on the prediction; of accessibility the Bernoulli one of all regions.
    """
    counts = counts_of(cells, site)[0]
    if site == "x":
        share = expected / expected.sum(-1, keepdim=True)
        terms = torch.xlogy(counts, share.clamp(min=torch.finfo(share.dtype).tiny))
    else:
        # 1 - p is 0 in float32 from p = 1 - 6e-8 on.
        p = expected.clamp(torch.finfo(expected.dtype).tiny, 1 - 1e-7)
        terms = torch.xlogy(counts, p) + torch.xlogy(1 - counts, 1 - p)
    found: NDArray[np.float64] = terms.sum(-1, dtype=torch.float64).cpu().numpy()
    return found
