"""Folder of a saved model: tensors, JSON and data, without anything that can run code, each with a checksum.

``weights.pt`` holds the program's tensors and is read with ``weights_only=True``; ``model.json`` holds everything
else and the version of the format; ``adata.h5ad`` or ``mdata.h5mu`` the data, if they were saved. ``SHA256SUMS`` has
the checksums of all of them, as ``sha256sum -c SHA256SUMS`` reads it; they are compared before anything is parsed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pyro_multivi._version import __version__
from pyro_multivi.api.arguments import Data
from pyro_multivi.api.saving.data_file import DATA_FILES, difference, refers_to_stores, write_data
from pyro_multivi.checksums import CHECKSUMS, checksum, digest, read_checksums, write_checksums
from pyro_multivi.data.checks import FolderExistsError, NoModelError, first_names
from pyro_multivi.datasets.readers import read
from pyro_multivi.files import present, replacing, writing

logger = logging.getLogger("pyro_multivi")

#: Formats 1 and 2 had a checksum of the weights only, in ``model.json``.
FORMAT, FIRST_FORMAT_WITH_CHECKSUMS = 3, 3
WEIGHTS, DESCRIPTION = "weights.pt", "model.json"
FILES = {WEIGHTS, DESCRIPTION, CHECKSUMS, *DATA_FILES}


class BrokenModelError(ValueError):
    """A saved model that cannot be read."""


@contextmanager
def broken(where: str, what: str) -> Iterator[None]:
    """Whatever malformed content makes the code inside stumble on becomes one :class:`BrokenModelError`."""
    try:
        yield
    except (BrokenModelError, ImportError):
        raise
    except Exception as error:
        found = str(error) or type(error).__name__
        raise BrokenModelError(f"{where}: {what} ({found}). Save the model again.") from error


@dataclass(frozen=True)
class Saved:
    """Content of a model folder, verified: tensors, description, format, and the data if they were asked for."""

    state: dict[str, Tensor]
    description: dict[str, Any]
    version: int
    data: Data | None


def model_folder(dir_path: str | os.PathLike[str], prefix: str | None) -> Path:
    """The folder of a model, as :meth:`~pyro_multivi.MULTIVI.save` is given it."""
    return Path(dir_path) / prefix if prefix else Path(dir_path)


def check_target(folder: str | os.PathLike[str], overwrite: bool) -> Path:
    """The folder to write a model to, links followed.

    Raises
    ------
    FileExistsError
        If there is something at ``folder`` that may not be replaced.
    FileNotFoundError
        If the parent folder does not exist.
    """
    target, where = Path(folder).resolve(), f"dir_path={str(folder)!r}"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{where}: the folder {str(target.parent)!r} does not exist.")
    if target.exists():
        if not overwrite:
            raise FolderExistsError(f"{where} exists: choose another path or give overwrite=True.")
        found = foreign(target)
        if found:
            raise FolderExistsError(f"{where} {found} and is not replaced: choose another path.")
        if _is_here(target):
            raise FolderExistsError(f"{where} is the folder in which this process works: save it from elsewhere.")
    return target


def _is_here(target: Path) -> bool:
    """Whether a folder is the one in which the process works, which may have been deleted."""
    try:
        return target == Path.cwd()
    except FileNotFoundError:
        return False


def foreign(target: Path) -> str:
    """Description of what keeps a path from being replaced: it must hold a whole model and nothing else of the user."""
    if not target.exists():
        return ""
    if not target.is_dir():
        return "is a file"
    found = {path.name for path in target.iterdir()}
    if found - FILES:
        return f"holds something other than a saved model ({first_names(sorted(found - FILES))})"
    if found and not {DESCRIPTION, WEIGHTS} <= found:
        return f"holds something other than a whole saved model ({first_names(sorted(found))} alone)"
    return ""


def data_of_others(target: Path, cells: Sequence[str], features: Sequence[str]) -> str:
    """Description of data in a folder that are not a model's: they may be the only copy, unless they lie elsewhere."""
    for name in DATA_FILES:
        if refers_to_stores(target / name):
            continue
        problem = difference(target / name, cells, features) if (target / name).is_file() else ""
        if problem:
            return f"holds {name}, perhaps the only copy of these data, which are not this model's: it {problem}"
    return ""


