"""Report of a query: what it shares with the reference, and what is likely a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from pyro_multivi.data.checks import first_names
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.modality import MODALITIES, RNA, modelled
from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.cautions import cells_without_counts, covariates_elsewhere
from pyro_multivi.data.setup.modalities import UNTYPED, Measured
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.panels import depth
from pyro_multivi.program import MultiVIProgram

# Of the cell lines' labels, a quarter of the features carries over 93 % (RNA) and 80 % (ATAC), a tenth 89 and 70 %.
_FEW_SHARED = 0.25
# Mean depths of one batch that differ by more than this factor are not of one library.
_FAR = 3.0
_AT_ONCE = 4096


@dataclass(frozen=True, repr=False)
class QueryReport:
    """Findings of ``load_query_data``; printing them gives the text.

    Attributes
    ----------
    n_cells
        Number of cells of each measurement pattern: "paired", "expression" only, "accessibility" only.
    shared, missing, unknown
        Numbers of features, "genes" and "regions": those of the model that the query has, those that it lacks (they
        count as not measured), and those that the model does not know (they are not used). Of modalities in the query;
        where features have no type, those that the model does not know count as "features".
    known_batches, new_batches
        Number of cells of each batch.
    missing_proteins
        Number of proteins without a count in a new batch that has others; they count as not measured there.
    """

    n_cells: dict[str, int]
    shared: dict[str, int]
    missing: dict[str, int]
    unknown: dict[str, int]
    known_batches: dict[str, int]
    new_batches: dict[str, int]
    missing_proteins: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, reference: DataSpec, spec: DataSpec, opened: Opened, table: CellTable) -> QueryReport:
        """Count what a query and a reference share.

        Parameters
        ----------
        reference, spec
            Specifications of the reference and of the query's model.
        opened, table
            The query.
        """
        shared, missing, unknown = {}, {}, {}
        for modality, counts in opened.counts.items():
            names = modality.feature_names_in(spec)
            found = int(counts.features.isin(names).sum())
            shared[modality.features] = found
            missing[modality.features], unknown[modality.features] = len(names) - found, len(counts.features) - found
        if UNTYPED in opened.ignored and not reference.setup.feature_type_key:
            unknown[UNTYPED] = opened.ignored[UNTYPED]
        sizes = torch.bincount(table.batch_code, minlength=spec.n_batch).tolist()
        batches = dict(zip(spec.batch_categories, sizes, strict=True))
        known = {name: size for name, size in batches.items() if name in reference.batch_categories and size}
        new = {name: size for name, size in batches.items() if name not in reference.batch_categories}
        masks = {modality: modality.measured_in(table).numpy() for modality in MODALITIES}
        silent = {name: len(spec.missing_proteins[name]) for name in new if name in spec.missing_proteins}
        return cls(Measured(masks, False, ()).sizes(), shared, missing, unknown, known, new, silent)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, int]]) -> QueryReport:
        """The inverse of :meth:`to_dict`, also after JSON; reports of earlier versions lack the last."""
        found = {"missing_proteins": {}, **values}
        return cls(**{entry.name: {str(key): int(n) for key, n in found[entry.name].items()} for entry in fields(cls)})

    def __repr__(self) -> str:
        alone = {modality.name: f"{modality.assay} only" for modality in MODALITIES}
        sizes = ", ".join(f"{size} {alone.get(pattern, pattern)}" for pattern, size in self.n_cells.items() if size)
        lines = ["pyro-multivi query", f"  cells       {sum(self.n_cells.values())}: {sizes}"]
        for name, number in self.shared.items():
            lines.append(
                f"  {name:<12}{number} shared with the model; {self.missing[name]} missing, which count as not "
                f"measured; {self.unknown[name]} unknown to it, which are not used"
            )
        if UNTYPED in self.unknown:
            lines.append(f"  {UNTYPED:<12}{self.unknown[UNTYPED]} unknown to it, which are not used")
        for batch, number in self.missing_proteins.items():
            lines.append(f"  proteins    {number} without a count in {batch}, where they count as not measured")
        for what, batches in (("known", self.known_batches), ("new", self.new_batches)):
            if batches:
                lines.append(f"  {what:<12}{', '.join(f'{name} ({size})' for name, size in batches.items())}")
        return "\n".join(lines)


def cautions(
    report: QueryReport, spec: DataSpec, opened: Opened, table: CellTable, program: MultiVIProgram
) -> Iterator[str]:
    """Sentences on what is likely a mistake, each with what to do."""
    yield from cells_without_counts(opened, table)
    yield from covariates_elsewhere(opened, spec)
    for name, number in report.shared.items():
        total = number + report.missing[name]
        if number < _FEW_SHARED * total:
            yield (
                f"The query shares {number} of the model's {total} {name}: its cells are mapped by these alone. Are "
                "they named alike (identifiers or symbols, the same genome)? Else train a reference on features that "
                "both have."
            )
    for what, far in _far_depths(report, spec, table, program):
        if not far:
            continue
        names = first_names(f"{batch} ({factor:.3g} times)" for batch, factor in far)
        mend = "give them another name in the column of batch_key"
        if spec.setup.batch_key is None:
            mend = "give batch_key to the setup of the reference, which has one batch only"
        yield (
            f"{what} of the query's cells is far from that of the reference's cells in the same batch: {names}. Cells "
            f"of another library are a batch of their own: {mend}."
        )


def _far_depths(
    report: QueryReport, spec: DataSpec, table: CellTable, program: MultiVIProgram
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Known batches whose mean depth differs from that of the reference, by factors, for each modality."""
    for modality in modelled(spec) if report.known_batches else ():
        logs, sizes = (torch.zeros(spec.n_batch, dtype=torch.float64) for _ in range(2))
        for cells in Minibatches(table, batch_size=_AT_ONCE):
            measured = modality.measured_in(cells)
            code = cells.design[:, : spec.n_batch].argmax(1)[measured]
            logs.index_add_(0, code, depth(program, cells, modality)[measured].clamp(min=1.0).log().double())
            sizes += torch.bincount(code, minlength=spec.n_batch)
        typical = program.library_log_mean if modality == RNA else program.atac_log_depth.expand(spec.n_batch)
        difference = (logs / sizes - typical).exp()
        yield (
            f"The {modality.assay} depth",
            [
                (batch, float(factor))
                for batch, factor, size in zip(spec.batch_categories, difference, sizes, strict=True)
                if size and batch in report.known_batches and not 1 / _FAR < float(factor) < _FAR
            ],
        )
