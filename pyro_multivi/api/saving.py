"""Files of a saved model: one folder of tensors and JSON, without anything that can run code.

``weights.pt`` holds the program's tensors and is read with ``weights_only=True``; ``model.json`` holds everything
else, the version of the format and the checksum of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from anndata import AnnData
from torch import Tensor

from pyro_multivi._optional import mudata_as_given
from pyro_multivi._version import __version__
from pyro_multivi.api.arguments import Data
from pyro_multivi.datasets.readers import read

FORMAT = 2
WEIGHTS = "weights.pt"
DESCRIPTION = "model.json"
#: Data saved beside a model.
ANNDATA, MUDATA = "adata.h5ad", "mdata.h5mu"

Write: TypeAlias = Callable[[Path], None]


class BrokenModelError(ValueError):
    """A saved model that cannot be read."""


def write_model(
    folder: str | os.PathLike[str],
    state: dict[str, Tensor],
    description: dict[str, Any],
    *,
    overwrite: bool = False,
    extra_files: Mapping[str, Write] | None = None,
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
    extra_files
        Other files by name, each a function that writes to the path it is given.

    Raises
    ------
    FileExistsError
        If there is something at ``folder`` that may not be replaced.
    FileNotFoundError
        If the parent folder does not exist.
    """
    target, where = Path(folder), f"dir_path={str(folder)!r}"
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{where}: the folder {str(target.parent)!r} does not exist.")
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{where} exists: choose another path or give overwrite=True.")
        # Replacing deletes the folder: it must hold a whole model and no other file of the user.
        found = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
        if found and (not {DESCRIPTION, WEIGHTS} <= found or found - {DESCRIPTION, WEIGHTS, ANNDATA, MUDATA}):
            raise FileExistsError(
                f"{where} holds something other than a saved model and is not replaced: choose another path."
            )
    # Written beside the target and renamed: a crash leaves the old model or none, never half of one.
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        torch.save(tensors, beside / WEIGHTS)
        for name, write in (extra_files or {}).items():
            write(beside / name)
        text = {"format": FORMAT, "version": __version__, "weights_sha256": _checksum(beside / WEIGHTS), **description}
        (beside / DESCRIPTION).write_text(json.dumps(text), encoding="utf-8")
        beside.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old / target.name)
            os.replace(beside, target)
            shutil.rmtree(old)
        else:
            os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def read_model(folder: str | os.PathLike[str], needed: Sequence[str] = ()) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and description of a model folder, verified; the description must hold all entries that are ``needed``.

    Raises
    ------
    FileNotFoundError
        If there is no model at ``folder``.
    BrokenModelError
        If a file is missing, damaged or of a newer format.
    """
    source, where = Path(folder), f"dir_path={str(folder)!r}"
    if not (source / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"{where} is not a saved model: {DESCRIPTION} is missing. Give the folder that MULTIVI.save wrote."
        )
    try:
        description = json.loads((source / DESCRIPTION).read_text(encoding="utf-8"))
        version, expected = int(description["format"]), description["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenModelError(f"{where}: {DESCRIPTION} is damaged ({error}). Save the model again.") from error
    if version > FORMAT:
        raise BrokenModelError(
            f"{where} was saved in format {version} by version {description.get('version')}; "
            f"this version reads up to format {FORMAT}. Upgrade pyro-multivi."
        )
    missing = ", ".join(name for name in needed if name not in description)
    if missing:
        raise BrokenModelError(f"{where}: {DESCRIPTION} is damaged ({missing} missing). Save the model again.")
    if not (source / WEIGHTS).is_file():
        raise BrokenModelError(f"{where}: {WEIGHTS} is missing. Save the model again.")
    if _checksum(source / WEIGHTS) != expected:
        raise BrokenModelError(
            f"{where}: {WEIGHTS} is damaged or truncated (its checksum does not match). "
            "Copy it again or save the model again."
        )
    # Torch's own error would advise to load the file in a way that runs the code in it.
    refused = BrokenModelError(f"{where}: {WEIGHTS} holds something that is not a set of tensors and was not loaded.")
    try:
        state = torch.load(source / WEIGHTS, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise refused from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise refused
    return _renamed(state, description) if version < 2 else (state, description)


def data_file(data: Data) -> dict[str, Write]:
    """Name of the file of a model's data, and the function that writes it, as :func:`write_model` takes them."""
    if isinstance(data, AnnData):
        return {ANNDATA: data.write_h5ad}

    def write(path: Path) -> None:
        # By default writing would copy the modalities' obs columns into those of the MuData.
        with mudata_as_given():
            data.write(path)

    return {MUDATA: write}


def read_data(folder: str | os.PathLike[str]) -> Data | None:
    """Data saved beside a model; None without any."""
    paths = [Path(folder) / name for name in (ANNDATA, MUDATA)]
    return next((read(path) for path in paths if path.is_file()), None)


#: Beginnings of tensors' names in format 1, and today's.
_RENAMED = {
    "rna_reader.": "rna_first_layer.",
    "atac_reader.": "atac_first_layer.",
    "rna_trust": "rna_mixture_weight",
    "atac_trust": "atac_mixture_weight",
    "rna_depth_link": "rna_depth_regression",
    "atac_depth_link": "atac_depth_regression",
}


def _renamed(state: dict[str, Tensor], description: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model of format 1 under the names of format 2."""
    for old, new in _RENAMED.items():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: part for name, part in state.items()}
    spec = description.get("spec")
    for part in (description.get("config"), spec, spec.get("setup") if isinstance(spec, dict) else None):
        if isinstance(part, dict) and "further" in part:
            part["extra"] = part.pop("further")
    return state, description


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
