"""Likely mistakes in data that are valid: sentences on what was found and what to do, which setup warns of once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import MODALITIES, PROTEIN, RNA, Modality
from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.covariates import CONSTANT_SD, numbers
from pyro_multivi.data.setup.masks.panels import number_of_values
from pyro_multivi.data.setup.modalities import unknown_kinds
from pyro_multivi.data.setup.spec import DataSpec, Description
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.table import CellTable
from pyro_multivi.data.vocabulary import PAIRED, regions_among, spelled

# Of ten paired cells one is held out for calibration: with fewer than 50 there are fewer than five.
_FEW_PAIRED = 50
# Data of fewer cells are examples, in which anything may be by chance.
_LEAST_CELLS = 11
# Variance of the cells' totals, as a share of their mean, below which they were made equal; of counts it is 1 at least.
_EQUAL = 0.1
# Cells without any feature, for each with one, that are still a matter of chance.
_BEYOND_CHANCE = 2
# Counts above 1 that Poisson counts of this density would have: with so many expected, that there is none is no chance.
_EXPECTED = 10.0
# Cells read at a time.
_AT_ONCE = 4096
# Share of the features that are plenty in other batches, of which a batch has none: of tissues a few per cent are so.
_FILLED = 0.1
# Standard deviations of a covariate that are far from its mean, and the share of the cells that lie so far if these are
# not like those that it is from: of any cells at most one in 25 does (Chebyshev).
_FAR_SDS, _FAR_SHARE = 5.0, 0.1
# Names tried, and the share of them that has to be found again for a suffix to be the reason.
_TRIED, _FOUND = 500, 0.5
# Signs that divide names into parts; what is left without the first part has to hold a barcode.
_SIGNS = "-_.:#|/"
_LAST_PART = re.compile(rf"[{_SIGNS}][^{_SIGNS}]+$")
_FIRST_PART = re.compile(rf"^.*?[{_SIGNS}](?=.*[ACGT]{{8}})")


def cautions(found: Description) -> list[str]:
    """Sentences on what is likely a mistake, each with what to do."""
    return [
        *_without_counts(found),
        *_unlikely_counts(found),
        *_few_paired(found),
        *_confounded_batches(found),
        *_zeros_of_batches(found),
        *_categories_of_single_cells(found),
        *_left_out(found),
        *_regions_as_genes(found),
        *_binary_proteins(found),
    ]


def _without_counts(found: Description) -> Iterator[str]:
    """Modalities, or cells of a modality, that are said to be there and have no counts."""
    for modality in MODALITIES:
        name = found.spec.setup.mudata_name(modality)
        part, mask = found.opened.counts.get(modality), found.measured.masks[modality]
        if part is None and name is not None and found.opened.name == "mdata":
            yield f"mdata.mod[{name!r}] has no features: {modality.assay} counts as not measured. The right object?"
        if part is None:
            continue
        if not mask.any():
            yield (
                f"No cell was measured for {modality.assay}: nothing can be learned about the {len(part.features)} "
                f"{modality.features} in {part.where}. Leave them out, or add cells that have counts of them."
            )
    yield from cells_without_counts(found.opened, found.table)


def cells_without_counts(opened: Opened, table: CellTable) -> Iterator[str]:
    """Cells said to have a modality, of which they have no count; there are none where that is told by the counts.

    Parameters
    ----------
    opened
        The data, by which cells and places are named.
    table
        What was read of them.
    """
    for modality, part in opened.counts.items() if table.posterior is None else ():
        counts, mask = modality.counts_in(table), modality.measured_in(table).numpy()
        if counts is None:
            continue
        detected: NDArray[Any] = counts.crow.diff().numpy()[mask]
        empty = mask.copy()
        empty[mask] = detected == 0
        # Of few features a cell may have none by chance; then other cells have one.
        if len(mask) >= _LEAST_CELLS and empty.sum() > max(1, _BEYOND_CHANCE * (detected == 1).sum()):
            yield (
                f"{int(empty.sum())} of the {int(mask.sum())} cells said to have {modality.assay} have no count in "
                f"{part.where}: {first_names(opened.cells[empty], 3)}. If it was not measured in them, mark "
                "them so (modality_key); if the counts are elsewhere, put them there; else drop these cells."
            )


def covariates_elsewhere(opened: Opened, spec: DataSpec) -> Iterator[str]:
    """Continuous covariates of other cells that are not where those of the model's data were."""
    argument = "continuous_covariate_keys"
    for key, mean, sd in zip(spec.continuous, spec.continuous_mean, spec.continuous_sd, strict=True):
        values = numbers(opened, argument, key)
        if sd == CONSTANT_SD:
            other = int((~np.isclose(values, mean, rtol=1e-9, atol=0.0)).sum())
            if other:
                yield (
                    f"{argument}={key!r} was {mean:g} in all cells of the model's data, and is not in {other} of these "
                    f"{len(values)}: its effect is not known, and other values have none here. What differs between "
                    "the cells because of it is taken for their state, or for their batch if they have one of their "
                    "own."
                )
            continue
        far = int((np.abs(values - mean) > _FAR_SDS * sd).sum())
        if far > _FAR_SHARE * len(values):
            yield (
                f"{argument}={key!r} lies more than {_FAR_SDS:g} standard deviations from the mean of the model's data "
                f"({mean:g}, sd {sd:g}) in {far} of these {len(values)} cells, for instance {values[0]:g}: no cell "
                "tells its effect there, and what is decoded says less of the cells' states the further it is. Is it "
                "in the same unit? Else give these cells values that the model has seen, such as the mean."
            )


