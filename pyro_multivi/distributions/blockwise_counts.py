r"""Exact log-likelihoods of counts, block by block over genes.

With m = log(mean), u = m - log(theta) and sp(u) = log(1 + exp(u)), every gene is first treated
as a zero count, which needs no gamma function:

    Poisson   log p(0) = -exp(m)           d/dm = -exp(m)
    NB        log p(0) = -theta sp(u)      d/dm = -theta sig(u)     d/dtheta = sig(u) - sp(u)
    ZINB      log p(0) = log(sig(h) + sig(-h) NB(0)) for gate logit h; its slopes are those of the NB
              times 1 - w, and d/dh = w - sig(h), where w = sig(h - log NB(0)) is the posterior
              probability of a dropout

What log p(x) - log p(0) adds is then computed at the few non-zero counts, and is the same for NB
and ZINB. A softmax is differentiated through last: dA = D - rho sum(D) with D = d/dm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions.blockwise import (
    Block,
    Entries,
    Gradients,
    Pending,
    Products,
    backward,
    block_width,
)
from pyro_multivi.distributions.buffers import POOL
from pyro_multivi.distributions.gamma_ratio import log_rising, log_rising_slope
from pyro_multivi.distributions.readout import Readout


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


class _Layer:
    """A readout's factors, and their gradients as blocks of residuals come in."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, gemm_dtype: torch.dtype | None,
        weights_n: Tensor | None, needs: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.products = Products(hidden, weight, gemm_dtype)
        self.bias, self.weights_n = bias, weights_n
        needs_hidden, needs_weight, needs_bias = (weights_n is not None and need for need in needs)
        self.d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.d_weight = POOL.take(weight.shape, weight.dtype, weight.device) if needs_weight else None
        self.d_bias = torch.empty_like(bias) if needs_bias else None
        self.needs_grad = needs_hidden or needs_weight or needs_bias
        if weights_n is not None:
            self.weighted_hidden = self.products.operand(hidden * weights_n.unsqueeze(1))

    def logits(self, features: slice, out: Tensor) -> None:
        self.products.logits(self.products.block(features), self.bias[features], out)

    def add(self, features: slice, residual_nm: Tensor) -> None:
        """Take in the derivative of each cell's log-probability by a block of logits."""
        assert self.weights_n is not None
        if self.d_bias is not None:
            torch.mv(residual_nm.t(), self.weights_n, out=self.d_bias[features])
        residual = self.products.operand(residual_nm)
        if self.d_weight is not None:
            self.products.to_weight(residual, self.weighted_hidden, out=self.d_weight[features])
        if self.d_hidden is not None:
            self.products.add_to_hidden(self.d_hidden, residual, self.products.block(features))

    def gradients(self) -> Gradients:
        if self.d_hidden is not None and self.weights_n is not None:
            self.d_hidden.mul_(self.weights_n.unsqueeze(1))
        return self.d_hidden, self.d_weight, self.d_bias


