"""Hidden folder in which a result file grows until it is complete: its lock, its progress, its end."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from pyro_multivi.files import is_still_there

logger = logging.getLogger("pyro_multivi")

_LOCK, _PROGRESS = "lock", "progress.json"
#: Answers of a file system that has no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class UnfinishedFolder:
    """Folder ``.NAME.unfinished`` beside a result, held by one writer at a time.

    The lock belongs to the open file, so that it ends with its process, however that ends.

    Parameters
    ----------
    path
        Path of the result.

    Raises
    ------
    RuntimeError
        If another process is writing the same result.
    FileExistsError
        If it was completed meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.with_name(f".{path.name}.unfinished")
        #: The result itself, as it grows.
        self.data = self.folder / f"data{path.suffix}"
        self._lock = self._acquire()
        if path.exists():
            # What a kill between the last two steps of its writer left, or this call began.
            self.release() if self.data.exists() else self.remove()
            raise FileExistsError(f"out={str(path)!r} was completed by another process meanwhile.")

    def _acquire(self) -> int:
        while True:
            if self.folder.is_file():
                logger.info("%s cannot be read, as it is of an earlier version; beginning anew.", self.folder)
                self.folder.unlink(missing_ok=True)
            self.folder.mkdir(exist_ok=True)
            try:
                lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT)
            except FileNotFoundError:
                continue  # Another process completed the result between the two steps.
            try:
                _lock_file(lock)
                if is_still_there(lock, self.folder / _LOCK):
                    return lock
            except (BlockingIOError, PermissionError) as error:
                os.close(lock)
                raise RuntimeError(f"out={str(self.path)!r} is being written by another process.") from error
            os.close(lock)

    def read_progress(self) -> dict[str, Any] | None:
        """Progress noted last; None if there is none.

        Raises
        ------
        ValueError
            If it cannot be read.
        """
        try:
            found = json.loads((self.folder / _PROGRESS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            if {entry.name for entry in self.folder.iterdir()} <= {_LOCK}:
                return None
            raise ValueError("no progress was noted") from None
        if not isinstance(found, dict):
            raise ValueError("the progress is not a mapping")
        return found

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Note the progress, as a whole or not at all."""
        beside = self.folder / f"{_PROGRESS}.new"
        beside.write_text(json.dumps(progress), encoding="utf-8")
        os.replace(beside, self.folder / _PROGRESS)

    def clear(self) -> None:
        """Delete everything but the lock."""
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                _delete(entry)

    def publish(self) -> None:
        """Give the result its name and delete the folder."""
        if self.path.exists():
            raise FileExistsError(
                f"out={str(self.path)!r} appeared while it was written and is not replaced: the result is "
                f"{str(self.data)!r}, move it to another place."
            )
        os.replace(self.data, self.path)
        self.remove()

    def remove(self) -> None:
        """Delete the folder, the lock last, and let others write."""
        self.clear()
        # Another process may open the lock in between: it finds that the file is gone, or the folder not empty.
        (self.folder / _LOCK).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError as error:
            logger.debug("%s stays: %s", self.folder, error)
        self.release()

    def release(self) -> None:
        """Let others write; the folder stays for another try."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _lock_file(descriptor: int) -> None:
    """Lock an open file for this process alone, or raise BlockingIOError or PermissionError at once."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("This file system has no locks (%s): do not write the same out= twice at once.", error)


def _delete(entry: Path) -> None:
    """Delete a file or folder, also while zarr's own thread ends what it was writing when another write failed."""
    for wait in (0.01, 0.1, 0.5, None):
        try:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
            return
        except OSError:
            if wait is None:
                raise
            time.sleep(wait)
