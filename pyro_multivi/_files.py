"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Path to write to in the block, which takes the place of a file when that has ended.

    After an error, Ctrl-C included, a file that was there stays as it was and nothing else is left; errors of the
    operating system name the file.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(folder + "/table.csv") as part:
    ...         _ = part.write_text("a,b")
    ...     Path(folder, "table.csv").read_text()
    'a,b'
    """
    path = Path(path)
    beside = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{str(path)!r}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)