def _nonzero_terms(x: Tensor, u: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a count x > 0 adds to a zero's log-probability, and to its slopes by m and theta."""
    rising, is_large = log_rising(x, theta)
    sp = softplus(u, threshold=40.0)
    # x log(theta) is inside `rising` for small theta and left out of both parts for large theta.
    per_count = torch.where(is_large, theta.log() + u - sp, -softplus(-u, threshold=40.0))
    value = rising + x * per_count - torch.lgamma(x + 1)
    slope_theta = (log_rising_slope(x, theta) + x * torch.sigmoid(u)) / theta
    return value, x * torch.sigmoid(-u), slope_theta


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
        hidden, theta = sweep.hidden_nh, sweep.theta
        self.sweep, self.weights_n = sweep, weights_n
        self.n, n_genes = len(hidden), len(sweep.weight_gh)
        self.layer = _Layer(hidden, sweep.weight_gh, sweep.bias_g, sweep.family.gemm_dtype, weights_n, sweep.needs[:3])
        self.gate: _Layer | None = None
        if sweep.gate_hidden is not None and sweep.gate_weight is not None and sweep.gate_bias is not None:
            self.gate = _Layer(
                sweep.gate_hidden, sweep.gate_weight, sweep.gate_bias,
                sweep.family.gate_gemm_dtype, weights_n, sweep.needs[5:8],
            )  # fmt: skip
        self.library = sweep.library_n.clamp_min(1e-30)  # a library that underflowed to 0 has a logarithm
        self.value = hidden.new_zeros(self.n) if want_value else None
        self.d_theta: Tensor | None = None
        if weights_n is not None and theta is not None and sweep.needs[4]:
            self.d_theta = POOL.take(theta.shape, theta.dtype, theta.device)

        width = block_width(self.n, n_genes, hidden.device)
        self.blocks = list(sweep.entries.blocks(width))
        self.scratch = [POOL.take((self.n * width,), hidden.dtype, hidden.device) for _ in range(4)]
        # log(mean) and d/dm of all genes: a block is a contiguous (n, m) piece of each.
        self.log_mean, self.slope = (POOL.take((self.n * n_genes,), hidden.dtype, hidden.device) for _ in range(2))
        self.zero = hidden.new_zeros(())

    def piece(self, buffer: Tensor, block: Block) -> Tensor:
        """The block's (n, m) part of a buffer of all genes."""
        return buffer[self.n * block.start : self.n * block.stop].view(self.n, block.stop - block.start)

    def scratch_of(self, block: Block) -> list[Tensor]:
        m = block.stop - block.start
        return [buffer[: self.n * m].view(self.n, m) for buffer in self.scratch]

    def theta_of(self, block: Block) -> Tensor:
        assert self.sweep.theta is not None
        return self.sweep.theta[..., block.features]

    def run(self) -> tuple[Tensor | None, Gradients]:
        self.find_log_mean()
        for block in self.blocks:
            if self.sweep.theta is None:
                self.poisson_zeros(block)
            else:
                self.negative_binomial_zeros(block)
        self.add_nonzeros()
        if self.weights_n is None:
            return self.value, ()
        d_library = self.through_link()
        gate = (None, None, None) if self.gate is None else self.gate.gradients()
        return self.value, (*self.layer.gradients(), d_library, self.d_theta, *gate)

    def find_log_mean(self) -> None:
        """Fill log_mean with log(library) + log(rho)."""
        log_library = self.library.log()
        if not self.sweep.family.is_softmax:
            # Below this logit softplus underflows, and its logarithm is the logit itself.
            underflow = -80.0 if self.log_mean.dtype == torch.float32 else -700.0
            for block in self.blocks:
                logits, other = self.scratch_of(block)[0], self.piece(self.log_mean, block)
                self.layer.logits(block.features, out=logits)
                torch.logaddexp(logits, self.zero, out=other).log_()
                torch.maximum(other, logits.clamp_(max=underflow), out=other)
                other += log_library.unsqueeze(1)
            return
        normalizer: Tensor | None = None
        for block in self.blocks:
            logits = self.piece(self.log_mean, block)
            self.layer.logits(block.features, out=logits)
            part = logits.logsumexp(1)
            normalizer = part if normalizer is None else torch.logaddexp(normalizer, part)
        assert normalizer is not None
        shift = (log_library - normalizer).unsqueeze(1)
        for block in self.blocks:
            self.piece(self.log_mean, block).add_(shift)

    def poisson_zeros(self, block: Block) -> None:
        slope = torch.exp(self.piece(self.log_mean, block), out=self.piece(self.slope, block)).neg_()
        if self.value is not None:
            self.value += slope.sum(1)

    def negative_binomial_zeros(self, block: Block) -> None:
        theta = self.theta_of(block)
        sp, scratch, gate_logits, dropout = self.scratch_of(block)
        slope = self.piece(self.slope, block)
        u = torch.sub(self.piece(self.log_mean, block), theta.log(), out=slope)
        torch.logaddexp(u, self.zero, out=sp)
        log_zero = torch.mul(sp, theta, out=scratch).neg_()
        if self.gate is not None:
            self.gate.logits(block.features, out=gate_logits)
            # log(sig(h) + sig(-h) NB(0)) = log NB(0) + softplus(h - log NB(0)) - softplus(h)
            torch.sub(gate_logits, log_zero, out=dropout)
            if self.value is not None:
                inflation = torch.logaddexp(dropout, self.zero)
                inflation.view(-1).index_fill_(0, block.flat, 0.0)  # only a zero can be a dropout
                log_zero += inflation.sub_(torch.logaddexp(gate_logits, self.zero))
            dropout.sigmoid_().view(-1).index_fill_(0, block.flat, 0.0)
        if self.value is not None:
            self.value += log_zero.sum(1)
        if self.weights_n is None:
            return
        sigmoid = u.sigmoid_()
        if self.d_theta is not None:
            by_theta = torch.sub(sigmoid, sp, out=sp)
            if self.gate is not None:
                by_theta.addcmul_(by_theta, dropout, value=-1.0)
            if self.d_theta.dim() == 1:
                torch.mv(by_theta.t(), self.weights_n, out=self.d_theta[block.features])
            else:
                torch.mul(by_theta, self.weights_n.unsqueeze(1), out=self.d_theta[:, block.features])
        slope = sigmoid.mul_(theta).neg_()
        if self.gate is not None:
            slope.addcmul_(slope, dropout, value=-1.0)
            if self.gate.needs_grad:
                self.gate.add(block.features, dropout.sub_(gate_logits.sigmoid_()))

    def add_nonzeros(self) -> None:
        """Correct value and slopes at the non-zero counts, all blocks in one go."""
        x, col = self.sweep.entries.val, self.sweep.entries.col
        entry = torch.cat([block.entry for block in self.blocks])
        row = torch.cat([block.row for block in self.blocks])
        # Position in the buffers of all genes, where a block begins after n entries per earlier gene.
        flat = torch.cat([block.flat.add_(self.n * block.start) for block in self.blocks])
        x = x.index_select(0, entry).to(self.log_mean.dtype)
        gene = col.index_select(0, entry)
        log_mean = self.log_mean.index_select(0, flat)
        if self.sweep.theta is None:
            value, slope = x * log_mean - torch.lgamma(x + 1), x
        else:
            theta = self.sweep.theta
            theta = theta.index_select(0, gene) if theta.dim() == 1 else theta[row, gene]
            value, slope, by_theta = _nonzero_terms(x, log_mean - theta.log(), theta)
            if self.d_theta is not None and self.weights_n is not None:
                by_theta *= self.weights_n.index_select(0, row)
                if self.d_theta.dim() == 1:
                    self.d_theta.index_add_(0, gene, by_theta)
                else:
                    self.d_theta.index_put_((row, gene), by_theta, accumulate=True)
        if self.value is not None:
            self.value.index_add_(0, row, value)
        if self.weights_n is not None:
            self.slope.index_add_(0, flat, slope)

    def through_link(self) -> Tensor | None:
        """Turn d/dm into d/dlogits and hand it to the layer; return d/dlibrary."""
        assert self.weights_n is not None
        total = torch.zeros_like(self.library)
        for block in self.blocks:
            total += self.piece(self.slope, block).sum(1)
        by_library = (total / self.library).unsqueeze(1)
        if self.layer.needs_grad:
            for block in self.blocks:
                slope = self.piece(self.slope, block)
                mean = self.piece(self.log_mean, block).exp_()
                if self.sweep.family.is_softmax:
                    slope -= mean.mul_(by_library)
                else:
                    # dlog softplus(a) / da = (1 - exp(-s)) / s for s = softplus(a)
                    s = mean.div_(self.library.unsqueeze(1)).clamp_min_(torch.finfo(mean.dtype).tiny)
                    slope.mul_(torch.expm1(s.neg(), out=self.scratch_of(block)[0])).div_(s).neg_()
                self.layer.add(block.features, slope)
        return total / self.library * self.weights_n if self.sweep.needs[3] else None
