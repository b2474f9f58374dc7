"""Adapter: counts and columns of an AnnData or a MuData in one form, as setup described them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi.data.checks import (
    UnknownKeyError,
    check_once,
    check_strings,
    check_unique,
    first_names,
    shown,
    unknown_key,
)
from pyro_multivi.data.minified.layout import posterior_of
from pyro_multivi.data.modality import MODALITIES, RNA, Modality
from pyro_multivi.data.setup.extra.sources import ExtraSource, extra_sources
from pyro_multivi.data.setup.masks.declared import FeatureMasks, masks_key, masks_of, measured_features, panel_keys
from pyro_multivi.data.setup.options import Setup, elsewhere, gathering, how_to_make, in_memory, is_lazy, is_mudata
from pyro_multivi.data.stores.reference import stores_of
from pyro_multivi.data.vocabulary import spelled

# Rows looked at when searching for the layer that holds counts.
_PEEK = 200
# Values of which most lie this near to whole numbers were counts before they were computed with.
_NEARLY, _MOSTLY = 0.01, 0.95


@dataclass(frozen=True)
class Counts:
    """The counts of one modality, not read yet.

    Attributes
    ----------
    modality
        RNA or ATAC.
    matrix
        (rows, all columns): sparse, dense, or lying in a file.
    owner, where
        How the user would write the AnnData that holds it, and the matrix.
    features, columns
        Names of this modality's features and their columns in ``matrix``.
    cells
        Names of the rows of ``matrix``.
    rows
        Row of each cell of the data set, -1 where it has none; None if the rows are the cells.
    hint
        Suggests where raw counts may be found if these are none, given ``placed``.
    masks
        Features that were measured in each panel; None if all were.
    placed
        Whether their place is that of a model's setup, so that no argument can name another.
    beside
        Whether the object holds a matrix at ``where`` too, which is not read: its counts are those of its stores.
    """

    modality: Modality
    matrix: Any
    owner: str
    where: str
    features: pd.Index[Any]
    columns: NDArray[np.intp]
    cells: pd.Index[Any]
    rows: NDArray[np.intp] | None
    hint: Callable[[bool], str]
    masks: FeatureMasks | None = None
    placed: bool = False
    beside: bool = False

    def present(self, n_cells: int) -> NDArray[np.bool_]:
        """Whether each cell of the data set has a row, shape (n_cells,)."""
        return np.ones(n_cells, dtype=bool) if self.rows is None else self.rows >= 0


@dataclass(frozen=True)
class Opened:
    """An AnnData or MuData in one form.

    Attributes
    ----------
    name
        ``"adata"`` or ``"mdata"``, for messages.
    cells
        Names of the cells: the row order of everything made from the data.
    counts
        Counts of each modality of which the object has features, in the order of ``MODALITIES``.
    tables
        Tables of cells by how the user would write them; the main one first.
    table_of
        Name of the table for each argument whose columns lie in one modality of a MuData.
    ignored
        Number of features of each other type, or other modality of a MuData, that are not used.
    extra
        Extra modalities by name, those that are there.
    posterior
        Of minified data, the posterior of the cells, (n, P).
    panel_keys
        Columns that may hold the panels of the masks.
    """

    name: str
    cells: pd.Index[Any]
    counts: dict[Modality, Counts]
    tables: dict[str, pd.DataFrame]
    table_of: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    extra: dict[str, ExtraSource] = field(default_factory=dict)
    posterior: NDArray[np.float32] | None = None
    panel_keys: tuple[str, ...] = ()

    def has_column(self, argument: str, key: str) -> bool:
        """Whether the column that an argument names is there."""
        return key in self.tables[self.place_of(argument)]

    def place_of(self, argument: str) -> str:
        """Key among ``tables`` of the one in which an argument's columns lie."""
        return self.table_of.get(argument, next(iter(self.tables)))

    def column(self, argument: str, key: str) -> pd.Series[Any]:
        """The column that an argument names, one value per cell, indexed by cell; every cell has to have one."""
        where = self.place_of(argument)
        table = self.tables[where]
        if key not in table:
            found = elsewhere(argument, key, self.tables, self.cells)
            raise UnknownKeyError(f"{unknown_key(argument, key, where, table.columns)}{found}")
        check_once(table, key, where)
        rows = table.index.get_indexer(self.cells)
        absent = rows < 0
        if absent.any():
            raise ValueError(
                f"{argument}={key!r} lies in {where}, where {int(absent.sum())} of {len(absent)} cells are "
                f"absent: {first_names(self.cells[absent])}. Put a column with a value for every cell into "
                f"mdata.obs and leave {argument!r} out of modalities."
                f"{gathering(argument, key, self.tables, self.cells)}"
            )
        return pd.Series(table[key].array[rows], index=self.cells, name=key)


