"""Checks of minified data: methods that need counts, and data of other weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyro_multivi.api.arguments import Data
from pyro_multivi.data.minified.layout import weights_of
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.cell_factor import unlearned_cell_factor
from pyro_multivi.posterior.quantities.file_sink import digest
from pyro_multivi.program import MultiVIProgram


def with_note(error: ValueError, note: str) -> ValueError:
    """An error in scvi-tools' words, for scripts that look for them, with what to do as a note (Python 3.11)."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    return error


def check_counts(table: CellTable, function: str = "", mend: str = "give data that have them, adata=...") -> None:
    """Refuse minified data where counts are needed, in scvi-tools' words where a function of theirs is named."""
    if table.posterior is None:
        return
    says = f"This needs the counts, which minified data have not: {mend}, or load the model that was saved before."
    if function:
        raise with_note(ValueError(f"The {function} function currently does not support minified data."), says)
    raise ValueError(says)


def digest_of_weights(program: MultiVIProgram) -> str:
    """Digest of the weights and buffers of a program."""
    return digest({}, *program.state_dict().values())


def check_weights(table: CellTable, data: Data, program: MultiVIProgram) -> None:
    """Refuse data that were minified by a model of other weights: their posterior is another."""
    if table.posterior is not None and weights_of(data) not in _digests(program):
        raise ValueError(
            "These data were minified by another model, or by this one before it was trained on: their posterior is "
            "not that of this model. Give the data with their counts."
        )


def _digests(program: MultiVIProgram) -> Iterator[str]:
    """Digest of a program, and that of before the cell factor had a posterior if nothing was learned of it."""
    yield digest_of_weights(program)
    state, later = program.state_dict(), unlearned_cell_factor(program.config.n_batch)
    if all(name in state and torch.equal(state[name].cpu(), value) for name, value in later.items()):
        yield digest({}, *(value for name, value in state.items() if name not in later))
