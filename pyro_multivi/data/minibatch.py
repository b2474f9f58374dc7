"""Minibatches: the tensors that a model reads of some cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_multivi.data.modality import MODALITIES, PROTEIN, PROTEIN_FEATURE_TYPES, Modality, Named
from pyro_multivi.data.sparse import SparseCounts


class Measurement(NamedTuple):
    """Values of an extra modality, one besides RNA and ATAC, of some cells.

    Attributes
    ----------
    values
        Shape (B, F), float32; rows of cells without this measurement hold zeros.
    measured
        Whether each cell has it, shape (B,), bool.
    """

    values: Tensor
    measured: Tensor

    def at(self, index: Tensor) -> Measurement:
        """The values of the cells at ``index``, int64."""
        return Measurement(self.values[index], self.measured[index])


class Panels(NamedTuple):
    """Panels of features: those that were measured in some cells, where these are not all.

    Attributes
    ----------
    measured
        Whether each feature belongs to each panel, (n_panels, F), bool.
    code
        Panel of each cell, (B,), int64.
    """

    measured: Tensor
    code: Tensor

    def at(self, index: Tensor) -> Panels:
        """The panels of the cells at ``index``, int64."""
        return Panels(self.measured, self.code[index])

    def n_cells(self, index: Tensor) -> Tensor:
        """Number of some cells, by position or mask, in which each feature was measured, (F,), int64."""
        sizes = torch.bincount(self.code[index], minlength=len(self.measured))
        # No matrix product: a GPU has none of whole numbers.
        return (sizes[:, None] * self.measured).sum(0)


@dataclass(frozen=True)
class Cells:
    """A minibatch of B cells out of ``n_total``.

    Attributes
    ----------
    index
        Position of each cell in the data set it was drawn from, shape (B,), int64.
    n_total
        Number of cells in that data set: the size of the plate the minibatch stands for.
    x
        Gene counts, shape (B, G); :class:`~pyro_multivi.data.sparse.SparseCounts` or dense.
        Rows of cells without RNA hold zeros.
    y
        Peak counts, shape (B, M); any positive count means accessible. Sparse or dense.
    has_rna, has_atac
        Whether the modality was measured, shape (B,), bool. Data, never guessed from zeros.
    design
        Observed covariates s, shape (B, S): one-hot batch, then one-hot categorical
        covariates, then continuous covariates.
    label
        Label code for gene-label dispersion, shape (B,), int64, or None.
    rna_size
        Fixed RNA size factor, shape (B,), or None to infer the library.
    atac_size
        Fixed accessibility size factor in (0, 1), shape (B,), or None to infer it.
    extra
        Extra modalities by name, such as protein counts. The program reads none of them: they are
        for the hooks of a custom program.
    rna_rows, atac_rows
        Positions of the cells with RNA (with ATAC), shape (b,), int64, ascending; the counts of all other
        cells have to be zero. The tables that cut minibatches fill them in. None: they are looked up where
        they are needed, which makes the host wait for a GPU.
    posterior
        Of minified data, the posterior of each cell in place of its counts, (B, P); see
        :mod:`~pyro_multivi.data.minified.layout`.
    rna_panels, atac_panels
        Features that were measured in each cell, of those with the modality; the counts of the others have to be zero.
        None: all of them in every cell.
    """

    index: Tensor
    n_total: int
    x: Tensor
    y: Tensor
    has_rna: Tensor
    has_atac: Tensor
    design: Tensor
    label: Tensor | None = None
    rna_size: Tensor | None = None
    atac_size: Tensor | None = None
    extra: Mapping[str, Measurement] = field(default_factory=dict)
    rna_rows: Tensor | None = None
    atac_rows: Tensor | None = None
    posterior: Tensor | None = None
    rna_panels: Panels | None = None
    atac_panels: Panels | None = None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        """Device that holds the cells."""
        return self.design.device

    def to(self, device: torch.device | str | torch.dtype, non_blocking: bool = False) -> Cells:
        """Move the cells to another device; or cast them to a dtype, which applies to floating-point numbers only."""
        if isinstance(device, torch.dtype):
            return self._map(lambda part: part.to(device) if part.is_floating_point() else part)
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Cells:
        """Copy the cells to page-locked memory, from which a GPU copies in the background."""
        return self._map(lambda part: part.pin_memory())

    def parts(self) -> list[Tensor]:
        """All tensors that the cells are made of; those inside of sparse counts rather than the counts."""
        return tensors_in(self)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cells:
        return replace(self, **with_changed_tensors(self, change))

    def measured(self, site: str) -> Tensor:
        """Whether an observed site was measured in each cell, (B,), bool.

        ``"x"`` and ``"y"`` are the counts, a name of ``extra`` is that modality; a site of any
        other name is observed in every cell.
        """
        if site in self.extra:
            return self.extra[site].measured
        for modality in MODALITIES:
            if site == modality.counts:
                return modality.measured_in(self)
        return torch.ones_like(self.has_rna)

    def replace(self, **changes: Any) -> Cells:
        """A copy with some fields exchanged; positions of measured cells are dropped where they may no longer hold."""
        for modality in MODALITIES:
            if {modality.counts, modality.mask} & changes.keys():
                changes.setdefault(modality.rows, None)
        return replace(self, **changes)


def with_changed_tensors(owner: Any, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Fields of a minibatch or table that hold tensors, each tensor changed."""
    changed: dict[str, Any] = {name: change(part) for name, part in vars(owner).items() if isinstance(part, Tensor)}
    changed |= {name: Panels(*map(change, part)) for name, part in vars(owner).items() if isinstance(part, Panels)}
    return {**changed, "extra": {name: Measurement(*map(change, part)) for name, part in owner.extra.items()}}


