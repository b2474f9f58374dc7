"""Blocks of features that fit in the processor's cache, and the non-zero values in each of them.

A likelihood of B cells over F features goes through the blocks in order. Within a block it forms
the value and the gradients at once, while all operands are in the cache, and writes only sums
and products with the factors of the readout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts

# Elements of one block buffer, by measurement (128 cells: 4096 features). Half of it is as fast in
# float32 and 8 % slower in bfloat16, a quarter 10-20 % slower. An accelerator is fastest with few, large launches,
# and the host waits for it where there is more than one block (512 cells: 131 072 features, 256 MB of float32).
CPU_BLOCK_ELEMENTS = 2**19
DEVICE_BLOCK_ELEMENTS = 2**26
MIN_WIDTH = 256  # below this the matrix products become inefficient


def block_width(n_rows: int, n_features: int, device: torch.device) -> int:
    """Number of features per block."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else DEVICE_BLOCK_ELEMENTS
    width = elements // max(n_rows, 1) // 64 * 64
    return max(1, min(max(width, MIN_WIDTH), n_features))


@dataclass(frozen=True)
class Block:
    """Features ``start`` to ``stop`` and the stored entries among them.

    ``entries`` is their slice of the arrays of ``all_entries``.
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
        Rows to take, in this order, possibly repeated, shape (n,), int64; None for all.

    Attributes
    ----------
    n_rows, n_features
        Cells and features.
    start
        First entry of each feature, and the number of entries, shape (features + 1,).
    row
        Cell of each entry, shape (entries,).
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
        """Feature of each entry, shape (entries,)."""
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
        first = times.cumsum(0) - times  # first place of a stored row among the chosen ones
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
        """Value of each entry, shape (entries,)."""
        val = self._counts.by_feature().val
        return val if self._entry is None else val.index_select(0, self._entry)

    def blocks(self, width: int) -> Iterator[Block]:
        """Blocks of ``width`` features in order."""
        n_features = self.n_features
        # A single block holds all entries: the host need not wait for an accelerator.
        edges = [0] if n_features <= width else self.start[:-1:width].tolist()
        edges.append(len(self.row))
        for k, start in enumerate(range(0, n_features, width)):
            yield Block(start, min(start + width, n_features), slice(edges[k], edges[k + 1]), self)


def sum_of_logs(factors_mn: Tensor) -> Tensor | None:
    """Sum over features of log |factor|, shape (n,), for factors of at most 1; they are overwritten.

    A logarithm costs several times a product, so it is taken of products of eight. None if one of
    these came near to underflow: then logarithms have to be taken one by one.
    """
    m = len(factors_mn)
    for _ in range(3):
        half = m // 2
        factors_mn[:half].mul_(factors_mn[m - half : m])
        m -= half
    return sum_of_logs_of_products(factors_mn[:m].abs_())


def sum_of_logs_of_products(products_gn: Tensor) -> Tensor | None:
    """Sum of the logarithms of absolute products, shape (n,): second half of :func:`sum_of_logs`."""
    if not products_gn.numel():
        return products_gn.new_zeros(products_gn.shape[1])
    smallest = float(torch.finfo(products_gn.dtype).tiny ** 0.7)  # 1e-26 in float32: still with all digits
    return products_gn.log_().sum(0) if float(products_gn.amin()) > smallest else None
