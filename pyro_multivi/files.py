"""Files and folders written as a whole: a kill, Ctrl-C or a full disk at any moment leaves the old or the new.

What is written grows under a hidden name beside its own, locked by the process that writes it, and gets its own name in
one step. What a dead process left is locked no longer and is removed by the next that writes under the same name.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib
import io
import logging
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # Windows: nothing is locked, and leftovers stay
    fcntl = None

logger = logging.getLogger("pyro_multivi")

# Kinds of hidden names: what is being written, and a folder put aside where two cannot be exchanged in one step.
_WRITING, _ASIDE = "saving", "earlier"
# From Linux's <fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class RecordingFile(io.FileIO):
    """A file that keeps the first error of writing in ``error``.

    Libraries that write to it may lose such an error, or end the process: HDF5 does both. After an error they may go on
    writing, to nowhere; what they wrote is not there to be read back, and reading is an error.
    """

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Write all of it, in several steps where the system takes a part only."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.error is None:
            try:
                rest = rest[super().write(rest) or 0 :]
            except OSError as error:
                self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Shorten or lengthen the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell() if size is None else size

    def readinto(self, buffer: Any) -> int:
        """Read, if all that was written before is there."""
        # HDF5 takes what a short read leaves in the buffer for references to strings and follows them.
        if self.error is not None:
            raise self.error
        return super().readinto(buffer) or 0

    def finish(self) -> None:
        """Raise what went wrong, or have the system write everything to the disk."""
        if self.error is not None:
            raise self.error
        os.fsync(self.fileno())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[RecordingFile]:
    """A new file, written to the disk on leaving the context; an error of writing is raised then at the latest."""
    with RecordingFile(path, "x+") as stream:
        try:
            with _interrupted_at_end(stream):
                yield stream
        except Exception as error:
            # A library's own error is a consequence of the first.
            raise stream.error or error from error
        stream.finish()


@contextlib.contextmanager
def _interrupted_at_end(stream: RecordingFile) -> Iterator[None]:
    """Have Ctrl-C end the writing and act after it: raised in the middle, HDF5 may lose it like an error of writing."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    caught: list[Any] = []

    def catch(number: int, frame: Any) -> None:
        caught[:] = [number, frame]
        if handler is signal.default_int_handler:
            stream.error = stream.error or KeyboardInterrupt()

    signal.signal(signal.SIGINT, catch)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if caught:
            handler(*caught)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace it, in one step; an error of the operating system names it."""
    try:
        clear(path)
        part, stream = _begin(path)
        try:
            with stream:
                stream.write(content)
                stream.finish()
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def replacing(target: Path, where: str, lock: str, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder to write to, which takes the place of ``target`` on leaving the context without an error.

    Parameters
    ----------
    target
        Folder to make or to replace; its parent must exist.
    where
        Argument that names it, with which messages begin.
    lock
        Name of a file that the folder will hold; it is there from the beginning, and locked.
    overwrite
        Whether a folder that is there may be replaced.

    Raises
    ------
    FileExistsError
        If another process has written there meanwhile and ``overwrite`` is False.
    OSError
        If it could not be written; the message says what is there now.
    """
    number = None
    with contextlib.ExitStack() as stack:
        try:
            clear(target, lock)
            work, stream = _begin(target, lock)
            stack.enter_context(stream)
            # After the exchange this is the old one.
            stack.callback(shutil.rmtree, work, ignore_errors=True)
            number = work.stat().st_ino
            yield work
            _sync(work)
            _put(work, target, where, overwrite)
            _sync(target.parent)
        except FileExistsError:
            raise
        except (OSError, KeyboardInterrupt) as error:
            placed = target.exists() and target.stat().st_ino == number
            state = "the new one is there, whole" if placed else "what was there before is unchanged"
            if isinstance(error, KeyboardInterrupt):
                logger.warning("%s: interrupted; %s.", where, state)
                raise
            text = f"{where} could not be written ({error.strerror or error}): {state}."
            raise OSError(error.errno or errno.EIO, text) from error


def present(target: Path) -> Path:
    """The folder itself, or the one that a save put aside when it was killed before the new one was in its place."""
    if not target.exists():
        for aside in _hidden(target, _ASIDE):
            logger.warning("%s: a save was killed; the earlier state is in %s and is read from there.", target, aside)
            return aside
    return target


def _put(work: Path, target: Path, where: str, overwrite: bool) -> None:
    if not target.exists():
        try:
            os.rename(work, target)
            return
        except OSError:
            if not target.exists():
                raise
    if not overwrite:
        raise FileExistsError(f"{where}: another process has written there meanwhile. Choose another path.")
    if _exchange(work, target):
        return
    aside = _name(target, _ASIDE)
    try:
        os.rename(target, aside)
        os.rename(work, target)
    except BaseException:
        if aside.exists() and not target.exists():
            os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system or the file system has no such step."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _name(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _hidden(target: Path, kind: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{target.name}.{kind}-") + "[0-9a-f]{8}")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    return sorted(path for path in beside if pattern.fullmatch(path.name))


def clear(target: Path, lock: str | None = None) -> None:
    """Remove what dead processes left, and put back what one of them had put aside."""
    for path in _hidden(target, _ASIDE):
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
    for path in _hidden(target, _WRITING):
        with _if_abandoned(path if lock is None else path / lock) as abandoned:
            if not abandoned:
                continue
            if lock is None:
                path.unlink(missing_ok=True)
            elif _is_empty(path):
                # Another process may have made it just now and be about to lock it: a file in it then keeps it there.
                with contextlib.suppress(OSError):
                    path.rmdir()
            else:
                shutil.rmtree(path, ignore_errors=True)


def _is_empty(folder: Path) -> bool:
    try:
        return next(folder.iterdir(), None) is None
    except OSError:  # gone meanwhile
        return True


@contextlib.contextmanager
def _if_abandoned(path: Path) -> Iterator[bool]:
    """Whether no process has locked a file; none can while the context lasts."""
    if fcntl is None:
        yield False
        return
    with contextlib.ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("rb+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            abandoned = True
        except FileNotFoundError:
            abandoned = True
        except OSError:  # locked, not ours, or no locks on this file system
            abandoned = False
        yield abandoned


def _begin(target: Path, lock: str | None = None) -> tuple[Path, RecordingFile]:
    """A hidden file, or a hidden folder with one file in it, new and locked."""
    while True:
        work = _name(target, _WRITING)
        if lock is not None:
            work.mkdir()
        path = work if lock is None else work / lock
        try:
            stream = RecordingFile(path, "x+")
        except FileNotFoundError:
            # A new folder is gone again if another process took it for abandoned; a file may not be made there at all.
            if lock is None or not target.parent.is_dir():
                raise
            continue
        # Before it is locked another process may take it for abandoned.
        if _lock(stream) and path.exists():
            return work, stream
        stream.close()


def _lock(stream: RecordingFile) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system: then nothing is taken for abandoned either
        pass
    return True


def is_still_there(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path, and not one that was deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    """Have the system write a folder's entries to the disk."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