def layer_names(layers: Iterable[str | None]) -> list[str]:
    """Names of the layers of an AnnData, without the None by which anndata counts X among them since 0.13."""
    return [name for name in layers if name is not None]


def open_data(data: Any, setup: Setup) -> Opened:
    """Find counts and columns in an AnnData or MuData, as setup described them.

    The object may lack a modality. One of the other kind than was set up is read by the same keys: modalities of
    a MuData are then found by name, genes and peaks of an AnnData by ``var["feature_types"]``.
    """
    if is_mudata(data):
        return _open_mudata(data, setup)
    if isinstance(data, AnnData):
        return _open_anndata(data, setup)
    raise TypeError(f"adata must be an AnnData or a MuData, got {shown(data)}{how_to_make(data)}.")


def _open_anndata(adata: AnnData, setup: Setup) -> Opened:
    _check_cells(adata.obs_names, "adata.obs_names", "adata.obs_names_make_unique()")
    types = _feature_types(adata, setup)
    matrices: dict[str | None, Any] = {}
    measured = measured_features(adata, "adata")
    chosen = {modality: types.isin(setup.types_found(modality, types)).to_numpy() & measured for modality in MODALITIES}
    key = masks_key(adata, setup)
    counts = {
        modality: _counts(adata, "adata", modality, setup, matrices, key, np.flatnonzero(columns))
        for modality, columns in chosen.items()
        if columns.any()
    }
    if not counts:
        if not setup.feature_type_key:
            raise ValueError("adata has no features: adata.n_vars is 0.")
        wanted = " nor ".join(f"{each.features} ({first_names(setup.types_of(each))})" for each in MODALITIES)
        values = ", ".join(f"{each.features!r}: ..." for each in MODALITIES)
        found = first_names(types.unique()) or "nothing"
        raise ValueError(
            f"adata.var[{setup.feature_type_key!r}] holds {found}: neither {wanted}. Say which "
            f"is which: feature_type_values={{{values}}}."
        )
    other = types[measured & ~np.any([*chosen.values()], axis=0)]
    return Opened(
        name="adata",
        cells=adata.obs_names,
        counts=counts,
        tables={"adata.obs": in_memory(adata.obs)},
        ignored={str(kind): int(size) for kind, size in other.value_counts().items()},
        extra=extra_sources(adata, "adata", setup, _places_of),
        posterior=posterior_of(adata),
        panel_keys=panel_keys(adata, setup),
    )


def _feature_types(adata: AnnData, setup: Setup) -> pd.Series[Any]:
    key = setup.feature_type_key
    if not key:
        # Of which modality they are is known to the constructor of a model.
        return pd.Series(RNA.feature_type, index=adata.var_names)
    if key in adata.var:
        check_once(adata.var, key, "adata.var")
        return in_memory(adata.var)[key].astype(str)
    if setup.kind == "mudata":
        raise TypeError(
            f"A MuData was set up and an AnnData was given whose var has no column {key!r}. Give a MuData, "
            f"or say what each feature is: adata.var[{key!r}] = 'Gene Expression' (or 'Peaks')."
        )
    raise ValueError(
        f"{unknown_key('feature_type_key', key, 'adata.var', adata.var.columns)} This column separates genes "
        f"from regions; if all features are of one type, write adata.var[{key!r}] = 'Gene Expression' "
        f"(or 'Peaks')."
    )


