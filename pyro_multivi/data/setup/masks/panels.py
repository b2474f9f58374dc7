"""Panels of a table: each cell's features that were measured, from masks and from what an object lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names, nearest
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import Modality
from pyro_multivi.data.setup.adapter import Counts, Opened
from pyro_multivi.data.setup.masks.declared import FeatureMasks
from pyro_multivi.data.setup.modalities import Masks
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.table import CellTable

# Cells whose counts are compared with their panel at a time.
_BLOCK = 4096


def measured_panels(
    opened: Opened,
    spec: Any,
    counts: Mapping[Modality, SparseCounts | StoredCounts],
    cells: Masks,
) -> dict[str, Panels]:
    """Panels, by field of a table, of the modalities of which some cells were not measured for all features.

    Parameters
    ----------
    opened
        The object.
    spec
        Specification of the model. If its data have masks, the zeros of an object with all features and none could be
        taken for counts, other than of a query.
    counts
        Their counts.
    cells
        Whether each cell was measured in each modality.

    Raises
    ------
    ValueError
        If a cell's panel has no mask or an empty one, or there are counts of features that were not measured.
    """
    found, complete = {}, True
    names = {modality: modality.feature_names_in(spec) for modality in opened.counts}
    for modality, part in opened.counts.items():
        place = part.features.get_indexer(pd.Index(names[modality], dtype=object))
        measured, code = (place >= 0)[None], np.zeros(len(opened.cells), dtype=np.int64)
        if part.masks is not None and cells[modality].any():
            measured, code = _panels_of(opened, modality, part.masks, place, cells[modality])
        if not measured.all():
            panels = Panels(torch.from_numpy(measured), torch.from_numpy(code))
            if part.masks is not None:
                _check_counts(opened, part, part.masks, names[modality], counts[modality], panels)
            found[modality.panels] = panels
        complete &= part.masks is None and bool((place >= 0).all())
    needed = None if spec.partial else spec.setup.feature_masks
    if complete and needed is not None:
        owner = next(part.owner for part in opened.counts.values())
        raise ValueError(
            f"feature_masks={needed!r} of the setup says which features were measured in each batch, and {owner}.varm "
            "has no such key. Put it there, with True for all features if all were measured; or map these cells as a "
            "query, MULTIVI.load_query_data(adata, model), where it may be absent."
        )
    return found


def check_every_feature(opened: Opened, names: Mapping[Modality, tuple[str, ...]], table: CellTable) -> None:
    """Refuse features that were measured in no cell: nothing can be learned of them.

    Raises
    ------
    ValueError
    """
    for modality, part in opened.counts.items():
        panels: Panels | None = modality.panels_in(table)
        if panels is None or part.masks is None:
            continue
        nowhere = (~panels.measured.any(0)).numpy()
        if nowhere.any():
            lost = [name for name, missing in zip(names[modality], nowhere.tolist(), strict=True) if missing]
            owner, where = part.owner, part.masks.where
            batches = f"{opened.name}.obs[{_panel_of_cells(opened, part.masks).name!r}].unique()"
            raise ValueError(
                f"{len(lost)} {modality.features} were measured in no batch with cells, by {where}: "
                f"{first_names(lost)}. Nothing can be learned of them: leave them out, {owner} = "
                f"{owner}[:, {where}[{batches}].any(axis=1)].copy()."
            )


def panel_sizes(opened: Opened, table: CellTable) -> dict[str, dict[str, int]]:
    """Number of measured features by name of the panel and modality, of the panels that cells are of."""
    sizes: dict[str, dict[str, int]] = {}
    for modality, part in opened.counts.items():
        panels: Panels | None = modality.panels_in(table)
        if panels is None or part.masks is None:
            continue
        words = _panel_of_cells(opened, part.masks).astype(str).reset_index(drop=True)
        words = words[modality.measured_in(table).numpy()]
        for cell, name in words.drop_duplicates().sort_values().items():
            sizes.setdefault(name, {})[modality.features] = int(panels.measured[panels.code[cell]].sum())
    return sizes


def number_of_values(table: CellTable, modality: Modality) -> int:
    """Number of values of a modality that were measured, zeros among them."""
    cells, panels = modality.measured_in(table), modality.panels_in(table)
    if panels is None:
        return int(cells.sum()) * modality.n_features_in(table)
    return int(panels.measured.sum(1)[panels.code[cells]].sum())


def numbers_of_cells(opened: Opened, part: Counts) -> Callable[[NDArray[np.bool_]], Any]:
    """Function that finds, of some cells, the number in which each feature of a modality was measured."""
    masks = part.masks
    if masks is None:
        return lambda cells: cells.sum()
    which = masks.panels.get_indexer(pd.Index(_panel_of_cells(opened, masks).astype(str)))
    # Cells whose panel has no mask, at the end, are for the setup to refuse.
    return lambda cells: (
        masks.measured @ np.bincount(which[cells] % (len(masks.panels) + 1), minlength=len(masks.panels) + 1)[:-1]
    )


def _panel_of_cells(opened: Opened, masks: FeatureMasks) -> pd.Series[Any]:
    """Name of each cell's panel: the column of which most cells have a mask, the first of those that may be meant."""
    there = [key for key in opened.panel_keys if opened.has_column("panel_key", key)]
    columns = [opened.column("panel_key", key) for key in there or opened.panel_keys[:1]]
    if not columns:
        raise ValueError(
            f"{masks.where} says which features were measured in each panel, and no column says which panel a cell is "
            "of: give panel_key."
        )
    return max(columns, key=lambda column: int(column.astype(str).isin(masks.panels).sum()))


