"""Split of the cells into those trained on and those held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Positions of training and validation cells, each ascending, int64."""

    train: Tensor
    validation: Tensor

    @classmethod
    def of(cls, n: int, train_size: float | None, validation_size: float | None, shuffle: bool, seed: int) -> Split:
        """Divide n cells.

        Parameters
        ----------
        n
            Number of cells.
        train_size
            Share of training cells; default 0.9, or what ``validation_size`` leaves.
        validation_size
            Share of validation cells; default: the rest.
        shuffle
            At random, or the first cells for training.
        seed
            Of the random choice.

        Raises
        ------
        ValueError
            If a share is out of range, they exceed 1 together, or no training cell is left.

        Examples
        --------
        >>> split = Split.of(10, None, None, shuffle=True, seed=0)
        >>> len(split.train), len(split.validation)
        (9, 1)
        """
        if validation_size is not None and not 0 <= validation_size < 1:
            raise ValueError(
                f"validation_size={validation_size} is not allowed: give a share of at least 0 and below 1."
            )
        if train_size is None:
            train_size = 0.9 if validation_size is None else 1.0 - validation_size
        if not 0 < train_size <= 1:
            raise ValueError(f"train_size={train_size} is not allowed: give a share above 0 and at most 1.")
        rest = 1.0 - train_size
        if validation_size is None:
            validation_size = rest
        # With a small tolerance: 1 - 0.9 is not 0.1 in floating point.
        if validation_size > rest + 1e-9:
            raise ValueError(
                f"validation_size={validation_size} is not allowed with train_size={train_size}: "
                "both are shares of the cells and may not exceed 1 together."
            )
        n_train = int(np.ceil(train_size * n - 1e-9))
        n_validation = min(int(np.floor(validation_size * n + 1e-9)), n - n_train)
        if n_train < 1:
            raise ValueError(f"There are {n} cells: at least one is needed for training.")
        order = np.random.default_rng(seed).permutation(n) if shuffle else np.arange(n)
        chosen = (order[:n_train], order[n_train : n_train + n_validation])
        return cls(*(torch.from_numpy(np.sort(part).astype(np.int64)) for part in chosen))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"train": self.train.tolist(), "validation": self.validation.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Split:
        """From :meth:`to_dict`."""
        return cls(*(torch.tensor(values[name], dtype=torch.long) for name in ("train", "validation")))
