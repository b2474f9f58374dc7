"""Group contrasts: pairs of groups of cells to compare, and the disjoint parts that they share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from pandas.errors import UndefinedVariableError
from torch import Tensor

from pyro_multivi.data.checks import first_names, nearest, shown, unwrapped
from pyro_multivi.data.selection import select_cells
from pyro_multivi.data.setup.covariates import grouping, name_of

logger = logging.getLogger("pyro_multivi")

#: Name of the second group when it is all other labelled cells.
REST = "Rest"

# Share of the cells of a group that would have to change batch for both groups to lie alike over them, and
# probability by chance, beyond which they lie unevenly.
_UNEVEN, _BY_CHANCE = 0.1, 0.01

# Numbers that are as many as half of the cells, and more than so many, are no names of groups.
_FEW_VALUES = 10

#: One group or several: values of a column of ``obs``, matched by their text.
GroupChoice: TypeAlias = "str | float | Iterable[str | float] | NDArray[Any] | pd.Index[Any] | pd.Series[Any] | None"
#: Cells: positions, a mask, names, or a query of ``obs``.
CellChoice: TypeAlias = "ArrayLike | None"


@dataclass(frozen=True)
class Contrast:
    """Two groups of cells that share none.

    Attributes
    ----------
    index1, index2
        Positions of their cells, int64, ascending.
    group1, group2
        Names; None for groups chosen by their cells.
    """

    index1: Tensor
    index2: Tensor
    group1: str | None = None
    group2: str | None = None

    @property
    def names(self) -> tuple[str, str]:
        """Both names, or what stands for them."""
        return "group 1" if self.group1 is None else self.group1, "group 2" if self.group2 is None else self.group2

    @property
    def comparison(self) -> str:
        """Both names, as scvi-tools writes them."""
        return " vs ".join(self.names)


def resolve_contrasts(
    obs: pd.DataFrame,
    names: Sequence[str],
    groupby: str | Sequence[str] | None = None,
    group1: GroupChoice = None,
    group2: str | float | None = None,
    idx1: CellChoice = None,
    idx2: CellChoice = None,
) -> list[Contrast]:
    """Find the groups of cells that a method's arguments name.

    Parameters
    ----------
    obs
        One row per cell.
    names
        Names of the cells, in the same order.
    groupby
        Column of ``obs``, or several, whose combinations are the groups. Cells without a value are in no group and
        in no rest.
    group1
        A group or several, each compared on its own; None for every group.
    group2
        The group to compare with; None for the rest.
    idx1, idx2
        Positions, a mask, names, or a query of ``obs`` (a string); without ``idx2`` the rest.

    Raises
    ------
    ValueError
        If both ways are taken or none, a column or group is not known, or a group is empty or
        overlaps the other.

    Examples
    --------
    >>> obs = pd.DataFrame({"type": ["B", "T", "T"]}, index=["c1", "c2", "c3"])
    >>> [found.comparison for found in resolve_contrasts(obs, obs.index, "type")]
    ['B vs Rest', 'T vs Rest']
    >>> obs["donor"] = [1, 1, 2]
    >>> [found.comparison for found in resolve_contrasts(obs, obs.index, ["type", "donor"], ["T, 2"], "T, 1")]
    ['T, 2 vs T, 1']
    >>> resolve_contrasts(obs, obs.index, idx1="type == 'T'")[0].index2
    tensor([0])
    """
    if groupby is not None:
        if idx1 is not None or idx2 is not None:
            raise ValueError("groupby and idx1 or idx2 are given: choose groups by a column or by cells, not both.")
        return _by_column(obs, groupby, group1, group2)
    if group1 is not None or group2 is not None:
        raise ValueError("group1 or group2 is given without groupby: name the column of obs that holds the groups.")
    if idx1 is None:
        given = "idx2 is given without idx1" if idx2 is not None else "neither groupby nor idx1 is given"
        raise ValueError(f"{given}: say which cells to compare.")
    return [_by_cells(obs, names, idx1, idx2)]


def _by_column(
    obs: pd.DataFrame, groupby: str | Sequence[str], group1: GroupChoice, group2: str | float | None
) -> list[Contrast]:
    column, group2 = grouping(obs, groupby), unwrapped(group2)
    if isinstance(group2, Iterable) and not isinstance(group2, str):
        raise TypeError(
            f"group2={shown(group2)} is not allowed: give one group, or None for the rest. To compare with several "
            "together choose cells, such as idx1=\"type == 'A'\", idx2=\"type in ['B', 'C']\" of a column type of obs."
        )
    if isinstance(column.dtype, pd.CategoricalDtype):
        known = list(dict.fromkeys(map(str, column.cat.categories)))
    else:
        known = sorted({str(value) for value in column.dropna()})
    # None is no group; one may be called so.
    second = None if group2 is None else str(name_of(group2, known))
    labels = column.astype(object).where(column.notna(), None)
    label_n = np.array([None if value is None else str(value) for value in labels], dtype=object)
    labelled = np.array([value is not None for value in label_n])

    def cells_of(argument: str, group: str) -> NDArray[np.bool_]:
        if group not in known:
            raise ValueError(f"{argument}={group!r} is no group of obs[{groupby!r}]. {nearest(group, known)}")
        chosen = label_n == group
        if not chosen.any():
            raise ValueError(
                f"{argument}={group!r} is a category of obs[{groupby!r}] that no cell has: "
                f"choose another, or drop it by obs[{groupby!r}].cat.remove_unused_categories()."
            )
        return chosen

    if group1 is None:
        _refuse_continuous(column, groupby, len(known))
        # Categories that no cell has are no groups to go through.
        wanted = [group for group in known if (label_n == group).any() and group != second]
    else:
        wanted = _named_groups(group1, known)
    other = None if second is None else cells_of("group2", second)
    found = []
    for group in wanted:
        chosen = cells_of("group1", group)
        if group == second:
            raise ValueError(f"group1 and group2 are both {group!r}: compare two different groups.")
        against = labelled & ~chosen if other is None else other
        if not against.any():
            raise ValueError(f"group1={group!r} holds every cell of obs[{groupby!r}]: nothing is left to compare with.")
        found.append(Contrast(_positions(chosen), _positions(against), group, REST if second is None else second))
    if not found:
        raise ValueError(f"groupby={groupby!r} holds no group to compare: all its values are missing or group2.")
    return found


def _named_groups(group1: GroupChoice, known: Sequence[str]) -> list[str]:
    """Groups named by ``group1``, one or several; numbers that are among those known in another spelling by that."""
    several = isinstance(group1, Iterable) and not isinstance(group1, str)
    wanted = [str(name_of(group, known)) for group in (cast("Iterable[Any]", group1) if several else [group1])]
    if isinstance(group1, Set):
        wanted = sorted(wanted)
    if not wanted:
        raise ValueError("group1 is an empty list: name a group, or None for every group.")
    twice = sorted({group for group in wanted if wanted.count(group) > 1})
    if twice:
        raise ValueError(f"group1 holds {first_names(twice)} more than once: name each group once.")
    return wanted


def _refuse_continuous(column: pd.Series[Any], groupby: object, n_groups: int) -> None:
    """Refuse to compare each value of a continuous column with the rest."""
    if pd.api.types.is_numeric_dtype(column.dtype) and n_groups > max(_FEW_VALUES, column.notna().sum() / 2):
        raise ValueError(
            f"groupby={groupby!r} is a column of numbers with {n_groups} values, of which each would be a group. Cut "
            f"it into few groups, obs['groups'] = pandas.qcut(obs[{groupby!r}], 4).astype(str), or name some by group1."
        )


def _by_cells(obs: pd.DataFrame, names: Sequence[str], idx1: CellChoice, idx2: CellChoice) -> Contrast:
    first = _select("idx1", idx1, obs, names)
    if idx2 is None:
        rest = np.ones(len(names), dtype=bool)
        rest[first.numpy()] = False
        if not rest.any():
            raise ValueError("idx1 holds every cell: nothing is left to compare with.")
        return Contrast(first, _positions(rest))
    second = _select("idx2", idx2, obs, names)
    shared = np.intersect1d(first.numpy(), second.numpy())
    if len(shared):
        names_shared = first_names(names[place] for place in shared)
        raise ValueError(f"idx1 and idx2 share {len(shared)} cells ({names_shared}): groups must not overlap.")
    return Contrast(first, second)


def _select(argument: str, wanted: CellChoice, obs: pd.DataFrame, names: Sequence[str]) -> Tensor:
    if isinstance(wanted, str):
        try:
            # Without these, @name is looked up among the variables of this function.
            chosen = obs.index.get_indexer(obs.query(wanted, local_dict={}, global_dict={}).index)
        except Exception as error:  # pandas raises all sorts of errors for an invalid query
            if isinstance(error, UndefinedVariableError) and "local variable" in str(error):
                raise ValueError(
                    f"{argument}={wanted!r} names a variable by @, and those of your code are not known here: write "
                    "its value into the query by an f-string, such as f'n_counts > {limit}'."
                ) from error
            raise ValueError(f"{argument}={wanted!r} is no query of obs: {error}") from error
        if not len(chosen):
            raise ValueError(f"{argument}={wanted!r} selects no cell: nothing to compare.")
        return torch.from_numpy(np.unique(chosen).astype(np.int64))
    try:
        return torch.unique(select_cells(wanted, names))
    except (ValueError, IndexError, KeyError, TypeError) as error:
        message = str(error.args[0]).replace("indices", argument, 1).replace(", or None for all cells", "")
        raise ValueError(message) from error


def _positions(chosen: NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.flatnonzero(chosen).astype(np.int64))


def lie_unevenly(n_cells1: NDArray[np.int64], n_cells2: NDArray[np.int64]) -> bool:
    """Whether two groups lie unevenly over the batches, by more than a tenth and not by chance.

    Parameters
    ----------
    n_cells1, n_cells2
        Number of cells of each group in each batch.

    Examples
    --------
    >>> lie_unevenly(np.array([80, 20]), np.array([40, 60])), lie_unevenly(np.array([3, 1]), np.array([40, 60]))
    (True, False)
    """
    # Imported late: loading it takes longer than all else that this package imports.
    from scipy.stats import chi2_contingency

    n_cells = np.stack([n_cells1, n_cells2])[:, n_cells1 + n_cells2 > 0]
    if not n_cells.sum(1).all():
        return False
    share1, share2 = n_cells / n_cells.sum(1, keepdims=True)
    return bool(np.abs(share1 - share2).sum() / 2 > _UNEVEN and chi2_contingency(n_cells).pvalue < _BY_CHANCE)


def batches_of_both(contrast: Contrast, batch_code: Tensor, wanted: bool | None) -> tuple[int, ...] | None:
    """Batches in which both groups are decoded; None for each cell in its own.

    Parameters
    ----------
    batch_code
        Batch of each cell, (n,); below 0 of none.
    wanted
        Whether both are decoded in the same; None: where they lie unevenly over batches, and share some.
    """
    every = [batch_code[index][batch_code[index] >= 0] for index in (contrast.index1, contrast.index2)]
    n_cells = [torch.bincount(group, minlength=int(batch_code.max()) + 1).numpy() for group in every]
    if not _is_corrected(contrast, "batch", n_cells, wanted):
        return None
    return tuple(int(batch) for batch in torch.cat(every).unique())


def covariates_of_both(
    contrast: Contrast, design: Tensor, columns: Mapping[str, slice], wanted: bool | None
) -> tuple[tuple[int, float], ...]:
    """Columns of the design in which both groups are decoded at their common mean, and these means.

    A mean over categories is their shares: what is decoded there lies between what is decoded in each.

    Parameters
    ----------
    design
        One row for each cell, (n, S).
    columns
        Those of each covariate, by name: of a category one for each, of a number one.
    wanted
        As in :func:`batches_of_both`; numbers by quarters of the cells.
    """
    found: list[tuple[int, float]] = []
    # In one order, so that each group against the rest has the same mean to the last bit, and shares its draws.
    both = torch.cat([contrast.index1, contrast.index2]).sort().values
    for name, which in columns.items():
        groups = [design[index, which] for index in (contrast.index1, contrast.index2)]
        n_cells = [group.sum(0, dtype=torch.float64).numpy() for group in groups]
        values = design[both, which]
        if values.shape[1] == 1 and not bool((values == 1).all()):
            edges = np.unique(np.quantile(values.double().numpy(), (0.25, 0.5, 0.75)))
            quarters = [np.searchsorted(edges, group[:, 0].double().numpy()) for group in groups]
            n_cells = [np.bincount(quarter, minlength=len(edges) + 1) for quarter in quarters]
        if _is_corrected(contrast, f"value of {name!r}", n_cells, wanted):
            mean = values.double().mean(0)
            found += zip(range(which.start, which.stop), mean.tolist(), strict=True)
    return tuple(found)


def _is_corrected(contrast: Contrast, what: str, n_cells: Sequence[NDArray[Any]], wanted: bool | None) -> bool:
    """Whether both groups are decoded alike in a batch or covariate, over whose values their cells lie so."""
    if wanted is not None:
        return wanted
    if not lie_unevenly(n_cells[0], n_cells[1]):
        return False
    shared = bool((n_cells[0] * n_cells[1]).any())
    if not shared:
        logger.warning(
            "%s: the groups share no %s, so that it is unknown what of a change is due to it. Each is decoded in its "
            "own; batch_correction=True extrapolates to those of the other, by what the decoder has learned of them.",
            contrast.comparison, what,
        )  # fmt: skip
    return shared


@dataclass(frozen=True)
class Partition:
    """Disjoint parts of the cells, of which every group of some comparisons is a union.

    Each group against the rest, or against one other: then the parts are the groups. So what is
    computed of a part serves all comparisons, and the rest costs nothing of its own.

    Attributes
    ----------
    cells
        Positions of the cells of each part, int64, ascending.
    groups
        Numbers of the parts that make up group 1 and group 2 of each comparison.
    """

    cells: tuple[Tensor, ...]
    groups: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, contrasts: Sequence[Contrast], panel: Tensor | None = None) -> Partition:
        """Split the cells into the fewest such parts, each of one panel of features where there are several.

        Parameters
        ----------
        contrasts
            The comparisons.
        panel
            Panel of each cell of the data, int64.

        Examples
        --------
        >>> a, b, c = torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2])
        >>> parts = Partition.of([Contrast(a, torch.cat([b, c])), Contrast(b, torch.cat([a, c]))])
        >>> [cells.tolist() for cells in parts.cells], parts.groups
        ([[0, 3], [1], [2]], (((0,), (1, 2)), ((1,), (0, 2))))
        """
        groups = [index.numpy() for contrast in contrasts for index in (contrast.index1, contrast.index2)]
        code = np.zeros(1 + max(int(index.max()) for index in groups), dtype=np.int64)
        for index in groups:
            member = np.zeros(len(code), dtype=np.int64)
            member[index] = 1
            # Cells stay together as long as every group has all or none of them.
            code = np.unique(2 * code + member, return_inverse=True)[1].reshape(-1)
        if panel is not None:
            code = np.unique(np.stack([code, panel[: len(code)].numpy()]), axis=1, return_inverse=True)[1].reshape(-1)
        used = np.unique(np.concatenate(groups))
        code, first = code[used], np.unique(code[used], return_index=True)[1]
        # Numbered in the order of their first cells.
        cells = tuple(torch.from_numpy(used[code == code[place]]) for place in np.sort(first))
        number_of = {int(part[0]): number for number, part in enumerate(cells)}

        def parts_of(index: Tensor) -> tuple[int, ...]:
            inside = set(index.tolist())
            return tuple(number for cell, number in number_of.items() if cell in inside)

        return cls(cells, tuple((parts_of(one.index1), parts_of(one.index2)) for one in contrasts))
