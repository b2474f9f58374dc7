"""Opening: files and folders of an AnnData as a data set whose counts stay on disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from anndata import AnnData

from pyro_multivi.data.checks import check_unique, checked, first_names, shown
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.data.setup.masks.declared import MASKS_KEY
from pyro_multivi.data.setup.options import UNS_KEY, Setup
from pyro_multivi.data.setup.register import with_feature_types
from pyro_multivi.data.stores.chunks import CONVERT
from pyro_multivi.data.stores.matrix import StoredMatrix, opened_group
from pyro_multivi.data.stores.reference import STORES, Store, Stores, checksum_of, element, keep, names_in
from pyro_multivi.datasets.assembly import SAME_CELLS, errors_naming, free_column, join_rows, spell_out_unlike_columns
from pyro_multivi.datasets.features.shared import shared_features
from pyro_multivi.datasets.readers import sample_name
from pyro_multivi.datasets.samples import refuse_repeated, setup_of

_log = logging.getLogger("pyro_multivi")


@checked
def open_stores(
    stores: Any,
    *,
    layer: str | None = None,
    sample_key: str = "sample",
    feature_type_key: str = "feature_types",
    feature_type_values: Mapping[str, str | Sequence[str]] | None = None,
) -> AnnData:
    """Open AnnData files or folders as one data set whose counts stay on disk.

    Setup, training and everything after it read the counts as they need them, so that memory does not grow with their
    number. The stores are never written to.

    Parameters
    ----------
    stores
        Path of an ``.h5ad`` file or a ``.zarr`` folder (extra ``scale``) with counts by rows (CSR, or dense); several
        of them by name, or as a list. Each may have RNA, ATAC or both. Of a modality those features are kept that all
        stores with it have, by name; what is left out is logged.
    layer
        Layer with the counts, to be given to setup too; ``X`` by default. Nothing else need be of a form that is read
        by rows.
    sample_key
        Column of ``obs`` to write, with the name of its store for each cell, where there are several.
    feature_type_key, feature_type_values
        As in :meth:`MULTIVI.setup_anndata`; used where there are several.

    Returns
    -------
    AnnData
        ``obs`` and ``var`` as :func:`join_samples` makes them, and no counts: ``X`` is None, ``uns`` says where they
        are. It may be cut, copied, given columns of ``obs`` and saved like any other; cells and features are found by
        name. ``uns["pyro_multivi"]["samples"]`` is a table of what is kept of several stores. ``obsm`` and ``varm`` are
        not taken over.

    Raises
    ------
    FileNotFoundError
        If there is nothing at a path.
    ValueError
        If a store is of another format, compressed by columns (CSC) or broken, if names in it are not unique, or if
        stores have no features of a modality, another genome, or most cells in common.

    Examples
    --------
    >>> import tempfile
    >>> from pyro_multivi.datasets.simulate import simulate_multiome
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     simulate_multiome((10, 0, 0), n_genes=5, n_regions=8).write_h5ad(folder + "/cells.h5ad")
    ...     adata = open_stores(folder + "/cells.h5ad")
    >>> adata.shape, adata.X is None
    ((10, 13), True)
    """
    return open_with_keys(stores, layer, [sample_key], feature_type_key, feature_type_values)


def open_with_keys(
    stores: Any,
    layer: str | None,
    sample_keys: Sequence[str],
    feature_type_key: str,
    feature_type_values: Mapping[str, str | Sequence[str]] | None,
) -> AnnData:
    """Open stores as :func:`open_stores`; the sample goes to the first of some columns that no store uses otherwise."""
    if isinstance(stores, (str, os.PathLike)):
        return _one_store(_Part.of(sample_name(stores), stores, layer))
    parts = [_Part.of(name, path, layer) for name, path in _named(stores).items()]
    _refuse_same_cells(parts)
    setup = with_feature_types(Setup("anndata", feature_type_key=feature_type_key), feature_type_values)
    found = {modality: _var_of(modality, parts, setup) for modality in MODALITIES}
    features = {modality: shared_features(modality, each) for modality, each in found.items()}
    tables = [next(iter(found[modality].values())).loc[names] for modality, names in features.items() if len(names)]
    if not tables:
        words = {word for part in parts for word in part.var.get(feature_type_key, ())}
        raise ValueError(f"stores: none has genes or regions; {feature_type_key!r} holds {first_names(words)}.")
    var = join_rows(tables)
    check_unique(var.index, "the genes and regions together", "rename the genes or the regions")
    types = [modality.feature_type for modality, names in features.items() for _ in names]
    var[feature_type_key] = pd.Categorical(types)
    joint = Stores([part.store for part in parts], [part.obs.index for part in parts], [p.var.index for p in parts])
    sample_key = free_column({part.store.name: (f"obs of {part.store.path}", part.obs) for part in parts}, sample_keys)
    kept = [_kept_of(part, found, features) for part in parts]
    table = pd.DataFrame(kept, index=[part.store.name for part in parts]).rename_axis(sample_key)
    _log.info("kept of each store:\n%s", table.to_string())
    return AnnData(
        obs=_join_obs(parts, joint.cells, sample_key), var=var, uns={UNS_KEY: {STORES: keep(joint), "samples": table}}
    )


def _one_store(part: _Part) -> AnnData:
    joint = Stores([part.store], [part.obs.index], [part.var.index])
    kept: dict[str, Any] = {STORES: keep(joint)}
    if part.setup is not None:
        kept["setup"] = part.setup
    return AnnData(obs=part.obs, var=part.var, uns={UNS_KEY: kept})


def _kept_of(
    part: _Part, found: Mapping[Modality, Mapping[str, pd.DataFrame]], features: Mapping[Modality, pd.Index[str]]
) -> dict[str, int]:
    """Numbers of a store's cells and features, and of the features that are kept."""
    numbers = {"cells": len(part.obs)}
    for modality, names in features.items():
        of_store = found[modality].get(part.store.name)
        numbers[modality.features] = 0 if of_store is None else len(of_store)
        numbers[f"{modality.features}_kept"] = 0 if of_store is None else len(names)
    return numbers


