"""Matrices on disk that are damaged, or in a form of other programs."""

from __future__ import annotations

import h5py
import pytest

import pyro_multivi as pm
from pyro_multivi.data.stores.matrix import StoreChangedError, StoredMatrix


def without_last(file, *parts):
    for part in parts:
        values = file[f"X/{part}"][:-5]
        del file[f"X/{part}"]
        file[f"X/{part}"] = values


def with_pointer(file, row, value):
    file["X/indptr"][row] = value


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: with_pointer(file, 10, 10**6),
        lambda file: with_pointer(file, 10, 0),
        lambda file: with_pointer(file, 0, 3),
        lambda file: without_last(file, "data"),
        lambda file: without_last(file, "indices"),
        lambda file: without_last(file, "data", "indices"),
        lambda file: without_last(file, "indptr"),
    ],
    ids=["beyond", "backwards", "not from 0", "few values", "few columns", "few entries", "few rows"],
)
def test_row_pointers_that_do_not_fit_are_damage(mosaic, tmp_path, damage):
    """SciPy would read memory beyond the entries, as counts or until the process crashes."""
    path = tmp_path / "a.h5ad"
    mosaic.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        damage(file)
    for use in (StoredMatrix, pm.open_stores):
        with pytest.raises(StoreChangedError, match=r"a\.h5ad, 'X' is damaged: its row pointers \(indptr\) do not fit"):
            use(path)
