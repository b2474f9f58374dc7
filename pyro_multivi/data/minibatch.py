"""What a model sees of some cells: tensors only."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


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

    def __len__(self) -> int:
        return len(self.index)

    @property
    def device(self) -> torch.device:
        """Device that holds the cells."""
        return self.design.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Cells:
        """The same cells on another device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
        return Cells(**moved)

    def replace(self, **changes: Any) -> Cells:
        """A copy with some fields exchanged."""
        return replace(self, **changes)
