r"""Exact log-likelihood of binary accessibility, block by block over regions.

With a the logit, d the cell factor and r the region factor, let E = exp(-a) / r. Then

    q = d r / (1 + exp(-a)) = d / den,    1 - q = num / den,
    den = E + 1/r,                        num = E + (1 - r)/r + (1 - d),

sums of positive terms, so nothing cancels however close q comes to 0 or 1. With T the derivative
of log p by log d, which is also that by log r:

    closed   log p = log(num / den)     T = -d / num
    open     log p = log(d / den)       T = 1
    both     dlog p / da = T E / den

so that an open region is a closed one whose num is -d, but for the sign of num / den: one walk
over all regions evaluates both, once -d is written where regions are open.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions.kernels.blocks import Block, Entries, block_width, sum_of_logs, sum_of_logs_of_products
from pyro_multivi.distributions.kernels.buffers import POOL
from pyro_multivi.distributions.kernels.gradients import Gradients, log_prob
from pyro_multivi.distributions.kernels.numba.switch import can_read, halves, loops_for
from pyro_multivi.distributions.kernels.products import LOG2_E, BlockwiseReadout
from pyro_multivi.distributions.kernels.readout import Readout


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
    make_term = partial(_AccessibilityTerm, entries, p.gemm_dtype)
    return log_prob(_evaluate, make_term, p.hidden, p.weight, p.bias, cell_factor, region_factor)


@dataclass(frozen=True)
class _AccessibilityTerm:
    """Arguments of a likelihood of accessibility. Shapes: n cells, M regions, H hidden units.

    ``needs`` says of each tensor, in their order, whether its gradient is wanted.
    """

    entries: Entries
    gemm_dtype: torch.dtype | None
    hidden_nh: Tensor
    weight_mh: Tensor
    bias_m: Tensor
    cell_factor_n: Tensor
    region_factor_m: Tensor | None
    needs: tuple[bool, ...]


def _evaluate(term: _AccessibilityTerm, weights_n: Tensor | None, want_value: bool) -> tuple[Tensor | None, Gradients]:
    """Value (if wanted) and gradients (if weights are given), in one walk over all blocks."""
    loops = loops_for(term.hidden_nh) if can_read(term.gemm_dtype) else None
    if loops is None:
        return _AccessibilityWalk(term, weights_n, want_value).run()
    return _CompiledAccessibilityWalk(term, weights_n, want_value, loops).run()


class _AccessibilityWalk:
    """One evaluation of a likelihood of accessibility over all blocks, operation by operation of PyTorch."""

    def __init__(self, term: _AccessibilityTerm, weights_n: Tensor | None, want_value: bool) -> None:
        hidden, region_factor = term.hidden_nh, term.region_factor_m
        self.term, self.weights_n, self.n = term, weights_n, len(hidden)
        # A factor that underflowed to 0 must not turn log d or 1 / r into infinities.
        floor = 1e-30
        self.d = term.cell_factor_n.clamp_min(floor)
        self.minus_d, self.rest_row = -self.d, (1 - self.d).unsqueeze(0)
        # d and the sign are left out of the blocks.
        self.cell_weight = None if weights_n is None else self.minus_d * weights_n
        width = block_width(self.n, len(term.weight_mh), hidden.device)
        self.p = BlockwiseReadout(
            hidden, term.weight_mh, term.bias_m, term.gemm_dtype, self.cell_weight, term.needs[:3], width,
            scale=-LOG2_E,
        )  # fmt: skip
        if region_factor is not None:
            self.r = region_factor.clamp_min(floor)
            self.log2_r, self.inverse_r = self.r.log2(), self.r.reciprocal()
            self.rest_r = (1 - self.r) * self.inverse_r
            self.p.bias -= self.log2_r
        # Beyond this the probability of the unlikely outcome vanishes; sums stay in range.
        self.limit = 100.0 if hidden.dtype == torch.float32 else 860.0
        # To see whether a product underflowed, the host would wait for an accelerator; there logarithms are cheap.
        self.by_products = hidden.device.type == "cpu"
        self.blocks = term.entries.blocks(width)
        self.buffers = [POOL.take((width * self.n,), hidden.dtype, hidden.device) for _ in range(3)]
        self.value = hidden.new_zeros(self.n) if want_value else None
        needs_cell, needs_region = (weights_n is not None and need for need in term.needs[3:])
        self.d_cell = torch.zeros_like(self.d) if needs_cell else None
        self.d_region: Tensor | None = None
        if needs_region and region_factor is not None:
            self.d_region = torch.empty_like(region_factor)

    def run(self) -> tuple[Tensor | None, Gradients]:
        for block in self.blocks:
            logs = self.step(block)
            if self.value is not None:
                self.value += self.logs_exactly(block) if logs is None else logs
        if self.d_cell is not None and self.weights_n is not None:
            self.d_cell.mul_(self.weights_n)
        return self.value, (*self.p.gradients(), self.d_cell, self.d_region)

    def step(self, block: Block) -> Tensor | None:
        """Add a block's gradients; return its value, None if it is not wanted or has to be found exactly."""
        e, num, den = self.views(block)
        log_open = self.fill(block, exactly=not self.by_products)
        if self.weights_n is not None:
            e.div_(den)  # 1 - p from here on
        logs: Tensor | None = None
        if self.value is not None:
            ratio = torch.div(num, den, out=den)
            logs = sum_of_logs(ratio) if log_open is None else _replaced(ratio.log_(), block, log_open).sum(0)
        if self.weights_n is not None:
            self.add_gradients(block, one_minus_p=e, t=num.reciprocal_())
        return logs

    def views(self, block: Block) -> tuple[Tensor, Tensor, Tensor]:
        m = block.stop - block.start
        e, num, den = (buffer[: m * self.n].view(m, self.n) for buffer in self.buffers)
        return e, num, den

    def fill(self, block: Block, exactly: bool) -> Tensor | None:
        """Fill the buffers with E, num and den; return log p at the open regions if ``exactly``, in any range."""
        e, num, den = self.views(block)
        features, row = block.features, self.term.entries.row[block.entries]
        has_region = self.term.region_factor_m is not None
        self.p.logits(block, out=e)
        log_open: Tensor | None = None
        if exactly:
            log2_e = e.view(-1).index_select(0, block.flat)
            log_open = self.d.log().index_select(0, row)
            if has_region:
                log2_r = self.log2_r.index_select(0, self.term.entries.feature[block.entries])
                log2_e += log2_r
                log_open += log2_r / LOG2_E
            log_open -= softplus(log2_e / LOG2_E, threshold=40.0)
        e.clamp_(-self.limit, self.limit).exp2_()
        if has_region:
            torch.add(e, self.inverse_r[features].unsqueeze(1), out=den)
            torch.add(e, self.rest_r[features].unsqueeze(1), out=num).add_(self.rest_row)
        else:
            torch.add(e, 1.0, out=den)
            torch.add(e, self.rest_row, out=num)
        num.view(-1).scatter_(0, block.flat, self.minus_d.index_select(0, row))
        return log_open

    def logs_exactly(self, block: Block) -> Tensor:
        """Value of a block whose products underflow, logarithm by logarithm."""
        _, num, den = self.views(block)
        log_open = self.fill(block, exactly=True)
        assert log_open is not None
        return _replaced(num.div_(den).log_(), block, log_open).sum(0)

    def add_gradients(self, block: Block, one_minus_p: Tensor, t: Tensor) -> None:
        """Add the gradients of T / (-d), up to the cell's factor in the products; both arguments are overwritten."""
        if self.d_cell is not None:
            self.d_cell -= t.sum(0)
        if self.d_region is not None and self.cell_weight is not None:
            place = self.d_region[block.features]
            torch.mv(t, self.cell_weight, out=place).mul_(self.inverse_r[block.features])
        self.p.add(block, one_minus_p.mul_(t))


