"""Cells and features that options leave out, and counts that they change."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.checks import first_names
from pyro_multivi.data.fragments.reads import make_fragments
from pyro_multivi.data.modality import ATAC, Modality
from pyro_multivi.data.setup.adapter import Counts, Opened, open_data
from pyro_multivi.data.setup.masks.panels import numbers_of_cells
from pyro_multivi.data.setup.modalities import unknown_kinds
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.stores.sums import Sums, sums_of
from pyro_multivi.data.vocabulary import PAIRED, spelled

Mask = NDArray[np.bool_]
Values = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class _Detected:
    """Which counts of a modality are above zero."""

    counts: Counts
    sums: Sums
    listed: Mask
    # Number of cells, out of some, in which each feature was measured.
    n_cells: Callable[[Mask], Any]

    @classmethod
    def of(cls, opened: Opened) -> dict[Modality, _Detected]:
        made: dict[int, Sums] = {}
        for counts in opened.counts.values():
            if id(counts.matrix) not in made:
                made[id(counts.matrix)] = sums_of(counts.matrix, counts.where)
        n = len(opened.cells)
        return {
            modality: cls(counts, made[id(counts.matrix)], counts.present(n), numbers_of_cells(opened, counts))
            for modality, counts in opened.counts.items()
        }

    def per_cell(self, features: Mask | None = None, positive: bool = False) -> Values:
        """Sum over features (default: all) of counts, or of whether they are above zero, for each cell, (n,)."""
        columns = self.counts.columns if features is None else self.counts.columns[features]
        inside = np.zeros(self.counts.matrix.shape[1], dtype=np.float32)
        inside[columns] = 1
        rows = self.sums.of_rows(inside, positive)
        return rows if self.counts.rows is None else np.where(self.listed, rows[self.counts.rows], 0)

    def share(self, cells: Mask) -> Values:
        """Share of some cells of the data set, those that measured it, in which each feature is detected."""
        weights = np.zeros(self.counts.matrix.shape[0], dtype=np.float64)
        weights[np.flatnonzero(cells) if self.counts.rows is None else self.counts.rows[cells & self.listed]] = 1
        return self.sums.of_columns(weights)[self.counts.columns] / np.maximum(self.n_cells(cells), 1)


#: Features of a modality that are kept, from its counts and the share of measured cells in which each is detected.
Choice = Callable[[Counts, Values], Mask]


def prepare(data: Any, setup: Setup, options: argparse.Namespace, choose: Choice) -> Any:
    """The data without the cells and features that options leave out; both are counted and printed."""
    if options.round:
        _round(data, setup)
    opened = open_data(data, setup)
    if any(counts.matrix.dtype.kind not in "buif" for counts in opened.counts.values()):
        return data  # Setup says what is wrong.
    detected = _Detected.of(opened)
    n = len(opened.cells)
    measured, stated = _measured(opened, setup, detected)
    totals = sum(found.per_cell() for found in detected.values())
    cells = ~(totals < options.min_counts)
    _print_left_out(~cells, "cells", f"have fewer than {options.min_counts} counts", "--min-counts")
    # Of cells that may have proteins alone, setup says whether they have.
    has_others = getattr(options, "protein", None) is not None
    empty = cells & ~np.any([*measured.values()], axis=0) & (not has_others)
    if not cells.any():
        raise ValueError(f"--min-counts {options.min_counts} leaves no cell: give a smaller number.")
    if empty.any():
        kinds = first_names(unknown_kinds(opened))
        word = f"{kinds} count as neither RNA nor ATAC: if they are, say so by --rna or --atac. " if kinds else ""
        raise ValueError(
            f"{int(empty.sum())} of {n} cells have no count: {first_names(opened.cells[empty])}. {word}Leave such "
            "cells out with --min-counts 1, or the empty barcodes of a raw_feature_bc_matrix with --min-counts 500 or "
            "another least number of counts; or give filtered_feature_bc_matrix."
        )
    kept = {}
    for modality, found in detected.items():
        seen = measured[modality] & cells
        kept[modality] = (
            choose(found.counts, found.share(seen)) if seen.any() else np.ones(len(found.counts.columns), bool)
        )
    if not stated and not has_others:
        left = sum(found.per_cell(kept[modality], positive=True) for modality, found in detected.items())
        emptied = cells & (left == 0)
        if emptied.any() and not options.min_counts:
            raise ValueError(
                f"{int(emptied.sum())} of {n} cells have counts only in features that --min-fraction leaves out: "
                f"{first_names(opened.cells[emptied])}. Give a smaller --min-fraction, or leave such cells out with "
                "--min-counts 1."
            )
        _print_left_out(emptied, "cells", "have counts only in features that are left out", "--min-counts")
        cells &= ~emptied
    if cells.all() and all(mask.all() for mask in kept.values()):
        return data
    return _subset(data, opened, cells, kept)


def at_least(min_fraction: float) -> Choice:
    """Choice of the features detected in at least a share of the measured cells."""
    if not 0 <= min_fraction < 1:
        raise ValueError(f"--min-fraction {min_fraction} is not allowed: give a share from 0 to below 1.")

    def choose(counts: Counts, share: Values) -> Mask:
        kept: Mask = share >= min_fraction
        modality = counts.modality
        if not kept.any():
            raise ValueError(
                f"--min-fraction {min_fraction} leaves no {modality.features}: give a smaller share, at most "
                f"{share.max(initial=0):.3g}."
            )
        _print_left_out(
            ~kept,
            modality.features,
            f"are detected in less than {min_fraction:.3g} of the cells measured for {modality.assay}",
            "--min-fraction",
        )
        return kept

    return choose


def _print_left_out(mask: Mask, things: str, why: str, option: str) -> None:
    if mask.any():
        print(f"left out by {option}: {int(mask.sum())} of {len(mask)} {things}, which {why}")


def _measured(
    opened: Opened, setup: Setup, detected: Mapping[Modality, _Detected]
) -> tuple[dict[Modality, Mask], bool]:
    """Measured cells of each modality, as setup finds them, and whether the data state them."""
    key = setup.modality_key
    if key is not None and opened.has_column("modality_key", key):
        words = opened.column("modality_key", key)
        meaning = {word: setup.modality_values.get(str(word)) or spelled(word) for word in words.unique()}
        pattern = words.map(meaning).to_numpy(dtype=object)
        # A word that is not known is for setup to refuse.
        return {each: np.isin(pattern, [PAIRED, each.name]) | (pattern == None) for each in detected}, True  # noqa: E711
    if not all(found.listed.all() for found in detected.values()):
        return {each: found.listed for each, found in detected.items()}, True
    return {each: found.per_cell(positive=True) > 0 for each, found in detected.items()}, False


def _round(data: Any, setup: Setup) -> None:
    """Round the counts to whole numbers; the object was read for this command alone."""
    opened = open_data(data, setup)
    for matrix in {id(counts.matrix): counts.matrix for counts in opened.counts.values()}.values():
        values: NDArray[Any] = matrix.data if hasattr(matrix, "indptr") else matrix
        if values.dtype.kind == "f":
            np.rint(values, out=values)


def count_fragments(data: Any, setup: Setup, options: argparse.Namespace) -> None:
    """Make fragments of the reads of regions with ``--reads-to-fragments``; once for each file that was read."""
    if not options.reads_to_fragments:
        return
    counts = open_data(data, setup).counts.get(ATAC)
    if counts is None:
        raise ValueError("--reads-to-fragments is for counts of regions, and there are none.")
    make_fragments(counts.matrix, counts.columns, counts.where)


def _subset(data: Any, opened: Opened, cells: Mask, kept: Mapping[Modality, Mask]) -> Any:
    def columns(adata: AnnData, modality: Modality) -> Mask:
        wanted = np.ones(adata.n_vars, dtype=bool)
        wanted[opened.counts[modality].columns[~kept[modality]]] = False
        return wanted

    if isinstance(data, AnnData):
        return data[cells, np.all([columns(data, modality) for modality in kept], axis=0)].copy()
    names = opened.cells[cells]
    parts = dict(data.mod.items())
    for modality in kept:
        name = next(name for name, part in data.mod.items() if opened.counts[modality].owner == f"mdata.mod[{name!r}]")
        parts[name] = parts[name][:, columns(parts[name], modality)]
    parts = {name: part[part.obs_names.isin(names)].copy() for name, part in parts.items()}
    with mudata_as_given() as mudata:
        subset = mudata.MuData(parts)
    subset.obs = data.obs.loc[subset.obs_names]
    return subset
