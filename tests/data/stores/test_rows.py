"""Columns and slices of rows against SciPy's own cutting."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pyro_multivi.data.stores.counts import StoredRows
from pyro_multivi.data.stores.rows import Columns


def random_rows(n=40, width=30, seed=0):
    """Sparse rows, among them empty ones, and full ones at either end of the columns."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(1, 200, (n, width)) * (rng.random((n, width)) < 0.4)
    dense[[0, 7, n - 1]] = 0
    dense[3, :20] = 0
    dense[4, 10:] = 0
    return dense.astype(np.float32)


PLACES = {
    "all": np.arange(30),
    "first": np.r_[np.arange(12), np.full(18, -1)],
    "last": np.r_[np.full(12, -1), np.arange(18)],
    "middle, shifted": np.r_[np.full(5, -1), np.arange(20) + 3, np.full(5, -1)],
    "all, shifted": np.arange(30) + 4,
    "every other": np.where(np.arange(30) % 2, np.arange(30) // 2, -1),
    "backwards": np.arange(30)[::-1],
    "none": np.full(30, -1),
}


def expected(dense, places, width):
    found = np.zeros((len(dense), width), dense.dtype)
    found[:, places[places >= 0]] = dense[:, places >= 0]
    return found


@pytest.mark.parametrize("name", PLACES)
def test_columns_go_to_their_places(name):
    dense, places = random_rows(), PLACES[name].astype(np.int32)
    taken = Columns(places, 40).take(sp.csr_array(dense))
    assert taken.has_canonical_format
    assert np.array_equal(taken.toarray(), expected(dense, places, 40))


class InMemory:
    """A matrix whose rows are read with how many were asked for."""

    def __init__(self, dense, at_once=7):
        self.shape, self.at_once, self.dense = dense.shape, at_once, dense
        self.spans = []

    def reading(self):
        return self

    def __enter__(self):
        return lambda spans: (self.rows(*span) for span in spans)

    def __exit__(self, *_):
        pass

    def rows(self, start, stop):
        self.spans.append((start, stop))
        return sp.csr_array(self.dense[start:stop])


@pytest.mark.parametrize(("one", "other"), [("first", "last"), ("every other", "last"), ("backwards", "none")])
@pytest.mark.parametrize("rows", [np.arange(40), np.array([0, 2, 3, 30, 39]), np.array([7]), np.array([], dtype=int)])
def test_modalities_of_a_matrix_share_one_reading(one, other, rows):
    dense = random_rows()
    matrix = InMemory(dense)
    stored = StoredRows(matrix)
    for name in (one, other):
        stored.add(name, Columns(PLACES[name].astype(np.int32), 30), np.dtype(np.uint8))
    order = np.random.default_rng(1).permutation(np.repeat(np.arange(len(rows)), 2))
    for name in (one, other):
        found = stored.read(name, rows).select_rows(torch.from_numpy(order))
        assert found.shape == (len(order), 30)
        assert found.val.dtype == torch.uint8
        assert (found.crow.dtype, found.col.dtype) == (torch.int32, torch.int32)
        assert np.array_equal(found.to_dense().numpy(), expected(dense, PLACES[name], 30)[rows[order]])
    assert len(matrix.spans) == len(set(matrix.spans))


def test_cells_without_a_row_are_empty():
    dense = random_rows()
    stored = StoredRows(InMemory(dense))
    stored.add("x", Columns(np.arange(30, dtype=np.int32), 30), np.dtype(np.int16))
    slices = stored.read("x", np.array([5, 6])).at(np.array([1, -1, 0, -1]))
    found = slices.select_rows(torch.arange(4)).to_dense().numpy()
    assert np.array_equal(found, np.stack([dense[6], 0 * dense[0], dense[5], 0 * dense[0]]))
    none = stored.read("x", np.array([], dtype=int)).at(np.array([-1, -1]))
    assert none.select_rows(torch.arange(2)).to_dense().shape == (2, 30)
    assert len(none.select_rows(torch.arange(2)).val) == 0


def test_ones_take_no_memory():
    stored = StoredRows(InMemory((random_rows() > 0).astype(np.float32)))
    stored.add("y", Columns(np.arange(30, dtype=np.int32), 30), None)
    found = stored.read("y", np.arange(40)).select_rows(torch.arange(40))
    assert found.val.stride(0) == 0
    assert np.array_equal(found.to_dense().numpy(), random_rows() > 0)


def test_values_of_no_modality_do_not_matter():
    """Of a matrix with other columns, which may hold anything."""
    dense = random_rows()
    dense[:, 20:] = np.nan
    dense[:, 19] = 1e9
    stored = StoredRows(InMemory(dense))
    stored.add("x", Columns(np.r_[np.arange(19), np.full(11, -1)].astype(np.int32), 19), np.dtype(np.uint8))
    found = stored.read("x", np.arange(40)).select_rows(torch.arange(40))
    assert np.array_equal(found.to_dense().numpy(), random_rows()[:, :19])
