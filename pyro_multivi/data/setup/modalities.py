"""Cells and features of each modality: as stated by the user or in the data, or inferred from the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.data.checks import caution, first_names, nearest
from pyro_multivi.data.minified.layout import stored_part
from pyro_multivi.data.modality import MODALITIES, PROTEIN, RNA, Modality
from pyro_multivi.data.setup.adapter import Counts, Opened, open_data
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.stores.joined import JoinedMatrix
from pyro_multivi.data.vocabulary import MEASUREMENT_PATTERNS, OTHER_ASSAYS, PAIRED, SPELLINGS, regions_among, spelled

# Words for cells with proteins alone, and their meaning: neither RNA nor ATAC.
_PROTEINS_ALONE, _NEITHER = ("protein", "proteins", "protein only", "proteins only", "adt"), "neither"
#: Among numbers of features by type: those that a model does not know, where features have no type.
UNTYPED = "features"
#: For each modality a value per cell, bool, shape (n,).
Masks = Mapping[Modality, NDArray[np.bool_]]


@dataclass(frozen=True)
class Measured:
    """The cells measured in each modality.

    Attributes
    ----------
    masks
        Whether each cell was measured, for every modality.
    inferred
        Whether that was inferred from the counts rather than stated in the data.
    notes
        Remarks on it for the user.
    """

    masks: Masks
    inferred: bool
    notes: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Number of cells of each measurement pattern: paired, RNA only, ATAC only; and, if any, neither of them."""
        number = np.sum([*self.masks.values()], axis=0)
        alone = {modality.name: int((mask & (number == 1)).sum()) for modality, mask in self.masks.items()}
        without = int((number == 0).sum())
        return {
            PAIRED: int((number == len(MODALITIES)).sum()), **alone, **({PROTEIN: without} if without else {})
        }  # fmt: skip


def find_measured(
    opened: Opened, setup: Setup, counted: Masks, key_needed: bool, stained: NDArray[np.bool_] | None = None
) -> Measured:
    """Find the cells measured in each modality: by the column ``modality_key``, else from the data.

    Without ``modality_key``, a MuData in which some cells are not listed for a modality states by that
    what was measured. Otherwise a modality counts as measured where a cell has any count in it.

    Parameters
    ----------
    opened, setup
        The data, and where they lie.
    counted
        Whether a cell has any count, for every modality.
    key_needed
        Whether a ``modality_key`` that the data lack is an error. Otherwise it is as if not given.
    stained
        Whether a cell has proteins; None without proteins.
    """
    if opened.posterior is not None:
        if key_needed:
            raise ValueError("These data are minified, without counts: load the model that minified them instead.")
        stored = stored_part(opened.posterior, "measured") > 0
        return Measured(dict(zip(MODALITIES, stored.T.copy(), strict=True)), inferred=False, notes=())
    key = setup.modality_key
    if key is not None and (key_needed or opened.has_column("modality_key", key)):
        measured = _as_marked(opened, key, setup.modality_values, counted)
    else:
        measured = _as_listed(opened) or _as_counted(opened, key, counted)
    nothing = ~np.any([*measured.masks.values()], axis=0)
    if stained is not None:
        nothing &= ~stained
    if nothing.any():
        also = "" if stained is None else " nor proteins"
        raise ValueError(
            f"{int(nothing.sum())} of {len(nothing)} cells have nothing measured, neither RNA nor ATAC{also}: "
            f"{first_names(opened.cells[nothing])}. {_taken_for_neither(opened, setup)}{_how_to_drop(opened, setup)}"
        )
    return measured


def has_counts(opened: Opened, counts: Mapping[Modality, Any]) -> dict[Modality, NDArray[np.bool_]]:
    """Whether a cell has any count, for every modality."""
    found = dict.fromkeys(MODALITIES, np.zeros(len(opened.cells), dtype=bool))
    found.update({modality: (part.crow.diff() > 0).numpy() for modality, part in counts.items()})
    return found


