"""A streamed quantity as the analyst wants it: a frame, an array, a sparse matrix or a file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi._version import __version__
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.quantities.array_sink import Arrays
from pyro_multivi.posterior.quantities.estimates import Quantity, estimate
from pyro_multivi.posterior.quantities.file_sink import Store, digest
from pyro_multivi.posterior.quantities.summary import Estimate
from pyro_multivi.program import MultiVIProgram

#: Forms of an estimated quantity.
Estimates: TypeAlias = pd.DataFrame | NDArray[np.float32] | sp.csr_matrix | Estimate | Path

#: Where estimates lie in a file.
PLACES = {"mean": "X", "sd": "layers/sd", "lower": "layers/lower", "upper": "layers/upper"}


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
    """Compute a quantity of some cells and put it into the form asked for.

    Parameters
    ----------
    program
        Model and guide.
    cells
        The cells asked for.
    quantity, average
        What is asked.
    cell_names, feature_names
        Of those cells, and of the features of the quantity.
    return_numpy
        Arrays (or a csr matrix) rather than frames.
    out
        Write to this file instead and return its path.
    silent
        Show no bar; None shows it only when writing.

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
        places = {name: PLACES[name] for name in average.names}
        dense_places, sparse_places = ({}, places) if sparse else (places, {})
        request = request_of(program, cells, [quantity], average, [*index, *columns])
        frames = (pd.DataFrame(index=index.astype(str)), pd.DataFrame(index=columns.astype(str)))
        with Store(out, request, *frames, {}, dense_places, sparse_places) as store:
            estimate(program, remaining(cells, store.n_done, silent is True), quantity, average, store)
        return store.path
    draws = (average.n_samples,) if average.keep_draws else ()
    kept = Arrays((*draws, len(index), len(columns)), **{"sparse" if sparse else "dense": average.names})
    estimate(program, remaining(cells, 0, silent is not False), quantity, average, kept)
    found = [kept[name] for name in average.names]
    if sparse and not return_numpy:
        as_frame: Any = pd.DataFrame.sparse
        found = [as_frame.from_spmatrix(matrix, index=index, columns=columns) for matrix in found]
    elif not return_numpy and not average.keep_draws:
        found = [pd.DataFrame(values, index=index, columns=columns, copy=False) for values in found]
    return found[0] if average.level is None else Estimate(*found)


def remaining(cells: Minibatches, n_done: int, silent: bool) -> Iterator[Cells]:
    """Minibatches of the cells that are not done yet, with a progress bar over all of them."""
    rest = Minibatches(cells.table, cells.index[n_done:], batch_size=cells.batch_size, device=cells.device)
    with tqdm(total=cells.n_cells, initial=n_done, desc="posterior", unit="cell", disable=silent) as bar:
        for minibatch in rest:
            yield minibatch
            bar.update(len(minibatch))


def request_of(
    program: MultiVIProgram,
    cells: Minibatches,
    quantities: Sequence[Quantity],
    average: Average,
    names: Sequence[str],
    **further: Any,
) -> str:
    """Stands for everything that a written result depends on: weights, cells, what is asked of them.

    The counts enter by how many each cell has and by their sum: not all of them are read.
    """
    table, index = cells.table, cells.index
    tensors: list[Tensor | None] = [*program.state_dict().values(), index, table.design[index]]
    tensors += [table.has_rna[index], table.has_atac[index], table.label, table.rna_size, table.atac_size]
    for counts in (table.x, table.y):
        if isinstance(counts, SparseCounts):
            tensors += [counts.crow, counts.val.sum(dtype=torch.float64)[None]]
    asked: Mapping[str, Any] = {
        "version": __version__,
        "program": f"{type(program).__module__}:{type(program).__qualname__}",
        "config": program.config.to_dict(),
        "average": vars(average),
        "names": list(names),
        **further,
    }
    for number, quantity in enumerate(quantities):
        parts = dict(vars(quantity))
        tensors += [part for part in parts.values() if isinstance(part, torch.Tensor)]
        asked = {
            **asked,
            f"quantity {number}": {
                name: "tensor" if isinstance(part, torch.Tensor) else part for name, part in parts.items()
            },
        }
    return digest(asked, *tensors)
