"""History of training."""

from __future__ import annotations

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
