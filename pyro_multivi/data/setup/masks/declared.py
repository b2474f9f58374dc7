"""Feature masks of an object: a table of ``varm`` with the features that were measured in each panel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.data.checks import check_once, first_names, shown, unknown_key
from pyro_multivi.data.modality import Modality
from pyro_multivi.data.setup.options import UNS_KEY, Setup, in_memory, is_mudata

#: Column of var that is False for features that an object holds, as zeros, without their having been measured.
MEASURED_COLUMN = "pyro_multivi_measured"
#: Key of varm under which ``join_samples`` writes the masks; it is found without being named.
MASKS_KEY = "pyro_multivi_measured"
#: Entry of ``uns["pyro_multivi"]`` with the column of obs that holds the panels of those masks.
PANEL_ENTRY = "panel_key"


@dataclass(frozen=True)
class FeatureMasks:
    """Features of one modality that were measured in each panel.

    Attributes
    ----------
    where
        How the user would write the table.
    panels
        Names of the panels: batches, samples.
    measured
        Whether each feature was measured in each panel, (features, panels).
    """

    where: str
    panels: pd.Index[Any]
    measured: NDArray[np.bool_]

    def at(self, features: Any) -> FeatureMasks:
        """The masks of some features, by position."""
        return replace(self, measured=self.measured[features])


def measured_features(part: Any, owner: str) -> NDArray[np.bool_]:
    """Whether each feature was measured, shape (n_vars,)."""
    if MEASURED_COLUMN not in part.var:
        return np.ones(part.n_vars, dtype=bool)
    check_once(part.var, MEASURED_COLUMN, f"{owner}.var")
    column = in_memory(part.var)[MEASURED_COLUMN]
    if not pd.api.types.is_bool_dtype(column.dtype):
        raise ValueError(
            f"{owner}.var[{MEASURED_COLUMN!r}] must be True or False for every feature and is of type {column.dtype}. "
            f"MULTIVI.prepare_query_anndata writes it; without it all features count as measured."
        )
    return column.to_numpy(dtype=bool)


def masks_key(data: Any, setup: Setup) -> str | None:
    """Key of varm with the masks of an object, None if it has none: as the setup names it, or as joined samples do."""
    found = [key for part in _parts(data).values() for key in part.varm]
    return next((key for key in (setup.feature_masks, MASKS_KEY) if key in found), None)


def panel_keys(data: Any, setup: Setup) -> tuple[str, ...]:
    """Columns of obs that may hold the panels of an object's masks: that of the setup, of joined samples, the batch."""
    kept = data.uns.get(UNS_KEY)
    noted = kept.get(PANEL_ENTRY) if isinstance(kept, Mapping) else None
    keys = [setup.panel_key, None if noted is None else str(noted)]
    keys += [] if setup.panel_key is not None else [setup.batch_key]
    return tuple(dict.fromkeys(key for key in keys if key is not None))


def with_masks(setup: Setup, data: Any, feature_masks: str | None, panel_key: str | None) -> Setup:
    """A setup with the key of the masks and the column of the panels, as given or as joined samples have them."""
    parts = _parts(data)
    if feature_masks is not None and not any(feature_masks in part.varm for part in parts.values()):
        where = " and ".join(f"{owner}.varm" for owner in parts)
        known = dict.fromkeys(key for part in parts.values() for key in part.varm)
        raise unknown_key("feature_masks", feature_masks, where, known)
    key = masks_key(data, replace(setup, feature_masks=feature_masks))
    if key is None:
        if panel_key is not None:
            raise ValueError(
                f"panel_key={panel_key!r} names the panels of feature_masks, which is not given: name the key of varm "
                "that says which features were measured in each panel."
            )
        return setup
    tables = [data.obs, *(part.obs for part in parts.values())]
    if panel_key is not None and not any(panel_key in table for table in tables):
        raise unknown_key("panel_key", panel_key, "adata.obs" if "adata" in parts else "mdata.obs", data.obs.columns)
    column = panel_key or next(iter(panel_keys(data, setup)), None)
    if column is None:
        raise ValueError(
            f"varm[{key!r}] says which features were measured in each panel: give panel_key, the column of obs with "
            "the panel of each cell, or batch_key."
        )
    return replace(setup, feature_masks=key, panel_key=column)


def masks_of(part: Any, owner: str, modality: Modality, key: str | None, columns: NDArray[Any]) -> FeatureMasks | None:
    """The masks of one modality in an AnnData, checked; None if it has none.

    Parameters
    ----------
    part, owner
        The AnnData, and how the user would write it.
    key
        Key of varm.
    columns
        Positions of the modality's features.
    """
    if key is None or key not in part.varm:
        return None
    where, table = f"{owner}.varm[{key!r}]", in_memory(part.varm[key])
    if not isinstance(table, pd.DataFrame):
        raise ValueError(
            f"{where} must be a DataFrame, with True or False for every feature in a column for each batch, and is "
            f"{shown(type(table).__name__)}: pd.DataFrame(values, index={owner}.var_names, columns=batches)."
        )
    names = pd.Index([str(name) for name in table.columns], dtype=object)
    if not names.is_unique:
        raise ValueError(
            f"{where} has more than one column called {first_names(names[names.duplicated()].unique())}: "
            "give each batch one."
        )
    for name, (_, column) in zip(names, table.items(), strict=True):
        kind, gaps = column.dtype, int(column.isna().sum())
        if not pd.api.types.is_bool_dtype(kind) or gaps:
            # NaN is True to NumPy.
            found, filled = (f" and has {gaps} gaps", ".astype('boolean').fillna(False)") if gaps else ("", "")
            marked = "what has gaps was not measured" if gaps else f"{modality.features} are marked by 1 and 0"
            raise ValueError(
                f"{where} must be True or False for every feature; column {name!r} is of type {kind}{found}. If "
                f"{marked}: {where} = {where}{filled}.astype(bool)."
            )
    return FeatureMasks(where, names, table.iloc[columns].to_numpy(dtype=bool))


def _parts(data: Any) -> dict[str, Any]:
    """The AnnDatas of an object, by how the user would write them."""
    if is_mudata(data):
        return {f"mdata.mod[{name!r}]": part for name, part in data.mod.items()}
    return {"adata": data}
