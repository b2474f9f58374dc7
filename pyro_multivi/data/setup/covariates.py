"""Observed covariates: categories, codes, standardised numbers, size factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import UnknownKeyError, first_names, name_list, nearest, shown, unwrapped
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.options import Setup, gathering

# Smallest number of full precision in float32.
_LEAST = np.finfo(np.float32).tiny
#: Standard deviation that a constant covariate is said to have: divided by it, any other value is 0 too, in single
#: precision next to nothing. What nobody has seen vary has no effect that a model could know.
CONSTANT_SD = float(np.finfo(np.float32).max)
# Smallest size factor: the likelihoods' own floor.
_LEAST_SIZE = np.float32(1e-30)


def categories(opened: Opened, argument: str, key: str | None, known: Sequence[str] = ()) -> tuple[str, ...]:
    """The distinct values of a column as strings, in the order of sorted strings; none without a column.

    Numbers that are among those ``known`` in another spelling, as 3 is "3.0", have that.
    """
    return () if key is None else tuple(sorted(set(_words(opened, argument, key, known))))


def name_of(value: Any, known: Sequence[str]) -> Any:
    """The name among those known that a number or truth value has as a word; the value itself if there is none.

    Examples
    --------
    >>> name_of(3, ("2", "3")), name_of(3, ("2.0", "3.0")), name_of(3.0, ("2", "3")), name_of(0, ("2", "3"))
    ('3', '3.0', '3', 0)
    """
    if isinstance(value, str) or not isinstance(value, (bool, float, int, np.generic)):
        return value
    words = [str(value)]
    if not isinstance(value, (bool, np.bool_)) and np.isreal(value) and float(value).is_integer():
        # A column of whole numbers that ever had gaps holds 3 as 3.0.
        words += [str(int(value)), str(float(value))]
    return next((word for word in words if word in known), value)


def batches_meant(argument: str, batches: Any, code: Callable[[Any], int]) -> tuple[int, ...] | None:
    """Codes of a batch or a list of them, by ``code``, each once; None, alone in a list too, stays None.

    Errors name ``argument``.
    """
    batches = unwrapped(batches)
    if batches is None or (isinstance(batches, (list, tuple)) and len(batches) == 1 and batches[0] is None):
        return None
    single = isinstance(batches, (str, bool)) or not isinstance(batches, Iterable)
    given = [batches] if single else list(batches)
    if not given:
        raise ValueError(f"{argument} is an empty list: name a batch, or None to leave cells in their own.")
    codes = []
    for batch in given:
        try:
            codes.append(code(batch))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{argument}={batches!r}: {error}") from error
    # A batch that is named twice, by name and by position, is one of those meant all the same.
    return tuple(dict.fromkeys(codes))


def grouping(obs: pd.DataFrame, groupby: str | Sequence[str]) -> pd.Series[Any]:
    """Groups of cells: a column of obs, or the combinations of several.

    Combinations are named by the values of all columns, such as "B cell, donor 1", in the order of the columns'
    categories. A cell without a value in one of them is in no group.

    Raises
    ------
    ValueError, TypeError
        If there is no such column, or other combinations have the same name.

    Examples
    --------
    >>> obs = pd.DataFrame({"type": ["B", "T", "B"], "donor": [2, 1, 1]})
    >>> grouping(obs, ["type", "donor"]).cat.categories.tolist()
    ['B, 1', 'B, 2', 'T, 1']
    """
    names = name_list("groupby", groupby)
    if not names:
        raise ValueError(f"groupby={groupby!r} names no column of obs: give one, or a list of several.")
    for name in names:
        if name not in obs:
            raise UnknownKeyError(f"groupby={name!r} is no column of obs. {nearest(name, obs.columns)}")
        if (obs.columns == name).sum() > 1:
            raise ValueError(f"groupby={name!r} is the name of several columns of obs: give each its own name.")
    if len(names) == 1:
        return obs[names[0]]
    columns = [obs[name].astype("category").cat.remove_unused_categories() for name in dict.fromkeys(names)]
    position_nk = np.stack([column.cat.codes.to_numpy(dtype=np.int64) for column in columns], axis=1)
    complete = (position_nk >= 0).all(1)
    combinations, code = np.unique(position_nk[complete], axis=0, return_inverse=True)
    labels = [
        ", ".join(str(column.cat.categories[place]) for column, place in zip(columns, row, strict=True))
        for row in combinations.tolist()
    ]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"groupby={list(names)}: several combinations are named {first_names(twice)}. Rename some.")
    code_n = np.full(len(obs), -1, dtype=np.int64)
    code_n[complete] = code.reshape(-1)
    return pd.Series(
        pd.Categorical.from_codes(code_n, pd.Index(labels, dtype=object)), index=obs.index, name=", ".join(names)
    )


def codes(opened: Opened, argument: str, key: str, known: tuple[str, ...]) -> NDArray[np.int64]:
    """Position of each cell's category among those known, shape (n,); every cell has to have one."""
    words = _words(opened, argument, key, known)
    code = pd.Index(known, dtype=object).get_indexer(pd.Index(words))
    unseen = code < 0
    if unseen.any():
        first = words[int(np.argmax(unseen))]
        others = sorted(set(words[unseen]))
        # A query may bring other batches and covariates, but not other labels.
        grows = argument != "labels_key"
        mend = " MULTIVI.load_query_data(adata, model) makes a model for cells of others." if grows else ""
        raise ValueError(
            f"{argument}={key!r} holds {first_names(others)} ({int(unseen.sum())} cells), which the model "
            f"has not seen. {nearest(first, known)}{mend}"
        )
    return code.astype(np.int64)


