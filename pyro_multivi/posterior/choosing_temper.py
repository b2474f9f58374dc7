"""Choose how far each modality is trusted about the other: hide one from held-out cells and predict it."""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.posterior.predictive import MODALITY, counts_of, expected_counts, observed_sites
from pyro_multivi.program import MultiVIProgram

logger = logging.getLogger("pyro_multivi")

#: What is tried, from whole trust to next to none.
GRID = (1.0, 0.7, 0.5, 0.35, 0.25, 0.175, 0.125, 0.0875, 0.0625)
# Draws of a cell whose mean is scored: as many as imputation of small data wants.
_N_SAMPLES = 25
# Cells x features that are scored, and bounds of the number of cells: seconds for all of the grid.
_ENTRIES = 2**21
_FEWEST, _MOST = 32, 512
# Fewer pairs would choose at random.
_TOO_FEW = 10
_TEMPER = {"x": "rna_temper", "y": "atac_temper"}


def choose_tempers(program: MultiVIProgram, held_out: Minibatches) -> None:
    """Set ``rna_temper`` and ``atac_temper`` of a program to what predicts held-out pairs best.

    Without enough pairs, without one of the modalities, and where a likelihood of one's own has no mean,
    they are 1. Ctrl-C leaves 1 where no choice was made yet.

    Parameters
    ----------
    program
        A trained program.
    held_out
        Cells that it was not trained on; those of both modalities count.
    """
    for name in _TEMPER.values():
        getattr(program, name).fill_(1.0)
    table, index = held_out.table, held_out.index
    pairs = index[(table.has_rna & table.has_atac)[index]]
    if len(pairs) < _TOO_FEW:
        return
    for site in observed_sites(program):
        try:
            getattr(program, _TEMPER[site]).fill_(_best(program, held_out, pairs, site))
        except NotImplementedError:
            # Of a model of one's own; what torch and Pyro raise for a mean that is not known.
            reason = f"the likelihood at {site!r} has no mean to be scored"
            logger.warning("%s is imputed with whole trust in what else was measured: %s", MODALITY[site], reason)
        except KeyboardInterrupt:
            logger.warning("interrupted after training: %s is imputed with whole trust", MODALITY[site])
            break


def _best(program: MultiVIProgram, held_out: Minibatches, pairs: torch.Tensor, site: str) -> float:
    width = program.config.n_genes if site == "x" else program.config.n_regions
    n = min(len(pairs), _MOST, max(_FEWEST, _ENTRIES // width))
    # Spread over all of them, for they may be in the order of a file.
    cells = held_out.cut(pairs[torch.linspace(0, len(pairs) - 1, n).long()])
    temper = getattr(program, _TEMPER[site])
    best, highest, n_worse = 1.0, -np.inf, 0
    try:
        for weight in GRID:
            temper.fill_(weight)
            score = float(scores(program, cells, site).mean())
            if score > highest:
                best, highest, n_worse = weight, score, 0
            else:
                n_worse += score < highest
            if n_worse == 2:
                break  # all are scored with the same noise: the curve is smooth and has one top
    finally:
        temper.fill_(1.0)
    logger.info(
        "%s of %d held-out pairs is predicted best with weight %g of the evidence", MODALITY[site], n, best
    )
    return best


def scores(
    program: MultiVIProgram, cells: Cells, site: str, n_samples: int = _N_SAMPLES, seed: int = 0
) -> NDArray[np.float64]:
    """Log-probability of counts that the guide was not shown, given their mean over draws, (B,), in nats.

    Of expression it is the multinomial one of a cell's counts given their total, without the coefficient that
    does not depend on the prediction; of accessibility the Bernoulli one of all regions.

    Examples
    --------
    >>> from pyro_multivi import ProgramConfig
    >>> program = MultiVIProgram(ProgramConfig(n_genes=20, n_regions=30, n_hidden=8, n_latent=2))
    >>> both = torch.ones(4, dtype=torch.bool)
    >>> cells = Cells(index=torch.arange(4), n_total=4, x=torch.ones(4, 20), y=torch.ones(4, 30),
    ...               has_rna=both, has_atac=both, design=torch.ones(4, 1))
    >>> scores(program, cells, "x").shape
    (4,)
    """
    expected = expected_counts(program, cells, site, n_samples, seed)
    counts = counts_of(cells, site)[0]
    tiny = torch.finfo(expected.dtype).tiny
    if site == "x":
        share = expected / expected.sum(-1, keepdim=True)
        terms = torch.xlogy(counts, share.clamp(min=tiny))
    else:
        # 1 - p is 0 in float32 from p = 1 - 6e-8 on.
        p = expected.clamp(tiny, 1 - 1e-7)
        terms = torch.xlogy(counts, p) + torch.xlogy(1 - counts, 1 - p)
    found: NDArray[np.float64] = terms.sum(-1, dtype=torch.float64).cpu().numpy()
    return found
