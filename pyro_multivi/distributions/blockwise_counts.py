r"""Exact log-likelihoods of counts, block by block over genes.

With m = log(mean), u = m - log(theta), sp = log(1 + exp(u)) and sig its slope, every gene is first
treated as a zero count, which needs no gamma function:

    Poisson   log p(0) = -exp(m)           d/dm = -exp(m)
    NB        log p(0) = -theta sp         d/dm = -theta sig        d/dtheta = sig - sp
    ZINB      as NB, and what :mod:`blockwise_inflation` makes of it

What log p(x) - log p(0) adds is then computed at the few non-zero counts, and is the same for NB
and ZINB. A softmax is differentiated through last: dA = D - rho sum(D) with D = d/dm.
Logits and m are in units of log(2), since 2^x is had at half the price of exp(x).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions.blockwise import (
    Block,
    Entries,
    Gradients,
    Pending,
    backward,
    block_width,
    sum_of_logs_of_products,
)
from pyro_multivi.distributions.blockwise_inflation import inflate, inflate_in_logs
from pyro_multivi.distributions.blockwise_layer import LOG2_E, Layer
from pyro_multivi.distributions.buffers import POOL
from pyro_multivi.distributions.gamma_ratio import gamma_functions, log_rising_and_slope
from pyro_multivi.distributions.loops import loops_for
from pyro_multivi.distributions.readout import Readout

# Bound of log2(mean / theta), far from overflow and from where anything depends on it.
_LARGEST_LOG2 = 126.0
# The compiled loops take mean / theta for 2^-126 at least.
_LARGEST_LOOP_THETA = 1e20


def counts_log_prob(
    rho: Readout,
    library: Tensor,
    entries: Entries,
    theta: Tensor | None = None,
    gate_logits: Readout | None = None,
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
    log_prob: Tensor = _CountsLogProb.apply(
        rho.hidden, rho.weight, rho.bias, library, theta, *gate, entries,
        _Family(rho.link == "softmax", rho.gemm_dtype, gate_gemm_dtype), torch.is_grad_enabled(),
    )  # fmt: skip
    return log_prob


@dataclass(frozen=True)
class _Family:
    is_softmax: bool
    gemm_dtype: torch.dtype | None
    gate_gemm_dtype: torch.dtype | None


class _CountsLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, library: Tensor, theta: Tensor | None,
        gate_hidden: Tensor | None, gate_weight: Tensor | None, gate_bias: Tensor | None,
        entries: Entries, family: _Family, grad_enabled: bool,
    ) -> Tensor:  # fmt: skip
        inputs = (hidden, weight, bias, library, theta, gate_hidden, gate_weight, gate_bias)
        needs = ctx.needs_input_grad[: len(inputs)]
        sweep = _Sweep(*inputs, entries, family, needs)
        ctx.pending = Pending(sweep, hidden.device, grad_enabled and any(needs))
        ctx.save_for_backward(*inputs)
        return ctx.pending.value(len(hidden), hidden)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return *backward(ctx, upstream), None, None, None


def _nonzero_terms(
    x: Tensor, u: Tensor, theta: Tensor, log_theta: Tensor, gamma_of_theta: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a count x > 0 adds to a zero's log-probability, and to its slopes by m and theta; and softplus(u)."""
    rising, is_large, slope = log_rising_and_slope(x, theta, gamma_of_theta)
    sp = softplus(u, threshold=40.0)
    # x log(theta) is inside `rising` for small theta and left out of both parts for large theta.
    per_count = torch.where(is_large, log_theta + u - sp, -softplus(-u, threshold=40.0))
    value = rising.addcmul_(x, per_count).sub_(torch.lgamma(x + 1))
    sigmoid = torch.sigmoid(u)
    slope_theta = slope.addcmul_(x, sigmoid).div_(theta)
    return value, x * torch.sigmoid(-u), slope_theta, sp


@dataclass(frozen=True)
class _Sweep:
    """One walk over all blocks. Shapes: n cells, G genes, H hidden units, m genes of a block."""

    hidden_nh: Tensor
    weight_gh: Tensor
    bias_g: Tensor
    library_n: Tensor
    theta: Tensor | None
    gate_hidden: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    entries: Entries
    family: _Family
    needs: tuple[bool, ...]

    def __call__(self, weights_n: Tensor | None, want_value: bool) -> tuple[Tensor | None, Gradients]:
        """Value (if wanted) and gradients (if weights are given)."""
        return _Walk(self, weights_n, want_value).run()