def numbers(opened: Opened, argument: str, key: str) -> NDArray[np.float64]:
    """A numeric column of finite values, shape (n,)."""
    values = _numeric(opened, argument, key)
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise ValueError(
            f"{argument}={key!r} holds NaN or infinite values for {int(wrong.sum())} cells: "
            f"{first_names(opened.cells[wrong])}. Fill them, or drop the cells."
            f"{gathering(argument, key, opened.tables, opened.cells)}"
        )
    return values


def mean_and_sd(argument: str, key: str, values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean and standard deviation by which a covariate is standardised, of a constant :data:`CONSTANT_SD`.

    Raises
    ------
    ValueError
        If the standardised values would not be told apart, or not be finite, in single precision.
    """
    spread = float(np.ptp(values))
    # A constant column becomes 0 rather than 0 / 0, or rounding error over rounding error.
    if spread <= 4 * np.finfo(np.float64).eps * float(np.abs(values).max()):
        return float(values.mean()), CONSTANT_SD
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        mean, sd = float(values.mean()), float(values.std())
        kept = standardised(values, mean, sd)
    if not np.isfinite(sd) or sd < _LEAST or not np.isfinite(kept).all():
        raise ValueError(
            f"{argument}={key!r} has values from {values.min():g} to {values.max():g}, which cannot be standardised "
            "in single precision (float32). Give it in another unit, or correct the extreme values."
        )
    if 2 * len(np.unique(kept)) < len(np.unique(values)):
        far = int(np.argmax(np.abs(kept)))
        raise ValueError(
            f"{argument}={key!r}: beside the value {values[far]:g} the others differ too little to be told apart in "
            "single precision (float32). Correct the extreme values, or give the covariate on a log scale."
        )
    return mean, sd


def scales(opened: Opened, keys: Sequence[str]) -> dict[str, Any]:
    """Means and standard deviations of continuous covariates, by the names that a specification gives them."""
    argument = "continuous_covariate_keys"
    found = [mean_and_sd(argument, key, numbers(opened, argument, key)) for key in keys]
    return {
        "continuous_mean": tuple(mean for mean, _ in found),
        "continuous_sd": tuple(sd for _, sd in found),
    }


def one_hot(code: NDArray[np.int64], width: int) -> NDArray[np.float32]:
    """Codes as rows with a single 1, shape (n, width)."""
    return (code[:, None] == np.arange(width)).astype(np.float32)


def standardised(values: NDArray[np.float64], mean: float, sd: float) -> NDArray[np.float32]:
    """A covariate as it enters the design."""
    return ((values - mean) / sd).astype(np.float32)


def design(opened: Opened, spec: Any, batch_code: NDArray[np.int64]) -> Tensor:
    """One-hot batch, one-hot categorical and standardised continuous covariates, shape (n, S)."""
    parts = [one_hot(batch_code, spec.n_batch)]
    for key, known in spec.categorical.items():
        parts.append(one_hot(codes(opened, "categorical_covariate_keys", key, known), len(known)))
    for key, mean, sd in zip(spec.continuous, spec.continuous_mean, spec.continuous_sd, strict=True):
        values = numbers(opened, "continuous_covariate_keys", key)
        with np.errstate(over="ignore"):
            kept = standardised(values, mean, sd)
        if not np.isfinite(kept).all():
            worst = values[int(np.argmax(~np.isfinite(kept)))]
            raise ValueError(
                f"continuous_covariate_keys={key!r} holds {worst:g}, which is out of the range of single precision "
                f"(float32) beside the mean {mean:g} and sd {sd:g} of the model's data. Correct it."
            )
        parts.append(kept[:, None])
    return torch.from_numpy(np.concatenate(parts, axis=1))


def covariate_columns(spec: Any) -> dict[str, slice]:
    """Columns of :func:`design` of each covariate beside the batch, by name."""
    widths = [*((key, len(known)) for key, known in spec.categorical.items()), *((key, 1) for key in spec.continuous)]
    ends = np.cumsum([spec.n_batch, *(width for _, width in widths)]).tolist()
    return {key: slice(end, end + width) for (key, width), end in zip(widths, ends, strict=False)}


def size_factors(
    opened: Opened,
    setup: Setup,
    measured: Mapping[Modality, NDArray[np.bool_]],
    typical: Mapping[str, float],
) -> dict[Modality, NDArray[np.float64]]:
    """Fixed size factors, shape (n,), of the modalities for which a column is given.

    They are above 0, and those of a binary modality below 1: a share of what is open rather than a depth.

    A cell without the modality may have NaN there, and a data set without it may lack the column; such
    cells get the ``typical`` one of the modality's name, at which what they lack is predicted. Specifications of
    earlier versions have none: then it is 1, or 0.5 of a binary modality.
    """
    keys = zip(MODALITIES, setup.size_factor_keys, strict=True)
    return {each: _sizes(opened, each, key, measured[each], typical) for each, key in keys if key is not None}


def typical_sizes(opened: Opened, setup: Setup, measured: Mapping[Modality, NDArray[np.bool_]]) -> dict[str, float]:
    """Median of the size factors of the cells with a modality, by its name, of those that have a column and cells."""
    found = size_factors(opened, setup, measured, {})
    return {each.name: float(np.median(sizes[measured[each]])) for each, sizes in found.items() if measured[each].any()}


def _sizes(
    opened: Opened, modality: Modality, key: str, measured: NDArray[np.bool_], typical: Mapping[str, float]
) -> NDArray[np.float64]:
    filled = np.full(len(measured), typical.get(modality.name, 0.5 if modality.binary else 1.0))
    if not measured.any() and not opened.has_column("size_factor_key", key):
        return filled
    values = _numeric(opened, "size_factor_key", key)
    # NaN compares false, so that a measured cell without a value is caught too.
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)  # as the model reads them
    wrong = measured & ~((single >= _LEAST_SIZE) & (single < (1.0 if modality.binary else np.inf)))
    if wrong.any():
        at = int(np.argmax(wrong))
        allowed = "above 0 and below 1" if modality.binary else "above 0 and finite"
        if 0 < values[at] < (1.0 if modality.binary else np.inf):
            allowed += " also in single precision (float32)"
        raise ValueError(
            f"size_factor_key: the {modality.assay} size factors {key!r} must be {allowed} for every cell with "
            f"{modality.assay}; {int(wrong.sum())} cells have others, for instance {values[at]!s} for cell "
            f"{str(opened.cells[at])!r}."
        )
    filled[measured] = values[measured]
    return filled


def _words(opened: Opened, argument: str, key: str, known: Sequence[str] = ()) -> NDArray[np.object_]:
    column = opened.column(argument, key)
    missing = column.isna().to_numpy()
    if missing.any():
        raise ValueError(
            f"{argument}={key!r} has no value for {int(missing.sum())} cells: "
            f"{first_names(opened.cells[missing])}. Give each a category, or drop the cells."
            f"{gathering(argument, key, opened.tables, opened.cells)}"
        )
    _refuse_alike(column, argument, key, opened.place_of(argument))
    words = column.astype(str)
    if known and not set(words) <= set(known):
        others = {word: name_of(value, known) for word, value in zip(words, column, strict=True)}
        words = words.replace({word: name for word, name in others.items() if isinstance(name, str) and word != name})
    return words.to_numpy(dtype=object)


def _refuse_alike(column: pd.Series[Any], argument: str, key: str, where: str) -> None:
    """Refuse a text beside a number of the same spelling.

    Categories go by their spelling: a donor 1 of one study and a donor "1" of another would be one, unnoticed.
    """
    values = column.cat.remove_unused_categories().cat.categories if hasattr(column, "cat") else column
    if values.dtype != object:
        return
    texts = {value for value in values if isinstance(value, str)}
    both = sorted(texts & {str(value) for value in values if not isinstance(value, str)})
    if both:
        raise ValueError(
            f"{argument}={key!r} holds {first_names(both)} both as a text and as a number, or another value, which "
            "would be one category. Rename one if they are different; if they are the same, make all of them texts: "
            f"{where}[{key!r}] = {where}[{key!r}].astype(str)."
        )


def _numeric(opened: Opened, argument: str, key: str) -> NDArray[np.float64]:
    column: pd.Series[Any] = opened.column(argument, key)
    if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_complex_dtype(column.dtype):
        present = column.dropna()
        if len(present) and pd.to_numeric(present.astype(str), errors="coerce").notna().all():
            where = opened.place_of(argument)
            mend = f" Convert these numbers: {where}[{key!r}] = {where}[{key!r}].astype(float)."
        else:
            covariate = argument == "continuous_covariate_keys"
            mend = " Categories belong into categorical_covariate_keys." if covariate else ""
        raise ValueError(
            f"{argument}={key!r} must be numeric and is of type {column.dtype}, with values like "
            f"{first_names(dict.fromkeys(map(str, column)))}.{mend}"
        )
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def size_factor_keys(value: str | Sequence[str | None] | None) -> tuple[str | None, str | None]:
    """Columns of the size factors of RNA and of ATAC that an argument names, either None."""
    found = unwrapped(value)
    several = isinstance(found, Iterable) and not isinstance(found, (str, bytes, set))
    keys: list[Any] = list(found) if several else [found]
    if not 1 <= len(keys) <= len(MODALITIES) or not all(key is None or isinstance(key, str) for key in keys):
        raise ValueError(
            f"size_factor_key={shown(value)} must be the column of RNA size factors, or a list of that and the "
            f"column of ATAC size factors, [rna_column, atac_column]."
        )
    return keys[0], keys[1] if len(keys) == 2 else None
