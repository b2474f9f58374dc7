"""Output of a streamed quantity: a frame, an array, a sparse matrix or a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi._version import __version__
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.quantities.array_sink import Arrays
from pyro_multivi.posterior.quantities.estimates import Quantity, estimate
from pyro_multivi.posterior.quantities.file_sink import Store, digest
from pyro_multivi.posterior.quantities.summary import Estimate
from pyro_multivi.program import MultiVIProgram

#: Forms of an estimated quantity.
Estimates: TypeAlias = pd.DataFrame | NDArray[np.float32] | sp.csr_matrix | Estimate | Path

# Cells whose counts are copied together to be digested.
_AT_ONCE = 4096

#: Elements of a file by the summary that they hold.
SUMMARY_ELEMENTS = {"mean": "X", "sd": "layers/sd", "lower": "layers/lower", "upper": "layers/upper"}


def deliver(
    program: MultiVIProgram,
    cells: Minibatches,
    quantity: Quantity,
    average: Average,
    cell_names: Sequence[str],
    feature_names: Sequence[str],
    *,
    return_numpy: bool = False,
    out: str | os.PathLike[str] | None = None,
    silent: bool | None = None,
) -> Estimates:
    """Compute a quantity of some cells and return it in the wanted form.

    Parameters
    ----------
    cell_names, feature_names
        Names of those cells, and of the features of the quantity.
    return_numpy
        Return arrays (or a csr matrix) rather than frames.
    out
        Write to this file instead and return its path.
    silent
        Show no bar; None shows it only when writing.

    Returns
    -------
    DataFrame, ndarray or csr_matrix
        The expectation, (cells, features), or an array of all draws, (n_samples, cells, features).
    Estimate
        Four of these, with an interval.
    Path
        Path of the file, with ``out``.

    Raises
    ------
    ValueError
        If ``out`` is asked to hold all draws.
    """
    sparse = quantity.threshold is not None
    index, columns = pd.Index(cell_names), pd.Index(feature_names)
    if out is not None:
        if average.keep_draws:
            raise ValueError("out holds summaries and return_mean=False asks for all draws: leave one of them out.")
        places = {name: SUMMARY_ELEMENTS[name] for name in average.names}
        dense_places, sparse_places = ({}, places) if sparse else (places, {})
        request = request_digest(program, cells, [quantity], average, [*index, *columns])
        frames = (pd.DataFrame(index=index.astype(str)), pd.DataFrame(index=columns.astype(str)))
        with Store(out, request, *frames, {}, dense_places, sparse_places) as store:
            estimate(program, remaining_minibatches(cells, store.n_done, silent is True), quantity, average, store)
        return store.path
    draws = (average.n_samples,) if average.keep_draws else ()
    kept = Arrays((*draws, len(index), len(columns)), **{"sparse" if sparse else "dense": average.names})
    estimate(program, remaining_minibatches(cells, 0, silent is not False), quantity, average, kept)
    found = [kept[name] for name in average.names]
    if sparse and not return_numpy:
        as_frame: Any = pd.DataFrame.sparse
        found = [as_frame.from_spmatrix(matrix, index=index, columns=columns) for matrix in found]
    elif not return_numpy and not average.keep_draws:
        found = [pd.DataFrame(values, index=index, columns=columns, copy=False) for values in found]
    return found[0] if average.level is None else Estimate(*found)


def remaining_minibatches(cells: Minibatches, n_done: int, silent: bool) -> Iterator[Cells]:
    """Minibatches of the cells that are not done yet, with a progress bar over all of them."""
    rest = Minibatches(cells.table, cells.index[n_done:], batch_size=cells.batch_size, device=cells.device)
    with tqdm(total=cells.n_cells, initial=n_done, desc="posterior", unit="cell", disable=silent) as bar:
        for minibatch in rest:
            yield minibatch
            bar.update(len(minibatch))


def request_digest(
    program: MultiVIProgram,
    cells: Minibatches,
    quantities: Sequence[Quantity],
    average: Average,
    names: Sequence[str],
    **extra: Any,
) -> str:
    """Digest of everything that a written result depends on: weights, cells, quantities and other arguments."""
    table, index = cells.table, cells.index
    tensors: list[Tensor | None] = [*program.state_dict().values(), index, table.design[index]]
    tensors.append(None if table.label is None else table.label[index])
    tensors.append(None if table.posterior is None else table.posterior[index])
    for modality in MODALITIES:
        sizes = modality.size_factor_in(table)
        tensors += [modality.measured_in(table)[index], None if sizes is None else sizes[index]]
        panels = modality.panels_in(table)
        tensors += [None] if panels is None else [panels.measured, panels.code[index]]
    tensors += [part[index] for extra in table.extra.values() for part in extra]
    arguments: dict[str, Any] = {
        "version": __version__,
        "program": f"{type(program).__module__}:{type(program).__qualname__}",
        "config": program.config.to_dict(),
        "average": vars(average),
        "names": list(names),
        "counts": [_digest_of_counts(modality.counts_in(table), index) for modality in MODALITIES],
        **extra,
    }
    for number, quantity in enumerate(quantities):
        parts = vars(quantity)
        tensors += [part for part in parts.values() if isinstance(part, Tensor)]
        arguments[f"quantity {number}"] = {
            name: "tensor" if isinstance(part, Tensor) else part for name, part in parts.items()
        }
    return digest(arguments, *tensors)


def _digest_of_counts(counts: SparseCounts | None, index: Tensor) -> list[str]:
    """Digests of the counts of some cells, block by block."""
    if counts is None:
        return []
    parts = (counts.select_rows(block) for block in index.split(_AT_ONCE))
    return [digest({}, part.crow, part.col, part.val) for part in parts]
