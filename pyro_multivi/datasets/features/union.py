"""Union of the features of several samples, and masks of what each of them measured."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from pyro_multivi.data.checks import caution
from pyro_multivi.data.modality import Modality
from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.masks.declared import MASKS_KEY
from pyro_multivi.datasets.assembly import join_rows
from pyro_multivi.datasets.features.shared import in_all_samples, nothing_shared, unlike_regions


def united_features(modality: Modality, var_of: Mapping[str, pd.DataFrame]) -> pd.Index[str]:
    """All features that any sample has, in the order in which they first come.

    Parameters
    ----------
    modality
        The modality.
    var_of
        Features of each sample that has it, by name of the sample.

    Raises
    ------
    ValueError
        If samples share none, not even by way of others, or regions are the same under other names.

    Examples
    --------
    >>> from pyro_multivi.data.modality import RNA
    >>> var_of = {"a": pd.DataFrame(index=["g1", "g2"]), "b": pd.DataFrame(index=["g3", "g2"])}
    >>> united_features(RNA, var_of).tolist()
    ['g1', 'g2', 'g3']
    """
    found = pd.Index(dict.fromkeys(name for var in var_of.values() for name in var.index), dtype=object)
    _, left = in_all_samples(modality, var_of)
    if not left:
        return found
    number, sentence, are_same = unlike_regions(modality, left)
    if number and are_same:
        raise ValueError(sentence)
    if number:
        caution(f"{sentence} In the union each is a {modality.feature} of its own, masked where it has another name.")
    elif len(groups := _groups_that_share(var_of)) > 1:
        raise ValueError(nothing_shared(modality, {sample: var_of[sample] for sample in map(min, groups)}))
    return found


def _groups_that_share(var_of: Mapping[str, pd.DataFrame]) -> list[set[str]]:
    """Samples that have a feature in common, directly or by way of others."""
    groups: list[tuple[set[str], set[str]]] = []
    for sample, var in var_of.items():
        members, names = {sample}, set(var.index)
        for group in [group for group in groups if not names.isdisjoint(group[1])]:
            groups.remove(group)
            members, names = members | group[0], names | group[1]
        groups.append((members, names))
    return [members for members, _ in groups]


def described(var_of: Mapping[str, pd.DataFrame], names: pd.Index[str]) -> pd.DataFrame:
    """Some features, with the columns of all samples, each as the first sample that has it describes it."""
    frames: list[pd.DataFrame] = []
    known: set[str] = set()
    for var in var_of.values():
        new = var[var.index.isin(names) & ~var.index.isin(known)]
        known.update(new.index)
        frames += [new] if len(new) else []
    return join_rows(frames).loc[names]


def masks(
    var_of: Mapping[Modality, Mapping[str, pd.DataFrame]], kept: Mapping[Modality, pd.Index[str]], samples: list[str]
) -> dict[str, pd.DataFrame]:
    """Whether each sample measured each feature, by key of ``varm``; nothing if no sample lacks one of its modalities.

    Parameters
    ----------
    var_of
        Features of the samples that have a modality.
    kept
        Features of the result.
    samples
        Names of all samples.
    """
    parts, complete = [], True
    for modality, names in kept.items():
        columns = {name: names.isin(var.index) for name, var in var_of[modality].items()}
        complete &= all(column.all() for column in columns.values())
        never = np.zeros(len(names), dtype=bool)
        parts.append(pd.DataFrame({name: columns.get(name, never) for name in samples}, index=names))
    return {} if complete else {MASKS_KEY: pd.concat(parts)}


def refuse_masks(opened: Opened) -> None:
    """Refuse a sample that has masks itself: its zeros would be taken for counts.

    Raises
    ------
    ValueError
    """
    for part in opened.counts.values():
        if part.masks is not None:
            raise ValueError(
                f"{part.masks.where} says that some {part.modality.features} were measured in some of its cells only, "
                "as in samples that were joined before. Join the samples that it was made of."
            )
