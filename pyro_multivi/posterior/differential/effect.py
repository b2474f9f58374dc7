"""Effect sizes: scales of a change, the bound beyond which it counts, and statistics of its draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor

from pyro_multivi.processes.shares import Arrays, gather_arrays

Array = NDArray[np.float64]
Statistics = dict[str, Array]


@dataclass(frozen=True)
class Change:
    """Scale of an effect size, positive where the first of two values is larger.

    Attributes
    ----------
    name
        ``"log-fold"`` (log2 ratio), ``"difference"``, ``"log-odds"`` (log2 odds ratio), or of a function.
    function
        Change between two tensors (..., F); the third argument is the pseudocount that log scales add.
    least_delta
        Smallest bound that is estimated on this scale.
    """

    name: str
    function: Callable[[Tensor, Tensor, float], Tensor]
    least_delta: float = 0.1

    def __call__(self, first: Tensor, second: Tensor, pseudocounts: float) -> Tensor:
        """The change, of the shape of both."""
        return self.function(first, second, pseudocounts)

    @classmethod
    def of(cls, change_fn: str | Callable[..., Any]) -> Change:
        """Scale of a name, or of a function of arrays.

        Raises
        ------
        ValueError
            If it is neither known nor a function of two or three arguments.
        """
        if isinstance(change_fn, str) and change_fn in CHANGES:
            return CHANGES[change_fn]
        if not callable(change_fn):
            raise ValueError(
                f"change_fn={change_fn!r} is not allowed: choose one of {', '.join(map(repr, CHANGES))}, or give a "
                "function of (scale1, scale2) or (scale1, scale2, pseudocounts)."
            )
        n_arguments = _positional(change_fn)
        if n_arguments not in (2, 3):
            raise ValueError(
                f"change_fn takes {n_arguments} arguments: it must take (scale1, scale2) or "
                "(scale1, scale2, pseudocounts)."
            )

        def function(first: Tensor, second: Tensor, pseudocounts: float) -> Tensor:
            scales = (_copy(first), _copy(second))
            found = np.asarray(change_fn(*scales, pseudocounts) if n_arguments == 3 else change_fn(*scales))
            if found.shape != scales[0].shape:
                raise ValueError(
                    f"change_fn returned shape {found.shape} for scales of shape {scales[0].shape}: "
                    "it must return one number for each."
                )
            return torch.as_tensor(found, dtype=first.dtype, device=first.device)

        return cls(getattr(change_fn, "__name__", "change_fn"), function)


def _copy(values: Tensor) -> NDArray[Any]:
    """An array for a function of the user's, which may change it."""
    return values.cpu().numpy().copy()


def _log_fold(first: Tensor, second: Tensor, pseudocounts: float) -> Tensor:
    return (first + pseudocounts).log2() - (second + pseudocounts).log2()


def _difference(first: Tensor, second: Tensor, pseudocounts: float) -> Tensor:
    return first - second


def _log_odds(first: Tensor, second: Tensor, pseudocounts: float) -> Tensor:
    def log_odds(p: Tensor) -> Tensor:
        return (p + pseudocounts).log2() - (1 - p + pseudocounts).log2()

    return log_odds(first) - log_odds(second)


CHANGES = {
    change.name: change
    for change in (
        Change("log-fold", _log_fold),
        # Two percentage points: accessibility of real cells lies around five.
        Change("difference", _difference, 0.02),
        Change("log-odds", _log_odds),
    )
}