def pattern_code(cells: Any) -> Tensor:
    """Measurement pattern of each cell of a minibatch or table, (n,): 0 nothing, 1 RNA only, 2 ATAC only, 3 both."""
    return torch.stack([modality.measured_in(cells).long() << at for at, modality in enumerate(MODALITIES)]).sum(0)


def tensors_in(owner: Any) -> list[Tensor]:
    """All tensors of a minibatch or table; those inside of sparse counts rather than the counts."""
    found: list[Tensor] = []
    panels = [each for each in vars(owner).values() if isinstance(each, Panels)]
    for part in (*vars(owner).values(), *(part for each in (*owner.extra.values(), *panels) for part in each)):
        if isinstance(part, Tensor):
            found.extend(part.parts() if isinstance(part, SparseCounts) else (part,))
    return found


@dataclass(frozen=True)
class ExtraFeatures(Named):
    """An extra modality, where code takes a :class:`Modality` for its features, values and one decoded site.

    Attributes
    ----------
    name
        Name of the extra modality, and of its observed site.
    decoded
        Site of the model.
    feature
        One feature of it, in messages and arguments.

    Examples
    --------
    >>> ExtraFeatures("protein", feature="protein").list_argument, ExtraFeatures("methylated").list_argument
    ('protein_list', 'feature_list')
    """

    name: str
    decoded: str = ""
    feature: str = "feature"
    depth: str = ""
    binary: bool = False
    compositional: bool = False

    @property
    def counts(self) -> str:
        """Observed site of the model."""
        return self.name

    @property
    def assay(self) -> str:
        """Word of messages."""
        return self.name

    def measured_in(self, cells: Any) -> Any:
        """Whether each cell of a minibatch or table was measured, (n,), bool."""
        return cells.extra[self.name].measured

    def counts_in(self, cells: Any) -> SparseCounts:
        """Values in a minibatch or table, (n, features), 0 where not measured."""
        return SparseCounts.from_dense(cells.extra[self.name].values.nan_to_num(0.0))

    def n_features_in(self, table: Any) -> int:
        """Number of features in a minibatch or table."""
        return table.extra[self.name].values.shape[1]

    @property
    def feature_type(self) -> str:
        """Value of ``var["feature_types"]``: for proteins as Cell Ranger writes it."""
        return PROTEIN_FEATURE_TYPES[0] if self.name == PROTEIN else self.name

    def feature_names_in(self, spec: Any) -> tuple[str, ...]:
        """Names of the features in a specification."""
        return spec.extra[self.name]

    def panels_in(self, cells: Any) -> Panels | None:
        """Features that were measured in each cell of a table; None where every feature was."""
        missing = cells.extra[self.name].values.isnan()
        if not bool(missing.any()):
            return None
        patterns, code = missing.unique(dim=0, return_inverse=True)
        return Panels(~patterns, code)


#: What is compared, or whose features are chosen.
AnyModality: TypeAlias = "Modality | ExtraFeatures"
