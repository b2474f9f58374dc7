"""Arguments of a predictive check, validated, and its groups of cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyro_multivi.data.checks import check_choice, check_probability, least_draws, name_list
from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.data.setup.covariates import grouping
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.posterior.checks.statistics import Grouping, cell_statistics, feature_statistics
from pyro_multivi.posterior.engine.replicates import DEPTHS

#: The argument ``statistics``: names of built-in ones, or functions of a csr matrix by name.
Statistics = str | Sequence[str] | Mapping[str, Callable[[Any], ArrayLike]] | None


@dataclass
class CheckRequest:
    """Arguments of a predictive check; they are validated when it is made.

    Attributes
    ----------
    features
        Positions of the features to check, int64, of each modality of the model, extra ones too; None for all.
    feature_names
        Names of these features.
    statistics
        As the user gives it: names, functions by name, or None for all built-in ones.
    n_samples, level, seed
        Number of replicates, probability of their intervals, seed of the draws.
    held_out
        Whether the cells were held out of training.
    hide_modalities, hidden_depth
        Whether to hide each modality of paired cells and predict it; see
        :func:`~pyro_multivi.posterior.engine.replicates.replicate`.
    built_in
        Names of the built-in statistics to compute.
    user
        The user's own statistics, by name.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, a name is unknown, or a statistic is no function.
    """

    features: Mapping[AnyModality, Tensor | None]
    feature_names: Mapping[AnyModality, Sequence[str]]
    statistics: Statistics
    n_samples: int
    level: float
    seed: int
    held_out: bool
    hide_modalities: bool
    hidden_depth: str
    built_in: Sequence[str] = field(init=False)
    user: Mapping[str, UserStatistic] = field(init=False)

    def __post_init__(self) -> None:
        self.level = check_probability("level", self.level, 0.95)
        least = least_draws(self.level)
        if self.n_samples < least:
            raise ValueError(f"n_samples={self.n_samples} is too few for level={self.level!r}: give at least {least}.")
        check_choice("hidden_depth", self.hidden_depth, DEPTHS)
        known = [
            name for modality in self.features for name in (*feature_statistics(modality), *cell_statistics(modality))
        ]
        self.built_in, self.user = _built_in_and_user(self.statistics, known)

    @property
    def setting(self) -> str:
        """Name of the cells in the tables."""
        return "held-out cells" if self.held_out else "cells"


class UserStatistic:
    """A statistic of the user's: a function of a csr matrix (cells, genes + regions) to a number or a flat array.

    Raises
    ------
    TypeError, ValueError
        When it is called: if it returns no array of numbers, or one that has more than one dimension
        or another shape than for the observed counts.
    """

    def __init__(self, name: str, function: Callable[[Any], ArrayLike]) -> None:
        if not callable(function):
            raise TypeError(f"statistics[{name!r}] is {function!r}: give a function of counts that returns an array.")
        self.name, self._function = name, function
        self._shape: tuple[int, ...] | None = None

    def __call__(self, counts: Any) -> NDArray[np.float64]:
        """The statistic, (k,)."""
        found = self._function(counts.copy())  # which the function may change
        try:
            value = np.array(found, dtype=np.float64)
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


def batches_and_groups(
    spec: DataSpec, batch_n: NDArray[np.int64], obs: pd.DataFrame, groupby: str | Sequence[str] | None
) -> list[Grouping]:
    """Groupings of cells by batch, if there are several, and by columns of their ``obs``, if any are named.

    Raises
    ------
    ValueError
        If ``obs`` has no such column.
    """
    found = []
    if spec.n_batch > 1:
        found.append(Grouping(spec.setup.batch_key or "batch", batch_n, spec.batch_categories))
    if groupby is not None:
        column = grouping(obs, groupby)
        groups = pd.Categorical([None if pd.isna(value) else str(value) for value in column])
        if not found or column.name != found[0].by:
            found.append(Grouping(str(column.name), groups.codes.astype(np.int64), list(map(str, groups.categories))))
    return found


def _built_in_and_user(statistics: Statistics, known: Sequence[str]) -> tuple[list[str], dict[str, UserStatistic]]:
    if statistics is None:
        return list(known), {}
    if isinstance(statistics, Mapping):
        used = [name for name in statistics if name in known]
        if used:
            raise ValueError(f"statistics holds {used[0]!r}, the name of a built-in statistic: choose another name.")
        return list(known), {str(name): UserStatistic(str(name), function) for name, function in statistics.items()}
    wanted = list(name_list("statistics", statistics))
    if not wanted:
        raise ValueError("statistics is empty: name at least one, or None for all.")
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"statistics holds {name!r}: choose from {', '.join(map(repr, known))}, or give functions as "
                "a mapping {'name': f}."
            )
    return wanted, {}
