"""A readout inside a walk over blocks: its logits, and the gradients of its factors as residuals come in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_multivi.distributions.kernels.blocks import Block, Gradients, Products
from pyro_multivi.distributions.kernels.buffers import POOL

# Logits are formed in units of log(2): exp2 runs at more than twice the speed of exp here, and the
# factor goes into the matrix product for nothing.
LOG2_E = math.log2(math.e)


class Layer:
    """A readout's factors and their gradients.

    Parameters
    ----------
    hidden, weight, bias, gemm_dtype
        Of the readout.
    weights_n
        Weights of the cells in the objective; None forms no gradients.
    needs
        Which of hidden, weight and bias want one.
    width
        Largest block.
    scale
        Unit of the logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, gemm_dtype: torch.dtype | None,
        weights_n: Tensor | None, needs: tuple[bool, ...], width: int, scale: float,
    ) -> None:  # fmt: skip
        self.products = Products(hidden, weight, gemm_dtype, width, scale)
        self.bias, self.weights_n = bias * scale, weights_n
        needs_hidden, needs_weight, needs_bias = (weights_n is not None and need for need in needs)
        self.d_hidden_hn = hidden.new_zeros(hidden.shape[1], len(hidden)) if needs_hidden else None
        self.d_weight = POOL.take(weight.shape, weight.dtype, weight.device) if needs_weight else None
        self.d_bias = torch.empty_like(bias) if needs_bias else None
        self.needs_grad = needs_hidden or needs_weight or needs_bias
        if weights_n is not None:
            self.weighted_hidden = self.products.operand(hidden * weights_n.unsqueeze(1))

    def logits(self, block: Block, out: Tensor) -> None:
        """Write the logits of a block, shape (m, n)."""
        self.products.logits(self.products.block(block.features), self.bias[block.features], out)

    def add(self, block: Block, residual_mn: Tensor) -> None:
        """Take in the derivative of each cell's log-probability by a block of logits (of unit 1)."""
        assert self.weights_n is not None
        if self.d_bias is not None:
            torch.mv(residual_mn, self.weights_n, out=self.d_bias[block.features])
        self.contract(block, self.products.residual(residual_mn))

    def contract(self, block: Block, residual_mn: Tensor) -> None:
        """:meth:`add` without the bias; the derivative is in the precision of the products."""
        features = block.features
        if self.d_weight is not None:
            self.products.to_weight(residual_mn, self.weighted_hidden, out=self.d_weight[features])
        if self.d_hidden_hn is not None:
            self.products.add_to_hidden(self.d_hidden_hn, residual_mn, self.products.block(features))

    def gradients(self) -> Gradients:
        """Of hidden, weight and bias."""
        d_hidden = None
        if self.d_hidden_hn is not None and self.weights_n is not None:
            d_hidden = self.d_hidden_hn.mul_(self.weights_n).t()
        return d_hidden, self.d_weight, self.d_bias
