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
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts

# Elements of one block buffer, by measurement (128 cells: 4096 features). Half of it is as fast in
# float32 and 8 % slower in bfloat16, a quarter 10-20 % slower. An accelerator wants few, large launches.
CPU_BLOCK_ELEMENTS = 2**19
DEVICE_BLOCK_ELEMENTS = 2**23
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

    ``entry`` says where an entry is stored, ``row`` its cell, ``flat`` its position in a
    contiguous (cells, stop - start) buffer; each of shape (entries in the block,).
    """

    start: int
    stop: int
    entry: Tensor
    row: Tensor
    flat: Tensor

    @property
    def features(self) -> slice:
        """Position among all features."""
        return slice(self.start, self.stop)


class Entries:
    """Stored entries of some rows, found block by block without sorting or copying them.

    Held apart from :class:`SparseCounts` so that autograd does not take it for a tensor.

    Parameters
    ----------
    counts
        Compressed rows.
    source
        Which rows are meant, in which order, possibly repeated, shape (n,), int64; None for all.
    """

    def __init__(self, counts: SparseCounts, source: Tensor | None = None) -> None:
        self.crow, self.col, self.val = counts.crow, counts.col, counts.val
        self.source, self.n_features = source, counts.shape[1]

    def blocks(self, width: int) -> Iterator[Block]:
        """Blocks of ``width`` features in order."""
        device, n_features = self.col.device, self.n_features
        starts = list(range(0, n_features, width))
        # Entries are ordered by (row, column): that key is ascending, so one search finds where
        # every block begins in every row.
        stored = torch.arange(len(self.crow) - 1, device=device)
        key = torch.repeat_interleave(stored * n_features, self.crow.diff(), output_size=len(self.col))
        key += self.col
        source = stored if self.source is None else self.source
        rows = torch.arange(len(source), device=device)
        edges = torch.tensor([*starts, n_features], device=device).unsqueeze(1) + source * n_features
        bounds = torch.searchsorted(key, edges)  # (blocks + 1, rows)
        lengths = bounds.diff(dim=0)
        before = lengths.cumsum(1) - lengths  # entries of the block in earlier rows
        shifts = bounds[:-1] - before
        for k, (start, total) in enumerate(zip(starts, lengths.sum(1).tolist(), strict=True)):
            stop = min(start + width, n_features)
            row = torch.repeat_interleave(rows, lengths[k], output_size=total)
            entry = torch.arange(total, device=device).add_(shifts[k].index_select(0, row))
            flat = self.col.index_select(0, entry).add_(row, alpha=stop - start).sub_(start)
            yield Block(start, stop, entry, row, flat)


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
    """Matrix products of one readout, in its precision, over blocks of its features."""

    def __init__(self, hidden: Tensor, weight: Tensor, gemm_dtype: torch.dtype | None) -> None:
        self.dtype = None if gemm_dtype in (None, hidden.dtype) else gemm_dtype
        self.hidden = hidden if self.dtype is None else hidden.to(self.dtype)
        self.weight = weight

    def block(self, features: slice) -> Tensor:
        """Weights of a block as the products take them; cast once, used for all its products."""
        weight = self.weight[features]
        return weight if self.dtype is None else weight.to(self.dtype)

    def logits(self, weight: Tensor, bias: Tensor, out: Tensor, scale: float = 1.0) -> None:
        """Write scale * (hidden @ weight.T + bias), shape (n, m)."""
        if self.dtype is None:
            torch.addmm(bias, self.hidden, weight.t(), beta=scale, alpha=scale, out=out)
        else:
            torch.add(bias, self.hidden @ weight.t(), out=out)
            if scale != 1.0:
                out.mul_(scale)

    def add_to_hidden(self, total: Tensor, residual: Tensor, weight: Tensor) -> None:
        """Add residual @ weight to ``total``, shape (n, H)."""
        if self.dtype is None:
            total.addmm_(residual, weight)
        else:
            total += residual @ weight

    def to_weight(self, residual: Tensor, weighted_hidden: Tensor, out: Tensor) -> None:
        """Write residual.T @ weighted_hidden, shape (m, H)."""
        if self.dtype is None:
            torch.mm(residual.t(), weighted_hidden, out=out)
        else:
            out.copy_(residual.t() @ weighted_hidden)

    def operand(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the precision of the products."""
        return tensor if self.dtype is None else tensor.to(self.dtype)