def _as_marked(opened: Opened, key: str, extra: Mapping[str, str], counted: Masks) -> Measured:
    meaning = _meanings(opened.column("modality_key", key), key, extra)
    notes = []
    masks: dict[Modality, NDArray[np.bool_]] = {}
    for modality in MODALITIES:
        marked = np.isin(meaning, [PAIRED, modality.name])
        if modality in opened.counts:
            _check_marks(opened.cells, marked, counted[modality], opened.counts[modality], key)
        elif marked.any():
            notes.append(
                f"{int(marked.sum())} cells are marked in {key!r} as having {modality.assay}, which is not in "
                f"these data: taken as not measured."
            )
            marked = np.zeros_like(marked)
        masks[modality] = marked
    return Measured(masks, inferred=False, notes=tuple(notes))


def _meanings(words: pd.Series[Any], key: str, extra: Mapping[str, str]) -> NDArray[np.object_]:
    """The column in the words of ``MEASUREMENT_PATTERNS``, shape (n,)."""
    missing = words.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"modality_key={key!r} has no value for {int(missing.sum())} cells: "
            f"{first_names(words.index[missing])}. Give each of them one of {', '.join(MEASUREMENT_PATTERNS)}."
        )
    known = {str(word): extra.get(str(word)) or spelled(word) for word in words.unique()}
    alone = [word for word, meaning in known.items() if meaning is None and word.casefold() in _PROTEINS_ALONE]
    known |= dict.fromkeys(alone, _NEITHER)
    for word, meaning in known.items():
        if meaning is None:
            spellings = [spelling for group in SPELLINGS.values() for spelling in group] + list(extra)
            raise ValueError(
                f"modality_key={key!r} holds {word!r}, which is not a known word for a cell's modalities. "
                f"{nearest(word, spellings)} Say what it means: modality_values={{{word!r}: 'paired'}} "
                f"(or 'expression', 'accessibility')."
            )
    return words.astype(str).map(known).to_numpy(dtype=object)


def _check_marks(
    cells: pd.Index[Any],
    marked: NDArray[np.bool_],
    counted: NDArray[np.bool_],
    counts: Counts,
    key: str,
) -> None:
    surplus = counted & ~marked
    if surplus.any():
        raise ValueError(
            f"{int(surplus.sum())} cells are marked in {key!r} as not having {counts.modality.assay}, yet have "
            f"counts in {counts.where}: {first_names(cells[surplus])}. Correct the column, or set those "
            f"counts to zero."
        )
    lacking = marked & ~counts.present(len(cells))
    if lacking.any():
        raise ValueError(
            f"{int(lacking.sum())} cells are marked in {key!r} as having {counts.modality.assay}, yet are not in "
            f"{counts.where}: {first_names(cells[lacking])}. Correct the column."
        )


def _as_listed(opened: Opened) -> Measured | None:
    """The cells listed for each modality; None if all are listed for all, which means nothing."""
    n = len(opened.cells)
    listed = {modality: counts.present(n) for modality, counts in opened.counts.items()}
    if all(mask.all() for mask in listed.values()):
        return None
    none = np.zeros(n, dtype=bool)
    masks = {modality: listed.get(modality, none) for modality in MODALITIES}
    return Measured(masks, inferred=False, notes=())


def _as_counted(opened: Opened, key: str | None, counted: Masks) -> Measured:
    notes = []
    alone = _alone(opened)
    counted = {modality: mask | alone.get(modality, False) for modality, mask in counted.items()}
    for modality, counts in opened.counts.items():
        empty = int((counts.present(len(opened.cells)) & ~counted[modality]).sum())
        if empty:
            notes.append(f"{empty} cells have no count in {counts.where}: taken as not measured for {modality.assay}.")
    given = "modality_key was not given" if key is None else f"these data have no column {key!r}"
    notes.append(
        f"Which modalities a cell has was inferred from its counts, since {given}. An observed cell without "
        f"any count would be taken as missing: give modality_key if there may be such cells."
    )
    return Measured(counted, inferred=True, notes=tuple(notes))


