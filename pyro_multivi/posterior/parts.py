"""The groups of several comparisons, taken apart into sets of cells that each group takes whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_multivi.posterior.groups import Contrast


@dataclass(frozen=True)
class Parts:
    """Disjoint sets of cells, of which every group of some comparisons is a union.

    Each group against the rest, or against one other: then the parts are the groups. So whatever is
    computed of a part serves all comparisons, and the rest costs nothing of its own.

    Attributes
    ----------
    cells
        Positions of the cells of each part, int64, ascending.
    sides
        Of each comparison, the numbers of the parts that make up group 1 and group 2.
    """

    cells: tuple[Tensor, ...]
    sides: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, contrasts: Sequence[Contrast]) -> Parts:
        """The fewest such parts.

        Examples
        --------
        >>> a, b, c = torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2])
        >>> parts = Parts.of([Contrast(a, torch.cat([b, c])), Contrast(b, torch.cat([a, c]))])
        >>> [cells.tolist() for cells in parts.cells], parts.sides
        ([[0, 3], [1], [2]], (((0,), (1, 2)), ((1,), (0, 2))))
        """
        groups = [index.numpy() for contrast in contrasts for index in (contrast.index1, contrast.index2)]
        code = np.zeros(1 + max(int(index.max()) for index in groups), dtype=np.int64)
        for index in groups:
            member = np.zeros(len(code), dtype=np.int64)
            member[index] = 1
            # Cells stay together as long as every group has all or none of them.
            code = np.unique(2 * code + member, return_inverse=True)[1].reshape(-1)
        used = np.unique(np.concatenate(groups))
        code, first = code[used], np.unique(code[used], return_index=True)[1]
        # Numbered in the order of their first cells.
        cells = tuple(torch.from_numpy(used[code == code[place]]) for place in np.sort(first))
        number_of = {int(part[0]): number for number, part in enumerate(cells)}

        def parts_of(index: Tensor) -> tuple[int, ...]:
            inside = set(index.tolist())
            return tuple(number for cell, number in number_of.items() if cell in inside)

        return cls(cells, tuple((parts_of(one.index1), parts_of(one.index2)) for one in contrasts))
