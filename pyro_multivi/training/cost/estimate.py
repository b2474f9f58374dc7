"""Memory, time and disk that a training takes, from its sizes and a few timed steps."""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.resident import n_bytes
from pyro_multivi.isolation import generators_kept, isolated
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training.objective import NegativeELBO
from pyro_multivi.training.optimizer import make_optimizer
from pyro_multivi.training.options import FitOptions

# Beside the weights: gradients, Adam's two moments, the average and the best weights; and what a checkpoint holds.
_COPIES_IN_MEMORY, _COPIES_IN_CHECKPOINT = 5, 5
# Two are kept, and a third is written before it takes the place of one.
_CHECKPOINTS = 3
# The first step makes buffers that later ones use again.
_N_WARM_UP, _N_TIMED = 1, 5


@dataclass(frozen=True)
class TrainingCost:
    """Estimated cost of a training, in bytes and seconds.

    Attributes
    ----------
    weights, data
        Memory of the weights and of the cells' counts, both of which are there before training.
    more
        Memory that training takes beside them: copies of the weights, and the buffers of a step where one was timed.
    model, checkpoints
        Size on disk of the saved model, and of checkpoints at most; 0 without.
    n_epochs
        Largest number of epochs.
    epoch
        Seconds of an epoch; None where no step was timed.
    """

    weights: int
    data: int
    more: int
    model: int
    checkpoints: int
    n_epochs: int
    epoch: float | None = None

    @classmethod
    def of_sizes(
        cls, program: MultiVIProgram, train: Minibatches, options: FitOptions, checkpoint: bool
    ) -> TrainingCost:
        """Estimate without a step: of memory the copies of the weights, which are most of it for many features."""
        weights = sum(value.nbytes for value in program.state_dict().values())
        checkpoints = _CHECKPOINTS * _COPIES_IN_CHECKPOINT * weights if checkpoint else 0
        more = _COPIES_IN_MEMORY * weights
        return cls(weights, n_bytes(train.table), more, weights, checkpoints, options.max_epochs)

    def shortages(self, folder: Path) -> list[str]:
        """Words on what is not there: memory of this machine, or disk at ``folder``."""
        found, free = [], available_memory()
        if free is not None and self.more > free:
            found.append(f"training needs {_size(self.more)} more memory and {_size(free)} are free")
        disk = shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free
        written = self.model + self.checkpoints
        if written > disk:
            found.append(f"model and checkpoints take {_size(written)} at {folder} and {_size(disk)} are free")
        return found

    def __str__(self) -> str:
        lines = [
            f"memory   {_size(self.data)} of counts and {_size(self.weights)} of weights now, "
            f"{_size(self.more)} more in training"
        ]
        if self.epoch is not None:
            total = self.epoch * self.n_epochs
            lines.append(f"time     {_time(self.epoch)} an epoch, {_time(total)} for all {self.n_epochs} at most")
        disk = f", {_size(self.checkpoints)} of checkpoints at most" if self.checkpoints else ""
        lines.append(f"disk     {_size(self.model)} of model{disk}")
        return "\n".join(lines)


@isolated()
def timed_cost(
    program: MultiVIProgram,
    train: Minibatches,
    validation: Minibatches | None,
    options: FitOptions,
    checkpoint: bool = False,
) -> TrainingCost:
    """Take a few steps, which change the program, and estimate the cost of a training by them.

    Parameters
    ----------
    train, validation
        Minibatches as :func:`~pyro_multivi.training.fit` is given; of one process of several, its share.
    checkpoint
        Whether checkpoints will be written.
    """
    from pyro_multivi.training.fit import evaluate

    cost = TrainingCost.of_sizes(program, train, options, checkpoint)
    program.to(train.device).train()
    program.use_precision(options.precision)
    optimizer, objective = make_optimizer(program, train.n_cells, options), NegativeELBO(program, options.elbo)
    before, seconds = _peak_memory(train.device), []
    with generators_kept(train.device):
        torch.manual_seed(options.seed)
        started = time.perf_counter()
        for cells in itertools.islice(train, _N_WARM_UP + _N_TIMED):
            optimizer.zero_grad(set_to_none=True)
            loss = objective(cells)
            loss.backward()
            optimizer.step()
            float(loss.detach())  # waits for a GPU
            seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
        scored, started = next(iter(validation or ()), None), time.perf_counter()
        if scored is not None:
            evaluate(program, [scored])
        score = time.perf_counter() - started
    step = statistics.median(seconds[_N_WARM_UP:] or seconds)
    epoch = step * len(train) + score * len(validation or ())
    program.use_precision("fp32")
    program.eval()
    # Weights, gradients and moments of the steps are in the measured peak; average and best weights are not yet.
    measured = max(0, _peak_memory(train.device) - before) + 2 * cost.weights
    return TrainingCost(
        cost.weights, cost.data, max(cost.more, measured), cost.model, cost.checkpoints, cost.n_epochs, epoch
    )


def available_memory() -> int | None:
    """Memory that this process may still take, in bytes; None where the system does not say."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used)) if limit.isdecimal() else free
    except (OSError, ValueError):
        return free


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name == "nt":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _size(n: float) -> str:
    """Bytes in a unit that suits.

    Examples
    --------
    >>> _size(1_500_000_000), _size(20)
    ('1.5 GB', '0.0 MB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    """Seconds in a unit that suits.

    Examples
    --------
    >>> _time(0.25), _time(90), _time(5400)
    ('0.25 s', '1.5 min', '1.5 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