@dataclass(frozen=True)
class _Part:
    """A store with its tables of cells and features, and its setup if it was set up."""

    store: Store
    obs: pd.DataFrame
    var: pd.DataFrame
    setup: str | None

    @classmethod
    def of(cls, name: str, path: Any, layer: str | None) -> _Part:
        path = Path(os.path.abspath(path))
        if not path.exists():
            raise FileNotFoundError(f"stores: there is no file or folder {path}.")
        zarr = path.is_dir() and any((path / kind).is_file() for kind in (".zgroup", "zarr.json"))
        if not zarr and path.suffix.lower() != ".h5ad":
            raise ValueError(
                f"{path} cannot be read by cells: give an .h5ad file or a .zarr folder of an AnnData. To write one "
                f"of it alone: {CONVERT}."
            )
        with errors_naming(path):
            try:
                StoredMatrix(path, "X" if layer is None else f"layers/{layer}")
            except ValueError as error:
                raise error if layer is None else ValueError(f"{path}: layer={layer!r}: {error}") from error
            cells, features = names_in(path)
            with opened_group(path) as group:
                if f"varm/{MASKS_KEY}" in group:
                    raise ValueError(
                        f"{path} says which features each batch measured (varm[{MASKS_KEY!r}]), which is read from "
                        f"objects in memory only: adata = pyro_multivi.read({str(path)!r})."
                    )
                obs, var = element(group, "obs"), element(group, "var")
                place = f"uns/{UNS_KEY}/setup"
                setup = str(element(group, place)) if place in group else None
        store = Store(name, str(path), checksum_of(cells), checksum_of(features))
        return cls(store, obs, var, setup)


def _named(stores: Any) -> dict[str, Any]:
    """Paths by name, from a mapping or a list."""
    if isinstance(stores, Mapping):
        pairs = [(str(name), path) for name, path in stores.items()]
    elif isinstance(stores, Sequence) and not isinstance(stores, (str, bytes)):
        pairs = [(sample_name(path) if isinstance(path, (str, os.PathLike)) else "", path) for path in stores]
    else:
        raise TypeError(f"stores={shown(stores)} is not allowed: give a path, or a list or dictionary of paths.")
    for _, path in pairs:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"stores holds {shown(path)}, which is no path: objects in memory are for join_samples.")
    refuse_repeated([name for name, _ in pairs], "stores")
    return dict(pairs)


def _refuse_same_cells(parts: Sequence[_Part]) -> None:
    """Refuse stores of the same cells."""
    for number, one in enumerate(parts):
        for other in parts[:number]:
            same, size = int(one.obs.index.isin(other.obs.index).sum()), min(len(one.obs), len(other.obs))
            if same > SAME_CELLS * size:
                raise ValueError(
                    f"stores: {same} of {size} cells have the same names in {other.store.path} and {one.store.path}, "
                    "as if they were the same cells. Give one of the two; put modalities of the same cells into one "
                    "store; of other cells with these names, make them others (obs_names)."
                )


def _var_of(modality: Modality, parts: Sequence[_Part], setup: Setup) -> dict[str, pd.DataFrame]:
    """Features of a modality in each store that has it; stores of different genomes are refused."""
    found = {}
    for part in parts:
        own = setup_of(AnnData(var=part.var), setup, {})
        if own.feature_type_key not in part.var:
            raise ValueError(
                f"{part.store.path} has no column {setup.feature_type_key!r} in var, which tells genes from regions: "
                f"it has {first_names(part.var.columns)}. Give feature_type_key, or write the column."
            )
        types = part.var[own.feature_type_key].astype(str)
        var = part.var[types.isin(own.types_found(modality, types)).to_numpy()]
        if len(var):
            found[part.store.name] = var.drop(columns=own.feature_type_key)
    genomes = {name: {*var["genome"].dropna().astype(str)} - {""} for name, var in found.items() if "genome" in var}
    genomes = {name: known for name, known in genomes.items() if known}
    for name, known in genomes.items():
        first, others = next(iter(genomes.items()))
        if not known & others:
            raise ValueError(
                f"stores: {modality.features} of {first!r} are of the genome {first_names(sorted(others))}, those of "
                f"{name!r} of {first_names(sorted(known))}. Count all over one genome; if it is the same by two names, "
                "write one of them to var['genome'] of both."
            )
    return found


def _join_obs(parts: Sequence[_Part], cells: pd.Index[Any], sample_key: str) -> pd.DataFrame:
    names = [part.store.name for part in parts]
    frames = [part.obs.drop(columns=sample_key, errors="ignore") for part in parts]
    spell_out_unlike_columns(frames, "store")
    obs = join_rows(frames).set_axis(cells)
    sizes = [len(part.obs) for part in parts]
    obs[sample_key] = pd.Categorical([name for name, n in zip(names, sizes, strict=True) for _ in range(n)], names)
    return obs
