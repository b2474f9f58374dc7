"""Compressed counts: rows cut, ordered and dropped as in the dense matrix, and no more copied than needed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from pyro_multivi.data.sparse import SparseCounts

N, F = 9, 13


@pytest.fixture(params=["floats", "bytes", "ones"])
def counts(request):
    """Rows with few, many and no entries, and features without any; int32 columns, as in a table."""
    noise = torch.Generator().manual_seed(0)
    dense = torch.poisson(torch.rand(N, F, generator=noise), generator=noise)
    dense[[0, 4]], dense[:, [0, 7, 12]] = 0, 0
    if request.param == "ones":
        made = SparseCounts.from_dense((dense > 0).float()).binary()
    else:
        made = SparseCounts.from_dense(dense if request.param == "floats" else dense.to(torch.uint8))
    return SparseCounts(made.crow, made.col.int(), made.val, (N, F))


def is_held_once(values):
    return values.untyped_storage().nbytes() == values.element_size()


INDICES = [[3], [0], [], [5, 5, 0, 8, 1], list(range(N)), [8, 7, 6]]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_those_of_the_dense_matrix(counts, index):
    index = torch.tensor(index, dtype=torch.long)
    expected = counts.to_dense()[index]
    rows = counts.select_rows(index)
    by_arithmetic = counts.gather_rows(index, len(rows.col))
    for found in (rows, by_arithmetic):
        assert found.shape == (len(index), F)
        assert torch.equal(found.to_dense(), expected)
        assert found.val.dtype == counts.val.dtype
        assert found.crow.dtype == found.col.dtype == torch.int32
    assert all(torch.equal(one, other) for one, other in zip(rows.parts(), by_arithmetic.parts(), strict=True))


def test_a_row_that_is_not_there_is_an_error(counts):
    with pytest.raises(IndexError):
        counts.select_rows(torch.tensor([0, N]))


def by_feature(dense):
    """Row, feature and value of each entry, features first."""
    feature, row = dense.t().nonzero(as_tuple=True)
    return row, feature, dense[row, feature]


@pytest.mark.parametrize("way", ["_counted_order", "_sorted_order"])
def test_entries_by_feature(counts, way):
    counts._order.append(getattr(counts, way)())
    row, feature, val = by_feature(counts.to_dense())
    found = counts.by_feature()
    assert torch.equal(found.row.long(), row)
    assert torch.equal(found.val, val)
    assert torch.equal(torch.repeat_interleave(torch.arange(F), found.start.diff()), feature)
    assert found.start.dtype == found.row.dtype == torch.int32


def test_the_order_is_found_once_for_all_values(counts):
    other = counts.with_values(torch.rand(len(counts.col)))
    counts.order_by_feature()
    assert torch.equal(other.by_feature().val, by_feature(other.to_dense())[2])
    assert other._order is counts._order
    assert counts.order_by_feature() is other.order_by_feature()
    assert torch.equal(counts.by_feature().val, by_feature(counts.to_dense())[2])


@pytest.mark.parametrize("ordered_before", [True, False])
def test_empty_rows_are_dropped_without_a_copy(counts, ordered_before):
    kept = counts.crow.diff().nonzero().squeeze(-1)
    assert 0 < len(kept) < N
    if ordered_before:
        counts.order_by_feature()
    dropped = counts.without_empty(kept)
    dense = counts.to_dense()[kept]
    assert torch.equal(dropped.to_dense(), dense)
    assert dropped.col is counts.col
    assert dropped.val is counts.val
    assert len(dropped._order) == ordered_before
    row, _, val = by_feature(dense)
    assert torch.equal(dropped.by_feature().row.long(), row)
    assert torch.equal(dropped.by_feature().val, val)


def test_all_rows_empty():
    counts = SparseCounts.from_dense(torch.zeros(3, F))
    nothing = counts.without_empty(torch.zeros(0, dtype=torch.long))
    assert nothing.shape == (0, F)
    assert nothing.by_feature().start.tolist() == [0] * (F + 1)
    assert counts.select_rows(torch.tensor([2, 0])).to_dense().sum() == 0


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # by pickle, with torch 2.4 and 2.5
def test_ones_are_held_once_through_all_that_is_done_to_them(counts):
    ones = counts.binary()
    index = torch.tensor([5, 1, 2])
    for part in (
        ones,
        ones.select_rows(index),
        ones.gather_rows(index, int(ones.crow.diff()[index].sum())),
        ones.to(torch.float64),
        ones.to("cpu", copy=True),
        copy.deepcopy(ones),
    ):
        assert is_held_once(part.val)
        assert set(part.val.tolist()) == {1}
        part.order_by_feature()
        assert is_held_once(part.by_feature().val)
    again = pickle.loads(pickle.dumps(ones))  # noqa: S301
    assert torch.equal(again.to_dense(), ones.to_dense())
    assert torch.equal(ones.to_dense(), (counts.to_dense() > 0).to(ones.dtype))


def test_sums_of_rows(counts):
    assert torch.equal(counts.row_sums(), counts.to_dense().sum(1, dtype=counts.dtype))
    assert torch.equal(counts.select_rows(torch.tensor([0, 4])).row_sums(), torch.zeros(2, dtype=counts.dtype))


def test_sums_of_counts_of_one_byte_do_not_overflow():
    counts = SparseCounts.from_dense(torch.tensor([[200, 100], [0, 0]], dtype=torch.uint8))
    assert counts.row_sums().tolist() == [300, 0]
