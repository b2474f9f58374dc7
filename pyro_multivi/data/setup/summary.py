"""What setup found, for the user to read."""

from __future__ import annotations

from dataclasses import dataclass

from pyro_multivi.data.setup.adapter import Counts
from pyro_multivi.data.setup.counts import Survey
from pyro_multivi.data.setup.covariates import codes
from pyro_multivi.data.setup.spec import DataSpec, Description
from pyro_multivi.data.vocabulary import ACCESSIBILITY, EXPRESSION, PAIRED

# Batches listed by name in the text; more are summed up.
_LISTED = 8


@dataclass(frozen=True, repr=False)
class SetupReport:
    """What ``setup_anndata`` or ``setup_mudata`` found; printing it gives the text.

    Attributes
    ----------
    kind
        ``"anndata"`` or ``"mudata"``.
    n_cells
        Number of "paired" cells, of those with "expression" only, with "accessibility" only.
    inferred
        Whether which modalities a cell has was read off its counts rather than stated in the data.
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
        For "RNA" and "ATAC": share of the values of measured cells that are not zero.
    counts
        For "RNA" and "ATAC": where the counts lie and what they are.
    notes
        What a user should know.
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
    notes: tuple[str, ...]

    @classmethod
    def of(cls, seen: Description) -> SetupReport:
        """Sum up what was seen."""
        spec, measured = seen.spec, seen.measured
        density, counts, notes = {}, {}, list(measured.notes)
        for modality, place, found, has in (
            ("RNA", seen.opened.rna, seen.rna, measured.has_rna),
            ("ATAC", seen.opened.atac, seen.atac, measured.has_atac),
        ):
            if place is None or found is None:
                continue
            n_measured = int(has.sum())
            values = n_measured * len(place.features)
            density[modality] = float(found.nnz.sum()) / values if values else 0.0
            counts[modality] = _describe_counts(place, found)
            if n_measured == 0:
                notes.append(f"No cell was measured for {modality}: nothing can be learned about its features.")
            if modality == "ATAC" and not found.whole:
                notes.append(f"{place.where} holds values that are not whole: only zero or not zero is used.")
        for name, size in seen.extra.items():
            width = len(spec.extra[name])
            notes.append(f"{name!r}: {width} features measured in {size} cells, for a model of your own.")
        notes += [f"{size} features of type {kind!r} are ignored." for kind, size in seen.opened.ignored.items()]
        return cls(
            kind=spec.kind,
            n_cells=spec.n_cells,
            inferred=measured.inferred,
            n_genes=spec.n_genes,
            n_regions=spec.n_regions,
            batches=_batch_sizes(seen),
            categorical=spec.categorical,
            continuous={
                key: (mean, sd)
                for key, mean, sd in zip(spec.continuous, spec.continuous_mean, spec.continuous_sd, strict=True)
            },
            labels=spec.label_categories,
            density=density,
            counts=counts,
            notes=tuple(notes),
        )

    def __repr__(self) -> str:
        sizes = self.n_cells
        how = "inferred from the counts" if self.inferred else "as the data say"
        lines = [
            f"pyro-multivi setup of {'an AnnData' if self.kind == 'anndata' else 'a MuData'}",
            f"  cells       {sum(sizes.values())}: {sizes[PAIRED]} paired, {sizes[EXPRESSION]} RNA only, "
            f"{sizes[ACCESSIBILITY]} ATAC only ({how})",
            f"  features    {self.n_genes} genes, {self.n_regions} regions",
        ]
        lines += [
            f"  {modality:<12}{self.counts[modality]}; {density:.2%} of the values are not zero"
            for modality, density in self.density.items()
        ]
        listed = [f"{name} ({size})" for name, size in list(self.batches.items())[:_LISTED]]
        more = len(self.batches) - len(listed)
        lines.append(f"  batches     {len(self.batches)}: {', '.join(listed)}{f' and {more} more' if more else ''}")
        for key, known in self.categorical.items():
            lines.append(f"  covariate   {key}: {len(known)} categories")
        for key, (mean, sd) in self.continuous.items():
            lines.append(f"  covariate   {key}: mean {mean:.4g}, sd {sd:.4g}, standardised")
        if self.labels:
            lines.append(f"  labels      {len(self.labels)}")
        lines += [f"  note        {note}" for note in self.notes]
        return "\n".join(lines)


def _describe_counts(place: Counts, found: Survey) -> str:
    if not found.whole:
        return f"{place.where}: not whole numbers, at most {found.largest:g}"
    if found.largest <= 1:
        return f"{place.where}: binary"
    return f"{place.where}: raw counts (whole numbers), at most {found.largest:g}"


def _batch_sizes(seen: Description) -> dict[str, int]:
    spec: DataSpec = seen.spec
    key = spec.setup.batch_key
    if key is None:
        return {spec.batch_categories[0]: len(seen.opened.cells)}
    code = codes(seen.opened, "batch_key", key, spec.batch_categories)
    return {name: int((code == at).sum()) for at, name in enumerate(spec.batch_categories)}
