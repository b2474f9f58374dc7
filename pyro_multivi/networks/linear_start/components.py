r"""Principal components of one modality beside its noise.

Columns are centred and freed of depth and covariates by regression, and scaled to unit variance; rows, which differ in
noise with the depth of the cell, to unit mean square. The noise is then about white, so that the law of Marchenko and
Pastur (1967) tells how large its eigenvalues get, and how much of a component that lies above is signal
(Benaych-Georges and Nadakuditi 2012). Random flips of the signs (Hong, Sheng and Dobriban 2020) give the same bound
within 2 % on SNARE-seq, sci-CAR and Multiome cells; without scaling the rows it is up to four times too low for
accessibility.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

Array = NDArray[np.floating[Any]]

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


def components(x: sp.csr_array, depth: Array, covariates: Array, most: int) -> Components:
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
    others = _others(depth, covariates)
    coefficients = np.linalg.lstsq(others.T @ others, others.T @ x, rcond=1e-8)[0]
    squares = np.asarray(x.multiply(x).sum(0)).ravel() - (coefficients * (others.T @ x)).sum(0)
    detected = np.bincount(x.indices, minlength=n_features) / n
    known = (squares > 1e-6 * n) & (detected >= _LEAST_DETECTED)
    per_sd = np.zeros(n_features)
    per_sd[known] = (squares[known] / n) ** -0.5
    scaled = (x @ sp.diags_array(per_sd)).tocsr()
    fitted = coefficients * per_sd
    row_squares = (
        np.asarray(scaled.multiply(scaled).sum(1)).ravel()
        - 2 * ((scaled @ fitted.T) * others).sum(1)
        + ((others @ (fitted @ fitted.T)) * others).sum(1)
    )
    width = int(known.sum())
    per_rms = (row_squares / max(width, 1)).clip(1e-12) ** -0.5
    scaled, others = sp.diags_array(per_rms) @ scaled, others * per_rms[:, None]
    values, vectors = _largest(scaled[:, known], others, fitted[:, known], most)
    eigenvalues = values**2 / n
    k, level = _above_noise(eigenvalues, n, width)
    ratio, spike = width / n, eigenvalues[:k] / level
    shifted = spike - 1 - ratio
    strength = (shifted + np.sqrt((shifted**2 - 4 * ratio).clip(1e-12))) / 2
    # Squared cosine between a component's scores and what they estimate.
    reliability = ((1 - ratio / strength**2) / (1 + 1 / strength)).clip(1e-3, 0.999)
    directions = np.zeros((k, n_features))
    directions[:, known] = vectors[:k]
    scores = (scaled @ directions.T - others @ (fitted @ directions.T)) / np.sqrt(level)
    return Components(
        centre=np.asarray(x.mean(0)).ravel(), directions=directions * per_sd, nuisance=(fitted * per_sd)[1:],
        scores=scores, signal=spike * reliability, noise=spike * (1 - reliability),
    )  # fmt: skip


def _others(depth: Array, covariates: Array) -> Array:
    """What is taken out of the features: intercept, depth and its logarithm, covariates, (n, q)."""
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


def _above_noise(eigenvalues: Array, n: int, n_features: int) -> tuple[int, float]:
    """Number of eigenvalues above the bound of noise, and its variance, when the mean square is 1."""
    k, level = 0, 1.0
    for _ in range(len(eigenvalues)):
        level = max((n_features - eigenvalues[:k].sum()) / max((n_features - k) * (1 - k / n), 1e-3), 1e-3)
        bound = _MARGIN * level * (1 + np.sqrt(n_features / n)) ** 2
        found = int((eigenvalues > bound).sum())
        if found == k:
            break
        k = found
    return k, level
