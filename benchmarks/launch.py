"""Start a worker as a fresh process, watch its memory and time, and read what it reports."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Seconds between two looks at a worker: rare enough to cost it nothing.
_LOOK = 0.25


class Outcome(NamedTuple):
    """Outcome of a worker.

    Attributes
    ----------
    result
        What it reported; None if it failed.
    failed
        Why it failed, in two or three words; None if it did not.
    detail
        The same at length.
    """

    result: dict[str, Any] | None
    failed: str | None = None
    detail: str | None = None


def available_memory() -> int:
    """Bytes that processes can still get without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no MemAvailable: the benchmarks need Linux.")


def launch(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 3600.0,
    memory_limit: float = float("inf"),
) -> Outcome:
    """Run a worker to its end or to its limits.

    Parameters
    ----------
    command
        The worker; the last line it prints is JSON.
    env
        Its environment.
    timeout
        Seconds before it is stopped.
    memory_limit
        Resident bytes at which it is stopped, so that it takes nothing else down with it.
    """
    process = subprocess.Popen(
        list(command), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    began, largest = time.monotonic(), 0
    stopped: tuple[str, str] | None = None
    while True:
        try:
            out, err = process.communicate(timeout=_LOOK)
            break
        except subprocess.TimeoutExpired:
            largest = max(largest, _resident(process.pid))
            if stopped is not None:
                continue
            if largest > memory_limit:
                sizes = f"{largest / 1e9:.1f} GB, the limit is {memory_limit / 1e9:.1f} GB"
                stopped = "out of memory", f"stopped at {sizes}"
            elif time.monotonic() - began > timeout:
                stopped = "timed out", f"stopped after {timeout:.0f} s"
            if stopped is not None:
                process.kill()
        except BaseException:
            process.kill()
            raise
    if stopped is not None:
        return Outcome(None, *stopped)
    if process.returncode != 0:
        return Outcome(None, *_why(process.returncode, err, largest))
    try:
        return Outcome(json.loads(out.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return Outcome(None, "failed", f"ended well, but printed no JSON: {out.strip()[-300:]!r}")


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):  # it has just ended
        return 0


def _why(code: int, err: str, largest: int) -> tuple[str, str]:
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "nothing on stderr")
    if any(sign in err for sign in ("MemoryError", "not enough memory", "Unable to allocate")):
        return "out of memory", last
    if code == -9:
        return "killed", f"by signal 9, as Linux does when memory runs out; last seen at {largest / 1e9:.1f} GB"
    return "failed", f"exit status {code}: {last}"
