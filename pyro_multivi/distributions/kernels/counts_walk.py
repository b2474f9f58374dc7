"""Walk over the blocks of genes that evaluates a likelihood of counts, operation by operation of PyTorch.

The formulas are in :mod:`pyro_multivi.distributions.kernels.counts`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions.kernels.blocks import Block, Entries, block_width
from pyro_multivi.distributions.kernels.buffers import POOL
from pyro_multivi.distributions.kernels.gradients import Gradients
from pyro_multivi.distributions.kernels.log_gamma import LARGE_COUNT, gamma_functions, log_rising_and_slope
from pyro_multivi.distributions.kernels.products import LOG2_E, BlockwiseReadout
from pyro_multivi.distributions.kernels.zero_inflation import inflate, inflate_in_logs

# Bound of log2(mean / theta), far from overflow and from where anything depends on it.
_LARGEST_LOG2 = 126.0
_LN_2 = math.log(2)


@dataclass(frozen=True)
class Family:
    """Link of rho, and the precision of the products of each readout."""

    is_softmax: bool
    gemm_dtype: torch.dtype | None
    gate_gemm_dtype: torch.dtype | None


@dataclass(frozen=True)
class CountsTerm:
    """Arguments of a likelihood of counts. Shapes: n cells, G genes, H hidden units.

    ``needs`` says of each tensor, in their order, whether its gradient is wanted.
    """

    entries: Entries
    family: Family
    hidden_nh: Tensor
    weight_gh: Tensor
    bias_g: Tensor
    library_n: Tensor
    theta: Tensor | None
    gate_hidden: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    needs: tuple[bool, ...]


def nonzero_terms(
    x: Tensor, u: Tensor, theta: Tensor, log_theta: Tensor, gamma_of_theta: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability of a count x > 0 and its slopes by m and theta, less those of a zero; and softplus(u)."""
    rising, is_large, slope = log_rising_and_slope(x, theta, gamma_of_theta)
    sp = softplus(u, threshold=40.0)
    # x log(theta) is inside `rising` for small theta and left out of both parts for large theta.
    per_count = torch.where(is_large, log_theta + u - sp, -softplus(-u, threshold=40.0))
    value = rising.addcmul_(x, per_count).sub_(torch.lgamma(x + 1))
    sigmoid = torch.sigmoid(u)
    slope_theta = slope.addcmul_(x, sigmoid).div_(theta)
    return value, x * torch.sigmoid(-u), slope_theta, sp


def refine_large(x: Tensor, log2_mean: Tensor, theta: Tensor | None, terms: list[Tensor]) -> None:
    """Put terms of counts above zero in double precision in place of those of large counts."""
    if x.dtype == torch.float64:
        return
    large = x >= LARGE_COUNT
    # To see whether there are any, the host would wait for an accelerator; there double precision of all is cheap.
    is_quick = x.device.type == "cpu"
    if is_quick and not bool(large.any()):
        return
    at = large.nonzero().squeeze(-1) if is_quick else slice(None)
    x, log_mean = x[at].double(), log2_mean[at].double() * _LN_2
    if theta is None:
        wide: tuple[Tensor, ...] = (x * log_mean - torch.lgamma(x + 1),)
    else:
        theta = theta[at].double()
        log_theta = theta.log()
        wide = nonzero_terms(x, log_mean - log_theta, theta, log_theta, gamma_functions(theta))
    for narrow, better in zip(terms, wide, strict=True):
        narrow[at] = torch.where(large[at], better.to(narrow.dtype), narrow[at])


