"""Kill training at random moments and go on from its checkpoints: the same history and weights, bit by bit.

    python benchmarks/kill_training.py --kills 20

Each trial trains in a process of its own, which SIGKILL, SIGTERM or SIGINT ends at a random moment (in every third
trial while a checkpoint is written), and goes on in another with a model made anew. A trial is at fault if a history, a
weight or anything that is calibrated after training differs from a training that was never interrupted, if a kill lost
more than an epoch, or if anything but checkpoints is left.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # this process forks

import argparse
import json
import random
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData

import pyro_multivi as pm

#: Ways to train; in each an epoch has seven steps or more.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "early stopping": {"early_stopping_patience": 2, "early_stopping_min_delta": 1.0},
    "no validation": {"train_size": 1.0, "gradient_clip": 10.0},
    "adversary": {"adversarial_mixing": True, "n_steps_kl_warmup": 30},
    "rare scores": {"check_val_every_n_epoch": 4, "average_steps": None},
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def main() -> int:
    """Run the trials and print what was found; 1 if anything was lost or differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--cells", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="tried in turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    third = options.cells // 3
    adata = pm.simulate_multiome((options.cells - 2 * third, third, third), n_genes=60, n_regions=100, n_batches=2)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    chance, found = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        expected: dict[str, tuple[dict[str, Any], float]] = {}
        for number in range(options.kills):
            name = options.settings[number % len(options.settings)]
            given = {"max_epochs": options.epochs, "batch_size": 16, "progress_bar": False, **SETTINGS[name]}
            if name not in expected:
                started = time.perf_counter()
                expected[name] = _result(adata, given, home), time.perf_counter() - started
            place = home / f"trial{number}"
            place.mkdir()
            end = SIGNALS[number % len(SIGNALS)]
            for what in _trial(place, adata, given, end, chance.random(), number % 3 == 1, *expected[name]):
                found[what] += 1
                print(f"{number + 1:4d} {name}, {end.name}: {what}", flush=True)
            shutil.rmtree(place)
    faults = sum(n for what, n in found.items() if what.startswith("FAULT"))
    print(f"{found['the same, bit by bit']} of {options.kills} the same, bit by bit; {faults} faults")
    return int(faults > 0)


def _train(adata: AnnData, given: dict[str, Any]) -> pm.MULTIVI:
    model = pm.MULTIVI(adata, n_hidden=12, n_latent=4)
    model.train(**given)
    return model


def _write(model: pm.MULTIVI, path: Path) -> None:
    history = {name: frame[name].tolist() for name, frame in model.history.items() if name != "seconds"}
    torch.save({"history": history, "weights": dict(model.program.state_dict())}, path)


def _result(adata: AnnData, given: dict[str, Any], place: Path) -> dict[str, Any]:
    """History and weights, trained in a process of its own."""
    path, notes = place / "result.pt", place / "notes"
    status = _wait(_fork(lambda: _write(_train(adata, given), path), notes))
    if status:
        raise RuntimeError(f"training ended with {status}: {notes.read_text() if notes.exists() else ''}")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    path.unlink()
    return found


def _trial(
    place: Path,
    adata: AnnData,
    given: dict[str, Any],
    end: signal.Signals,
    moment: float,
    while_writing: bool,
    expected: dict[str, Any],
    seconds: float,
) -> list[str]:
    """What happened: words, beginning with FAULT where it should not have."""
    folder, log, found = place / "checkpoints", place / "epochs", []
    given = {**given, "checkpoint": folder, "checkpoint_every": 1, "resume": True}

    def note(epoch: int, row: dict[str, float], program: Any) -> None:
        with log.open("a") as stream:
            stream.write(f"{epoch + 1}\n")

    def epochs_done() -> int:
        return len(log.read_text().split()) if log.exists() else 0

    def wait_for(what: Callable[[], bool]) -> None:
        while not what() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(1e-4)

    child = _fork(lambda: _train(adata, {**given, "callbacks": [note]}), place / "notes")
    epochs = moment * given["max_epochs"]
    wait_for(lambda: epochs_done() >= int(epochs))
    if while_writing:
        wait_for(lambda: any(folder.glob(".checkpoint-*")))
    else:
        time.sleep((epochs % 1) * seconds / given["max_epochs"])
    os.kill(child, end)
    _wait(child)
    done = epochs_done()
    there = [json.loads(path.read_text())["epoch"] for path in folder.glob("checkpoint-*/run.json")]
    writing = len(list(folder.glob(".checkpoint-*"))) > 0
    found.append(f"after {done} epochs, {len(there)} checkpoints{', one half written' if writing else ''}")
    if done - max(there, default=0) > 1:
        found.append(f"FAULT {done} epochs were done, and the checkpoints are of {there}")
    try:
        result = _result(adata, given, place)
    except RuntimeError as error:
        return [*found, f"FAULT {error}"]
    if _differences(expected, result):
        found.append(f"FAULT others: {_differences(expected, result)}")
    else:
        found.append("the same, bit by bit")
    if left := sorted(path.name for path in folder.iterdir() if path.name not in ("checkpoint-1", "checkpoint-2")):
        found.append(f"FAULT left: {left}")
    return found


def _differences(expected: dict[str, Any], result: dict[str, Any]) -> list[str]:
    names = [*expected["history"], *expected["weights"]]
    if [*result["history"], *result["weights"]] != names:
        return ["names"]
    # As text, in which NaN equals NaN and every bit of a number shows.
    others = [name for name, value in expected["history"].items() if repr(value) != repr(result["history"][name])]
    return others + [
        name for name, value in expected["weights"].items() if not torch.equal(value, result["weights"][name])
    ]


def _fork(work: Callable[[], Any], notes: Path) -> int:
    """Do it in a child; a traceback goes to a file."""
    # Held back until the child can take it: else it would unwind the parent's part of the program.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if child := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    status = 0
    try:
        # Where this runs in the background of a shell, it is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work()
    except BaseException:
        status = 1
        notes.write_text(traceback.format_exc())
    finally:
        os._exit(status)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    raise SystemExit(main())
