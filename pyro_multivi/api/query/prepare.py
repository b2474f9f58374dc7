"""Queries in the form of a reference: its features in their order, those that are missing marked as not measured."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.minibatch import ExtraFeatures
from pyro_multivi.data.modality import PROTEIN, Modality
from pyro_multivi.data.setup.adapter import Counts, Opened, layer_names
from pyro_multivi.data.setup.masks.declared import MASKS_KEY, MEASURED_COLUMN
from pyro_multivi.data.setup.modalities import UNTYPED
from pyro_multivi.data.setup.options import is_lazy
from pyro_multivi.data.setup.spec import DataSpec

logger = logging.getLogger("pyro_multivi")


def in_reference_order(
    part: AnnData, counts: Mapping[Modality, Counts | None], spec: DataSpec, type_key: str | None
) -> AnnData:
    """A new AnnData with the features of a reference, in its order.

    Parameters
    ----------
    part
        The query, or one modality of it.
    counts
        Counts of the modalities that it is to have, None for one of which it has no features.
    spec
        Specification of the reference.
    type_key
        Column of var with feature types, which missing features need; None or empty if there is none.

    Raises
    ------
    ValueError
        If it shares no features with the reference, or lies in a file.
    """
    takes, names, types = [], [], []
    for modality, found in counts.items():
        wanted = pd.Index(modality.feature_names_in(spec), dtype=object)
        names.append(wanted)
        if found is None:
            takes.append(np.full(len(wanted), -1))
            types += [spec.setup.types_of(modality)[0]] * len(wanted)
            logger.info("It has no %s: zeros that var[%r] marks as not measured.", modality.features, MEASURED_COLUMN)
            continue
        place = found.features.get_indexer(wanted)
        if (place < 0).all():
            raise ValueError(
                f"{found.where} shares no {modality.features} with reference_model, which has {len(wanted)}: "
                f"{first_names(wanted)}. It has {len(found.features)}: {first_names(found.features)}. Give them the "
                "same names."
            )
        takes.append(np.where(place < 0, -1, found.columns[place]))
        types += [_type_of(part, found, type_key)] * len(wanted)
        _say(found, place, wanted)
    take, var_names = np.concatenate(takes), pd.Index(np.concatenate(names), dtype=object)
    var = part.var.iloc[np.where(take < 0, 0, take)].copy()
    var.index = var_names
    for name in var if (take < 0).any() else ():
        # A truth value that is missing has no place in a column of numpy's.
        column = var[name].astype("boolean") if pd.api.types.is_bool_dtype(var[name].dtype) else var[name]
        var[name] = column.where(take >= 0)
    if type_key:
        var[type_key] = pd.Categorical(types) if isinstance(part.var[type_key].dtype, pd.CategoricalDtype) else types
    var[MEASURED_COLUMN] = take >= 0
    masks = {key: part.varm[key] for key in (spec.setup.feature_masks, MASKS_KEY) if key in part.varm}
    made = AnnData(
        X=None if part.X is None else _columns(part.X, take),
        obs=part.obs.copy(),
        var=var,
        uns=dict(part.uns),
        obsm={key: value.copy() for key, value in part.obsm.items()},
        obsp={key: value.copy() for key, value in part.obsp.items()},
        varm={key: _masks_at(table, take, var_names) for key, table in masks.items()},
        layers={key: _columns(part.layers[key], take) for key in layer_names(part.layers)},
    )
    if part.raw is not None:
        made.raw = part.raw.to_adata()
    return made


def _masks_at(table: pd.DataFrame, take: NDArray[np.intp], names: pd.Index[Any]) -> pd.DataFrame:
    """Feature masks in the order of the reference, False for what is missing."""
    found = table.iloc[np.where(take < 0, 0, take)].set_axis(names)
    return found & (take >= 0)[:, None]


def proteins_in_reference_order(part: AnnData, owner: str, spec: DataSpec) -> AnnData:
    """A new AnnData with the proteins of a reference, in its order, of a modality called ``owner``."""
    kind: Any = ExtraFeatures(PROTEIN)
    every = np.arange(part.n_vars)
    counts = Counts(kind, part.X, owner, owner, part.var_names, every, part.obs_names, None, str)
    return in_reference_order(part, {kind: counts}, spec, None)


def say_left_out(opened: Opened, spec: DataSpec) -> None:
    """Log how many features are left out that belong to no modality of the reference, or to none that is known."""
    others = {each.features: len(part.features) for each, part in opened.counts.items() if not each.n_features_in(spec)}
    if UNTYPED in opened.ignored and not spec.setup.feature_type_key:
        others[f"{UNTYPED} of no type"] = opened.ignored[UNTYPED]
    for what, number in others.items():
        logger.warning("adata: %d %s that the reference does not know are left out.", number, what)


def _type_of(part: AnnData, counts: Counts, key: str | None) -> str:
    """Feature type that missing features get: that of the others."""
    return "" if not key else str(part.var[key].iloc[counts.columns[0]])


def _say(counts: Counts, place: NDArray[np.intp], wanted: pd.Index[Any]) -> None:
    what, missing = counts.modality.features, wanted[place < 0]
    unknown = counts.features[~counts.features.isin(wanted)]
    parts = [f"{int((place >= 0).sum())} of the reference's {len(wanted)} {what} are there"]
    if len(missing):
        parts.append(
            f"{len(missing)} are missing ({first_names(missing, 3)}): zeros that var[{MEASURED_COLUMN!r}] marks as not "
            "measured"
        )
    if len(unknown):
        parts.append(f"{len(unknown)} that it does not know are left out ({first_names(unknown, 3)})")
    logger.log(logging.WARNING if len(unknown) else logging.INFO, "%s: %s.", counts.where, "; ".join(parts))


def _columns(given: Any, take: NDArray[np.intp]) -> Any:
    """Columns of a matrix, zeros where ``take`` is negative."""
    if is_lazy(given) or not (sp.issparse(given) or isinstance(given, np.ndarray)):
        raise ValueError(
            "A query in a file or not computed yet cannot be rearranged: load it, adata = adata.to_memory(); or give "
            "it to load_query_data as it is, which finds features by name."
        )
    matrix: Any = given
    is_matrix = isinstance(given, sp.spmatrix)
    there = np.flatnonzero(take >= 0)
    kept = matrix[:, take[there]]
    shape = (matrix.shape[0], len(take))
    if isinstance(given, np.ndarray):
        made = np.zeros(shape, dtype=matrix.dtype)
        made[:, there] = kept
        return made
    rows = kept.tocsr()
    kind: Any = sp.csr_matrix if is_matrix else sp.csr_array
    return kind((rows.data, there[rows.indices], rows.indptr), shape=shape)
