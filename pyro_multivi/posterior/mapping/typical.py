"""Mean counts and encoder inputs of a program's own cells, by which it knows features that were not measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells, Measurement
from pyro_multivi.data.modality import MODALITIES, RNA, Modality, modelled
from pyro_multivi.networks.panels import typical_buffer
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode

# Cells drawn from the prior, at a time and in all. Of a gene found in a tenth of the cells, the mean input is then
# good to a tenth.
_AT_ONCE, _N_CELLS = 128, 1024
_SEED = 20_261_128


@torch.no_grad()
def set_typical(program: MultiVIProgram, n_batch: int | None = None, n_categories: Sequence[int] = ()) -> None:
    """Set ``rna_typical`` and ``atac_typical`` of a program from cells that its model generates.

    No data are needed, so that a saved model knows them too. Cells are drawn from the prior of z, in all batches alike.

    Parameters
    ----------
    n_batch
        Number of batches, the first ones, of which cells are drawn. Default: all.
    n_categories
        Numbers of categories of the covariates, whose columns follow those of all batches in the design. A cell is of
        all of them in equal parts: of none it would be like no cell that the program was trained on.
    """
    share = {modality: 0.0 * typical_buffer(program, modality)[0] for modality in modelled(program.config)}
    encoded = {modality: torch.zeros_like(total) for modality, total in share.items()}
    for start in range(0, _N_CELLS, _AT_ONCE):
        cells = _cells(program, start, n_batch or program.config.n_batch, n_categories)
        with evaluation_mode(program):
            nodes = _generated(program, cells, _SEED + start)
            if cells.rna_size is not None and RNA in share:
                # Of known size factors the scale is the user's: cells of typical depth are wanted.
                size = program.rna_log_depth.exp() / nodes[RNA.counts]["fn"].mean.sum(-1).clamp(min=1e-30)
                nodes = _generated(program, cells.replace(rna_size=size), _SEED + start)
            for modality in share:
                counts, inputs = _expected(program, modality, nodes[modality.counts]["fn"])
                share[modality] += (counts / counts.sum(-1, keepdim=True).clamp(min=1e-12)).sum(0)
                encoded[modality] += inputs.sum(0)
    for modality, total in share.items():
        typical_buffer(program, modality).copy_(torch.stack([total / total.sum(), encoded[modality] / _N_CELLS]))


def _generated(program: MultiVIProgram, cells: Cells, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return dict(poutine.trace(program.model).get_trace(cells).nodes)


def _expected(program: MultiVIProgram, modality: Modality, fn: Any) -> tuple[Tensor, Tensor]:
    """Expected counts, and inputs of the encoder, of cells, (B, F) each."""
    if modality == RNA:
        return fn.mean, program.rna_input(fn.sample())
    opened = program.open_probability(fn)
    # The input being 0 or 1, its mean is known.
    is_binary = type(program).atac_input is MultiVIProgram.atac_input
    counts = opened if modality.binary else fn.mean
    return counts, opened if is_binary else program.atac_input(fn.sample())


def _cells(program: MultiVIProgram, start: int, n_batch: int, n_categories: Sequence[int]) -> Cells:
    """Cells without counts, in turn of each batch, with covariates in equal parts and at their means."""
    config = program.config
    like = program.library_log_mean
    index = torch.arange(start, start + _AT_ONCE, device=like.device)
    design = like.new_zeros(len(index), config.n_covariates)
    design[torch.arange(len(index)), index % n_batch] = 1.0
    first = config.n_batch
    for n in n_categories:
        design[:, first : first + n] = 1 / n
        first += n
    everywhere = torch.ones(len(index), dtype=torch.bool, device=like.device)
    parts: dict[str, Any] = {}
    for modality in MODALITIES:
        parts[modality.counts] = like.new_zeros(len(index), modality.n_features_in(config))
        parts[modality.mask] = everywhere
    label = index % config.n_labels if config.n_labels else None
    size = like.new_ones(len(index)) if config.library == "size_factor" else None
    # Statements of extra modalities read them, although nothing is observed.
    nowhere = torch.zeros_like(everywhere)
    parts["extra"] = {
        name: Measurement(like.new_zeros(len(index), width), nowhere) for name, width in config.extra.items()
    }
    return Cells(index=index, n_total=len(index), design=design, label=label, rna_size=size, **parts)
