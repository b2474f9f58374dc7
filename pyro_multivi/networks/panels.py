r"""Cells in which some features were not measured: depth, and encoder input, as if all had been.

A missing count is no zero. Where a cell was measured with a panel of features, the sum over features by which the first
layer of its encoder begins is estimated from those of the panel,

.. math:: \sum_g w_g \bar u_g + \frac{1}{f} \sum_{g \in S} w_g (u_g - \bar u_g)

with u the input, its mean over cells, and f the panel's part of the sum of the means: a typical cell has the sum that
it would have with all features, and what is particular to a cell counts as much as if the others had been measured and
said the same. (The means alone in place of what is missing would draw all cells towards the typical one: on the cell
lines they carried over fewer labels by ATAC than zeros did.) A cell's depth is that of the panel divided by the share
of a typical cell's counts that the panel holds. The likelihood leaves missing features out
(:func:`pyro_multivi.distributions.measured_only`). The means are buffers of the program (``rna_typical``,
``atac_typical``): of data in which features are missing they are those of the cells that measured each
(:func:`start_typical`), for queries of a model of other data those of cells that it generates
(:mod:`pyro_multivi.posterior.mapping.typical`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_multivi.data.marginals import Marginals
from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.minified.layout import stored_part
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, Modality, modelled
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.table import CellTable

# Of a panel with next to nothing that a typical cell has, the depth of a cell would be anything.
_LEAST_SHARE = 1e-4


class MissingInput(NamedTuple):
    """Correction of a first layer for features that were not measured.

    Attributes
    ----------
    input
        Input to be added, the same for all cells of a panel, (n_panels, F).
    scale
        Factor of what the measured features add, (n_panels,).
    code
        Panel of each cell, (B,), int64.
    """

    input: Tensor
    scale: Tensor
    code: Tensor


def typical_buffer(program: Any, modality: Modality) -> Tensor:
    """Buffer with the share of each feature in a typical cell's counts, and its mean encoder input, (2, F)."""
    return getattr(program, f"{modality.key}_typical")


@torch.no_grad()
def start_typical(program: Any, blocks: Iterable[Cells], marginals: Marginals) -> None:
    """Set the typical counts and encoder inputs of a program from data, over the cells that measured each feature.

    Parameters
    ----------
    blocks
        Minibatches that together are the data set, on the program's device.
    marginals
        Statistics of the same data.
    """
    regions = marginals.region_share if marginals.fragments is None else marginals.fragments.region_share
    of = {RNA: marginals.gene_share, ATAC: regions}
    shares = {modality: of[modality] for modality in modelled(program.config)}
    for modality, share in shares.items():
        typical_buffer(program, modality)[0] = share
    total = {modality: torch.zeros_like(share) for modality, share in shares.items()}
    n_cells = {modality: torch.zeros_like(share) for modality, share in shares.items()}
    for cells in blocks:
        for modality in shares:
            counts, measured = modality.counts_in(cells), modality.measured_in(cells)
            panels: Panels | None = modality.panels_in(cells)
            options = {"share": measured_share(program, cells, modality)} if modality == RNA else {}
            total[modality] += _feature_sums(getattr(program, f"{modality.key}_input")(counts, **options), measured)
            n_cells[modality] += measured.sum() if panels is None else panels.n_cells(measured)
    for modality, inputs in total.items():
        typical_buffer(program, modality)[1] = inputs / n_cells[modality].clamp(min=1)


def _feature_sums(values: Tensor, measured: Tensor) -> Tensor:
    """Sum of each feature over the measured cells, (F,); other cells hold zeros."""
    if isinstance(values, SparseCounts):
        return torch.bincount(values.col, weights=values.val.double(), minlength=values.shape[1]).float()
    return values[measured].sum(0)


def missing_input(program: Any, cells: Cells | CellTable, modality: Modality) -> MissingInput | None:
    """Correction for what was not measured; None where everything was."""
    panels: Panels | None = modality.panels_in(cells)
    if panels is None:
        return None
    mean = _typical(program, modality)[1]
    measured = panels.measured.to(mean.dtype)
    scale = mean.sum() / (measured @ mean).clamp(min=_LEAST_SHARE * float(mean.sum()))
    return MissingInput(mean - scale[:, None] * measured * mean, scale, panels.code)


def measured_share(program: Any, cells: Cells | CellTable, modality: Modality) -> Tensor | None:
    """Share of a typical cell's counts that lies in the features measured in each cell, (B,); None for all."""
    panels: Panels | None = modality.panels_in(cells)
    if panels is None:
        return None
    share = _typical(program, modality)[0]
    # Of a table on the CPU too.
    return (panels.measured.to(share) @ share).clamp(min=_LEAST_SHARE)[panels.code.to(share.device)]


def depth(program: Any, cells: Cells | CellTable, modality: Modality) -> Tensor:
    """Total count of a cell, 1 or more, or number of open regions where only these are modelled, in all features, (B,).

    Of minified data it is stored beside the posterior.
    """
    if cells.posterior is not None:
        return stored_part(cells.posterior, "total")[:, MODALITIES.index(modality)]
    counts, binary = modality.counts_in(cells), modality.in_model(program.config).binary
    found = n_open(counts) if binary else totals(counts)
    share = measured_share(program, cells, modality)
    if share is not None:
        found = found / share
    return found if binary else found.clamp(min=1.0)


def log_depth(program: Any, cells: Cells | CellTable, modality: Modality) -> Tensor:
    """Log of :func:`depth`, plus 1 where it may be 0, (B,)."""
    found = depth(program, cells, modality)
    return found.log1p() if modality.in_model(program.config).binary else found.log()


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
            "place: pyro_multivi.networks.panels.start_typical(program, table.blocks(), table.marginals()) sets them."
        )
    return typical
