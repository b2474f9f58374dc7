"""Statistics of observed and of replicated counts, summed up cell by cell; no replicate is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.data.modality import RNA

Array = NDArray[np.float64]

#: Counts of a rootogram; larger ones are counted together.
LARGEST_COUNT = 20


class Grouping(NamedTuple):
    """Cells in groups: the group of each of n cells, -1 for none, and the names of the groups."""

    by: str
    code_n: NDArray[np.int64]
    names: Sequence[str]


def feature_statistics(modality: AnyModality) -> tuple[str, ...]:
    """Names of the statistics of each feature over cells."""
    return ("detection_rate",) if modality.binary else ("mean", "variance", "cv", "zero_fraction")


def cell_statistics(modality: AnyModality) -> tuple[str, ...]:
    """Names of the statistics of each cell.

    Examples
    --------
    >>> from pyro_multivi.data.modality import ATAC, RNA
    >>> cell_statistics(RNA), cell_statistics(ATAC)
    (('expression_depth', 'detected_genes'), ('accessible_regions',))
    """
    if modality.binary:
        return (f"accessible_{modality.features}",)
    return f"{modality.name}_depth", f"detected_{modality.features}"


class FeatureSums:
    """Sums over the cells of each group, (groups, S, F), from which the statistics of features follow."""

    def __init__(self, modality: AnyModality, n_groups: int, n_samples: int, n_features: int) -> None:
        self._binary = modality.binary
        self.n_cells = np.zeros(n_groups)
        # The sum of values of 0 or 1 determines the others.
        names = ("sum",) if self._binary else ("sum", "squares", "positive")
        self._sums = {name: np.zeros((n_groups, n_samples, n_features)) for name in names}

    @staticmethod
    def bytes_needed(modality: AnyModality, n_groups: int, n_samples: int, n_features: int) -> float:
        """Memory of the sums and of the statistics computed from one group at a time."""
        return 8.0 * n_groups * n_samples * n_features * (2 if modality.binary else 5)

    def add(self, group_b: NDArray[np.int64], draws: slice, values: Tensor) -> None:
        """Add some draws (S, B, F) of measured cells, with the group of each."""
        if draws.start == 0:
            self.n_cells += np.bincount(group_b, minlength=len(self.n_cells))
        member = torch.zeros(len(self.n_cells), len(group_b), dtype=torch.float64)
        member[torch.from_numpy(group_b), torch.arange(len(group_b))] = 1.0
        values = values.double()
        parts = {"sum": values}
        if not self._binary:
            parts.update(squares=values.square(), positive=(values > 0).double())
        for name, part in parts.items():
            self._sums[name][:, draws] += (member @ part).transpose(0, 1).numpy()  # (groups, S, F)

    def arrays(self) -> list[Array]:
        """All sums, which processes add up."""
        return [self.n_cells, *self._sums.values()]

    def statistics(self, group: int) -> dict[str, Array]:
        """Statistics of one group by name, (S, F); NaN where one is not defined."""
        n = self.n_cells[group]
        total = self._sums["sum"][group]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = total / n
            if self._binary:
                return {"detection_rate": mean}
            # Sums of whole numbers are exact, so that equal counts give equal variances.
            variance = (self._sums["squares"][group] - total * total / n) / (n - 1)
            return {
                "mean": mean,
                "variance": variance,
                "cv": np.sqrt(variance) / mean,
                "zero_fraction": 1 - self._sums["positive"][group] / n,
            }


class CountSums:
    """All sums over the replicated counts of one modality, or the observed ones, which are a single sample.

    Those of features are taken within the groups of each of ``groupings`` of all n cells.
    """

    def __init__(self, modality: AnyModality, groupings: Sequence[Grouping], n_samples: int, n_features: int) -> None:
        self._code_n = [grouping.code_n for grouping in groupings]
        #: Sums of features, for each grouping.
        self.features = [FeatureSums(modality, len(by.names), n_samples, n_features) for by in groupings]
        #: Statistics of cells by name, (n_samples, n).
        self.cells = {name: np.zeros((n_samples, len(self._code_n[0]))) for name in cell_statistics(modality)}
        #: Of genes: number of counts 0, 1, ... in all measured cells and features, (n_samples, LARGEST_COUNT + 2).
        self.histogram = None if modality != RNA else np.zeros((n_samples, LARGEST_COUNT + 2))

    def add(self, rows: NDArray[np.int64], draws: slice, values: Tensor) -> None:
        """Add some draws (S, B, F) of the measured cells at ``rows``."""
        values = values.cpu()
        for code_n, sums in zip(self._code_n, self.features, strict=True):
            code = code_n[rows]
            grouped = code >= 0
            part = values if grouped.all() else values[:, torch.from_numpy(grouped)]
            sums.add(code[grouped], draws, part)
        totals = [values.double().sum(-1), (values > 0).sum(-1).double()][: len(self.cells)]
        if self.histogram is not None:
            capped = values.clamp(max=LARGEST_COUNT + 1).long()
            for number, counts in zip(range(draws.start, draws.stop), capped, strict=True):
                self.histogram[number] += torch.bincount(counts.reshape(-1), minlength=LARGEST_COUNT + 2).numpy()
        for by_cell, total in zip(self.cells.values(), totals, strict=True):
            by_cell[draws, rows] = total.numpy()

    def arrays(self) -> list[Array]:
        """All sums, which processes add up; a cell is zero where another process has it."""
        found = [array for sums in self.features for array in sums.arrays()]
        return [*found, *self.cells.values(), *(() if self.histogram is None else (self.histogram,))]


def compare(observed: Array, replicated: Array, level: float) -> dict[str, Array]:
    """Compare an observed statistic with its replicates.

    Parameters
    ----------
    observed
        Observed values, (k,).
    replicated
        Replicated values, (S, k); undefined ones, NaN, are left out.
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
    n_defined, some, whole = defined.sum(0), defined.any(0), defined.all(0)
    above = (replicated > observed).sum(0) + 0.5 * (replicated == observed).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = np.where(some & np.isfinite(observed), above / n_defined, np.nan)
        mean = np.where(defined, replicated, 0.0).sum(0) / n_defined
    ends = np.full((2, len(observed)), np.nan)
    for quantile, values, columns in (
        (np.quantile, replicated, whole),
        (np.nanquantile, np.where(defined, replicated, np.nan), some & ~whole),
    ):
        if columns.any():
            ends[:, columns] = quantile(values[:, columns], [(1 - level) / 2, (1 + level) / 2], axis=0)
    lower, upper = ends
    return {"observed": observed, "replicated": mean, "lower": lower, "upper": upper, "p_value": p_value}


def compare_all(
    observed: Mapping[str, Array], replicated: Mapping[str, Array], labels: Mapping[str, Any], level: float
) -> pd.DataFrame:
    """Compare several statistics, each by :func:`compare`, in one tidy table.

    Parameters
    ----------
    observed, replicated
        Values by statistic: (1, k) or (k,), and (S, k).
    labels
        Further columns, each a scalar or one value per feature.
    """
    frames = [
        pd.DataFrame({"statistic": name, **labels, **compare(np.asarray(observed[name]).reshape(-1), values, level)})
        for name, values in replicated.items()
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def over_cells(by_cell: Mapping[str, Array], rows: NDArray[np.bool_]) -> dict[str, Array]:
    """Mean and standard deviation of statistics of cells, (S, n) each, over some of the cells; (S, 1) by name."""
    found = {}
    for statistic, values in by_cell.items():
        found[f"mean {statistic}"] = values[:, rows].mean(1, keepdims=True)
        found[f"sd {statistic}"] = values[:, rows].std(1, ddof=1, keepdims=True)
    return found
