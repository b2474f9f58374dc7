"""Training loop."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_multivi.data.checks import check_type, checked, shown
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions.kernels.numba.switch import compiled_loops
from pyro_multivi.isolation import Interruption, PyroState, generators_kept, isolated, uninterrupted
from pyro_multivi.processes.group import Processes, alone, current, distributed
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import Terms, evaluation_mode, measure
from pyro_multivi.training.adversary import RECORDED, Adversary
from pyro_multivi.training.averaging import RunningAverage
from pyro_multivi.training.checkpoints.folder import Checkpoints
from pyro_multivi.training.checkpoints.loop import Loop, Position
from pyro_multivi.training.contract import check_contract, warn_of_unlearned
from pyro_multivi.training.distributed.shared_steps import (
    check_processes,
    share_running_statistics,
    share_weights,
    sum_gradients,
    sum_terms,
)
from pyro_multivi.training.divergence import DivergenceMonitor, loss_of
from pyro_multivi.training.history import History, Stopwatch
from pyro_multivi.training.objective import NegativeELBO
from pyro_multivi.training.optimizer import UnreachedWeights, make_optimizer
from pyro_multivi.training.options import FitOptions
from pyro_multivi.training.schedules import EarlyStopping, kl_weight

logger = logging.getLogger("pyro_multivi")

# The noise of the validation pass: the same each epoch, so that epochs can be compared.
_VALIDATION_SEED = 20_230_629


@isolated()
@distributed()
def fit(
    program: MultiVIProgram,
    train: Minibatches,
    validation: Minibatches | None = None,
    options: FitOptions | None = None,
    history: History | None = None,
    optimizer_state: dict[str, Any] | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[History, dict[str, Any]]:
    """Minimise minus the ELBO of ``program`` over minibatches.

    Among several processes (:func:`~pyro_multivi.processes.group.distributed`), each of which is given all minibatches,
    each takes a share of the cells of every minibatch. All end with the same weights and history.

    The weights of the best epoch (by ``early_stopping_monitor``, with or without stopping early) are
    restored at the end when there are validation cells. Ctrl-C ends training the same way: it acts between steps, a
    second one within them. ``history.ending`` says why training ended.

    Parameters
    ----------
    program
        Trained in place, on the device of the minibatches.
    train, validation
        Minibatches of the two sets of cells.
    options
        Default: :class:`FitOptions`.
    history, optimizer_state
        Results of an earlier call, to go on from there.
    checkpoints
        Where to write checkpoints, opened; if that found one, training goes on from it and replaces the history.

    Returns
    -------
    history, optimizer_state

    Raises
    ------
    ContractError
        If model and guide do not fit together: checked on the first minibatch.
    TypeError, ValueError
        If an argument is of the wrong type, or ``early_stopping_monitor`` is no column of the history.
    TrainingDiverged
        If the loss is not finite; the message names the site and the cells. The program goes back to
        its best weights (without validation cells, it stays at the last finite ones).
    """
    check_type("program", program, MultiVIProgram)
    check_type("train", train, Minibatches)
    for name, value, kind in (
        ("validation", validation, Minibatches),
        ("options", options, FitOptions),
        ("history", history, History),
        ("optimizer_state", optimizer_state, dict),
        ("checkpoints", checkpoints, Checkpoints),
    ):
        if value is not None:
            check_type(name, value, kind, ", or leave it out")
    options, processes = options or FitOptions(), current()
    check_processes(processes, program, train, validation, options)
    train = train.shared(processes.rank, processes.size)
    state = None if checkpoints is None else checkpoints.take_state()
    fitting = _Fitting(program, train, validation, options, history or History(), optimizer_state, checkpoints, state)
    at, pyro_state = fitting.at, PyroState()
    bar = tqdm(
        range(at.epoch, at.epoch if at.reason else fitting.last), desc="training", unit="epoch",
        initial=at.epoch - fitting.first, total=options.max_epochs,
        disable=not (options.progress_bar and processes.is_first),
    )  # fmt: skip
    loops = compiled_loops() if options.compile else nullcontext()
    ended = nullcontext(fitting.termination) if checkpoints is None else uninterrupted(signal.SIGTERM)
    interrupted = False
    kept = generators_kept(train.device)
    with kept, loops, bar, uninterrupted() as fitting.interruption, ended as fitting.termination:
        torch.manual_seed(processes.seed(options.seed + fitting.first))
        if state is not None:
            fitting.loop.restore_noise(state)
        state = None  # as large as the model and all that is kept beside it
        program.use_precision(options.precision)
        try:
            for epoch in bar:
                fitting.take_steps(epoch)
                row = fitting.end_epoch(epoch)
                bar.set_postfix({"loss": f"{row['train_loss']:.1f}"}, refresh=False)
                is_due = checkpoints is not None and checkpoints.is_due(at.epoch - fitting.first)
                fitting.between_steps(is_due or bool(at.reason))
                if at.reason:
                    break
        except KeyboardInterrupt:
            # A second Ctrl-C may have left a plate of the model open.
            pyro_state.restore()
            interrupted, at.reason = True, "interrupted"
            logger.warning("interrupted in epoch %d; the model is usable", fitting.history.n_epochs + 1)
        finally:
            # Also after an error: the program must never stay at weights that diverged.
            moments = fitting.settle(interrupted)
    share_weights(processes, program)
    fitting.watch.lap("restoring")
    n_epochs = fitting.history.n_epochs - fitting.first
    trained = f"trained {n_epochs} epochs in {fitting.watch}"
    fitting.history.ending = f"{trained}: {at.reason}; the model's weights are {at.kept}"
    fitting.history.interrupted = interrupted
    logger.info(fitting.history.ending)
    return fitting.history, moments


class _Fitting:
    """One call of :func:`fit`.

    Attributes
    ----------
    first, last
        Numbers of epochs before it, and after it at most.
    loop, at
        Everything that it changes, and where it stands between two steps.
    best
        Copy of the best weights so far. None without held-out cells: no epoch is better than another, and a copy of all
        weights would be for nothing.
    interruption, termination
        Signals that wait for the end of a step.
    """

    def __init__(
        self,
        program: MultiVIProgram,
        train: Minibatches,
        validation: Minibatches | None,
        options: FitOptions,
        history: History,
        optimizer_state: dict[str, Any] | None,
        checkpoints: Checkpoints | None,
        state: dict[str, Any] | None,
    ) -> None:
        self.program, self.train, self.validation, self.options = program, train, validation, options
        self.history, self.checkpoints, self.processes = history, checkpoints, current()
        self.interruption = Interruption(signal.SIGINT, None)
        self.termination = Interruption(signal.SIGTERM, None)
        self.first = history.n_epochs if state is None else int(state["position"]["first"])
        self.last = self.first + options.max_epochs
        program.to(train.device)
        if not self.first and state is None and self.processes.is_first:
            program.start_training_from(train)
        share_weights(self.processes, program)
        self.trained = [parameter for parameter in program.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(program, len(train.index), options, optimizer_state)
        self.unreached = UnreachedWeights(program, train)
        self.adversary = Adversary.wanted(program, train, options)
        self.objective = NegativeELBO(program, options.elbo, self.adversary)
        self.stopping = EarlyStopping.wanted(options, None if validation is None else validation.n_cells)
        self.best = None if validation is None else _Snapshot(program)
        self.average = RunningAverage(program, options.average_steps)
        if self.first and validation is not None and state is None:
            # Going on must not end worse than it began: the current weights are the first to beat.
            self.stopping.best = _scores(self.processes, program, validation).get(self.stopping.monitor, math.inf)
        # Without weights to go back to there is no way back from a step that is not a number.
        self.monitor = DivergenceMonitor(program, self.optimizer, train, check_gradients=self.best is None)
        self.watch = Stopwatch()
        kept = "those of before, which no epoch improved on"
        reason = "" if options.max_epochs else "max_epochs is 0"
        self.at = Position(self.first, self.first, self.first * len(train), kept, reason)
        self.loop = Loop(
            self.at, program, self.objective.elbo, self.optimizer, self.average,
            None if self.best is None else self.best.state, self.stopping, self.monitor, self.adversary, history, train,
            self.watch,
        )  # fmt: skip
        # Of the minibatches that were done of its epoch when a checkpoint was written.
        self._losses = [] if state is None else self.loop.restore(state)

    def take_steps(self, epoch: int) -> None:
        """Take the steps of an epoch, or those that are left of it after a checkpoint within it."""
        at = self.at
        if not at.place:
            at.started, self._losses = time.perf_counter(), []
        self.program.train()
        self.monitor.begin_epoch(epoch, self._losses)
        sizes = self.train.sizes()
        at.order = self.train.order_state
        for place, cells in enumerate(self.train.after(at.place), at.place):
            self.watch.lap("minibatches")
            self._step(epoch, place, cells, sizes[place])
            self.watch.lap("steps")
            self.between_steps(self.checkpoints is not None and self.checkpoints.is_due())

    def _step(self, epoch: int, place: int, cells: Cells, n_cells: int) -> None:
        """Take a step by the minibatch at ``place``, which has ``n_cells`` in all processes together."""
        at, options = self.at, self.options
        at.kl_weight = kl_weight(epoch, at.step, options.n_epochs_kl_warmup, options.n_steps_kl_warmup)
        # Shapes and supports are checked once: on the first minibatch of this call.
        validate = epoch == self.first and place == 0
        # Before the loss: the likelihoods write their gradients into the memory this frees.
        self.optimizer.zero_grad(set_to_none=True)
        if validate:
            check_contract(self.program, cells, options.elbo)
            _check_monitor(self.program, cells, options, self.adversary)
        loss = loss_of(self.objective, cells, at.kl_weight, epoch, place, validate=validate)
        loss.backward()
        share = len(cells) / n_cells
        loss = sum_gradients(self.processes, self.trained, loss, share)
        self.monitor.check_loss(loss, cells, place)
        if validate:
            warn_of_unlearned(self.program)
        self.monitor.check_gradients()
        if options.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.program.parameters(), options.gradient_clip)
        self.unreached.step(self.optimizer)
        if self.adversary is not None:
            self.adversary.learn(share)
        share_running_statistics(self.processes, self.program)
        at.terms += sum_terms(self.processes, self.objective.last_terms(cells), n_cells)
        at.sizes.append(n_cells)
        at.place, at.step = place + 1, at.step + 1
        self.average.update(at.step)

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Score an epoch, add its row to the history and return it, and find out whether training ends."""
        at, options = self.at, self.options
        weighted = zip(self.monitor.end_epoch(), at.sizes, strict=True)
        row = {"train_loss": sum(v * n for v, n in weighted) / sum(at.sizes), "kl_weight": at.kl_weight}
        row.update(_named(at.terms, "train"))
        if self.adversary is not None:
            row.update(self.adversary.pop_record())
        self.watch.lap("steps")
        with self.average.in_place():
            if self.validation is not None and self._is_scored(epoch):
                row.update(_scores(self.processes, self.program, self.validation))
            row["seconds"] = self.processes.first(time.perf_counter() - at.started)
            self.history.add(row)
            self._keep_best(epoch, row)
            self.watch.lap("validation")
            # Every callback is called, also after one that stops. What one draws is no part of training.
            with alone(), generators_kept(self.train.device):
                answers = [callback(epoch, row, self.program) for callback in options.callbacks]
            self.watch.lap("callbacks")
        at.end_epoch()
        if self.processes.any(any(answers))[0]:
            at.reason = "a callback stopped it"
        elif self.stopping.exhausted:
            at.reason = f"{self.stopping.monitor} has not improved for {self.stopping.patience} epochs"
        elif at.epoch == self.last:
            at.reason = "max_epochs is reached"
        return row

    def _is_scored(self, epoch: int) -> bool:
        every = self.options.check_val_every_n_epoch
        assert every is not None, "FitOptions puts 1 in its place"
        return (epoch + 1) % every == 0 or epoch + 1 == self.last

    def _keep_best(self, epoch: int, row: dict[str, float]) -> None:
        """Copy the weights if they are better than all before; until there is a score, the latest are."""
        if self.best is None:
            return
        monitor = self.stopping.monitor
        is_better = monitor in row and self.stopping.update(row[monitor])
        if is_better or self.stopping.best == math.inf:
            self.best.take(self.program)
            score = f", the best {monitor}" if is_better else ""
            self.at.kept = f"those of epoch {epoch + 1}{score}{_averaged(self.average)}"

    def between_steps(self, is_due: bool) -> None:
        """Write a checkpoint if it is due or if a signal waits, in any process, and let that act then."""
        is_due, self.interruption.waits, self.termination.waits = self.processes.any(
            is_due and self.processes.is_first, self.interruption.waits, self.termination.waits
        )
        waits = self.interruption.waits or self.termination.waits
        if self.checkpoints is not None and (is_due or waits):
            self.checkpoints.write(self.loop)
            self.watch.lap("checkpoints")
        if waits:
            # torchrun ends the first process, which writes, as soon as another has ended.
            self.processes.wait()
            self.termination.act()
            self.interruption.act()

    def settle(self, interrupted: bool) -> dict[str, Any]:
        """Leave the program with the best weights, ready to be used; return the optimizer's state.

        Only what was learned in an interrupted first epoch is kept, for want of anything better. A model that was
        trained before has better weights: it goes back to those.
        """
        moments = self.optimizer.state_dict()
        self.optimizer.zero_grad(set_to_none=True)
        if self.best is not None and (self.history.n_epochs or not interrupted):
            self.best.restore(self.program)
        else:
            self.at.kept = f"the latest{_averaged(self.average)}"
            self.average.settle()
        self.program.use_precision("fp32")
        self.program.eval()
        return moments


