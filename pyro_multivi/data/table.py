"""A whole data set in memory, as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.marginals import Marginals
from pyro_multivi.data.minibatch import Cells, Measurement
from pyro_multivi.data.sparse import SparseCounts

# Cells read at a time for statistics: large enough to be fast, small beside any table.
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class CellTable:
    """All n cells of a data set, on the CPU; minibatches are cut from it.

    Attributes
    ----------
    x
        Gene counts, shape (n, G), or None if no cell has RNA. Values may be small integers here to
        save memory; those of minibatches are floating.
    y
        Peak counts, shape (n, M), or None if no cell has ATAC.
    has_rna, has_atac
        Whether the modality was measured, shape (n,), bool.
    design
        One-hot batch, then one-hot categorical covariates, then continuous covariates,
        shape (n, S), float32.
    batch_code
        Batch of each cell, shape (n,), int64; -1 where it is not known.
    n_genes, n_regions
        G and M, known also for a modality that is absent.
    n_batch
        Number of batches K: the width of the batch part of ``design``. 0 means the largest
        code plus one.
    label
        Label code of each cell, shape (n,), int64, or None.
    rna_size, atac_size
        Fixed size factors, shape (n,), or None.
    extra
        Other measurements of the n cells by name.

    Raises
    ------
    ValueError
        If the parts do not belong together: a shape that does not fit, cells marked as measured for a
        modality the table does not hold, or counts of a cell that is marked as not measured.

    Examples
    --------
    >>> table = CellTable(x=SparseCounts.from_dense(torch.tensor([[3.0, 0.0], [2.0, 2.0]])), y=None,
    ...                   has_rna=torch.tensor([True, True]), has_atac=torch.tensor([False, False]),
    ...                   design=torch.ones(2, 1), batch_code=torch.zeros(2, dtype=torch.long),
    ...                   n_genes=2, n_regions=3)
    >>> cells = table.batch(torch.tensor([1]))
    >>> cells.x.to_dense(), cells.y.shape, cells.n_total
    (tensor([[2., 2.]]), torch.Size([1, 3]), 2)
    """

    x: SparseCounts | None
    y: SparseCounts | None
    has_rna: Tensor
    has_atac: Tensor
    design: Tensor
    batch_code: Tensor
    n_genes: int
    n_regions: int
    n_batch: int = 0
    label: Tensor | None = None
    rna_size: Tensor | None = None
    atac_size: Tensor | None = None
    extra: Mapping[str, Measurement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_batch == 0:
            object.__setattr__(self, "n_batch", int(self.batch_code.max()) + 1 if len(self) else 1)
        for name in ("x", "y", "has_rna", "has_atac", "design", "label", "rna_size", "atac_size"):
            part = getattr(self, name)
            if part is not None and part.shape[0] != len(self):
                raise ValueError(
                    f"{name} holds {part.shape[0]} cells and batch_code {len(self)}: they must be the same."
                )
        for name, width_name, measured in (
            ("x", "n_genes", self.has_rna),
            ("y", "n_regions", self.has_atac),
        ):
            part, width = getattr(self, name), getattr(self, width_name)
            if part is not None and part.shape[1] != width:
                raise ValueError(
                    f"{name} has {part.shape[1]} columns and {width_name} is {width}: they must be the same."
                )
            if part is None and bool(measured.any()):
                raise ValueError(f"{name} is None, yet {int(measured.sum())} cells are marked as measured for it.")
            if part is not None and bool((surplus := (part.crow.diff() > 0) & ~measured).any()):
                raise ValueError(
                    f"{name} holds counts of {int(surplus.sum())} cells that are marked as not measured for it, the "
                    f"first at position {int(surplus.int().argmax())}: empty these rows, or correct the mark."
                )
        for name, measurement in self.extra.items():
            if any(len(part) != len(self) for part in measurement):
                raise ValueError(
                    f"extra[{name!r}] holds {len(measurement.values)} and {len(measurement.measured)} cells and "
                    f"batch_code {len(self)}: they must be the same."
                )

    def __len__(self) -> int:
        return len(self.batch_code)

    def batch(self, index: Tensor, n_total: int | None = None) -> Cells:
        """The cells at ``index`` as a minibatch; the cost grows with their stored counts only.

        Parameters
        ----------
        index
            Positions in the table, shape (B,), int64, in any order.
        n_total
            Number of cells the minibatch stands for; all of the table by default. Give the
            number of training cells when only those are fitted.
        """
        rna_rows, atac_rows = self.measured_rows(index)
        x, y = _cut(self.x, index, self.n_genes), _cut(self.y, index, self.n_regions)
        return self.cells(index, n_total, x, y, rna_rows, atac_rows)

    def measured_rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the cells at ``index`` have RNA, and which have ATAC: positions in ``index``, int64."""
        return self.has_rna[index].nonzero().squeeze(-1), self.has_atac[index].nonzero().squeeze(-1)

    def cells(
        self, index: Tensor, n_total: int | None, x: Tensor, y: Tensor, rna_rows: Tensor, atac_rows: Tensor
    ) -> Cells:
        """A minibatch of given counts of the cells at ``index`` and of all else that the table knows of them."""
        return Cells(
            index=index,
            n_total=len(self) if n_total is None else n_total,
            x=x,
            y=y,
            has_rna=self.has_rna[index],
            has_atac=self.has_atac[index],
            design=self.design[index],
            label=_take(self.label, index),
            rna_size=_take(self.rna_size, index),
            atac_size=_take(self.atac_size, index),
            extra={name: measurement.at(index) for name, measurement in self.extra.items()},
            rna_rows=rna_rows,
            atac_rows=atac_rows,
        )

    def subset(self, index: Tensor) -> CellTable:
        """A table of the cells at ``index`` (int64), in that order, with the same features and batches."""
        taken: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, SparseCounts):
                value = value.select_rows(index)
            elif isinstance(value, Tensor):
                value = value[index]
            taken[entry.name] = value
        taken["extra"] = {name: measurement.at(index) for name, measurement in self.extra.items()}
        return CellTable(**taken)

    def marginals(self, index: Tensor | None = None) -> Marginals:
        """Statistics over the measured cells among ``index`` (all cells by default)."""
        every = torch.arange(len(self)) if index is None else index
        blocks = (self.batch(part) for part in every.split(_BLOCK) if len(part))
        return Marginals.of(blocks, self.n_batch)


def _cut(counts: SparseCounts | None, index: Tensor, width: int) -> SparseCounts:
    if counts is None:
        return no_counts(len(index), width, index.device)
    return floating(counts.select_rows(index))


def no_counts(n: int, width: int, device: torch.device) -> SparseCounts:
    """Empty rows of n cells, for a modality that no cell has."""
    crow = torch.zeros(n + 1, dtype=torch.int32, device=device)
    return SparseCounts(crow, crow[:0], torch.zeros(0, device=device), (n, width))


def floating(counts: SparseCounts) -> SparseCounts:
    """The same counts as networks read them: float32 unless they are floating already."""
    return counts if counts.val.is_floating_point() else counts.to(torch.float32)


def _take(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]
