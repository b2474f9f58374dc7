"""History of training."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class History:
    """One row of values per epoch, each a loss in nats per cell unless its name says otherwise.

    Examples
    --------
    >>> history = History()
    >>> history.add({"elbo_train": 3.0})
    >>> history.add({"elbo_train": 2.0})
    >>> history["elbo_train"], history.n_epochs
    ([3.0, 2.0], 2)
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    #: A line on the latest call of training: why it ended, the weights it left, where the time went.
    ending: str = ""
    #: Whether Ctrl-C ended that call, or left out a part of the calibration after it.
    interrupted: bool = False

    def add(self, row: dict[str, float]) -> None:
        """Append the values of an epoch."""
        self.rows.append(row)

    @property
    def n_epochs(self) -> int:
        """Number of epochs recorded."""
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        """Names of everything recorded, in order of first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __getitem__(self, name: str) -> list[float]:
        if name not in self.names:
            raise KeyError(f"{name!r} is not in the history; recorded are {', '.join(self.names) or 'no epochs yet'}")
        return [row.get(name, float("nan")) for row in self.rows]


class Stopwatch:
    """Seconds by what they went into.

    Examples
    --------
    >>> watch = Stopwatch()
    >>> watch.lap("steps")
    >>> watch.seconds.update(steps=80.0, validation=20.0)
    >>> str(watch)
    '1 min 40 s (steps 80 %, validation 20 %)'
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._latest = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the latest call to a name."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._latest
        self._latest = now

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        shares = {name: round(100 * part / max(total, 1e-9)) for name, part in self.seconds.items()}
        listed = ", ".join(f"{name} {share} %" for name, share in sorted(shares.items(), key=lambda i: -i[1]) if share)
        minutes, seconds = divmod(total, 60)
        spent = f"{minutes:.0f} min {seconds:.0f} s" if total >= 60 else f"{seconds:.1f} s"
        return f"{spent} ({listed})"
