"""Specification of a model's data: names and categories, and the table of an object that has them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import difference_of_names, nearest
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.modality import MODALITIES, PROTEIN, Modality, modelled
from pyro_multivi.data.setup import latest
from pyro_multivi.data.setup.adapter import Opened, open_data
from pyro_multivi.data.setup.counts import read
from pyro_multivi.data.setup.covariates import (
    batches_meant,
    categories,
    codes,
    design,
    name_of,
    scales,
    size_factors,
    typical_sizes,
)
from pyro_multivi.data.setup.extra.proteins import check_informative, missing_by_batch, without_missing
from pyro_multivi.data.setup.extra.sources import check_there, read_extra, stained
from pyro_multivi.data.setup.masks.panels import check_every_feature, measured_panels
from pyro_multivi.data.setup.modalities import Measured, as_stated, find_measured, has_counts, open_named
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.table import CellTable

logger = logging.getLogger("pyro_multivi")

#: Name of the only batch of data without ``batch_key``.
SINGLE_BATCH = "all"
#: Fields that models of earlier versions were saved without.
LATER_FIELDS = {"partial", "missing_proteins", "typical_size"}


@dataclass(frozen=True)
class DataSpec:
    """Names and categories of the data a model was made for; no data.

    Attributes
    ----------
    setup
        The arguments of the setup.
    gene_names, region_names
        Features in the order of the model; empty for a modality that was not there.
    batch_categories
        Sorted as strings; ``("all",)`` without ``batch_key``.
    categorical
        Categories of each categorical covariate, sorted as strings.
    continuous
        Names of the continuous covariates. In the design they are standardised:
        (value - mean) / sd, with the mean and sd over the cells that were set up.
    continuous_mean, continuous_sd
        Those means and (population) standard deviations; that of a constant is so large that other values are 0 too.
    label_categories
        Sorted as strings; empty without ``labels_key``.
    n_cells
        Number of cells of each measurement pattern: "paired", "expression" only, "accessibility" only.
    extra
        Names of the features of each extra modality.
    partial
        Whether an object may lack features, which then count as not measured in its cells.
    missing_proteins
        Names of the proteins that were not measured in a batch with others, by batch.
    typical_size
        Median of known size factors, by name of the modality: that of cells without it.

    Examples
    --------
    >>> spec = DataSpec(Setup("anndata"), ("g1", "g2"), ("p1",), batch_categories=("a", "b"))
    >>> spec.n_genes, spec.design_width, spec.batch_code("b")
    (2, 2, 1)
    >>> DataSpec.from_dict(spec.to_dict()) == spec
    True
    """

    setup: Setup
    gene_names: tuple[str, ...]
    region_names: tuple[str, ...]
    batch_categories: tuple[str, ...] = (SINGLE_BATCH,)
    categorical: dict[str, tuple[str, ...]] = field(default_factory=dict)
    continuous: tuple[str, ...] = ()
    continuous_mean: tuple[float, ...] = ()
    continuous_sd: tuple[float, ...] = ()
    label_categories: tuple[str, ...] = ()
    n_cells: dict[str, int] = field(default_factory=dict)
    extra: dict[str, tuple[str, ...]] = field(default_factory=dict)
    partial: bool = False
    missing_proteins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    typical_size: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Any, stated: Mapping[Modality, int | None] | None = None) -> DataSpec:
        """The specification of an AnnData or MuData that was set up, for what it holds now.

        ``stated`` has the number of features of each modality, None where all are meant.

        Raises
        ------
        ValueError
            If it was not set up, or no longer holds what the setup describes.
        """
        setup = Setup.of(data)
        opened = open_data(data, setup)
        if stated is not None:
            as_stated(opened, setup, stated)
        content = latest.checksum(opened, setup)
        found = latest.find(data, content)
        if found is not None and found.own and found.spec.setup == setup:
            return found.spec
        return _describe(data, opened, setup, content).spec

    @property
    def kind(self) -> str:
        """``"anndata"`` or ``"mudata"``."""
        return self.setup.kind

    @property
    def n_genes(self) -> int:
        """Number of genes G."""
        return len(self.gene_names)

    @property
    def n_regions(self) -> int:
        """Number of regions M."""
        return len(self.region_names)

    @property
    def n_batch(self) -> int:
        """Number of batches K, at least 1."""
        return len(self.batch_categories)

    @property
    def protein_names(self) -> tuple[str, ...]:
        """Names of the proteins that a program models."""
        return self.extra[PROTEIN] if self.setup.holds_proteins(PROTEIN) else ()

    @property
    def n_proteins(self) -> int:
        """Number of those proteins."""
        return len(self.protein_names)

    @property
    def n_labels(self) -> int:
        """Number of labels, 0 without ``labels_key``."""
        return len(self.label_categories)

    @property
    def design_width(self) -> int:
        """Width S of the design: batches, categories of every covariate, continuous covariates."""
        return self.n_batch + sum(map(len, self.categorical.values())) + len(self.continuous)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        values["setup"] = self.setup.to_dict()
        for name in ("categorical", "extra", "missing_proteins"):
            values[name] = {key: list(known) for key, known in getattr(self, name).items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSpec:
        """The inverse of :meth:`to_dict`, also after JSON."""
        names = {entry.name for entry in fields(cls)} - (LATER_FIELDS - values.keys())
        given = {name: values[name] for name in names}
        read: dict[str, Any] = {key: tuple(kept) if isinstance(kept, list) else kept for key, kept in given.items()}
        read["setup"] = Setup.from_dict(values["setup"])
        for name in {"categorical", "extra", "missing_proteins"} & read.keys():
            read[name] = {key: tuple(known) for key, known in read[name].items()}
        return cls(**read)

    def batch_code(self, batch: str | float) -> int:
        """Position of a batch among ``batch_categories``, by its name or as that position itself.

        Names may be numbers or truth values, as in the column: 3 is the batch ``"3"`` or ``"3.0"`` where there is one.

        Raises
        ------
        ValueError
            If there is no such batch.
        """
        batch = name_of(batch, self.batch_categories)
        if isinstance(batch, str):
            if batch not in self.batch_categories:
                raise ValueError(f"Batch {batch!r} is not known. {nearest(batch, self.batch_categories)}")
            return self.batch_categories.index(batch)
        if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)):
            raise TypeError(f"A batch is a name or a position, got {batch!r}.")
        code = int(batch)
        if not 0 <= code < self.n_batch:
            raise ValueError(
                f"Batch {code} is not known: positions go from 0 to {self.n_batch - 1}. "
                f"{nearest(code, self.batch_categories)}"
            )
        return code

    def batch_codes(self, argument: str, batches: Any) -> tuple[int, ...] | None:
        """Codes of a batch or a list, each once, as in :meth:`batch_code`; None is None. Errors name ``argument``."""
        return batches_meant(argument, batches, self.batch_code)

    def table(self, data: Any) -> CellTable:
        """The data as tensors, in the order of the model's features.

        Parameters
        ----------
        data
            The object that was set up, or any other with the same columns of obs; it need not have been
            set up itself. Features are matched by name: their order does not matter, others are ignored,
            and where an object has no genes at all (or no regions) its cells count as not measured for it.
            Without the ``modality_key`` column, a modality counts as measured where a cell has counts.

        Returns
        -------
        CellTable
            The one made last, if that was for the same object and the object still holds the same: leave its
            tensors as they are.

        Raises
        ------
        TypeError
            If it is neither an AnnData nor a MuData, or an AnnData without feature types for a model of a
            MuData.
        ValueError
            If some but not all features of a modality are missing (with ``partial`` or masks: all), values are no
            counts, a column is missing or holds a category that the model has not seen, or a cell has nothing measured.
        """
        opened = self._modelled(data)
        content = latest.checksum(opened, self.setup)
        found = latest.find(data, content)
        if found is not None and found.spec == self:
            return found.table
        latest.clear()
        names = {modality: modality.feature_names_in(self) for modality in MODALITIES}
        counts = read(opened.counts, names, self.partial or self.setup.feature_masks is not None)
        extra = read_extra(opened.extra, self.extra, len(opened.cells), self.partial)
        found_counts = has_counts(opened, counts)
        measured = find_measured(opened, self.setup, found_counts, key_needed=False, stained=stained(self.setup, extra))
        for note in measured.notes:
            logger.info(note)
        table = self._table(opened, counts, measured, extra)
        latest.keep(data, content, self, table, own=False)
        return table

    def open(self, data: Any) -> Opened:
        """Find counts and columns of an object; where features have no type, by the names of those of the model."""
        return open_named(data, self.setup, {modality: modality.feature_names_in(self) for modality in MODALITIES})

    def _modelled(self, data: Any) -> Opened:
        """An object without the counts of which the model has no features."""
        opened = self.open(data)
        return replace(opened, counts={each: part for each, part in opened.counts.items() if each in modelled(self)})

    def change(self, data: Any, table: CellTable, content: int | None) -> tuple[str | None, int | None]:
        """Find out whether an object still holds the cells and counts of which a table was made.

        Other columns, another order of features or another type of matrix are no change.

        Parameters
        ----------
        data, table
            The object and the table.
        content
            Checksum (:func:`~pyro_multivi.data.setup.latest.checksum`) of the object when it was as the table is. Of an
            object that has none, such as a file open for writing, the names of cells alone are compared.

        Returns
        -------
        A sentence on the first difference, None without any; and the checksum for the next time.
        """
        try:
            opened = self._modelled(data)
            now = latest.checksum(opened, self.setup)
            if now is not None and now == content:
                return None, now
            changed = difference_of_names(table.cell_names, opened.cells)
            if changed is None and now is not None:
                changed = table.difference(self.table(data))
        except (ValueError, TypeError) as error:
            return str(error), content
        return changed, content if changed else now

    def _table(
        self,
        opened: Opened,
        counts: Mapping[Modality, SparseCounts | StoredCounts],
        measured: Measured,
        extra: dict[str, Measurement],
    ) -> CellTable:
        batch_code = self.batch_codes_of(opened)
        if self.missing_proteins:
            known = self.extra[PROTEIN], batch_code, self.batch_categories
            extra = {**extra, PROTEIN: without_missing(extra[PROTEIN], *known, self.missing_proteins)}
        sizes = size_factors(opened, self.setup, measured.masks, self.typical_size)
        parts: dict[str, Any] = {**measured_panels(opened, self, counts, measured.masks)}
        for modality in MODALITIES:
            parts[modality.counts] = counts.get(modality)
            parts[modality.mask] = torch.from_numpy(measured.masks[modality])
            if modality in sizes:
                parts[modality.size_factor] = torch.from_numpy(sizes[modality]).float()
        return CellTable(
            design=design(opened, self, batch_code),
            batch_code=torch.from_numpy(batch_code),
            n_genes=self.n_genes,
            n_regions=self.n_regions,
            n_batch=self.n_batch,
            label=self._labels(opened),
            extra=extra,
            cell_names=tuple(map(str, opened.cells)),
            posterior=None if opened.posterior is None else torch.from_numpy(opened.posterior),
            **parts,
        )

    def batch_codes_of(self, opened: Opened) -> NDArray[np.int64]:
        """Code of the batch of each cell, (n,)."""
        key = self.setup.batch_key
        if key is None:
            return np.zeros(len(opened.cells), dtype=np.int64)
        return codes(opened, "batch_key", key, self.batch_categories)

    def _labels(self, opened: Opened) -> Tensor | None:
        key = self.setup.labels_key
        return None if key is None else torch.from_numpy(codes(opened, "labels_key", key, self.label_categories))


@dataclass(frozen=True)
class Description:
    """Result of one pass over an object that is set up: its specification and table, and remarks for a report."""

    spec: DataSpec
    table: CellTable
    opened: Opened
    measured: Measured


def describe(data: Any, setup: Setup, stated: Mapping[Modality, int | None] | None = None) -> Description:
    """Read and check the data that a setup describes, with ``stated`` as in :meth:`DataSpec.of`.

    The table is kept for the constructor of a model, as long as the object lives and is not changed.

    Raises
    ------
    TypeError, ValueError
        If the data are not as described, as in ``setup_anndata``.
    """
    opened = open_data(data, setup)
    if stated is not None:
        as_stated(opened, setup, stated)
    elif setup.kind == "anndata" and not setup.feature_type_key:
        # All features together are no modality of which a cell could be marked as lacking it.
        return _describe(data, opened, replace(setup, modality_key=None), None)
    return _describe(data, opened, setup, latest.checksum(opened, setup))


def _describe(data: Any, opened: Opened, setup: Setup, content: int | None) -> Description:
    latest.clear()
    names = {modality: tuple(map(str, part.features)) for modality, part in opened.counts.items()}
    counts = read(opened.counts, names)
    check_there(data, opened.extra, setup)
    extra_names = {name: opened.extra[name].feature_names() for name in setup.extra}
    extra = read_extra(opened.extra, extra_names, len(opened.cells))
    measured = find_measured(opened, setup, has_counts(opened, counts), key_needed=True, stained=stained(setup, extra))
    features: dict[str, Any] = {f"{modality.feature}_names": names.get(modality, ()) for modality in MODALITIES}
    spec = DataSpec(
        setup=setup,
        batch_categories=categories(opened, "batch_key", setup.batch_key) or (SINGLE_BATCH,),
        categorical={
            key: categories(opened, "categorical_covariate_keys", key) for key in setup.categorical_covariate_keys
        },
        continuous=setup.continuous_covariate_keys,
        label_categories=categories(opened, "labels_key", setup.labels_key),
        n_cells=measured.sizes(),
        extra=extra_names,
        typical_size=typical_sizes(opened, setup, measured.masks),
        **scales(opened, setup.continuous_covariate_keys),
        **features,
    )
    if setup.protein_key is not None:
        proteins = extra[PROTEIN], spec.extra[PROTEIN]
        check_informative(opened.extra[PROTEIN].where, *proteins)
        missing = missing_by_batch(*proteins, spec.batch_codes_of(opened), spec.batch_categories)
        spec = replace(spec, missing_proteins=missing)
    table = spec._table(opened, counts, measured, extra)
    check_every_feature(opened, names, table)
    latest.keep(data, content, spec, table, own=True)
    return Description(spec, table, opened, measured)
