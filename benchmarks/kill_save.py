"""Kills of a process that saves a model: none may lose a model or leave anything behind.

A process saves a model with its data and is killed (SIGKILL), interrupted (SIGINT) or finds the disk full at a random
moment; then the folder is read. It must hold the earlier model (or nothing, at the first save) or the new one, whole:
tensors, description and data are compared with those of the two. Then a save without any disturbance must leave the
folder alone, without any hidden neighbour. Two processes that save to the same path are tried as well.

    python benchmarks/kill_save.py --kills 100

A full disk is a small tmpfs where one can be mounted (Linux, as root), otherwise a limit on the size of files.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # this process forks

import argparse
import collections
import logging
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import pyro_multivi as pm
from pyro_multivi import files

#: What happens to the writer, and what a signal is called in the table.
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGINT": signal.SIGINT}


class Trial:
    """Two versions of a model, a folder to save them in, and counts of what was found there."""

    def __init__(self, home: Path, n_cells: int, n_hidden: int) -> None:
        adata = pm.simulate_multiome((n_cells, 0, 0), n_genes=200, n_regions=400, seed=0)
        pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        self.model = pm.MULTIVI(adata, n_hidden=n_hidden)
        self.model.train(max_epochs=1, progress_bar=False, train_size=0.9)
        self.counts = adata.X.toarray()
        self.home, self.path = home, home / "model"
        self.seen: collections.Counter[str] = collections.Counter()

    def save(self, version: float) -> None:
        """Save the model with one parameter that tells the version."""
        with torch.no_grad():
            self.model.program.rna_log_depth.fill_(version)
        self.model.save(self.path, overwrite=True, save_anndata=True)

    def found(self) -> float | None:
        """Version at the path, None for no model; a model that is not whole raises."""
        try:
            loaded = pm.MULTIVI.load(self.path)
        except FileNotFoundError:
            return None
        expected = self.model.program.state_dict()
        for name, value in loaded.program.state_dict().items():
            if name != "rna_log_depth" and not torch.equal(value, expected[name]):
                raise AssertionError(f"{name} differs")
        if not np.array_equal(loaded.adata.X.toarray(), self.counts) or loaded.spec != self.model.spec:
            raise AssertionError("data differ")
        return float(loaded.program.rna_log_depth)

    def in_child(self, work: Callable[[], None]) -> int:
        """Process that does the work: exit status 0, 1 after OSError, 2 after KeyboardInterrupt."""
        # Held back until the child can take it: else it would unwind the parent's part of the program.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        if (pid := os.fork()) != 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            return pid
        status = 0
        try:
            logging.disable()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            work()
        except OSError:
            status = 1
        except KeyboardInterrupt:
            status = 2
        finally:
            os._exit(status)

    def judge(self, kind: str, allowed: set[float | None]) -> None:
        """Count what is there after a disturbance, and what is left after the next save."""
        hidden = [path for path in self.home.iterdir() if path != self.path]
        self.seen[f"{kind}: killed while a hidden folder was there"] += bool(hidden)
        try:
            version = self.found()
        except (pm.BrokenModelError, AssertionError, OSError) as error:
            self.seen[f"{kind}: LOST OR NOT WHOLE ({error})"] += 1
        else:
            names = {None: "none yet", 1.0: "the earlier one", 2.0: "the new one"}
            name = names.get(version, str(version)) if version in allowed else f"WRONG ({version})"
            self.seen[f"{kind}: {name}, whole"] += 1
        self.save(3.0)
        if self.found() != 3.0 or [path.name for path in self.home.iterdir()] != [self.path.name]:
            self.seen[f"{kind}: LEFTOVERS after the next save"] += 1

    def begin(self, first: bool) -> None:
        """An empty home, or one with the earlier version."""
        for path in self.home.iterdir():
            shutil.rmtree(path)
        if not first:
            self.save(1.0)


def killed(trial: Trial, n: int, random_moment: random.Random) -> None:
    """Signals at random moments of first saves and of overwriting."""
    trial.begin(first=True)
    started = time.perf_counter()
    for _ in range(3):
        trial.save(1.0)
    span = (time.perf_counter() - started) / 3
    for number in range(n):
        name = list(SIGNALS)[number % 2]
        first = number % 4 >= 2
        trial.begin(first)
        pid = trial.in_child(lambda: trial.save(2.0))
        time.sleep(random_moment.uniform(0, 1.3 * span))
        os.kill(pid, SIGNALS[name])
        os.waitpid(pid, 0)
        trial.judge(f"{name}, {'first save' if first else 'overwrite'}", {None if first else 1.0, 2.0})


def full(trial: Trial, n: int, random_size: random.Random) -> None:
    """Disks with room for the earlier model and a random part of the new one."""
    trial.begin(first=False)
    size = sum(path.stat().st_size for path in trial.path.iterdir())
    largest = max(path.stat().st_size for path in trial.path.iterdir())
    for number in range(n):
        first = number % 2 == 1
        room = int(size * random_size.uniform(0, 1.1))
        disk = trial.home / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room + (0 if first else 2 * size)}", "tmpfs", str(disk)]
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
        trial.home, trial.path = disk, disk / "model"
        try:
            trial.begin(first)
            filler = disk / "filler"
            if mounted and not first:
                # Of the two sizes left, all but the room.
                free = shutil.disk_usage(disk).free
                filler.write_bytes(b"\0" * max(0, free - room))

            def work(limit: int = int(room / size * largest), limited: bool = not mounted) -> None:
                if limited:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                trial.save(2.0)

            status = os.waitstatus_to_exitcode(os.waitpid(trial.in_child(work), 0)[1])
            filler.unlink(missing_ok=True)
            kind = f"full disk ({'tmpfs' if mounted else 'limit'}), {'first save' if first else 'overwrite'}"
            trial.seen[f"{kind}: {'refused' if status == 1 else 'had room' if status == 0 else 'OTHER END'}"] += 1
            if [path.name for path in disk.iterdir()] not in ([], ["model"]):
                trial.seen[f"{kind}: LEFTOVERS"] += 1
            expected = {2.0} if status == 0 else {None if first else 1.0}
            if mounted:
                subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(disk)], check=True)
            trial.judge(kind, expected)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)
            trial.home = disk.parent
            trial.path = trial.home / "model"
            shutil.rmtree(disk)


def two_writers(trial: Trial, n: int) -> None:
    """Two processes that save to one path at the same time, one of which may be killed."""
    for number in range(n):
        first = number % 2 == 1
        trial.begin(first)
        children = [trial.in_child(lambda version=version: trial.save(version)) for version in (1.0, 2.0)]
        if number % 4 >= 2:
            os.kill(children[0], signal.SIGKILL)
        status = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        kind = f"two writers, {'first save' if first else 'overwrite'}"
        trial.seen[f"{kind}: {'the second was not refused' if status[1] == 0 else 'REFUSED'}"] += 1
        trial.judge(kind, {1.0, 2.0})


def main() -> int:
    """Run all of it and print counts; the exit status is 1 if anything was lost, wrong or left."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100, help="signals; half as many full disks and pairs of writers")
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="file system to try (default: that of temporary files)")
    parser.add_argument("--renames", action="store_true", help="as where two folders cannot be exchanged in one step")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("pyro_multivi").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if options.renames:
        files._exchange = lambda *_: False
    with tempfile.TemporaryDirectory(dir=options.folder) as home:
        trial = Trial(Path(home), options.cells, options.hidden)
        chance = random.Random(options.seed)
        killed(trial, options.kills, chance)
        full(trial, options.kills // 2, chance)
        two_writers(trial, options.kills // 2)
    for name, number in sorted(trial.seen.items()):
        print(f"{number:5d}  {name}")
    wrong = sum(number for name, number in trial.seen.items() if any(word.isupper() and len(word) > 3 for word in
                name.replace("SIGKILL", "").replace("SIGINT", "").split()))  # fmt: skip
    print(f"{wrong} lost, wrong or left")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
