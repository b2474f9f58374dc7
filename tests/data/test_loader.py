"""Minibatches: every cell once, the plate they stand for, order, and what a loop may do to them."""

from __future__ import annotations

import threading

import pytest
import torch

from pyro_multivi.data.loader import Minibatches, default_batch_size
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable


@pytest.fixture
def table():
    n = 11
    return CellTable(
        x=SparseCounts.from_dense(torch.arange(n * 3.0).reshape(n, 3)),
        y=None,
        has_rna=torch.ones(n, dtype=torch.bool),
        has_atac=torch.zeros(n, dtype=torch.bool),
        design=torch.ones(n, 1),
        batch_code=torch.zeros(n, dtype=torch.long),
        n_genes=3,
        n_regions=2,
    )


def visited(batches):
    return [cells.index.tolist() for cells in batches]


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(11, 4, [4, 4, 3]), (9, 4, [4, 5]), (8, 4, [4, 4]), (5, 4, [5]), (1, 4, [1]), (3, 4, [3]), (3, 1, [1, 1, 1]),
     (11, 100, [11]), (0, 4, [])],
)  # fmt: skip
def test_no_minibatch_of_one_cell_is_left_over(table, n, batch_size, sizes):
    batches = Minibatches(table, torch.arange(n), batch_size=batch_size)
    assert [len(cells) for cells in batches] == sizes
    assert len(batches) == len(sizes)
    assert [cell for part in visited(batches) for cell in part] == list(range(n))


@pytest.mark.parametrize("shuffle", [True, False])
def test_minibatches_stand_for_the_cells_visited_and_not_for_the_table(table, shuffle):
    """The plate's size is the number of cells that are trained on, wherever they lie in the table."""
    batches = Minibatches(table, torch.tensor([10, 2, 7, 3, 5]), batch_size=2, shuffle=shuffle)
    assert batches.n_cells == 5
    for cells in batches:
        assert cells.n_total == 5
        assert torch.equal(cells.x.to_dense(), table.x.to_dense()[cells.index])
        assert cells.y.shape == (len(cells), 2)
    assert sorted(cell for part in visited(batches) for cell in part) == [2, 3, 5, 7, 10]


def test_the_order_is_that_of_the_index_unless_shuffled(table):
    index = torch.tensor([10, 2, 7, 3, 5])
    assert visited(Minibatches(table, index, batch_size=2)) == [[10, 2], [7, 3, 5]]


def test_a_seed_gives_one_sequence_of_orders(table, global_rng_untouched):
    one, two, three = (Minibatches(table, batch_size=4, shuffle=True, seed=seed) for seed in (1, 1, 2))
    first = [visited(one) for _ in range(3)]
    assert first == [visited(two) for _ in range(3)]
    assert first[0] != first[1]
    assert first[0] != visited(three)


def test_the_order_of_a_seed_is_that_of_torch(table):
    """Which cells meet in a minibatch is part of a run that can be repeated, from version to version."""
    generator = torch.Generator().manual_seed(1)
    batches = Minibatches(table, torch.arange(3, 11), batch_size=4, shuffle=True, seed=1)
    for _ in range(2):
        order = torch.arange(3, 11)[torch.randperm(8, generator=generator)]
        assert visited(batches) == [order[:4].tolist(), order[4:].tolist()]


def test_a_pass_goes_on_in_the_middle_with_the_order_it_had(table):
    whole, other = (Minibatches(table, batch_size=2, shuffle=True, seed=seed) for seed in (3, 4))
    list(whole)
    state = whole.order_state
    expected = visited(whole) + visited(whole)
    other.order_state = state
    assert [cells.index.tolist() for cells in other.after(2)] + visited(other) == expected[2:]
    other.order_state = state
    assert list(other.after(len(other))) == []


def test_a_loop_may_be_left_early_and_begun_again(table):
    batches = Minibatches(table, batch_size=2)
    threads = threading.active_count()
    for cells in batches:
        assert cells.index.tolist() == [0, 1]
        break
    assert len(visited(batches)) == 5
    assert threading.active_count() == threads


def test_an_error_in_cutting_is_raised_where_the_cells_are_asked_for(table):
    with pytest.raises(IndexError):
        list(Minibatches(table, torch.tensor([0, 1, 2, 99]), batch_size=2))


def test_the_order_by_feature_is_found_ahead(table):
    cells = next(iter(Minibatches(table)))
    assert cells.x._order
    assert cells.y._order
    assert not table.batch(cells.index).x._order


@pytest.mark.parametrize("batch_size", [0, -1])
def test_an_impossible_size_is_refused(table, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} is not allowed"):
        Minibatches(table, batch_size=batch_size)


def test_the_default_size_gives_small_data_some_steps():
    sizes = {n: default_batch_size(n) for n in (1, 50, 400, 2048, 10**6)}
    assert all(1 <= size <= 128 for size in sizes.values())
    assert list(sizes.values()) == sorted(sizes.values())
    assert sizes[10**6] == 128