def _alone(opened: Opened) -> Masks:
    """Cells of stores of one modality, which have it also without a count."""
    having = {}
    for modality, counts in opened.counts.items():
        if isinstance(counts.matrix, JoinedMatrix):
            rows = counts.matrix.having(counts.columns)
            having[modality] = rows if counts.rows is None else rows[counts.rows]
    if len(having) < 2:
        return {}
    one = np.sum([*having.values()], axis=0) == 1
    return {modality: mask & one for modality, mask in having.items()}


def unknown_kinds(opened: Opened) -> list[str]:
    """Feature types, or modalities of a MuData, that may be RNA or ATAC by a word that is not known."""
    return [kind for kind in opened.ignored if kind.casefold() not in OTHER_ASSAYS]


def _taken_for_neither(opened: Opened, setup: Setup) -> str:
    """The beginning of the advice to drop cells: that features may have a word for RNA or ATAC that is not known."""
    kinds = unknown_kinds(opened)
    if not kinds:
        return "Drop them: "
    if opened.name == "mdata":
        place, argument, keys = "mdata.mod", "modalities", {each: f"{each.key}_layer" for each in MODALITIES}
    else:
        place, argument = f"adata.var[{setup.feature_type_key!r}]", "feature_type_values"
        keys = {each: each.features for each in MODALITIES}
    lacking = [repr(key) for each, key in keys.items() if each not in opened.counts]
    [key, value] = [lacking[0], repr(kinds[0])] if len(lacking) == len(kinds) == 1 else ["...", "..."]
    argument += f"={{{key}: {value}}}"
    return (
        f"{first_names(kinds)} of {place} count as neither: if they are RNA or ATAC, say so, {argument}; "
        "else drop these cells: "
    )


def _how_to_drop(opened: Opened, setup: Setup) -> str:
    if opened.name == "mdata":
        sums = " + ".join(
            f"pd.Series(np.ravel({counts.where}.sum(1)), {counts.owner}.obs_names).reindex(mdata.obs_names).fillna(0)"
            for counts in opened.counts.values()
        )
        return f"mdata = mdata[({sums}).to_numpy() > 0].copy()"
    others = opened.ignored if setup.feature_type_key else ()
    columns = f"[:, ~adata.var[{setup.feature_type_key!r}].isin({[*others]!r})]" if others else ""
    where = next(counts.where for counts in opened.counts.values())
    return f"adata = adata[np.ravel({where}{columns}.sum(1)) > 0].copy()"


def as_stated(opened: Opened, setup: Setup, stated: Mapping[Modality, int | None]) -> None:
    """Keep as many features of each modality as a model's constructor was told to, in place.

    Without feature types, genes are the first columns and regions those behind them. Otherwise the numbers have to be
    those of the data, or in a MuData below them: the first features are kept then, with a warning.
    """
    if not setup.feature_type_key and opened.name == "adata":
        _by_column_order(opened, stated)
        return
    for modality, number in stated.items():
        counts, argument = opened.counts.get(modality), f"n_{modality.features}"
        found = 0 if counts is None else len(counts.features)
        if number is None or number == found:
            continue
        if opened.name == "mdata" and counts is None:
            raise ValueError(
                f"{argument}={number}, but the setup names no {modality.assay}: name it there, modalities="
                f"{{'{modality.key}_layer': ...}}, or leave {argument} out."
            )
        if opened.name == "adata" or not 0 <= number < found or counts is None:
            untold = _if_of_a_word_not_known(opened, setup, modality) if number > found else ""
            raise ValueError(f"{argument}={number}, but the data set up has {found}: {untold}leave {argument} out.")
        caution(
            f"{argument}={number}, but {counts.where} has {found} {modality.features}: only the first {number} are "
            f"modelled. Leave {argument} out for all of them."
        )
        if number:
            opened.counts[modality] = _some(counts, slice(0, number))
        else:
            del opened.counts[modality]


