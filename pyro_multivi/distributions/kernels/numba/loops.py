"""Element-wise part of the block-wise likelihoods, as loops that Numba compiles, in float32 on a CPU.

Operation by operation torch passes over a block some twenty times. Here the cells of a feature stay in the first cache
from logit to residual, and each thread has features of its own. Formulas and names are those of the modules
``accessibility``, ``counts`` and ``zero_inflation`` above. Numbers out of range are left to them: a loop returns the
products of probabilities instead of their logarithms, and the caller sees from the products whether any underflowed.

This module imports Numba, an optional dependency, so only :mod:`.switch` imports it, and late.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from pyro_multivi.distributions.kernels.log_gamma import LARGE_COUNT
from pyro_multivi.distributions.kernels.numba.fragments import fragments as fragments
from pyro_multivi.distributions.kernels.numba.scalar_math import (
    FAST,
    LN_2,
    LOG2_E,
    ONE,
    Array,
    dot,
    exp2,
    from_half,
    log1p,
    rising,
    softplus,
    to_half,
)

# Features whose probabilities are multiplied before a logarithm is taken.
FOLD = 8
_LN_2 = math.log(2)
_LOG_FACTORIAL = np.array([math.lgamma(x + 1) for x in range(256)])
# Features of a first layer's weight that are read at once: half a megabyte of 128 columns.
_AT_A_TIME = 1024
# In elements of float32.
_CACHE_LINE = 16


@numba.njit(cache=True)
def n_folds(m: int) -> int:
    """Number of products that m features make."""
    return (m + FOLD - 1) // FOLD


@numba.njit(cache=True)
def _share(chunk: int, n_chunks: int, m: int) -> Any:
    """First and last feature of a thread's share, in whole folds."""
    folds = n_folds(m)
    return chunk * folds // n_chunks * FOLD, min((chunk + 1) * folds // n_chunks * FOLD, m)


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def regions(
    block_mn: Array, halves_mn: Any, bias_m: Array, inverse_r_m: Array, rest_r_m: Array, rest_n: Array,
    minus_d_n: Array, weight_n: Array, limit: Any, start_m: Array, row: Array, products_gn: Array, d_cell_cn: Array,
    d_region_m: Array, d_bias_m: Array,
) -> None:  # fmt: skip
    """Turn a block of logits (less their bias, in units of log(2)) into E T / (-d den), their residual.

    Parameters
    ----------
    block_mn
        In: logits, out: residuals.
    halves_mn
        Logits and residuals if they are bfloat16, as whole numbers of 16 bits; else None.
    start_m, row
        First entry of each region, and the end of the last, (m + 1,); cells of the entries from the first region on.
    products_gn
        Out: (1 - p d r), or p d r of open regions, multiplied over :data:`FOLD` regions.
    d_cell_cn
        Out: sum of T / d over the regions, a row for each thread.
    d_region_m, d_bias_m
        Out: sums over cells of T / (-d), and of the residual, times ``weight_n``; the former also times 1 / r.
    """
    m, n = block_mn.shape
    n_chunks = len(d_cell_cn)
    for chunk in numba.prange(n_chunks):
        first, last = _share(chunk, n_chunks, m)
        e, num = np.empty(n, np.float32), np.empty(n, np.float32)
        product, d_cell = np.ones(n, np.float32), np.zeros(n, np.float32)
        for i in range(first, last):
            bias, inverse_r, rest_r = bias_m[i], inverse_r_m[i], rest_r_m[i]
            for j in range(n):
                logit = (block_mn[i, j] if halves_mn is None else from_half(halves_mn[i, j])) + bias
                logit = limit if logit > limit else logit
                logit = -limit if logit < -limit else logit
                e[j] = exp2(logit)
                num[j] = e[j] + (rest_r + rest_n[j])
            for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                num[row[entry]] = minus_d_n[row[entry]]
            for j in range(n):
                inverse_den, t = ONE / (e[j] + inverse_r), ONE / num[j]
                product[j] *= num[j] * inverse_den
                residual = e[j] * inverse_den * t
                if halves_mn is None:
                    block_mn[i, j] = residual
                else:
                    halves_mn[i, j] = to_half(residual)
                d_cell[j] -= t
                e[j], num[j] = residual, t
            d_region_m[i], d_bias_m[i] = dot(num, weight_n) * inverse_r, dot(e, weight_n)
            if i % FOLD == FOLD - 1 or i == last - 1:
                for j in range(n):
                    products_gn[i // FOLD, j] = abs(product[j])
                    product[j] = ONE
        d_cell_cn[chunk] = d_cell


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def softmax(log2_mn: Array, halves_mn: Any, bias_m: Array, peak_cn: Array, sum_cn: Array) -> None:
    """Add the bias to a block of a softmax's logits and find each thread's part of the normalizer.

    Parameters
    ----------
    log2_mn
        In: logits less their bias, in units of log(2), unless they are in ``halves_mn``, see :func:`regions`; out:
        logits.
    peak_cn, sum_cn
        Out: largest logit of the features of each thread, and the sum of 2^(logit - largest).
    """
    m, n = log2_mn.shape
    n_chunks = len(peak_cn)
    for chunk in numba.prange(n_chunks):
        first, last = _share(chunk, n_chunks, m)
        peak, total = np.full(n, -np.inf, np.float32), np.zeros(n, np.float32)
        for i in range(first, last):
            for j in range(n):
                logit = (log2_mn[i, j] if halves_mn is None else from_half(halves_mn[i, j])) + bias_m[i]
                log2_mn[i, j] = logit
                peak[j] = logit if logit > peak[j] else peak[j]
        for i in range(first, last):
            for j in range(n):
                total[j] += exp2(log2_mn[i, j] - peak[j])
        peak_cn[chunk], sum_cn[chunk] = peak, total


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def softmax_slopes(
    log2_mean_mn: Array, slope_mn: Array, halves_mn: Any, by_library_n: Array, weight_n: Array, d_bias_m: Array,
    n_chunks: int,
) -> None:  # fmt: skip
    """Derivatives by the logits of a softmax from those by log(mean), of which mean times ``by_library_n`` is taken.

    Parameters
    ----------
    slope_mn, halves_mn
        In: derivatives by log(mean), in the former. Out: by logits, in the latter if they are to be bfloat16.
    d_bias_m
        Out: their sums over cells times ``weight_n``.
    """
    m, n = slope_mn.shape
    for chunk in numba.prange(n_chunks):
        first, last = _share(chunk, n_chunks, m)
        slope = np.empty(n, np.float32)
        for i in range(first, last):
            for j in range(n):
                slope[j] = slope_mn[i, j] - exp2(log2_mean_mn[i, j]) * by_library_n[j]
                if halves_mn is None:
                    slope_mn[i, j] = slope[j]
                else:
                    halves_mn[i, j] = to_half(slope[j])
            d_bias_m[i] = dot(slope, weight_n)


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def zeros(
    log2_mean_mn: Array, theta_m: Array, gate_mn: Any, gate_halves_mn: Any, gate_bias_m: Any, d_gate_bias_m: Any,
    weight_n: Array, start_m: Array, row: Array, slope_mn: Array, products_gn: Array, value_cn: Array,
    d_theta_m: Array, gate_e: Array,
) -> None:  # fmt: skip
    """Log-probabilities and derivatives of a block of counts as if all were zero: NB, or ZINB with a gate.

    Parameters
    ----------
    log2_mean_mn, theta_m
        Mean and inverse dispersion of the NB; the former as a logarithm, in units of log(2).
    gate_mn, gate_halves_mn
        In: logits of the zero inflation less their bias, in units of log(2), out: derivatives by them (of unit 1). They
        are in the latter if they are bfloat16, see :func:`regions`. None: an NB.
    start_m, row
        Positions of a ZINB's non-zero counts, see :func:`regions`: there a zero has probability 1.
    slope_mn
        Out: derivatives by log(mean).
    products_gn
        Out: probabilities of zero of a ZINB, multiplied over :data:`FOLD` genes. If one is too small, all results are
        invalid.
    value_cn
        Added to: log-probabilities of an NB, a row for each thread.
    d_theta_m, d_gate_bias_m
        Out: sums over cells of the derivatives by theta and by logits times ``weight_n``.
    gate_e
        Out: logits of the zero inflation at the non-zero counts.
    """
    m, n = log2_mean_mn.shape
    n_chunks = len(value_cn)
    for chunk in numba.prange(n_chunks):
        first, last = _share(chunk, n_chunks, m)
        sp, sig, gate = np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n, np.float32)
        kept, probability, product = np.ones(n, np.float32), np.ones(n, np.float32), np.ones(n, np.float32)
        value = np.zeros(n, np.float32)
        for i in range(first, last):
            theta = theta_m[i]
            log2_theta = np.float32(np.log2(theta))
            for j in range(n):
                ratio = exp2(log2_mean_mn[i, j] - log2_theta)
                sp[j] = log1p(ratio)
                sig[j] = ratio / (ONE + ratio)
            if gate_mn is None:
                for j in range(n):
                    value[j] -= theta * sp[j]
            else:
                bias = gate_bias_m[i]
                for j in range(n):
                    gate[j] = (gate_mn[i, j] if gate_halves_mn is None else from_half(gate_halves_mn[i, j])) + bias
                for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                    gate_e[entry] = gate[row[entry]]
                for j in range(n):
                    e, nb = exp2(gate[j]), exp2(-theta * LOG2_E * sp[j])
                    rest = ONE / (ONE + e)
                    kept[j] = nb / (e + nb)
                    probability[j] = (e + nb) * rest
                    gate[j] = rest
                for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                    kept[row[entry]] = ONE
                    probability[row[entry]] = ONE
                for j in range(n):
                    gate[j] -= kept[j]
                    if gate_halves_mn is None:
                        gate_mn[i, j] = gate[j]
                    else:
                        gate_halves_mn[i, j] = to_half(gate[j])
                    product[j] *= probability[j]
                d_gate_bias_m[i] = dot(gate, weight_n)
                if i % FOLD == FOLD - 1 or i == last - 1:
                    for j in range(n):
                        products_gn[i // FOLD, j] = product[j]
                        product[j] = ONE
            for j in range(n):
                slope_mn[i, j] = -theta * sig[j] * kept[j]
                sp[j] = (sig[j] - sp[j]) * kept[j]
            d_theta_m[i] = dot(sp, weight_n)
        for j in range(n):
            value_cn[chunk, j] += value[j]


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def nonzeros(
    x_e: Array, start_g: Array, row_e: Array, log2_mean_gn: Array, theta_g: Array, gate_e: Any, weight_n: Array,
    slope_gn: Array, value_cn: Array, slope_cn: Array, d_theta_g: Array,
) -> None:  # fmt: skip
    """Correct the results of :func:`zeros` at the counts above zero, of all genes at once.

    Parameters
    ----------
    x_e, start_g, row_e
        Whole counts, ordered by gene; the first of each gene, and the end of the last; their cells.
    gate_e
        Logits of the zero inflation there, in units of log(2): its zeros have left these entries out. None: an NB.
    slope_gn, d_theta_g
        Added to, see :func:`zeros`.
    value_cn, slope_cn
        Added to: log-probabilities and derivatives by log(mean) of a cell, a row for each thread.
    """
    n_genes, n_chunks = len(theta_g), len(value_cn)
    for chunk in numba.prange(n_chunks):
        value, slopes = np.zeros(value_cn.shape[1]), np.zeros(value_cn.shape[1])
        for gene in range(chunk * n_genes // n_chunks, (chunk + 1) * n_genes // n_chunks):
            theta, d_theta = np.float64(theta_g[gene]), 0.0
            log2_theta = np.float32(np.log2(theta_g[gene]))
            for entry in range(start_g[gene], start_g[gene + 1]):
                x, cell = np.float64(x_e[entry]), row_e[entry]
                log2_mean = log2_mean_gn[gene, cell]
                u = log2_mean - log2_theta
                # exp of -|u|, from which softplus(u) and log(mean) - softplus(u) follow without cancellation.
                small = exp2(-abs(u))
                log_small, less = log1p(small), ONE / (ONE + small)
                logs, by_theta = rising(x, theta)
                factorial = _LOG_FACTORIAL[np.int64(x)] if x < len(_LOG_FACTORIAL) else math.lgamma(x + 1)
                sig = small * less if u < 0 else less
                if x < LARGE_COUNT:
                    value[cell] += logs - factorial + x * (min(log2_mean, log2_theta) * LN_2 - log_small)
                    d_theta += (x * sig - by_theta) / theta * weight_n[cell]
                else:
                    log_mean, log_theta = log2_mean * _LN_2, math.log(theta)
                    rest = math.log1p(math.exp(-abs(log_mean - log_theta)))
                    value[cell] += logs - factorial + x * (min(log_mean, log_theta) - rest)
                    d_theta += (x / (1.0 + math.exp(log_theta - log_mean)) - by_theta) / theta * weight_n[cell]
                if gate_e is not None:
                    value[cell] -= theta * (max(u, np.float32(0)) * LN_2 + log_small) + softplus(gate_e[entry])
                slope = np.float32(x * (less if u < 0 else small * less))
                slope_gn[gene, cell] += slope
                slopes[cell] += slope
            d_theta_g[gene] += d_theta
        for cell in range(len(value)):
            value_cn[chunk, cell] += value[cell]
            slope_cn[chunk, cell] += slopes[cell]


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def sparse_product(weight_fh: Array, crow: Array, col: Array, val: Array, product_cnh: Array, read_c: Array) -> None:
    """Compressed rows times a wide matrix; each thread has a share of the features and a product of its own.

    A share is taken in pieces that stay in the cache, for all cells: each row of the weight is loaded from memory once.
    It is loaded in order, before cells look rows up at random, which is slow from memory. ``read_c`` receives the sum
    of the elements read for that purpose; without a use for it the compiler would drop the loop.
    """
    n_chunks, n, n_hidden = product_cnh.shape
    n_features = len(weight_fh)
    for chunk in numba.prange(n_chunks):
        begin, end = chunk * n_features // n_chunks, (chunk + 1) * n_features // n_chunks
        total, read = np.empty(n_hidden, np.float32), np.float32(0)
        entry = np.empty(n, np.int64)
        for i in range(n):
            entry[i] = crow[i] + np.searchsorted(col[crow[i] : crow[i + 1]], begin)
            product_cnh[chunk, i] = 0
        for first in range(begin, end, _AT_A_TIME):
            stop = min(first + _AT_A_TIME, end)
            for feature in range(first, stop):
                for j in range(0, n_hidden, _CACHE_LINE):
                    read += weight_fh[np.uint64(feature), np.uint64(j)]
            for i in range(n):
                total[:] = product_cnh[chunk, i]
                k, last = entry[i], entry[i]
                while last < crow[i + 1] and col[last] < stop:
                    last += 1
                entry[i] = last
                # Four at a time: the total is read and written once for them.
                while k + 4 <= last:
                    a, b = weight_fh[np.uint64(col[k])], weight_fh[np.uint64(col[k + 1])]
                    c, d = weight_fh[np.uint64(col[k + 2])], weight_fh[np.uint64(col[k + 3])]
                    by_a, by_b, by_c, by_d = val[k], val[k + 1], val[k + 2], val[k + 3]
                    for j in range(n_hidden):
                        total[j] += by_a * a[j] + by_b * b[j] + by_c * c[j] + by_d * d[j]
                    k += 4
                while k < last:
                    a, by_a = weight_fh[np.uint64(col[k])], val[k]
                    for j in range(n_hidden):
                        total[j] += by_a * a[j]
                    k += 1
                product_cnh[chunk, i] = total
        read_c[chunk] = read
