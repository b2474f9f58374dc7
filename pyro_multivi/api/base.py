"""Data and state of every model; training, and the methods that give results, are in the mixins beside this file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import FunctionType
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_multivi.api.arguments import Data, Indices, average_over
from pyro_multivi.api.saving.description import difference_of_cells
from pyro_multivi.api.scvi_tools.arguments import scvi_columns
from pyro_multivi.api.scvi_tools.minified import check_counts, check_weights
from pyro_multivi.data.checks import NotInModelError, caution, checked, first_names
from pyro_multivi.data.fragments.checks import check_fragments
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import AnyModality, Cells
from pyro_multivi.data.modality import Modality, modality_named
from pyro_multivi.data.selection import select_cells
from pyro_multivi.data.setup import latest
from pyro_multivi.data.setup.cautions import cells_without_counts, covariates_elsewhere
from pyro_multivi.data.setup.options import in_memory
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.split import Split
from pyro_multivi.data.table import CellTable
from pyro_multivi.isolation import isolated
from pyro_multivi.networks.surgery import Training
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training import History

logger = logging.getLogger("pyro_multivi")

#: Cells at a time in prediction: more than in training, for nothing is kept for a backward pass.
PREDICTION_BATCH = 512


class NotTrainedError(RuntimeError):
    """Results requested of a model that was never trained."""


class ModelBase:
    """A program together with the data it was set up on."""

    spec: DataSpec
    program: MultiVIProgram
    is_trained: bool
    #: The reference of a query's model, until it is saved.
    _reference: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Every public method of the mixins, and of classes of users.
        for name, method in list(vars(cls).items()):
            if isinstance(method, FunctionType) and not name.startswith("_"):
                setattr(cls, name, isolated()(method))

    def _assemble(self, spec: DataSpec, program: MultiVIProgram, adata: Data | None, table: CellTable | None) -> None:
        if table is not None and program.config.counts_fragments:
            check_fragments(table, spec.region_names)
        self.spec = spec
        self.program = program
        self._adata = adata
        self._table = table
        # Of the data that the table was made of, by which changes of them are noticed.
        self._checksum = None if table is None else latest.checksum_of(adata, table)
        self._history = History()
        self._optimizer_state: dict[str, Any] | None = None
        self._split: Split | None = None
        # That of the file, which is saved again as long as no other data are trained on.
        self._saved_split: Split | None = None
        # Parts that are trained, of a model of a query; None: all.
        self._training: Training | None = None
        self.is_trained = False

    @property
    def adata(self) -> Any:
        """The model's own data, which methods take by default; None for a model that was loaded without.

        Other data may be put in their place, as by ``load(path, adata)``: they are read by the setup of the model, need
        no setup of their own and are not changed. What they lack is an error at once.
        """
        return self._adata

    @adata.setter
    @isolated()
    def adata(self, adata: Data) -> None:
        table = self._read(adata)
        self._adata, self._table, self._checksum = adata, table, latest.checksum_of(adata, table)
        self._find_split(self._whole_split)

    @property
    def _whole_split(self) -> Split | None:
        """The split of all cells that the model was trained on, be they among its data or not."""
        return self._split if self._saved_split is None else self._saved_split

    def _find_split(self, split: Split | None) -> None:
        """Find the cells of a split by name among those of the model's data, and log how they differ."""
        if split is None:
            return
        names = None if self._table is None else self._table.cell_names
        self._split, self._saved_split = split.among(names, sum(self.spec.n_cells.values())), split
        differences = "" if names is None else difference_of_cells(split, names)
        if differences:
            logger.warning("adata %s. Which cells were held out of training is known of the others.", differences)

    @property
    def history(self) -> dict[str, pd.DataFrame]:
        """One frame per recorded quantity, indexed by epoch; losses in nats per cell, lower is better.

        Epochs in which a quantity was not recorded are left out, as those of ``check_val_every_n_epoch``.
        Beside what was recorded, names of scvi-tools: ``train_loss_epoch`` and ``train_loss_step``, both the mean over
        the steps of an epoch; ``validation_loss``, that loss of the validation cells; ``kl_global_train`` and
        ``kl_global_validation``, 0 since no latent variable is shared by cells.
        """
        recorded = pd.DataFrame(self._history.rows, index=pd.RangeIndex(self._history.n_epochs, name="epoch"))
        if len(recorded):
            recorded = recorded.assign(**scvi_columns(recorded))
        # Gaps would break the lines of a plot, and be the last value where the last epochs were not scored.
        return {str(name): recorded[[name]].dropna() for name in recorded}

    @property
    def device(self) -> torch.device:
        """Device of the program."""
        return next(self.program.parameters()).device

    @isolated()
    @checked
    def to_device(self, device: str | torch.device) -> None:
        """Move the program to a device."""
        self.program.to(device)

    # ------------------------------------------------------------------ shared by the methods

    @isolated()
    def minibatch(self, indices: Indices = None, adata: Data | None = None) -> Cells:
        """Some cells as the tensors that the program takes.

        Parameters
        ----------
        indices
            Positions, names or a mask of cells; default all of them.
        adata
            Other cells; default: those of training.
        """
        table, index = self._select(adata, indices)
        check_counts(table)
        return table.batch(index).to(self.device)

    def _check_trained(self, warn: bool = False) -> None:
        """Refuse results of a model that was never trained, or warn of them where scvi-tools gives them."""
        if not self.is_trained and warn:
            caution("This model is not trained: its results are those of random weights. Call model.train() first.")
        elif not self.is_trained:
            raise NotTrainedError("This model is not trained: call model.train() first.")

    def _training_table(self) -> CellTable:
        if self._table is None:
            raise ValueError("adata is not given and the model was loaded without data: give adata.")
        changed = self._change_of_data(self._table)
        if changed is not None:
            raise ValueError(
                f"The data of this model were changed in place since it read them: {changed} Its results would stand "
                "beside other cells or other counts. Undo the change or make a new model; for results of raw counts as "
                "they are now, give them: adata=adata. What is to be changed is best a copy: adata = adata[...].copy()."
            )
        return self._table

    def _current_split(self) -> Split | None:
        """Cells by what training made of them; an error if the data were changed, for then others have their places."""
        if self._split is not None and self._table is not None:
            self._training_table()
        return self._split

    def _change_of_data(self, table: CellTable) -> str | None:
        """Difference of the model's object from the table that was made of it; None without any."""
        changed, self._checksum = self.spec.change(self.adata, table, self._checksum)
        return changed

    def _table_of(self, adata: Data | None) -> tuple[CellTable, Any]:
        if adata is None:
            return self._training_table(), self.adata
        if adata is self.adata and self._table is not None and self._change_of_data(self._table) is None:
            return self._table, adata
        table, opened = self._read(adata), self.spec.open(adata)
        for sentence in (*cells_without_counts(opened, table), *covariates_elsewhere(opened, self.spec)):
            caution(sentence)
        return table, adata

    def _read(self, adata: Data) -> CellTable:
        """Read other data than those of training, checked for what this model cannot take."""
        table = self.spec.table(adata)
        check_weights(table, adata, self.program)
        if self.program.config.counts_fragments:
            check_fragments(table, self.spec.region_names)
        return table

    def _obs_of(self, adata: Data | None) -> pd.DataFrame:
        """Annotation of the cells that a method was given, in their order."""
        return in_memory((self.adata if adata is None else adata).obs)

    def _select(self, adata: Data | None, indices: Indices) -> tuple[CellTable, Tensor]:
        table, _ = self._table_of(adata)
        return table, select_cells(indices, table.cell_names)

    def _cells(
        self,
        adata: Data | None,
        indices: Indices,
        batch_size: int,
        untrained: bool = False,
        counts: str | None = "",
    ) -> Minibatches:
        """Selected cells, as minibatches on the program's device.

        With ``untrained`` also of random weights. ``counts=None``: none are needed, and minified data will do; else
        the name of scvi-tools' function that needs them.
        """
        self._check_trained(warn=untrained)
        table, index = self._select(adata, indices)
        if counts is not None:
            check_counts(table, counts)
        return Minibatches(table, index, batch_size=batch_size, device=self.device)

    def _average(self, modalities: Sequence[AnyModality], *arguments: Any) -> Average:
        """Average of estimates of some modalities, by the arguments of :func:`average_over`; warn of batches."""
        average = average_over(self.spec, *arguments)
        for modality in modalities:
            self._tell_unmeasured("transform_batch", average.batches, modality)
        return average

    def _tell_unmeasured(self, argument: str, batches: Sequence[int] | None, modality: AnyModality) -> None:
        """Warn of batches to decode in that have cells in the data of the model, none of them with the modality."""
        n_cells, n_measured = torch.zeros(2, self.spec.n_batch, dtype=torch.int64)
        for model in (self, self._reference):
            if model is not None and model._table is not None and batches is not None:
                # Batches of a query's model are those of its reference, and new ones behind them.
                code, mask = model._table.batch_code, modality.measured_in(model._table)
                n_cells += code.bincount(minlength=self.spec.n_batch)
                n_measured += code[mask].bincount(minlength=self.spec.n_batch)
        names = [self.spec.batch_categories[code] for code in batches or () if n_cells[code] and not n_measured[code]]
        if names:
            others = [name for name, n in zip(self.spec.batch_categories, n_measured.tolist(), strict=True) if n]
            caution(
                f"{argument} names {first_names(names)}, in which {modality.assay} was measured in no cell of the "
                f"model's data: its effects on {modality.features} are not known, and cells are decoded in it about as "
                f"in an average batch, with intervals that leave this out. Measured: {first_names(others)}."
            )

    def _lacks(self, method: str, modality: Modality, *special: Any) -> bool:
        """Whether the model has no features of a modality; if so warn that a result is empty.

        With any of the special arguments given this is an error.
        """
        lacks = not modality.n_features_in(self.spec)
        if any(each is not None for each in special):
            self._check_modality(method, modality.name)
        elif lacks:
            caution(f"{method}: this model has no {modality.features}, and so no {modality.name}: the result is empty.")
        return lacks

    def _without_features(self, adata: Data | None, indices: Indices, return_numpy: bool) -> Any:
        """Estimates of no features, (cells, 0)."""
        table, index = self._select(adata, indices)
        empty = pd.DataFrame(index=pd.Index([table.cell_names[place] for place in index.tolist()]), dtype="float32")
        return empty.to_numpy() if return_numpy else empty

    def _check_modality(self, argument: str, name: str) -> None:
        """Refuse the name of a modality of which the model has no features."""
        modality = modality_named(name)
        if modality is not None and not modality.n_features_in(self.spec):
            raise NotInModelError(f"{argument}: this model has no {modality.features}, and so no {name}.")
