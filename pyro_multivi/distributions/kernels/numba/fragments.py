"""The loop over a block of regions whose fragments are counted; formulas and names are those of ``fragments`` above.

This module imports Numba, an optional dependency: only :mod:`.loops` imports it.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from pyro_multivi.distributions.kernels.numba.scalar_math import FAST, ONE, Array, dot, exp2, from_half, log1p, to_half


@numba.njit(parallel=True, fastmath=FAST, error_model="numpy", cache=True)
def fragments(
    block_mn: Array, halves_mn: Any, bias_m: Array, rate_m: Array, theta_m: Any, size_n: Array, cell_weight_n: Array,
    weight_n: Array, limit: Any, start_m: Array, row: Array, x_over_size: Array, log2_e: Array, value_cn: Array,
    d_size_cn: Array, d_rate_m: Array, d_bias_m: Array, d_theta_m: Any,
) -> None:  # fmt: skip
    """Turn a block of logits (less their bias, in units of -log(2)) into T (1 - p) / s, their residual.

    Parameters
    ----------
    block_mn, halves_mn
        In: logits, out: residuals; in the latter if they are bfloat16, see :func:`.loops.regions`.
    theta_m, d_theta_m
        Inverse dispersions, and out: the sums over cells of the derivatives of zeros by them, times ``weight_n``. None:
        Poisson counts.
    cell_weight_n
        Weights of the cells times -s.
    start_m, row, x_over_size
        First entry of each region, and the end of the last, (m + 1,); cells of the entries from the first region
        on, and their counts over s.
    log2_e
        Out: logits at the entries.
    value_cn, d_size_cn
        Out: sums over regions of log p(0), and of -T / s, a row for each thread.
    d_rate_m, d_bias_m
        Out: sums over cells of T / s, and of the residual, times ``cell_weight_n``.
    """
    m, n = block_mn.shape
    n_chunks = len(value_cn)
    for chunk in numba.prange(n_chunks):
        e, t, kept = np.empty(n, np.float32), np.empty(n, np.float32), np.ones(n, np.float32)
        by_theta = np.empty(n, np.float32)
        value, d_size = np.zeros(n, np.float32), np.zeros(n, np.float32)
        for i in range(chunk * m // n_chunks, (chunk + 1) * m // n_chunks):
            bias, rate = bias_m[i], rate_m[i]
            for j in range(n):
                e[j] = (block_mn[i, j] if halves_mn is None else from_half(halves_mn[i, j])) + bias
            for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                log2_e[entry] = e[row[entry]]
            for j in range(n):
                logit = limit if e[j] > limit else e[j]
                logit = -limit if logit < -limit else logit
                power = exp2(logit)
                p = ONE / (ONE + power)
                e[j], t[j] = power * p, rate * p
            if theta_m is None:
                for j in range(n):
                    value[j] -= t[j] * size_n[j]
            else:
                theta = theta_m[i]
                for j in range(n):
                    u = t[j] * size_n[j] / theta
                    log = log1p(u)
                    value[j] -= theta * log
                    kept[j] = ONE / (ONE + u)
                    by_theta[j] = u * kept[j] - log
                d_theta_m[i] = dot(by_theta, weight_n)
            for entry in range(start_m[i] - start_m[0], start_m[i + 1] - start_m[0]):
                t[row[entry]] -= x_over_size[entry]
            for j in range(n):
                t[j] *= kept[j]
                d_size[j] -= t[j]
                e[j] *= t[j]
                if halves_mn is None:
                    block_mn[i, j] = e[j]
                else:
                    halves_mn[i, j] = to_half(e[j])
            d_rate_m[i], d_bias_m[i] = dot(t, cell_weight_n), dot(e, cell_weight_n)
        value_cn[chunk], d_size_cn[chunk] = value, d_size
