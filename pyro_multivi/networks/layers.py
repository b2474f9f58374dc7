"""Layers of encoders and decoders."""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

import scipy.sparse
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions.kernels.buffers import POOL
from pyro_multivi.distributions.kernels.numba.switch import loops_for

logger = logging.getLogger("pyro_multivi")

# A cell has hundreds of non-zero features out of many thousand, so the fan-in is theirs, not that of
# nn.Linear. Ten times larger weights also learn relatively slower under Adam, whose steps do not depend
# on them: rare features are not memorised (3 nats per held-out cell on the SNARE-seq cell lines).
_START = 0.1
# A weight of more elements (8 MB in float32) does not stay in the cache, so that it is slow to look up the features of
# one cell after the other. One thread then takes a third of the time feature by feature; with this many threads it is
# no faster.
_CACHED = 2**21
_MANY_THREADS = 4
# Features of the weight gradient formed at a time: 4 096 x 128 floats (2 MB) stay in the cache.
_FEATURES_AT_A_TIME = 4096


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over all leading dimensions.

    ``nn.BatchNorm1d`` would take the second of three dimensions for the features, and refuses a
    single cell in training; here the features are always last and a single cell uses the running
    statistics, as all cells do when it is ``frozen``.
    """

    frozen = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input``, shape (..., features)."""
        flat = input.reshape(-1, input.shape[-1])
        use_batch = self.training and len(flat) > 1 and not self.frozen
        normalised = F.batch_norm(
            flat,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            use_batch,
            self.momentum if self.momentum is not None else 0.1,
            self.eps,
        )
        return normalised.reshape(input.shape)