def _open_mudata(mdata: Any, setup: Setup) -> Opened:
    if mdata.axis != 0:
        raise ValueError(f"mdata.axis is {mdata.axis}: modalities must share cells (axis 0), not features.")
    _check_cells(mdata.obs_names, "mdata.obs_names", "mdata.obs_names_make_unique()")
    names = {modality: setup.mudata_name(modality) for modality in MODALITIES}
    if setup.kind == "anndata":
        names = known_modalities(mdata)
    known = {*names.values(), *map(setup.place_of_extra, setup.extra)}
    counts = {}
    for modality, name in names.items():
        if name not in mdata.mod:
            continue
        part, owner = mdata.mod[name], f"mdata.mod[{name!r}]"
        columns = np.flatnonzero(measured_features(part, owner))
        if len(columns):
            rows = _rows_of(mdata, part, owner)
            counts[modality] = _counts(part, owner, modality, setup, {}, masks_key(mdata, setup), columns, rows)
    if not counts:
        wanted = first_names(name for name in names.values() if name is not None)
        empty = " without any features" if any(name in mdata.mod for name in names.values()) else ""
        raise ValueError(f"mdata has none of the modalities {wanted}; it has {first_names(mdata.mod)}{empty}.")
    return Opened(
        name="mdata",
        cells=mdata.obs_names,
        counts=counts,
        tables={"mdata.obs": mdata.obs, **{_obs_of(name): part.obs for name, part in mdata.mod.items()}},
        # In an object without that modality the column is looked for in the main table.
        ignored={name: part.n_vars for name, part in mdata.mod.items() if name not in known},
        table_of={argument: _obs_of(name) for argument, name in setup.obs_modalities.items() if name in mdata.mod},
        extra=extra_sources(mdata, "mdata", setup, _places_of),
        posterior=posterior_of(mdata),
        panel_keys=panel_keys(mdata, setup),
    )


def _obs_of(modality: str) -> str:
    return f"mdata.mod[{modality!r}].obs"


def known_modalities(mdata: Any) -> dict[Modality, str | None]:
    """Name of each modality in a MuData, recognised by its spelling; None where there is none.

    An error if there is none at all, or more than one name for a modality.
    """
    found = {modality: [name for name in mdata.mod if spelled(name) == modality.name] for modality in MODALITIES}
    if not any(found.values()) or any(len(names) > 1 for names in found.values()):
        raise ValueError(
            f"Which modality of mdata is RNA and which ATAC cannot be seen from their names: "
            f"{first_names(mdata.mod)}. Give modalities={{'rna_layer': ..., 'atac_layer': ...}}."
        )
    return {modality: next(iter(names), None) for modality, names in found.items()}


def _rows_of(mdata: Any, part: AnnData, owner: str) -> NDArray[np.intp] | None:
    """Row in a modality of each cell of the MuData, by name: ``obsmap`` may be out of date."""
    check_strings(part.obs_names, f"{owner}.obs_names")
    check_unique(part.obs_names, f"{owner}.obs_names", f"{owner}.obs_names_make_unique(); mdata.update()")
    stray = ~part.obs_names.isin(mdata.obs_names)
    if stray.any():
        raise ValueError(
            f"{int(stray.sum())} cells of {owner} are not in mdata.obs_names: "
            f"{first_names(part.obs_names[stray])}. Call mdata.update()."
        )
    return None if part.obs_names.equals(mdata.obs_names) else part.obs_names.get_indexer(mdata.obs_names)


def _places_of(mdata: Any, part: AnnData, owner: str) -> tuple[NDArray[np.intp] | None, NDArray[np.intp]]:
    return _rows_of(mdata, part, owner), np.flatnonzero(measured_features(part, owner))


def _check_cells(names: pd.Index[Any], where: str, fix: str) -> None:
    if len(names) == 0:
        raise ValueError(f"{where} is empty: there are no cells.")
    check_strings(names, where)
    check_unique(names, where, fix)


