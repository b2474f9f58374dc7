"""Kill the writing of result files (``out=``) at random moments, and look at what is left.

    python benchmarks/kill_results.py --trials 100

Each trial begins a result in a process of its own, ends it by SIGKILL, SIGINT, a full disk (a small tmpfs where
mounting is allowed, else a limit to the size of files) or a second writer, and then makes the same call again. A
result is lost if that fails, or if its values are not those of a result that was never interrupted. With ``--steps``
the signals come at lines of the code that writes instead of moments, the same in every run.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pyro_multivi as pm
from pyro_multivi.data.stores import unfinished
from pyro_multivi.posterior.quantities import containers, file_sink

WRITERS = {module.__file__ for module in (containers, file_sink, unfinished)}


def _estimates(**arguments: Any) -> Callable[[pm.MULTIVI, Path], Any]:
    arguments = {"n_samples": 2, "batch_size": 16, "silent": True, **arguments}
    return lambda model, out: model.get_accessibility_estimates(out=out, **arguments)


def _impute(model: pm.MULTIVI, out: Path) -> Any:
    return model.impute(out=out, batch_size=16, silent=True)


#: Names of results, and the calls that write them.
CALLS: dict[str, Callable[[pm.MULTIVI, Path], Any]] = {
    "dense.h5ad": _estimates(n_samples=25, return_interval=0.9),
    "dense.zarr": _estimates(),
    "sparse.h5ad": _estimates(threshold=0.3),
    "sparse.zarr": _estimates(threshold=0.3),
    "impute.h5ad": _impute,
    "impute.zarr": _impute,
}
ENDS = ("kill", "interrupt", "full", "second")


def main() -> int:
    """Run the trials and print what was found; 1 if anything was lost, left over or wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", action="store_true", help="kill at lines of the code instead of random moments")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks
    model = _model()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        expected = {name: _reference(base, model, name) for name in CALLS}
        rng, found = random.Random(options.seed), Counter[str]()
        for number in range(options.trials):
            name, end = list(CALLS)[number % len(CALLS)], ENDS[number // len(CALLS) % len(ENDS)]
            place = base / f"trial{number}"
            place.mkdir()
            for what in _trial(place, model, name, end, expected[name], rng.random(), options.steps):
                found[what] += 1
                if what.startswith("FAULT"):
                    print(f"trial {number}, {name}, {end}: {what}", flush=True)
            shutil.rmtree(place)
    for what, n in sorted(found.items()):
        print(f"{n:5d} {what}")
    return int(any(what.startswith("FAULT") for what in found))


def _model() -> pm.MULTIVI:
    adata = pm.simulate_multiome((200, 60, 60), n_genes=100, n_regions=500, n_batches=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    model = pm.MULTIVI(adata, n_hidden=16, n_latent=4)
    model.train(max_epochs=1, progress_bar=False)
    return model


def _reference(base: Path, model: pm.MULTIVI, name: str) -> dict[str, Any]:
    """Values of an undisturbed result, its size, and how long it took in seconds and in lines of the code."""
    out = base / "reference" / name
    out.parent.mkdir()
    lines = base / "lines"

    def write() -> None:
        with _AtLine(-1) as seen:
            CALLS[name](model, out)
        lines.write_text(str(seen[0]))

    assert _wait(_fork(write)) == 0
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    started = time.perf_counter()
    assert _wait(_fork(lambda: CALLS[name](model, out))) == 0
    seconds = time.perf_counter() - started
    kept = base / f"{name}.npz"
    assert _wait(_fork(lambda: np.savez(kept, **_read(out)))) == 0
    size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
    shutil.rmtree(out.parent)
    return {"values": dict(np.load(kept)), "seconds": seconds, "size": size, "lines": int(lines.read_text())}


def _read(out: Path) -> dict[str, Any]:
    import anndata

    found = anndata.read_h5ad(out) if out.suffix == ".h5ad" else anndata.read_zarr(out)
    # From anndata 0.13 on the layers hold X too, under None.
    matrices = {"X": found.X, **{name: found.layers[name] for name in found.layers if name is not None}}
    matrices = {name: part.toarray() if hasattr(part, "toarray") else part for name, part in matrices.items()}
    return {**matrices, "cells": found.obs_names.to_numpy(str), "features": found.var_names.to_numpy(str)}


def _trial(
    place: Path, model: pm.MULTIVI, name: str, end: str, expected: dict[str, Any], where: float, steps: bool
) -> list[str]:
    """What happened: words that count, beginning with FAULT where it should not have."""
    out, found = place / name, []
    notes, line = place / "notes", max(1, int(where * expected["lines"])) if steps else -1

    def write() -> None:
        signal_number = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}.get(end)
        with _AtLine(line, signal_number) if signal_number and steps else nullcontext():
            CALLS[name](model, out)

    mounted = False
    if end == "full":
        mounted, limit = _fill(place, int(where * expected["size"] * 1.2) + 4096)
        status = _wait(_fork(_limited(write, limit), notes))
    elif end == "second":
        first = _fork(write, notes)
        time.sleep(0 if steps else where * expected["seconds"])
        statuses = [_wait(_fork(write, place / "second")), _wait(first)]
        status = max(statuses)
        if sorted(statuses) not in ([0, 1], [0, 2]):
            found.append(f"FAULT two writers ended with {statuses}")
        (place / "second").unlink(missing_ok=True)
    else:
        child = _fork(write, notes)
        if not steps:
            time.sleep(where * expected["seconds"])
            os.kill(child, signal.SIGKILL if end == "kill" else signal.SIGINT)
        status = _wait(child)
    allowed = {"kill": {0, -9}, "interrupt": {0, 130}, "full": {0, 28}, "second": {1, 2}}[end]
    if status not in allowed:
        found.append(f"FAULT ended with {status}: {notes.read_text() if notes.exists() else ''}")
    notes.unlink(missing_ok=True)

    part, was_whole = place / f".{name}.unfinished", out.exists()
    if was_whole:
        found.append(
            "whole after the end" if _is_right(out, expected) else "FAULT a wrong file has the name of a whole"
        )
    if left := {entry.name for entry in place.iterdir()} - {name, part.name}:
        found.append(f"FAULT left over: {left}")
    # Killed between the last two steps: the next call finds the whole, and tidies up.
    if was_whole and part.exists() and (_wait(_fork(lambda: CALLS[name](model, out))) != 2 or part.exists()):
        found.append("FAULT a part is left beside the whole")
    if not was_whole:
        found.append("a part to go on from" if part.exists() else "nothing left")
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        status = _wait(_fork(lambda: CALLS[name](model, out), notes))
        if status:
            found.append(f"FAULT the same call again ended with {status}: {notes.read_text()}")
        notes.unlink(missing_ok=True)
        if not _is_right(out, expected):
            found.append("FAULT the result of the same call again is wrong")
        if left := {entry.name for entry in place.iterdir()} - {name}:
            found.append(f"FAULT left over after the same call again: {left}")
    if mounted:
        subprocess.run(["umount", str(place)], check=True)
    return [f"{end}: {what}" if not what.startswith("FAULT") else what for what in found]


def _is_right(out: Path, expected: dict[str, Any]) -> bool:
    def compare() -> None:
        values = _read(out)
        assert values.keys() == expected["values"].keys()
        for name, value in values.items():
            if value.dtype.kind == "f":
                np.testing.assert_allclose(value, expected["values"][name], rtol=1e-4, atol=1e-6)
            else:
                np.testing.assert_array_equal(value, expected["values"][name])

    return _wait(_fork(compare)) == 0


def _fill(place: Path, size: int) -> tuple[bool, int | None]:
    """Make a small disk at a place, or else return the limit to the size of a file."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if shutil.which("mount") and subprocess.run(command, check=False, capture_output=True).returncode == 0:
        return True, None
    return False, size


def _limited(write: Callable[[], None], limit: int | None) -> Callable[[], None]:
    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        write()

    return limited


def _fork(work: Callable[[], Any], notes: Path | None = None) -> int:
    """Do it in a child, whose status says how it ended; a traceback goes to a file."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        work()
        status = 0
    except KeyboardInterrupt:
        status = 130
    except FileExistsError:
        status = 2
    except RuntimeError as error:
        status = 1 if "is being written by another process" in str(error) else 3
    except OSError as error:
        status = 28 if error.errno in (errno.ENOSPC, errno.EFBIG) else 3
    except BaseException:
        status = 3
    if status == 3 and notes is not None:
        notes.write_text(traceback.format_exc())
    os._exit(status)


def _wait(child: int) -> int:
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


class _AtLine:
    """Send this process a signal at the n-th line of the modules that write; counts them."""

    def __init__(self, number: int, signal_number: int | None = None) -> None:
        self.number, self.signal, self.seen = number, signal_number, [0]

    def __enter__(self) -> list[int]:
        sys.settrace(self._call)
        return self.seen

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in WRITERS else None

    def _line(self, frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            self.seen[0] += 1
            if self.seen[0] == self.number and self.signal is not None:
                os.kill(os.getpid(), self.signal)
        return self._line


if __name__ == "__main__":
    raise SystemExit(main())
