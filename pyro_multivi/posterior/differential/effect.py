"""How large a change is, and how probably it exceeds a bound: statistics of draws."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Statistics = dict[str, Array]

TEST_MODES = ("two", "three")


@dataclass(frozen=True)
class Change:
    """How two scales are compared; positive where the first is larger.

    Attributes
    ----------
    name
        ``"log-fold"`` (log2 ratio), ``"difference"``, ``"log-odds"`` (log2 odds ratio), or of a function.
    function
        Of two tensors (..., F) and the pseudocount, where log-fold and log-odds add it.
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
    def of(cls, asked: Any) -> Change:
        """The change that an argument names, or wraps a function of arrays.

        Raises
        ------
        ValueError
            If it is neither known nor a function of two or three arguments.
        """
        if isinstance(asked, str) and asked in CHANGES:
            return CHANGES[asked]
        if not callable(asked):
            raise ValueError(
                f"change_fn={asked!r} is not allowed: choose one of {', '.join(map(repr, CHANGES))}, or give a "
                "function of (scale1, scale2) or (scale1, scale2, pseudocounts)."
            )
        n_arguments = _positional(asked)
        if n_arguments not in (2, 3):
            raise ValueError(
                f"change_fn takes {n_arguments} arguments: it must take (scale1, scale2) or "
                "(scale1, scale2, pseudocounts)."
            )

        def function(first: Tensor, second: Tensor, pseudocounts: float) -> Tensor:
            scales = (first.cpu().numpy(), second.cpu().numpy())
            found = np.asarray(asked(*scales, pseudocounts) if n_arguments == 3 else asked(*scales))
            if found.shape != scales[0].shape:
                raise ValueError(
                    f"change_fn returned shape {found.shape} for scales of shape {scales[0].shape}: "
                    "it must return one number for each."
                )
            return torch.as_tensor(found, dtype=first.dtype, device=first.device)

        return cls(getattr(asked, "__name__", "change_fn"), function)


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
    """What counts as a change, and what to tell of it.

    Attributes
    ----------
    change
        Scale of the comparison.
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
    in_full
        Whether to give median, smallest and largest change as well.
    """

    change: Change
    delta: float
    pseudocounts: float
    test_mode: str = "three"
    two_sided: bool = True
    m1_domain_fn: Callable[[Any], Any] | None = None
    levels: tuple[float, ...] = ()
    in_full: bool = True

    def probability(self, plus: Array, minus: Array) -> Array:
        """Probability that there is a change, from those upwards and downwards, (F,)."""
        if not self.two_sided:
            return plus
        return np.maximum(plus, minus) if self.test_mode == "three" else np.minimum(plus + minus, 1.0)

    def counted(self, change: Tensor) -> Array:
        """Share of draws, (n, f), that are a change, (f,)."""
        if self.m1_domain_fn is None:
            n = len(change)
            plus = (change >= self.delta).sum(0).double() / n
            minus = (change <= -self.delta).sum(0).double() / n if self.two_sided else torch.zeros_like(plus)
            return self.probability(plus.cpu().numpy(), minus.cpu().numpy())
        draws = change.cpu().numpy()
        found = self.m1_domain_fn(draws)
        parts = [np.asarray(part) for part in (found if isinstance(found, tuple) else (found,))]
        if len(parts) > 2 or any(part.shape != draws.shape or part.dtype != bool for part in parts):
            seen = ", ".join(f"{part.shape} of {part.dtype}" for part in parts)
            raise ValueError(
                f"m1_domain_fn returned {seen} for draws of shape {draws.shape}: return a boolean array of that "
                "shape, or a pair of them (upwards, downwards)."
            )
        shares = [part.mean(0) for part in parts]
        return shares[0] if len(shares) == 1 else self.probability(shares[0], shares[1])

    def described(self, change: Tensor) -> Statistics:
        """Median, extremes and credible intervals of draws, (n, f)."""
        if not (self.in_full or self.levels):
            return {}
        if change.device.type == "cpu":
            # NumPy sorts several times faster than torch on a CPU, and along contiguous draws.
            ordered = np.sort(change.T.contiguous().numpy(), axis=1)
        else:
            ordered = change.T.sort(1)[0].cpu().numpy()
        found: Statistics = {}
        if self.in_full:
            n = ordered.shape[1]
            found["median"] = (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
            found["min"], found["max"] = ordered[:, 0], ordered[:, -1]
        for level in self.levels:
            found[f"lower {level}"], found[f"upper {level}"] = shortest_interval(ordered, level)
        return found


def shortest_interval(ordered: NDArray[Any], level: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Ends of the shortest interval that holds a share of ascending draws, (f, n).

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
    except (TypeError, ValueError):  # a compiled function that does not tell: NumPy's take two arrays
        return 2
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(one.kind in kinds and one.default is one.empty for one in parameters)
