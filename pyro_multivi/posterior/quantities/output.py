"""Output of a streamed quantity: a frame, an array, a sparse matrix or a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
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
from pyro_multivi.isolation import uninterrupted
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.quantities.array_sink import ArraySink, Recorder, Sink
from pyro_multivi.posterior.quantities.estimates import Quantity, estimate
from pyro_multivi.posterior.quantities.file_sink import FileSink, digest
from pyro_multivi.posterior.quantities.summary import Estimate
from pyro_multivi.processes.group import current
from pyro_multivi.processes.shares import gather_arrays
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
    feature_names: Sequence[str],
    *,
    return_numpy: bool = False,
    out: str | os.PathLike[str] | None = None,
    silent: bool | None = None,
) -> Estimates:
    """Compute a quantity of some cells and return it in the wanted form.

    Parameters
    ----------
    feature_names
        Names of the features of the quantity.
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
    index, columns = pd.Index(cells.cell_names), pd.Index(feature_names)

    def fill(minibatches: Iterable[Cells], sink: Sink) -> None:
        estimate(program, minibatches, quantity, average, sink)

    if out is not None:
        if average.keep_draws:
            raise ValueError("out holds summaries and return_mean=False asks for all draws: leave one of them out.")
        places = {name: SUMMARY_ELEMENTS[name] for name in average.names}
        dense_places, sparse_places = ({}, places) if sparse else (places, {})
        request = request_digest(program, cells, [quantity], average, [*index, *columns])
        frames = (pd.DataFrame(index=index.astype(str)), pd.DataFrame(index=columns.astype(str)))
        write_shared(
            lambda: FileSink(out, request, *frames, {}, dense_places, sparse_places), fill, cells, silent is True
        )
        return Path(out)
    draws = (average.n_samples,) if average.keep_draws else ()
    kept = ArraySink((*draws, len(index), len(columns)), **{"sparse" if sparse else "dense": average.names})
    stream(fill, cells, kept, silent is not False)
    found = [kept[name] for name in average.names]
    if sparse and not return_numpy:
        as_frame: Any = pd.DataFrame.sparse
        found = [as_frame.from_spmatrix(matrix, index=index, columns=columns) for matrix in found]
    elif not return_numpy and not average.keep_draws:
        found = [pd.DataFrame(values, index=index, columns=columns, copy=False) for values in found]
    return found[0] if average.level is None else Estimate(*found)


def write_shared(
    store: Callable[[], FileSink], fill: Callable[[Iterable[Cells], Sink], None], cells: Minibatches, silent: bool
) -> None:
    """Stream all cells into a file, which the first of several processes writes."""
    if not current().is_first:
        stream(fill, cells, None, silent)
        return
    with ExitStack() as stack:
        # A Ctrl-C that comes meanwhile acts once the store is entered, which then lets others write.
        with uninterrupted():
            opened = stack.enter_context(store())
        stream(fill, cells, opened, silent)


def stream(fill: Callable[[Iterable[Cells], Sink], None], cells: Minibatches, sink: Sink | None, silent: bool) -> None:
    """Stream the cells that are not done yet into a sink.

    Several processes compute minibatches in turn; each that has a sink is given the results of all. There is one in
    all of them, or in the first only.
    """
    processes = current()
    n_done = int(processes.first(0 if sink is None else sink.n_done))
    (to_first,) = processes.any(sink is None)
    rest = Minibatches(cells.table, cells.index[n_done:], batch_size=cells.batch_size, device=cells.device)
    silent = silent or not processes.is_first
    with tqdm(total=cells.n_cells, initial=n_done, desc="posterior", unit="cell", disable=silent) as bar:
        if not processes.are_several:
            assert sink is not None
            fill(_shown_by(bar, rest), sink)
            return
        parts = rest.parts()
        starts = n_done + np.cumsum([0, *map(len, parts)])
        for number in range(0, len(parts), processes.size):
            mine = number + processes.rank
            recorder = Recorder(int(starts[min(mine, len(parts))]))
            if mine < len(parts):
                fill([rest.cut(parts[mine])], recorder)
            for calls in gather_arrays(recorder.calls, to_first):
                if sink is not None:
                    Recorder.replay(calls, sink)
            bar.update(sum(map(len, parts[number : number + processes.size])))


def _shown_by(bar: Any, minibatches: Minibatches) -> Iterator[Cells]:
    """Minibatches, each shown by a progress bar once it is done."""
    for minibatch in minibatches:
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
