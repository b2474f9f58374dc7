"""What a model knows of its data: names, categories, and how to find them in an object."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import nearest, unknown_key
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.setup.adapter import Opened, open_data
from pyro_multivi.data.setup.counts import Survey, read, survey
from pyro_multivi.data.setup.covariates import categories, codes, numbers, size_factors
from pyro_multivi.data.setup.modalities import Measured, find_measured
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable

logger = logging.getLogger("pyro_multivi")

#: Name of the only batch of data without ``batch_key``.
SINGLE_BATCH = "all"


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
        Those means and (population) standard deviations; the sd of a constant is 1.
    label_categories
        Sorted as strings; empty without ``labels_key``.
    n_cells
        Number of cells that are "paired", have "expression" only, "accessibility" only.
    extra
        Names of the features of each further measurement.

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

    @classmethod
    def of(cls, data: Any) -> DataSpec:
        """The specification of an AnnData or MuData that was set up, made anew from what it holds now.

        Raises
        ------
        ValueError
            If it was not set up, or no longer holds what setup was told.
        """
        return describe(data, Setup.of(data)).spec

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
    def n_cats_per_cov(self) -> tuple[int, ...]:
        """Number of categories of each categorical covariate."""
        return tuple(len(known) for known in self.categorical.values())

    @property
    def n_continuous(self) -> int:
        """Number of continuous covariates."""
        return len(self.continuous)

    @property
    def n_labels(self) -> int:
        """Number of labels, 0 without ``labels_key``."""
        return len(self.label_categories)

    @property
    def design_width(self) -> int:
        """Width S of the design: batches, categories of every covariate, continuous covariates."""
        return self.n_batch + sum(self.n_cats_per_cov) + self.n_continuous

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        values["setup"] = self.setup.to_dict()
        for name in ("categorical", "extra"):
            values[name] = {key: list(known) for key, known in getattr(self, name).items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataSpec:
        """The inverse of :meth:`to_dict`, also after JSON."""
        read: dict[str, Any] = {}
        for entry in fields(cls):
            value = values[entry.name]
            read[entry.name] = tuple(value) if isinstance(value, list) else value
        read["setup"] = Setup.from_dict(values["setup"])
        for name in ("categorical", "extra"):
            read[name] = {key: tuple(known) for key, known in read[name].items()}
        return cls(**read)

    def batch_code(self, batch: str | int) -> int:
        """Position of a batch among ``batch_categories``, by its name or as that position itself.

        Raises
        ------
        ValueError
            If there is no such batch, or a number could be meant as a name or as a position.
        """
        if isinstance(batch, str):
            if batch not in self.batch_categories:
                raise ValueError(f"Batch {batch!r} is not known. {nearest(batch, self.batch_categories)}")
            return self.batch_categories.index(batch)
        if isinstance(batch, bool) or not isinstance(batch, (int, np.integer)):
            raise TypeError(f"A batch is a name or a position, got {batch!r}.")
        code = int(batch)
        if str(code) in self.batch_categories and self.batch_categories.index(str(code)) != code:
            raise ValueError(
                f"Batch {code} is ambiguous: a batch is named {str(code)!r}, and position {code} is another. "
                f"Give the name as a string: {str(code)!r}."
            )
        if not 0 <= code < self.n_batch:
            raise ValueError(
                f"Batch {code} is not known: positions go from 0 to {self.n_batch - 1}. "
                f"{nearest(code, self.batch_categories)}"
            )
        return code

    def batch_codes(self, argument: str, batches: Any) -> tuple[int, ...] | None:
        """Codes of one batch or several, by name or position; None stays None.

        Parameters
        ----------
        argument
            Name of the argument, for messages.
        batches
            A name, a position, or a list of these.

        Raises
        ------
        ValueError, TypeError
            If a batch is not known, or is neither a name nor a position.
        """
        if batches is None:
            return None
        single = isinstance(batches, (str, bool)) or not isinstance(batches, Iterable)
        given = [batches] if single else list(batches)
        if not given:
            raise ValueError(f"{argument} is an empty list: name a batch, or None to leave cells in their own.")
        codes = []
        for batch in given:
            try:
                codes.append(self.batch_code(batch))
            except (ValueError, TypeError) as error:
                raise type(error)(f"{argument}={batches!r}: {error}") from error
        return tuple(codes)

    def cell_names(self, data: Any) -> pd.Index[Any]:
        """Names of the cells of an object, in the row order of its table."""
        return open_data(data, self.setup).cells

    def table(self, data: Any, batch_missing_ok: bool = False) -> CellTable:
        """The data as tensors, in the order of the model's features.

        Parameters
        ----------
        data
            The object that was set up, or any other with the same columns of obs; it need not have been
            set up itself. Features are matched by name: their order does not matter, others are ignored,
            and where an object has no genes at all (or no regions) its cells count as not measured for it.
            Without the ``modality_key`` column, a modality counts as measured where a cell has counts.
        batch_missing_ok
            Whether the ``batch_key`` column may be absent. Then every cell lies between the batches:
            each weighs 1 / K in its design, and its batch code is -1.

        Raises
        ------
        TypeError
            If it is neither an AnnData nor a MuData, or an AnnData without feature types for a model of a
            MuData.
        ValueError
            If some but not all features of a modality are missing, values are no counts, a column is
            missing or holds a category that the model has not seen, or a cell has nothing measured.
        """
        opened = open_data(data, self.setup).only(rna=self.n_genes > 0, atac=self.n_regions > 0)
        x = None if opened.rna is None else read(opened.rna, self.gene_names)
        y = None if opened.atac is None else read(opened.atac, self.region_names)
        measured = find_measured(opened, self.setup, _counted(x, opened), _counted(y, opened), key_needed=False)
        for note in measured.notes:
            logger.info(note)
        batch_code = self._batch_codes(opened, batch_missing_ok)
        sizes = size_factors(opened, self.setup.size_factor_keys, measured.has_rna, measured.has_atac)
        return CellTable(
            x=x,
            y=y,
            has_rna=torch.from_numpy(measured.has_rna),
            has_atac=torch.from_numpy(measured.has_atac),
            design=self._design(opened, batch_code),
            batch_code=torch.from_numpy(batch_code),
            n_genes=self.n_genes,
            n_regions=self.n_regions,
            n_batch=self.n_batch,
            label=self._labels(opened),
            rna_size=None if sizes[0] is None else torch.from_numpy(sizes[0]).float(),
            atac_size=None if sizes[1] is None else torch.from_numpy(sizes[1]).float(),
            extra={name: self._extra(opened, name) for name in self.extra},
        )

    def _extra(self, opened: Opened, name: str) -> Measurement:
        if name in opened.extra:
            return opened.extra[name].read(self.extra[name])
        logger.info("There is no %r: its cells count as not measured for it.", name)
        n = len(opened.cells)
        return Measurement(torch.zeros(n, len(self.extra[name])), torch.zeros(n, dtype=torch.bool))

    def _batch_codes(self, opened: Opened, missing_ok: bool) -> NDArray[np.int64]:
        key = self.setup.batch_key
        if key is None:
            return np.zeros(len(opened.cells), dtype=np.int64)
        if missing_ok and not opened.has_column("batch_key", key):
            return np.full(len(opened.cells), -1, dtype=np.int64)
        return codes(opened, "batch_key", key, self.batch_categories)

    def _labels(self, opened: Opened) -> Tensor | None:
        key = self.setup.labels_key
        return None if key is None else torch.from_numpy(codes(opened, "labels_key", key, self.label_categories))

    def _design(self, opened: Opened, batch_code: NDArray[np.int64]) -> Tensor:
        """One-hot batch, one-hot categorical and standardised continuous covariates, shape (n, S)."""
        batch = _one_hot(batch_code, self.n_batch)
        batch[batch_code < 0] = 1.0 / self.n_batch
        parts = [batch]
        for key, known in self.categorical.items():
            parts.append(_one_hot(codes(opened, "categorical_covariate_keys", key, known), len(known)))
        for key, mean, sd in zip(self.continuous, self.continuous_mean, self.continuous_sd, strict=True):
            values = (numbers(opened, "continuous_covariate_keys", key) - mean) / sd
            parts.append(values.astype(np.float32)[:, None])
        return torch.from_numpy(np.concatenate(parts, axis=1))


@dataclass(frozen=True)
class Description:
    """A specification, and what was seen of the data while making it."""

    spec: DataSpec
    opened: Opened
    measured: Measured
    rna: Survey | None
    atac: Survey | None
    extra: dict[str, int]


def describe(data: Any, setup: Setup) -> Description:
    """Look at the data that a setup points to: every count is checked, nothing is kept of them.

    Raises
    ------
    TypeError, ValueError
        If the data are not what setup was told, as in ``setup_anndata``.
    """
    opened = open_data(data, setup)
    n = len(opened.cells)
    rna = None if opened.rna is None else survey(opened.rna, n)
    atac = None if opened.atac is None else survey(opened.atac, n)
    none = np.zeros(n, dtype=bool)
    counted = [none if seen is None else seen.nnz > 0 for seen in (rna, atac)]
    measured = find_measured(opened, setup, counted[0], counted[1], key_needed=True)
    size_factors(opened, setup.size_factor_keys, measured.has_rna, measured.has_atac)
    for name in setup.extra:
        if name not in opened.extra:
            argument, place = ("modalities", "mod") if opened.name == "mdata" else ("obsm_keys", "obsm")
            raise unknown_key(f"extra_{argument}", name, f"{opened.name}.{place}", getattr(data, place))
    extra = {name: opened.extra[name].feature_names() for name in setup.extra}
    columns = [numbers(opened, "continuous_covariate_keys", key) for key in setup.continuous_covariate_keys]
    spec = DataSpec(
        setup=setup,
        gene_names=() if opened.rna is None else tuple(map(str, opened.rna.features)),
        region_names=() if opened.atac is None else tuple(map(str, opened.atac.features)),
        batch_categories=_categories(opened, "batch_key", setup.batch_key) or (SINGLE_BATCH,),
        categorical={
            key: categories(opened, "categorical_covariate_keys", key) for key in setup.categorical_covariate_keys
        },
        continuous=setup.continuous_covariate_keys,
        continuous_mean=tuple(float(values.mean()) for values in columns),
        # A constant column becomes 0 rather than 0 / 0, or rounding error over rounding error.
        continuous_sd=tuple(float(values.std()) if np.ptp(values) > 0 else 1.0 for values in columns),
        label_categories=_categories(opened, "labels_key", setup.labels_key),
        n_cells=measured.sizes(),
        extra=extra,
    )
    sizes = {name: int(opened.extra[name].read().measured.sum()) for name in extra}
    return Description(spec, opened, measured, rna, atac, sizes)


def _categories(opened: Opened, argument: str, key: str | None) -> tuple[str, ...]:
    return () if key is None else categories(opened, argument, key)


def _counted(counts: SparseCounts | None, opened: Opened) -> NDArray[np.bool_]:
    if counts is None:
        return np.zeros(len(opened.cells), dtype=bool)
    any_count: NDArray[np.bool_] = (counts.crow.diff() > 0).numpy()
    return any_count


def _one_hot(code: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    return (code[:, None] == np.arange(width)).astype(np.float32)
