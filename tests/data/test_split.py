"""Splits into training and validation cells."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_multivi.data.selection import divide_cells
from pyro_multivi.data.split import Split


@pytest.mark.parametrize(
    ("train_size", "validation_size", "n_train", "n_validation"),
    [(None, None, 9, 1), (0.9, None, 9, 1), (1.0, None, 10, 0), (None, 0.3, 7, 3), (0.5, 0.2, 5, 2), (0.5, 0.0, 5, 0),
     (0.25, None, 3, 7), (1e-6, None, 1, 9), (0.7, 0.3, 7, 3), (0.999, None, 10, 0)],
)  # fmt: skip
def test_shares_of_ten_cells(train_size, validation_size, n_train, n_validation):
    split = Split.of(10, train_size, validation_size, shuffle=True, seed=0)
    assert (len(split.train), len(split.validation)) == (n_train, n_validation)
    both = torch.cat([split.train, split.validation])
    assert len(both.unique()) == len(both)
    assert set(both.tolist()) <= set(range(10))
    again = Split.from_dict(split.to_dict())
    assert torch.equal(again.train, split.train)
    assert torch.equal(again.validation, split.validation)


def test_unshuffled_splits_hold_out_the_first_cells():
    split = Split.of(10, 0.6, None, shuffle=False, seed=0)
    assert split.validation.tolist() == [0, 1, 2, 3]
    assert split.train.tolist() == [4, 5, 6, 7, 8, 9]
    # Cells that are neither are the last ones: 48 to 59.
    split = Split.of(60, 0.5, 0.3, shuffle=False, seed=0)
    assert split.validation.tolist() == [*range(18)]
    assert split.train.tolist() == [*range(18, 48)]
    again = Split.of(10, 0.6, 0.2, shuffle=False, seed=0, previous=Split.of(10, 0.1, 0.0, shuffle=False, seed=0))
    assert (again.train.tolist(), again.validation.tolist()) == ([2, 3, 4, 5, 6, 7], [1, 8])
    assert again.trained_before.tolist() == [0]


# ---------------------------------------------------------------------- cells that are listed

NAMES = list("abcdef")


@pytest.mark.parametrize(("given", "found"), [
    ([[5, 0, 3], [1], [4, 2]], ([0, 3, 5], [1], [2, 4])),
    ([np.arange(4), np.arange(4, 6)], ([0, 1, 2, 3], [4, 5], [])),
    ([np.arange(6)], ([*range(6)], [], [])),
    ((np.arange(6), None, np.array(None)), ([*range(6)], [], [])),
    ([torch.arange(5), np.array([]), [-1]], ([0, 1, 2, 3, 4], [], [5])),
    ([pd.Index(NAMES[1:]), pd.Series(["a"]), []], ([1, 2, 3, 4, 5], [0], [])),
    ([np.array([True] * 4 + [False] * 2), [False] * 4 + [True] * 2, [False] * 6], ([0, 1, 2, 3], [4, 5], [])),
])  # fmt: skip
def test_lists_are_positions_names_or_masks(given, found):
    assert tuple(part.tolist() for part in divide_cells(given, NAMES)) == found
    assert all(part.dtype == torch.int64 for part in divide_cells(given, NAMES))


@pytest.mark.parametrize(("given", "kind", "said"), [
    (np.array([[0, 1, 2], [3, 4, 5]]), ValueError, "give a list of up to three lists of cells"),
    ([], ValueError, r"external_indexing=\[\] is not allowed: give a list of up to three"),
    ([[0], [1], [2], [3]], ValueError, "give a list of up to three"),
    ([0, 1, 2], TypeError, r"external_indexing\[0\]=0 is not allowed: give a list of positions or names, a mask, or"),
    ([[0, 1, 2, 3, 4, 5], "a"], TypeError, r"external_indexing\[1\]='a' is not allowed"),
    ([{0, 1}], TypeError, r"external_indexing\[0\]=\{0, 1\} is not allowed: .* of a set sorted"),
    ([[0.0, 1.0, 2.0]], ValueError, r"external_indexing\[0\].* has values of type float64: give positions, names"),
    ([[[0, 1, 2], [3, 4, 5]]], ValueError, r"external_indexing\[0\].* has 2 dimensions"),
    ([[0, 1, 2], [3, 6]], IndexError, r"external_indexing\[1\] holds 6, and the data has 6 cells"),
    ([NAMES, ["g"]], KeyError, r"external_indexing\[1\] holds 'g', which is no cell of the data"),
    ([[True, False]], ValueError, r"external_indexing\[0\] is a mask of 2 cells and the data has 6"),
    ([None, [0, 1, 2], [3, 4, 5]], ValueError, r"external_indexing\[0\] lists no cell: at least one is needed"),
    ([[0, 1, 1, 2], [3, 4, 5, -1]], Warning, r"more than once for training: 'b', at 1\. List each cell once"),
    ([[0, 1, 2], [3, 4, 5, -1]], Warning, r"more than once for validation: 'f', at 5\."),
    ([[0, 1, 2], [2, 3, 4, 5]], ValueError, r"both for training and for validation: 'c', at 2\."),
    ([[0, 1], [2, 3, 4], [5, 3]], ValueError, r"both for validation and for test: 'd', at 3\."),
    ([[0]], Warning, r"leaves out 5 of 6 cells: 'b', 'c', 'd', 'e', 'f', at 1, 2, 3, 4, 5\. List those"),
    ([[0, 2], [3]], ValueError, r"leaves out 3 of 6 cells: 'b', 'e', 'f', at 1, 4, 5\. List those that are neither"),
])  # fmt: skip
def test_lists_that_are_none_or_do_not_hold_every_cell_once_are_refused(given, kind, said):
    with pytest.raises(kind, match=said):
        divide_cells(given, NAMES)


def test_many_cells_are_counted_and_the_first_shown():
    said = r"leaves out 90 of 100 cells: '10', .*'14', \.\.\. \(90 in all\), at 10, 11, 12, 13, 14 and others"
    with pytest.raises(ValueError, match=said):
        divide_cells([range(10)], map(str, range(100)))
