"""Statistics of observed and of replicated counts, summed up cell by cell; no replicate is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.posterior.engine.replicates import MODALITY

Array = NDArray[np.float64]

#: Statistics of each gene over cells.
GENE_STATISTICS = ("mean", "variance", "cv", "zero_fraction")
#: Statistics of each region over cells.
REGION_STATISTICS = ("detection_rate",)
#: Statistics of each cell, by site.
CELL_STATISTICS = {"x": ("expression_depth", "detected_genes"), "y": ("accessible_regions",)}
#: Counts of a rootogram; larger ones are counted together.
LARGEST_COUNT = 20


class FeatureSums:
    """Sums over the cells of each group from which statistics of features follow.

    Parameters
    ----------
    site
        ``"x"`` or ``"y"``.
    n_groups, n_samples, n_features
        Sizes.
    """

    def __init__(self, site: str, n_groups: int, n_samples: int, n_features: int) -> None:
        self.site = site
        self.n_cells = np.zeros(n_groups)
        shape = (n_groups, n_samples, n_features)
        # Of y, 0 or 1, the sum says all.
        self._sums = {name: np.zeros(shape) for name in (("sum", "squares", "positive") if site == "x" else ("sum",))}

    @staticmethod
    def bytes_needed(site: str, n_groups: int, n_samples: int, n_features: int) -> float:
        """Of the sums and of one statistic made of them."""
        return 8.0 * n_groups * n_samples * n_features * (5 if site == "x" else 2)

    def add(self, group_b: NDArray[np.int64], draws: slice, values: Tensor) -> None:
        """Take some draws (S, B, F) of measured cells of some groups."""
        n_groups = len(self.n_cells)
        if draws.start == 0:
            self.n_cells += np.bincount(group_b, minlength=n_groups)
        member = torch.zeros(n_groups, len(group_b), dtype=torch.float64)
        member[torch.from_numpy(group_b), torch.arange(len(group_b))] = 1.0
        values = values.cpu().double()
        parts = {"sum": values}
        if self.site == "x":
            parts.update(squares=values.square(), positive=(values > 0).double())
        for name, part in parts.items():
            self._sums[name][:, draws] += (member @ part).transpose(0, 1).numpy()  # (groups, S, F)

    def statistics(self, group: int) -> dict[str, Array]:
        """(S, F) by name; NaN where a statistic is not defined."""
        n = self.n_cells[group]
        total = self._sums["sum"][group]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / n
            if self.site == "y":
                return {"detection_rate": mean}
            # Sums of whole numbers are exact, so that equal counts give equal variances.
            variance = (self._sums["squares"][group] - total * total / n) / (n - 1)
            return {
                "mean": mean,
                "variance": variance,
                "cv": np.sqrt(variance) / mean,
                "zero_fraction": 1 - self._sums["positive"][group] / n,
            }


class CellTotals:
    """Depth and detected features of each cell, (S, n) by statistic."""

    def __init__(self, site: str, n_samples: int, n_cells: int) -> None:
        self.site = site
        self.totals = {name: np.zeros((n_samples, n_cells)) for name in CELL_STATISTICS[site]}

    def add(self, rows: NDArray[np.int64], draws: slice, values: Tensor) -> None:
        """Take some draws (S, B, F) of the cells at ``rows``."""
        values = values.cpu()
        found = [values.double().sum(-1)]
        if self.site == "x":
            found.append((values > 0).sum(-1).double())
        for total, value in zip(self.totals.values(), found, strict=True):
            total[draws, rows] = value.numpy()


class CountHistogram:
    """How many counts are 0, 1, ... of all measured cells and genes, (S, LARGEST_COUNT + 2)."""

    def __init__(self, n_samples: int) -> None:
        self.frequency = np.zeros((n_samples, LARGEST_COUNT + 2))

    def add(self, draws: slice, values: Tensor) -> None:
        """Take some draws, (S, B, F)."""
        capped = values.cpu().clamp(max=LARGEST_COUNT + 1).long()
        for number, counts in zip(range(draws.start, draws.stop), capped, strict=True):
            self.frequency[number] += torch.bincount(counts.reshape(-1), minlength=LARGEST_COUNT + 2).numpy()


def compare(observed: Array, replicated: Array, level: float) -> dict[str, Array]:
    """An observed statistic beside its replicates.

    Parameters
    ----------
    observed
        (k,).
    replicated
        (S, k); undefined ones, NaN, are left out.
    level
        Probability of the interval of the replicates.

    Returns
    -------
    dict
        ``observed``, ``replicated`` (mean), ``lower``, ``upper`` and ``p_value``, each (k,): the share of
        replicates above the observed value, equal ones counted by half (mid-p). Near 0 the data are
        larger than the model expects, near 1 smaller.

    Examples
    --------
    >>> found = compare(np.array([2.0]), np.array([[1.0], [2.0], [3.0], [4.0]]), 0.5)
    >>> float(found["p_value"][0]), float(found["replicated"][0])
    (0.625, 2.5)
    """
    defined = np.isfinite(replicated)
    n_defined = defined.sum(0)
    above = (replicated > observed).sum(0) + 0.5 * (replicated == observed).sum(0)
    usable = (n_defined > 0) & np.isfinite(observed)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = np.where(usable, above / n_defined, np.nan)
        mean = np.where(defined, replicated, 0.0).sum(0) / n_defined
    lower, upper = np.full(len(observed), np.nan), np.full(len(observed), np.nan)
    some = n_defined > 0
    if some.any():
        ends = [(1 - level) / 2, (1 + level) / 2]
        whole = defined.all(0)
        lower[whole], upper[whole] = np.quantile(replicated[:, whole], ends, axis=0)
        partly = some & ~whole
        if partly.any():
            lower[partly], upper[partly] = np.nanquantile(
                np.where(defined, replicated, np.nan)[:, partly], ends, axis=0
            )
    return {"observed": observed, "replicated": mean, "lower": lower, "upper": upper, "p_value": p_value}


def compare_all(
    observed: Mapping[str, Array], replicated: Mapping[str, Array], labels: Mapping[str, Any], level: float
) -> pd.DataFrame:
    """:func:`compare` of several statistics as a tidy table.

    Parameters
    ----------
    observed, replicated
        By statistic, (1, k) or (k,), and (S, k).
    labels
        Further columns, each a scalar or one value per feature.
    """
    frames = []
    for name, values in replicated.items():
        found = compare(np.asarray(observed[name]).reshape(-1), values, level)
        frames.append(pd.DataFrame({"statistic": name, **labels, **found}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def totals_of_groups(
    observed: Mapping[str, Array], replicated: Mapping[str, Array], group_n: NDArray[np.int64], names: Sequence[str]
) -> list[tuple[str, dict[str, Array], dict[str, Array]]]:
    """Mean and standard deviation over the cells of each group of statistics of cells.

    Parameters
    ----------
    observed, replicated
        By statistic, (1, n) and (S, n).
    group_n
        Group of each cell, -1 for none.
    names
        Of the groups.

    Returns
    -------
    list
        Of each group: its name, observed (1,) and replicated (S, 1) statistics.
    """
    found = []
    for code, name in enumerate(names):
        rows = group_n == code
        if rows.sum() < 2:
            continue
        pair: list[dict[str, Array]] = []
        for values in (observed, replicated):
            both: dict[str, Array] = {}
            for statistic, by_cell in values.items():
                both[f"mean {statistic}"] = by_cell[:, rows].mean(1, keepdims=True)
                both[f"sd {statistic}"] = by_cell[:, rows].std(1, ddof=1, keepdims=True)
            pair.append(both)
        found.append((name, pair[0], pair[1]))
    return found


class UserStatistic:
    """A statistic ``f(counts) -> array`` of the user's.

    Parameters
    ----------
    name
        For messages.
    function
        Takes a csr matrix (cells, genes + regions).

    Raises
    ------
    TypeError, ValueError
        When it is called: if what it returns is no array of numbers, has more than one dimension,
        or another shape than for the observed counts.
    """

    def __init__(self, name: str, function: Callable[[Any], Any]) -> None:
        if not callable(function):
            raise TypeError(f"statistics[{name!r}] is {function!r}: give a function of counts that returns an array.")
        self.name, self._function = name, function
        self._shape: tuple[int, ...] | None = None

    def __call__(self, counts: Any) -> Array:
        """The statistic, (k,)."""
        found = self._function(counts)
        try:
            value = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"statistics[{self.name!r}] returned {type(found).__name__}: return a number or a flat array of "
                "numbers."
            ) from error
        if value.ndim > 1 or value.size == 0:
            raise ValueError(
                f"statistics[{self.name!r}] returned an array of shape {value.shape}: return a number or a flat, "
                "non-empty array (of a sparse matrix's sum, take np.asarray(...).ravel())."
            )
        if self._shape is not None and value.shape != self._shape:
            raise ValueError(
                f"statistics[{self.name!r}] returned shape {value.shape} of replicated and {self._shape} of observed "
                "counts: its shape must not depend on the counts."
            )
        self._shape = value.shape
        return value.reshape(-1)


def check_names(statistics: Any, known: Sequence[str]) -> tuple[list[str], dict[str, UserStatistic]]:
    """Built-in statistics and the user's own, from the argument ``statistics``.

    Raises
    ------
    ValueError, TypeError
        If a name is unknown, or is given to a statistic of the user's though it is taken.
    """
    if statistics is None:
        return list(known), {}
    if isinstance(statistics, Mapping):
        taken = [name for name in statistics if name in known]
        if taken:
            raise ValueError(f"statistics holds {taken[0]!r}, the name of a built-in statistic: choose another name.")
        return list(known), {str(name): UserStatistic(str(name), f) for name, f in statistics.items()}
    wanted = [statistics] if isinstance(statistics, str) else list(statistics)
    if not wanted:
        raise ValueError("statistics is empty: name at least one, or None for all.")
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"statistics holds {name!r}: choose from {', '.join(map(repr, known))}, or give functions as "
                "a mapping {'name': f}."
            )
    return wanted, {}


def names_for(sites: Sequence[str]) -> tuple[str, ...]:
    """Built-in statistics of these sites."""
    found: list[str] = []
    for site in sites:
        found += [*(GENE_STATISTICS if site == "x" else REGION_STATISTICS), *CELL_STATISTICS[site]]
    return tuple(found)


def feature_kind(site: str) -> str:
    """``"gene"`` or ``"region"``."""
    return "gene" if MODALITY[site] == "expression" else "region"
