"""Split of the cells into those trained on and those held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.data.checks import caution

#: Fields that hold positions.
_POSITIONS = ("train", "validation", "trained_before")
#: Fields that hold names.
NAMES = ("cell_names", "trained_elsewhere")


@dataclass(frozen=True)
class Split:
    """Cells of a data set by what training made of them.

    Attributes
    ----------
    train, validation
        Positions of training and validation cells, each ascending, int64.
    trained_before
        Positions of other cells that an earlier split trained on: they are not held out.
    cell_names
        Names of all cells, by which they are found again in other data; may be left empty.
    trained_elsewhere
        Names of cells of other data that were trained on, by which these are known when they come back.
    """

    train: Tensor
    validation: Tensor
    trained_before: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    cell_names: Sequence[str] = ()
    trained_elsewhere: Sequence[str] = ()

    @property
    def ever_trained(self) -> Tensor:
        """Positions of all cells that were trained on."""
        return torch.cat([self.train, self.trained_before])

    def trained_besides(self, cell_names: Sequence[str]) -> tuple[str, ...]:
        """Names of the cells that were trained on and are none of these."""
        own = [self.cell_names[place] for place in self.ever_trained.tolist()] if self.cell_names else []
        here = set(cell_names)
        return tuple(name for name in (*self.trained_elsewhere, *own) if name not in here)

    @classmethod
    def of(
        cls,
        n: int,
        train_size: float | None,
        validation_size: float | None,
        shuffle: bool,
        seed: int,
        previous: Split | None = None,
        cell_names: Sequence[str] = (),
    ) -> Split:
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
            At random, or the first cells for validation, those behind them for training, as scvi-tools does.
        seed
            Of the random choice.
        previous
            The split of these cells that the model was trained on so far. Cells that were trained on are never held
            out; where the choice is random, they are trained on again before any other.
        cell_names
            Names of the n cells.

        Raises
        ------
        ValueError
            If a share is out of range, they exceed 1 together, or no training cell is left.

        Warns
        -----
        UserWarning
            If fewer cells are held out than wanted, since others were trained on before.

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
        first, behind, others = np.split(np.arange(n), [n_validation, n_validation + n_train])
        order = np.random.default_rng(seed).permutation(n) if shuffle else np.concatenate([behind, first, others])
        known = np.zeros(n, dtype=bool)
        if previous is not None:
            known[previous.ever_trained.numpy()] = True
            if shuffle:
                order = np.concatenate([order[known[order]], order[~known[order]]])
        train, others = order[:n_train], order[n_train:]
        held_out = others[~known[others]][:n_validation]
        if len(held_out) < n_validation:
            caution(
                f"train_size={train_size:g} leaves out {len(others)} cells, of which {int(known[others].sum())} were "
                f"trained on before: only the other {len(held_out)} count as held out (early stopping, calibration, "
                "checks). To hold out others, make a new model.",
            )
        return cls(_ascending(train), _ascending(held_out), _ascending(others[known[others]]), cell_names)

    @classmethod
    def listed(
        cls, parts: tuple[Tensor, Tensor, Tensor], previous: Split | None = None, cell_names: Sequence[str] = ()
    ) -> Split:
        """Split by lists of the cells.

        Parameters
        ----------
        parts
            Positions of the cells of training, validation and test, together every cell once.
        previous, cell_names
            As in :meth:`of`: cells that were trained on are never held out.

        Warns
        -----
        UserWarning
            If cells of validation or test were trained on before.

        Examples
        --------
        >>> Split.listed((torch.tensor([0, 3]), torch.tensor([1]), torch.tensor([2]))).validation
        tensor([1])
        """
        train, held_out, test = (part.numpy() for part in parts)
        known = np.zeros(len(train) + len(held_out) + len(test), dtype=bool)
        if previous is not None:
            known[previous.ever_trained.numpy()] = True
        others = np.concatenate([held_out, test])
        if known[others].any():
            caution(
                f"external_indexing lists {len(held_out)} cells for validation and {len(test)} for test, of which "
                f"{int(known[held_out].sum())} and {int(known[test].sum())} were trained on before: these count as "
                "neither (early stopping, calibration, checks). To hold them out, make a new model.",
            )
        before = _ascending(others[known[others]])
        return cls(_ascending(train), _ascending(held_out[~known[held_out]]), before, cell_names)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {name: getattr(self, name).tolist() for name in _POSITIONS}
        values |= {name: list(getattr(self, name)) for name in NAMES}
        # Versions before this entry read models that do not need it.
        return values if self.trained_elsewhere else {name: values[name] for name in values if name != NAMES[1]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Split:
        """From :meth:`to_dict`; models of version 0.1 kept the first two entries only."""
        train, validation, before = (torch.tensor(values.get(name, []), dtype=torch.long) for name in _POSITIONS)
        return cls(train, validation, before, *(tuple(values.get(name, ())) for name in NAMES))

    def among(self, cell_names: Sequence[str] | None, n_cells: int = 0) -> Split | None:
        """Split of other data, its cells found by name; None if no cell of this split is known to be there.

        Parameters
        ----------
        cell_names
            Names of the cells of those data. None: they are those that were split.
        n_cells
            Number of cells that were split, for a split without names, whose positions mean nothing in data of another
            size.

        Returns
        -------
        The split. Where there are other cells besides, only those trained on are kept, as ``trained_before``, since the
        others have to be split anew.
        """
        if cell_names is None or tuple(cell_names) == tuple(self.cell_names):
            return self
        if not self.cell_names:
            return self if len(cell_names) == n_cells else None
        place = {name: position for position, name in enumerate(cell_names)}
        found = np.array([place.get(name, -1) for name in self.cell_names], dtype=np.int64)
        back = np.array([place[name] for name in self.trained_elsewhere if name in place], dtype=np.int64)
        n_found = int((found >= 0).sum())
        if n_found == 0 and not len(back):
            return None
        train, validation, before = (found[getattr(self, name).numpy()] for name in _POSITIONS)
        before = np.concatenate([before, back])
        if n_found < len(cell_names):
            train, validation, before = train[:0], train[:0], np.concatenate([train, before])
        return Split(_ascending(train), _ascending(validation), _ascending(before), tuple(cell_names))


def _ascending(positions: NDArray[np.int64]) -> Tensor:
    """Positions in order, without those that are not there (-1)."""
    return torch.from_numpy(np.sort(positions[positions >= 0]).astype(np.int64))