def _unlikely_counts(found: Description) -> Iterator[str]:
    for modality, part in found.opened.counts.items():
        counts = modality.counts_in(found.table)
        n = int(found.measured.masks[modality].sum())
        n_entries = int(counts.crow[-1])
        if modality.binary or n == 0 or n_entries == 0:
            continue
        density = n_entries / number_of_values(found.table, modality)
        if counts.largest <= 1 and n_entries * density / 2 > _EXPECTED:
            yield (f"{part.where} holds no {modality.assay} count above 1, as if it were binary: give the counts.")
            continue
        totals = counts.row_sums().double()[torch.from_numpy(found.measured.masks[modality])]
        if n >= _LEAST_CELLS and float(totals.var()) < _EQUAL * float(totals.mean()):
            yield (
                f"The {modality.assay} counts of every cell in {part.where} sum to nearly the same, "
                f"{float(totals.min()):g} to {float(totals.max()):g}, as if they were normalised and rounded: give the "
                "counts as they were measured."
            )


def _few_paired(found: Description) -> Iterator[str]:
    sizes = found.measured.sizes()
    alone = [sizes[modality.name] for modality in MODALITIES]
    if 0 < sizes[PAIRED] < min(_FEW_PAIRED, sum(alone)) and len(found.table) >= _LEAST_CELLS:
        yield (
            f"Only {sizes[PAIRED]} of {len(found.table)} cells are paired. They alone tell how RNA and ATAC belong "
            f"together: below {_FEW_PAIRED}, see that cells mix across modalities before you rely on what is imputed."
        )
    if all(alone) and sizes[PAIRED] < 0.1 * min(alone):
        number = np.sum([*found.measured.masks.values()], axis=0)
        names = [found.opened.cells[mask & (number == 1)] for mask in found.measured.masks.values()]
        match = _match_without_ends(*(part.astype(str).tolist() for part in names))
        if match is not None:
            number_found, one, other = match
            yield (
                f"{sizes[PAIRED]} cells are paired, but {number_found} of the {min(alone)} cells of one modality have "
                f"the same name once an end is cut: {one!r} and {other!r} ({_ends(one, other)}). If they "
                f"are the same cells, give them one name{_how_to_join(found)}."
            )


def _ends(one: str, other: str) -> str:
    """The suffixes or prefixes by which two names differ."""
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    longer = max(one, other, key=len)
    if longer[start : start + 1] not in _SIGNS:
        # Back to the sign before, so that "_rna" and "_atac" are named whole.
        start = max(one[:start].rfind(sign) for sign in _SIGNS)
    parts = [repr(name[start:]) for name in (one, other) if name[start:]]
    return f"suffix {' and '.join(parts)}" if start > 0 else "another prefix"


