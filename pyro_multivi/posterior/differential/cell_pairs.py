"""Draws of two groups beside each other: a random cell of one with a random cell of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.posterior.differential.effect import Change, Statistics, TestSpecification
from pyro_multivi.posterior.differential.group_draws import Key

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """Which draws of its parts stand for a group: of each cell nearly as many as of any other.

    Attributes
    ----------
    segments
        Draws of parts, one after the other; those of one batch after those of another.
    """

    segments: tuple[tuple[Key, slice], ...]

    @classmethod
    def of(cls, rng: np.random.Generator, keys: Sequence[Key], sizes: Sequence[int], strata: Sequence[slice]) -> Side:
        """Choose n draws of parts with these numbers of cells; ``strata`` are those decoded in each batch."""
        if len(keys) == 1:
            return cls(((keys[0], slice(0, strata[-1].stop)),))
        segments = []
        for stratum in strata:
            for key, number in zip(keys, _shares(rng, sizes, stratum.stop - stratum.start), strict=True):
                segments.append((key, slice(stratum.start, stratum.start + int(number))))
        return cls(tuple(segments))

    def take(self, values: Mapping[Key, Tensor]) -> Tensor:
        """The group's draws, (n, f), of the values of all parts."""
        taken = [values[key][rows] for key, rows in self.segments]
        return taken[0] if len(taken) == 1 else torch.cat(taken)


@dataclass(frozen=True)
class Pairs:
    """Pairs of draws of two groups.

    Attributes
    ----------
    first, second
        The groups.
    order
        Which draw of each group makes a pair; None pairs the i-th with the i-th.
    scale
        Factor of each feature, (k,); None for 1.
    """

    first: Side
    second: Side
    order: tuple[Tensor, Tensor] | None
    scale: Tensor | None

    def scales(self, values: Mapping[Key, Tensor]) -> tuple[Tensor, Tensor]:
        """Draws of both groups in a block, (n, f), not paired yet and without the factor."""
        return self.first.take(values), self.second.take(values)

    def change(self, block: slice, scales: tuple[Tensor, Tensor], change: Change, pseudocounts: float) -> Tensor:
        """Change from one of each pair to the other, (n, f)."""
        first, second = self._paired(scales)
        if self.scale is not None:
            first, second = first * self.scale[block], second * self.scale[block]
        return change(first, second, pseudocounts)

    def exceeding(self, scales: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """``m1``: how often the first of a pair is larger; means of both groups."""
        first, second = self._paired(scales)
        return {"mean1": scales[0].mean(0), "mean2": scales[1].mean(0), "m1": (first > second).double().mean(0)}

    def changing(self, block: slice, scales: tuple[Tensor, Tensor], question: TestSpecification) -> dict[str, Any]:
        """``m1``: how probable a change is; statistics of the change; means of both groups."""
        change = self.change(block, scales, question.change, question.pseudocounts)
        mean = change.mean(0)
        # By hand: torch's own deviation along this axis takes ten times longer on a CPU.
        variance = (change - mean).square_().sum(0) / (len(change) - 1)
        return {
            "mean1": scales[0].mean(0),
            "mean2": scales[1].mean(0),
            "m1": question.counted(change),
            "mean": mean,
            "std": variance.sqrt(),
            **question.described(change),
        }

    def _paired(self, scales: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self.order is None:
            return scales
        return scales[0][self.order[0]], scales[1][self.order[1]]


def pair_order(
    rng: np.random.Generator, n: int, n_pairs: int | None, strata: Sequence[slice] | None, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """Which draws are paired: those of one batch with one another wherever the groups share batches.

    Parameters
    ----------
    n
        Draws of each group.
    n_pairs
        Pairs drawn anew at random; None pairs each draw once.
    strata
        Which draws are decoded in each batch, if both groups are decoded in the same; else None.
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


class Collected:
    """Statistics of features that come in blocks, (k,) each by name."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.statistics: Statistics = {}

    def put(self, block: slice, found: Mapping[str, Any]) -> None:
        """Take the statistics of a block."""
        for name, values in found.items():
            if name not in self.statistics:
                self.statistics[name] = np.empty(self.n_features)
            self.statistics[name][block] = values.cpu().numpy() if isinstance(values, Tensor) else values


def _shares(rng: np.random.Generator, sizes: Sequence[int], n: int) -> Rows:
    """n split in proportion to the sizes; what is left of whole numbers falls by chance, without bias."""
    upto = np.cumsum(sizes) / np.sum(sizes) * n
    # One random shift for all: each share is one of the two whole numbers around n times its part.
    ends = np.floor(upto + rng.random())
    ends[-1] = n
    found: Rows = np.diff(np.concatenate([[0], ends])).astype(np.int64)
    return found
