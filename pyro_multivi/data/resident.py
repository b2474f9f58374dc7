"""Table of cells on the device that trains on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells, Measurement
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable, floating, no_counts

#: Share of a device's free memory that the counts may take: weights, gradients, the optimiser's
#: moments and the buffers of a step need the rest.
RESIDENT_SHARE = 0.5


class ResidentTable:
    """All cells of a table on a device; minibatches are cut there, and the host does not wait for it.

    The host keeps the number of counts of each cell and the modalities it was measured in, and with them
    the size of every result before the device has made it. Only the positions of its cells travel for a
    minibatch.

    Parameters
    ----------
    table
        The data set; it stays where it is, too.
    device
        Where to put a copy.

    Examples
    --------
    >>> table = CellTable(x=SparseCounts.from_dense(torch.tensor([[3.0, 0.0], [2.0, 2.0]])), y=None,
    ...                   has_rna=torch.tensor([True, True]), has_atac=torch.tensor([False, False]),
    ...                   design=torch.ones(2, 1), batch_code=torch.zeros(2, dtype=torch.long),
    ...                   n_genes=2, n_regions=3)
    >>> ResidentTable(table, "cpu").batch(torch.tensor([1])).x.to_dense()
    tensor([[2., 2.]])
    """

    def __init__(self, table: CellTable, device: torch.device | str) -> None:
        self.table = table
        self.device = torch.device(device)
        self._there = _map(table, lambda part: part.to(self.device))
        counts = [modality.counts_in(table) for modality in MODALITIES]
        self._lengths = [None if part is None else part.crow.diff() for part in counts]

    def __len__(self) -> int:
        return len(self.table)

    def batch(self, index: Tensor, n_total: int | None = None) -> Cells:
        """The same as :meth:`CellTable.batch <pyro_multivi.data.table.CellTable.batch>`, on the device.

        Parameters
        ----------
        index
            Positions in the table, shape (B,), int64, on the CPU.
        n_total
            Number of cells the minibatch stands for; all of the table by default.
        """
        places, *rows = self._send(index, *self.table.measured_rows(index))
        there, counts = self._there, []
        for modality, length in zip(MODALITIES, self._lengths, strict=True):
            total = 0 if length is None else int(length[index].sum())
            counts.append(self._cut(modality.counts_in(there), places, total, modality.n_features_in(there)))
        return there.cells(places, n_total, counts, rows)

    def _send(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Positions, int64, on the device: in one copy, behind which the host goes on."""
        joined = torch.cat(parts)
        if self.device.type == "cuda":
            joined = joined.pin_memory()
        return joined.to(self.device, non_blocking=True).split([len(part) for part in parts])

    def _cut(self, counts: SparseCounts | None, index: Tensor, total: int, width: int) -> SparseCounts:
        if counts is None:
            return no_counts(len(index), width, self.device)
        return floating(counts.gather_rows(index, total))


def resident_if_it_fits(
    table: CellTable, device: torch.device, share: float = RESIDENT_SHARE
) -> CellTable | ResidentTable:
    """The table on a GPU if it takes no more than a share of the memory that is free there; else as it is."""
    if device.type != "cuda":
        return table
    free, _ = torch.cuda.mem_get_info(device)
    return ResidentTable(table, device) if n_bytes(table) <= share * free else table


def n_bytes(table: CellTable) -> int:
    """Memory that a table takes."""
    sizes: list[int] = []

    def add(part: Tensor) -> Tensor:
        pieces = part.parts() if isinstance(part, SparseCounts) else (part,)
        sizes.extend(piece.untyped_storage().nbytes() for piece in pieces)
        return part

    _map(table, add)
    return sum(sizes)


def _map(table: CellTable, change: Callable[[Tensor], Tensor]) -> CellTable:
    # A table's parts are checked when it is made; on a device that would mean to wait for it.
    changed = copy.copy(table)
    for entry in fields(table):
        value = getattr(table, entry.name)
        if isinstance(value, Tensor):
            object.__setattr__(changed, entry.name, change(value))
    extra = {name: Measurement(*map(change, part)) for name, part in table.extra.items()}
    object.__setattr__(changed, "extra", extra)
    return changed
