"""Base class of the likelihoods: shapes, masks, and the selection of measured cells."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import Independent, TorchDistribution
from pyro.distributions.util import broadcast_shape
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Tensor
from torch.distributions import constraints

from pyro_multivi.data.checks import shown
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions.kernels.blocks import Entries
from pyro_multivi.distributions.kernels.readout import Link, Readout

ParameterRows = dict[str, Any]  # a parameter's name -> its value for the evaluated cells


class _Vector(constraints.Constraint):
    """A bound on every feature of a cell. A readout with the right link satisfies it by construction."""

    event_dim = 1

    def __init__(self, bound: constraints.Constraint) -> None:
        self.bound = bound

    def check(self, value: Tensor | None) -> Tensor:
        if value is None or isinstance(value, Readout):  # left out, or bounded by its link
            return torch.ones((), dtype=torch.bool)
        return self.bound.check(value).all(-1)

    def __repr__(self) -> str:
        return f"every feature {self.bound!r}"


class CellDistribution(TorchDistribution):
    """A distribution over the whole feature vector of a cell (``event_dim=1``).

    It holds its mask instead of being wrapped, so that cells that were not measured are never
    evaluated: they contribute exactly zero, to the value and to every gradient, whatever their
    parameters hold. Sampling, ``mean`` and ``variance`` ignore the mask.
    """

    # Parameters with a trailing feature axis, and those with one number per cell.
    feature_parameters: ClassVar[tuple[str, ...]]
    cell_parameters: ClassVar[tuple[str, ...]]
    # Those that may be None.
    optional_parameters: ClassVar[tuple[str, ...]] = ()
    # Links that a readout may carry, by parameter.
    links: ClassVar[dict[str, tuple[Link, ...]]]

    _mask: Tensor | bool
    # Positions of the cells at which the mask is true, if they are known.
    _rows: Tensor | None
    # Features that count in each cell; None for all.
    _panels: Panels | None

    def __init__(self, parameters: Mapping[str, Tensor | None], validate_args: bool | None = None) -> None:
        batch_shapes: list[torch.Size] = []
        n_features = 1
        for name, value in parameters.items():
            setattr(self, name, value)
            if value is None and name in self.optional_parameters:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} of {type(self).__name__} must be a tensor, got {shown(value)}")
            if name not in self.cell_parameters and not value.dim():
                raise ValueError(f"{name} of {type(self).__name__} must have an axis of features, got one number")
            if isinstance(value, Readout) and value.link not in self.links.get(name, ()):
                raise ValueError(
                    f"{name} of {type(self).__name__} must have link "
                    f"{' or '.join(map(repr, self.links.get(name, ())))}, got a readout with {value.link!r}"
                )
            if name in self.cell_parameters:
                batch_shapes.append(value.shape)
                continue
            batch_shapes.append(value.shape[:-1])
            if n_features not in (1, value.shape[-1]) and value.shape[-1] != 1:
                raise ValueError(
                    f"{name} of {type(self).__name__} has {value.shape[-1]} features, "
                    f"where parameters before it have {n_features}"
                )
            n_features = max(n_features, value.shape[-1])
        self._mask, self._rows, self._panels = True, None, None
        batch_shape = torch.Size(broadcast_shape(*batch_shapes))
        super().__init__(batch_shape, torch.Size([n_features]), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> CellDistribution:
        """The same distribution with a larger batch shape; itself if that changes nothing."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self  # every plate calls this: no new object, and a plain type in the trace
        if torch.broadcast_shapes(shape, self.batch_shape) != shape:
            raise ValueError(f"cannot expand a batch of shape {tuple(self.batch_shape)} to {tuple(shape)}")
        new = copy.copy(self)  # parameters broadcast where they are used
        new._batch_shape = shape
        if isinstance(self._mask, Tensor):
            new._mask = self._mask.expand(shape)
        return new

    def mask(self, mask: Tensor | bool, rows: Tensor | None = None) -> CellDistribution:
        """Count only cells where ``mask`` is true.

        Parameters
        ----------
        mask
            True for cells that count, broadcastable to the batch shape.
        rows
            Positions at which a mask of shape (B,) is true, (b,), int64, ascending, if they are known. This is not
            checked, and neither is that sparse values are zero elsewhere: the host does not wait for an accelerator.
        """
        if isinstance(mask, bool):
            new = copy.copy(self)
            new._mask = self._mask if mask else False
            return new
        new = copy.copy(self.expand(broadcast_shape(mask.shape, self.batch_shape)))
        chosen = mask.bool().expand(new.batch_shape)
        new._rows = rows if self._mask is True and mask.shape == new.batch_shape[-1:] else None
        if isinstance(self._mask, Tensor):
            new._mask = new._mask & chosen
        elif self._mask:
            new._mask = chosen
        return new

    def count_panels(self, panels: Panels) -> CellDistribution:
        """Count only the features that were measured in each cell, of the last batch dimension; values have no others.

        Sampling, ``mean`` and ``variance`` are of all features.
        """
        new = copy.copy(self)
        new._panels = panels
        return new

    def blocks(self, width: int) -> Iterator[tuple[slice, CellDistribution]]:
        """The distribution of ``width`` features at a time, with dense parameters; every cell and feature counts."""
        n_features = self.event_shape[0]
        parameters = {name: getattr(self, name) for name in self.feature_parameters}
        streams = {name: value.blocks(width) for name, value in parameters.items() if isinstance(value, Readout)}
        for start in range(0, n_features, width):
            features = slice(start, min(start + width, n_features))
            new = copy.copy(self)
            new._mask, new._rows, new._panels = True, None, None
            new._event_shape = torch.Size([features.stop - start])
            for name, value in parameters.items():
                if name in streams:
                    value = next(streams[name])[1]
                elif value is not None and value.shape[-1] == n_features:
                    value = value[..., features]
                setattr(new, name, value)
            yield features, new

    def _of_features(self, features: Tensor) -> CellDistribution:
        """The distribution of some features, at positions (k,), int64, ascending."""
        new = copy.copy(self)
        new._panels = None
        new._event_shape = torch.Size([len(features)])
        for name in self.feature_parameters:
            value = getattr(self, name)
            setattr(new, name, None if value is None else _select(value, features, self.event_shape[0]))
        return new

    def _of_cells(self, cells: Tensor) -> CellDistribution:
        """The distribution of some cells of the last batch dimension, at positions (b,), int64, ascending."""
        new = copy.copy(self)
        new._rows = None
        new._batch_shape = torch.Size([*self.batch_shape[:-1], len(cells)])
        if isinstance(self._mask, Tensor):
            new._mask = self._mask.index_select(-1, cells)
        for name in (*self.feature_parameters, *self.cell_parameters):
            value, axis = getattr(self, name), -1 if name in self.cell_parameters else -2
            setattr(new, name, None if value is None else _select_cells(value, cells, axis, self.batch_shape[-1]))
        return new

    def _log_prob_of_panels(self, value: Tensor, panels: Panels) -> Tensor:
        nothing = copy.copy(self)
        nothing._panels, nothing._mask = None, False
        result = nothing.log_prob(value)
        # The host waits for an accelerator to know the panels of these cells.
        counted = self._mask.reshape(-1, len(panels.code)).any(0) if isinstance(self._mask, Tensor) else None
        for code in (panels.code if counted is None else panels.code[counted]).unique().tolist():
            cells = (panels.code == code).nonzero().squeeze(-1)
            features = panels.measured[code].nonzero().squeeze(-1)
            own = _select_counts(_select_cells(value, cells, -2, len(panels.code)), features)
            part = self._of_cells(cells)._of_features(features).log_prob(own)
            result = result.index_copy(-1, cells, part.expand(*result.shape[:-1], len(cells)))
        return result

    def __repr__(self) -> str:
        masked = "" if self._mask is True else ", masked"
        batch, features = tuple(self.batch_shape), self.event_shape[0]
        return f"{type(self).__name__}(batch={batch}, features={features}{masked})"

    def _full(self, value: Tensor) -> Tensor:
        """Broadcast to batch shape + event shape."""
        return value.expand(self.batch_shape + self.event_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw values, shape sample_shape + batch + (F,)."""
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape) + self.batch_shape + self.event_shape)

    def _draw(self, shape: torch.Size) -> Tensor:
        """One draw for every element of ``shape``."""
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of each cell, shape = broadcast of the batch shapes.

        Parameters
        ----------
        value
            :class:`~pyro_multivi.data.sparse.SparseCounts` of shape (B, F), or a dense tensor
            of shape (..., F).
        """
        if self._panels is not None:
            return self._log_prob_of_panels(value, self._panels)
        names = [*self.feature_parameters, *self.cell_parameters]
        # Pyro's inspection uses tensors tagged with their origin; the formulas get plain ones.
        parameters = [getattr(self, name) for name in names]
        extracted: tuple[Any, frozenset[Any]] = extract_provenance([value, *parameters])
        (value, *given), provenance = extracted
        if value.shape[-1:] != self.event_shape:
            raise ValueError(
                f"value must have {self.event_shape[0]} features in its last dimension, got shape {tuple(value.shape)}"
            )
        if self._validate_args and not isinstance(value, SparseCounts):
            self._validate_sample(value)
        shape = torch.Size(broadcast_shape(self.batch_shape, value.shape[:-1]))
        reference: Tensor = given[0]
        if self._mask is False:
            zero = torch.zeros((), dtype=reference.dtype, device=reference.device)
            return track_provenance(zero.expand(shape), provenance)
        index = self._evaluated(shape)
        rows = {
            name: None if parameter is None else self._rows_of(parameter, name, shape, index)
            for name, parameter in zip(names, given, strict=True)
        }
        if index is not None and self._rows is index and isinstance(value, SparseCounts):
            values = ValueRows(value.without_empty(index), None)
        else:
            values = ValueRows.of(value, shape, index)
        result = self._log_prob_rows(values, rows)
        if index is not None:
            result = result.new_zeros(shape.numel()).index_copy(0, index, result)
        return track_provenance(result.reshape(shape), provenance)

    def _evaluated(self, shape: torch.Size) -> Tensor | None:
        """Positions of the evaluated cells among all of a batch of some shape; None for all."""
        if not isinstance(self._mask, Tensor):
            return None
        if self._rows is None:
            # The host waits for an accelerator to know their number; to evaluate cells that do not count
            # would cost more.
            index = self._mask.expand(shape).reshape(-1).nonzero().squeeze(-1)
        elif len(shape) == 1:
            index = self._rows
        else:
            first = torch.arange(0, shape.numel(), shape[-1], device=self._rows.device)
            index = (first[:, None] + self._rows).reshape(-1)
        return None if len(index) == shape.numel() else index

    def _rows_of(self, value: Tensor, name: str, shape: torch.Size, index: Tensor | None) -> Tensor:
        """One row per evaluated cell, shape (n,) or (n, F); (F,) where all cells share it."""
        if name in self.cell_parameters:
            flat = value.expand(shape).reshape(-1)
            return flat if index is None else flat.index_select(0, index)
        if isinstance(value, Readout) and value.shape[-1:] == self.event_shape:
            hidden = value.hidden.expand(*shape, -1).reshape(shape.numel(), -1)
            hidden = hidden if index is None else hidden.index_select(0, index)
            return value.with_hidden(hidden)
        value = dense_rows(value).expand(*value.shape[:-1], *self.event_shape)
        if value.shape[:-1].numel() == 1:
            return value.reshape(self.event_shape)
        flat = value.expand(shape + self.event_shape).reshape(shape.numel(), -1)
        return flat if index is None else flat.index_select(0, index)

    def _log_prob_rows(self, value: ValueRows, parameters: ParameterRows) -> Tensor:
        """Log-probability of n cells, shape (n,), from :meth:`_rows_of` and as many rows of the value."""
        raise NotImplementedError


@dataclass(frozen=True)
class ValueRows:
    """The value of each evaluated cell: row ``source[i]`` of ``flat`` (row i without a source)."""

    flat: SparseCounts | Tensor
    source: Tensor | None

    @staticmethod
    def of(value: Tensor, shape: torch.Size, index: Tensor | None) -> ValueRows:
        """Values of the cells at ``index`` (all if None) of a batch of some shape."""
        lead = value.shape[:-1]
        flat = value if isinstance(value, SparseCounts) else value.reshape(lead.numel(), -1)
        if lead == shape and index is None:
            return ValueRows(flat, None)
        source = torch.arange(lead.numel(), device=value.device).reshape(lead).expand(shape).reshape(-1)
        return ValueRows(flat, source if index is None else source.index_select(0, index))

    def dense(self) -> Tensor:
        """Values as an ordinary tensor, shape (n, F)."""
        flat = dense_rows(self.flat)
        return flat if self.source is None else flat.index_select(0, self.source)

    def entries(self) -> Entries:
        """The non-zero values."""
        return Entries(SparseCounts.of(self.flat), self.source)


def dense_rows(value: Tensor) -> Tensor:
    """The ordinary tensor behind a readout or sparse counts."""
    if isinstance(value, Readout):
        return value.dense()
    return value.to_dense() if isinstance(value, SparseCounts) else value


nonnegative_vector = _Vector(constraints.nonnegative)
positive_vector = _Vector(constraints.positive)
unit_vector = _Vector(constraints.unit_interval)
real_vector = _Vector(constraints.real)


def _select(value: Tensor, features: Tensor, n_features: int) -> Tensor:
    """Some features of a parameter; a softmax is then one over these features."""
    if isinstance(value, Readout):
        return value.of_features(features)
    return value[..., features] if value.shape[-1] == n_features else value


def _select_cells(value: Tensor, cells: Tensor, axis: int, n_cells: int) -> Tensor:
    """Some cells of a parameter or of counts; itself where it is shared by all."""
    if isinstance(value, SparseCounts):
        return value.select_rows(cells)
    part = value.hidden if isinstance(value, Readout) else value
    if part.dim() < -axis or part.shape[axis] != n_cells:
        return value
    part = part.index_select(axis, cells)
    return value.with_hidden(part) if isinstance(value, Readout) else part


def _select_counts(value: Tensor, features: Tensor) -> Tensor:
    """Some features of counts; sparse ones have entries at no others."""
    if not isinstance(value, SparseCounts):
        return value[..., features]
    place = torch.zeros(value.shape[-1], dtype=value.col.dtype, device=value.col.device)
    place[features] = torch.arange(len(features), dtype=place.dtype, device=place.device)
    return SparseCounts(value.crow, place[value.col.long()], value.val, (value.shape[0], len(features)))


def measured_only(
    fn: TorchDistribution, measured: Tensor, rows: Tensor | None, panels: Panels | None = None
) -> TorchDistribution:
    """Mask ``fn`` to the measured cells, and to the features of their panels.

    A likelihood of this package also takes the positions of the cells, ``rows``.

    Raises
    ------
    ValueError
        If ``fn`` is no event over features, or cannot leave some out: it is neither of this package nor independent
        over features.
    """
    if isinstance(fn, CellDistribution):
        return (fn if panels is None else fn.count_panels(panels)).mask(measured, rows)
    if not fn.event_shape:
        raise ValueError(
            f"The distribution of a cell's counts is {type(fn).__name__} of batch shape {tuple(fn.batch_shape)} and no "
            f"event shape: expected ({len(measured)},), and one event over all features. Add .to_event(1) to what "
            "expression_dist or accessibility_dist returns."
        )
    if panels is not None:
        if not (isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1):
            raise ValueError(
                f"{type(fn).__name__} is one event over all features, and some were not measured in these cells: make "
                "it independent over features, distribution.to_event(1), or leave out cells with missing features."
            )
        fn = fn.base_dist.mask(panels.measured[panels.code]).to_event(1)
    return fn.mask(measured)