class _Walk:
    """The state of one sweep."""

    def __init__(self, sweep: _Sweep, weights_n: Tensor | None, want_value: bool) -> None:
        hidden, theta, family = sweep.hidden_nh, sweep.theta, sweep.family
        self.sweep, self.weights_n = sweep, weights_n
        self.n, n_genes = len(hidden), len(sweep.weight_gh)
        width = block_width(self.n, n_genes, hidden.device)
        self.layer = Layer(
            hidden, sweep.weight_gh, sweep.bias_g, family.gemm_dtype, weights_n, sweep.needs[:3], width,
            scale=LOG2_E if family.is_softmax else 1.0,
        )  # fmt: skip
        self.gate: Layer | None = None
        if sweep.gate_hidden is not None and sweep.gate_weight is not None and sweep.gate_bias is not None:
            self.gate = Layer(
                sweep.gate_hidden, sweep.gate_weight, sweep.gate_bias,
                family.gate_gemm_dtype, weights_n, sweep.needs[5:8], width, scale=LOG2_E,
            )  # fmt: skip
        self.gates_at_entries: list[Tensor] = []
        self.library = sweep.library_n.clamp_min(1e-30)  # a library that underflowed to 0 has a logarithm
        self.value = hidden.new_zeros(self.n) if want_value else None
        self.is_theta_shared = theta is not None and theta.dim() == 1  # by the cells
        self.d_theta: Tensor | None = None
        if weights_n is not None and theta is not None and sweep.needs[4]:
            self.d_theta = POOL.take(theta.shape, theta.dtype, theta.device)
        # Asking whether a probability underflowed would make an accelerator wait, to which logarithms are cheap.
        self.is_quick = hidden.device.type == "cpu"

        self.blocks = list(sweep.entries.blocks(width))
        self.scratch = [POOL.take((width * self.n,), hidden.dtype, hidden.device) for _ in range(4)]
        # log2(mean) and d/dm of all genes, feature by feature as the blocks are.
        self.log2_mean, self.slope = (POOL.take((n_genes * self.n,), hidden.dtype, hidden.device) for _ in range(2))
        self.total_slope = hidden.new_zeros(self.n)
        self.loops: ModuleType | None = None
        if theta is not None and theta.dim() == 1:
            self.loops = loops_for(hidden)
        if self.loops is not None and theta is not None:
            self.prepare_loops(theta)

    def prepare_loops(self, theta: Tensor) -> None:
        """What the loops read and write; what is not wanted is written all the same."""
        x_e = self.sweep.entries.values().to(theta.dtype)
        if not bool((x_e == x_e.floor()).all()) or not bool((theta < _LARGEST_LOOP_THETA).all()):
            self.loops = None
            return
        self.x_e, self.theta_g = x_e.numpy(), theta.detach().contiguous().numpy()
        self.weight_n = (torch.zeros(self.n) if self.weights_n is None else self.weights_n.contiguous()).numpy()
        self.by_theta = torch.empty_like(theta) if self.d_theta is None else self.d_theta
        self.value_cn = torch.zeros(torch.get_num_threads(), self.n)
        self.gate_e = torch.empty(len(x_e))

    def piece(self, buffer: Tensor, block: Block) -> Tensor:
        """The block's (m, n) part of a buffer of all genes."""
        return buffer[self.n * block.start : self.n * block.stop].view(block.stop - block.start, self.n)

    def scratch_of(self, block: Block) -> list[Tensor]:
        m = block.stop - block.start
        return [buffer[: m * self.n].view(m, self.n) for buffer in self.scratch]

    def run(self) -> tuple[Tensor | None, Gradients]:
        self.find_log2_mean()
        for block in self.blocks:
            if self.sweep.theta is None:
                self.poisson_zeros(block)
            elif self.loops is None or not self.compiled_zeros(block):
                theta = self.sweep.theta[..., block.features]
                # One per gene, or one per gene and cell.
                self.negative_binomial_zeros(block, theta.unsqueeze(1) if self.is_theta_shared else theta.t())
            if self.weights_n is not None:
                self.total_slope += self.piece(self.slope, block).sum(0)
        if self.loops is None:
            self.add_nonzeros()
        else:
            self.compiled_nonzeros()
        if self.weights_n is None:
            return self.value, ()
        d_library = self.through_link()
        gate = (None, None, None) if self.gate is None else self.gate.gradients()
        return self.value, (*self.layer.gradients(), d_library, self.d_theta, *gate)

    def find_log2_mean(self) -> None:
        """Fill log2_mean with log2(library) + log2(rho)."""
        log2_library = self.library.log2()
        if not self.sweep.family.is_softmax:
            # Below this logit softplus underflows, and its logarithm is the logit itself.
            underflow = -80.0 if self.log2_mean.dtype == torch.float32 else -700.0
            zero = self.library.new_zeros(())
            for block in self.blocks:
                logits, other = self.scratch_of(block)[0], self.piece(self.log2_mean, block)
                self.layer.logits(block, out=logits)
                torch.logaddexp(logits, zero, out=other).log_()
                torch.maximum(other, logits.clamp_(max=underflow), out=other)
                other.mul_(LOG2_E).add_(log2_library)
            return
        normalizer = torch.full_like(log2_library, -torch.inf)
        for block in self.blocks:
            logits, scratch = self.piece(self.log2_mean, block), self.scratch_of(block)[0]
            self.layer.logits(block, out=logits)
            largest = logits.amax(0)
            part = torch.sub(logits, largest, out=scratch).exp2_().sum(0).log2_().add_(largest)
            normalizer = torch.logaddexp2(normalizer, part)
        shift = log2_library - normalizer
        for block in self.blocks:
            self.piece(self.log2_mean, block).add_(shift)

    def poisson_zeros(self, block: Block) -> None:
        slope = torch.exp2(self.piece(self.log2_mean, block), out=self.piece(self.slope, block)).neg_()
        if self.value is not None:
            self.value += slope.sum(0)

    def negative_binomial_zeros(self, block: Block, theta: Tensor) -> None:
        """Value and slopes as if all counts were zero; ``theta`` is (m, 1) or (m, n)."""
        sp, *scratch = self.scratch_of(block)
        # exp(u); past this bound theta is so small that theta sp is nil.
        ratio = torch.sub(self.piece(self.log2_mean, block), theta.log2(), out=self.piece(self.slope, block))
        ratio.clamp_(max=_LARGEST_LOG2).exp2_()
        torch.log1p(ratio, out=sp)
        sig = ratio.div_(torch.add(ratio, 1.0, out=scratch[0]))
        kept = None if self.gate is None else self.inflate(block, theta, sp, scratch)
        if self.value is not None and self.gate is None:
            self.value -= torch.mv(sp.t(), theta[:, 0]) if self.is_theta_shared else (sp * theta).sum(0)
        if self.weights_n is None:
            return
        if self.d_theta is not None:
            by_theta = torch.sub(sig, sp, out=sp)
            if kept is not None:
                by_theta.mul_(kept)
            if self.is_theta_shared:
                torch.mv(by_theta, self.weights_n, out=self.d_theta[block.features])
            else:
                self.d_theta[:, block.features] = by_theta.mul_(self.weights_n).t()
        slope = sig.mul_(-theta)
        if kept is not None:
            slope.mul_(kept)

    def inflate(self, block: Block, theta: Tensor, sp: Tensor, scratch: list[Tensor]) -> Tensor:
        """Make the NB of zeros a ZINB; return the posterior probability that a zero is no dropout."""
        assert self.gate is not None
        log2_nb, gate, spare = scratch

        def prepare() -> None:
            torch.mul(sp, theta * -LOG2_E, out=log2_nb)
            assert self.gate is not None
            self.gate.logits(block, out=gate)

        prepare()
        if self.value is not None:
            self.gates_at_entries.append(gate.view(-1).index_select(0, block.flat))
        inflated = inflate(block, gate, log2_nb, spare) if self.is_quick else None
        if inflated is None:
            if self.is_quick:
                prepare()
            inflated = inflate_in_logs(block, gate, log2_nb, spare)
        value, kept, by_gate = inflated
        if self.value is not None:
            self.value += value
        if self.weights_n is not None and self.gate.needs_grad:
            self.gate.add(block, by_gate)
        return kept

    def compiled_zeros(self, block: Block) -> bool:
        """:meth:`negative_binomial_zeros` in one loop; False if some probability is too small, and nothing is done."""
        assert self.loops is not None
        entries = self.sweep.entries
        gate, spare, *_ = self.scratch_of(block)
        products = spare[: self.loops.n_folds(len(spare))]
        if self.gate is not None:
            self.gate.logits(block, out=gate)
        self.loops.zeros(
            self.piece(self.log2_mean, block).numpy(), self.theta_g[block.features],
            None if self.gate is None else gate.numpy(), self.weight_n,
            entries.start[block.start : block.stop + 1].numpy(), entries.row[block.entries].numpy(),
            self.piece(self.slope, block).numpy(), products.numpy(), self.value_cn.numpy(),
            self.by_theta[block.features].numpy(), self.gate_e[block.entries].numpy(),
        )  # fmt: skip
        if self.gate is None:
            return True
        value = sum_of_logs_of_products(products)
        if value is None:
            return False
        if self.value is not None:
            self.value += value
        if self.weights_n is not None and self.gate.needs_grad:
            self.gate.add(block, gate)
        return True

    def compiled_nonzeros(self) -> None:
        """:meth:`add_nonzeros` in one loop."""
        assert self.loops is not None
        entries, slope_cn = self.sweep.entries, torch.zeros_like(self.value_cn)
        log2_mean_gn, slope_gn = (buffer.view(len(self.theta_g), self.n) for buffer in (self.log2_mean, self.slope))
        self.loops.nonzeros(
            self.x_e, entries.start.numpy(), entries.row.numpy(), log2_mean_gn.numpy(),
            self.theta_g, None if self.gate is None else self.gate_e.numpy(), self.weight_n,
            slope_gn.numpy(), self.value_cn.numpy(), slope_cn.numpy(), self.by_theta.numpy(),
        )  # fmt: skip
        if self.value is not None:
            self.value += self.value_cn.sum(0)
        self.total_slope += slope_cn.sum(0)

    def add_nonzeros(self) -> None:
        """Correct value and slopes at the non-zero counts, all blocks in one go."""
        entries = self.sweep.entries
        row, gene, place = entries.row, entries.feature, entries.place
        x = entries.values().to(self.log2_mean.dtype)
        log_mean = self.log2_mean.index_select(0, place).div_(LOG2_E)
        if self.sweep.theta is None:
            value, slope = x * log_mean - torch.lgamma(x + 1), x
        else:
            theta, log_theta, *of_theta = self.theta_at_entries()
            u = log_mean - log_theta
            value, slope, by_theta, sp = _nonzero_terms(x, u, theta, log_theta, (of_theta[0], of_theta[1]))
            if self.gates_at_entries:
                # The sum over zeros of a ZINB has left these out.
                gates = torch.cat(self.gates_at_entries).div_(LOG2_E)
                value.sub_(softplus(gates, threshold=40.0)).addcmul_(theta, sp, value=-1.0)
            if self.d_theta is not None and self.weights_n is not None:
                by_theta *= self.weights_n.index_select(0, row)
                if self.is_theta_shared:
                    self.d_theta.index_add_(0, gene, by_theta)
                else:
                    self.d_theta.index_put_((row, gene), by_theta, accumulate=True)
        if self.value is not None:
            self.value.index_add_(0, row, value)
        if self.weights_n is not None:
            self.slope.index_add_(0, place, slope)
            self.total_slope.index_add_(0, row, slope)

    def theta_at_entries(self) -> list[Tensor]:
        """Theta, its logarithm and :func:`gamma_functions` at the non-zero counts."""
        theta, entries = self.sweep.theta, self.sweep.entries
        assert theta is not None
        if not self.is_theta_shared:
            theta = theta[entries.row, entries.feature]
            return [theta, theta.log(), *gamma_functions(theta)]
        return [part.index_select(0, entries.feature) for part in (theta, theta.log(), *gamma_functions(theta))]

    def through_link(self) -> Tensor | None:
        """Turn d/dm into d/dlogits and hand it to the layer; return d/dlibrary."""
        assert self.weights_n is not None
        by_library = self.total_slope / self.library
        if self.layer.needs_grad:
            for block in self.blocks:
                slope = self.piece(self.slope, block)
                mean = self.piece(self.log2_mean, block).exp2_()
                if self.sweep.family.is_softmax:
                    slope.addcmul_(mean, by_library, value=-1.0)
                else:
                    # dlog softplus(a) / da = (1 - exp(-s)) / s for s = softplus(a)
                    s = mean.div_(self.library).clamp_min_(torch.finfo(mean.dtype).tiny)
                    slope.mul_(torch.expm1(s.neg(), out=self.scratch_of(block)[0])).div_(s).neg_()
                self.layer.add(block, slope)
        return by_library * self.weights_n if self.sweep.needs[3] else None
