"""Summary of a setup, for the user to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.modality import MODALITIES, PROTEIN, PROTEIN_FEATURE_TYPES, modelled
from pyro_multivi.data.setup.covariates import CONSTANT_SD
from pyro_multivi.data.setup.masks.panels import number_of_values, panel_sizes
from pyro_multivi.data.setup.spec import DataSpec, Description
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.table import CellTable
from pyro_multivi.data.vocabulary import PAIRED

# Batches listed by name in the text; more are summed up.
_LISTED = 8
# Share of the cells that lack a modality up to which it may be worth to leave them out.
_FEW = 0.02


@dataclass(frozen=True, repr=False)
class SetupReport:
    """Findings of ``setup_anndata`` or ``setup_mudata``; printing them gives the text.

    Attributes
    ----------
    kind
        ``"anndata"`` or ``"mudata"``.
    n_cells
        Number of cells of each measurement pattern: "paired", "expression" only, "accessibility" only.
    inferred
        Whether the modalities of a cell were inferred from its counts rather than stated in the data.
    n_genes, n_regions
        Number of features.
    batches
        Number of cells of each batch; ``{"all": n}`` without ``batch_key``.
    categorical
        Categories of each categorical covariate.
    continuous
        Mean and standard deviation of each continuous covariate.
    labels
        Label categories.
    density
        Share of the values of measured cells that are not zero, for "RNA" and "ATAC".
    counts
        Place and type of the counts, for "RNA" and "ATAC".
    panels
        Number of measured features, "genes" and "regions", of each panel; empty if all were measured in all cells.
    notes
        Remarks for the user.
    """

    kind: str
    n_cells: dict[str, int]
    inferred: bool
    n_genes: int
    n_regions: int
    batches: dict[str, int]
    categorical: dict[str, tuple[str, ...]]
    continuous: dict[str, tuple[float, float]]
    labels: tuple[str, ...]
    density: dict[str, float]
    counts: dict[str, str]
    panels: dict[str, dict[str, int]]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, described: Description, likely_mistakes: Sequence[str] = ()) -> SetupReport:
        """Sum up a description, with remarks on what is likely a mistake first."""
        spec, table, measured = described.spec, described.table, described.measured
        density, counts = {}, {}
        for modality, place in described.opened.counts.items():
            found, values = modality.counts_in(table), number_of_values(table, modality)
            density[modality.assay] = int(found.crow[-1]) / values if values else 0.0
            counts[modality.assay] = f"{place.where}: {_describe_values(found)}"
        batch_sizes = torch.bincount(table.batch_code, minlength=spec.n_batch).tolist()
        return cls(
            kind=spec.kind,
            n_cells=spec.n_cells,
            inferred=measured.inferred,
            n_genes=spec.n_genes,
            n_regions=spec.n_regions,
            batches=dict(zip(spec.batch_categories, batch_sizes, strict=True)),
            categorical=spec.categorical,
            continuous={
                key: (mean, sd)
                for key, mean, sd in zip(spec.continuous, spec.continuous_mean, spec.continuous_sd, strict=True)
            },
            labels=spec.label_categories,
            density=density,
            counts=counts,
            panels=panel_sizes(described.opened, table),
            notes=(*likely_mistakes, *_notes(described)),
        )

    def __repr__(self) -> str:
        sizes = self.n_cells
        alone = ", ".join(f"{sizes[modality.name]} {modality.assay} only" for modality in MODALITIES)
        alone += f", {sizes[PROTEIN]} proteins only" if PROTEIN in sizes else ""
        how = "inferred from the counts" if self.inferred else "as the data say"
        lines = [
            f"pyro-multivi setup of {'an AnnData' if self.kind == 'anndata' else 'a MuData'}",
            f"  cells       {sum(sizes.values())}: {sizes[PAIRED]} paired, {alone} ({how})",
            f"  features    {self.n_genes} genes, {self.n_regions} regions",
        ]
        lines += [
            f"  {modality:<12}{self.counts[modality]}; {density:.2%} of the values are not zero"
            for modality, density in self.density.items()
        ]
        listed = [f"{name} ({size})" for name, size in list(self.batches.items())[:_LISTED]]
        more = len(self.batches) - len(listed)
        lines.append(f"  batches     {len(self.batches)}: {', '.join(listed)}{f' and {more} more' if more else ''}")
        of_features = {"genes": self.n_genes, "regions": self.n_regions}
        for name, measured in list(self.panels.items())[:_LISTED]:
            parts = ", ".join(f"{size} of {of_features[what]} {what}" for what, size in measured.items())
            lines.append(f"  measured    {name}: {parts}; the others are masked there")
        if len(self.panels) > _LISTED:
            lines.append(f"  measured    and {len(self.panels) - _LISTED} more panels of features")
        for key, known in self.categorical.items():
            lines.append(f"  covariate   {key}: {len(known)} categories")
        for key, (mean, sd) in self.continuous.items():
            what = f"mean {mean:.4g}, sd {sd:.4g}, standardised"
            what = f"{mean:.4g} in all cells, without effect" if sd == CONSTANT_SD else what
            lines.append(f"  covariate   {key}: {what}")
        if self.labels:
            lines.append(f"  labels      {len(self.labels)}")
        lines += [f"  note        {note}" for note in self.notes]
        return "\n".join(lines)


def _of_proteins(number: int, size: int, n_cells: int, missing: Mapping[str, Sequence[str]]) -> list[str]:
    without = "" if size == n_cells else f"; the other {n_cells - size} have no count of any: not measured"
    notes = [f"{number} proteins measured in {size} cells{without}."]
    for batch, names in missing.items():
        notes.append(
            f"{len(names)} of {number} proteins have no count in batch {batch!r}, taken as not measured there: "
            f"{first_names(names)}."
        )
    return notes


def modalities_together(spec: DataSpec, table: CellTable) -> tuple[str, int]:
    """How many modalities (RNA, ATAC, proteins) there are, "both" or "all three", and the cells that lack one."""
    number = len(modelled(table)) + len(spec.setup.modelled_extra)
    return {2: "both", 3: "all three"}.get(number, ""), int((~table.has_all(spec.setup.modelled_extra)).sum())


def _notes(described: Description) -> list[str]:
    """Remarks on what the setup takes data for, and on what it leaves out."""
    spec, table = described.spec, described.table
    notes = [*described.measured.notes]
    for modality, place in described.opened.counts.items():
        if modality.binary and not modality.counts_in(table).whole:
            notes.append(f"{place.where} holds values that are not whole: only zero or not zero is used.")
    if spec.kind == "anndata" and not spec.setup.feature_type_key:
        notes.append(
            "adata.var has no column 'feature_types', which tells genes from regions: all features count as genes. If "
            "some are regions, add it ('Gene Expression' or 'Peaks' for each), name yours (feature_type_key), or say "
            "how many genes come first and how many regions behind them: MULTIVI(adata, n_genes=..., n_regions=...)."
        )
    for name, known in spec.extra.items():
        size = int(table.extra[name].measured.sum())
        if spec.setup.holds_proteins(name):
            notes += _of_proteins(len(known), size, len(table), spec.missing_proteins)
        else:
            notes.append(f"{name!r}: {len(known)} features measured in {size} cells, for a model of your own.")
    number, n_lacking = modalities_together(spec, table)
    if number and not n_lacking:
        notes.append(
            f"all cells have {number} modalities: MULTIVI() learns from {number} together, as fully_paired=True says."
        )
    elif number and n_lacking <= _FEW * len(table):
        notes.append(
            f"all but {n_lacking} of {len(table)} cells have {number} modalities: without these few MULTIVI() would "
            f"learn from {number} together, as fully_paired=True says, which tells types better."
        )
    return notes + [
        f"{size} features of type {kind!r} are ignored."
        + " pyro_multivi.organize_cite_seq_10x(adata) makes proteins of them." * (kind in PROTEIN_FEATURE_TYPES)
        for kind, size in described.opened.ignored.items()
    ]


def _describe_values(counts: SparseCounts | StoredCounts) -> str:
    if not counts.whole:
        return f"not whole numbers, at most {counts.largest:g}"
    return "binary" if counts.largest <= 1 else f"raw counts (whole numbers), at most {counts.largest:g}"
