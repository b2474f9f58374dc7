"""Training of a model: arguments, split of the cells, checkpoints, calibration and history."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

from pyro.infer import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_multivi._settings import settings
from pyro_multivi.api.arguments import Indices, check_paired
from pyro_multivi.api.base import ModelBase
from pyro_multivi.api.scvi_tools.arguments import TRAIN, takes, tell_difference, train_arguments
from pyro_multivi.api.scvi_tools.minified import check_counts
from pyro_multivi.data.checks import caution, checked
from pyro_multivi.data.loader import SHUFFLE_BLOCK, SHUFFLE_BUFFER, Minibatches, default_batch_size
from pyro_multivi.data.modality import MODALITIES, modelled
from pyro_multivi.data.resident import resident_if_it_fits
from pyro_multivi.data.selection import divide_cells
from pyro_multivi.data.split import Split
from pyro_multivi.data.table import CellTable
from pyro_multivi.isolation import isolated
from pyro_multivi.posterior.calibration.fit_depth import fit_depth_regressions
from pyro_multivi.posterior.calibration.fit_loadings import fit_loadings
from pyro_multivi.posterior.calibration.fit_proteins import fit_proteins, proteins_of
from pyro_multivi.posterior.calibration.fit_residual import fit_residuals
from pyro_multivi.posterior.calibration.fit_scale import fit_posterior_scale
from pyro_multivi.posterior.calibration.fit_shrinkage import fit_shrinkage
from pyro_multivi.posterior.calibration.fit_weights import fit_weight_posteriors
from pyro_multivi.posterior.calibration.refit import refit
from pyro_multivi.processes.group import current, distributed
from pyro_multivi.training import FitOptions, fit, resolve_device
from pyro_multivi.training.checkpoints.folder import Checkpoints
from pyro_multivi.training.checkpoints.run import Run
from pyro_multivi.training.cost.estimate import TrainingCost, timed_cost
from pyro_multivi.training.distributed.shared_steps import check_runs, share_weights
from pyro_multivi.training.optimizer import loadings
from pyro_multivi.training.options import Callback

#: Epochs of the model of a query: by twice as many, cells mix with those of the reference hardly better.
_QUERY_EPOCHS = 100
# Models whose training goes on.
_IN_TRAINING: WeakSet[Any] = WeakSet()


class TrainingMixin(ModelBase):
    """Methods that train a model and say how it went."""

    @takes(TRAIN, train_arguments)
    @isolated()
    @distributed()
    @checked
    def train(
        self,
        max_epochs: int | None = None,
        lr: float = 2e-3,
        accelerator: str = "auto",
        devices: int | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        weight_decay: float = 1e-3,
        eps: float = 1e-8,
        early_stopping: bool | None = None,
        check_val_every_n_epoch: int | None = 1,
        n_steps_kl_warmup: int | None = None,
        n_epochs_kl_warmup: int | None = 1,
        adversarial_mixing: bool | None = None,
        early_stopping_monitor: str = "elbo_validation",
        early_stopping_patience: int | None = None,
        early_stopping_min_delta: float = 0.0,
        gradient_clip: float | None = None,
        seed: int | None = None,
        callbacks: Sequence[Callback] = (),
        progress_bar: bool = True,
        elbo: ELBO | None = None,
        precision: str = "fp32",
        compile: bool = False,
        effect_sd: float | None = 1.0,
        average_steps: int | None = 100,
        adversarial_target: str = "modality",
        adversarial_weight: float = 1.0,
        adversarial_schedule: str = "warmup",
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | str | None = None,
        resume: bool | str | os.PathLike[str] = False,
        shuffle_block: int = SHUFFLE_BLOCK,
        shuffle_buffer: int = SHUFFLE_BUFFER,
        external_indexing: Sequence[Indices] | None = None,
    ) -> None:
        """Fit the model; call again to go on.

        At the end the model is calibrated, each part in a module of :mod:`pyro_multivi.posterior.calibration`:

        - The decoders' last layers are fitted once more, under a prior of which the data choose the widths. Held-out
          cells choose how far. The history is of the weights before.
        - The standard deviations of the posterior are corrected.
        - For intervals: a posterior of the last layers, the variation between cells that the latent state does not
          explain, and the spread of the background of proteins.
        - For imputation: how the sequencing depth of one modality follows from the other, from cells of both, and from
          those that were held out a weight of the mean of the measured.

        Without held-out cells (``train_size=1``, and the default of a query's model) the last layers stay as they were
        trained, and their weights count as no more uncertain than the training cells say. Then, and with fewer than two
        held-out cells of both modalities, what is imputed is not drawn towards the mean of the measured, whatever was
        calibrated before: a log line at level INFO says so. The model of a query whose encoders are frozen, as by
        default, keeps the calibration of its reference.

        Parameters
        ----------
        max_epochs
            Passes over the training cells at most. Default: 500, or 100 for the model of a query. 0: the model is that
            of the linear start, or the one it was, and is calibrated; that of a query stays as it is.
        lr, weight_decay, eps
            Learning rate of Adam (0: weights stay as they start), its weight decay (of the weight matrices other than
            loadings), the constant in its denominator.
        accelerator, devices
            ``"auto"`` (a GPU if there is one), ``"cpu"``, ``"gpu"`` or ``"cuda"``; number of the GPU.
        train_size, validation_size
            Shares of the cells; default 0.9 and the rest, or all cells of a query that is trained without early
            stopping. Going on keeps the cells of the first call unless a share is given; a cell once trained on is
            never held out again. Where cells are held out, the weights of the epoch that is best for them are kept.
        shuffle_set_split
            Choose validation cells at random. False: the first cells, and those behind them are trained on.
        batch_size
            Cells per step. Default: ``pyro_multivi.settings.batch_size``, or 128, fewer for small data, so that an
            epoch has some 16 steps.
        early_stopping, early_stopping_monitor, early_stopping_patience, early_stopping_min_delta
            Stop when a column of :attr:`history` no longer falls. Without validation cells there is
            nothing to monitor and all epochs are run. Default: True, but for the model of a query. Patience is in
            scored epochs; by default 10 with a hundred held-out cells or more, up to 30 with fewer, whose scores are
            noisier.
        check_val_every_n_epoch
            Epochs from one scoring of the validation cells to the next; they are always scored after the last one.
            None is 1.
        n_epochs_kl_warmup, n_steps_kl_warmup
            Length of the linear KL warm-up; steps take precedence. By default the first epoch goes without KL
            terms and the others have them whole.
        gradient_clip
            Largest norm of the gradient; None does not clip.
        seed
            Seed of the split, the order of cells and the noise: same seed, same device, same torch: same curve.
            Default: ``pyro_multivi.settings.seed``, or 0.
        callbacks
            Functions ``(epoch, row, program)``, called after each epoch, when the program has the weights that it
            would have if training ended; True stops training. One may call :meth:`save`, to keep what a killed
            training had learned; the optimizer's state and the calibration at the end of training are not in it.
        progress_bar
            Show a bar.
        elbo
            A Pyro ELBO in place of ``TraceMeanField_ELBO``.
        precision
            ``"fp32"``, or ``"bf16"``: the decoders' large matrix products in bfloat16, everything else
            in float32. Faster where the processor has bfloat16 arithmetic (AVX512-BF16, AMX, GPU).
        compile
            True: on a CPU, likelihoods and first layers run as loops that Numba compiles (extra ``compile``), the
            first time in some 15 s. The same numbers to rounding, in about four fifths of the time.
        effect_sd
            Before any data are seen, cells differ by about this much in the logit (nats) of a feature: it sets the
            Normal prior of the loadings, the weights of the decoders' last layers, to whose posterior mode
            the model is fitted. It keeps features of which the data say little near their mean over all
            cells, and matters less the more cells there are. None: no prior.
        average_steps
            The model has the average of the weights after so many of the latest steps (of the last tenth of them while
            that is less), which fits better and varies less than the latest weights; validation cells are scored with
            it. From the 100th step on it takes the memory of one more copy of the weights. None: the latest weights.
        adversarial_mixing
            True: a classifier predicts the origin of a cell from its latent state, and the model is penalised for what
            it can tell (:class:`~pyro_multivi.training.adversary.Adversary`). None is False. The classifier belongs to
            this call and its checkpoints: it is not saved, and a later call starts a new one. Where all training cells
            are of one origin there is nothing to mix: a warning says so, and training goes on without it.
        adversarial_target
            The origin: ``"modality"``, what was measured in a cell, or ``"batch"``. (The target of
            scvi-tools is always its batch.)
        adversarial_weight, adversarial_schedule
            Weight of the penalty, which is in nats per cell; ``"warmup"``: it grows with that of the KL
            terms, or ``"constant"``. With a weight of 0 there is no adversary.
        checkpoint
            Folder for the state of training, so that a process that ends does not lose it: weights, optimizer, average,
            best weights, early stopping, random states, place in the epoch and history. The latest two checkpoints are
            kept (some five times the weights each); one is written at the start, at the end, and before SIGTERM or
            Ctrl-C act. Where one cannot be written, for instance to a full disk, training goes on with a warning, and
            those before stay.
        checkpoint_every
            A whole number of epochs, or minutes (``"30 min"``), from one checkpoint to the next. Default: ten minutes.
        resume
            True: go on from the latest checkpoint in ``checkpoint``, in another process too, with a model made of the
            same data by the same arguments. History (but for ``seconds``) and weights are then those of a training that
            was never interrupted, on a CPU with as many threads bit by bit. Where there is no checkpoint yet, a warning
            says that training starts from the beginning. A path: that of the folder, in which there must be one.
        shuffle_block, shuffle_buffer
            Of data on disk, cells are shuffled by blocks: ``shuffle_block`` cells in a row are read at once, and those
            of ``shuffle_buffer`` such blocks from all over the data are shuffled among themselves; twice as many are in
            memory. Where neighbours in the file are alike, for instance sorted by sample, the share of a sample in a
            buffer varies as in a random sample of ``shuffle_buffer`` cells. Smaller blocks and more of them mix better
            and read more slowly. Without effect on data in memory.
        external_indexing
            Lists of the cells of training, validation and test, in place of the choice by ``train_size``,
            ``validation_size`` and ``shuffle_set_split``: positions, names or masks; the last two may be left out,
            empty or None. Together they hold every cell once. Going on without it keeps these cells.

        Notes
        -----
        The model of a query (:meth:`~pyro_multivi.MULTIVI.load_query_data`) has few parameters to train and few cells
        to hold out, whose ELBO stops falling long before the new batch is aligned. So all its cells are trained on, for
        a fixed number of epochs, unless arguments say otherwise.

        State of callbacks is not in a checkpoint.

        In a script under torchrun, or with an initialised process group of ``torch.distributed``, the processes share
        the training: each makes the same model of the same data and calls this with the same arguments.
        ``batch_size`` counts the cells of all of them; penalties that compare cells (contrast, mixing, MMD) and batch
        statistics are those of each share. All end with the same weights and history. Callbacks are called in each
        process; True in one of them stops all.

        Arguments of scvi-tools and of Lightning's Trainer that are not above (``plan_kwargs``, ``datasplitter_kwargs``,
        ``enable_progress_bar``, ``logger``, ...) are taken too: as ours where there is one, left out with a warning, or
        refused with what to use. tutorials/from_scvi_tools.md has the table.

        Raises
        ------
        ValueError
            If an argument is out of range, a fully paired model has cells that lack a modality, or the checkpoint to go
            on from is of another run, or processes that share the training were given different data or arguments: the
            message names the options, versions and data that differ.
        FileExistsError
            If ``checkpoint`` holds checkpoints and ``resume`` is False.
        ImportError
            If ``compile=True`` and Numba is missing.
        RuntimeError
            If another process writes checkpoints to the folder, or a callback trains the model that is in training.
        ContractError
            If model and guide of a custom program do not fit together.
        TrainingDiverged
            If the loss becomes NaN; the model goes back to its best weights.
        """
        if self in _IN_TRAINING:
            raise RuntimeError(
                "This model is in training: train() may not be called by a callback of its own. Return True from the "
                "callback, which stops the training, and call train() again after it."
            )
        is_query = self._training is not None
        if not is_query:
            tell_difference("train")
        max_epochs = (_QUERY_EPOCHS if is_query else FitOptions.max_epochs) if max_epochs is None else max_epochs
        early_stopping = not is_query if early_stopping is None else early_stopping
        seed, processes = settings.seed_or(seed), current()
        options = FitOptions.from_arguments(locals())
        # First: a model that a callback saves or asks for results has the weights of a whole epoch.
        options = replace(options, callbacks=(self._mark_trained, *options.callbacks))
        checkpoints = Checkpoints.wanted(checkpoint, checkpoint_every, resume)
        table = self._training_table()
        check_counts(table)
        listed = None if external_indexing is None else divide_cells(external_indexing, table.cell_names)
        if listed is not None and (train_size, validation_size) != (None, None):
            caution("train_size and validation_size have no effect: external_indexing lists the cells.")
        if self.program.config.fully_paired and not is_query:
            extra = [modality.name for modality in self.program.modelled_extra]
            check_paired(table, extra, "train on paired cells only, or make another model by MULTIVI(adata).")
        if self._training is not None and not (self._training.parts and max_epochs):
            if max_epochs:
                caution(
                    "Nothing is trained: the query has no new batch or category, and all else in its model is frozen. "
                    "It is ready as it is; load_query_data(..., freeze_expression=False) chooses more to be trained."
                )
            return
        device = resolve_device(accelerator, devices)
        batch_size = batch_size or settings.batch_size or default_batch_size(len(table))
        if checkpoints is not None or processes.are_several:
            features = [name for each in MODALITIES for name in each.feature_names_in(self.spec)]
            run = Run.of(
                self.program, table, features, options, listed, train_size=train_size, validation_size=validation_size,
                shuffle_set_split=shuffle_set_split, batch_size=batch_size, device=device.type,
                **({"processes": processes.size} if processes.are_several else {}),
                **({"shuffle_block": shuffle_block, "shuffle_buffer": shuffle_buffer} if table.on_disk else {}),
            )  # fmt: skip
            checkpointed = {"checkpoint": "none" if checkpoints is None else "given"}
            check_runs(processes, run.after(self._history.n_epochs, self._optimizer_state, **checkpointed))
        try:
            _IN_TRAINING.add(self)
            if checkpoints is not None:
                checkpoints.open(run)
            if checkpoints is not None and checkpoints.split is not None:
                split = replace(checkpoints.split, cell_names=table.cell_names)
            else:
                sizes = train_size, validation_size, 1.0 if is_query and not early_stopping else None
                split = self._choose_split(table, listed, *sizes, shuffle_set_split, seed)
            if checkpoints is not None:
                checkpoints.split = split
            source = resident_if_it_fits(table, device)
            batches = partial(
                Minibatches, source, batch_size=batch_size, device=device, shuffle_block=shuffle_block,
                shuffle_buffer=shuffle_buffer,
            )  # fmt: skip
            train = batches(split.train, shuffle=True, seed=seed + self._history.n_epochs)
            validation = batches(split.validation) if len(split.validation) else None
            known = self._whole_split
            if known is not None:
                split = replace(split, trained_elsewhere=known.trained_besides(table.cell_names))
            self._split, self._saved_split = split, None
            with refit(self.program, lambda: self._history.n_epochs) if self._recalibrates else nullcontext():
                self._history, self._optimizer_state = fit(
                    self.program, train, validation, options, self._history, self._optimizer_state, checkpoints
                )
            self.is_trained = True
            if not max_epochs and not any(bool(weight.any()) for weight in loadings(self.program).values()):
                caution(
                    "max_epochs=0 leaves a model whose expression and accessibility do not depend on the state, for no "
                    "linear model could be made of these cells: train it for some epochs."
                )
            self._calibrate(batches(split.train), validation, progress_bar and processes.is_first)
            share_weights(processes, self.program)
        finally:
            _IN_TRAINING.discard(self)
            if checkpoints is not None:
                checkpoints.close()
            self.is_trained = self.is_trained or self._history.n_epochs > 0

    @property
    def _recalibrates(self) -> bool:
        """Whether training changes the encoders, whose calibration the model of a query has from its reference."""
        return self._training is None or self._training.changes_encoders

    def _choose_split(
        self,
        table: CellTable,
        listed: tuple[Tensor, Tensor, Tensor] | None,
        train_size: float | None,
        validation_size: float | None,
        default_size: float | None,
        shuffle: bool,
        seed: int,
    ) -> Split:
        """Choose the cells to train on and to hold out: those of the training before, unless sizes or lists say so."""
        if listed is not None:
            return Split.listed(listed, self._split, table.cell_names)
        are_given = (train_size, validation_size) != (None, None)
        if self._split is not None and len(self._split.train) and not are_given:
            return self._split
        size = train_size if are_given else default_size
        return Split.of(len(table), size, validation_size, shuffle, seed, self._split, table.cell_names)

    def _calibrate(self, train: Minibatches, held_out: Minibatches | None, progress_bar: bool) -> None:
        """Calibrate the trained program, but for what Ctrl-C interrupts."""
        if progress_bar:
            tqdm.write(f"{self._history.ending}; calibration follows", file=sys.stderr)
        for calibrate in tqdm(self._calibrations(train, held_out), "calibration", disable=not progress_bar):
            try:
                calibrate()
            except KeyboardInterrupt:
                # Its part is left out, as a log line has said; the others are no less right for it.
                self._history.interrupted = True

    def _calibrations(self, train: Minibatches, held_out: Minibatches | None) -> list[Callable[[], None]]:
        """Calls that calibrate the trained program, in their order."""
        if not self._recalibrates:
            return []
        program = self.program
        calls: list[Callable[[], None]] = [
            # The loadings first: the others are of the decoders that they give.
            partial(fit_loadings, program, train, held_out),
            partial(fit_posterior_scale, program, train),
            partial(fit_weight_posteriors, program, train, held_out),
            partial(fit_residuals, program, train),
        ]
        if proteins_of(program):
            calls.append(partial(fit_proteins, program, train))
        if len(modelled(self.spec)) > 1:
            calls.append(partial(fit_depth_regressions, program, train, held_out))
            calls.append(partial(fit_shrinkage, program, train, held_out))
        return calls

    def _training_cost(
        self, accelerator: str, batch_size: int | None, options: FitOptions, seed: int, *, checkpoint: bool, timed: bool
    ) -> TrainingCost:
        """Estimate what :meth:`train` takes; the few steps that are ``timed`` change the weights of this model."""
        table, device = self._training_table(), resolve_device(accelerator)
        batch_size = batch_size or settings.batch_size or default_batch_size(len(table))
        split = Split.of(len(table), None, None, True, seed)
        batches = partial(Minibatches, resident_if_it_fits(table, device), batch_size=batch_size, device=device)
        train, validation = batches(split.train, shuffle=True, seed=seed), batches(split.validation)
        if not timed:
            return TrainingCost.of_sizes(self.program, train, options, checkpoint)
        return timed_cost(self.program, train, validation, options, checkpoint)

    def _mark_trained(self, *_: Any) -> None:
        self.is_trained = True