def _how_to_join(found: Description) -> str:
    if found.opened.name == "mdata":
        return " in both modalities, mdata.mod[...].obs_names, and make the MuData anew"
    return " and put their counts into one row (a paired cell)"


def _match_without_ends(names: Sequence[str], others: Sequence[str]) -> tuple[int, str, str] | None:
    """Number of names that are equal once a suffix or prefix is cut, and an example; None if most are not."""
    swapped = len(others) < len(names)
    few, many = (others, names) if swapped else (names, others)
    tried = list(few[:: max(1, len(few) // _TRIED)])
    for i, j in ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (2, 2), (0, 3), (3, 0), (3, 3)):
        cut = {_cut(name, i): name for name in tried}
        if len(cut) < len(tried):  # what is left does not tell cells apart
            continue
        first = next((name for name in many if _cut(name, j) in cut), None)
        if first is None:
            continue
        whole, whole_many = {_cut(name, i) for name in few}, [_cut(name, j) for name in many]
        hits = [name for name in whole_many if name in whole]
        if len(set(hits)) >= _FOUND * len(few) and len(hits) <= 1.1 * len(set(hits)):
            example = (cut[_cut(first, j)], first)
            return len(set(hits)), *(example[::-1] if swapped else example)
    return None


def _cut(name: str, how: int) -> str:
    """A name without its last part (1), its last two (2) or its first (3), parts being divided by signs."""
    if how == 3:
        return _FIRST_PART.sub("", name, count=1)
    for _ in range(how):
        name = _LAST_PART.sub("", name)
    return name


def _confounded_batches(found: Description) -> Iterator[str]:
    key, n_batch = found.spec.setup.batch_key, found.spec.n_batch
    pattern: NDArray[Any] = np.stack([*found.measured.masks.values()], axis=1) @ (1, 2)
    patterns = len(np.unique(pattern))
    if key is None or patterns < 2 or n_batch != patterns:
        return
    if len(np.unique(found.table.batch_code.numpy() * 4 + pattern)) == patterns:
        yield (
            f"batch_key={key!r} says the same as what was measured in a cell: effects of batches cannot be told from "
            "those of modalities, and nothing is learned of a modality in batches without it. Give the donor or "
            f"experiment, or leave batch_key out{_right_argument(found, key)}."
        )


def _zeros_of_batches(found: Description) -> Iterator[str]:
    """Features without a count in a batch and with many in others, as an outer join fills in what was not measured."""
    code, spec = found.table.batch_code, found.spec
    typed = bool(spec.setup.feature_type_key) or found.opened.name == "mdata"
    # Without types regions count as genes so far.
    whole = (
        " If they are the regions of cells with RNA alone, or the genes of cells with ATAC alone, nothing is to be "
        "done: n_genes and n_regions of MULTIVI() tell it."
    )
    for modality, part in found.opened.counts.items():
        features = modality.features if typed else "features"
        counts, mask = modality.counts_in(found.table), modality.measured_in(found.table)
        cells = [torch.nonzero(mask & (code == batch)).squeeze(1) for batch in range(spec.n_batch)]
        if sum(len(own) > 0 for own in cells) < 2:
            continue
        n, n_features = _numbers_of_cells(modality, found, torch.cat(cells)), len(part.features)
        detections = [_detections(counts, own, n_features) for own in cells]
        total = torch.stack(detections).sum(0)
        for batch, (own, detected) in enumerate(zip(cells, detections, strict=True)):
            measured = _numbers_of_cells(modality, found, own)
            expected = (total - detected) * (measured / (n - measured).clamp(min=1)) > _EXPECTED
            absent = int((expected & (detected == 0)).sum())
            if absent > _FILLED * expected.sum():
                yield (
                    f"{absent} {features} have no count in the {len(own)} cells of batch "
                    f"{spec.batch_categories[batch]!r} and many in others, as if zeros had been filled in where they "
                    "were not measured (an outer join). A model would learn them: mask them (feature_masks), keep the "
                    "features that all have, or join the samples by pyro_multivi.join_samples, which does either."
                    f"{'' if typed else whole}"
                )
                break


def _numbers_of_cells(modality: Modality, found: Description, cells: torch.Tensor) -> torch.Tensor:
    """Number of some cells, by position, in which each feature was measured, (F,)."""
    panels: Panels | None = modality.panels_in(found.table)
    return torch.full((modality.n_features_in(found.table),), len(cells)) if panels is None else panels.n_cells(cells)


def _detections(counts: SparseCounts | StoredCounts, cells: torch.Tensor, n_features: int) -> torch.Tensor:
    """Number of some cells with a count of each feature, (F,), read by blocks."""
    found = torch.zeros(n_features, dtype=torch.int32)
    for part in cells.split(_AT_ONCE):
        found += torch.bincount(counts.select_rows(part).col, minlength=n_features)
    return found


def _right_argument(found: Description, key: str) -> str:
    """The argument for a column of measurement patterns, which 1.3 of scvi-tools took for batches."""
    known = found.spec.setup.modality_key is None and all(map(spelled, found.spec.batch_categories))
    return f"; what was measured in a cell goes to modality_key={key!r}" if known else ""


def _categories_of_single_cells(found: Description) -> Iterator[str]:
    spec, n = found.spec, len(found.table)
    columns = [("batch_key", spec.setup.batch_key, spec.n_batch), ("labels_key", spec.setup.labels_key, spec.n_labels)]
    columns += [("categorical_covariate_keys", key, len(known)) for key, known in spec.categorical.items()]
    for argument, key, size in columns:
        if size > max(1, n // 2):
            yield (
                f"{argument}={key!r} has {size} categories for {n} cells, so that most are one cell: its effect cannot "
                "be told from the cell. Is it a column of names or numbers? Give one with a few groups of cells."
            )


def _regions_as_genes(found: Description) -> Iterator[str]:
    """Genes that have names of regions; where features have no type, the constructor of a model looks for them."""
    part, setup = found.opened.counts.get(RNA), found.spec.setup
    if part is None or not (setup.feature_type_key or found.opened.name == "mdata"):
        return
    regions = regions_among(part.features)
    if regions:
        column = f"Correct adata.var[{setup.feature_type_key!r}] or feature_type_values"
        modalities = "Name the right modalities, modalities={'rna_layer': ..., 'atac_layer': ...}"
        yield (
            f"{len(regions)} of the {len(part.features)} genes in {part.where} have names of regions: "
            f"{first_names(regions, 3)}. {modalities if found.opened.name == 'mdata' else column} if they are regions."
        )


def _binary_proteins(found: Description) -> Iterator[str]:
    """Proteins without a count above 1, in which no background could be told from a foreground."""
    if found.spec.setup.protein_key is None:
        return
    values, measured = found.table.extra[PROTEIN]
    if measured.sum() >= _LEAST_CELLS and float(values.nan_to_num(0.0).max()) <= 1:
        yield (
            f"No count of {found.opened.extra[PROTEIN].where} is above 1, as if proteins were only called present or "
            "absent: their background is modelled from raw counts (UMI). Give these, or leave proteins out."
        )


def _left_out(found: Description) -> Iterator[str]:
    """Features that are of neither modality."""
    setup = found.spec.setup
    ignored = {kind: found.opened.ignored[kind] for kind in unknown_kinds(found.opened)}
    if ignored and found.opened.name == "mdata":
        yield (
            f"{' and '.join(map(repr, ignored))} of mdata.mod ({sum(ignored.values())} features) left out: if it is "
            "RNA or ATAC, name it in modalities={'rna_layer': ..., 'atac_layer': ...}; others are for programs of your "
            "own (extra_modalities)."
        )
    elif ignored:
        kept = ", ".join(f"{each.features} {first_names(setup.types_of(each))}" for each in MODALITIES)
        yield (
            f"{sum(ignored.values())} features are left out, of {setup.feature_type_key} "
            f"{', '.join(f'{kind!r} ({size})' for kind, size in ignored.items())}: feature_type_values names {kept}. "
            "If they are genes or regions, add their words there; else drop them from adata."
        )