@dataclass(frozen=True)
class TestSpecification:
    """Changes that count, and the statistics of a change to report.

    Attributes
    ----------
    change
        Scale of the change.
    delta, pseudocounts
        Bound, and what log scales add.
    test_mode
        ``"two"``: P(|change| >= delta). ``"three"``: the larger of P(change >= delta) and
        P(change <= -delta).
    two_sided
        False counts only the changes upwards.
    m1_domain_fn
        In place of the bound: a function of draws of the change, (n, f), that says which count.
    levels
        Probabilities of the credible intervals.
    extremes
        Whether to report median, smallest and largest change as well.
    """

    change: Change
    delta: float
    pseudocounts: float
    test_mode: str = "three"
    two_sided: bool = True
    m1_domain_fn: Callable[[Any], Any] | None = None
    levels: tuple[float, ...] = ()
    extremes: bool = True

    def probability(self, upwards: Array, downwards: Array) -> Array:
        """Probability that there is a change, from those of either direction, (f,)."""
        if not self.two_sided:
            return upwards
        if self.test_mode == "three":
            return np.maximum(upwards, downwards)
        return np.minimum(upwards + downwards, 1.0)

    def probability_of_draws(self, change: Tensor) -> Array:
        """Probability that there is a change, as the share of its draws, (n, f), that count: (f,)."""
        if self.m1_domain_fn is None:
            n = len(change)
            upwards = (change >= self.delta).sum(0).double() / n
            downwards = (change <= -self.delta).sum(0).double() / n if self.two_sided else torch.zeros_like(upwards)
            return self.probability(upwards.cpu().numpy(), downwards.cpu().numpy())
        draws = change.cpu().numpy()
        found = self.m1_domain_fn(_copy(change))
        parts = [np.asarray(part) for part in (found if isinstance(found, tuple) else (found,))]
        if len(parts) > 2 or any(part.shape != draws.shape or part.dtype != bool for part in parts):
            returned = ", ".join(f"{part.shape} of {part.dtype}" for part in parts)
            raise ValueError(
                f"m1_domain_fn returned {returned} for draws of shape {draws.shape}: return a boolean array of that "
                "shape, or a pair of them (upwards, downwards)."
            )
        shares = [part.mean(0) for part in parts]
        return shares[0] if len(shares) == 1 else self.probability(shares[0], shares[1])

    def order_statistics(self, change: Tensor) -> Statistics:
        """Median, extremes and credible intervals of draws, (n, f)."""
        if not (self.extremes or self.levels):
            return {}
        if change.device.type == "cpu":
            # NumPy sorts several times faster than torch on a CPU, and along contiguous draws.
            ordered = np.sort(change.T.contiguous().numpy(), axis=1)
        else:
            ordered = change.T.sort(1)[0].cpu().numpy()
        found: Statistics = {}
        if self.extremes:
            n = ordered.shape[1]
            found["median"] = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
            found["min"], found["max"] = ordered[:, 0], ordered[:, -1]
        for level in self.levels:
            found[f"lower {level}"], found[f"upper {level}"] = shortest_interval(ordered, level)
        return found


class StatisticsByBlock:
    """Statistics of F features that are found block by block, by several processes in turn."""

    def __init__(self, n_features: int) -> None:
        self._n_features = n_features
        self._blocks: list[Arrays] = []

    def put(self, block: slice, found: Mapping[str, Tensor | Array]) -> None:
        """Add a block of features."""
        # Copies: a view of one sorted draw would keep all draws of the block in memory.
        arrays = {
            name: np.array(each.cpu().numpy() if isinstance(each, Tensor) else each) for name, each in found.items()
        }
        self._blocks.append({"at": np.array([block.start, block.stop]), **arrays})

    def of_all(self) -> Statistics:
        """Those of every block of every process, (F,) each by name. All processes call this together."""
        found: Statistics = {}
        for part in chain.from_iterable(gather_arrays(self._blocks)):
            start, stop = part["at"]
            for name, values in part.items():
                if name != "at":
                    found.setdefault(name, np.empty(self._n_features))[start:stop] = values
        return found


def estimated_delta(change: Array, least: float) -> float:
    """Bound between features that change and those that do not, from the mean change of each, (F,).

    Three Normals are fitted to the changes; the bound is 0.6 times the mean distance from zero of the
    lowest and the highest of them, and at least ``least``.
    """
    values = change[np.isfinite(change)]
    if len(values) < 3 or np.ptp(values) == 0:
        return least
    loc = np.quantile(values, [0.05, 0.5, 0.95])
    variance, share = np.full(3, values.var()), np.full(3, 1 / 3)
    # A component may not collapse onto one feature.
    narrowest = 1e-4 * values.var()
    for _ in range(200):
        log_part = np.log(share) - 0.5 * (np.log(variance) + (values[:, None] - loc) ** 2 / variance)
        part = softmax(log_part, axis=1)
        weight = np.maximum(part.sum(0), 1e-12)
        share, loc = weight / weight.sum(), (part * values[:, None]).sum(0) / weight
        variance = np.maximum((part * (values[:, None] - loc) ** 2).sum(0) / weight, narrowest)
    return max(least, 0.6 * float(np.mean(np.abs([loc.min(), loc.max()]))))


def shortest_interval(ordered: NDArray[Any], level: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Shortest interval that holds a share of ascending draws, (f, n): its ends, (f,) each.

    Examples
    --------
    >>> lower, upper = shortest_interval(np.array([[0.0, 1.0, 1.1, 1.2, 9.0]]), 0.5)
    >>> lower.tolist(), upper.tolist()
    ([1.0], [1.2])
    """
    n = ordered.shape[1]
    span = min(n - 1, int(np.ceil(level * n)) - 1)
    start = (ordered[:, span:] - ordered[:, : n - span]).argmin(1)
    row = np.arange(len(ordered))
    return ordered[row, start], ordered[row, start + span]


def _positional(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a compiled function without a signature: NumPy's take two arrays
        return 2
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in kinds and one.default is one.empty for one in parameters)
