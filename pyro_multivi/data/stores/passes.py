"""Passes over cells on disk: an order that reads blocks of neighbours, and minibatches cut from what was read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.stores.rows import RowSlices
from pyro_multivi.data.table import CellTable, cut


def block_order(index: Tensor, block: int, buffer: int, generator: torch.Generator) -> Tensor:
    """Order of cells by blocks: shuffled, and the cells of several blocks in a row shuffled among themselves.

    A buffer of k blocks is a sample of the data as good as k random cells at worst, where neighbours in the file are
    alike, and as all its cells at best. Blocks begin elsewhere in each pass, so that neighbours do not stay together.

    Parameters
    ----------
    index
        Cells, (n,), int64, best ascending.
    block
        Cells in a row that are read at once.
    buffer
        Cells that are shuffled among themselves. With all of them in one buffer, the order is any.
    generator
        Of random numbers.

    Examples
    --------
    >>> block_order(torch.arange(8), 2, 4, torch.Generator().manual_seed(0)).sort().values.tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return torch.cat([_shuffled(cells, generator) for cells in _in_blocks(index, block, generator).split(buffer)])


def dealt_blocks(
    index: Tensor, block: int, sizes: Sequence[int], at_once: int, n_shares: int, generator: torch.Generator
) -> Tensor:
    """Order of cells as of :func:`block_order` for several processes, of which each reads blocks of its own.

    Of every buffer a process gets other blocks, at random. Minibatches are the sizes in turn, and the shares of one are
    those of ``tensor_split``.

    Parameters
    ----------
    index, block, generator
        As there.
    sizes
        Numbers of cells of the minibatches, over all processes.
    at_once
        Minibatches that are cut from one buffer.
    n_shares
        Number of processes.

    Examples
    --------
    >>> order = dealt_blocks(torch.arange(8), 2, [4, 4], 2, 2, torch.Generator().manual_seed(0))
    >>> [sorted(torch.cat([part.tensor_split(2)[rank] for part in order.split(4)]).tolist()) for rank in (0, 1)]
    [[1, 3, 4, 7], [0, 2, 5, 6]]
    """
    cells, dealt = _in_blocks(index, block, generator), []
    for first in range(0, len(sizes), at_once):
        # Cells of each process in each minibatch.
        share_kp = [
            [size // n_shares + (p < size % n_shares) for p in range(n_shares)] for size in sizes[first:][:at_once]
        ]
        totals = [sum(column) for column in zip(*share_kp, strict=True)]
        own, cells = cells.split([sum(totals), len(cells) - sum(totals)])
        runs = [_shuffled(run, generator) for run in own.split(totals)]
        pieces = [run.split(list(column)) for run, column in zip(runs, zip(*share_kp, strict=True), strict=True)]
        dealt += [pieces[p][k] for k in range(len(share_kp)) for p in range(n_shares)]
    return torch.cat(dealt)


def _in_blocks(index: Tensor, block: int, generator: torch.Generator) -> Tensor:
    """Cells block after block, the blocks in a random order."""
    first = min(int(torch.randint(block, (1,), generator=generator)) + 1, len(index))
    blocks = [index[:first], *index[first:].split(block)]
    order = torch.randperm(len(blocks), generator=generator).tolist()
    return torch.cat([blocks[place] for place in order])


def _shuffled(cells: Tensor, generator: torch.Generator) -> Tensor:
    return cells[torch.randperm(len(cells), generator=generator)]


class _Buffer(NamedTuple):
    """Counts of some cells that were read, in the order of ``MODALITIES``, and the row of each cell in them.

    Counts of a modality that lies in memory are those of all cells.
    """

    counts: list[Any]
    rows: Tensor


def cells_from_disk(table: CellTable, parts: Sequence[Tensor], n_total: int, at_once: int) -> Iterator[Cells]:
    """Minibatches of a table on disk; while some are used, a thread reads those that follow.

    Parameters
    ----------
    table
        The table.
    parts
        Cells of each minibatch, int64.
    n_total
        Number of cells that a minibatch stands for.
    at_once
        Minibatches that are read together; at most twice as many are in memory.
    """
    groups = [parts[start : start + at_once] for start in range(0, len(parts), at_once)]
    with ThreadPoolExecutor(1, thread_name_prefix="disk") as pool:
        ahead = [pool.submit(_read, table, group) for group in groups[:1]]
        for number, group in enumerate(groups):
            buffer = ahead.pop().result()
            if number + 1 < len(groups):
                ahead.append(pool.submit(_read, table, groups[number + 1]))
            for part, rows in zip(group, buffer.rows.split([len(part) for part in group]), strict=True):
                counts = [
                    cut(found, rows if isinstance(found, RowSlices) else part, modality.n_features_in(table))
                    for modality, found in zip(MODALITIES, buffer.counts, strict=True)
                ]
                yield table.cells(part, n_total, counts, table.measured_rows(part))


def _read(table: CellTable, group: Sequence[Tensor]) -> _Buffer:
    # By NumPy: torch's threads belong to the step that goes on meanwhile.
    cells, rows = np.unique(np.concatenate([part.numpy() for part in group]), return_inverse=True)
    counts = [modality.counts_in(table) for modality in MODALITIES]
    read = [each.read(cells) if isinstance(each, StoredCounts) else each for each in counts]
    return _Buffer(read, torch.from_numpy(rows))
