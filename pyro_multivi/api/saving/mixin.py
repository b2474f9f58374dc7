"""Mixin: a model written to a folder and read again."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyro_multivi.api.arguments import Data
from pyro_multivi.api.base import ModelBase
from pyro_multivi.api.custom_program import find_program, import_path
from pyro_multivi.api.saving.description import Description, todays_names
from pyro_multivi.api.saving.folder import DESCRIPTION, broken, model_folder, read_model, write_model
from pyro_multivi.api.scvi_tools.arguments import LOAD, SAVE, takes
from pyro_multivi.api.scvi_tools.devices import load_arguments
from pyro_multivi.api.scvi_tools.minified import check_weights, with_note
from pyro_multivi.data.checks import UnknownKeyError, checked
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.setup.options import is_mudata
from pyro_multivi.isolation import isolated
from pyro_multivi.processes.group import current, is_first_process
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training import History

logger = logging.getLogger("pyro_multivi")

# What is calibrated for intervals, by the ends of the buffers' names; versions before did not save them all.
_FOR_INTERVALS = {
    "weight_sd": "a posterior of the decoders' last layers",
    "residual_sd": "the variation that the state does not explain",
    "posterior_scale": "the correction of the spread of states",
    "depth_scale": "the correction of the spread of depths",
}

Model = TypeVar("Model", bound="SavingMixin")


def _make_parent(folder: Path) -> None:
    """Make the folders above one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((each for each in folder.parents if each.exists() and not each.is_dir()), folder.parent)
        raise NotADirectoryError(
            f"dir_path={str(folder)!r}: {str(file)!r} is a file, and no folder can be in it: choose another path."
        ) from error


class SavingMixin(ModelBase):
    """Methods about saved models."""

    @takes(SAVE)
    @checked
    def save(
        self,
        dir_path: str | os.PathLike[str],
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
    ) -> None:
        """Write the model to a folder, as a whole or not at all; of several processes, number 0 alone writes.

        Parameters
        ----------
        dir_path
            Folder to write; folders above it are made if they are not there.
        prefix
            Write to a folder of this name within ``dir_path``.
        overwrite
            Replace a model that is there, in one step: whatever interrupts it leaves the old one or the new one.
        save_anndata
            Also write the data, so that :meth:`load` needs nothing else. Without it, data that are saved in a folder
            which is replaced stay there if they hold this model's cells and features.

        Raises
        ------
        FileExistsError
            If there is something at ``dir_path`` that may not be replaced: a model without ``overwrite=True``,
            anything that is no saved model, data of other cells.
        OSError
            If it cannot be written, for instance to a full disk; what was there is as it was.
        """
        if save_anndata:
            if self.adata is None:
                raise ValueError("save_anndata=True, but this model was loaded without data: leave it out.")
            self._training_table()
        description = Description(
            config=self.program.config.to_dict(),
            program_class=import_path(type(self.program)),
            spec=self.spec,
            history=self._history.rows,
            split=self._whole_split,
            is_trained=self.is_trained,
            minified=self._table is not None and self._table.posterior is not None,
            query=self._query_description(),
        )
        folder, processes = model_folder(dir_path, prefix), current()

        def write() -> None:
            _make_parent(folder)
            write_model(
                folder,
                self.program.state_dict(),
                description.to_dict(),
                overwrite=overwrite,
                data=self.adata if save_anndata else None,
                names=self._names(),
            )

        if processes.are_several or is_first_process():
            processes.on_first(write)

    @classmethod
    @takes(LOAD, load_arguments)
    @isolated()
    @checked
    def load(
        cls: type[Model],
        dir_path: str | os.PathLike[str],
        adata: Data | None = None,
        device: str | torch.device = "cpu",
        program_class: type[MultiVIProgram] | str = MultiVIProgram,
        prefix: str | None = None,
    ) -> Model:
        """Read a saved model. Nothing in the folder is executed.

        Parameters
        ----------
        dir_path
            Folder of the saved model.
        adata
            Data to use by default, with the features of training; without it (and without saved
            data) give ``adata`` to each method. Cells are known by name: a log line says how they differ from those
            of training.
        device
            Device of the program; ``"auto"`` is a GPU if there is one. scvi-tools' ``accelerator`` ("cpu", "gpu",
            "auto") is taken too.
        program_class
            Class of a model of your own, or its import path, ``"module:name"``. The file says
            which class it needs, and nothing is imported unless you name that class here.
        prefix
            That given to :meth:`save`.

        Raises
        ------
        FileNotFoundError
            If there is no saved model.
        BrokenModelError
            If a file in it is damaged (each has a checksum, compared before it is read), missing or malformed.
        ValueError
            If it is of another class than ``program_class``, or that cannot be imported.
        """
        dir_path = model_folder(dir_path, prefix)
        where = f"dir_path={str(dir_path)!r}"
        saved = read_model(dir_path, with_data=adata is None)
        description = Description.of(saved, where)
        found = find_program(program_class, description.program_class, where)
        state = todays_names(saved)
        program = description.make_program(found, state, where)
        program.to(device).eval()
        spec, table = description.spec, None
        if adata is not None:
            table = spec.table(adata)
            if table.posterior is not None and not description.minified:
                kind = "mudata" if is_mudata(adata) else "adata"
                # A KeyError up to scvi-tools 1.3, a ValueError since.
                raise with_note(
                    UnknownKeyError(f"It appears you are trying to load a non-minified model with minified {kind}"),
                    "Load the model that was saved after it minified these data, or give the data with their counts.",
                )
        elif saved.data is not None:
            adata = saved.data
            with broken(where, "the data in it do not fit the model"):
                table = spec.table(adata)
        if table is not None and adata is not None:
            check_weights(table, adata, program)
        model = cls.__new__(cls)
        model._assemble(spec, program, adata, table)
        model._history = History(description.history)
        model._find_split(description.split)
        model.is_trained = description.is_trained
        if model.is_trained:
            lacking = [name for name in program.state_dict() if name not in state]
            _warn_of_older_version(where, lacking, of_query=description.query is not None)
        if description.query is not None:
            with broken(where, f"{DESCRIPTION} is damaged"):
                model._restore_query(description.query)
        return model

    def _query_description(self) -> dict[str, Any] | None:
        """Attributes that only the model of a query has, for JSON; None for others."""
        return None

    def _restore_query(self, values: Mapping[str, Any]) -> None:
        raise ValueError("query: this class of models knows none")

    def _names(self) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the cells and features of the model's own data; of no cells if they are not known."""
        split = self._whole_split
        cells = split.cell_names if split is not None else () if self._table is None else self._table.cell_names
        return cells, [name for each in MODALITIES for name in each.feature_names_in(self.spec)]


def _warn_of_older_version(where: str, lacking: Sequence[str], of_query: bool) -> None:
    """Say what a trained model lacks that was saved before its program had certain tensors."""
    without = [words for end, words in _FOR_INTERVALS.items() if any(name.endswith(end) for name in lacking)]
    if without:
        logger.warning(
            "%s was saved by a version without %s: its intervals leave that out, and are as a rule too narrow. %s",
            where, " and ".join(without),
            "Training its reference on (train), and mapping the query again, brings it." if of_query
            else "Training it on (train) brings it.",
        )  # fmt: skip
    if any(".alone_head." in name or "_alone_expert." in name for name in lacking):
        logger.warning(
            "%s was saved by a version whose fully paired models learned nothing of states given one modality: "
            "do not use those. Training it anew brings them.",
            where,
        )
