"""Pairs of random cells of two groups, and statistics of the change between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.posterior.differential.effect import Change, TestSpecification
from pyro_multivi.posterior.differential.group_draws import DrawKey


@dataclass(frozen=True)
class DrawSelection:
    """Draws that stand for a group, chosen from those of its parts: of each cell nearly as many as of any other.

    Attributes
    ----------
    segments
        Draws of parts, one after the other; those of one batch after those of another.
    """

    segments: tuple[tuple[DrawKey, slice], ...]

    @classmethod
    def choose(
        cls, rng: np.random.Generator, keys: Sequence[DrawKey], sizes: Sequence[int], strata: Sequence[slice]
    ) -> DrawSelection:
        """Choose n draws of parts with these numbers of cells; ``strata`` are those decoded in each batch."""
        if len(keys) == 1:
            return cls(((keys[0], slice(0, strata[-1].stop)),))
        segments = []
        for stratum in strata:
            for key, number in zip(keys, _shares(rng, sizes, stratum.stop - stratum.start), strict=True):
                segments.append((key, slice(stratum.start, stratum.start + int(number))))
        return cls(tuple(segments))

    def take(self, values: Mapping[DrawKey, Tensor]) -> Tensor:
        """Draws of the group, (n, f), out of those of all parts."""
        taken = [values[key][rows] for key, rows in self.segments]
        return taken[0] if len(taken) == 1 else torch.cat(taken)


@dataclass(frozen=True)
class CellPairs:
    """Pairs of draws of two groups.

    Attributes
    ----------
    first, second
        Draws of the groups.
    order
        Draws of each group that make up the pairs; None pairs the i-th with the i-th.
    factor
        Factor of each feature before values are compared, (k,); None for 1.
    """

    first: DrawSelection
    second: DrawSelection
    order: tuple[Tensor, Tensor] | None
    factor: Tensor | None

    def groups(self, values: Mapping[DrawKey, Tensor]) -> tuple[Tensor, Tensor]:
        """Draws of both groups in a block of features, (n, f), not paired yet and without the factor."""
        return self.first.take(values), self.second.take(values)

    def change(self, block: slice, groups: tuple[Tensor, Tensor], change: Change, pseudocounts: float) -> Tensor:
        """Change between the cells of each pair, (n, f)."""
        first, second = self._paired(groups)
        if self.factor is not None:
            first, second = first * self.factor[block], second * self.factor[block]
        return change(first, second, pseudocounts)

    def vanilla_statistics(self, groups: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Probability that the first cell of a pair has the larger value, and means of both groups, (f,) each."""
        first, second = self._paired(groups)
        probability = (first > second).double().mean(0)
        return {"mean1": groups[0].mean(0), "mean2": groups[1].mean(0), "probability": probability}

    def change_statistics(
        self, block: slice, groups: tuple[Tensor, Tensor], specification: TestSpecification
    ) -> dict[str, Tensor | NDArray[np.float64]]:
        """Probability and statistics of a change, and means of both groups, (f,) each."""
        change = self.change(block, groups, specification.change, specification.pseudocounts)
        mean = change.mean(0)
        # By hand: torch's own deviation along this axis takes ten times longer on a CPU.
        variance = (change - mean).square_().sum(0) / (len(change) - 1)
        return {
            "mean1": groups[0].mean(0),
            "mean2": groups[1].mean(0),
            "probability": specification.probability_of_draws(change),
            "mean": mean,
            "std": variance.sqrt(),
            **specification.order_statistics(change),
        }

    def _paired(self, groups: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return groups if self.order is None else (groups[0][self.order[0]], groups[1][self.order[1]])


def pair_order(
    rng: np.random.Generator, n: int, n_pairs: int | None, strata: Sequence[slice] | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Draws of each group that make up the pairs: of the same batch wherever the groups share batches.

    Parameters
    ----------
    n
        Draws of each group.
    n_pairs
        Pairs drawn anew at random; None pairs each draw once.
    strata
        Draws that are decoded in each batch, if both groups are decoded in the same; else None.
    """
    if n_pairs is None:
        if strata is not None:
            return None
        order = (np.arange(n), rng.permutation(n))
    else:
        ranges = [slice(0, n)] if strata is None else list(strata)
        low, high = (np.array([getattr(one, end) for one in ranges]) for end in ("start", "stop"))
        stratum = rng.choice(len(ranges), n_pairs, p=(high - low) / n)
        order = (rng.integers(low[stratum], high[stratum]), rng.integers(low[stratum], high[stratum]))
    first, second = (torch.from_numpy(part).to(device) for part in order)
    return first, second


def _shares(rng: np.random.Generator, sizes: Sequence[int], n: int) -> NDArray[np.int64]:
    """Split n in proportion to the sizes; the remainders of whole numbers are assigned at random, without bias."""
    upto = np.cumsum(sizes) / np.sum(sizes) * n
    # One random shift for all: each share is one of the two whole numbers around n times its part.
    ends = np.floor(upto + rng.random())
    ends[-1] = n
    return np.diff(np.concatenate([[0], ends])).astype(np.int64)
