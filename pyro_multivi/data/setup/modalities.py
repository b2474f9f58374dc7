"""Which cells were measured in which modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names, nearest
from pyro_multivi.data.setup.adapter import Counts, Opened
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.vocabulary import ACCESSIBILITY, EXPRESSION, MEASUREMENT_PATTERNS, PAIRED, SPELLINGS, spelled


@dataclass(frozen=True)
class Measured:
    """Which cells have what.

    Attributes
    ----------
    has_rna, has_atac
        Shape (n,), bool.
    inferred
        Whether that was read off the counts rather than stated in the data.
    notes
        What a user should know about it.
    """

    has_rna: NDArray[np.bool_]
    has_atac: NDArray[np.bool_]
    inferred: bool
    notes: tuple[str, ...]

    def sizes(self) -> dict[str, int]:
        """Number of cells that are paired, have RNA only, have ATAC only."""
        return {
            PAIRED: int((self.has_rna & self.has_atac).sum()),
            EXPRESSION: int((self.has_rna & ~self.has_atac).sum()),
            ACCESSIBILITY: int((~self.has_rna & self.has_atac).sum()),
        }


def find_measured(
    opened: Opened,
    setup: Setup,
    counted_rna: NDArray[np.bool_],
    counted_atac: NDArray[np.bool_],
    key_needed: bool,
) -> Measured:
    """Which cells were measured in which modality: as ``modality_key`` says, else from the data.

    Without ``modality_key``, a MuData in which some cells are not listed for a modality says itself
    what was measured. Otherwise a modality counts as measured where a cell has any count in it.

    Parameters
    ----------
    opened
        The data.
    setup
        The arguments; ``modality_key`` and ``modality_values`` are read.
    counted_rna, counted_atac
        Whether a cell has any count, shape (n,).
    key_needed
        Whether a ``modality_key`` that the data lack is an error. Otherwise it is as if not given.

    Raises
    ------
    ValueError
        If a word of the column is not known or missing, if a cell has counts in a modality it is said
        not to have or the other way round, or if a cell has nothing measured.
    """
    key = setup.modality_key
    if key is not None and (key_needed or opened.has_column("modality_key", key)):
        measured = _as_marked(opened, key, setup.modality_values, counted_rna, counted_atac)
    else:
        measured = _as_listed(opened) or _as_counted(opened, key, counted_rna, counted_atac)
    nothing = ~(measured.has_rna | measured.has_atac)
    if nothing.any():
        raise ValueError(
            f"{int(nothing.sum())} of {len(nothing)} cells have nothing measured, neither RNA nor ATAC: "
            f"{first_names(opened.cells[nothing])}. Drop them: {_how_to_drop(opened)}"
        )
    return measured


def _as_marked(
    opened: Opened,
    key: str,
    extra: Mapping[str, str],
    counted_rna: NDArray[np.bool_],
    counted_atac: NDArray[np.bool_],
) -> Measured:
    meaning = _meanings(opened.column("modality_key", key), key, extra)
    notes = []
    measured: dict[str, NDArray[np.bool_]] = {}
    for modality, own, counts, counted in (
        ("RNA", EXPRESSION, opened.rna, counted_rna),
        ("ATAC", ACCESSIBILITY, opened.atac, counted_atac),
    ):
        marked = np.isin(meaning, [PAIRED, own])
        if counts is None:
            if marked.any():
                notes.append(
                    f"{int(marked.sum())} cells are marked in {key!r} as having {modality}, which is not in "
                    f"these data: taken as not measured."
                )
            marked = np.zeros_like(marked)
        else:
            _check_marks(opened.cells, marked, counted, counts, key)
        measured[modality] = marked
    return Measured(measured["RNA"], measured["ATAC"], inferred=False, notes=tuple(notes))


def _meanings(words: pd.Series[Any], key: str, extra: Mapping[str, str]) -> NDArray[np.object_]:
    """The column in the three known words, shape (n,)."""
    missing = words.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"modality_key={key!r} has no value for {int(missing.sum())} cells: "
            f"{first_names(words.index[missing])}. Give each of them one of {', '.join(MEASUREMENT_PATTERNS)}."
        )
    known = {str(word): extra.get(str(word)) or spelled(word) for word in words.unique()}
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
            f"{int(surplus.sum())} cells are marked in {key!r} as not having {counts.modality}, yet have "
            f"counts in {counts.where}: {first_names(cells[surplus])}. Correct the column, or set those "
            f"counts to zero."
        )
    lacking = marked & ~counts.present(len(cells))
    if lacking.any():
        raise ValueError(
            f"{int(lacking.sum())} cells are marked in {key!r} as having {counts.modality}, yet are not in "
            f"{counts.where}: {first_names(cells[lacking])}. Correct the column."
        )


def _as_listed(opened: Opened) -> Measured | None:
    """What the cells listed for each modality say; None if all are listed for all, which says nothing."""
    n = len(opened.cells)
    present = [None if part is None else part.present(n) for part in (opened.rna, opened.atac)]
    if all(listed is None or listed.all() for listed in present):
        return None
    has_rna, has_atac = (np.zeros(n, dtype=bool) if listed is None else listed for listed in present)
    return Measured(has_rna, has_atac, inferred=False, notes=())


def _as_counted(
    opened: Opened, key: str | None, counted_rna: NDArray[np.bool_], counted_atac: NDArray[np.bool_]
) -> Measured:
    notes = []
    for counts, counted in ((opened.rna, counted_rna), (opened.atac, counted_atac)):
        empty = 0 if counts is None else int((counts.present(len(counted)) & ~counted).sum())
        if counts is not None and empty:
            notes.append(f"{empty} cells have no count in {counts.where}: taken as not measured for {counts.modality}.")
    given = "modality_key was not given" if key is None else f"these data have no column {key!r}"
    notes.append(
        f"Which modalities a cell has was inferred from its counts, since {given}. An observed cell without "
        f"any count would be taken as missing: give modality_key if there may be such cells."
    )
    return Measured(counted_rna, counted_atac, inferred=True, notes=tuple(notes))


def _how_to_drop(opened: Opened) -> str:
    if opened.name == "mdata":
        sums = " + ".join(
            f"pd.Series(np.ravel({counts.where}.sum(1)), {counts.owner}.obs_names).reindex(mdata.obs_names).fillna(0)"
            for counts in (opened.rna, opened.atac)
            if counts is not None
        )
        return f"mdata = mdata[({sums}).to_numpy() > 0].copy()"
    columns = "" if not opened.ignored else f"[:, adata.var[{opened.type_key!r}].isin({list(opened.kept_types)!r})]"
    where = next(counts.where for counts in (opened.rna, opened.atac) if counts is not None)
    return f"adata = adata[np.ravel({where}{columns}.sum(1)) > 0].copy()"
