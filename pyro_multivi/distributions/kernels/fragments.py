r"""Exact log-likelihoods of fragment counts, block by block over regions.

With a the logit, s the size of a cell and r the rate of a region, the mean is mu = s r p, p = 1 / (1 + E) with
E = exp(-a). With u = mu / theta and k = 1 / (1 + u), or k = 1 for Poisson counts, every region is first
treated as a zero count, and all derivatives follow from T = k (mu - x):

    Poisson   log p(0) = -mu                  dlog p / dlog mu = -T
    NB        log p(0) = -theta log(1 + u)    dlog p / dtheta = u k - log(1 + u) of a zero
    both      dlog p / da = -T (1 - p)        dlog p / dlog s = dlog p / dlog r = -T

The rest, log p(x) - log p(0), is then added at the few counts above zero, as for genes. Nothing is normalised over
regions, so that one walk is enough and no more than a block of them is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions.kernels.blocks import Block, Entries, block_width
from pyro_multivi.distributions.kernels.buffers import POOL
from pyro_multivi.distributions.kernels.counts_walk import nonzero_terms, refine_large
from pyro_multivi.distributions.kernels.gradients import Gradients, log_prob
from pyro_multivi.distributions.kernels.log_gamma import gamma_functions
from pyro_multivi.distributions.kernels.numba.switch import can_read, halves, loops_for
from pyro_multivi.distributions.kernels.products import LOG2_E, BlockwiseReadout
from pyro_multivi.distributions.kernels.readout import Readout

# A size or rate that underflowed to 0 still has a logarithm.
_FLOOR = 1e-30


def fragments_log_prob(p: Readout, size: Tensor, rate: Tensor, theta: Tensor | None, entries: Entries) -> Tensor:
    """Log-probability of each cell, shape (n,).

    Parameters
    ----------
    p
        Readout with link "sigmoid", shape (n, M).
    size, rate
        Factors of the mean, shapes (n,) and (M,).
    theta
        Inverse dispersion, shape (M,); None for Poisson counts.
    entries
        Counts above zero of n cells.
    """
    make_term = partial(FragmentsTerm, entries, p.gemm_dtype)
    return log_prob(_evaluate, make_term, p.hidden, p.weight, p.bias, size, rate, theta)


@dataclass(frozen=True)
class FragmentsTerm:
    """Arguments of a likelihood of fragment counts. Shapes: n cells, M regions, H hidden units.

    ``needs`` says of each tensor, in their order, whether its gradient is wanted.
    """

    entries: Entries
    gemm_dtype: torch.dtype | None
    hidden_nh: Tensor
    weight_mh: Tensor
    bias_m: Tensor
    size_n: Tensor
    rate_m: Tensor
    theta_m: Tensor | None
    needs: tuple[bool, ...]


def _evaluate(term: FragmentsTerm, weights_n: Tensor | None, want_value: bool) -> tuple[Tensor | None, Gradients]:
    """Value (if wanted) and gradients (if weights are given), in one walk over all blocks."""
    loops = loops_for(term.hidden_nh) if can_read(term.gemm_dtype) else None
    if loops is None:
        return FragmentsWalk(term, weights_n, want_value).run()
    return CompiledFragmentsWalk(term, weights_n, want_value, loops).run()


class FragmentsWalk:
    """One evaluation of a likelihood of fragment counts over all blocks, operation by operation of PyTorch."""

    def __init__(self, term: FragmentsTerm, weights_n: Tensor | None, want_value: bool) -> None:
        hidden, theta = term.hidden_nh, term.theta_m
        self.term, self.weights_n, self.n = term, weights_n, len(hidden)
        self.size, self.rate = term.size_n.clamp_min(_FLOOR), term.rate_m.clamp_min(_FLOOR)
        # Beyond this p, or 1 - p, vanishes; sums stay in range.
        self.limit = 100.0 if hidden.dtype == torch.float32 else 860.0
        # Size and sign are left out of the blocks.
        self.cell_weight = None if weights_n is None else -self.size * weights_n
        width = block_width(self.n, len(term.weight_mh), hidden.device)
        self.p = BlockwiseReadout(
            hidden, term.weight_mh, term.bias_m, term.gemm_dtype, self.cell_weight, term.needs[:3], width,
            scale=-LOG2_E,
        )  # fmt: skip
        self.x = term.entries.values().to(hidden.dtype)
        self.x_over_size = self.x / self.size.index_select(0, term.entries.row)
        #: Logits of the entries, in units of -log(2), block by block.
        self.log2_e: list[Tensor] = []
        self.blocks = list(term.entries.blocks(width))
        self.buffers = [
            POOL.take((width * self.n,), hidden.dtype, hidden.device) for _ in range(3 if theta is None else 6)
        ]
        self.value = hidden.new_zeros(self.n) if want_value else None
        needs_size, needs_rate, needs_theta = (weights_n is not None and need for need in term.needs[3:])
        self.d_size = torch.zeros_like(self.size) if needs_size else None
        self.d_rate = torch.zeros_like(self.rate) if needs_rate else None
        self.d_theta = torch.zeros_like(theta) if needs_theta and theta is not None else None

    def run(self) -> tuple[Tensor | None, Gradients]:
        """Value, if wanted, and gradients, if weights were given."""
        for block in self.blocks:
            self.add_zeros(block)
        self.add_nonzeros()
        if self.weights_n is None:
            return self.value, ()
        d_size = None if self.d_size is None else self.d_size.mul_(self.weights_n)
        d_rate = None if self.d_rate is None else self.d_rate.div_(self.rate)
        return self.value, (*self.p.gradients(), d_size, d_rate, self.d_theta)

    def views(self, block: Block) -> list[Tensor]:
        """Buffers of a block, (m, n) each."""
        m = block.stop - block.start
        return [buffer[: m * self.n].view(m, self.n) for buffer in self.buffers]

    def add_zeros(self, block: Block) -> None:
        """Value as if all counts were zero, and all gradients of p, size and rate."""
        e, p, t, *spare = self.views(block)
        self.p.logits(block, out=e)
        self.log2_e.append(e.view(-1).index_select(0, block.flat))
        e.clamp_(-self.limit, self.limit).exp2_()
        torch.add(e, 1.0, out=p).reciprocal_()
        torch.mul(p, self.rate[block.features].unsqueeze(1), out=t)  # mu / s, and T / s later on
        kept: Tensor | None = None
        if self.term.theta_m is not None:
            kept = self.negative_binomial_zeros(block, t, *spare)
        elif self.value is not None:
            self.value.addcmul_(t.sum(0), self.size, value=-1.0)
        if self.cell_weight is None:
            return
        t.view(-1).index_add_(0, block.flat, self.x_over_size[block.entries], alpha=-1.0)
        if kept is not None:
            t.mul_(kept)
        if self.d_size is not None:
            self.d_size -= t.sum(0)
        if self.d_rate is not None:
            torch.mv(t, self.cell_weight, out=self.d_rate[block.features])
        # 1 - p is E p, without cancellation.
        self.p.add(block, t.mul_(e).mul_(p))

    def negative_binomial_zeros(self, block: Block, t: Tensor, u: Tensor, log: Tensor, kept: Tensor) -> Tensor:
        """See :meth:`add_zeros`; fills and returns k, (m, n), from mu / s."""
        assert self.term.theta_m is not None
        theta = self.term.theta_m[block.features]
        torch.mul(t, self.size, out=u).div_(theta.unsqueeze(1))
        torch.log1p(u, out=log)
        if self.value is not None:
            self.value -= torch.mv(log.t(), theta)
        torch.add(u, 1.0, out=kept).reciprocal_()
        if self.d_theta is not None and self.weights_n is not None:
            torch.mv(u.mul_(kept).sub_(log), self.weights_n, out=self.d_theta[block.features])
        return kept

    def add_nonzeros(self) -> None:
        """Add what the counts above zero add to the value and to the gradient of theta, of all blocks at once."""
        entries, x = self.term.entries, self.x
        row, region = entries.row, entries.feature
        log_p = -softplus(torch.cat(self.log2_e) / LOG2_E, threshold=40.0)
        log_mean = log_p + self.size.log().index_select(0, row) + self.rate.log().index_select(0, region)
        theta_m = self.term.theta_m
        if theta_m is None:
            terms = [x * log_mean - torch.lgamma(x + 1)]
            refine_large(x, log_mean * LOG2_E, None, terms)
        else:
            functions = (theta_m, theta_m.log(), *gamma_functions(theta_m))
            theta, log_theta, *of_theta = (part.index_select(0, region) for part in functions)
            terms = list(nonzero_terms(x, log_mean - log_theta, theta, log_theta, (of_theta[0], of_theta[1])))
            refine_large(x, log_mean * LOG2_E, theta, terms)
            if self.d_theta is not None and self.weights_n is not None:
                self.d_theta.index_add_(0, region, terms[2] * self.weights_n.index_select(0, row))
        if self.value is not None:
            self.value.index_add_(0, row, terms[0])


class CompiledFragmentsWalk(FragmentsWalk):
    """:class:`FragmentsWalk` in one loop per block, which writes all results, needed or not."""

    def __init__(self, term: FragmentsTerm, weights_n: Tensor | None, want_value: bool, loops: ModuleType) -> None:
        super().__init__(term, weights_n, want_value)
        self.loops = loops
        nothing = torch.zeros_like(self.size)
        weights = nothing if weights_n is None else weights_n.contiguous()
        cell_weight = nothing if self.cell_weight is None else self.cell_weight
        self.of_cells = [vector.detach().numpy() for vector in (self.size, cell_weight, weights)]
        wanted = (self.d_rate, self.p.d_bias)
        self.sums = [(torch.empty_like(self.rate) if each is None else each).numpy() for each in wanted]
        self.theta = None if term.theta_m is None else term.theta_m.detach().contiguous().numpy()
        self.by_theta: np.ndarray[Any, Any] | None = None
        if term.theta_m is not None:
            self.by_theta = (torch.empty_like(self.rate) if self.d_theta is None else self.d_theta).numpy()
        self.of_chunks = torch.empty(2, torch.get_num_threads(), self.n)

    def add_zeros(self, block: Block) -> None:
        """See :meth:`FragmentsWalk.add_zeros`."""
        features, entries = block.features, self.term.entries
        out = self.views(block)[0]
        # Logits here; the loop overwrites them with residuals.
        residual = self.p.logits_less_bias(block, out)
        log2_e = torch.empty(block.entries.stop - block.entries.start)
        self.loops.fragments(
            out.numpy(), halves(residual), self.p.bias[features].detach().numpy(), self.rate[features].detach().numpy(),
            None if self.theta is None else self.theta[features], *self.of_cells, np.float32(self.limit),
            entries.start[block.start : block.stop + 1].numpy(), entries.row[block.entries].numpy(),
            self.x_over_size[block.entries].numpy(), log2_e.numpy(), *(part.numpy() for part in self.of_chunks),
            *(vector[features] for vector in self.sums), None if self.by_theta is None else self.by_theta[features],
        )  # fmt: skip
        self.log2_e.append(log2_e)
        if self.value is not None:
            self.value += self.of_chunks[0].sum(0)
        if self.d_size is not None:
            self.d_size += self.of_chunks[1].sum(0)
        if self.weights_n is not None and self.p.needs_grad:
            self.p.contract(block, residual)