def _panels_of(
    opened: Opened, modality: Modality, masks: FeatureMasks, place: NDArray[np.intp], cells: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Distinct panels of the measured cells, (panels, features of the model), and the panel of each cell."""
    column = _panel_of_cells(opened, masks)
    which = masks.panels.get_indexer(pd.Index(column.astype(str)))
    unknown = cells & (which < 0)
    if (cells & column.isna().to_numpy()).any():
        missing = opened.cells[cells & column.isna().to_numpy()]
        raise ValueError(
            f"panel_key={column.name!r} has no value for {len(missing)} cells with {modality.assay}: "
            f"{first_names(missing)}. {masks.where} says what was measured in each of its values."
        )
    if unknown.any():
        others = sorted(set(column.astype(str)[unknown]))
        raise ValueError(
            f"{masks.where} has no column for {first_names(others)} ({int(unknown.sum())} cells with "
            f"{modality.assay}). {nearest(others[0], list(masks.panels))} Give it one, True for the "
            f"{modality.features} that were measured."
        )
    used, of_cell = np.unique(which[cells], return_inverse=True)
    rows = masks.measured[:, used].T[:, place] & (place >= 0)
    empty = ~rows.any(1)
    if empty.any():
        name = masks.panels[used[empty][0]]
        raise ValueError(
            f"{masks.where} says that none of the {modality.features} was measured in {name!r}, of which "
            f"{int((of_cell.reshape(-1) == np.flatnonzero(empty)[0]).sum())} cells are said to have {modality.assay}. "
            f"Mark those cells as not having it (modality_key), or the {modality.features} as measured."
        )
    measured, panel = np.unique(rows, axis=0, return_inverse=True)
    code = np.zeros(len(cells), dtype=np.int64)
    code[cells] = panel.reshape(-1)[of_cell.reshape(-1)]
    return measured, code


def _check_counts(
    opened: Opened,
    part: Counts,
    masks: FeatureMasks,
    names: tuple[str, ...],
    counts: SparseCounts | StoredCounts,
    panels: Panels,
) -> None:
    """Refuse counts of features that were not measured, at the first with its cell."""
    for index in torch.arange(len(opened.cells)).split(_BLOCK):
        own = counts.select_rows(index)
        row, column = own.rows().long(), own.col.long()
        wrong = ~panels.measured[panels.code[index[row]], column]
        if bool(wrong.any()):
            at = int(wrong.int().argmax())
            raise ValueError(
                f"{part.where} holds counts of {part.modality.features} that {masks.where} says were not measured, "
                f"for instance of {names[int(column[at])]!r} in cell {str(opened.cells[int(index[row[at]])])!r}. Mark "
                "them as measured, or set these counts to zero."
            )