class NormActivate(nn.Module):
    """Normalisation, activation and dropout after a linear map."""

    def __init__(
        self, n_hidden: int, *, batch_norm: bool, layer_norm: bool, activation: nn.Module, dropout_rate: float
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        if batch_norm:
            parts.append(BatchNorm(n_hidden, momentum=0.01, eps=1e-3))
        if layer_norm:
            parts.append(nn.LayerNorm(n_hidden, elementwise_affine=False))
        parts.append(activation)
        if dropout_rate > 0:
            parts.append(nn.Dropout(dropout_rate))
        self.parts = nn.Sequential(*parts)

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise, activate and drop out, shape (..., n_hidden)."""
        return self.parts(hidden)


class CovariateStack(nn.Module):
    """Fully connected layers into which observed covariates s are injected.

    Parameters
    ----------
    n_in, n_hidden, n_layers
        Widths. With ``n_layers=0`` the input is passed on.
    n_covariates
        Length of s; 0 leaves it out.
    inject_everywhere
        Give s to every layer instead of the first only.
    batch_norm, layer_norm, activation, dropout_rate
        See :class:`NormActivate`.
    """

    def __init__(
        self,
        n_in: int,
        n_hidden: int,
        n_layers: int,
        *,
        n_covariates: int = 0,
        inject_everywhere: bool = False,
        batch_norm: bool = False,
        layer_norm: bool = True,
        activation: type[nn.Module] = nn.LeakyReLU,
        dropout_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_out = n_hidden if n_layers else n_in
        self.linear, self.after = nn.ModuleList(), nn.ModuleList()
        #: Columns of s behind the input of each layer.
        self.n_injected: list[int] = []
        norms: Any = {"batch_norm": batch_norm, "layer_norm": layer_norm, "dropout_rate": dropout_rate}
        for layer in range(n_layers):
            injected = n_covariates if layer == 0 or inject_everywhere else 0
            self.n_injected.append(injected)
            self.linear.append(nn.Linear((n_in if layer == 0 else n_hidden) + injected, n_hidden))
            self.after.append(NormActivate(n_hidden, activation=activation(), **norms))

    def forward(self, hidden: Tensor, s: Tensor) -> Tensor:
        """Map ``hidden`` (..., n_in) and ``s`` (..., n_covariates) to (..., n_hidden)."""
        for linear, after in zip(self.linear, self.after, strict=True):
            assert isinstance(linear, nn.Linear)
            hidden = after(linear(beside(hidden, s) if linear.in_features > hidden.shape[-1] else hidden))
        return hidden


def beside(hidden: Tensor, s: Tensor) -> Tensor:
    """Hidden units (..., H) and columns of a design behind them."""
    # Draws of z add leading dimensions that s does not have; a forced z may lack those that s has.
    shape = torch.broadcast_shapes(hidden.shape[:-1], s.shape[:-1])
    return torch.cat([hidden.expand(*shape, -1), s.expand(*shape, -1)], -1)


def layer_options(config: Any, where: str) -> dict[str, Any]:
    """Options of the layers of an ``"encoder"`` or ``"decoder"`` that a program's configuration states."""
    options: dict[str, Any] = {
        "n_covariates": config.n_covariates if where == "decoder" or config.encode_covariates else 0,
        "batch_norm": config.use_batch_norm in (where, "both"),
        "layer_norm": config.use_layer_norm in (where, "both"),
    }
    return options if where == "decoder" else {**options, "dropout_rate": config.dropout_rate}


class _SparseMatmul(torch.autograd.Function):
    """Product counts @ weight for compressed rows; the gradient of the weight runs over compressed columns.

    Both directions are sums of few rows of a dense matrix. While that stays in the cache, ``embedding_bag``
    is faster than a sparse or (below some 10 % of non-zeros) dense matrix product.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: SparseCounts) -> Tensor:
        ctx.counts, ctx.shape = counts, weight.shape
        loops = loops_for(weight)
        if loops is not None:
            return _by_loops(loops, weight, counts)
        if weight.device.type == "cpu" and weight.numel() > _CACHED and torch.get_num_threads() < _MANY_THREADS:
            return _in_order(weight, counts)
        return _bag(weight, counts.col, counts.crow, counts.val)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Only gradients that are differentiated themselves need a node of the graph.
        form = _WeightGradient.apply if torch.is_grad_enabled() else _weight_gradient
        return form(grad, ctx.counts, tuple(ctx.shape)), None


class _WeightGradient(torch.autograd.Function):
    """Gradient of a weight, which is linear in that of the product."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, counts: SparseCounts, shape: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return _weight_gradient(grad, counts, shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _SparseMatmul.apply(grad, ctx.counts), None, None


def _weight_gradient(grad: Tensor, counts: SparseCounts, shape: tuple[int, ...]) -> Tensor:
    by_feature = counts.by_feature()
    grad = grad.contiguous()
    if grad.device.type != "cpu":
        # All at once: the host would wait for a GPU to know where the blocks begin.
        return _bag(grad, by_feature.row, by_feature.start, by_feature.val)
    made = POOL.take(shape, grad.dtype, grad.device)
    edges = by_feature.start[::_FEATURES_AT_A_TIME].tolist()
    for block, first in enumerate(range(0, shape[0], _FEATURES_AT_A_TIME)):
        last = min(first + _FEATURES_AT_A_TIME, shape[0])
        begin = edges[block]
        end = edges[block + 1] if block + 1 < len(edges) else len(by_feature.row)
        start = by_feature.start[first : last + 1] - begin
        made[first:last] = _bag(grad, by_feature.row[begin:end], start, by_feature.val[begin:end])
    return made


def _bag(table: Tensor, index: Tensor, start: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of rows of ``table``, one per slice of ``index`` that ``start`` delimits."""
    if len(index) == 0:
        return table.new_zeros(len(start) - 1, table.shape[1])
    return F.embedding_bag(
        # A repeated value has to be written out: the bag is slower without contiguous weights.
        index, table, start, mode="sum", per_sample_weights=weight.to(table.dtype).contiguous(),
        include_last_offset=True,
    )  # fmt: skip


def _in_order(weight: Tensor, counts: SparseCounts) -> Tensor:
    """Product counts @ weight by SciPy on one thread, feature after feature: each row of the weight is read once."""
    start, row, val = counts.by_feature()
    entries = (val.to(weight.dtype).contiguous().numpy(), row.numpy(), start.numpy())
    product = scipy.sparse.csc_array(entries, shape=(counts.shape[0], counts.shape[1])) @ weight.detach().numpy()
    return torch.from_numpy(product)


def _by_loops(loops: ModuleType, weight: Tensor, counts: SparseCounts) -> Tensor:
    """Product counts @ weight in a compiled loop."""
    n_chunks = torch.get_num_threads()
    product_cnh, read_c = weight.new_empty(n_chunks, counts.shape[0], weight.shape[1]), weight.new_empty(n_chunks)
    entries = (part.numpy() for part in (counts.crow, counts.col, counts.val.to(weight.dtype).contiguous()))
    loops.sparse_product(weight.detach().numpy(), *entries, product_cnh.numpy(), read_c.numpy())
    return product_cnh.sum(0)


class CountsLinear(nn.Module):
    """First layer over counts as they are stored: compressed rows or dense.

    The weight is held feature by feature, shape (n_features, n_out): a cell needs the rows of its
    non-zero features.

    Examples
    --------
    >>> layer = CountsLinear(3, 2)
    >>> counts = torch.tensor([[0.0, 1.0, 2.0]])
    >>> torch.allclose(layer(SparseCounts.from_dense(counts)), layer(counts))
    True
    """

    def __init__(self, n_features: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_features, n_out))
        self.bias = nn.Parameter(torch.empty(n_out))
        nn.init.uniform_(self.weight, -_START, _START)
        nn.init.zeros_(self.bias)

    def forward(self, counts: Tensor) -> Tensor:
        """Map counts (B, n_features) to (B, n_out)."""
        if isinstance(counts, SparseCounts):
            product: Tensor = _SparseMatmul.apply(self.weight, counts)
            return product + self.bias
        return counts @ self.weight + self.bias


def start_constant(layer: nn.Module | None, name: str, intercept: Tensor) -> None:
    """Let a decoder's last layer give its intercepts, (F,), in every cell; one of another kind keeps its start."""
    if isinstance(layer, nn.Linear) and layer.bias is not None:
        layer.weight.zero_()
        layer.bias.copy_(intercept)
    else:
        found = "is no nn.Linear with a bias: it keeps" if layer is not None else "is not there: the decoder keeps"
        logger.info("The layer %s of a decoder %s the start that it has", name, found)
