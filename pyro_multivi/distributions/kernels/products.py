"""Matrix products with a readout, block by block of features: its logits, and the gradients of its factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_multivi.distributions.kernels.blocks import Block
from pyro_multivi.distributions.kernels.buffers import POOL
from pyro_multivi.distributions.kernels.gradients import Gradients

# Logits are formed in units of log(2): exp2 runs at more than twice the speed of exp here, and the
# factor costs nothing inside the matrix product.
LOG2_E = math.log2(math.e)


class Products:
    """Matrix products of one readout, in its precision, over blocks of its features.

    Blocks are stored feature by feature, (m, n) for m features and n cells: all products run fast
    on this layout, and the entries of a block are in order.

    Parameters
    ----------
    hidden, weight
        Factors of the readout, shapes (n, H) and (F, H).
    gemm_dtype
        Precision of the products; None means that of ``hidden``.
    width
        Largest m.
    scale
        Unit of the logits.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, gemm_dtype: torch.dtype | None, width: int, scale: float = 1.0
    ) -> None:
        self.dtype = None if gemm_dtype in (None, hidden.dtype) else gemm_dtype
        self.weight = weight
        self._hidden = self.operand(hidden * scale if scale != 1.0 else hidden)
        if self.dtype is not None:
            shapes = [(width, len(hidden)), (width, hidden.shape[1]), (width, hidden.shape[1])]
            self._cast = [POOL.take(shape, self.dtype, hidden.device) for shape in shapes]

    def operand(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the precision of the products."""
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def block(self, features: slice) -> Tensor:
        """Weights of a block in the precision of the products; valid until the next block."""
        weight = self.weight[features]
        return weight if self.dtype is None else self._cast[1][: len(weight)].copy_(weight)

    def residual(self, residual_mn: Tensor) -> Tensor:
        """Derivatives by a block of logits in the precision of the products; valid until the next block."""
        place = self.place(residual_mn)
        return place if place is residual_mn else place.copy_(residual_mn)

    def place(self, block_mn: Tensor) -> Tensor:
        """Buffer for a block in the precision of the products: ``block_mn`` itself if it has that."""
        return block_mn if self.dtype is None else self._cast[0][: len(block_mn)]

    def logits(self, weight_mh: Tensor, bias_m: Tensor, out: Tensor) -> None:
        """Write ``scale * weight @ hidden.T + bias``, shape (m, n)."""
        if self.dtype is None:
            torch.addmm(bias_m.unsqueeze(1), weight_mh, self._hidden.t(), out=out)
        else:
            # In two steps: mixed dtypes are slow.
            out.copy_(self.logits_less_bias(weight_mh, out)).add_(bias_m.unsqueeze(1))

    def logits_less_bias(self, weight_mh: Tensor, out: Tensor) -> Tensor:
        """``scale * weight @ hidden.T`` in :meth:`place`, shape (m, n)."""
        return torch.mm(weight_mh, self._hidden.t(), out=self.place(out))

    def add_to_hidden(self, total_hn: Tensor, residual_mn: Tensor, weight_mh: Tensor) -> None:
        """Add ``weight.T @ residual`` to ``total``."""
        if self.dtype is None:
            total_hn.addmm_(weight_mh.t(), residual_mn)
        else:
            total_hn += weight_mh.t() @ residual_mn

    def to_weight(self, residual_mn: Tensor, weighted_hidden_nh: Tensor, out: Tensor) -> None:
        """Write ``residual @ weighted_hidden``, shape (m, H)."""
        if self.dtype is None:
            torch.mm(residual_mn, weighted_hidden_nh, out=out)
        else:
            out.copy_(torch.mm(residual_mn, weighted_hidden_nh, out=self._cast[2][: len(out)]))


class BlockwiseReadout:
    """Logits of a readout, and gradients of its factors, from block to block.

    Parameters
    ----------
    hidden, weight, bias, gemm_dtype
        See :class:`~pyro_multivi.distributions.Readout`.
    weights_n
        Weights of the cells in the objective; None forms no gradients.
    needs
        Whether hidden, weight and bias each need a gradient.
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

    def logits_less_bias(self, block: Block, out: Tensor) -> Tensor:
        """Logits of a block less their bias, in the precision of the products: in ``out`` if it has that."""
        return self.products.logits_less_bias(self.products.block(block.features), out)

    def add(self, block: Block, residual_mn: Tensor) -> None:
        """Add the derivatives of each cell's log-probability by a block of logits (of unit 1)."""
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
        """Gradients of hidden, weight and bias; None where not needed."""
        d_hidden = None
        if self.d_hidden_hn is not None and self.weights_n is not None:
            d_hidden = self.d_hidden_hn.mul_(self.weights_n).t()
        return d_hidden, self.d_weight, self.d_bias
