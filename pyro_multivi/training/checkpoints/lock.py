"""Lock of a folder: one run at a time writes there."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import IO

from pyro_multivi.files import is_still_there

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CHECKPOINTS = (
    "trains there, and two runs overwrite each other's checkpoints. Give another folder, or wait until that one has "
    "ended, and give resume=True to go on from it."
)


class FolderLock:
    """Lock of a folder that this process has; the system takes it from a process that ends, however that ends.

    Parameters
    ----------
    folder
        An existing folder.
    where
        Argument that names it, with which the message begins.
    what
        Rest of the message, after the name of the process that has it: what that does, and what to do.
    name
        Name of the file that is locked. A process that locks a file twice loses both locks when it releases one.

    Raises
    ------
    RuntimeError
        If another process has it. Where the file system has no locks or may not be written to, nothing is locked.
    """

    def __init__(self, folder: Path, where: str, what: str = _CHECKPOINTS, name: str = ".lock") -> None:
        self._path = folder / name
        self._stream: IO[str] | None = None
        while fcntl is not None and self._stream is None:
            try:
                stream = self._path.open("a+", encoding="utf-8")
            except OSError:  # read only: then no checkpoint can be written either
                return
            try:
                # Not flock, which processes forked from this one would keep after its end.
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                stream.seek(0)
                holder = stream.read().strip() or "another process"
                stream.close()
                raise RuntimeError(f"{where} is in use: {holder} {what}") from error
            except OSError:  # no locks on this file system
                stream.close()
                return
            # The process that had it may have removed the file meanwhile.
            if is_still_there(stream.fileno(), self._path):
                stream.truncate(0)
                print(f"process {os.getpid()} on {socket.gethostname()}", file=stream, flush=True)
                self._stream = stream
            else:
                stream.close()

    def release(self) -> None:
        """Let other processes write there."""
        if self._stream is not None:
            self._path.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None
