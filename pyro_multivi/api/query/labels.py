"""Labels of a reference carried over to the cells of a query."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.api.base import PREDICTION_BATCH
from pyro_multivi.data.checks import caution, unknown_key
from pyro_multivi.data.loader import Minibatches, spread
from pyro_multivi.data.minibatch import AnyModality, Cells, ExtraFeatures
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.table import CellTable
from pyro_multivi.posterior.mapping.label_transfer import Transferred, states, transfer
from pyro_multivi.program import MultiVIProgram

# Reference cells by which confidence is calibrated, at most; those held out of training if there are so many.
_MOST, _LEAST_HELD_OUT = 4096, 100
# Cells held out of training, at least, by whose distances it is told what lies apart: encoders know the others too
# well. Of 19 one in twenty lies as far as the farthest.
_LEAST_APART = 19
# Cells of a batch, at least, for a statement about it.
_FEW = 10


def labelled_reference(model: Any) -> Any:
    """Model whose cells have the labels: the reference of a query's model, or the model itself.

    Raises
    ------
    ValueError
        If its data are not there, or changed in place.
    """
    reference = model._reference or model
    if (model._reference is None and model._training is not None) or reference.adata is None:
        raise ValueError(
            "The data of the reference are not there, from which labels would come: a model of a query knows its "
            "reference until it is saved. Call reference_model.transfer_labels(query, key) of a reference that has "
            "data, MULTIVI.load(folder, adata)."
        )
    reference._training_table()
    if reference.minified_data_type is not None:
        caution(
            "The reference is minified: its cells cannot be encoded again as the query was measured, by which "
            "confidence and p_value are calibrated. They hold for a query with the same modalities and features only; "
            "for another use the model that was saved before."
        )
    return reference


def label_codes(obs: pd.DataFrame, key: str) -> tuple[list[Any], NDArray[np.int64]]:
    """Labels of a column, and the position of each cell's among them, -1 for a cell without one.

    Raises
    ------
    ValueError
        If there is no such column, it holds numbers that are no labels, or fewer than two cells have a label.
    """
    if key not in obs:
        raise unknown_key("key", key, "obs of the reference", obs.columns)
    column = obs[key]
    if pd.api.types.is_float_dtype(column.dtype) and not (column.dropna() % 1 == 0).all():
        raise ValueError(
            f"key={key!r} holds numbers such as {column.dropna().iloc[0]!r}, no labels: name a column of categories."
        )
    categories = column.astype("category").cat.remove_unused_categories()
    if not len(categories.cat.categories):
        raise ValueError(f"key={key!r} has no label for any cell of the reference.")
    code: NDArray[np.int64] = np.asarray(categories.cat.codes, dtype=np.int64)
    if (code >= 0).sum() < 2:
        raise ValueError(
            f"key={key!r} has a label for one cell of the reference: how often neighbours are right is learned from "
            "cells with labels, of which two are the least. Give more cells a label."
        )
    return list(categories.cat.categories), code


def carried_over(
    program: MultiVIProgram,
    reference: CellTable,
    code: NDArray[np.int64],
    held_out: Tensor,
    query: CellTable,
    n_neighbors: int,
) -> Transferred:
    """Label of each query cell, and the probability that it is right; see :mod:`.label_transfer`.

    Parameters
    ----------
    program
        Of the query, whose states are those of the reference's program unless encoders were trained.
    reference, code
        The reference cells, and their labels, -1 for those without one.
    held_out
        Positions of the reference cells that were not trained on, int64.
    query
        The query's cells.
    """
    device = next(program.parameters()).device
    labelled = torch.from_numpy(np.flatnonzero(code >= 0))
    z_reference = states(program, _batches(reference, labelled, device))
    place = np.full(len(code), -1)
    place[labelled.numpy()] = np.arange(len(labelled))
    found = Transferred(np.zeros(len(query), dtype=np.int64), np.zeros(len(query)), np.zeros(len(query)))
    for index in _measured_alike(query):
        like = query.batch(index[:1]).to(device)
        able = _measured_as_much(reference, labelled, like)
        unseen = able[torch.isin(able, held_out)]
        chosen = unseen if len(unseen) >= _LEAST_HELD_OUT else able if len(able) else labelled
        chosen = spread(chosen, _MOST)
        # Where no reference cell was measured as these were, each as it is.
        calibration = states(program, _batches(reference, chosen, device), like if len(able) else None)
        z = states(program, _batches(query, index, device))
        rows = index.numpy()
        own = place[chosen.numpy()]
        is_unseen = torch.isin(chosen, held_out).numpy()
        few = is_unseen.sum() < _LEAST_APART
        of_rows = transfer(
            z_reference, code[labelled.numpy()], z, calibration, own, n_neighbors, None if few else is_unseen
        )
        for whole, part in zip(found, of_rows, strict=True):
            whole[rows] = part
    return found


def batches_apart(is_apart: NDArray[np.bool_], table: CellTable, names: Sequence[str], alpha: float) -> Iterator[str]:
    """Sentences on batches of which more than half lies apart from the reference, each with what to do."""
    batch = table.batch_code.numpy()
    for code in np.unique(batch):
        inside = is_apart[batch == code]
        if len(inside) >= _FEW and inside.mean() > max(0.5, 2 * alpha):
            yield (
                f"{inside.sum()} of the {len(inside)} cells of batch {names[code]!r} lie farther from the reference "
                f"than {1 - alpha:.1%} of its own cells and are called unknown: it lacks such cells, or the batch as a "
                "whole lies apart. load_query_data(query, model, freeze_expression=False) and train() align a batch; "
                "alpha=0 gives labels whatever the distance."
            )


def _batches(table: CellTable, index: Tensor, device: torch.device) -> Minibatches:
    return Minibatches(table, index, batch_size=PREDICTION_BATCH, device=device)


def _measured_alike(table: CellTable) -> list[Tensor]:
    """Positions of the cells that were measured in the same modalities with the same panels."""
    columns = []
    for modality in _modalities_of(table):
        panels = modality.panels_in(table)
        columns += [modality.measured_in(table).long()]
        columns += [] if panels is None else [panels.code * modality.measured_in(table)]
    _, group = torch.stack(columns, 1).unique(dim=0, return_inverse=True)
    return [(group == number).nonzero().squeeze(-1) for number in range(int(group.max()) + 1)]


def _measured_as_much(reference: CellTable, labelled: Tensor, like: Cells) -> Tensor:
    """Positions of the labelled cells in which all that was measured in a query cell was measured too, int64.

    Where no reference cell was measured for all its features, its modalities decide.
    """
    enough = torch.ones(len(reference), dtype=torch.bool)
    features = enough.clone()
    for modality in _modalities_of(reference):
        if not bool(modality.measured_in(like)[0]):
            continue
        enough &= modality.measured_in(reference)
        panels, own = modality.panels_in(reference), modality.panels_in(like)
        if panels is not None:
            lacks = ~panels.measured if own is None else ~panels.measured & own.measured[own.code[0]].cpu()
            features &= ~lacks.any(1)[panels.code]
    found = labelled[(enough & features)[labelled]]
    return found if len(found) else labelled[enough[labelled]]


def _modalities_of(table: CellTable) -> list[AnyModality]:
    """RNA, ATAC and the extra modalities of a table."""
    return [*MODALITIES, *map(ExtraFeatures, table.extra)]