def _scores(processes: Processes, program: MultiVIProgram, validation: Minibatches) -> dict[str, float]:
    """Columns of the history on validation cells, of which each process scores a share; all where they are few."""
    share = validation.n_cells >= 2 * processes.size
    cells = validation.shared(processes.rank, processes.size) if share else validation
    terms = evaluate(program, cells, processes.seed(_VALIDATION_SEED) if share else _VALIDATION_SEED)
    n_scored = validation.n_cells * (1 if share else processes.size)
    return _named(sum_terms(processes, terms, n_scored), "validation")


@checked
def evaluate(program: MultiVIProgram, cells: Iterable[Cells], seed: int = _VALIDATION_SEED) -> Terms:
    """Terms of the ELBO over minibatches, in evaluation mode, with noise of its own."""
    check_type("program", program, MultiVIProgram)
    if isinstance(cells, Cells) or not isinstance(cells, Iterable):
        raise TypeError(f"cells={shown(cells)} is not allowed: give minibatches, for one a list of it.")
    terms = Terms()
    with evaluation_mode(program):
        torch.manual_seed(seed)
        for minibatch in cells:
            terms += measure(program, minibatch)
    return terms


def _check_monitor(program: MultiVIProgram, cells: Cells, options: FitOptions, adversary: Adversary | None) -> None:
    """Refuse a column that the history will not have, before anything is learned."""
    if options.early_stopping_monitor == FitOptions.early_stopping_monitor:
        return
    terms = evaluate(program, [cells])
    known = ["train_loss", "kl_weight", *_named(terms, "train"), *_named(terms, "validation")]
    if adversary is not None:
        known += RECORDED
    if options.early_stopping_monitor not in known:
        raise ValueError(
            f"early_stopping_monitor={options.early_stopping_monitor!r} is not recorded; choose one of "
            f"{', '.join(known)}."
        )


class _Snapshot:
    """Copy of the best weights so far, at first of those at the start."""

    def __init__(self, program: MultiVIProgram) -> None:
        self.state = {name: value.detach().clone() for name, value in program.state_dict().items()}

    def take(self, program: MultiVIProgram) -> None:
        for name, value in program.state_dict().items():
            self.state[name].copy_(value)

    def restore(self, program: MultiVIProgram) -> None:
        program.load_state_dict(self.state)


def _averaged(average: RunningAverage) -> str:
    return " (averaged over the steps before)" if average.has_begun else ""


def _named(terms: Terms, split: str) -> dict[str, float]:
    return {f"{name}_{split}": value for name, value in terms.per_cell().items()}
