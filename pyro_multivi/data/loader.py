"""Minibatches of a data set."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from pyro_multivi.data.checks import checked
from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.modality import MODALITIES, Modality, modelled
from pyro_multivi.data.resident import ResidentTable
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.passes import block_order, cells_from_disk, dealt_blocks
from pyro_multivi.data.table import CellTable


def spread(index: Tensor, n: int) -> Tensor:
    """At most n of some positions, spread over all of them, because their order may mean something."""
    return index if len(index) <= n else index[torch.linspace(0, len(index) - 1, n).long()]


def measured(minibatches: Minibatches, modality: Modality) -> Tensor:
    """Positions of the cells in which a modality was measured, (n,), int64."""
    return minibatches.index[modality.measured_in(minibatches.table)[minibatches.index]]


def never_measured(minibatches: Minibatches, modality: Modality) -> Tensor:
    """Positions of the features that were measured in none of the cells with a modality, (f,), int64."""
    panels: Panels | None = modality.panels_in(minibatches.table)
    if panels is None:
        return torch.zeros(0, dtype=torch.int64)
    [features] = torch.where(~panels.measured[panels.code[measured(minibatches, modality)].unique()].any(0))
    return features


def paired(minibatches: Minibatches) -> Tensor:
    """Positions of the cells in which every modality of the data was measured, (n,), int64."""
    table, index = minibatches.table, minibatches.index
    return index[torch.stack([modality.measured_in(table)[index] for modality in modelled(table)]).all(0)]


def default_batch_size(n_cells: int) -> int:
    """Cells per training step: a power of two near n / 16, from 32 to 128.

    Few cells make few steps per epoch, and held-out cells are scored once per epoch.

    Examples
    --------
    >>> default_batch_size(1000), default_batch_size(100_000)
    (64, 128)
    """
    return int(min(128, max(32, 2 ** round(math.log2(max(n_cells, 1) / 16)))))


#: Cells in a row on disk that are read at once, and blocks of them that are shuffled among themselves: a minibatch of
#: 128 has cells from most of the 64 blocks. A buffer of 8192 cells with 3000 counts each takes 120 MB.
SHUFFLE_BLOCK, SHUFFLE_BUFFER = 128, 64


class Minibatches:
    """Iterate over some cells of a table, again and again.

    For a GPU the next minibatch is cut, and copied by way of page-locked memory, in a thread of its own while
    the current one is used; a table that already lies on a device is cut there, which is no work for the host.

    Parameters
    ----------
    table
        The data set.
    index
        Cells to visit, (n,), int64; the plate of every minibatch has size n. Default: all.
    batch_size
        Cells per minibatch. A last minibatch of one cell joins the one before it, because batch
        statistics of one cell do not exist.
    shuffle
        Visit the cells in a new random order each time.
    seed
        Of the order.
    shuffle_block, shuffle_buffer
        Of a table on disk: cells in a row that are read at once, and blocks of them that are shuffled among themselves;
        see :func:`~pyro_multivi.data.stores.passes.block_order`. Two buffers are in memory at most.
    device
        Where the minibatches go; those of a table that lies on a device stay there.

    Examples
    --------
    >>> table = CellTable(x=SparseCounts.from_dense(torch.ones(5, 2)), y=None,
    ...                   has_rna=torch.ones(5, dtype=torch.bool), has_atac=torch.zeros(5, dtype=torch.bool),
    ...                   design=torch.ones(5, 1), batch_code=torch.zeros(5, dtype=torch.long),
    ...                   n_genes=2, n_regions=0)
    >>> [len(cells) for cells in Minibatches(table, batch_size=2)]
    [2, 3]
    """

    @checked
    def __init__(
        self,
        table: CellTable | ResidentTable,
        index: Tensor | None = None,
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        seed: int = 0,
        shuffle_block: int = SHUFFLE_BLOCK,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        device: torch.device | str = "cpu",
    ) -> None:
        #: The table on the host, also where minibatches are cut from a copy of it on a device.
        self.table: CellTable = table.table if isinstance(table, ResidentTable) else table
        self._source = table
        self.index = torch.arange(len(table)) if index is None else index
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.device = table.device if isinstance(table, ResidentTable) else torch.device(device)
        self._block = shuffle_block
        # Whole minibatches, so that none is cut from two buffers.
        self._at_once = max(1, round(shuffle_block * shuffle_buffer / batch_size))
        self._generator = torch.Generator().manual_seed(seed)
        # Number of this process, and of those that share each minibatch.
        self._rank, self._n_shares = 0, 1

    def shared(self, rank: int, size: int) -> Minibatches:
        """Share of one of several processes in these minibatches, in the same order.

        A minibatch still stands for all cells. Shares differ by one cell at most and have two or more, for batch
        statistics: the rest of a pass joins the minibatch before it sooner.

        Raises
        ------
        ValueError
            If there are too few cells for so many processes.
        """
        least = 2 * size
        if size > 1 and len(self.index) < least:
            raise ValueError(
                f"{len(self.index)} cells are too few for {size} processes, of which each needs two: start at most "
                f"{len(self.index) // 2 or 1}."
            )
        if size > 1 and self.batch_size < least:
            raise ValueError(
                f"batch_size={self.batch_size} is too small for {size} processes, which share each minibatch: give at "
                f"least {least}, two cells for each."
            )
        shared = copy.copy(self)
        shared._rank, shared._n_shares = rank, size
        return shared

    @property
    def n_cells(self) -> int:
        """Number of cells visited in one pass."""
        return len(self.index)

    @property
    def cell_names(self) -> list[str]:
        """Names of the cells, in the order of ``index``."""
        return [self.table.cell_names[place] for place in self.index.tolist()]

    def __len__(self) -> int:
        return len(self.sizes())

    def sizes(self) -> list[int]:
        """Numbers of cells of the minibatches, over all who share them."""
        full, rest = divmod(len(self.index), self.batch_size)
        sizes = [self.batch_size] * full
        if rest < 2 * self._n_shares and sizes and self.batch_size > 1:
            sizes[-1] += rest
        elif rest:
            sizes.append(rest)
        return sizes

    @property
    def order_state(self) -> Tensor:
        """State of the generator that the order of the next pass is drawn from; may be set."""
        return self._generator.get_state()

    @order_state.setter
    def order_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def __iter__(self) -> Iterator[Cells]:
        yield from self.after(0)

    def after(self, n: int) -> Iterator[Cells]:
        """The next pass without its first n minibatches, which are not cut."""
        parts = self.parts()[n:]
        if self.table.on_disk:
            for cells in cells_from_disk(self.table, parts, self.n_cells, self._at_once):
                yield self._prepared(self._sent(cells))
        elif self.device.type == "cuda" and not isinstance(self._source, ResidentTable):
            yield from self._ahead(parts, torch.cuda.Stream(self.device))
        else:
            # On a CPU not ahead of the step: with another thread's OpenMP team there are more threads than cores, and
            # the step's own threads then wait for each other by sleeping, which costs ten times what cutting does.
            yield from map(self.cut, parts)

    def _sent(self, cells: Cells) -> Cells:
        if self.device.type == "cuda":
            return cells.pin_memory().to(self.device, non_blocking=True)
        return cells.to(self.device)

    def parts(self) -> list[Tensor]:
        """Positions of the cells of each minibatch of the next pass, or of its share."""
        order = self.index
        if self.shuffle and self.table.on_disk and len(order) and self._n_shares > 1:
            sizes = self.sizes()
            order = dealt_blocks(order, self._block, sizes, self._at_once, self._n_shares, self._generator)
        elif self.shuffle and self.table.on_disk and len(order):
            order = block_order(order, self._block, self._at_once * self.batch_size, self._generator)
        elif self.shuffle:
            order = order[torch.randperm(len(order), generator=self._generator)]
        parts = list(order.split(self.sizes())) if len(order) else []
        return [part.tensor_split(self._n_shares)[self._rank] for part in parts] if self._n_shares > 1 else parts

    def cut(self, index: Tensor) -> Cells:
        """The cells at ``index``, positions in the table, as a minibatch on the device."""
        return self._prepared(self._source.batch(index, n_total=self.n_cells).to(self.device))

    def _ahead(self, parts: Sequence[Tensor], copies: torch.cuda.Stream) -> Iterator[Cells]:
        """Minibatches, each cut and copied, in a stream beside the step, while the one before is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="minibatch") as pool:
            ahead = [pool.submit(self._cut, part, copies) for part in parts[:1]]
            for place in range(len(parts)):
                cells = ahead.pop().result()
                # Before the next copy begins, so that only this one is waited for: by the device, not the host.
                step = torch.cuda.current_stream(self.device)
                step.wait_stream(copies)
                for part in cells.parts():
                    part.record_stream(step)
                if place + 1 < len(parts):
                    ahead.append(pool.submit(self._cut, parts[place + 1], copies))
                yield cells

    def _cut(self, index: Tensor, copies: torch.cuda.Stream) -> Cells:
        cells = self._source.batch(index, n_total=self.n_cells).pin_memory()
        with torch.cuda.stream(copies):
            return self._prepared(cells.to(self.device, non_blocking=True))

    @staticmethod
    def _prepared(cells: Cells) -> Cells:
        """Find the order of the entries by feature, ahead of encoders, likelihoods and the backward pass."""
        for modality in MODALITIES:
            counts = modality.counts_in(cells)
            if isinstance(counts, SparseCounts):
                counts.order_by_feature()
        return cells
