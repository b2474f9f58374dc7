"""The element-wise part of the block-wise likelihoods as loops that Numba compiles, in float32 on a CPU.

Operation by operation torch walks over a block some twenty times. Here the cells of a feature stay in the first cache
from logit to residual, and each thread has features of its own. The formulas are those of
:mod:`blockwise_accessibility`, :mod:`blockwise_counts` and :mod:`blockwise_inflation`, in whose words the names are;
what these do about numbers out of range is left to them: a loop returns the products of probabilities that it would
have to take logarithms of, and the caller sees from them whether it may be trusted.

This module imports Numba, an optional dependency, so it is imported by :mod:`loops` alone, when asked for.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

Array = np.ndarray[Any, Any]

# Features whose probabilities are multiplied before a logarithm is taken.
FOLD = 8

# A product may be contracted with a sum. What else is fast would take NaN for impossible, or reorder factors, of which
# two together may underflow.
_FAST = {"contract"}
_LN_2 = np.float32(math.log(2))
_LOG2_E = np.float32(1 / math.log(2))
_ONE = np.float32(1)
_ONE_BITS = _ONE.view(np.int32)
# Terms of a rising factorial that are added up one by one.
_TERMS = 64
_LOG_FACTORIAL = np.array([math.lgamma(x + 1) for x in range(256)])
# Features of a first layer's weight that are read at a time: half a megabyte of 128 columns.
_AT_A_TIME = 1024
# Added to a small number it leaves a sum whose last bits are that number, rounded.
_ROUND = np.float32(1.5 * 2**23)
_SQRT_HALF_BITS = np.float32(math.sqrt(0.5)).view(np.int32)
# 2^x within +-1/2 and log(1 + f) / f within sqrt(1/2) - 1 .. sqrt(2) - 1, better than float32 can tell.
_EXP2 = tuple(Chebyshev.interpolate(np.exp2, 6, [-0.5, 0.5]).convert(kind=Polynomial).coef.astype(np.float32))
_LOG1P = tuple(
    Chebyshev.interpolate(lambda f: np.log1p(f) / f, 10, [math.sqrt(0.5) - 1, math.sqrt(2) - 1])
    .convert(kind=Polynomial).coef.astype(np.float32)
)  # fmt: skip


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def exp2(x: Any) -> Any:
    """2^x, to which x beyond +-126 is drawn; NaN stays."""
    x = np.float32(126) if x > np.float32(126) else x
    x = np.float32(-126) if x < np.float32(-126) else x
    rounded = np.float32(x + _ROUND)
    f = x - (rounded - _ROUND)
    power = _EXP2[6]
    power = power * f + _EXP2[5]
    power = power * f + _EXP2[4]
    power = power * f + _EXP2[3]
    power = power * f + _EXP2[2]
    power = power * f + _EXP2[1]
    power = power * f + _EXP2[0]
    bits = np.float32(rounded).view(np.int32)
    return power * np.int32((bits << np.int32(23)) + _ONE_BITS).view(np.float32)


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def log1p(u: Any) -> Any:
    """log(1 + u) for u >= 0, to rounding also for small u."""
    w = np.float32(_ONE + u)
    bits = np.float32(w).view(np.int32)
    whole = np.int32((bits - _SQRT_HALF_BITS) >> np.int32(23))
    f = np.int32(bits - (whole << np.int32(23))).view(np.float32) - _ONE
    ratio = _LOG1P[10]
    ratio = ratio * f + _LOG1P[9]
    ratio = ratio * f + _LOG1P[8]
    ratio = ratio * f + _LOG1P[7]
    ratio = ratio * f + _LOG1P[6]
    ratio = ratio * f + _LOG1P[5]
    ratio = ratio * f + _LOG1P[4]
    ratio = ratio * f + _LOG1P[3]
    ratio = ratio * f + _LOG1P[2]
    ratio = ratio * f + _LOG1P[1]
    ratio = ratio * f + _LOG1P[0]
    # What 1 + u has lost of u.
    return np.float32(whole) * _LN_2 + ratio * f + (u - (w - _ONE)) / w


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def _softplus(u: Any) -> Any:
    """log(1 + 2^u)."""
    rest = log1p(exp2(-abs(u)))
    return rest if u < 0 else u * _LN_2 + rest


@numba.njit(cache=True)
def _of_half(half: Any) -> Any:
    """float32 of a bfloat16, of which it is the first half."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@numba.njit(cache=True)
def _to_half(x: Any) -> Any:
    """The nearest bfloat16, of two the even one."""
    bits = np.float32(x).view(np.uint32)
    nearest = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return nearest if x == x else np.uint16(0x7FC0)