def _if_of_a_word_not_known(opened: Opened, setup: Setup, modality: Modality) -> str:
    """The beginning of the advice to leave out a number: that features have a type that is not known."""
    kinds = unknown_kinds(opened) if opened.name == "adata" else []
    if not kinds:
        return ""
    value = repr(kinds[0]) if len(kinds) == 1 else "..."
    return (
        f"{sum(opened.ignored[kind] for kind in kinds)} features are of neither modality, by {first_names(kinds)} in "
        f"adata.var[{setup.feature_type_key!r}]; if they are {modality.features}, say so in the setup, "
        f"feature_type_values={{{modality.features!r}: {value}}}; else "
    )


def _by_column_order(opened: Opened, stated: Mapping[Modality, int | None]) -> None:
    everything, start = opened.counts[RNA], 0
    total = len(everything.features)
    arguments = [f"n_{modality.features}" for modality in stated]
    if any(number is None for number in stated.values()):
        raise ValueError(
            f"{everything.owner}.var has no column 'feature_types', which tells genes from regions: give "
            f"{' and '.join(arguments)}, and the first columns are genes, those behind them regions; or name yours in "
            "the setup, feature_type_key; or add it: adata.var['feature_types'] = 'Gene Expression' (or 'Peaks')."
        )
    numbers = [int(number or 0) for number in stated.values()]
    if min(numbers) < 0 or not 0 < sum(numbers) <= total:
        given = ", ".join(f"{name}={number}" for name, number in zip(arguments, numbers, strict=True))
        raise ValueError(f"{given}, but {everything.owner} has {total} features: give numbers that sum up to {total}.")
    if sum(numbers) < total:
        caution(f"The last {total - sum(numbers)} of the {total} features are neither genes nor regions: left out.")
    regions = regions_among(everything.features[: numbers[0]])
    if regions:
        caution(
            f"n_genes={numbers[0]}, but {len(regions)} of the first {numbers[0]} features have names of regions: "
            f"{first_names(regions, 3)}. Put genes first, or add adata.var['feature_types'] and set up again."
        )
    opened.counts.clear()
    for modality, number in zip(stated, numbers, strict=True):
        if number:
            opened.counts[modality] = replace(_some(everything, slice(start, start + number)), modality=modality)
        start += number


def _some(counts: Counts, some: slice | NDArray[np.intp]) -> Counts:
    masks = None if counts.masks is None else counts.masks.at(some)
    return replace(counts, features=counts.features[some], columns=counts.columns[some], masks=masks)


def open_named(data: Any, setup: Setup, names: Mapping[Modality, Sequence[str]]) -> Opened:
    """Find counts and columns of an object for a model; features without a type by the names that the model's have."""
    opened = open_data(data, setup)
    if not setup.feature_type_key and opened.name == "adata":
        _by_name(opened, names)
    opened.counts.update({modality: replace(part, placed=True) for modality, part in opened.counts.items()})
    return opened


def _by_name(opened: Opened, names: Mapping[Modality, Sequence[str]]) -> None:
    """Find the modalities of an AnnData without feature types by the names of a model's features, in place.

    Raises
    ------
    ValueError
        If none of them is there.
    """
    everything = opened.counts.pop(RNA)
    place_of = {modality: everything.features.isin(known) for modality, known in names.items()}
    for modality, there in place_of.items():
        if there.any():
            opened.counts[modality] = replace(_some(everything, np.flatnonzero(there)), modality=modality)
    if not opened.counts:
        wanted = [name for known in names.values() for name in known]
        raise ValueError(
            f"{everything.owner} shares no features with the model, which has {len(wanted)}: {first_names(wanted)}. It "
            f"has {len(everything.features)}: {first_names(everything.features)}. Give them the same names."
        )
    unknown = int((~np.any([*place_of.values()], axis=0)).sum())
    if unknown:
        opened.ignored[UNTYPED] = unknown
