"""What the block-by-block likelihoods share: where entries lie, upstream weights, products.

A likelihood of B cells over F features walks over blocks of features that fit in the
processor's cache. Within a block it forms the value and the gradients at once, while the
numbers are at hand, and writes only sums and products with the factors of the readout.

Gradients formed during the forward pass are right only if the objective weighs all evaluated
cells equally, because the contraction over cells in a weight's gradient cannot be reweighted
later. The backward pass checks this, and forms them again with the true weights if need be.
On an accelerator the check would make the host wait, so gradients are formed in the backward
pass there, unless the caller promises equal weights with :func:`equal_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions.kernels.buffers import POOL

# Elements of one block buffer, by measurement (128 cells: 4096 features). Half of it is as fast in
# float32 and 8 % slower in bfloat16, a quarter 10-20 % slower. An accelerator wants few, large launches, and
# is waited for where there is more than one block (512 cells: 131 072 features, 256 MB of float32).
CPU_BLOCK_ELEMENTS = 2**19
DEVICE_BLOCK_ELEMENTS = 2**26
MIN_WIDTH = 256  # below this the matrix products become inefficient

_promise: ContextVar[float | None] = ContextVar("equal_weights", default=None)


@contextmanager
def equal_weights(weight: float = 1.0) -> Iterator[None]:
    """Promise that all evaluated cells have one weight in the objective, about to be ``weight``.

    Log-probabilities computed inside may form their gradients at once, also on an accelerator.
    The promise holds for an ELBO whose likelihoods carry their mask themselves (``.mask``) and
    are scaled as a whole, by a plate or :func:`pyro.poutine.scale` with one number. It does not
    under :func:`pyro.poutine.mask` or weights per cell: there an accelerator would return wrong
    gradients, while a CPU notices. A good guess of the value saves a pass over the gradients; it
    need not be right.

    Parameters
    ----------
    weight
        Expected derivative of the objective by a cell's log-probability, not 0.

    Raises
    ------
    ValueError
        If ``weight`` is 0 or not finite.

    Examples
    --------
    >>> with equal_weights(-1 / 128):
    ...     pass
    """
    if not weight or weight - weight != 0:
        raise ValueError(f"weight must be a finite number other than 0, got {weight}")
    token = _promise.set(weight)
    try:
        yield
    finally:
        _promise.reset(token)


def block_width(n_rows: int, n_features: int, device: torch.device) -> int:
    """Number of features per block."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    width = elements // max(n_rows, 1) // 64 * 64
    return max(1, min(max(width, MIN_WIDTH), n_features))


@dataclass(frozen=True)
class Block:
    """Features ``start`` to ``stop`` and the stored entries among them.

    ``entries`` says where these lie in the arrays of ``all_entries``.
    """

    start: int
    stop: int
    entries: slice
    all_entries: Entries

    @cached_property
    def flat(self) -> Tensor:
        """Positions of the entries in a contiguous (stop - start, cells) buffer, shape (entries in the block,)."""
        return self.all_entries.place[self.entries] - self.start * self.all_entries.n_rows

    @property
    def features(self) -> slice:
        """Position among all features."""
        return slice(self.start, self.stop)


class Entries:
    """Stored entries of some rows, ordered by feature, so that those of a block are one slice.

    Held apart from :class:`SparseCounts` so that autograd does not take it for a tensor.

    Parameters
    ----------
    counts
        Compressed rows.
    source
        Which rows are meant, in which order, possibly repeated, shape (n,), int64; None for all.

    Attributes
    ----------
    n_rows, n_features
        Cells and features.
    start
        Where each feature's entries begin, shape (features + 1,).
    row
        Of each entry, shape (entries,).
    """

    def __init__(self, counts: SparseCounts, source: Tensor | None = None) -> None:
        self._counts = counts
        self._entry: Tensor | None = None
        self.n_rows, self.n_features = counts.shape[0] if source is None else len(source), counts.shape[1]
        order = counts.order_by_feature()
        self.start, self.row = order.start, order.row
        if source is not None:
            self._choose(source)

    @cached_property
    def feature(self) -> Tensor:
        """Of each entry, shape (entries,)."""
        index = torch.arange(self.n_features, device=self.row.device)
        return torch.repeat_interleave(index, self.start.diff(), output_size=len(self.row))

    @cached_property
    def place(self) -> Tensor:
        """Position of each entry in a contiguous (features, cells) buffer, shape (entries,), int64."""
        return torch.add(self.row, self.feature, alpha=self.n_rows)

    def _choose(self, source: Tensor) -> None:
        """Go from the stored rows to the chosen ones; the order by feature stays."""
        device = source.device
        times = source.new_zeros(self._counts.shape[0]).index_add_(0, source, torch.ones_like(source))
        first = times.cumsum(0) - times  # where a stored row's places among the chosen ones begin
        by_stored = torch.argsort(source, stable=True)
        repeats = times.index_select(0, self.row)
        ends = repeats.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        entry = torch.repeat_interleave(torch.arange(len(ends), device=device), repeats, output_size=total)
        nth = torch.arange(total, device=device) - (ends - repeats).index_select(0, entry)
        self.row = by_stored.index_select(0, first.index_select(0, self.row).index_select(0, entry) + nth)
        self._entry = entry
        self.start = torch.cat([ends.new_zeros(1), ends]).index_select(0, self.start)

    def values(self) -> Tensor:
        """The entries themselves, shape (entries,)."""
        val = self._counts.by_feature().val
        return val if self._entry is None else val.index_select(0, self._entry)

    def blocks(self, width: int) -> Iterator[Block]:
        """Blocks of ``width`` features in order."""
        n_features = self.n_features
        # In one block the entries are all: an accelerator need not be asked.
        edges = [0] if n_features <= width else self.start[:-1:width].tolist()
        edges.append(len(self.row))
        for k, start in enumerate(range(0, n_features, width)):
            yield Block(start, min(start + width, n_features), slice(edges[k], edges[k + 1]), self)


