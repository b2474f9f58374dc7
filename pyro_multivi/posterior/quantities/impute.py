"""Imputation of a mosaic data set: measured counts beside estimates of what was not measured."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import AnyModality, Cells, ExtraFeatures, Panels
from pyro_multivi.data.modality import modelled
from pyro_multivi.data.setup.adapter import layer_names
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.engine.decode import Average, DecodedDraws, decode
from pyro_multivi.posterior.engine.replicates import extra_features
from pyro_multivi.posterior.quantities.array_sink import ArraySink, Sink
from pyro_multivi.posterior.quantities.estimates import Quantity, blocks, compress
from pyro_multivi.posterior.quantities.file_sink import FileSink
from pyro_multivi.posterior.quantities.output import request_digest, stream, write_shared
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

if TYPE_CHECKING:
    from mudata import MuData

#: Key of uns that holds the arguments.
UNS_KEY = "imputation"
#: Elements of the AnnData by what they hold.
ELEMENTS = {
    "counts": "X",
    "mean": "layers/imputed",
    "sd": "layers/imputed_sd",
    "lower": "layers/imputed_lower",
    "upper": "layers/imputed_upper",
}


def impute(
    program: MultiVIProgram,
    cells: Minibatches,
    quantities: Sequence[Quantity],
    average: Average,
    spec: DataSpec,
    obs: pd.DataFrame,
    scale: Mapping[str, Any],
    *,
    measured_too: bool = False,
    out: str | os.PathLike[str] | None = None,
    silent: bool | None = None,
) -> AnnData | MuData | Path:
    """Put measured counts beside estimates of what was not measured.

    Parameters
    ----------
    quantities
        Expression, accessibility and extra modalities, of all features; see :func:`imputed_modalities`.
    spec
        Names of features, and whether a MuData is wanted.
    obs
        Annotation of those cells; a copy of it, with a column ``"measured"``, ``"imputed"`` or, of cells that were not
        measured for all features, ``"measured in part"`` for each modality
        (:attr:`~pyro_multivi.data.modality.Modality.source_column`), becomes that of the result.
    scale
        Arguments that were turned into quantities, to be kept with the result.
    measured_too
        Also estimate what was measured.
    out, silent
        As in :func:`~pyro_multivi.posterior.quantities.output.deliver`.

    Returns
    -------
    AnnData, MuData or Path
    """
    obs = obs.copy()
    modalities = imputed_modalities(program, spec)
    for modality in modalities:
        missing = (~modality.measured_in(cells.table)[cells.index]).numpy().astype(np.int8)
        words, panels = ["measured", "imputed"], modality.panels_in(cells.table)
        if panels is not None:
            in_part = ~panels.measured.all(1)[panels.code[cells.index]].numpy() & (missing == 0)
            missing[in_part] = len(words)
            words.append("measured in part")
        obs[modality.source_column] = pd.Categorical.from_codes(missing, pd.Index(words))
    var = _variables(spec, modalities)
    arguments = {"n_samples": average.n_samples, "use_z_mean": average.use_mean, "seed": average.seed, **scale}
    arguments.update(return_interval=average.level, measured_too=measured_too)
    uns = {UNS_KEY: json.dumps(arguments, default=str)}
    names = ("counts", *average.names)

    def fill(minibatches: Iterable[Cells], sink: Sink) -> None:
        _fill(program, minibatches, dict(zip(modalities, quantities, strict=True)), average, sink, measured_too)

    if out is not None:
        request = request_digest(program, cells, quantities, average, list(obs.index), measured_too=measured_too)
        places = {name: ELEMENTS[name] for name in names}
        write_shared(lambda: FileSink(out, request, obs, var, uns, sparse=places), fill, cells, silent is True)
        return Path(out)
    kept = ArraySink((len(obs), len(var)), sparse=names)
    stream(fill, cells, kept, silent is not False)
    layers = {ELEMENTS[name].removeprefix("layers/"): kept[name] for name in average.names}
    filled = AnnData(kept["counts"], obs=obs, var=var, layers=layers, uns=uns)
    return filled if spec.kind == "anndata" else _as_mudata(filled, spec, modalities)


def _fill(
    program: MultiVIProgram,
    minibatches: Iterable[Cells],
    quantities: Mapping[AnyModality, Quantity],
    average: Average,
    sink: Sink,
    measured_too: bool,
) -> None:
    """Stream counts and estimates, as sparse rows, into a sink that may hold the first of them already."""
    start = sink.n_done
    sites = [site for quantity in quantities.values() for site in quantity.sites]
    for cells in minibatches:
        rows: dict[str, list[sp.csr_matrix]] = {name: [] for name in ("counts", *average.names)}
        with evaluation_mode(program):
            decoded = decode(program, cells, average, sites)
            for modality, quantity in quantities.items():
                rows["counts"].append(_as_csr(modality.counts_in(cells)))
                found = _estimated_rows(decoded, cells, modality, quantity, average, start, measured_too)
                for name, matrix in found.items():
                    rows[name].append(matrix)
        for name, parts in rows.items():
            sink.append(name, sp.hstack(parts, format="csr"))
        start += len(cells)
        sink.commit(start)


def _estimated_rows(
    decoded: DecodedDraws,
    cells: Cells,
    modality: AnyModality,
    quantity: Quantity,
    average: Average,
    start: int,
    measured_too: bool,
) -> dict[str, sp.csr_matrix]:
    """Estimates of what a minibatch lacks of a modality, or with ``measured_too`` of all of it, by name."""
    measured = modality.measured_in(cells)
    panels: Panels | None = modality.panels_in(cells)
    lacks = ~measured if panels is None else ~measured | ~panels.measured.all(1)[panels.code]
    wanted = (torch.ones_like(measured) if measured_too else lacks).nonzero().squeeze(-1)
    known = None
    if panels is not None and not measured_too:
        known = (measured[wanted, None] & panels.measured[panels.code[wanted]]).cpu().numpy()
    pieces: dict[str, list[sp.csr_matrix]] = {name: [] for name in average.names}
    for block, found in blocks(decoded, quantity, average, start, wanted):
        kept = found["mean"] >= (quantity.threshold or 0.0)
        kept = kept if known is None else kept & ~known[:, block]
        for name, values in found.items():
            pieces[name].append(compress(np.where(kept, values, np.float32(0))))
    n_features = modality.counts_in(cells).shape[1]
    return {name: _scatter_rows(parts, wanted, len(cells), n_features) for name, parts in pieces.items()}


def imputed_modalities(program: MultiVIProgram, spec: DataSpec) -> list[AnyModality]:
    """RNA, ATAC and the modelled extra modalities, those of which there are features, in the order of a result."""
    return [*modelled(spec), *extra_features(program).values()]


def _variables(spec: DataSpec, modalities: Sequence[AnyModality]) -> pd.DataFrame:
    # A region or a protein may be called like a gene; in one table each has a name of its own.
    names: dict[str, None] = {}
    for modality in modalities:
        found = modality.feature_names_in(spec)
        names.update(dict.fromkeys([f"{name} ({modality.feature})" if name in names else name for name in found]))
    codes = np.repeat(np.arange(len(modalities)), [len(each.feature_names_in(spec)) for each in modalities])
    types = pd.Categorical.from_codes(codes, pd.Index([modality.feature_type for modality in modalities]))
    return pd.DataFrame({"feature_types": types}, index=pd.Index(list(names), dtype=object))


def _as_mudata(adata: AnnData, spec: DataSpec, modalities: Sequence[AnyModality]) -> MuData:
    """MuData of modalities that all hold all cells, with the values of an AnnData."""
    parts = {}
    for modality in modalities:
        part = adata[:, (adata.var["feature_types"] == modality.feature_type).to_numpy()].copy()
        part.var_names = list(modality.feature_names_in(spec))
        if isinstance(modality, ExtraFeatures):
            name: str | None = spec.setup.place_of_extra(modality.name)
        else:
            name = spec.setup.mudata_name(modality)
        layers = {layer: part.layers[layer] for layer in layer_names(part.layers)}
        parts[name] = AnnData(part.X, obs=part.obs[[modality.source_column]], var=part.var, layers=layers)
    with mudata_as_given() as mudata:
        mdata: MuData = mudata.MuData(parts)
    for column in adata.obs:
        mdata.obs[column] = adata.obs[column]
    mdata.uns.update(adata.uns)
    return mdata


def _as_csr(counts: Tensor) -> sp.csr_matrix:
    sparse = SparseCounts.of(counts)
    parts = (sparse.val.cpu().numpy(), sparse.col.cpu().numpy().astype(np.int32), sparse.crow.cpu().numpy())
    return sp.csr_matrix(parts, shape=(sparse.shape[0], sparse.shape[1]))


def _scatter_rows(parts: list[sp.csr_matrix], rows: Tensor, n_rows: int, n_columns: int) -> sp.csr_matrix:
    """Matrix of all rows from blocks of columns of some; the other rows are empty."""
    part = sp.hstack(parts, format="csr") if parts else compress(np.zeros((len(rows), n_columns), np.float32))
    length: NDArray[np.int64] = np.zeros(n_rows, dtype=np.int64)
    length[rows.cpu().numpy()] = np.diff(part.indptr)
    indptr = np.concatenate([[0], np.cumsum(length)])
    return sp.csr_matrix((part.data, part.indices, indptr), shape=(n_rows, n_columns))
