"""Checksums of the files in a folder, in ``SHA256SUMS``, as ``sha256sum -c SHA256SUMS`` reads it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

#: Name of the file that holds them.
CHECKSUMS = "SHA256SUMS"


def write_checksums(folder: Path, sums: Mapping[str, str]) -> None:
    """Write checksums by name of the file; a file that is there, perhaps locked, is not made anew."""
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as lines:
        lines.writelines(f"{value}  {name}\n" for name, value in sums.items())
        lines.flush()
        os.fsync(lines.fileno())


def read_checksums(folder: Path) -> dict[str, str]:
    """Checksums by name of the file.

    Raises
    ------
    ValueError
        If there is anything else in the file, or nothing.
    """
    text = (folder / CHECKSUMS).read_bytes()
    lines = re.findall(rb"([0-9a-f]{64})  ([\w.]+)\n", text)
    if not lines or b"".join(value + b"  " + name + b"\n" for value, name in lines) != text:
        raise ValueError(f"{CHECKSUMS} is damaged")
    return {name.decode(): value.decode() for value, name in lines}


def checksum(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as stream:
        return digest(stream)


def digest(stream: BinaryIO) -> str:
    """Checksum of the rest of a stream."""
    found = hashlib.sha256()
    while chunk := stream.read(1 << 20):
        found.update(chunk)
    return found.hexdigest()
