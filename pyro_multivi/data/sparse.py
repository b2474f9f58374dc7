"""Counts as a tensor to everyone and as compressed rows inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class ByFeature(NamedTuple):
    """The same entries ordered by feature: those of features a..b are one slice.

    Attributes
    ----------
    start
        Where each feature's entries begin, shape (features + 1,), int64.
    row
        Cell of each entry, shape (nnz,), int64.
    val
        The entries, shape (nnz,).
    """

    start: Tensor
    row: Tensor
    val: Tensor


class SparseCounts(torch.Tensor):
    """A (cells, features) tensor of counts, held as compressed sparse rows.

    To Pyro and torch it is an ordinary tensor: any operation on it sees the dense values.
    Code that knows better reads :attr:`crow`, :attr:`col` and :attr:`val` and never
    makes the dense matrix. Three plain tensors are held rather than a ``torch.sparse_csr``
    tensor, which Pyro's inspection and prediction paths cannot carry.

    Parameters
    ----------
    crow
        Row pointers, shape (cells + 1,), int64.
    col
        Column of each stored entry, shape (nnz,), int64, ascending within a row.
    val
        Stored entries, shape (nnz,), floating, none of them zero.
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
        made: SparseCounts = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=val.dtype, device=val.device
        )
        return made

    def __init__(self, crow: Tensor, col: Tensor, val: Tensor, shape: tuple[int, int]) -> None:
        self.crow, self.col, self.val = crow, col, val
        # Filled by the first by_feature(); the list is shared with copies that differ in values only.
        self._order: list[tuple[Tensor, Tensor, Tensor]] = []

    @classmethod
    def from_dense(cls, dense: Tensor) -> SparseCounts:
        """Compress a dense (cells, features) tensor."""
        rows, col = dense.nonzero(as_tuple=True)
        crow = torch.zeros(len(dense) + 1, dtype=torch.long, device=dense.device)
        crow[1:] = torch.bincount(rows, minlength=len(dense)).cumsum(0)
        return cls(crow, col, dense[rows, col], (dense.shape[0], dense.shape[1]))

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
        """The same places with other entries, shape (nnz,)."""
        made = SparseCounts(self.crow, self.col, val, (self.shape[0], self.shape[1]))
        made._order = self._order
        return made

    def row_sums(self) -> Tensor:
        """Sum over features, shape (cells,)."""
        sums = self.val.new_zeros(self.shape[0])
        return sums.index_add_(0, self.rows(), self.val)

    def select_rows(self, index: Tensor) -> SparseCounts:
        """The rows at ``index`` (int64), in that order."""
        start, length = self.crow[:-1][index], self.crow.diff()[index]
        crow = torch.zeros(len(index) + 1, dtype=torch.long, device=index.device)
        torch.cumsum(length, 0, out=crow[1:])
        # Position of each entry: its offset inside the row plus where the row starts in the source.
        total = int(crow[-1])
        shift = torch.repeat_interleave(start - crow[:-1], length, output_size=total)
        take = torch.arange(total, device=index.device) + shift
        return SparseCounts(crow, self.col[take], self.val[take], (len(index), self.shape[1]))

    def by_feature(self) -> ByFeature:
        """Entries ordered by feature.

        The order depends on the places alone, so it is found once and shared by every
        :meth:`with_values` copy; a loader asks for it ahead of the step.
        """
        if not self._order:
            self._order.append(self._feature_order())
        start, row, order = self._order[0]
        return ByFeature(start, row, self.val[order])

    def _feature_order(self) -> tuple[Tensor, Tensor, Tensor]:
        n_stored, n_features = len(self.col), self.shape[1]
        if self.col.device.type == "cpu":
            # SciPy's counting sort is several times faster than a stable argsort.
            place = np.arange(n_stored, dtype=np.int64)
            rows = scipy.sparse.csr_array((place, self.col.numpy(), self.crow.numpy()), shape=(len(self), n_features))
            cols = rows.tocsc()
            start, row, order = (torch.from_numpy(part) for part in (cols.indptr, cols.indices, cols.data))
            return start.long(), row.long(), order
        order = torch.argsort(self.col, stable=True)
        start = torch.zeros(n_features + 1, dtype=torch.long, device=self.col.device)
        start[1:] = torch.bincount(self.col, minlength=n_features).cumsum(0)
        return start, self.rows()[order], order

    def _map(self, change: Callable[[Tensor], Tensor]) -> SparseCounts:
        shape = (self.shape[0], self.shape[1])
        return SparseCounts(change(self.crow), change(self.col), change(self.val), shape)

    def to(self, *args: Any, **kwargs: Any) -> SparseCounts:
        """Move or cast; a dtype applies to the values only."""
        val = self.val.to(*args, **kwargs)
        overlap = bool(kwargs.get("non_blocking", False))
        crow = self.crow.to(val.device, non_blocking=overlap)
        col = self.col.to(val.device, non_blocking=overlap)
        return SparseCounts(crow, col, val, (self.shape[0], self.shape[1]))

    def pin_memory(self, *_: Any) -> SparseCounts:
        """Copy to page-locked memory."""
        return self._map(lambda part: part.pin_memory())

    def as_subclass(self, cls: Any) -> Any:
        """The dense values as another tensor class (Pyro's provenance tracking asks for this)."""
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