def sum_of_logs(factors_mn: Tensor) -> Tensor | None:
    """Sum over features of log |factor|, shape (n,), for factors of at most 1; they are overwritten.

    A logarithm costs several times a product, so it is taken of products of eight. None if one of
    these came near to underflow: then take the logarithms one by one.
    """
    m = len(factors_mn)
    for _ in range(3):
        half = m // 2
        factors_mn[:half].mul_(factors_mn[m - half : m])
        m -= half
    return sum_of_logs_of_products(factors_mn[:m].abs_())


def sum_of_logs_of_products(products_gn: Tensor) -> Tensor | None:
    """The latter half of :func:`sum_of_logs`, of absolute products; they are overwritten."""
    if not products_gn.numel():
        return products_gn.new_zeros(products_gn.shape[1])
    return products_gn.log_().sum(0) if float(products_gn.amin()) > smallest_product(products_gn.dtype) else None


def smallest_product(dtype: torch.dtype) -> float:
    """What a product of probabilities must exceed to be trusted: 1e-26 in float32."""
    return float(torch.finfo(dtype).tiny ** 0.7)


class _FirstOrderOnly(torch.autograd.Function):
    """Passes gradients on, and explains itself when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the block-wise likelihoods have no second derivatives; "
            "give the distribution readout.dense() instead of the readout to get them"
        )


Gradients = tuple[Tensor | None, ...]
# Weights per cell and whether the value is wanted -> value and gradients.
Sweep = Callable[[Tensor | None, bool], tuple[Tensor | None, Gradients]]


class Pending:
    """Gradients that wait for, or have been formed before, the upstream weights."""

    def __init__(self, sweep: Sweep, device: torch.device, wants_grad: bool) -> None:
        promised = _promise.get()
        self.weight = 1.0 if promised is None else promised
        self.sweep = sweep
        self.formed: Gradients | None = None
        self._can_check = device.type == "cpu"
        self._forms_now = wants_grad and (self._can_check or promised is not None)

    def value(self, n_rows: int, like: Tensor) -> Tensor:
        """Evaluate the log-probabilities, and the gradients if that can be done already."""
        weights = like.new_full((n_rows,), self.weight) if self._forms_now else None
        value, gradients = self.sweep(weights, True)
        if weights is not None:
            self.formed = gradients
        assert value is not None
        return value

    def gradients(self, upstream: Tensor) -> Gradients:
        """Gradients under the weights of the objective."""
        formed, self.formed = self.formed, None  # handed over: a second backward pass forms its own
        if formed is not None and upstream.numel() > 0:
            first = upstream[0]
            if not self._can_check:
                formed = tuple(None if g is None else g.mul_(first / self.weight) for g in formed)
            elif not bool((upstream == first).all()):
                formed = None
            elif float(first) != self.weight:
                formed = tuple(None if g is None else g.mul_(float(first) / self.weight) for g in formed)
        if formed is None:
            formed = self.sweep(upstream, False)[1]
        return formed


def backward(ctx: Any, upstream: Tensor) -> Gradients:
    """Backward pass of a function that left its :class:`Pending` on the context."""
    ctx.saved_tensors  # noqa: B018  raises if an input was changed in place since the forward pass
    with torch.no_grad():
        gradients: Gradients = ctx.pending.gradients(upstream)
    if torch.is_grad_enabled():
        anchor = torch.zeros((), device=upstream.device, requires_grad=True)
        gradients = _FirstOrderOnly.apply(anchor, *gradients)
    return gradients


class Products:
    """Matrix products of one readout, in its precision, over blocks of its features.

    Blocks lie feature by feature, (m, n) for m features and n cells: all products run fast that
    way, and the entries of a block lie in order.

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
        """Weights of a block as the products take them; good until the next block."""
        weight = self.weight[features]
        return weight if self.dtype is None else self._cast[1][: len(weight)].copy_(weight)

    def residual(self, residual_mn: Tensor) -> Tensor:
        """The derivative by a block of logits as the products take it; good until the next block."""
        place = self.place(residual_mn)
        return place if place is residual_mn else place.copy_(residual_mn)

    def place(self, block_mn: Tensor) -> Tensor:
        """Where logits and derivatives are in the precision of the products: ``block_mn`` itself if it has that."""
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
