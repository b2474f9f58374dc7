"""Record of a training in its folder: options and data, by which one that is started again finds what was done."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_multivi._version import __version__
from pyro_multivi.data.checks import shown
from pyro_multivi.datasets.assembly import existing
from pyro_multivi.files import write_whole

#: Name of the file.
RECORD = "command.json"
# Data of more blocks, of this many bytes, are compared by some of them.
_MOST_BLOCKS, _BLOCK = 1024, 1 << 20
# Options that say where and how a command runs, not what comes of it.
_WITHOUT_EFFECT = {"out", "overwrite", "quiet", "checkpoint", "checkpoint_every", "resume", "dry_run", "data"}


@dataclass
class Record:
    """What a training was told to do, and what it wrote.

    Attributes
    ----------
    options
        Options that decide on the result, by name.
    data
        Checksum of each file or folder of cells, by the name of its sample; None where none were taken.
    outputs
        Names of what was written; empty until all is.
    """

    options: dict[str, Any]
    data: dict[str, str] | None
    outputs: list[str]

    @classmethod
    def of(cls, options: argparse.Namespace, samples: Mapping[str, str]) -> Record:
        """Record of a command; checksums of its files are taken where it might be started again, with checkpoints."""
        told = {name: value for name, value in sorted(vars(options).items()) if name not in _WITHOUT_EFFECT}
        again = options.checkpoint is not None
        return cls(told, {name: _checksum(existing(path)) for name, path in samples.items()} if again else None, [])

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """Record in a folder; None if there is none that can be read."""
        try:
            found = json.loads((folder / RECORD).read_text("utf-8"))
            return cls(dict(found["options"]), found["data"], list(found["outputs"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, folder: Path, outputs: Iterable[str] = ()) -> None:
        """Write it to a folder, with what was written there."""
        values = {"version": __version__, "options": self.options, "data": self.data, "outputs": [*outputs]}
        write_whole(folder / RECORD, (json.dumps(values, indent=1) + "\n").encode())

    def difference(self, then: Record) -> list[str]:
        """Words on what differs from an earlier command."""
        found = [
            f"--{name.replace('_', '-')}: {shown(then.options.get(name))} then, {shown(value)} now"
            for name, value in self.options.items()
            # An option that an earlier version had not, and that is not given, is no difference.
            if (then.options[name] != value if name in then.options else value not in (None, False, []))
        ]
        before, now = then.data or {}, self.data or {}
        samples = dict.fromkeys([*before, *now])
        return found + [f"other cells in sample {name!r}" for name in samples if before.get(name) != now.get(name)]


def is_done(record: Record, folder: Path, names: Iterable[str]) -> bool | None:
    """Whether an earlier training wrote all that this one would; None if there is nothing of one.

    Raises
    ------
    ValueError
        If what is there is of a training with other options or cells, or of one without a record.
    """
    there = [name for name in names if (folder / name).exists()]
    if not there:
        return None
    then = Record.read(folder)
    if then is None or then.data is None:
        raise ValueError(
            f"{folder} holds {', '.join(map(repr, there))} of a training that left no record for --resume in {RECORD}, "
            "as one without --checkpoint: give --overwrite to replace it, or another --out."
        )
    differences = record.difference(then)
    if differences:
        raise ValueError(
            f"{folder} holds what another training wrote: {'; '.join(differences)}. Give the same again for --resume, "
            "--overwrite to replace it, or another --out."
        )
    return bool(then.outputs) and all((folder / name).exists() for name in then.outputs)


def _checksum(path: Path) -> str:
    """Checksum of the names, sizes and contents of a file, or of all files in a folder.

    Of large data it takes evenly spaced blocks: to read all of them would take as long as an epoch of training.
    """
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    sizes = [file.stat().st_size for file in files]
    blocks = [(file, start) for file, size in zip(files, sizes, strict=True) for start in range(0, size, _BLOCK)]
    found = hashlib.sha256()
    for file, size in zip(files, sizes, strict=True):
        found.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
    for file, start in blocks[:: math.ceil(len(blocks) / _MOST_BLOCKS) or 1]:
        with file.open("rb") as stream:
            stream.seek(start)
            found.update(stream.read(_BLOCK))
    return found.hexdigest()
