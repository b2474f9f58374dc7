r"""Exact log-likelihood of binary accessibility, block by block over regions.

With a the logit, d the cell factor and r the region factor, q = d r / (1 + e), e = exp(-a):

    1 - q = (e + (1 - d) + d (1 - r)) / (1 + e) = num / den,

a quotient of sums of positive terms, so nothing cancels however close q comes to 0 or 1.
The walk treats every region as closed, and then corrects the few that are open:

    closed   log p = log(num / den)               dlog p / dlog d = dlog p / dlog r = T = -d r / num
    open     log p = log d + log r - log(1 + e)   T = 1
    both     dlog p / da = T e / den
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions.blockwise import Entries, Gradients, Pending, Products, backward, block_width
from pyro_multivi.distributions.buffers import POOL
from pyro_multivi.distributions.readout import Readout

# exp2 runs at more than twice the speed of exp here; the factor goes into the matrix product for nothing.
_LOG2_E = math.log2(math.e)


def accessibility_log_prob(p: Readout, cell_factor: Tensor, region_factor: Tensor | None, entries: Entries) -> Tensor:
    """Log-probability of each cell, shape (n,).

    Parameters
    ----------
    p
        Readout with link "sigmoid", shape (n, M).
    cell_factor, region_factor
        Factors in (0, 1], shapes (n,) and (M,); no region factor means 1.
    entries
        Open regions of n cells: every stored entry is one.
    """
    log_prob: Tensor = _AccessibilityLogProb.apply(
        p.hidden, p.weight, p.bias, cell_factor, region_factor,
        entries, p.gemm_dtype, torch.is_grad_enabled(),
    )  # fmt: skip
    return log_prob


class _AccessibilityLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, cell_factor: Tensor,
        region_factor: Tensor | None, entries: Entries, gemm_dtype: torch.dtype | None, grad_enabled: bool,
    ) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad[:5]
        sweep = _Sweep(hidden, weight, bias, cell_factor, region_factor, entries, gemm_dtype, needs)
        ctx.pending = Pending(sweep, hidden.device, grad_enabled and any(needs))
        ctx.save_for_backward(hidden, weight, bias, cell_factor, region_factor)
        return ctx.pending.value(len(hidden), hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return *backward(ctx, upstream), None, None, None


@dataclass(frozen=True)
class _Sweep:
    """One walk over all blocks. Shapes: n cells, M regions, H hidden units, m regions of a block."""

    hidden_nh: Tensor
    weight_mh: Tensor
    bias_m: Tensor
    cell_factor_n: Tensor
    region_factor_m: Tensor | None
    entries: Entries
    gemm_dtype: torch.dtype | None
    needs: tuple[bool, ...]

    def __call__(self, weights_n: Tensor | None, want_value: bool) -> tuple[Tensor | None, Gradients]:
        """Value (if wanted) and gradients (if weights are given)."""
        hidden, weight, bias = self.hidden_nh, self.weight_mh, self.bias_m
        region_factor = self.region_factor_m
        n, n_regions = len(hidden), len(weight)
        forms = weights_n is not None
        needs_hidden, needs_weight, needs_bias, needs_cell, needs_region = (forms and x for x in self.needs)
        # A factor that underflowed to 0 must not turn log d or 1 / d into infinities.
        floor = 1e-30
        d = self.cell_factor_n.clamp_min(floor)
        log_d, minus_inverse_d = d.log(), -d.reciprocal()
        d_column, rest_column = d.unsqueeze(1), (1 - d).unsqueeze(1)
        # Beyond this logit the probability of the unlikely outcome is nil; sums stay in range.
        limit = _LOG2_E * (70.0 if hidden.dtype == torch.float32 else 600.0)

        products = Products(hidden, weight, self.gemm_dtype)
        value = hidden.new_zeros(n) if want_value else None
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = POOL.take(weight.shape, weight.dtype, weight.device) if needs_weight else None
        d_bias = torch.empty_like(bias) if needs_bias else None
        d_cell = torch.zeros_like(d) if needs_cell else None
        d_region = torch.empty_like(region_factor) if needs_region and region_factor is not None else None
        if weights_n is not None:
            cell_weight = -d * weights_n  # d and the sign are left out of the blocks
            weighted_hidden = products.operand(hidden * cell_weight.unsqueeze(1))

        width = block_width(n, n_regions, hidden.device)
        buffers = [POOL.take((n * width,), hidden.dtype, hidden.device) for _ in range(3)]
        for block in self.entries.blocks(width):
            features, flat, m = block.features, block.flat, block.stop - block.start
            e, num, den = (buffer[: n * m].view(n, m) for buffer in buffers)
            w = products.block(features)
            products.logits(w, bias[features], out=e, scale=-_LOG2_E)
            minus_log2_open = e.view(-1).index_select(0, flat)
            e.clamp_(-limit, limit).exp2_()
            if region_factor is None:
                torch.add(e, rest_column, out=num)
            else:
                r = region_factor[features].clamp_min(floor)
                torch.addcmul(e, d_column, 1 - r, out=num).add_(rest_column)
            torch.add(e, 1.0, out=den)
            if forms:
                e.div_(den)  # e / (1 + e) from here on
            if value is not None:
                closed = torch.div(num, den, out=den).log_()
                log_open = log_d.index_select(0, block.row)
                log_open -= softplus(minus_log2_open / _LOG2_E, threshold=40.0)
                if region_factor is not None:
                    region = self.entries.col.index_select(0, block.entry) - block.start
                    log_open += r.log().index_select(0, region)
                value += closed.view(-1).scatter_(0, flat, log_open).view(n, m).sum(1)
            if not forms:
                continue
            # T / (-d), up to the cell's factor which the products carry.
            t = num.reciprocal_() if region_factor is None else torch.div(r, num, out=num)
            t.view(-1).scatter_(0, flat, minus_inverse_d.index_select(0, block.row))
            if d_cell is not None:
                d_cell -= t.sum(1)
            if d_region is not None:
                torch.mv(t.t(), cell_weight, out=d_region[features]).div_(r)
            residual = e.mul_(t)
            if d_bias is not None:
                torch.mv(residual.t(), cell_weight, out=d_bias[features])
            residual = products.operand(residual)
            if d_weight is not None:
                products.to_weight(residual, weighted_hidden, out=d_weight[features])
            if d_hidden is not None:
                products.add_to_hidden(d_hidden, residual, w)
        if weights_n is not None:
            if d_hidden is not None:
                d_hidden.mul_(cell_weight.unsqueeze(1))
            if d_cell is not None:
                d_cell.mul_(weights_n)
        return value, (d_hidden, d_weight, d_bias, d_cell, d_region)
