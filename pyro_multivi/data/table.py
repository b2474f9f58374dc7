"""Table of cells: a whole data set in memory, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_multivi.data.marginals import Marginals
from pyro_multivi.data.minibatch import Cells, Measurement, Panels
from pyro_multivi.data.modality import MODALITIES, Modality, modelled
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.stores.rows import RowSlices

# Cells read at a time for statistics: large enough to be fast, small beside any table.
_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class CellTable:
    """All n cells of a data set, on the CPU; minibatches are cut from it.

    Attributes
    ----------
    x
        Gene counts, shape (n, G), or None if no cell has RNA. Values may be small integers here to
        save memory; those of minibatches are floating. Counts on disk are read with the cells.
    y
        Peak counts, shape (n, M), or None if no cell has ATAC.
    has_rna, has_atac
        Whether the modality was measured, shape (n,), bool.
    design
        One-hot batch, then one-hot categorical covariates, then continuous covariates,
        shape (n, S), float32.
    batch_code
        Batch of each cell, shape (n,), int64.
    n_genes, n_regions
        G and M, also of a modality that is absent.
    n_batch
        Number of batches K: the width of the batch part of ``design``. 0 means the largest
        code plus one.
    label
        Label code of each cell, shape (n,), int64, or None.
    rna_size, atac_size
        Fixed size factors, shape (n,), or None.
    extra
        Extra modalities of the n cells by name.
    cell_names
        Names of the n cells; may be left empty in a table made by hand.
    posterior
        Of minified data, the posterior of the n cells, (n, P); counts are empty then.
    rna_panels, atac_panels
        Features that were measured, where these are not all of the model's; see
        :class:`~pyro_multivi.data.minibatch.Cells`.

    Raises
    ------
    ValueError
        If the parts do not belong together: a shape that does not fit, cells marked as measured for a
        modality the table does not hold, or counts of a cell that is marked as not measured.

    Examples
    --------
    >>> table = CellTable(x=SparseCounts.from_dense(torch.tensor([[3.0, 0.0], [2.0, 2.0]])), y=None,
    ...                   has_rna=torch.tensor([True, True]), has_atac=torch.tensor([False, False]),
    ...                   design=torch.ones(2, 1), batch_code=torch.zeros(2, dtype=torch.long),
    ...                   n_genes=2, n_regions=3)
    >>> cells = table.batch(torch.tensor([1]))
    >>> cells.x.to_dense(), cells.y.shape, cells.n_total
    (tensor([[2., 2.]]), torch.Size([1, 3]), 2)
    """

    x: SparseCounts | StoredCounts | None
    y: SparseCounts | StoredCounts | None
    has_rna: Tensor
    has_atac: Tensor
    design: Tensor
    batch_code: Tensor
    n_genes: int
    n_regions: int
    n_batch: int = 0
    label: Tensor | None = None
    rna_size: Tensor | None = None
    atac_size: Tensor | None = None
    extra: Mapping[str, Measurement] = field(default_factory=dict)
    cell_names: Sequence[str] = ()
    posterior: Tensor | None = None
    rna_panels: Panels | None = None
    atac_panels: Panels | None = None

    def __post_init__(self) -> None:
        if self.n_batch == 0:
            object.__setattr__(self, "n_batch", int(self.batch_code.max()) + 1 if len(self) else 1)
        self._check_lengths()
        for modality in MODALITIES:
            self._check_counts(modality)

    def _check_lengths(self) -> None:
        parts = [name for each in MODALITIES for name in (each.counts, each.mask, each.size_factor)]
        for name in (*parts, "design", "label", "posterior"):
            part = getattr(self, name)
            if part is not None and part.shape[0] != len(self):
                raise ValueError(
                    f"{name} holds {part.shape[0]} cells and batch_code {len(self)}: they must be the same."
                )
        if self.cell_names and len(self.cell_names) != len(self):
            raise ValueError(
                f"cell_names holds {len(self.cell_names)} names and batch_code {len(self)} cells: they must be the "
                "same, or cell_names is left out."
            )
        for name, measurement in self.extra.items():
            if any(len(part) != len(self) for part in measurement):
                raise ValueError(
                    f"extra[{name!r}] holds {len(measurement.values)} and {len(measurement.measured)} cells and "
                    f"batch_code {len(self)}: they must be the same."
                )

    def _check_counts(self, modality: Modality) -> None:
        name, part, width = modality.counts, modality.counts_in(self), modality.n_features_in(self)
        measured = modality.measured_in(self)
        if part is not None and part.shape[1] != width:
            raise ValueError(
                f"{name} has {part.shape[1]} columns and n_{modality.features} is {width}: they must be the same."
            )
        if part is None and bool(measured.any()):
            raise ValueError(f"{name} is None, yet {int(measured.sum())} cells are marked as measured for it.")
        if part is not None and bool((surplus := (part.crow.diff() > 0) & ~measured).any()):
            raise ValueError(
                f"{name} holds counts of {int(surplus.sum())} cells that are marked as not measured for it, the "
                f"first at position {int(surplus.int().argmax())}: empty these rows, or correct the mark."
            )

    def __len__(self) -> int:
        return len(self.batch_code)

    def has_all(self, extra: Iterable[str] = ()) -> Tensor:
        """Whether each cell has every modality that has features, and these extra ones, (n,), bool."""
        parts = [modality.measured_in(self) for modality in modelled(self)]
        return torch.stack(parts + [self.extra[name].measured for name in extra if name in self.extra]).all(0)

    @property
    def on_disk(self) -> bool:
        """Whether counts are read from disk."""
        return any(isinstance(modality.counts_in(self), StoredCounts) for modality in MODALITIES)

    def batch(self, index: Tensor, n_total: int | None = None) -> Cells:
        """The cells at ``index`` as a minibatch; the cost grows with their stored counts only.

        Parameters
        ----------
        index
            Positions in the table, shape (B,), int64, in any order.
        n_total
            Number of cells the minibatch stands for; all of the table by default. Give the
            number of training cells when only those are fitted.
        """
        counts = [cut(modality.counts_in(self), index, modality.n_features_in(self)) for modality in MODALITIES]
        return self.cells(index, n_total, counts, self.measured_rows(index))

    def difference(self, other: CellTable) -> str | None:
        """A sentence on the first difference of another table of the same cells, ``other`` being the later; or None."""
        for modality in MODALITIES:
            rows = _differing_rows(modality.counts_in(self), modality.counts_in(other), len(self))
            if len(rows):
                return self._at(f"their {modality.assay} counts are others", rows)
        for modality in MODALITIES:
            rows = (modality.measured_in(self) != modality.measured_in(other)).nonzero().squeeze(-1)
            if len(rows):
                return self._at(f"they are marked otherwise as having {modality.assay}", rows)
        parts = {"their batch or covariates are others": "design", "their labels are others": "label"}
        parts.update({f"their {each.assay} size factors are others": each.size_factor for each in MODALITIES})
        for what, name in parts.items():
            one, two = getattr(self, name), getattr(other, name)
            if (one is None) != (two is None) or (one is not None and one.shape != two.shape):
                return f"{what}."
            if one is not None and not torch.equal(one, two):
                return self._at(what, (one != two).reshape(len(self), -1).any(1).nonzero().squeeze(-1))
        for modality in MODALITIES:
            panels, others = modality.panels_in(self), modality.panels_in(other)
            if (panels is None) != (others is None) or not all(map(torch.equal, panels or (), others or ())):
                return f"other {modality.features} are marked as measured."
        for name, measurement in self.extra.items():
            # NaN stands for proteins that were not measured.
            if not all(map(_same, measurement, other.extra[name])):
                return f"{name!r} holds other values."
        if self.posterior is not None and other.posterior is not None and not _same(self.posterior, other.posterior):
            return "their stored posterior is another."
        return None

    def _at(self, what: str, rows: Tensor) -> str:
        first = self.cell_names[int(rows[0])]
        return f"{what} in {len(rows)} of {len(self)} cells, the first being {first!r}."

    def measured_rows(self, index: Tensor) -> list[Tensor]:
        """Positions in ``index`` of the cells measured in each modality, int64, in the order of ``MODALITIES``."""
        return [modality.measured_in(self)[index].nonzero().squeeze(-1) for modality in MODALITIES]

    def cells(self, index: Tensor, n_total: int | None, counts: Sequence[Tensor], rows: Sequence[Tensor]) -> Cells:
        """A minibatch of given counts, and of all else that the table holds of the cells at ``index``.

        Parameters
        ----------
        index, n_total
            As in :meth:`batch`.
        counts, rows
            Counts and positions of the measured cells, in the order of ``MODALITIES``.
        """
        parts: dict[str, Any] = {}
        for modality, values, places in zip(MODALITIES, counts, rows, strict=True):
            parts[modality.counts], parts[modality.rows] = values, places
            parts[modality.mask] = modality.measured_in(self)[index]
            parts[modality.size_factor] = _take(modality.size_factor_in(self), index)
            panels = modality.panels_in(self)
            parts[modality.panels] = None if panels is None else panels.at(index)
        return Cells(
            index=index,
            n_total=len(self) if n_total is None else n_total,
            design=self.design[index],
            label=_take(self.label, index),
            posterior=_take(self.posterior, index),
            extra={name: measurement.at(index) for name, measurement in self.extra.items()},
            **parts,
        )

    def marginals(self, counts_fragments: bool = False, shares: Mapping[Modality, Tensor] | None = None) -> Marginals:
        """Statistics over the measured cells; arguments as in :meth:`Marginals.of`."""
        return Marginals.of(self.blocks(), self.n_batch, counts_fragments, shares)

    def blocks(self) -> Iterator[Cells]:
        """All cells, some at a time."""
        return (self.batch(part) for part in torch.arange(len(self)).split(_BLOCK) if len(part))


def cut(
    counts: SparseCounts | StoredCounts | RowSlices | None, index: Tensor, width: int, total: int | None = None
) -> SparseCounts:
    """Rows of the cells at ``index``, floating; empty ones for a modality that no cell has.

    With ``total``, the number of entries in these rows, the host does not wait for the device.
    """
    if counts is None:
        crow = torch.zeros(len(index) + 1, dtype=torch.int32, device=index.device)
        return SparseCounts(crow, crow[:0], torch.zeros(0, device=index.device), (len(index), width))
    if total is None or not isinstance(counts, SparseCounts):
        rows = counts.select_rows(index)
    else:
        rows = counts.gather_rows(index, total)
    return rows if rows.val.is_floating_point() else rows.to(torch.float32)


def _differing_rows(
    one: SparseCounts | StoredCounts | None, other: SparseCounts | StoredCounts | None, n: int
) -> Tensor:
    """Rows in which counts differ, int64; all of them where one is absent."""
    if one is None or other is None:
        return torch.arange(0 if one is other else n)
    if isinstance(one, StoredCounts) and isinstance(other, StoredCounts):
        return (one.hashes != other.hashes).nonzero().squeeze(-1)
    if isinstance(one, StoredCounts) or isinstance(other, StoredCounts):
        # The file was closed, or is open for writing now.
        parts = [part for part in torch.arange(n).split(_BLOCK) if len(part)]
        pairs = ((one.select_rows(part), other.select_rows(part)) for part in parts)
        return torch.cat([part[_differing_rows(*pair, len(part))] for part, pair in zip(parts, pairs, strict=True)])
    if torch.equal(one.crow, other.crow):
        wrong = (one.col != other.col) | (one.val != other.val)
        return torch.repeat_interleave(torch.arange(n), one.crow.diff())[wrong].unique()
    sizes = one.crow.diff() != other.crow.diff()
    return sizes.nonzero().squeeze(-1)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


def _take(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]
