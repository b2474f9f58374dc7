r"""Exact log-likelihoods of counts, block by block over genes.

With m = log(mean), u = m - log(theta), sp = log(1 + exp(u)) and sig its slope, every gene is first
treated as a zero count, which needs no gamma function:

    Poisson   log p(0) = -exp(m)           d/dm = -exp(m)
    NB        log p(0) = -theta sp         d/dm = -theta sig        d/dtheta = sig - sp
    ZINB      as NB, then :mod:`~pyro_multivi.distributions.kernels.zero_inflation`

The rest, log p(x) - log p(0), is then added at the few non-zero counts; it is the same for NB and
ZINB. A softmax is differentiated through last: dA = D - rho sum(D) with D = d/dm.
Logits and m are in units of log(2), since 2^x costs half as much as exp(x).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from pyro_multivi.distributions.kernels.blocks import Entries
from pyro_multivi.distributions.kernels.counts_walk import CountsTerm, CountsWalk, Family
from pyro_multivi.distributions.kernels.gradients import Gradients, log_prob
from pyro_multivi.distributions.kernels.numba.counts_walk import CompiledCountsWalk, loops_for_counts
from pyro_multivi.distributions.kernels.readout import Readout


def counts_log_prob(
    rho: Readout, library: Tensor, entries: Entries, theta: Tensor | None = None, gate_logits: Readout | None = None
) -> Tensor:
    """Log-probability of each cell, shape (n,).

    Parameters
    ----------
    rho
        Readout with link "softmax" or "softplus", shape (n, G).
    library
        Size factors, shape (n,).
    entries
        Non-zero counts of n cells.
    theta
        Inverse dispersion, shape (G,) or (n, G); None for Poisson counts.
    gate_logits
        Readout with link "identity", shape (n, G); None without zero inflation.
    """
    gate: tuple[Tensor | None, ...] = (None, None, None)
    if gate_logits is not None:
        gate = gate_logits.hidden, gate_logits.weight, gate_logits.bias
    gate_gemm_dtype = None if gate_logits is None else gate_logits.gemm_dtype
    family = Family(rho.link == "softmax", rho.gemm_dtype, gate_gemm_dtype)
    make_term = partial(CountsTerm, entries, family)
    return log_prob(_evaluate, make_term, rho.hidden, rho.weight, rho.bias, library, theta, *gate)


def _evaluate(term: CountsTerm, weights_n: Tensor | None, want_value: bool) -> tuple[Tensor | None, Gradients]:
    """Value (if wanted) and gradients (if weights are given), in one walk over all blocks."""
    loops = loops_for_counts(term)
    if loops is None:
        return CountsWalk(term, weights_n, want_value).run()
    return CompiledCountsWalk(term, weights_n, want_value, loops).run()
