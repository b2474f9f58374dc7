"""Functions of single numbers, and a dot product, from which the compiled loops are built.

Numba's cache of a loop checks only the loop's own file: after a change here, also ``touch loops.py``. Only
:mod:`.loops` imports this module, since it needs Numba.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.polynomial import Chebyshev, Polynomial

Array = np.ndarray[Any, Any]

# A product may be contracted with a sum. Other fast flags would assume that there is no NaN, or reorder factors, of
# which two together may underflow.
FAST = {"contract"}
LN_2 = np.float32(math.log(2))
LOG2_E = np.float32(1 / math.log(2))
ONE = np.float32(1)
_ONE_BITS = ONE.view(np.int32)
# Terms of a rising factorial that are added up one by one.
_TERMS = 64
# Added to a small number it leaves a sum whose last bits are that number, rounded.
_ROUND = np.float32(1.5 * 2**23)
_SQRT_HALF_BITS = np.float32(math.sqrt(0.5)).view(np.int32)
# 2^x within +-1/2 and log(1 + f) / f within sqrt(1/2) - 1 .. sqrt(2) - 1, better than float32 can tell.
_EXP2 = tuple(Chebyshev.interpolate(np.exp2, 6, [-0.5, 0.5]).convert(kind=Polynomial).coef.astype(np.float32))
_LOG1P = tuple(
    Chebyshev.interpolate(lambda f: np.log1p(f) / f, 10, [math.sqrt(0.5) - 1, math.sqrt(2) - 1])
    .convert(kind=Polynomial).coef.astype(np.float32)
)  # fmt: skip


@numba.njit(fastmath=FAST, cache=True)
def _polynomial(coefficients: Any, x: Any) -> Any:
    """Sum of coefficients[k] x^k."""
    total = coefficients[-1]
    for k in range(len(coefficients) - 2, -1, -1):
        total = total * x + coefficients[k]
    return total


@numba.njit(fastmath=FAST, error_model="numpy", cache=True)
def exp2(x: Any) -> Any:
    """2^x, with x clamped to +-126; NaN stays."""
    x = np.float32(126) if x > np.float32(126) else x
    x = np.float32(-126) if x < np.float32(-126) else x
    rounded = np.float32(x + _ROUND)
    f = x - (rounded - _ROUND)
    power = _polynomial(_EXP2, f)
    bits = np.float32(rounded).view(np.int32)
    return power * np.int32((bits << np.int32(23)) + _ONE_BITS).view(np.float32)


@numba.njit(fastmath=FAST, error_model="numpy", cache=True)
def log1p(u: Any) -> Any:
    """log(1 + u) for u >= 0, to rounding also for small u."""
    w = np.float32(ONE + u)
    bits = np.float32(w).view(np.int32)
    whole = np.int32((bits - _SQRT_HALF_BITS) >> np.int32(23))
    f = np.int32(bits - (whole << np.int32(23))).view(np.float32) - ONE
    ratio = _polynomial(_LOG1P, f)
    # The last term is the part of u that rounding of 1 + u has lost.
    return np.float32(whole) * LN_2 + ratio * f + (u - (w - ONE)) / w


@numba.njit(fastmath=FAST, error_model="numpy", cache=True)
def softplus(u: Any) -> Any:
    """log(1 + 2^u)."""
    rest = log1p(exp2(-abs(u)))
    return rest if u < 0 else u * LN_2 + rest


@numba.njit(cache=True)
def from_half(half: Any) -> Any:
    """float32 of a bfloat16, whose bits are its first half."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@numba.njit(cache=True)
def to_half(x: Any) -> Any:
    """Nearest bfloat16; of two equally near ones the even one."""
    bits = np.float32(x).view(np.uint32)
    nearest = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return nearest if x == x else np.uint16(0x7FC0)


@numba.njit(fastmath={"contract", "reassoc"}, cache=True)
def dot(a_n: Array, b_n: Array) -> Any:
    """Sum of products, in any order."""
    total = np.float32(0)
    for j in range(len(a_n)):
        total += a_n[j] * b_n[j]
    return total


@numba.njit(fastmath=FAST, error_model="numpy", cache=True)
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
