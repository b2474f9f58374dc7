"""Walk over the blocks of genes that evaluates a likelihood of counts in compiled loops."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_multivi.distributions.kernels.blocks import Block, sum_of_logs_of_products
from pyro_multivi.distributions.kernels.counts_walk import CountsTerm, CountsWalk
from pyro_multivi.distributions.kernels.numba.switch import can_read, halves, loops_for
from pyro_multivi.distributions.kernels.products import BlockwiseReadout

# In the loops mean / theta is at least 2^-126.
_LARGEST_THETA = 1e20


def loops_for_counts(term: CountsTerm) -> ModuleType | None:
    """Module of the compiled loops if they are switched on and can take ``term``: theta per gene, whole counts."""
    theta, family = term.theta, term.family
    loops = loops_for(term.hidden_nh)
    if loops is None or theta is None or theta.dim() != 1:
        return None
    x_e = term.entries.values()
    is_whole, is_in_range = bool((x_e == x_e.floor()).all()), bool((theta < _LARGEST_THETA).all())
    can = is_whole and is_in_range and can_read(family.gemm_dtype) and can_read(family.gate_gemm_dtype)
    return loops if can else None


class CompiledCountsWalk(CountsWalk):
    """:class:`CountsWalk` in compiled loops, which write all results, needed or not."""

    def __init__(self, term: CountsTerm, weights_n: Tensor | None, want_value: bool, loops: ModuleType) -> None:
        super().__init__(term, weights_n, want_value)
        assert term.theta is not None
        self.loops, self.n_chunks = loops, torch.get_num_threads()
        self.x_e = term.entries.values().to(term.theta.dtype).numpy()
        self.theta_g = term.theta.detach().contiguous().numpy()
        self.weight_n = (torch.zeros(self.n) if weights_n is None else weights_n.contiguous()).numpy()
        self.by_theta = torch.empty_like(term.theta) if self.d_theta is None else self.d_theta
        self.value_cn = torch.zeros(self.n_chunks, self.n)
        self.gate_e = torch.empty(len(self.x_e))

    def by_bias(self, readout: BlockwiseReadout, block: Block) -> np.ndarray[Any, Any]:
        """Memory for the derivatives by the block's biases."""
        place = torch.empty(len(readout.bias)) if readout.d_bias is None else readout.d_bias
        return place[block.features].numpy()

    def fill_logits(self) -> Tensor:
        """:meth:`CountsWalk.fill_logits`, from each thread's normalizer over its features."""
        peaks, sums = torch.empty(2, len(self.blocks) * self.n_chunks, self.n)
        for number, block in enumerate(self.blocks):
            logits = self.piece(self.log2_mean, block)
            product = self.rho.logits_less_bias(block, logits)
            chunks = slice(number * self.n_chunks, (number + 1) * self.n_chunks)
            self.loops.softmax(
                logits.numpy(), halves(product), self.rho.bias[block.features].detach().numpy(),
                peaks[chunks].numpy(), sums[chunks].numpy(),
            )  # fmt: skip
        largest = peaks.amax(0)
        return sums.mul_(peaks.sub_(largest).exp2_()).sum(0).log2_().add_(largest)

    def add_zeros(self, block: Block) -> None:
        """:meth:`CountsWalk.add_zeros`, which replaces the loop where a probability is too small."""
        gate, spare, *_ = self.scratch_of(block)
        products, entries = spare[: self.loops.n_folds(len(spare))], self.term.entries
        by_gate: Tensor | None = None
        of_gate: tuple[object, ...] = (None, None, None, None)
        if self.gate is not None:
            # Logits here; the loop overwrites them with derivatives.
            by_gate = self.gate.logits_less_bias(block, gate)
            bias = self.gate.bias[block.features].detach().numpy()
            of_gate = gate.numpy(), halves(by_gate), bias, self.by_bias(self.gate, block)
        self.loops.zeros(
            self.piece(self.log2_mean, block).numpy(), self.theta_g[block.features], *of_gate, self.weight_n,
            entries.start[block.start : block.stop + 1].numpy(), entries.row[block.entries].numpy(),
            self.piece(self.slope, block).numpy(), products.numpy(), self.value_cn.numpy(),
            self.by_theta[block.features].numpy(), self.gate_e[block.entries].numpy(),
        )  # fmt: skip
        if self.gate is None or by_gate is None:
            return
        value = sum_of_logs_of_products(products)
        if value is None:
            super().add_zeros(block)
            return
        if self.value is not None:
            self.value += value
        if self.weights_n is not None and self.gate.needs_grad:
            self.gate.contract(block, by_gate)

    def add_nonzeros(self) -> None:
        """:meth:`CountsWalk.add_nonzeros`."""
        entries, slope_cn = self.term.entries, torch.zeros_like(self.value_cn)
        log2_mean_gn, slope_gn = (buffer.view(len(self.theta_g), self.n) for buffer in (self.log2_mean, self.slope))
        self.loops.nonzeros(
            self.x_e, entries.start.numpy(), entries.row.numpy(), log2_mean_gn.numpy(),
            self.theta_g, None if self.gate is None else self.gate_e.numpy(), self.weight_n,
            slope_gn.numpy(), self.value_cn.numpy(), slope_cn.numpy(), self.by_theta.numpy(),
        )  # fmt: skip
        if self.value is not None:
            self.value += self.value_cn.sum(0)
        self.total_slope += slope_cn.sum(0)

    def add_slopes(self, block: Block, by_library: Tensor) -> None:
        """:meth:`CountsWalk.add_slopes`, for a softmax."""
        if not self.term.family.is_softmax:
            super().add_slopes(block, by_library)
            return
        slope = self.piece(self.slope, block)
        residual = self.rho.products.place(slope)
        self.loops.softmax_slopes(
            self.piece(self.log2_mean, block).numpy(), slope.numpy(), halves(residual), by_library.numpy(),
            self.weight_n, self.by_bias(self.rho, block), self.n_chunks,
        )  # fmt: skip
        self.rho.contract(block, residual)
