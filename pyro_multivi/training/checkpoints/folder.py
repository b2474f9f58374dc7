"""Folder of checkpoints: written as a whole, verified before anything is read.

Two folders in it are written in turn, ``checkpoint-1`` and ``checkpoint-2`` (:mod:`pyro_multivi.files`), so that the
one before is there until the next is. ``state.pt`` holds tensors and plain values and is read with
``weights_only=True``, so that nothing in it is executed; ``run.json`` says what was trained on what; ``SHA256SUMS``
has the checksums of both.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from pyro_multivi.checksums import CHECKSUMS, checksum, read_checksums, write_checksums
from pyro_multivi.data.checks import caution, shown, unwrapped
from pyro_multivi.data.split import NAMES, Split
from pyro_multivi.files import clear, present, replacing, writing
from pyro_multivi.processes.group import current
from pyro_multivi.training.checkpoints.lock import FolderLock
from pyro_multivi.training.checkpoints.loop import Loop
from pyro_multivi.training.checkpoints.run import Run

STATE, RUN = "state.pt", "run.json"
# Written in turn.
_FOLDERS = ("checkpoint-1", "checkpoint-2")
#: Minutes between two checkpoints unless something else is said: what a kill loses at most.
MINUTES = 10.0


class Checkpoints:
    """The checkpoints of one run in a folder.

    Parameters
    ----------
    folder
        Folder, made if it is not there.
    every
        Epochs, or minutes in a string (``"30 min"``), from one checkpoint to the next. None: ten minutes.
    resume
        Whether to go on from the latest checkpoint, if there is one.
    must_exist
        Whether there has to be one.

    Attributes
    ----------
    state
        State of the loop to go on from; None for a new run, and once it is taken.
    split
        The cells of the run, kept beside its state.
    """

    def __init__(
        self, folder: Path, every: int | str | None = None, resume: bool = False, must_exist: bool = False
    ) -> None:
        self.folder, self.resume, self.must_exist = folder, resume, must_exist
        self._epochs, self._seconds = _interval(every)
        self.state: dict[str, Any] | None = None
        self.split: Split | None = None
        self._run = Run({}, {})
        self._number = 0
        self._next = 0
        self._written = time.monotonic()
        self._lock: FolderLock | None = None

    @classmethod
    def wanted(
        cls,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int | str | None,
        resume: bool | str | os.PathLike[str],
    ) -> Checkpoints | None:
        """The checkpoints that the arguments of ``train()`` ask for; None for none."""
        _interval(checkpoint_every)
        resume = unwrapped(resume)
        if not isinstance(resume, (bool, str, os.PathLike)) or resume == "":
            raise TypeError(f"resume={shown(resume)} is not allowed: give True, False or the folder of checkpoints.")
        if not isinstance(resume, bool):
            if checkpoint is not None and Path(checkpoint).resolve() != Path(resume).resolve():
                raise ValueError(
                    f"resume={str(resume)!r} and checkpoint={str(checkpoint)!r} are two folders: a run goes on in the "
                    "folder of its checkpoints. Give one of them."
                )
            checkpoint = resume
        if checkpoint is None:
            if resume or checkpoint_every is not None:
                given = "resume=True" if resume else f"checkpoint_every={shown(checkpoint_every)}"
                raise ValueError(f"{given} needs the folder of the checkpoints: give checkpoint='folder' too.")
            return None
        return cls(Path(checkpoint).resolve(), checkpoint_every, bool(resume), must_exist=not isinstance(resume, bool))

    @property
    def _where(self) -> str:
        return f"checkpoint={str(self.folder)!r}"

    def open(self, run: Run) -> None:
        """Make the folder for a run, or read the latest checkpoint of the same run into :attr:`state`.

        Raises
        ------
        FileExistsError
            If a new run would replace checkpoints.
        ValueError
            If the checkpoints are of another run, or all damaged.
        FileNotFoundError
            If there are none in the folder that was given to go on from.
        RuntimeError
            If another process trains there.
        """
        processes = current()
        processes.on_first(lambda: self._open(run))
        if processes.are_several:
            # The others need not see the folder, which may be on another machine.
            sent = io.BytesIO()
            torch.save((self.state, None if self.split is None else vars(self.split)), sent)
            received = torch.load(io.BytesIO(processes.broadcast(sent.getvalue())), weights_only=True)
            self.state, self.split = received[0], None if received[1] is None else Split(**received[1])

    def _open(self, run: Run) -> None:
        self._run = run
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self._where} is a file: give a folder.")
        if self.folder.exists():
            # First: what another process is about to write there is not looked at.
            self._lock = FolderLock(self.folder, self._where)
        places = [present(self.folder / name) for name in _FOLDERS]
        there = {number: path for number, path in enumerate(places) if path.exists()}
        if there and not self.resume:
            raise FileExistsError(
                f"{self._where} holds checkpoints already: give resume=True to go on from the latest, or another "
                "folder for a new run."
            )
        if not there and self.must_exist:
            raise FileNotFoundError(f"{self._where} holds no checkpoints of train(): there is nothing to go on from.")
        if not there and self.resume:
            caution(f"{self._where} holds no checkpoint yet: training starts from the beginning.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self._lock or FolderLock(self.folder, self._where)
        if there:
            self._read(there)
            # A run that had come to its end writes no more, and would leave what a kill left of its last checkpoint.
            for name in _FOLDERS:
                clear(self.folder / name, CHECKSUMS)

    def close(self) -> None:
        """Let other processes train in the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read(self, there: dict[int, Path]) -> None:
        """Read the latest checkpoint that is whole."""
        found: list[tuple[dict[str, Any], int]] = []
        damaged: list[str] = []
        for place, path in there.items():
            try:
                found.append((_verified_run(path), place))
            except Exception as error:  # whatever a damaged file makes the reader stumble on
                damaged.append(f"{path} is damaged ({error})")
        for description, place in sorted(found, key=lambda each: -each[0]["number"]):
            path = there[place]
            # Of another run is said before its gigabytes are read.
            self._refuse_another(Run(description["values"], description["contents"]), path)
            try:
                state = _verified_state(path)
            except Exception as error:
                damaged.append(f"{path} is damaged ({error})")
                continue
            if damaged:
                caution(
                    f"{'; '.join(damaged)}. Training goes on from {path} instead, which is whole: after "
                    f"{description['epoch']} epochs, {description['step']} steps."
                )
            self.state, self.split = state["loop"], None if state["split"] is None else Split(**state["split"])
            if description["reason"]:
                caution(
                    f"{path}: this training is finished after {description['epoch']} epochs ({description['reason']}). "
                    "Its model is brought back, and nothing is trained. To train on, call train() once more, with "
                    "another folder as checkpoint or none."
                )
            self._number, self._next = description["number"], 1 - place
            return
        raise ValueError(f"{self._where}: no checkpoint is whole. {'; '.join(damaged)}. Start anew in another folder.")

    def _refuse_another(self, then: Run, path: Path) -> None:
        differences = self._run.difference(then)
        if differences:
            raise ValueError(
                f"resume: {path} is of another run: {'; '.join(differences)}. Give the same again, or train without "
                "resume=True and with another folder as checkpoint."
            )

    def take_state(self) -> dict[str, Any] | None:
        """The state to go on from, which is not kept: it takes some five times the memory of the weights."""
        state, self.state = self.state, None
        return state

    def is_due(self, epochs: int | None = None) -> bool:
        """Whether a checkpoint is due after a step, or after so many whole epochs of this run; the first is at once."""
        if not self._number:
            return True
        if self._epochs is not None:
            return epochs is not None and epochs % self._epochs == 0
        return time.monotonic() - self._written >= self._seconds

    def write(self, loop: Loop) -> None:
        """Write a checkpoint in place of the one before the last; called in all processes, the first writes.

        Warns
        -----
        UserWarning
            If it cannot be written, for instance to a full disk: those before are as they were, and training goes on.

        Raises
        ------
        OSError
            If it is the first of a run.
        """
        at = loop.position
        split = None if self.split is None else {**vars(self.split), **dict.fromkeys(NAMES, ())}
        state = {"loop": loop.state(), "split": split}
        if not current().is_first:
            return
        description = {"number": self._number + 1, "epoch": at.epoch, "step": at.step, "reason": at.reason}
        try:
            with replacing(self.folder / _FOLDERS[self._next], self._where, CHECKSUMS, overwrite=True) as work:
                with writing(work / STATE) as stream:
                    torch.save(state, stream)
                with writing(work / RUN) as stream:
                    stream.write(json.dumps({**description, **self._run._asdict()}).encode())
                write_checksums(work, {name: checksum(work / name) for name in (STATE, RUN)})
        except OSError as error:
            if not self._number:
                raise
            caution(
                f"No checkpoint was written after {at.epoch} epochs, {at.step} steps, and training goes on: {error}"
            )
        else:
            self._number, self._next = self._number + 1, 1 - self._next
        self._written = time.monotonic()


def _verified_run(folder: Path) -> dict[str, Any]:
    _verify(folder, RUN)
    return json.loads((folder / RUN).read_text("utf-8"))


def _verified_state(folder: Path) -> dict[str, Any]:
    _verify(folder, STATE)
    return torch.load(folder / STATE, map_location="cpu", weights_only=True)


def _verify(folder: Path, name: str) -> None:
    if read_checksums(folder).get(name) != checksum(folder / name):
        raise ValueError(f"the checksum of {name} does not match")


def _interval(every: object) -> tuple[int | None, float]:
    """Epochs, or else seconds, from one checkpoint to the next."""
    found = unwrapped(every)
    if found is None:
        return None, 60 * MINUTES
    if isinstance(found, int) and not isinstance(found, bool) and found > 0:
        return found, 0.0
    minutes = re.fullmatch(r"(\d+(?:\.\d+)?) ?min", found) if isinstance(found, str) else None
    if minutes is None or not float(minutes[1]):
        raise ValueError(
            f"checkpoint_every={shown(every)} is not allowed: give a whole number of epochs, or minutes as '30 min'."
        )
    return None, 60 * float(minutes[1])
