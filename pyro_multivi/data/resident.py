"""Table of cells on the device that trains on it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells, tensors_in, with_changed_tensors
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.table import CellTable, cut

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
    >>> from pyro_multivi.data.sparse import SparseCounts
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
        # A table's parts are checked when it is made; on a device that would mean to wait for it.
        self._there = copy.copy(table)
        for name, value in with_changed_tensors(table, lambda part: part.to(self.device)).items():
            object.__setattr__(self._there, name, value)
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
            counts.append(cut(modality.counts_in(there), places, modality.n_features_in(there), total))
        return there.cells(places, n_total, counts, rows)

    def _send(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Positions, int64, on the device: in one copy, behind which the host goes on."""
        joined = torch.cat(parts)
        if self.device.type == "cuda":
            joined = joined.pin_memory()
        return joined.to(self.device, non_blocking=True).split([len(part) for part in parts])


def resident_if_it_fits(table: CellTable, device: torch.device) -> CellTable | ResidentTable:
    """The table on a GPU if it takes no more than a share of the memory that is free there; else as it is."""
    if device.type != "cuda" or table.on_disk:
        return table
    free, _ = torch.cuda.mem_get_info(device)
    return ResidentTable(table, device) if n_bytes(table) <= RESIDENT_SHARE * free else table


def n_bytes(table: CellTable) -> int:
    """Memory that a table takes."""
    return sum(part.untyped_storage().nbytes() for part in tensors_in(table))
