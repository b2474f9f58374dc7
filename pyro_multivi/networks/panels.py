"""Cells in which some features were not measured: depth, and encoder input, as if all had been.

A missing count is no zero. Where a cell was measured with a panel of features, its encoder's input of the others is
their mean over cells, so that they say nothing of the cell, and its depth is that of the panel divided by the share of
a typical cell's counts that the panel holds. The likelihood leaves them out
(:func:`pyro_multivi.distributions.measured_only`). The means are buffers of the program (``rna_typical``,
``atac_typical``), set by :mod:`pyro_multivi.posterior.mapping.typical`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.modality import Modality
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable

# Of a panel with next to nothing that a typical cell has, the depth of a cell would be anything.
_LEAST_SHARE = 1e-4


class MissingInput(NamedTuple):
    """Encoder input in place of features that were not measured.

    Attributes
    ----------
    input
        Mean input of the features that are not in each panel, 0 of the others, (n_panels, F).
    code
        Panel of each cell, (B,), int64.
    """

    input: Tensor
    code: Tensor


def typical_buffer(program: Any, modality: Modality) -> Tensor:
    """Buffer with the share of each feature in a typical cell's counts, and its mean encoder input, (2, F)."""
    buffer: Tensor = getattr(program, f"{modality.key}_typical")
    return buffer


def missing_input(program: Any, cells: Cells | CellTable, modality: Modality) -> MissingInput | None:
    """Encoder input in place of what was not measured; None where everything was."""
    panels: Panels | None = modality.panels_in(cells)
    if panels is None:
        return None
    return MissingInput(~panels.measured * _typical(program, modality)[1], panels.code)


def measured_share(program: Any, cells: Cells | CellTable, modality: Modality) -> Tensor | None:
    """Share of a typical cell's counts that lies in the features measured in each cell, (B,); None for all."""
    panels: Panels | None = modality.panels_in(cells)
    if panels is None:
        return None
    share = _typical(program, modality)[0]
    return (panels.measured.to(share.dtype) @ share).clamp(min=_LEAST_SHARE)[panels.code]


def depth(program: Any, cells: Cells | CellTable, modality: Modality) -> Tensor:
    """Total count of a cell, 1 or more, or number of open regions of a binary modality, in all features, (B,)."""
    counts = modality.counts_in(cells)
    found = n_open(counts) if modality.binary else totals(counts)
    share = measured_share(program, cells, modality)
    if share is not None:
        found = found / share
    return found if modality.binary else found.clamp(min=1.0)


def log_depth(program: Any, cells: Cells | CellTable, modality: Modality) -> Tensor:
    """Log of :func:`depth`, plus 1 where it may be 0, (B,)."""
    found = depth(program, cells, modality)
    return found.log1p() if modality.binary else found.log()


def totals(counts: Tensor) -> Tensor:
    """Total count of each cell, (B,)."""
    return counts.row_sums() if isinstance(counts, SparseCounts) else counts.sum(-1)


def n_open(counts: Tensor) -> Tensor:
    """Number of features with any count in each cell, (B,)."""
    if isinstance(counts, SparseCounts):
        return counts.crow.diff().to(counts.dtype)
    return (counts > 0).to(counts.dtype).sum(-1)


def _typical(program: Any, modality: Modality) -> Tensor:
    typical = typical_buffer(program, modality)
    if not bool(typical.any()):
        raise ValueError(
            f"Some {modality.features} were not measured in these cells, and this program has no means to put in their "
            "place: pyro_multivi.posterior.mapping.typical.set_typical(program) sets them."
        )
    return typical
