"""A mosaic data set with its gaps filled."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi._optional import require
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.posterior.engine.decode import Average, decode
from pyro_multivi.posterior.quantities.array_sink import Arrays, Sink
from pyro_multivi.posterior.quantities.estimates import Quantity, blocks, compress
from pyro_multivi.posterior.quantities.file_sink import Store
from pyro_multivi.posterior.quantities.output import remaining, request_of
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

#: Columns of obs that say where the entries of a cell come from: ``"measured"`` or ``"imputed"``.
PROVENANCE = {"rho": "expression_source", "p": "accessibility_source"}
#: Key of uns that says what was imputed.
UNS_KEY = "imputation"
#: Layers by what they hold; counts are X.
PLACES = {
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
) -> Any:
    """Measured counts beside estimates of what was not measured.

    Parameters
    ----------
    program
        Model and guide.
    cells
        The cells asked for.
    quantities
        Expression and accessibility, of all features.
    average
        What the estimates are averaged over.
    spec
        Names of features, and whether a MuData is wanted.
    obs
        Of those cells; the result's is a copy of it with the columns of :data:`PROVENANCE`.
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
    for site, has in (("rho", cells.table.has_rna), ("p", cells.table.has_atac)):
        missing = (~has[cells.index]).numpy().astype(np.int8)
        obs[PROVENANCE[site]] = pd.Categorical.from_codes(missing, pd.Index(["measured", "imputed"]))
    var = _variables(spec.gene_names, spec.region_names)
    asked = {"n_samples": average.n_samples, "use_z_mean": average.use_mean, "seed": average.seed, **scale}
    asked.update(return_interval=average.level, measured_too=measured_too)
    uns = {UNS_KEY: json.dumps(asked, default=str)}
    names = ("counts", *average.names)
    if out is not None:
        request = request_of(program, cells, quantities, average, list(obs.index), measured_too=measured_too)
        with Store(out, request, obs, var, uns, sparse={name: PLACES[name] for name in names}) as store:
            rest = remaining(cells, store.n_done, silent is True)
            _fill(program, rest, quantities, average, store, measured_too)
        return store.path
    kept = Arrays((len(obs), len(var)), sparse=names)
    _fill(program, remaining(cells, 0, silent is not False), quantities, average, kept, measured_too)
    layers = {PLACES[name].removeprefix("layers/"): kept[name] for name in average.names}
    filled = AnnData(kept["counts"], obs=obs, var=var, layers=layers, uns=uns)
    return filled if spec.kind == "anndata" else _as_mudata(filled, spec)


def _fill(
    program: MultiVIProgram,
    minibatches: Iterable[Cells],
    quantities: Sequence[Quantity],
    average: Average,
    sink: Sink,
    measured_too: bool,
) -> None:
    """Stream counts and estimates, as sparse rows, into a sink that may hold the first of them already."""
    start = sink.n_done
    sites = [site for quantity in quantities for site in quantity.sites]
    for cells in minibatches:
        rows: dict[str, list[sp.csr_matrix]] = {name: [] for name in ("counts", *average.names)}
        with evaluation_mode(program):
            decoded = decode(program, cells, average, sites)
            for quantity in quantities:
                counts, has = (cells.x, cells.has_rna) if quantity.site == "rho" else (cells.y, cells.has_atac)
                rows["counts"].append(_as_csr(counts))
                wanted = (torch.ones_like(has) if measured_too else ~has).nonzero().squeeze(-1)
                pieces: dict[str, list[sp.csr_matrix]] = {name: [] for name in average.names}
                for _, found in blocks(decoded, quantity, average, start, wanted):
                    kept = found["mean"] >= (quantity.threshold or 0.0)
                    for name, values in found.items():
                        pieces[name].append(compress(np.where(kept, values, np.float32(0))))
                for name, parts in pieces.items():
                    rows[name].append(_spread(parts, wanted, len(cells), counts.shape[1]))
        for name, parts in rows.items():
            sink.append(name, sp.hstack(parts, format="csr"))
        start += len(cells)
        sink.commit(start)


def _variables(gene_names: Sequence[str], region_names: Sequence[str]) -> pd.DataFrame:
    kinds = pd.Categorical(
        [RNA.feature_type] * len(gene_names) + [ATAC.feature_type] * len(region_names),
        pd.Index([RNA.feature_type, ATAC.feature_type]),
    )
    return pd.DataFrame({"feature_types": kinds}, index=pd.Index([*gene_names, *region_names], dtype=object))


def _as_mudata(adata: AnnData, spec: DataSpec) -> Any:
    """The same as a MuData of two modalities that both hold all cells."""
    mudata = require("mudata", "mudata")
    parts = {}
    for name, kind, site in (
        (spec.setup.rna_modality, RNA.feature_type, "rho"),
        (spec.setup.atac_modality, ATAC.feature_type, "p"),
    ):
        part = adata[:, (adata.var["feature_types"] == kind).to_numpy()].copy()
        parts[name] = AnnData(part.X, obs=part.obs[[PROVENANCE[site]]], var=part.var, layers=dict(part.layers))
    # Nothing to pull from the parts; without the option mudata 0.3 warns of its future default.
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData(parts)
    for column in adata.obs:
        mdata.obs[column] = adata.obs[column]
    mdata.uns.update(adata.uns)
    return mdata


def _as_csr(counts: Tensor) -> sp.csr_matrix:
    sparse = counts if isinstance(counts, SparseCounts) else SparseCounts.from_dense(counts)
    parts = (sparse.val.cpu().numpy(), sparse.col.cpu().numpy().astype(np.int32), sparse.crow.cpu().numpy())
    return sp.csr_matrix(parts, shape=(sparse.shape[0], sparse.shape[1]))


def _spread(parts: list[sp.csr_matrix], rows: Tensor, n_rows: int, n_columns: int) -> sp.csr_matrix:
    """Blocks of columns of some rows as a matrix of all rows, the others empty."""
    part = sp.hstack(parts, format="csr") if parts else compress(np.zeros((len(rows), n_columns), np.float32))
    length: NDArray[np.int64] = np.zeros(n_rows, dtype=np.int64)
    length[rows.cpu().numpy()] = np.diff(part.indptr)
    indptr = np.concatenate([[0], np.cumsum(length)])
    return sp.csr_matrix((part.data, part.indices, indptr), shape=(n_rows, n_columns))