@numba.njit(fastmath={"contract", "reassoc"}, cache=True)
def _dot(a_n: Array, b_n: Array) -> Any:
    """Sum of products, in any order."""
    total = np.float32(0)
    for j in range(len(a_n)):
        total += a_n[j] * b_n[j]
    return total


@numba.njit(cache=True)
def n_folds(m: int) -> int:
    """Number of products that m features make."""
    return (m + FOLD - 1) // FOLD


@numba.njit(cache=True)
def _share(chunk: int, n_chunks: int, m: int) -> Any:
    """First and last feature of a thread's share, in whole folds."""
    folds = n_folds(m)
    return chunk * folds // n_chunks * FOLD, min((chunk + 1) * folds // n_chunks * FOLD, m)


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
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
        They stand here if they are bfloat16, as whole numbers of that many bits; else None.
    start_m, row
        Where the entries of each region and one more begin, (m + 1,), and the cells of the first region's onwards.
    products_gn
        Out: (1 - p d r), or p d r of open regions, multiplied over :data:`FOLD` regions.
    d_cell_cn
        Added to: sum of T / d over the regions, a row for each thread.
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
                logit = (block_mn[i, j] if halves_mn is None else _of_half(halves_mn[i, j])) + bias
                logit = limit if logit > limit else logit
                logit = -limit if logit < -limit else logit
                e[j] = exp2(logit)
                num[j] = e[j] + (rest_r + rest_n[j])
            for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                num[row[entry]] = minus_d_n[row[entry]]
            for j in range(n):
                inverse_den, t = _ONE / (e[j] + inverse_r), _ONE / num[j]
                product[j] *= num[j] * inverse_den
                residual = e[j] * inverse_den * t
                if halves_mn is None:
                    block_mn[i, j] = residual
                else:
                    halves_mn[i, j] = _to_half(residual)
                d_cell[j] -= t
                e[j], num[j] = residual, t
            d_region_m[i], d_bias_m[i] = _dot(num, weight_n) * inverse_r, _dot(e, weight_n)
            if i % FOLD == FOLD - 1 or i == last - 1:
                for j in range(n):
                    products_gn[i // FOLD, j] = abs(product[j])
                    product[j] = _ONE
        for j in range(n):
            d_cell_cn[chunk, j] += d_cell[j]


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def zeros(
    log2_mean_mn: Array, theta_m: Array, gate_mn: Any, weight_n: Array, start_m: Array, row: Array, slope_mn: Array,
    products_gn: Array, value_cn: Array, d_theta_m: Array, gate_e: Array,
) -> None:  # fmt: skip
    """A block of counts as if all were zero: NB, or ZINB with a gate.

    Parameters
    ----------
    log2_mean_mn, theta_m
        Of the NB; the former in units of log(2).
    gate_mn
        In: logits of the zero inflation in units of log(2), out: derivatives by them (of unit 1). None: an NB.
    start_m, row
        Where a ZINB's non-zero counts are, see :func:`regions`: there a zero has probability 1.
    slope_mn
        Out: derivatives by log(mean).
    products_gn
        Out: probabilities of zero of a ZINB, multiplied over :data:`FOLD` genes. Where one is too small all results are
        worthless.
    value_cn
        Added to: log-probabilities of an NB, a row for each thread.
    d_theta_m
        Out: sums over cells of the derivatives by theta times ``weight_n``.
    gate_e
        Out: logits of the zero inflation at the non-zero counts.
    """
    m, n = log2_mean_mn.shape
    n_chunks = len(value_cn)
    for chunk in numba.prange(n_chunks):
        first, last = _share(chunk, n_chunks, m)
        sp, sig, kept = np.empty(n, np.float32), np.empty(n, np.float32), np.ones(n, np.float32)
        probability, product, value = np.ones(n, np.float32), np.ones(n, np.float32), np.zeros(n, np.float32)
        for i in range(first, last):
            theta = theta_m[i]
            log2_theta = np.float32(np.log2(theta))
            for j in range(n):
                ratio = exp2(log2_mean_mn[i, j] - log2_theta)
                sp[j] = log1p(ratio)
                sig[j] = ratio / (_ONE + ratio)
            if gate_mn is None:
                for j in range(n):
                    value[j] -= theta * sp[j]
            else:
                for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                    gate_e[entry] = gate_mn[i, row[entry]]
                for j in range(n):
                    e, nb = exp2(gate_mn[i, j]), exp2(-theta * _LOG2_E * sp[j])
                    rest = _ONE / (_ONE + e)
                    kept[j] = nb / (e + nb)
                    probability[j] = (e + nb) * rest
                    gate_mn[i, j] = rest
                for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                    kept[row[entry]] = _ONE
                    probability[row[entry]] = _ONE
                for j in range(n):
                    gate_mn[i, j] -= kept[j]
                    product[j] *= probability[j]
                if i % FOLD == FOLD - 1 or i == last - 1:
                    for j in range(n):
                        products_gn[i // FOLD, j] = product[j]
                        product[j] = _ONE
            for j in range(n):
                slope_mn[i, j] = -theta * sig[j] * kept[j]
                sp[j] = (sig[j] - sp[j]) * kept[j]
            d_theta_m[i] = _dot(sp, weight_n)
        for j in range(n):
            value_cn[chunk, j] += value[j]


@numba.njit(fastmath=_FAST, error_model="numpy", cache=True)
def rising(x: Any, theta: Any) -> Any:
    """Sums over k = 0 .. x - 1 of log(1 + k / theta) and of k / (theta + k), for whole x."""
    logs, slopes, product = 0.0, 0.0, 1.0
    for k in range(1, min(int(x), _TERMS)):
        product *= 1.0 + k / theta
        slopes += k / (theta + k)
        if product > 1e200:
            logs += math.log(product)
            product = 1.0
    if x > 1:
        logs += math.log(product)
    if x > _TERMS:
        # The others by Stirling's series, from which lgamma(end) - lgamma(begin) and its derivative.
        begin, end, rest = theta + _TERMS, theta + x, x - _TERMS
        growth = math.log1p(rest / begin)
        tails = (1 / end - 1 / begin) / 12 - (1 / end**3 - 1 / begin**3) / 360
        logs += rest * math.log(begin / theta) + (end - 0.5) * growth - rest + tails
        steps = growth - (1 / end - 1 / begin) / 2 - (1 / end**2 - 1 / begin**2) / 12
        slopes += rest - theta * steps
    return logs, slopes


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def nonzeros(
    x_e: Array, start_g: Array, row_e: Array, log2_mean_gn: Array, theta_g: Array, gate_e: Any, weight_n: Array,
    slope_gn: Array, value_cn: Array, slope_cn: Array, d_theta_g: Array,
) -> None:  # fmt: skip
    """What counts above zero add to what :func:`zeros` has found, all genes in one go.

    Parameters
    ----------
    x_e, start_g, row_e
        Whole counts, ordered by gene, where those of each gene and one more begin, and their cells.
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
                # exp of -|u|, from which softplus(u) and log(mean) - softplus(u) are had without cancellation.
                small = exp2(-abs(u))
                log_small, less = log1p(small), _ONE / (_ONE + small)
                logs, by_theta = rising(x, theta)
                factorial = _LOG_FACTORIAL[np.int64(x)] if x < len(_LOG_FACTORIAL) else math.lgamma(x + 1)
                value[cell] += logs - factorial + x * (min(log2_mean, log2_theta) * _LN_2 - log_small)
                if gate_e is not None:
                    value[cell] -= theta * (max(u, np.float32(0)) * _LN_2 + log_small) + _softplus(gate_e[entry])
                sig = small * less if u < 0 else less
                slope = np.float32(x * (less if u < 0 else small * less))
                slope_gn[gene, cell] += slope
                slopes[cell] += slope
                d_theta += (x * sig - by_theta) / theta * weight_n[cell]
            d_theta_g[gene] += d_theta
        for cell in range(len(value)):
            value_cn[chunk, cell] += value[cell]
            slope_cn[chunk, cell] += slopes[cell]


@numba.njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def sparse_product(weight_fh: Array, crow: Array, col: Array, val: Array, product_cnh: Array) -> None:
    """Compressed rows times a wide matrix, of which each thread has a share of the features and a product of its own.

    A share is read in pieces that stay in the cache, for all cells: each row of the weight comes from memory once.
    """
    n_chunks, n, n_hidden = product_cnh.shape
    n_features = len(weight_fh)
    for chunk in numba.prange(n_chunks):
        begin, end = chunk * n_features // n_chunks, (chunk + 1) * n_features // n_chunks
        total = np.empty(n_hidden, np.float32)
        entry = np.empty(n, np.int64)
        for i in range(n):
            entry[i] = crow[i] + np.searchsorted(col[crow[i] : crow[i + 1]], begin)
            product_cnh[chunk, i] = 0
        for first in range(begin, end, _AT_A_TIME):
            stop = min(first + _AT_A_TIME, end)
            for i in range(n):
                total[:] = product_cnh[chunk, i]
                k = entry[i]
                while k < crow[i + 1] and col[k] < stop:
                    weight_h, value = weight_fh[np.uint64(col[k])], np.float32(val[k])
                    for j in range(n_hidden):
                        total[j] += value * weight_h[j]
                    k += 1
                entry[i] = k
                product_cnh[chunk, i] = total
