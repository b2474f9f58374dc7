"""Processes that share one call: found in the environment of torchrun or in a process group of torch.distributed."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

#: Longest wait for a process that is alive but does not come, for instance while it writes a checkpoint. One that died
#: has closed its connections, which the others notice at once.
TIMEOUT = timedelta(minutes=10)
# Farther than seeds of repeated runs, or numbers of epochs that are added to them.
_SEEDS_APART = 1_000_003
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ProcessLostError(RuntimeError):
    """Another process of a shared call has ended, failed or not come in time."""


class Processes:
    """The processes of a shared call, seen from one of them; alone where there is one.

    Every method is called by all of them, in the same order. Sums are the same numbers in all, bit by bit.

    Attributes
    ----------
    rank, size
        Number of this process, from 0, and of all.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self._operands: deque[Sequence[Tensor]] = deque(maxlen=2)

    @property
    def are_several(self) -> bool:
        """Whether there is another process."""
        return self.size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and shows bars."""
        return self.rank == 0

    @property
    def turn(self) -> slice:
        """Slice of the items that processes do in turn that are this one's: every n-th."""
        return slice(self.rank, None, self.size)

    def seed(self, seed: int) -> int:
        """Seed of the noise of this process: cells of two of them must not see the same."""
        return seed + _SEEDS_APART * self.rank

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over processes."""
        if self.are_several and tensors:
            with self._or_lost(tensors):
                for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    work.wait()

    def sum_arrays_(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Replace each array by its sum over processes."""
        if not self.are_several:
            return
        sums = [torch.from_numpy(array).to(self._device()) for array in arrays]
        self.sum_(sums)
        for array, total in zip(arrays, sums, strict=True):
            array[...] = total.cpu().numpy()

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        if self.are_several and tensors:
            with self._or_lost(tensors):
                for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
                    work.wait()

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is raised in any process."""
        if not self.are_several:
            return list(flags)
        raised = self._ours([int(flag) for flag in flags])
        self.sum_([raised])
        return [count > 0 for count in raised.tolist()]

    def wait(self) -> None:
        """Wait until all processes have come here."""
        self.any(True)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Tensors of all processes, which have the same shape, on the host."""
        if not self.are_several:
            return [tensor]
        mine = tensor.to(self._device())
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self._or_lost([mine, *found]):
            dist.all_gather(found, mine)
        return [part.cpu() for part in found]

    def first(self, value: float) -> float:
        """The number that the first process gives."""
        shared = self._ours([value])
        self.broadcast_([shared])
        return float(shared)

    def gather_bytes(self, content: bytes, to_first: bool = False) -> list[bytearray]:
        """Contents of all processes, of any lengths; with ``to_first`` the first has them, the others have none."""
        lengths = [int(length) for length in self.gather(self._ours([len(content)]))]
        mine = torch.zeros(max(lengths), dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        mine = mine.to(self._device())
        found = [torch.empty_like(mine) for _ in range(self.size)] if self.is_first or not to_first else None
        with self._or_lost([mine, *(found or ())]):
            if to_first:
                dist.gather(mine, found)
            else:
                dist.all_gather(found, mine)
        parts = zip(found or (), lengths, strict=False)
        return [bytearray(part[:length].cpu().numpy().tobytes()) for part, length in parts]

    def broadcast(self, content: bytes) -> bytes:
        """Give all processes the bytes that the first gives."""
        if not self.are_several:
            return content
        length = self._ours([len(content)])
        self.broadcast_([length])
        sent = torch.zeros(int(length), dtype=torch.uint8, device=self._device())
        if self.is_first:
            sent.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.broadcast_([sent])
        return sent.cpu().numpy().tobytes()

    def on_first(self, call: Callable[[], Any]) -> None:
        """Call a function in the first process only, and go on when it has returned.

        Raises
        ------
        ProcessLostError
            In the others, if it raised an error in the first.
        """
        error: Exception | None = None
        if self.is_first:
            try:
                call()
            except Exception as found:  # not lost: raised once the others know
                error = found
        (failed,) = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ProcessLostError(f"Process {self.rank} of {self.size} ends: the message of process 0 says why.")

    def check_same(self, **numbers: int) -> None:
        """Refuse processes that were given different things.

        Raises
        ------
        ValueError
            In all processes, with the names of the numbers that differ.
        """
        if not self.are_several:
            return
        mine = self._ours(list(numbers.values()))
        first = mine.clone()
        self.broadcast_([first])
        differ = self.any(*(mine != first).tolist())
        names = [name for name, differs in zip(numbers, differ, strict=True) if differs]
        if names:
            raise ValueError(
                f"The {self.size} processes were not given the same: they differ in {' and '.join(names)}. Each has to "
                "make the same model of the same data, and to give the same arguments."
            )

    def _ours(self, values: Sequence[float]) -> Tensor:
        """Numbers where the group's backend takes them."""
        return torch.tensor(values, dtype=torch.float64, device=self._device() if self.are_several else "cpu")

    @staticmethod
    def _device() -> str:
        """The host, unless the group's backend is NCCL only."""
        on_host = "gloo" in str(dist.get_backend_config()) or not torch.cuda.is_available()
        return "cpu" if on_host else f"cuda:{local_rank()}"

    @contextmanager
    def _or_lost(self, operands: Sequence[Tensor]) -> Iterator[None]:
        # The backend's threads let go of the operands after the call has returned. Where torch (2.4 does) ends a group
        # with Python's lock held, it waits for ever for a thread that has to free a tensor of Python: so these stay.
        self._operands.append(operands)
        try:
            yield
        except RuntimeError as error:
            words = str(error).partition(". This is typically")[0]
            raise ProcessLostError(
                f"Process {self.rank} of {self.size} has lost another one, which ended, failed or did not come within "
                f"{TIMEOUT.seconds // 60} minutes: its own message says why. Nothing more is computed here; after "
                f"train(checkpoint=...), resume=True goes on from the latest checkpoint. (torch: {words})"
            ) from error


_ALONE = Processes()
_current = _ALONE
_n_groups = 0


def current() -> Processes:
    """The processes of the :func:`distributed` block that is open; else this one alone."""
    return _current


@contextmanager
def distributed() -> Iterator[Processes]:
    """Share what is called inside with the other processes of torchrun, which have to make the same calls.

    The processes are those of an initialised process group of ``torch.distributed``; else of torchrun's environment,
    and then a group is made (Gloo on the CPU, NCCL on GPUs) and ended with the block. Where there is neither, or only
    one process, nothing changes.

    Raises
    ------
    ValueError
        If only a part of torchrun's variables is set.

    Examples
    --------
    >>> with distributed() as processes:
    ...     processes.rank, processes.size
    (0, 1)
    """
    global _current
    if _current.are_several:
        yield _current
        return
    if dist.is_available() and dist.is_initialized():
        found, ends = Processes(dist.get_rank(), dist.get_world_size()), False
    else:
        found = _from_environment()
        ends = found.are_several
    hook = sys.excepthook
    if ends:
        _begin(found)
    _current = found
    try:
        yield found
    finally:
        _current = _ALONE
        if ends:
            dist.destroy_process_group()
            sys.excepthook = hook


@contextmanager
def alone() -> Iterator[None]:
    """Call what is inside in this process only, as if no :func:`distributed` block were open."""
    global _current
    before, _current = _current, _ALONE
    try:
        yield
    finally:
        _current = before


def is_first_process() -> bool:
    """Whether this process writes files: the only one, or number 0 of a process group or of torchrun's environment."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return _from_environment().is_first


def local_rank() -> int:
    """Number of this process on its machine, by which it takes its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _from_environment() -> Processes:
    """The processes that torchrun's variables tell of."""
    found: dict[str, Any] = {name: os.environ.get(name) for name in _VARIABLES}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return _ALONE
    if found["WORLD_SIZE"] == "1" and found["RANK"] in (None, "0"):
        return _ALONE
    missing = [name for name, value in found.items() if not value]
    there = " and ".join(f"{name}={value}" for name, value in found.items() if value)
    remedy = "torchrun sets them all; for one process alone, unset RANK and WORLD_SIZE."
    if missing:
        raise ValueError(
            f"The environment has {there} and no {', '.join(missing)}: to share a call, processes need all of "
            f"{', '.join(_VARIABLES)}. {remedy}"
        )
    if not (found["RANK"].isdecimal() and found["WORLD_SIZE"].isdecimal()) or (
        int(found["RANK"]) >= int(found["WORLD_SIZE"])
    ):
        raise ValueError(
            f"The environment has {there}: RANK is a whole number from 0, and WORLD_SIZE one above it. {remedy}"
        )
    return Processes(int(found["RANK"]), int(found["WORLD_SIZE"]))


@cache
def _store() -> Any:
    """Store by which the processes find each other: one for all groups, since the first process serves it."""
    store, _, _ = next(iter(rendezvous("env://", timeout=TIMEOUT)))
    return store


def _start() -> str:
    """Number of times that torchrun has started these processes again (``--max-restarts``).

    Its store outlives them, and addresses of processes that ended must not be read. Only on one machine: agents of
    several may count differently.
    """
    on_one = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if on_one else "0"


def _begin(processes: Processes) -> None:
    """Make the default process group."""
    global _n_groups
    _n_groups += 1
    with processes._or_lost([]):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo",
            # Under a prefix of its own: a fast process must not read addresses of the group before.
            store=PrefixStore(f"pyro_multivi/{_start()}/{_n_groups}", _store()),
            rank=processes.rank,
            world_size=processes.size,
            timeout=TIMEOUT,
        )
