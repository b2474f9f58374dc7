"""Counts as a tensor to everyone and as compressed rows inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

#: Largest count that data may have. In single precision sums of log-probabilities are good to 1e-7 of the count, which
#: is 0.1 nats here; and the deepest cells have a few million reads in all.
MOST_COUNTS = 10**6


class ByFeature(NamedTuple):
    """Entries ordered by feature: those of features a..b are one slice.

    Attributes
    ----------
    start
        Where each feature's entries begin, shape (features + 1,), int32.
    row
        Cell of each entry, shape (nnz,), int32.
    val
        The entries, shape (nnz,).
    """

    start: Tensor
    row: Tensor
    val: Tensor


class _FeatureOrder(NamedTuple):
    """:class:`ByFeature` of any values: ``order`` is where they lie in the rows, None if they are all the same."""

    start: Tensor
    row: Tensor
    order: Tensor | None


class SparseCounts(torch.Tensor):
    """A (cells, features) tensor of counts, held as compressed sparse rows.

    To Pyro and torch it is an ordinary tensor: any operation on it sees the dense values.
    Code written for it reads :attr:`crow`, :attr:`col` and :attr:`val` and never
    makes the dense matrix. Three plain tensors are held rather than a ``torch.sparse_csr``
    tensor, which Pyro's inspection and prediction paths cannot carry.

    Parameters
    ----------
    crow
        Row pointers, shape (cells + 1,), int32 or int64.
    col
        Column of each stored entry, shape (nnz,), int32 or int64, ascending within a row.
    val
        Stored entries, shape (nnz,), none of them zero; floating, or small integers in a table.
    shape
        (cells, features).

    Examples
    --------
    >>> counts = SparseCounts.from_dense(torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    >>> counts.shape, counts.val
    (torch.Size([2, 2]), tensor([2.]))
    >>> counts.sum()
    tensor(2.)
    """

    crow: Tensor
    col: Tensor
    val: Tensor

    @staticmethod
    def __new__(cls, crow: Tensor, col: Tensor, val: Tensor, shape: tuple[int, int]) -> SparseCounts:
        """A tensor without storage of its own: its entries are attributes."""
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=val.dtype, device=val.device)

    def __init__(self, crow: Tensor, col: Tensor, val: Tensor, shape: tuple[int, int]) -> None:
        self.crow, self.col, self.val = crow, col, val
        # Filled by the first by_feature(); the list is shared with copies that differ in values only.
        self._order: list[_FeatureOrder] = []

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCounts:
        """Compress a dense (cells, features) tensor."""
        rows, col = dense.nonzero(as_tuple=True)
        crow = torch.zeros(len(dense) + 1, dtype=torch.long, device=dense.device)
        crow[1:] = torch.bincount(rows, minlength=len(dense)).cumsum(0)
        return cls(crow, col, dense[rows, col], (dense.shape[0], dense.shape[1]))

    @classmethod
    def of(cls, counts: Tensor) -> SparseCounts:
        """Counts that are compressed already, as they are; others compressed."""
        return counts if isinstance(counts, SparseCounts) else cls.from_dense(counts)

    def rows(self) -> Tensor:
        """Row of each stored entry, shape (nnz,)."""
        index = torch.arange(self.shape[0], device=self.val.device)
        return torch.repeat_interleave(index, self.crow.diff(), output_size=self.col.shape[0])

    def to_dense(self, *_: Any, **__: Any) -> Tensor:
        """The ordinary tensor, shape (cells, features)."""
        dense = self.val.new_zeros(tuple(self.shape))
        dense[self.rows(), self.col] = self.val
        return dense

    def with_values(self, val: Tensor) -> SparseCounts:
        """Counts with other entries at the same places, shape (nnz,)."""
        made = SparseCounts(self.crow, self.col, val, (self.shape[0], self.shape[1]))
        made._order = self._order
        return made

    def row_sums(self) -> Tensor:
        """Sum over features, shape (cells,)."""
        if self.val.device.type == "cpu" and self.val.is_floating_point():
            # A fifth of the time, but on a GPU the host would wait for it, and it does not take whole numbers.
            return torch.segment_reduce(self.val.contiguous(), "sum", offsets=self.crow.long(), initial=0.0)
        # Counts of one byte each would overflow.
        val = self.val if self.val.is_floating_point() else self.val.long()
        return val.new_zeros(self.shape[0]).index_add_(0, self.rows(), val)

    @property
    def largest(self) -> float:
        """The largest entry, 0 without any."""
        return float(self.val.max()) if len(self.val) else 0.0

    @property
    def whole(self) -> bool:
        """Whether all entries are whole numbers."""
        return not self.val.is_floating_point() or bool((self.val == self.val.floor()).all())

    def binary(self) -> SparseCounts:
        """1 at every stored entry; no memory is written for it."""
        return self.with_values(_repeated(self.val.new_ones(()), len(self.col)))

    def select_rows(self, index: Tensor) -> SparseCounts:
        """The rows at ``index`` (int64), in that order; on a device other than the CPU it is waited for."""
        start, stop = self.crow[:-1][index], self.crow[1:][index]
        total = int((stop - start).sum())
        if self.col.device.type != "cpu":
            return self.gather_rows(index, total)
        crow = torch.zeros(len(index) + 1, dtype=_index_dtype(total))
        torch.cumsum(stop - start, 0, out=crow[1:])
        slices = list(map(slice, start.tolist(), stop.tolist()))
        col = _joined(self.col, slices)
        val = _repeated(self.val[0], total) if _is_repeated(self.val) else _joined(self.val, slices)
        return SparseCounts(crow, col, val, (len(index), self.shape[1]))

    def gather_rows(self, index: Tensor, total: int) -> SparseCounts:
        """The rows at ``index`` (int64, on the same device), which hold ``total`` entries.

        By arithmetic alone, so that the host does not wait for the device.
        """
        device = self.col.device
        start = self.crow[:-1].index_select(0, index)
        length = self.crow[1:].index_select(0, index) - start
        crow = torch.zeros(len(index) + 1, dtype=_index_dtype(total), device=device)
        torch.cumsum(length, 0, out=crow[1:])
        # Position of each entry: its offset inside the row plus where the row starts in the source.
        take = torch.arange(total, device=device)
        take += torch.repeat_interleave(start - crow[:-1], length, output_size=total)
        val = _repeated(self.val[0], total) if _is_repeated(self.val) else self.val.index_select(0, take)
        return SparseCounts(crow, self.col.index_select(0, take), val, (len(index), self.shape[1]))

    def without_empty(self, kept: Tensor) -> SparseCounts:
        """The rows at ``kept`` (ascending, int64): nothing is copied, no device is waited for.

        All other rows have to be empty, which is not checked.
        """
        crow = torch.cat([self.crow[:-1].index_select(0, kept), self.crow[-1:]])
        made = SparseCounts(crow, self.col, self.val, (len(kept), self.shape[1]))
        for order in self._order:
            place = torch.zeros(self.shape[0], dtype=order.row.dtype, device=kept.device)
            place.index_copy_(0, kept, torch.arange(len(kept), dtype=order.row.dtype, device=kept.device))
            made._order.append(order._replace(row=place.index_select(0, order.row)))
        return made

    def by_feature(self) -> ByFeature:
        """Entries ordered by feature."""
        found = self.order_by_feature()
        val = self.val if found.order is None else self.val.index_select(0, found.order)
        return ByFeature(found.start, found.row, val)

    def order_by_feature(self) -> _FeatureOrder:
        """Find the order that :meth:`by_feature` needs.

        It depends on the places alone, so it is found once and shared by every :meth:`with_values` copy; a
        loader finds it ahead of the step.
        """
        if not self._order or (self._order[0].order is None and not _is_repeated(self.val)):
            self._order[:] = [self._counted_order() if self.col.device.type == "cpu" else self._sorted_order()]
        return self._order[0]

    def _counted_order(self) -> _FeatureOrder:
        """By SciPy's counting sort: several times faster than a stable argsort."""
        kind = _index_dtype(len(self.col))
        # Twice as fast again with next to nothing to carry along: one value, repeated, is in any order.
        n, repeated = len(self.col), _is_repeated(self.val)
        carried = torch.ones(n, dtype=torch.int8) if repeated else torch.arange(n, dtype=kind)
        inside = (carried.numpy(), self.col.to(kind).numpy(), self.crow.to(kind).numpy())
        cols = scipy.sparse.csr_array(inside, shape=(self.shape[0], self.shape[1])).tocsc()
        start, row, order = (torch.from_numpy(part) for part in (cols.indptr, cols.indices, cols.data))
        return _FeatureOrder(start, row, None if repeated else order)

    def _sorted_order(self) -> _FeatureOrder:
        """By sorting; without bincount, for which a GPU has to be waited for."""
        col, order = torch.sort(self.col, stable=True)
        edges = torch.arange(self.shape[1] + 1, dtype=col.dtype, device=col.device)
        start = torch.searchsorted(col, edges, out_int32=True)
        return _FeatureOrder(start, self.rows().int().index_select(0, order), order)

    def parts(self) -> tuple[Tensor, ...]:
        """All tensors that this one is made of."""
        return (self.crow, self.col, self.val, *(part for order in self._order for part in order if part is not None))

    def _map(self, change: Callable[[Tensor], Tensor]) -> SparseCounts:
        shape = (self.shape[0], self.shape[1])
        return SparseCounts(change(self.crow), change(self.col), _keeping_repeats(change, self.val), shape)

    def to(self, *args: Any, **kwargs: Any) -> SparseCounts:
        """Move or cast; a dtype applies to the values only."""
        val = _keeping_repeats(lambda part: part.to(*args, **kwargs), self.val)
        overlap = bool(kwargs.get("non_blocking", False))
        crow = self.crow.to(val.device, non_blocking=overlap)
        col = self.col.to(val.device, non_blocking=overlap)
        return SparseCounts(crow, col, val, (self.shape[0], self.shape[1]))

    def pin_memory(self, *_: Any) -> SparseCounts:
        """Copy to page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def as_subclass(self, cls: Any) -> Any:
        """The dense values as another tensor class (needed by Pyro's provenance tracking)."""
        return self.to_dense().as_subclass(cls)

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """The dense values as a NumPy array."""
        return self.to_dense().numpy(*args, **kwargs)

    def tolist(self) -> Any:
        """The dense values as nested lists."""
        return self.to_dense().tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SparseCounts, (self.crow, self.col, self.val, tuple(self.shape))

    def __deepcopy__(self, memo: Any) -> SparseCounts:
        return self._map(torch.clone)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"SparseCounts(shape={tuple(self.shape)}, nnz={len(self.val)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]._map(lambda part: part)

        def dense(value: Any) -> Any:
            return value.to_dense() if isinstance(value, SparseCounts) else value

        return func(*tree_map(dense, args), **tree_map(dense, kwargs or {}))


def _index_dtype(n_entries: int) -> torch.dtype:
    # Half the traffic, and of one type with the columns.
    return torch.int32 if n_entries <= torch.iinfo(torch.int32).max else torch.int64


def _joined(values: Tensor, slices: list[slice]) -> Tensor:
    """Slices of a tensor, one after the other: a plain copy, many times faster than index arithmetic."""
    source = values.detach().numpy()
    return torch.from_numpy(np.concatenate([source[part] for part in slices] or [source[:0]]))


def _repeated(value: Tensor, n: int) -> Tensor:
    """One value n times, held once."""
    return value.reshape(1).expand(n)


def _is_repeated(values: Tensor) -> bool:
    return len(values) > 0 and values.stride(0) == 0


def _keeping_repeats(change: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return _repeated(change(values[:1]), len(values)) if _is_repeated(values) else change(values)
