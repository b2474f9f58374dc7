"""What a model sees of some cells: tensors only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts


class Measurement(NamedTuple):
    """What was measured of some cells besides RNA and ATAC.

    Attributes
    ----------
    values
        Shape (B, F), float32; rows of cells without this measurement hold zeros.
    measured
        Which cells have it, shape (B,), bool.
    """

    values: Tensor
    measured: Tensor

    def at(self, index: Tensor) -> Measurement:
        """That of the cells at ``index``, int64."""
        return Measurement(self.values[index], self.measured[index])


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
        Other measurements by name, such as protein counts. The program reads none of them: they are
        for the hooks of a model of your own.
    rna_rows, atac_rows
        Positions of the cells with RNA (with ATAC), shape (b,), int64, ascending; counts of the others
        are promised to be zero. Whoever cuts minibatches knows them; None: they are looked up where
        they are needed, for which a GPU has to be waited for.
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

    def __len__(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        """Device that holds the cells."""
        return self.design.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Cells:
        """The same cells on another device."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Cells:
        """The same cells in page-locked memory, from which a GPU copies while others work."""
        return self._map(lambda part: part.pin_memory())

    def parts(self) -> list[Tensor]:
        """All tensors that the cells are made of; those inside of sparse counts rather than the counts."""
        found: list[Tensor] = []

        def add(part: Tensor) -> Tensor:
            found.extend(part.parts() if isinstance(part, SparseCounts) else (part,))
            return part

        self._map(add)
        return found

    def _map(self, change: Callable[[Tensor], Tensor]) -> Cells:
        changed: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            changed[entry.name] = change(value) if isinstance(value, Tensor) else value
        changed["extra"] = {name: Measurement(*map(change, part)) for name, part in self.extra.items()}
        return Cells(**changed)

    def measured(self, site: str) -> Tensor:
        """Whether an observed site was measured in each cell, (B,), bool.

        ``"x"`` and ``"y"`` are the counts, a name of ``extra`` is that measurement; a site of any
        other name is observed in every cell.
        """
        if site in self.extra:
            return self.extra[site].measured
        return {"x": self.has_rna, "y": self.has_atac}.get(site, torch.ones_like(self.has_rna))

    def replace(self, **changes: Any) -> Cells:
        """A copy with some fields exchanged; what is known of other fields from these is looked up anew."""
        if {"x", "has_rna"} & changes.keys():
            changes.setdefault("rna_rows", None)
        if {"y", "has_atac"} & changes.keys():
            changes.setdefault("atac_rows", None)
        return replace(self, **changes)
