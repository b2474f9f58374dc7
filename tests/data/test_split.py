"""Splits into training and validation cells."""

from __future__ import annotations

import pytest
import torch

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
