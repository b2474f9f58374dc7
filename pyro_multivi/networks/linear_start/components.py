r"""Principal components of one modality beside its noise.

Columns are centred and freed of depth and covariates by regression, and scaled to unit variance; rows, which differ in
noise with the depth of the cell, to unit mean square. The noise is then about white, so that the law of Marchenko and
Pastur (1967) tells how large its eigenvalues get, and how much of a component that lies above is signal
(Benaych-Georges and Nadakuditi 2012). Random flips of the signs (Hong, Sheng and Dobriban 2020) give the same bound
within 2 % on SNARE-seq, sci-CAR and Multiome cells; without scaling the rows it is up to four times too low for
accessibility.

Where panels of features were measured, each panel has a regression of its own, components are those of the entries that
were measured (:mod:`~pyro_multivi.networks.linear_start.partly_measured`), and the bound is that of the largest panel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

from pyro_multivi.networks.linear_start.partly_measured import Array, largest_of_panels, scores_of_panels

# Features found in a smaller share of the cells have a few entries of large weight.
_LEAST_DETECTED = 0.01
# Entries up to which the decomposition is that of the dense matrix.
_DENSE = 2**22
# Eigenvalues of noise exceed their bound by a little in few cells.
_MARGIN = 1.02


class Components(NamedTuple):
    """Components above the noise of n cells, the largest first.

    Attributes
    ----------
    centre
        Mean of each feature, (F,).
    directions, nuisance
        Directions of the components, (k, F), and of depth and covariates, (q, F).
    scores
        Value of each cell, (n, k), the noise of a single feature being 1.
    signal, noise
        Variances that add up to that of the scores, (k,).
    """

    centre: Array
    directions: Array
    nuisance: Array
    scores: Array
    signal: Array
    noise: Array


def components(
    x: sp.csr_array,
    depth: Array,
    covariates: Array,
    most: int,
    measured: NDArray[np.bool_] | None = None,
    panel: NDArray[np.integer[Any]] | None = None,
) -> Components:
    """Components of encoder inputs.

    Parameters
    ----------
    x
        Encoder inputs, (n, F).
    depth
        Total count of each cell, (n,).
    covariates
        Design of the cells, (n, C).
    most
        Number of components at most.
    measured
        Whether each feature belongs to each panel, (P, F); ``x`` is zero elsewhere. None: all were measured.
    panel
        Panel of each cell, (n,).

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> state, loadings = rng.standard_normal((400, 2)), rng.standard_normal((2, 200))
    >>> found = components(sp.csr_array(5 + 0.2 * state @ loadings + rng.standard_normal((400, 200))),
    ...                    np.full(400, 9.0), np.ones((400, 1)), most=10)
    >>> found.scores.shape, found.directions.shape
    ((400, 2), (2, 200))
    """
    n, n_features = x.shape
    if measured is None or panel is None:
        measured, panel = np.ones((1, n_features), dtype=bool), np.zeros(n, dtype=np.int64)
    n_measured = np.bincount(panel, minlength=len(measured)) @ measured
    scaled = _scaled(x, depth, covariates, measured, panel, n_measured)
    known, widths = scaled.known, scaled.widths
    entries = scaled.x[:, known], scaled.others, scaled.fitted[:, known]
    if len(measured) == 1:
        values, vectors = _largest(*entries, most)
    else:
        values, vectors = largest_of_panels(*entries, measured[:, known], panel, most)
    eigenvalues = values**2 / n
    width = int(widths.max())
    k, level = _above_noise(eigenvalues, n, width, widths[panel].mean())
    ratio, spike = width / n, eigenvalues[:k] / level
    shifted = spike - 1 - ratio
    strength = (shifted + np.sqrt((shifted**2 - 4 * ratio).clip(1e-12))) / 2
    # Squared cosine between a component's scores and what they estimate.
    reliability = ((1 - ratio / strength**2) / (1 + 1 / strength)).clip(1e-3, 0.999)
    directions = np.zeros((k, n_features))
    directions[:, known] = vectors[:k]
    scores = (scaled.x @ directions.T - scaled.others @ (scaled.fitted @ directions.T)) / np.sqrt(level)
    if len(measured) > 1:
        scores = scores_of_panels(scores, directions, spike * reliability, measured, panel)
    variance = spike if len(measured) == 1 else np.square(scores).mean(0)
    return Components(
        centre=np.asarray(x.sum(0)).ravel() / n_measured.clip(1), directions=directions * scaled.per_sd,
        nuisance=_nuisance(x, depth, covariates, measured) * scaled.per_sd**2,
        scores=scores, signal=variance * reliability, noise=variance * (1 - reliability),
    )  # fmt: skip


class _Scaled(NamedTuple):
    """Features of unit variance, in cells of unit mean square.

    Attributes
    ----------
    x, others, fitted
        Features, (n, F), and what depth and covariates explain of them, others @ fitted, (n, q) and (q, F).
    known
        Features that are found in enough cells, (F,).
    per_sd
        Factor of each feature, (F,); 0 of others.
    widths
        Number of such features in each panel, (P,).
    """

    x: sp.csr_array
    others: Array
    fitted: Array
    known: NDArray[np.bool_]
    per_sd: Array
    widths: NDArray[np.integer[Any]]


def _scaled(
    x: sp.csr_array,
    depth: Array,
    covariates: Array,
    measured: NDArray[np.bool_],
    panel: NDArray[np.integer[Any]],
    n_measured: NDArray[Any],
) -> _Scaled:
    others, coefficients = _by_panel(x, depth, covariates, panel)
    squares = np.asarray(x.multiply(x).sum(0)).ravel() - (coefficients * (others.T @ x)).sum(0)
    detected = np.bincount(x.indices, minlength=x.shape[1]) / n_measured.clip(1)
    known = (squares > 1e-6 * n_measured) & (detected >= _LEAST_DETECTED)
    per_sd = np.zeros(x.shape[1])
    per_sd[known] = (squares[known] / n_measured[known]) ** -0.5
    scaled = (x @ sp.diags_array(per_sd)).tocsr()
    fitted = coefficients * per_sd
    row_squares = (
        np.asarray(scaled.multiply(scaled).sum(1)).ravel()
        - 2 * ((scaled @ fitted.T) * others).sum(1)
        + ((others @ (fitted @ fitted.T)) * others).sum(1)
    )
    widths = (measured & known).sum(1)
    per_rms = (row_squares / widths[panel].clip(1)).clip(1e-12) ** -0.5
    return _Scaled(sp.diags_array(per_rms) @ scaled, others * per_rms[:, None], fitted, known, per_sd, widths)


def _by_panel(x: sp.csr_array, depth: Array, covariates: Array, panel: NDArray[np.integer[Any]]) -> tuple[Array, Array]:
    """Columns of :func:`_others` for the cells of each panel, (n, q), zero elsewhere, and coefficients, (q, F)."""
    columns, coefficients = [], []
    for code in np.unique(panel):
        rows = np.flatnonzero(panel == code)
        others = _others(depth[rows], covariates[rows])
        coefficients.append(_coefficients(others, x[rows]))
        columns.append(np.zeros((len(panel), others.shape[1])))
        columns[-1][rows] = others
    return np.concatenate(columns, 1), np.concatenate(coefficients)


def _nuisance(x: sp.csr_array, depth: Array, covariates: Array, measured: NDArray[np.bool_]) -> Array:
    """Coefficients of depth and covariates in all cells, (q, F), of the features that all panels have."""
    return np.where(measured.all(0), _coefficients(_others(depth, covariates), x)[1:], 0.0)


def _coefficients(others: Array, x: sp.csr_array) -> Array:
    return np.linalg.lstsq(others.T @ others, others.T @ x, rcond=1e-8)[0]


def _others(depth: Array, covariates: Array) -> Array:
    """Columns that features are freed of by regression: intercept, depth, its logarithm, covariates, (n, q)."""
    log_depth = np.log(depth.clip(min=1.0))
    columns = np.column_stack([depth / max(depth.mean(), 1e-12), log_depth, covariates])
    columns = columns - columns.mean(0)
    sd = columns.std(0)
    return np.column_stack([np.ones(len(depth)), columns[:, sd > 1e-6] / sd[sd > 1e-6]])


def _largest(x: sp.csr_array, others: Array, fitted: Array, most: int) -> tuple[Array, Array]:
    """Largest singular values of x - others @ fitted, and right singular vectors, (k, F)."""
    if x.shape[0] * x.shape[1] <= _DENSE or min(x.shape) <= 4 * most:
        _, values, vectors = np.linalg.svd(x.toarray() - others @ fitted, full_matrices=False)
        return values[:most], vectors[:most]
    operator = LinearOperator(
        x.shape, dtype=np.float64,
        matvec=lambda v: x @ v.ravel() - others @ (fitted @ v.ravel()),
        rmatvec=lambda u: x.T @ u.ravel() - fitted.T @ (others.T @ u.ravel()),
    )  # fmt: skip
    start = np.random.default_rng(0).standard_normal(min(x.shape))
    _, values, vectors = svds(operator, k=most, v0=start, tol=1e-3)
    order = np.argsort(-values)
    return values[order], vectors[order]


def _above_noise(eigenvalues: Array, n: int, n_features: int, total: float) -> tuple[int, float]:
    """Number of eigenvalues above the bound of noise, and its variance, when a cell's squares add up to ``total``."""
    k, level = 0, 1.0
    for _ in range(len(eigenvalues)):
        level = max((total - eigenvalues[:k].sum()) / max((total - k) * (1 - k / n), 1e-3), 1e-3)
        bound = _MARGIN * level * (1 + np.sqrt(n_features / n)) ** 2
        found = int((eigenvalues > bound).sum())
        if found == k:
            break
        k = found
    return k, level