class CountsWalk:
    """One evaluation of a likelihood of counts over all blocks."""

    def __init__(self, term: CountsTerm, weights_n: Tensor | None, want_value: bool) -> None:
        hidden, theta, family = term.hidden_nh, term.theta, term.family
        self.term, self.weights_n = term, weights_n
        self.n, n_genes = len(hidden), len(term.weight_gh)
        width = block_width(self.n, n_genes, hidden.device)
        self.rho = BlockwiseReadout(
            hidden, term.weight_gh, term.bias_g, family.gemm_dtype, weights_n, term.needs[:3], width,
            scale=LOG2_E if family.is_softmax else 1.0,
        )  # fmt: skip
        self.gate: BlockwiseReadout | None = None
        if term.gate_hidden is not None and term.gate_weight is not None and term.gate_bias is not None:
            self.gate = BlockwiseReadout(
                term.gate_hidden, term.gate_weight, term.gate_bias,
                family.gate_gemm_dtype, weights_n, term.needs[5:8], width, scale=LOG2_E,
            )  # fmt: skip
        self.gates_at_entries: list[Tensor] = []
        self.library = term.library_n.clamp_min(1e-30)  # also one that underflowed to 0 has a logarithm
        self.value = hidden.new_zeros(self.n) if want_value else None
        self.is_theta_shared = theta is not None and theta.dim() == 1  # by the cells
        self.d_theta: Tensor | None = None
        if weights_n is not None and theta is not None and term.needs[4]:
            self.d_theta = POOL.take(theta.shape, theta.dtype, theta.device)
        # To see whether a probability underflowed, the host would wait for an accelerator; there logarithms are cheap.
        self.is_quick = hidden.device.type == "cpu"

        self.blocks = list(term.entries.blocks(width))
        self.scratch = [POOL.take((width * self.n,), hidden.dtype, hidden.device) for _ in range(4)]
        # log2(mean) and d/dm of all genes, feature by feature as the blocks are.
        self.log2_mean, self.slope = (POOL.take((n_genes * self.n,), hidden.dtype, hidden.device) for _ in range(2))
        self.total_slope = hidden.new_zeros(self.n)

    def piece(self, buffer: Tensor, block: Block) -> Tensor:
        """The block's (m, n) part of a buffer of all genes."""
        return buffer[self.n * block.start : self.n * block.stop].view(block.stop - block.start, self.n)

    def scratch_of(self, block: Block) -> list[Tensor]:
        """Four (m, n) buffers for intermediate results."""
        m = block.stop - block.start
        return [buffer[: m * self.n].view(m, self.n) for buffer in self.scratch]

    def run(self) -> tuple[Tensor | None, Gradients]:
        """Value, if wanted, and gradients, if weights were given."""
        self.find_log2_mean()
        for block in self.blocks:
            self.add_zeros(block)
            if self.weights_n is not None:
                self.total_slope += self.piece(self.slope, block).sum(0)
        self.add_nonzeros()
        if self.weights_n is None:
            return self.value, ()
        d_library = self.through_link()
        gate = (None, None, None) if self.gate is None else self.gate.gradients()
        return self.value, (*self.rho.gradients(), d_library, self.d_theta, *gate)

    def find_log2_mean(self) -> None:
        """Fill log2_mean with log2(library) + log2(rho)."""
        log2_library = self.library.log2()
        if self.term.family.is_softmax:
            shift = log2_library - self.fill_logits()
            for block in self.blocks:
                self.piece(self.log2_mean, block).add_(shift)
        else:
            # Below this logit softplus underflows, and its logarithm is the logit itself.
            underflow = -80.0 if self.log2_mean.dtype == torch.float32 else -700.0
            zero = self.library.new_zeros(())
            for block in self.blocks:
                logits, other = self.scratch_of(block)[0], self.piece(self.log2_mean, block)
                self.rho.logits(block, out=logits)
                torch.logaddexp(logits, zero, out=other).log_()
                torch.maximum(other, logits.clamp_(max=underflow), out=other)
                other.mul_(LOG2_E).add_(log2_library)

    def fill_logits(self) -> Tensor:
        """Fill log2_mean with the logits of a softmax; return its normalizer, log2(sum over genes of 2^logit)."""
        normalizer = torch.full_like(self.library, -torch.inf)
        for block in self.blocks:
            logits, scratch = self.piece(self.log2_mean, block), self.scratch_of(block)[0]
            self.rho.logits(block, out=logits)
            largest = logits.amax(0)
            part = torch.sub(logits, largest, out=scratch).exp2_().sum(0).log2_().add_(largest)
            normalizer = torch.logaddexp2(normalizer, part)
        return normalizer

    def add_zeros(self, block: Block) -> None:
        """Value and slopes as if all counts were zero."""
        if self.term.theta is None:
            self.poisson_zeros(block)
        else:
            theta = self.term.theta[..., block.features]
            # One per gene, or one per gene and cell.
            self.negative_binomial_zeros(block, theta.unsqueeze(1) if self.is_theta_shared else theta.t())

    def poisson_zeros(self, block: Block) -> None:
        """See :meth:`add_zeros`."""
        slope = torch.exp2(self.piece(self.log2_mean, block), out=self.piece(self.slope, block)).neg_()
        if self.value is not None:
            self.value += slope.sum(0)

    def negative_binomial_zeros(self, block: Block, theta: Tensor) -> None:
        """See :meth:`add_zeros`; ``theta`` is (m, 1) or (m, n)."""
        sp, *scratch = self.scratch_of(block)
        # exp(u); past this bound theta is so small that theta sp vanishes.
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
        """Turn the NB of zeros into a ZINB; return the posterior probability that a zero is no dropout."""
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

    def add_nonzeros(self) -> None:
        """Correct value and slopes at the non-zero counts, of all blocks at once."""
        entries = self.term.entries
        row, gene, place = entries.row, entries.feature, entries.place
        x = entries.values().to(self.log2_mean.dtype)
        log2_mean = self.log2_mean.index_select(0, place)
        log_mean = log2_mean / LOG2_E
        if self.term.theta is None:
            value, slope = x * log_mean - torch.lgamma(x + 1), x
            refine_large(x, log2_mean, None, [value])
        else:
            theta, log_theta, *of_theta = self.theta_at_entries()
            u = log_mean - log_theta
            value, slope, by_theta, sp = nonzero_terms(x, u, theta, log_theta, (of_theta[0], of_theta[1]))
            refine_large(x, log2_mean, theta, [value, slope, by_theta, sp])
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
        theta, entries = self.term.theta, self.term.entries
        assert theta is not None
        if not self.is_theta_shared:
            theta = theta[entries.row, entries.feature]
            return [theta, theta.log(), *gamma_functions(theta)]
        return [part.index_select(0, entries.feature) for part in (theta, theta.log(), *gamma_functions(theta))]

    def through_link(self) -> Tensor | None:
        """Turn d/dm into d/dlogits and add it to the readout's gradients; return d/dlibrary."""
        assert self.weights_n is not None
        by_library = self.total_slope / self.library
        if self.rho.needs_grad:
            for block in self.blocks:
                self.add_slopes(block, by_library)
        return by_library * self.weights_n if self.term.needs[3] else None

    def add_slopes(self, block: Block, by_library: Tensor) -> None:
        """Add a block of d/dlogits to the readout's gradients; log2_mean and slope are overwritten."""
        slope = self.piece(self.slope, block)
        mean = self.piece(self.log2_mean, block).exp2_()
        if self.term.family.is_softmax:
            slope.addcmul_(mean, by_library, value=-1.0)
        else:
            # dlog softplus(a) / da = (1 - exp(-s)) / s for s = softplus(a)
            s = mean.div_(self.library).clamp_min_(torch.finfo(mean.dtype).tiny)
            slope.mul_(torch.expm1(s.neg(), out=self.scratch_of(block)[0])).div_(s).neg_()
        self.rho.add(block, slope)
