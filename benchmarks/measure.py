"""Time and memory of a worker, and how it reports them. Standard library only, for any environment."""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


class Memory:
    """Resident memory of this process above what it was when this was made: right after the imports.

    Attributes
    ----------
    start
        What the imports took, in bytes.
    resettable
        Whether the kernel lets a process forget its peak; otherwise a peak includes all that came before.

    Notes
    -----
    The kernel's high-water mark (``VmHWM``, as in ``ru_maxrss`` of getrusage) misses no allocation,
    however short. It is read from /proc because ``ru_maxrss`` also covers the process that started
    this one. Linux only.
    """

    def __init__(self) -> None:
        self.resettable = self.reset()
        self.start = _status("VmRSS")

    def reset(self) -> bool:
        """Forget the peak so far; False where the kernel does not allow it."""
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            return True
        return False

    def peak(self) -> int:
        """Highest memory since the last reset, in bytes above the imports."""
        return max(0, _status("VmHWM") - self.start)


def peak_megabytes() -> float:
    """Peak memory of this process so far, imports and all that came before included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}: the benchmarks need Linux.")


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Duration of one call, and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def median_seconds(call: Callable[[], Any], at_least: int = 5, at_most: int = 50, budget: float = 3.0) -> float:
    """Median time of a call that is repeated within ``budget`` seconds, after one that is not counted."""
    call()
    taken: list[float] = []
    while len(taken) < at_least or (len(taken) < at_most and sum(taken) < budget):
        taken.append(seconds(call)[0])
    return statistics.median(taken)


def task() -> dict[str, Any]:
    """The task of this worker, from its command line."""
    if len(sys.argv) != 2:
        sys.exit("This is a worker: benchmarks/run.py starts it with a task as JSON.")
    job: dict[str, Any] = json.loads(sys.argv[1])
    return job


def report(result: dict[str, Any]) -> None:
    """One line of JSON, the last thing a worker prints."""
    print(json.dumps(result), flush=True)
