"""Extra modalities, those besides RNA and ATAC: matrices of obsm, or other modalities of a MuData."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from pyro_multivi.data.checks import first_names, unknown_key
from pyro_multivi.data.minibatch import Measurement
from pyro_multivi.data.modality import PROTEIN
from pyro_multivi.data.setup.extra.proteins import check_protein_counts
from pyro_multivi.data.setup.options import Setup, is_lazy, is_mudata

logger = logging.getLogger("pyro_multivi")


@dataclass(frozen=True)
class ExtraSource:
    """The matrix of an extra modality, not read yet.

    Attributes
    ----------
    where
        How the user would write it.
    matrix
        (rows, F): an array, a sparse matrix or a frame.
    cells
        Names of its rows.
    names
        Names of its columns where they are kept beside it; None for a frame, which holds its own.
    rows
        Row of each cell of the data set, -1 where it has none; None if the rows are the cells.
    counts
        Whether the values have to be counts, of proteins; any of them may be NaN then.
    """

    where: str
    matrix: Any
    cells: pd.Index[Any]
    names: pd.Index[Any] | None = None
    rows: NDArray[np.intp] | None = None
    counts: bool = False

    def feature_names(self) -> tuple[str, ...]:
        """Names of the columns, "0", "1", ... where they have none."""
        if self.names is not None:
            return tuple(map(str, self.names))
        if isinstance(self.matrix, pd.DataFrame):
            return tuple(map(str, self.matrix.columns))
        return tuple(map(str, range(self.matrix.shape[1] if self.matrix.ndim == 2 else 1)))

    def read(self, wanted: tuple[str, ...], partial: bool = False) -> Measurement:
        """Values of some features of each cell of the data set; rows that are NaN as a whole were not measured.

        Neither were rows of counts that are all 0: every staining leaves some background. With ``partial``, counts may
        lack features, which are NaN then.
        """
        values = self._numbers()
        found = self._checked_names(values.shape[1])
        if wanted != found:
            take = pd.Index(found).get_indexer(pd.Index(wanted))
            absent = [name for name, place in zip(wanted, take, strict=True) if place < 0]
            if absent and not (self.counts and partial and len(absent) < len(wanted)):
                raise ValueError(
                    f"{self.where} lacks {len(absent)} of the model's {len(wanted)} features: {first_names(absent)}. "
                    f"It has {first_names(found)}. All are needed, by the same names in any order; or leave "
                    "the whole of it out: then these cells count as not measured for it."
                )
            values = np.where(take < 0, np.float32(np.nan), values[:, take])
        missing = np.isnan(values)
        measured: NDArray[np.bool_] = np.asarray(~missing.all(1))
        if self.counts:
            check_protein_counts(self.where, self.cells, values, wanted)
            measured &= (np.nan_to_num(values) > 0).any(1)
        else:
            self._check_whole(values, measured)
        values[~measured] = 0.0
        if self.rows is not None:
            measured = np.append(measured, False)[self.rows]
            values = np.vstack([values, np.zeros_like(values[:1], shape=(1, values.shape[1]))])[self.rows]
        return Measurement(torch.from_numpy(values), torch.from_numpy(measured))

    def _checked_names(self, width: int) -> tuple[str, ...]:
        """Names of the columns; an error if there are more or fewer of them, or one twice."""
        names = self.feature_names()
        if len(names) != width:
            raise ValueError(
                f"{self.where} has {width} columns and {len(names)} names were given for them: give a name for each "
                "column, in their order."
            )
        if len(set(names)) < width:
            twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
            raise ValueError(f"{self.where} has several columns of the name {first_names(twice)}: name each otherwise.")
        return names

    def _check_whole(self, values: NDArray[np.float32], measured: NDArray[np.bool_]) -> None:
        wrong: NDArray[np.bool_] = np.asarray((np.isnan(values).any(1) & measured) | np.isinf(values).any(1))
        if wrong.any():
            raise ValueError(
                f"{self.where} holds NaN or infinite values in {int(wrong.sum())} cells: "
                f"{first_names(self.cells[wrong])}. A cell that was not measured is NaN in every column, any other "
                "in none."
            )

    def _numbers(self) -> NDArray[np.float32]:
        matrix: Any = self.matrix
        if is_lazy(matrix):
            matrix = matrix.compute()
        elif hasattr(matrix, "group"):  # anndata's wrapper of a sparse matrix in a file
            matrix = matrix[:]
        if isinstance(matrix, np.ma.MaskedArray):
            raise ValueError(
                f"{self.where} is a masked array. Say what the hidden values are: NaN in every column of a cell that "
                "was not measured."
            )
        if sp.issparse(matrix):
            matrix = matrix.toarray()  # type: ignore[attr-defined,unused-ignore]
        try:
            if np.iscomplexobj(matrix):
                raise ValueError("they are complex")
            with np.errstate(over="ignore"):  # what is out of range is infinite, and refused
                if isinstance(matrix, pd.DataFrame):  # its nullable numbers have NA, which is no number to NumPy
                    matrix = matrix.to_numpy(dtype=np.float32, na_value=np.nan)
                values = np.array(matrix, dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.where} holds values that are no numbers: {error}") from None
        if values.ndim != 2:
            raise ValueError(f"{self.where} has shape {values.shape} and must have shape (cells, features).")
        return values


def extra_sources(
    data: Any,
    owner: str,
    setup: Setup,
    places_of: Callable[[Any, Any, str], tuple[NDArray[np.intp] | None, NDArray[np.intp]]],
) -> dict[str, ExtraSource]:
    """Extra modalities of an object by name, those that are there.

    Parameters
    ----------
    places_of
        Function of (mdata, modality, its name in messages): row in a modality of each cell, None if these are its
        rows; and the columns that were measured.
    """
    found = {}
    for name in setup.extra:
        place, layer, counts = setup.place_of_extra(name), setup.layer_of_extra(name), setup.holds_proteins(name)
        if is_mudata(data) and place in data.mod:
            part, where = data.mod[place], f"mdata.mod[{place!r}]"
            if layer is not None and layer not in part.layers:
                raise unknown_key("protein_layer", layer, f"{where}.layers", [each for each in part.layers if each])
            matrix, end = (part.X, ".X") if layer is None else (part.layers[layer], f".layers[{layer!r}]")
            rows, columns = places_of(data, part, where)
            names: pd.Index[Any] | None = part.var_names[columns]
            matrix = matrix if len(columns) == part.n_vars else matrix[:, columns]
            found[name] = ExtraSource(f"{where}{end}", matrix, part.obs_names, names, rows, counts)
        elif place in data.obsm:
            where, key = f"{owner}.obsm[{place!r}]", setup.protein_names_key if counts else None
            names = None if key is None or key not in data.uns else _names_in(f"{owner}.uns[{key!r}]", data.uns[key])
            found[name] = ExtraSource(where, data.obsm[place], data.obs_names, names, counts=counts)
    return found


def _names_in(where: str, names: Any) -> pd.Index[Any]:
    found = np.asarray(names)
    if found.ndim != 1:
        raise ValueError(f"{where} has shape {found.shape}: give a flat list with the name of each protein.")
    return pd.Index(found.astype(str))


def check_there(data: Any, found: Mapping[str, ExtraSource], setup: Setup) -> None:
    """Refuse an extra modality that an object which is set up does not have."""
    for name in setup.extra:
        if name in found:
            continue
        counts, of_mudata = setup.holds_proteins(name), is_mudata(data)
        argument = "protein_expression_obsm_key" if counts else "extra_obsm_keys"
        if of_mudata:
            argument = "modalities['protein_layer']" if counts else "extra_modalities"
        where, known = ("mdata.mod", data.mod) if of_mudata else ("adata.obsm", data.obsm)
        raise unknown_key(argument, setup.place_of_extra(name), where, known)


def read_extra(
    sources: Mapping[str, ExtraSource], wanted: Mapping[str, tuple[str, ...]], n_cells: int, partial: bool = False
) -> dict[str, Measurement]:
    """Wanted features of each extra modality in all cells; measured in none where the object has no such matrix."""
    found = {}
    for name, features in wanted.items():
        if name in sources:
            found[name] = sources[name].read(features, partial)
        else:
            logger.info("There is no %r: its cells count as not measured for it.", name)
            found[name] = Measurement(torch.zeros(n_cells, len(features)), torch.zeros(n_cells, dtype=torch.bool))
    return found


def stained(setup: Setup, extra: Mapping[str, Measurement]) -> NDArray[np.bool_] | None:
    """Whether a cell has proteins, (n,); None without proteins."""
    return None if setup.protein_key is None else extra[PROTEIN].measured.numpy()