def write_model(
    folder: str | os.PathLike[str],
    state: dict[str, Tensor],
    description: dict[str, Any],
    *,
    overwrite: bool = False,
    data: Data | None = None,
    names: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> None:
    """Write a model folder as a whole or not at all.

    Parameters
    ----------
    folder
        Folder to write; its parent must exist.
    state
        Tensors of the program.
    description
        JSON-serialisable.
    overwrite
        Replace a model that is there. A folder with anything else in it is left alone.
    data
        Data to write beside it. Without, data that a replaced model has stay, if they are this model's too.
    names
        Names of this model's cells and features.

    Raises
    ------
    FileExistsError
        If there is something at ``folder`` that may not be replaced, or data that are not this model's.
    FileNotFoundError
        If the parent folder does not exist.
    OSError
        If it cannot be written; what was there is as it was.
    """
    target, where = check_target(folder, overwrite), f"dir_path={str(folder)!r}"
    target_files = [name for name in DATA_FILES if (target / name).is_file()]
    for name in target_files if data is None else ():
        # What is kept has to be of this model.
        found = difference(target / name, *names) if refers_to_stores(target / name) else ""
        if found:
            logger.warning("%s: %s, which says where other counts are, is not kept: it %s.", where, name, found)
            target_files = [other for other in target_files if other != name]
    lost = data_of_others(target, *names)
    if lost and data is None:
        raise FolderExistsError(f"{where} {lost}. Choose another path, or give save_anndata=True to replace them.")
    if lost:
        logger.warning("%s %s. They are replaced by the data of this model.", where, lost)
    with replacing(target, where, CHECKSUMS, overwrite) as work:
        sums = {}
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        with writing(work / WEIGHTS) as stream:
            torch.save(tensors, stream)
        sums[WEIGHTS] = checksum(work / WEIGHTS)
        if data is not None:
            name = write_data(work, data)
            sums[name] = checksum(work / name)
        else:
            for name in target_files:
                _link(target / name, work / name)
                sums[name] = _known_checksum(target, name) or checksum(work / name)
        # The checksum of the weights is where earlier versions look for it, which then say that they are too old.
        text = {"format": FORMAT, "version": __version__, "weights_sha256": sums[WEIGHTS], **description}
        with writing(work / DESCRIPTION) as stream:
            stream.write(json.dumps(text).encode())
        sums[DESCRIPTION] = checksum(work / DESCRIPTION)
        write_checksums(work, sums)
        if target.exists():
            shutil.copymode(target, work)
            # What came since the beginning must not be deleted either.
            check_target(folder, overwrite)
    if data is None:
        for name in target_files:
            logger.info("%s: %s stays as it was saved; save_anndata=True writes the data again.", where, name)


def read_model(folder: str | os.PathLike[str], with_data: bool = False, with_tensors: bool = True) -> Saved:
    """Read a model folder; nothing is parsed before its checksum is compared.

    Parameters
    ----------
    folder
        The folder.
    with_data
        Read the data saved in it too.
    with_tensors
        Without, the description alone is read, and no checksum of a large file is compared.

    Raises
    ------
    FileNotFoundError
        If there is no model at ``folder``.
    BrokenModelError
        If a file is missing, damaged or of a newer format.
    """
    where = f"dir_path={str(folder)!r}"
    while True:
        source = present(Path(folder).resolve())
        before = _identity(source)
        try:
            saved = _read(source, where, with_data, with_tensors)
        except (BrokenModelError, OSError):
            if _identity(source) == before:
                raise
        else:
            if _identity(source) == before:
                return saved
        # Another process has replaced the model while it was read: files of both may have been read.


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_ctime_ns


def _read(source: Path, where: str, with_data: bool, with_tensors: bool) -> Saved:
    sums = _checksums_of_model(source, where, with_data)
    description = _description(source, where, sums)
    version: int = description["format"]
    if not with_tensors:
        return Saved({}, description, version, None)
    with (source / WEIGHTS).open("rb") as stream:
        _compare(where, WEIGHTS, digest(stream), sums.get(WEIGHTS, description["weights_sha256"]))
        stream.seek(0)
        state = _tensors(stream, where)
    # Data that are not asked for may be damaged: others are given in their place.
    return Saved(state, description, version, _data(source, where, sums) if with_data else None)


def _checksums_of_model(source: Path, where: str, with_data: bool) -> dict[str, str]:
    """Checksums of the files of a model, all of which are there; none of a format that had none."""
    if not any((source / name).is_file() for name in (DESCRIPTION, CHECKSUMS)):
        within = [path.parent.name for path in sorted(source.glob(f"*/{DESCRIPTION}"))]
        remedy = (
            f"Its folder {within[0]!r} is one: give that." if within else "Give the folder that MULTIVI.save wrote."
        )
        raise NoModelError(f"{where} is not a saved model: {DESCRIPTION} is missing. {remedy}")
    sums = _read_checksums(source, where) if (source / CHECKSUMS).is_file() else {}
    if sums and not {WEIGHTS, DESCRIPTION} <= sums.keys():
        raise BrokenModelError(f"{where}: {CHECKSUMS} is damaged (it lacks a file). Save the model again.")
    for name in (DESCRIPTION, WEIGHTS, *sums):
        # Data that were deleted are missed by those who need them only.
        if not (source / name).is_file() and (with_data or name not in DATA_FILES):
            raise BrokenModelError(f"{where}: {name} is missing. Copy it again or save the model again.")
    return sums


def _description(source: Path, where: str, sums: Mapping[str, str]) -> dict[str, Any]:
    """Content of model.json, of a format that this version reads."""
    text = (source / DESCRIPTION).read_bytes()
    if sums:
        _compare(where, DESCRIPTION, hashlib.sha256(text).hexdigest(), sums[DESCRIPTION])
    with broken(where, f"{DESCRIPTION} is damaged"):
        description: dict[str, Any] = json.loads(text.decode("utf-8"))
        version, expected = description["format"], description["weights_sha256"]
        if not isinstance(version, int) or isinstance(version, bool) or version < 1 or not isinstance(expected, str):
            raise ValueError(f"format is {version!r}")
    if version > FORMAT:
        raise BrokenModelError(
            f"{where} was saved in format {version} by version {description.get('version')}; "
            f"this version reads up to format {FORMAT}. Upgrade pyro-multivi."
        )
    if version >= FIRST_FORMAT_WITH_CHECKSUMS and not sums:
        raise BrokenModelError(f"{where}: {CHECKSUMS} is missing. Copy it again or save the model again.")
    return description


def _data(source: Path, where: str, sums: Mapping[str, str]) -> Any:
    """Data that were saved with a model; None without."""
    data = None
    for name in DATA_FILES:
        path = source / name
        if not path.is_file():
            continue
        if name in sums:
            _compare(where, name, checksum(path), sums[name])
        elif sums:
            raise BrokenModelError(
                f"{where}: {name} was not saved with this model ({CHECKSUMS} has no line for it). "
                "Move it elsewhere and load the model with adata=read(...)."
            )
        if data is None:
            with broken(where, f"{name} cannot be read"):
                data = read(path)
    return data


def _tensors(stream: BinaryIO, where: str) -> dict[str, Tensor]:
    """State of the program; nothing in the file is executed."""
    try:
        state = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception:
        state = None
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        # Torch's own error would advise to load the file in a way that runs the code in it.
        raise BrokenModelError(f"{where}: {WEIGHTS} holds something that is not a set of tensors and was not loaded.")
    return state


def _link(source: Path, copy: Path) -> None:
    """Give a file another name, or copy it where the file system has no such links."""
    try:
        os.link(source, copy)
    except OSError:
        with source.open("rb") as old, writing(copy) as new:
            shutil.copyfileobj(old, new)


def _read_checksums(folder: Path, where: str) -> dict[str, str]:
    try:
        sums = read_checksums(folder)
    except ValueError:
        sums = {}
    if not sums or not sums.keys() <= FILES:
        raise BrokenModelError(f"{where}: {CHECKSUMS} is damaged. Copy it again or save the model again.")
    return sums


def _known_checksum(folder: Path, name: str) -> str | None:
    """Checksum that a file had when it was saved: damage since then is not hidden by a new one."""
    try:
        return _read_checksums(folder, "").get(name)
    except (FileNotFoundError, BrokenModelError):
        return None


def _compare(where: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        raise BrokenModelError(
            f"{where}: {name} is damaged or truncated (its checksum does not match). "
            "Copy it again or save the model again."
        )
