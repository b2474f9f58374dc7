"""Files that a command writes: none of an earlier run is replaced without ``--overwrite``, and no model is lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from pyro_multivi._optional import require
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.api.saving.folder import data_of_others, foreign
from pyro_multivi.data.checks import first_names
from pyro_multivi.files import write_whole
from pyro_multivi.training.checkpoints.lock import FolderLock

_IN_USE = (
    "writes there, and the files of two commands would be mixed. Wait until that one has ended, or give another --out."
)


def refuse_existing(folder: Path, names: Iterable[str], overwrite: bool) -> None:
    """Refuse, before any work, what is there and would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: give a folder.")
    there = [name for name in names if (folder / name).exists()]
    if "model" in there:
        _refuse(folder / "model", foreign(folder / "model"))
    if there and not overwrite:
        raise ValueError(
            f"{folder} holds {first_names(there)} already: give --overwrite to replace what an earlier run wrote, or "
            "another --out."
        )


def check_table(out: Path, overwrite: bool) -> None:
    """Refuse, before any work, a path that is not that of a table, or one that is there."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: give a file.")
    if out.suffix not in (".csv", ".parquet"):
        raise ValueError(f"--out {out} is neither .csv nor .parquet: choose one of these endings.")
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}.")
    if not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: the folder {out.parent} may not be written to. Give a file in another one.")
    refuse_existing(out.parent, [out.name], overwrite)
    if out.suffix == ".parquet":
        # A missing package is reported before the work.
        require("pyarrow", "parquet")


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table whose rows are named by a column."""
    write_whole(out, table.to_csv(index=False).encode() if out.suffix == ".csv" else table.to_parquet(index=False))


@contextmanager
def folder_to_write(folder: Path, names: Iterable[str], overwrite: bool) -> Iterator[None]:
    """The folder of a command's output, made if it is not there, and in which no other command writes meanwhile."""
    refuse_existing(folder, names, overwrite)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out {folder} cannot be made ({error.strerror}): give another folder.") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {folder} may not be written to: give another folder.")
    lock = FolderLock(folder, f"--out {folder}", _IN_USE, ".out.lock")
    try:
        # What another command has written since.
        refuse_existing(folder, names, overwrite)
        yield
    finally:
        lock.release()
        if is_new:
            # If it is still empty.
            with suppress(OSError):
                folder.rmdir()


def check_model_folder(model: MULTIVI, folder: Path) -> None:
    """Refuse, before a model is trained, to replace a folder that holds data of other cells."""
    _refuse(folder, data_of_others(folder, *model._names()))


def _refuse(folder: Path, found: str) -> None:
    if found:
        raise ValueError(f"{folder} {found}. It is not replaced: move it away, or give another --out.")


def save_model(model: MULTIVI, folder: Path, overwrite: bool, refer_to_data: bool = False) -> Path:
    """Save a model that was trained; beside the folder if that was taken meanwhile, so that the model is not lost.

    With ``refer_to_data``, for counts on disk, where they are is saved too.
    """
    taken, number = folder, 2
    while True:
        try:
            model.save(folder, overwrite=overwrite, save_anndata=refer_to_data)
        except FileExistsError:
            folder, number = taken.with_name(f"{taken.name}-{number}"), number + 1
            continue
        except (TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            # The data, not the model: a disk that is full is an OSError, and fails again.
            if not refer_to_data:
                raise
            print(f"the data cannot be saved with the model, and are given again to use it: {error}")
            refer_to_data = False
            continue
        if folder != taken:
            print(f"{taken} was taken during training; the model is in {folder}")
        return folder


def end_if_interrupted(model: MULTIVI) -> None:
    """End a command whose training was interrupted as interrupted, once all that it learned is written."""
    if model._history.interrupted:
        raise KeyboardInterrupt
