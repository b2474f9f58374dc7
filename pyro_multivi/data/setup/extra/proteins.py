"""Counts of proteins: checked, and those that a batch did not measure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.sparse import MOST_COUNTS

_ADVICE = (
    "The background of proteins is modelled, from their raw counts (UMI): give these, and no values that were "
    "normalised (CLR, DSB, logarithms) or freed of their background."
)


def check_protein_counts(where: str, cells: Any, values: NDArray[np.float32], names: Sequence[str]) -> None:
    """Refuse values that are no counts, at the first with its cell and protein; NaN is a protein not measured.

    Raises
    ------
    ValueError
    """
    known = ~np.isnan(values)
    rules = [
        ("infinite", np.isinf(values)),
        ("negative", known & (values < 0)),
        ("not a whole number", known & (values != np.floor(values))),
        (f"above {MOST_COUNTS:,}", known & (values > MOST_COUNTS)),
    ]
    for what, wrong in rules:
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"{where} holds values that are {what}, for instance {values[row, column]:g} for cell "
                f"{str(cells[row])!r} and protein {names[column]!r}. {_ADVICE}"
            )


def missing_by_batch(
    measurement: Measurement, names: Sequence[str], batch_code: NDArray[np.int64], batches: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """Proteins that were not measured in a batch with proteins, since they are 0 (or NaN) in all of its cells.

    Batches that measured all of theirs, and those without any protein, are left out.
    """
    values, measured = measurement.values.numpy(), measurement.measured.numpy()
    found: dict[str, tuple[str, ...]] = {}
    for code, batch in enumerate(batches):
        present = (np.nan_to_num(values[measured & (batch_code == code)]) > 0).any(0)
        if present.any() and not present.all():
            found[batch] = tuple(np.asarray(names)[~present].tolist())
    return found


def check_informative(where: str, measurement: Measurement, names: Sequence[str]) -> None:
    """Refuse proteins that were measured in no batch, or have the same count in every cell.

    Raises
    ------
    ValueError
    """
    kept = measurement.values.numpy()[measurement.measured.numpy()]
    if not len(kept):
        raise ValueError(f"{where} holds no count in any cell: leave proteins out of the setup.")
    seen = (np.nan_to_num(kept) > 0).any(0)
    largest, least = np.nanmax(kept, 0, initial=0, where=seen), np.nanmin(np.where(np.isnan(kept), np.inf, kept), 0)
    for what, wrong in (
        ("no count in any cell, so that no batch measured them", ~seen),
        ("the same count in every cell", seen & (largest == least) & (len(kept) > 1)),
    ):
        if wrong.any():
            raise ValueError(
                f"{where}: {int(wrong.sum())} of {len(names)} proteins have {what}: "
                f"{first_names(np.asarray(names)[wrong])}. Leave them out."
            )


def without_missing(
    measurement: Measurement,
    names: Sequence[str],
    batch_code: NDArray[np.int64],
    batches: Sequence[str],
    missing: Mapping[str, Sequence[str]],
) -> Measurement:
    """Counts with NaN for the proteins that their batch did not measure, unless cells of it have some after all."""
    values, measured = measurement.values.numpy(), measurement.measured.numpy()
    place = {name: column for column, name in enumerate(names)}
    for code, batch in enumerate(batches):
        rows = np.flatnonzero(measured & (batch_code == code))
        for name in missing.get(batch, ()) if len(rows) else ():
            column = values[rows, place[name]]
            if not (np.nan_to_num(column) > 0).any():
                values[rows, place[name]] = np.nan
    empty = measured & np.isnan(values).all(1)
    values[empty] = 0.0
    return Measurement(torch.from_numpy(values), torch.from_numpy(measured & ~empty))
