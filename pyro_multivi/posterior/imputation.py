"""A mosaic data set with its gaps filled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi._optional import require
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.vocabulary import GENES, PEAKS
from pyro_multivi.posterior.draws import evaluating
from pyro_multivi.posterior.normalization import Average, Quantity, blocks, compress, decode
from pyro_multivi.posterior.sinks import Arrays, Sink
from pyro_multivi.program import MultiVIProgram

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


def fill(
    program: MultiVIProgram,
    minibatches: Any,
    quantities: Sequence[Quantity],
    average: Average,
    sink: Sink,
    measured_too: bool = False,
) -> None:
    """Stream measured counts and the estimates of what was not measured, as sparse rows, into a sink.

    Parameters
    ----------
    program
        Model and guide.
    minibatches
        The cells, from ``sink.n_done`` on.
    quantities
        Expression and accessibility, of all features; the columns are in this order.
    average
        What the estimates are averaged over.
    sink
        Takes ``counts`` and the names of ``average``.
    measured_too
        Also estimate what was measured.
    """
    start = sink.n_done
    sites = [quantity.site for quantity in quantities]
    for cells in minibatches:
        rows: dict[str, list[sp.csr_matrix]] = {name: [] for name in ("counts", *average.names)}
        with evaluating(program):
            decoded = decode(program, cells, average, sites)
            for quantity in quantities:
                counts, has = (cells.x, cells.has_rna) if quantity.site == "rho" else (cells.y, cells.has_atac)
                rows["counts"].append(_as_csr(counts))
                wanted = (torch.ones_like(has) if measured_too else ~has).nonzero().squeeze(-1)
                pieces: dict[str, list[sp.csr_matrix]] = {name: [] for name in average.names}
                for _, found in blocks(decoded, quantity, average, start, wanted):
                    kept = found["mean"] >= (quantity.threshold or 0.0)
                    for name, values in found.items():
                        pieces[name].append(compress(np.where(kept, values, 0.0)))
                for name, parts in pieces.items():
                    rows[name].append(_spread(parts, wanted, len(cells), counts.shape[1]))
        for name, parts in rows.items():
            sink.append(name, sp.hstack(parts, format="csr"))
        start += len(cells)
        sink.commit(start)


def provenance(program: MultiVIProgram, has_rna: Tensor, has_atac: Tensor) -> dict[str, pd.Categorical]:
    """Columns of obs: where each cell's entries of each modality come from."""
    modelled = {"rho": program.config.n_genes, "p": program.config.n_regions}
    return {
        PROVENANCE[site]: pd.Categorical.from_codes((~has).numpy().astype(np.int8), ["measured", "imputed"])
        for site, has in (("rho", has_rna), ("p", has_atac))
        if modelled[site]
    }


def variables(gene_names: Sequence[str], region_names: Sequence[str]) -> pd.DataFrame:
    """The features of the result, genes first."""
    kinds = pd.Categorical([GENES] * len(gene_names) + [PEAKS] * len(region_names), [GENES, PEAKS])
    return pd.DataFrame({"feature_types": kinds}, index=pd.Index([*gene_names, *region_names], dtype=object))


def as_anndata(found: Arrays, names: Sequence[str], obs: pd.DataFrame, var: pd.DataFrame, uns: Any) -> AnnData:
    """The streamed rows as an AnnData."""
    layers = {PLACES[name].removeprefix("layers/"): found[name] for name in names}
    return AnnData(found["counts"], obs=obs, var=var, layers=layers, uns=uns)


def as_mudata(adata: AnnData, rna: str, atac: str) -> Any:
    """The same as a MuData of two modalities that hold all cells."""
    mudata = require("mudata", "mudata")
    parts = {}
    for name, kind, source in ((rna, GENES, PROVENANCE["rho"]), (atac, PEAKS, PROVENANCE["p"])):
        part = adata[:, (adata.var["feature_types"] == kind).to_numpy()].copy()
        parts[name] = AnnData(part.X, obs=part.obs[[source]], var=part.var, layers=dict(part.layers))
    # Nothing to pull from the parts; without the option mudata 0.3 warns of its future default.
    with mudata.set_options(pull_on_update=False):
        mdata = mudata.MuData(parts)
    mdata.obs = adata.obs
    mdata.uns.update(adata.uns)
    return mdata


def description(average: Average, **arguments: Any) -> dict[str, str]:
    """What was asked, to be kept in uns."""
    kept = {"n_samples": average.n_samples, "batches": average.batches, "seed": average.seed, **arguments}
    return {UNS_KEY: json.dumps(kept, default=str)}


def _as_csr(counts: Tensor) -> sp.csr_matrix:
    sparse = counts if isinstance(counts, SparseCounts) else SparseCounts.from_dense(counts)
    parts = (sparse.val.cpu().numpy(), sparse.col.cpu().numpy().astype(np.int32), sparse.crow.cpu().numpy())
    return sp.csr_matrix(parts, shape=tuple(sparse.shape))


def _spread(parts: list[sp.csr_matrix], rows: Tensor, n_rows: int, n_columns: int) -> sp.csr_matrix:
    """Blocks of columns of some rows as a matrix of all rows, the others empty."""
    if not parts:
        return sp.csr_matrix((n_rows, n_columns), dtype=np.float32)
    part = sp.hstack(parts, format="csr")
    length: NDArray[np.int64] = np.zeros(n_rows, dtype=np.int64)
    length[rows.cpu().numpy()] = np.diff(part.indptr)
    indptr = np.concatenate([[0], np.cumsum(length)])
    return sp.csr_matrix((part.data, part.indices, indptr), shape=(n_rows, n_columns))
