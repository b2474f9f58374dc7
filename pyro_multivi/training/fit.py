"""Training loop."""

from __future__ import annotations

import logging
import math
import signal
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from tqdm.auto import tqdm

from pyro_multivi.data.checks import check_type, checked, shown
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions.kernels.numba.switch import compiled_loops
from pyro_multivi.isolation import Interruption, PyroState, isolated, uninterrupted
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
from pyro_multivi.training.divergence import DivergenceMonitor, diagnose
from pyro_multivi.training.history import History, Stopwatch
from pyro_multivi.training.objective import NegativeELBO
from pyro_multivi.training.optimizer import make_optimizer
from pyro_multivi.training.options import FitOptions
from pyro_multivi.training.schedules import EarlyStopping, default_patience, kl_weight

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
    history = history if history is not None else History()
    state = None if checkpoints is None else checkpoints.take_state()
    first = history.n_epochs if state is None else int(state["position"]["first"])
    last = first + options.max_epochs
    program.to(train.device)
    if not first and state is None and processes.is_first:
        program.start_training_from(train)
    share_weights(processes, program)
    trained = [parameter for parameter in program.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(program, len(train.index), options, optimizer_state)
    adversary = Adversary.wanted(program, train, options)
    objective = NegativeELBO(program, options.elbo, adversary)
    patience = options.early_stopping_patience
    if validation is None or not options.early_stopping:
        patience = options.max_epochs + 1
    elif patience is None:
        patience = default_patience(validation.n_cells)
    stopping = EarlyStopping(options.early_stopping_monitor, patience, options.early_stopping_min_delta)
    # Without held-out cells no epoch is better than another, and a copy of all weights would be for nothing.
    best = None if validation is None else _Snapshot(program)
    average = RunningAverage(program, options.average_steps)
    if first and validation is not None and state is None:
        # Going on must not end worse than it began: the current weights are the first to beat.
        stopping.best = _scores(processes, program, validation).get(stopping.monitor, math.inf)
    # Without weights to go back to there is no way back from a step that is not a number.
    monitor = DivergenceMonitor(program, optimizer, train, check_gradients=best is None)
    interrupted = False
    pyro_state, watch = PyroState(), Stopwatch()
    at = Position(first, first, first * len(train), kept="those of before, which no epoch improved on")
    loop = Loop(
        at, program, objective.elbo, optimizer, average, None if best is None else best.state, stopping, monitor,
        adversary, history, train, watch,
    )  # fmt: skip
    losses = [] if state is None else loop.restore(state)
    bar = tqdm(
        range(at.epoch, at.epoch if at.reason else last), desc="training", unit="epoch", initial=at.epoch - first,
        total=options.max_epochs, disable=not (options.progress_bar and processes.is_first),
    )  # fmt: skip
    loops = compiled_loops() if options.compile else nullcontext()
    # Torch's global generators stay as they were.
    forked = torch.random.fork_rng(devices=[train.device] if train.device.type == "cuda" else [])
    ended = nullcontext(Interruption(signal.SIGTERM, None)) if checkpoints is None else uninterrupted(signal.SIGTERM)
    with forked, loops, bar, uninterrupted() as interruption, ended as termination:
        torch.manual_seed(processes.seed(options.seed + first))
        if state is not None:
            loop.restore_noise(state)
        state = None  # as large as the model and all that is kept beside it
        program.use_precision(options.precision)

        def between_steps(is_due: bool) -> None:
            """Write a checkpoint if it is due or if a signal waits, in any process, and let that act then."""
            is_due, interruption.waits, termination.waits = processes.any(
                is_due and processes.is_first, interruption.waits, termination.waits
            )
            waits = interruption.waits or termination.waits
            if checkpoints is not None and (is_due or waits):
                checkpoints.write(loop)
                watch.lap("checkpoints")
            if waits:
                # torchrun ends the first process, which writes, as soon as another has ended.
                processes.wait()
                termination.act()
                interruption.act()

        try:
            for epoch in bar:
                if not at.place:
                    at.started, losses = time.perf_counter(), []
                program.train()
                monitor.begin_epoch(epoch, losses)
                sizes = train.sizes()
                at.order = train.order_state
                for place, cells in enumerate(train.after(at.place), at.place):
                    watch.lap("minibatches")
                    at.weight = kl_weight(epoch, at.step, options.n_epochs_kl_warmup, options.n_steps_kl_warmup)
                    # Shapes and supports are checked once: on the first minibatch of this call.
                    validate = epoch == first and place == 0
                    # Before the loss: the likelihoods write their gradients into the memory this frees.
                    optimizer.zero_grad(set_to_none=True)
                    if validate:
                        check_contract(program, cells, options.elbo)
                        _check_monitor(program, cells, options, adversary)
                    try:
                        with pyro.validation_enabled(validate), _no_nan_warning():
                            loss = objective(cells, at.weight)
                    except ValueError as error:
                        # Pyro's validation refuses a NaN as well, in words that name no cell.
                        if validate and not _is_finite(objective, cells, at.weight):
                            raise diagnose(program, cells, epoch, place) from error
                        raise
                    loss.backward()
                    loss = sum_gradients(processes, trained, loss, len(cells) / sizes[place])
                    monitor.check_loss(loss, cells, place)
                    if validate:
                        warn_of_unlearned(program)
                    monitor.check_gradients()
                    if options.gradient_clip is not None:
                        torch.nn.utils.clip_grad_norm_(program.parameters(), options.gradient_clip)
                    optimizer.step()
                    if adversary is not None:
                        adversary.learn(len(cells) / sizes[place])
                    share_running_statistics(processes, program)
                    at.terms += sum_terms(processes, objective.last_terms(cells), sizes[place])
                    at.sizes.append(sizes[place])
                    at.place, at.step = place + 1, at.step + 1
                    average.update(at.step)
                    watch.lap("steps")
                    between_steps(checkpoints is not None and checkpoints.is_due())
                weighted = zip(monitor.end_epoch(), at.sizes, strict=True)
                row = {"train_loss": sum(v * n for v, n in weighted) / sum(at.sizes), "kl_weight": at.weight}
                row.update(_named(at.terms, "train"))
                if adversary is not None:
                    row.update(adversary.pop_record())
                watch.lap("steps")
                scores = (epoch + 1) % options.check_val_every_n_epoch == 0 or epoch + 1 == last
                with average.in_place():
                    if validation is not None and scores:
                        row.update(_scores(processes, program, validation))
                    row["seconds"] = processes.first(time.perf_counter() - at.started)
                    history.add(row)
                    bar.set_postfix({"loss": f"{row['train_loss']:.1f}"}, refresh=False)
                    scored = validation is not None and stopping.monitor in row
                    is_better = scored and stopping.update(row[stopping.monitor])
                    # Until there is a score, the current weights are the best known.
                    if best is not None and (is_better or stopping.best == math.inf):
                        best.take(program)
                        score = f", the best {stopping.monitor}" if is_better else ""
                        at.kept = f"those of epoch {epoch + 1}{score}{_averaged(average)}"
                    watch.lap("validation")
                    # Every callback is called, also after one that stops.
                    with alone():
                        answers = [callback(epoch, row, program) for callback in options.callbacks]
                    watch.lap("callbacks")
                at.end_epoch()
                if processes.any(any(answers))[0]:
                    at.reason = "a callback stopped it"
                elif stopping.exhausted:
                    at.reason = f"{stopping.monitor} has not improved for {stopping.patience} epochs"
                elif at.epoch == last:
                    at.reason = "max_epochs is reached"
                is_due = checkpoints is not None and checkpoints.is_due(at.epoch - first)
                between_steps(is_due or bool(at.reason))
                if at.reason:
                    break
        except KeyboardInterrupt:
            # A second Ctrl-C may have left a plate of the model open.
            pyro_state.restore()
            interrupted, at.reason = True, "interrupted"
            logger.warning("interrupted in epoch %d; the model is usable", history.n_epochs + 1)
        finally:
            # Also after an error: the program must never stay at weights that diverged. Only what was
            # learned in an interrupted first epoch is kept, for want of anything better.
            moments = optimizer.state_dict()
            optimizer.zero_grad(set_to_none=True)
            if best is not None and (history.n_epochs > first or not interrupted):
                best.restore(program)
            else:
                at.kept = f"the latest{_averaged(average)}"
                average.settle()
            program.use_precision("fp32")
            program.eval()
    share_weights(processes, program)
    watch.lap("restoring")
    n_epochs = history.n_epochs - first
    history.ending = f"trained {n_epochs} epochs in {watch}: {at.reason}; its weights are {at.kept}"
    history.interrupted = interrupted
    logger.info(history.ending)
    return history, moments


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


@torch.no_grad()
def _is_finite(objective: NegativeELBO, cells: Cells, weight: float) -> bool:
    with pyro.validation_enabled(False), _no_nan_warning():
        return math.isfinite(objective(cells, weight).item())


@contextmanager
def _no_nan_warning() -> Iterator[None]:
    """Without Pyro's warning of a NaN loss: the loop raises an error that says more."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered (NaN|.*inf)", category=UserWarning)
        yield