def _counts(
    adata: AnnData,
    owner: str,
    modality: Modality,
    setup: Setup,
    matrices: dict[str | None, Any],
    masks: str | None,
    columns: NDArray[np.intp],
    rows: NDArray[np.intp] | None = None,
) -> Counts:
    layer, argument = setup.layer_of(modality), setup.layer_argument(modality)
    check_strings(adata.var_names, f"{owner}.var_names")
    features = adata.var_names[columns]
    check_unique(features, f"{owner}.var_names ({modality.features})", f"{owner}.var_names_make_unique()")
    where = f"{owner}.X" if layer is None else f"{owner}.layers[{layer!r}]"
    if (stores := stores_of(adata)) is not None:
        matrix = stores.matrix(layer, adata.var_names, argument, measured_features(adata, owner))
        places = stores.cells, stores.rows_of(adata.obs_names)
        hint = {False: f", perhaps by {argument}.", True: "."}
        beside = adata.X is not None if layer is None else layer in adata.layers
        return Counts(modality, matrix, owner, where, features, columns, *places, hint.__getitem__, beside=beside)
    if layer is not None and layer not in adata.layers:
        mend = f" {owner}.X looks like counts: {where} = {owner}.X.copy(), or {argument}=None in the setup."
        mend = mend if adata.X is not None and _looks_like_counts(adata.X) else ""
        raise UnknownKeyError(f"{unknown_key(argument, layer, f'{owner}.layers', layer_names(adata.layers))}{mend}")
    if layer not in matrices:
        # Once, and for both modalities the same: each access to a view copies, each to a file makes a new object.
        matrices[layer] = adata.X if layer is None else adata.layers[layer]
    matrix = matrices[layer]
    if matrix is None:
        raise ValueError(f"{where} is empty. Raw counts are needed{counts_hint(adata, layer, owner, argument)}")
    if isinstance(matrix, np.ma.MaskedArray):
        raise ValueError(
            f"{where} is a masked array, of which {int(np.ma.count_masked(matrix))} values are hidden. Say what they "
            f"are, for instance zero: {where} = {where}.filled(0)."
        )
    return Counts(
        modality=modality,
        matrix=matrix,
        owner=owner,
        where=where,
        features=features,
        columns=columns,
        cells=adata.obs_names,
        rows=rows,
        hint=lambda placed: counts_hint(adata, layer, owner, None if placed else argument),
        masks=masks_of(adata, owner, modality, masks, columns),
    )


def counts_hint(owner: Any, layer: str | None, name: str, argument: str | None) -> str:
    """The end of the sentence "Raw counts are needed": where in ``owner``, called ``name``, they seem to be.

    Without an ``argument`` that could name another layer, the advice is to put them where they were looked for.
    """
    where = f"{name}.X" if layer is None else f"{name}.layers[{layer!r}]"
    for other in layer_names(owner.layers):
        if other != layer and _looks_like_counts(owner.layers[other]):
            found = f"{name}.layers[{other!r}]"
            mend = f"give {argument}={other!r}" if argument else f"put them there: {where} = {found}.copy()"
            return f": {found} looks like counts, {mend}."
    if layer is not None and owner.X is not None and _looks_like_counts(owner.X):
        mend = f"give {argument}=None" if argument else f"put them there: {where} = {name}.X.copy()"
        return f": {name}.X looks like counts, {mend}."
    if owner.raw is not None and _looks_like_counts(owner.raw.X):
        found = f"{name}.raw[:, {name}.var_names].X"
        mend = f"copy it to a layer ({name}.layers['counts'] = {found}) and give {argument}='counts'"
        return f": {name}.raw looks like counts, {mend if argument else f'put them there: {where} = {found}'}."
    layers = first_names(layer_names(owner.layers)) or "none"
    nowhere = f", and none are in {name}: {name}.X, layers ({layers}) and raw were looked at"
    matrix = owner.X if layer is None else owner.layers[layer]
    if matrix is None:
        return f"{nowhere}. Put them into {where}."
    values = _first_values(matrix)
    if values.size and values.dtype.kind == "f" and np.isfinite(values).all() and (values >= 0).all():
        rounded = f"{where}.rint()" if hasattr(matrix, "rint") else f"np.rint({where})"
        if np.mean(np.abs(values - np.rint(values)) < _NEARLY) > _MOSTLY:
            return f". These are nearly whole: round them, {where} = {rounded}."
        return (
            f"{nowhere}. Normalised values (TPM, CPM, logarithms) are not to be used: read the counts they were made "
            f"from. Counts that were corrected for ambient RNA may be rounded: {where} = {rounded}."
        )
    return f"{nowhere}. Read the counts that these values were made from."


def _first_values(matrix: Any) -> NDArray[Any]:
    """Values of the first rows, without the zeros that a sparse matrix leaves out."""
    block: Any = matrix[:_PEEK]
    if is_lazy(block):
        block = block.compute()
    # A compressed block has its stored values in .data; NumPy's .data is a buffer.
    return np.asarray(getattr(block, "data", block) if sp.issparse(block) else block)


def _looks_like_counts(matrix: Any) -> bool:
    values = _first_values(matrix)
    if values.size == 0 or values.dtype.kind not in "buif":
        return False
    return bool(np.isfinite(values).all() and (values >= 0).all() and (values == np.floor(values)).all())