class _CompiledAccessibilityWalk(_AccessibilityWalk):
    """:class:`_AccessibilityWalk` in one loop per block, which writes all results, needed or not."""

    def __init__(self, term: _AccessibilityTerm, weights_n: Tensor | None, want_value: bool, loops: ModuleType) -> None:
        super().__init__(term, weights_n, want_value)
        inverse_r, rest_r = torch.ones_like(self.p.bias), torch.zeros_like(self.p.bias)
        if term.region_factor_m is not None:
            inverse_r, rest_r = self.inverse_r, self.rest_r
        weight = torch.zeros_like(self.d) if self.cell_weight is None else self.cell_weight
        wanted = (self.d_region, self.p.d_bias)
        self.loops = loops
        self.of_regions = [vector.detach().numpy() for vector in (self.p.bias, inverse_r, rest_r)]
        self.of_cells = [vector.detach().numpy() for vector in (self.rest_row[0], self.minus_d, weight)]
        self.sums = [(torch.empty_like(self.p.bias) if each is None else each).numpy() for each in wanted]
        self.d_cell_cn = torch.empty(torch.get_num_threads(), self.n)

    def step(self, block: Block) -> Tensor | None:
        """See :meth:`_AccessibilityWalk.step`."""
        features, entries = block.features, self.term.entries
        out, spare, _ = self.views(block)
        products = spare[: self.loops.n_folds(len(spare))]
        # Logits here; the loop overwrites them with residuals.
        residual = self.p.logits_less_bias(block, out)
        self.loops.regions(
            out.numpy(), halves(residual), *(vector[features] for vector in self.of_regions), *self.of_cells,
            np.float32(self.limit), entries.start[block.start : block.stop + 1].numpy(),
            entries.row[block.entries].numpy(), products.numpy(), self.d_cell_cn.numpy(),
            *(vector[features] for vector in self.sums),
        )  # fmt: skip
        if self.d_cell is not None:
            self.d_cell += self.d_cell_cn.sum(0)
        if self.weights_n is not None:
            self.p.contract(block, residual)
        return None if self.value is None else sum_of_logs_of_products(products)


def _replaced(logs_mn: Tensor, block: Block, log_open: Tensor) -> Tensor:
    """``logs`` with those of the open regions in their places."""
    logs_mn.view(-1).scatter_(0, block.flat, log_open)
    return logs_mn
