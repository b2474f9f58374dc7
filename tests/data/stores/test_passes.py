"""Passes over a table on disk: every cell once, by blocks, the same minibatches wherever a pass begins."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores.passes import block_order, dealt_blocks


@pytest.fixture
def tables(mosaic, on_disk):
    stored = pm.open_stores(on_disk)
    for adata in (mosaic, stored):
        pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    return [DataSpec.of(adata).table(adata) for adata in (mosaic, stored)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("n", "block", "buffer"), [(1, 4, 8), (100, 4, 16), (101, 7, 30), (64, 128, 1000), (50, 1, 5)])
def test_every_cell_is_visited_once(n, block, buffer):
    index = torch.arange(n) * 3
    order = block_order(index, block, buffer, generator())
    assert order.sort().values.tolist() == index.tolist()
    assert block_order(index, block, buffer, generator()).tolist() == order.tolist()


def test_a_buffer_holds_whole_blocks_from_all_over_the_data():
    order = block_order(torch.arange(10_000), 50, 1000, generator())
    for buffer in order.split(1000):
        cells = buffer.sort().values
        # Runs of neighbours: 20 blocks, of which two may be cut and some lie beside each other.
        assert 15 <= int((cells.diff() > 1).sum()) + 1 <= 22
        assert cells[0] < 2500
        assert cells[-1] > 7500
    assert order[:1000].diff().abs().double().median() > 1000


@pytest.mark.parametrize("n_shares", [2, 3])
@pytest.mark.parametrize("sizes", [[100] * 100, [100] * 99 + [103], [64] * 7 + [6]])
def test_each_process_reads_blocks_of_its_own(n_shares, sizes):
    n, block, at_once = sum(sizes), 50, 10
    order = dealt_blocks(torch.arange(n), block, sizes, at_once, n_shares, generator())
    assert order.sort().values.tolist() == list(range(n))
    minibatches = order.split(sizes)
    for first in range(0, len(sizes), at_once):
        shares = [
            [part.tensor_split(n_shares)[rank] for part in minibatches[first:][:at_once]] for rank in range(n_shares)
        ]
        for share in shares:
            cells = torch.cat(share).sort().values
            # Runs of neighbours: whole blocks, of which those at both ends, and at the edge of the data, may be cut.
            assert int((cells.diff() > 1).sum()) + 1 <= len(cells) / block + 4
        # Shuffled within what a process reads.
        assert torch.cat(shares[0]).diff().abs().double().median() > block / 4
    assert dealt_blocks(torch.arange(n), block, sizes, at_once, n_shares, generator()).tolist() == order.tolist()


def test_neighbours_are_others_in_the_next_pass():
    random = generator()
    one, other = (block_order(torch.arange(1000), 100, 100, random) for _ in range(2))
    starts = [{int(part.min()) for part in order.split(100)} for order in (one, other)]
    assert starts[0] != starts[1]


def test_the_share_of_a_sample_in_a_buffer_is_as_documented():
    """Of data sorted by two samples: as in a random sample of as many cells as blocks, times those within them."""
    random, sample = generator(1), torch.arange(64_000) < 32_000
    shares = [
        sample[buffer].double().mean().item()
        for _ in range(10)
        for buffer in block_order(torch.arange(64_000), 100, 6400, random).split(6400)[:-1]
    ]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert 0.7 * np.sqrt(0.25 / 64) < np.std(shares) < 1.2 * np.sqrt(0.25 / 64)


@pytest.mark.parametrize("batch_size", [7, 16, 60])
def test_minibatches_are_those_of_the_table_in_memory(tables, batch_size):
    memory, disk = tables
    index = torch.arange(120)[torch.arange(120) % 10 != 3]
    passes = Minibatches(disk, index, batch_size=batch_size, shuffle=True, seed=3, shuffle_block=5, shuffle_buffer=4)
    seen = []
    for cells in passes:
        expected = memory.batch(cells.index, n_total=len(index))
        for name in ("x", "y"):
            one, other = getattr(cells, name), getattr(expected, name)
            assert torch.equal(one.crow, other.crow)
            assert torch.equal(one.col, other.col)
            assert torch.equal(one.val, other.val)
        assert torch.equal(cells.design, expected.design)
        assert torch.equal(cells.rna_rows, expected.rna_rows)
        assert cells.n_total == len(index)
        seen += cells.index.tolist()
    assert sorted(seen) == index.tolist()
    assert seen != index.tolist()
    again = Minibatches(disk, index, batch_size=batch_size, shuffle=True, seed=3, shuffle_block=5, shuffle_buffer=4)
    rest = [cell for cells in again.after(2) for cell in cells.index.tolist()]
    assert rest == seen[2 * batch_size :]
    plain = Minibatches(disk, index, batch_size=batch_size, shuffle_block=5, shuffle_buffer=4)
    assert [cell for cells in plain for cell in cells.index.tolist()] == index.tolist()


def test_two_buffers_are_in_memory_at_most_and_no_thread_is_left(tables, monkeypatch):
    disk, held, most = tables[1], [], []
    whole = type(disk.x).read

    def counted(self, cells):
        if self is disk.x:
            held.append(len(cells))
        return whole(self, cells)

    monkeypatch.setattr(type(disk.x), "read", counted)
    passes = iter(Minibatches(disk, batch_size=5, shuffle=True, shuffle_block=5, shuffle_buffer=2))
    for number, _ in zip(range(10), passes, strict=False):
        most.append(sum(held) - 10 * (number // 2))
    assert set(held) == {10}
    assert max(most) <= 20
    passes.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("disk")]
