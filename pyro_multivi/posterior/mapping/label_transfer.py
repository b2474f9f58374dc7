"""Labels of neighbours in the latent space, with a calibrated probability that they are right.

A cell's label is the one with most weight among its nearest reference cells. How often that is right is learned from
reference cells that are encoded as the query was measured, with the modalities and features that it lacks taken away,
and whose label is read off their neighbours other than themselves: a logistic regression on the share of the vote and
the distance of the neighbours. That a cell is of a label that the reference has at all is learned in the same way, from
their distances to neighbours of other labels alone: so far from everything would they be if theirs were not there.
Whether a cell lies apart is told by how far held-out reference cells lie from their neighbours.

All this holds on average over cells, where a query has the types of the reference in like shares. It does not hold
within each type: neighbours of a rare type lie farther apart. In simulation (450 reference cells, 20 of them of a rare
type, 24 queries):

- Of all cells of known types 0 to 12 % had p-values below 0.05, 4.8 % on average.
- Where the rare type lay apart, 23 to 87 % of its cells did, though 62 to 100 % had the right label.
- Where it did not lie apart, 0 to 20 % of its cells had the right label, at a mean confidence of 0.5 to 0.8.

Five neighbours in place of 15 help little. Distances relative to those of the neighbours from theirs (local outlier
factor) lower the second figure, from 38 and 87 to 2 and 3 %. But of an unknown type they find only 30 and 42 %, not 92
and 95 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import ndtr

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells, ExtraFeatures, Panels
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.engine.draws import mean_latents
from pyro_multivi.posterior.engine.posterior_scale import NoMeanError
from pyro_multivi.posterior.engine.replicates import hide
from pyro_multivi.processes.shares import Arrays, by_minibatch, joined
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

# Share of a query's cells that are of a label which the reference lacks, before their distances are seen.
_PRIOR_NEW = 0.02
# Ridge penalty of the slopes of standardised predictors: as if a cell of each kind had been seen.
_RIDGE = 1.0
# Smallest distance, relative to a typical one, of which a logarithm is taken.
_LEAST = 1e-3
# Distribution of log distances: points at which it is computed, and least bandwidth of its kernel.
_N_PLACES, _LEAST_BANDWIDTH = 1024, 1e-3


@dataclass(frozen=True)
class Votes:
    """Votes of the neighbours of some cells.

    Attributes
    ----------
    code
        Label with most weight, (n,).
    share
        Its share of the weight, (n,).
    distance
        Mean distance of the neighbours, (n,).
    """

    code: Codes
    share: Array
    distance: Array


def states(program: MultiVIProgram, minibatches: Minibatches, like: Cells | None = None) -> Array:
    """Posterior means of z, (n, K).

    Parameters
    ----------
    like
        A cell: modalities and features that were not measured in it are taken away.

    Raises
    ------
    NoMeanError
        If the guide's distribution of z has no mean.
    """

    def of_minibatch(cells: Cells) -> Arrays:
        seen = cells if like is None else measured_as(cells, like)
        with evaluation_mode(program):
            try:
                nodes: dict[str, Any] = dict(mean_latents(program, seen).trace.nodes)
            except NoMeanError as error:
                remedy = "labels are carried over between means, so that mix(experts) needs a distribution with one"
                raise NoMeanError.of("z", remedy) from error
        z = nodes["z"]["value"]
        return {"z": z.expand(1, len(cells), -1)[0].double().cpu().numpy()}

    return joined(by_minibatch(of_minibatch, minibatches))["z"]


def measured_as(cells: Cells, like: Cells) -> Cells:
    """Cells without the modalities and features that were not measured in another one, the first of ``like``.

    Features that they lack themselves stay not measured.
    """
    for modality in MODALITIES:
        panels: Panels | None = modality.panels_in(like)
        if not bool(modality.measured_in(like)[0]):
            cells = hide(cells, modality)
        elif panels is not None:
            cells = _without_features(cells, modality, panels.measured[panels.code[0]])
    for name, own in cells.extra.items():
        theirs = like.extra.get(name)
        if theirs is None or not bool(theirs.measured[0]):
            cells = hide(cells, ExtraFeatures(name))
        else:
            left = own._replace(values=own.values.masked_fill(theirs.values[0].isnan(), torch.nan))
            cells = cells.replace(extra={**cells.extra, name: left})
    return cells


def _without_features(cells: Cells, modality: Modality, measured: torch.Tensor) -> Cells:
    counts = modality.counts_in(cells)
    rows = SparseCounts.of(counts)
    kept = measured[rows.col.long()]
    crow = torch.zeros_like(rows.crow)
    crow[1:] = torch.bincount(rows.rows()[kept], minlength=len(cells)).cumsum(0)
    left = SparseCounts(crow, rows.col[kept], rows.val[kept], (len(cells), rows.shape[1]))
    own: Panels | None = modality.panels_in(cells)
    if own is None:
        own = Panels(torch.ones_like(measured)[None], torch.zeros(len(cells), dtype=torch.int64, device=cells.device))
    return cells.replace(**{modality.counts: left, modality.panels: own._replace(measured=own.measured & measured)})


def vote(
    reference: Array, code: Codes, z: Array, n_neighbors: int, own: Codes | None = None, tree: cKDTree | None = None
) -> Votes:
    """Votes of the nearest reference cells.

    Parameters
    ----------
    reference, code
        States, (N, K), and labels, (N,), of the reference cells.
    z
        States of the other cells, (n, K).
    n_neighbors
        Number of neighbours, fewer where the reference has no more.
    own
        Position in the reference of each cell itself, which does not vote, (n,).

    Examples
    --------
    >>> reference, code = np.array([[0.0], [0.1], [5.0], [5.1]]), np.array([0, 0, 1, 1])
    >>> vote(reference, code, np.array([[0.2], [4.0]]), n_neighbors=2).code
    array([0, 1])
    """
    n = min(n_neighbors + (own is not None), len(reference))
    distance, near = map(np.asarray, (tree or cKDTree(reference)).query(z, k=list(range(1, n + 1))))
    if own is not None:
        # The cell itself, or the farthest neighbour where it is not among them.
        at = np.where((near == own[:, None]).any(1), (near == own[:, None]).argmax(1), n - 1)
        kept = np.arange(n) != at[:, None]
        distance, near = (part[kept].reshape(len(z), n - 1) for part in (distance, near))
    width = np.maximum(distance[:, -1:], np.finfo(float).tiny)
    weight = np.exp(-np.square(distance / width))
    total = np.zeros((len(z), int(code.max()) + 1))
    np.add.at(total, (np.arange(len(z))[:, None], code[near]), weight)
    winner = total.argmax(1)
    return Votes(winner, total.max(1) / weight.sum(1), distance.mean(1))


class Transferred(NamedTuple):
    """Labels of some cells.

    Attributes
    ----------
    code
        Label of the neighbours, (n,).
    probability
        Probability that it is right, (n,).
    p_value
        Chance that a cell of the reference would lie as far from its neighbours, (n,).
    """

    code: Codes
    probability: Array
    p_value: Array


def transfer(
    reference: Array,
    code: Codes,
    z: Array,
    calibration: Array,
    own: Codes,
    n_neighbors: int,
    held_out: NDArray[np.bool_] | None = None,
) -> Transferred:
    """Label of each query cell, the probability that it is right, and whether the cell lies apart.

    Parameters
    ----------
    reference, code
        States and labels of the reference cells.
    z
        States of the query's cells.
    calibration, own
        States of some reference cells encoded as the query was measured, (C, K), and their positions, (C,).
    held_out
        Those of them that were not trained on, (C,), with whose distances the query's are compared. Default: all.
    """
    tree = cKDTree(reference)
    query = vote(reference, code, z, n_neighbors, tree=tree)
    known = vote(reference, code, calibration, n_neighbors, own, tree)
    scale = float(np.median(known.distance)) or 1.0
    right = _Logistic.fit(_predictors(known, scale), known.code == code[own])
    probability = right.probability(_predictors(query, scale))
    others = _distances_without_own_label(reference, code, calibration, own, n_neighbors)
    if others is not None:
        distance = np.concatenate([known.distance, others])
        is_known = np.arange(len(distance)) < len(known.distance)
        weight = np.where(is_known, (1 - _PRIOR_NEW) / is_known.mean(), _PRIOR_NEW / (~is_known).mean())
        in_reference = _Logistic.fit(_log(distance, scale)[:, None], is_known, weight)
        probability = probability * in_reference.probability(_log(query.distance, scale)[:, None])
    unseen = slice(None) if held_out is None else held_out
    return Transferred(query.code, probability, p_values(known.distance[unseen], query.distance))


def p_values(calibration: Array, distance: Array) -> Array:
    """Chance of a cell that is drawn as the calibration cells were to lie as far as a cell does, (n,).

    The distribution of their log distances is smoothed by a Normal kernel (bandwidth: Silverman 1986), for few cells
    say little about its tail.

    Examples
    --------
    >>> p_values(np.array([1.0, 2.0, 3.0]), np.array([0.1, 1.8, 99.0])).round(1)
    array([1. , 0.5, 0. ])
    """
    known, of = (np.log(np.maximum(each, np.finfo(float).tiny)) for each in (calibration, distance))
    quartiles = np.quantile(known, [0.25, 0.75])
    bandwidth = 0.9 * min(float(known.std()), float(np.diff(quartiles)[0]) / 1.349) * len(known) ** -0.2
    bandwidth = max(bandwidth, _LEAST_BANDWIDTH)
    # By interpolation: every cell beside every other would be a large matrix.
    places = np.linspace(known.min() - 5 * bandwidth, known.max() + 5 * bandwidth, _N_PLACES)
    tail = ndtr((known[None] - places[:, None]) / bandwidth).mean(1)
    return np.interp(of, places, tail)


def _distances_without_own_label(
    reference: Array, code: Codes, calibration: Array, own: Codes, n_neighbors: int
) -> Array | None:
    """Mean distances of cells to their neighbours of other labels, (C,); None where there is one label only."""
    labels = np.unique(code)
    if len(labels) < 2:
        return None
    found = np.zeros(len(own))
    for label in labels:
        cells, rest = code[own] == label, reference[code != label]
        if cells.any():
            n = min(n_neighbors, len(rest))
            distance = np.asarray(cKDTree(rest).query(calibration[cells], k=list(range(1, n + 1)))[0])
            found[cells] = distance.mean(1)
    return found


def _predictors(votes: Votes, scale: float) -> Array:
    share = np.clip(votes.share, 1e-3, 1 - 1e-3)
    return np.column_stack([np.log(share / (1 - share)), _log(votes.distance, scale)])


def _log(distance: Array, scale: float) -> Array:
    return np.log(np.maximum(distance / scale, _LEAST))


@dataclass(frozen=True)
class _Logistic:
    """Logistic regression: coefficients of standardised predictors, the first being the intercept."""

    mean: Array
    sd: Array
    coefficients: Array

    @classmethod
    def fit(cls, predictors: Array, target: NDArray[np.bool_], weight: Array | None = None) -> _Logistic:
        """Fit by Newton's method; targets are as certain as their numbers are large (Platt 1999)."""
        mean, sd = predictors.mean(0), predictors.std(0)
        sd = np.where(sd > 0, sd, 1.0)
        x = np.column_stack([np.ones(len(predictors)), (predictors - mean) / sd])
        n_yes, n_no = target.sum(), (~target).sum()
        y = np.where(target, (n_yes + 1) / (n_yes + 2), 1 / (n_no + 2))
        w = np.ones(len(y)) if weight is None else weight
        penalty = np.diag([1e-6, *[_RIDGE] * predictors.shape[1]])
        beta = np.zeros(x.shape[1])
        for _ in range(50):
            p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
            gradient = x.T @ (w * (p - y)) + penalty @ beta
            hessian = (x * (w * p * (1 - p) + 1e-9)[:, None]).T @ x + penalty
            step = np.linalg.solve(hessian, gradient)
            # A long step would overshoot where nearly all targets are alike.
            step *= min(1.0, 4.0 / max(float(np.abs(step).max()), 1e-12))
            beta = beta - step
            if np.abs(step).max() < 1e-8:
                break
        return cls(mean, sd, beta)

    def probability(self, predictors: Array) -> Array:
        """Probability of a target that is true, (n,)."""
        logit = self.coefficients[0] + ((predictors - self.mean) / self.sd) @ self.coefficients[1:]
        return 1 / (1 + np.exp(-np.clip(logit, -30, 30)))
