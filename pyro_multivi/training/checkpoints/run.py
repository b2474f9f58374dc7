"""Description of a run of training: code, options and data, by which one goes on with the same only."""

from __future__ import annotations

import inspect
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_multivi import _version
from pyro_multivi.data.checks import shown
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.counts import StoredCounts
from pyro_multivi.data.table import CellTable
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training.options import FitOptions

_PACKAGE = Path(_version.__file__).parent
# Parts of the package that training does not run through.
_APART = ("api", "cli", "datasets", "plots")


class Run(NamedTuple):
    """Description of a run, for two of them to be compared.

    Attributes
    ----------
    values
        Versions, sizes and options by name.
    contents
        Checksums of what is too large to be shown.
    """

    values: dict[str, Any]
    contents: dict[str, int]

    @classmethod
    def of(
        cls,
        program: MultiVIProgram,
        table: CellTable,
        features: Sequence[str],
        options: FitOptions,
        listed: Sequence[Tensor] | None = None,
        **arguments: Any,
    ) -> Run:
        """Describe a run.

        Parameters
        ----------
        features
            Names of the features.
        listed
            Cells of training, validation and test where they are listed.
        arguments
            Further arguments by name.
        """
        chosen = {entry.name: getattr(options, entry.name) for entry in fields(options)}
        for name in ("callbacks", "progress_bar"):
            del chosen[name]
        if options.elbo is not None:
            plain = {name: value for name, value in vars(options.elbo).items() if isinstance(value, (int, float, str))}
            # Found when it is first used.
            plain.pop("max_plate_nesting", None)
            chosen["elbo"] = [type(options.elbo).__qualname__, plain]
        values = {
            "pyro_multivi": _version.__version__,
            "pyro": pyro.__version__,
            "torch": str(torch.__version__),
            "program_class": type(program).__qualname__,
            "cells": len(table),
            **program.config.to_dict(),
            **chosen,
            **arguments,
            "frozen parameters": [name for name, each in program.named_parameters() if not each.requires_grad],
        }
        # As they are read again: tuples are lists then.
        values = json.loads(json.dumps(values, default=lambda value: type(value).__qualname__))
        contents = {
            "code of pyro_multivi": _code_of_package(),
            "code of the program": zlib.crc32(_code(type(program)).encode()),
            "names or order of the cells": zlib.crc32("\0".join(table.cell_names).encode()),
            "names or order of the features": zlib.crc32("\0".join(features).encode()),
            **dict(_contents(table)),
            **({} if listed is None else {"cells in external_indexing": _checksum_of(listed)}),
        }
        return cls(values, contents)

    def difference(self, other: Run, where: str = "then", here: str = "now") -> list[str]:
        """Words on each difference from another run, which ``where`` tells from this one."""
        found = [
            f"{name}: {shown(other.values.get(name))} {where}, {shown(self.values.get(name))} {here}"
            for name in dict.fromkeys([*self.values, *other.values])
            if self.values.get(name) != other.values.get(name)
        ]
        names = dict.fromkeys([*self.contents, *other.contents])
        return found + [f"other {name}" for name in names if self.contents.get(name) != other.contents.get(name)]

    def after(self, n_epochs: int, optimizer_state: dict[str, Any] | None, **values: Any) -> Run:
        """Add what a training before left, and further values, for processes to be compared.

        Parameters
        ----------
        n_epochs, optimizer_state
            Epochs of the training before, and what it left.
        values
            Further values by name.
        """
        tensors = [part for part in tree_leaves(optimizer_state) if isinstance(part, Tensor)]
        return Run(
            {**self.values, "epochs trained before": n_epochs, **values},
            {**self.contents, "state of the optimizer": _checksum_of(tensors)},
        )


def _code_of_package() -> int:
    value = 0
    for path in sorted(_PACKAGE.rglob("*.py")):
        if path.relative_to(_PACKAGE).parts[0] not in _APART:
            value = zlib.crc32(path.read_bytes(), value)
    return value


def _code(program_class: type) -> str:
    """Source of a modeler's own classes."""
    own = [each for each in program_class.__mro__ if each.__module__.partition(".")[0] not in ("pyro_multivi", "torch")]
    try:
        return "".join(inspect.getsource(each) for each in own if each is not object)
    except (OSError, TypeError):  # typed in, and kept nowhere
        return ""


def _contents(table: CellTable) -> Iterator[tuple[str, int]]:
    words = {"design": "batches or covariates of the cells", "batch_code": "batches of the cells", "label": "labels"}
    for each in MODALITIES:
        words |= {each.counts: f"{each.assay} counts", each.mask: f"cells measured in {each.assay}"}
        words |= {each.size_factor: f"{each.assay} size factors"}
    for name, word in words.items():
        part = getattr(table, name)
        tensors = part.parts() if isinstance(part, (SparseCounts, StoredCounts)) else [] if part is None else [part]
        yield word, _checksum_of(tensors)
    for each in MODALITIES:
        yield f"{each.features} measured in the cells", _checksum_of(each.panels_in(table) or ())
    for name, extra in table.extra.items():
        yield f"values of {name}", _checksum_of(extra)


def _checksum_of(tensors: Sequence[Tensor]) -> int:
    value = 0
    for tensor in tensors:
        array = np.ascontiguousarray(tensor.cpu().numpy())
        value = zlib.crc32(array.data, zlib.crc32(f"{array.dtype} {array.shape}".encode(), value))
    return value
