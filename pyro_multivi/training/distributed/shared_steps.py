"""Steps that several processes take together: each has a share of the cells, all have the same weights.

Not torch's DistributedDataParallel, though it does the same: a share of fewer cells has to weigh less, and weights on
the loss would break the promise of equal ones by which likelihoods form their gradients in the forward pass; a share
without cells of a modality leaves parameters without gradient; and its buckets take one more copy of all gradients,
which are as large as the weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.processes.group import Processes
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import Terms
from pyro_multivi.training.checkpoints.run import Run
from pyro_multivi.training.options import FitOptions

# Gradients of fewer elements travel together.
_SMALL = 65_536


def check_runs(processes: Processes, run: Run) -> None:
    """Refuse processes whose data, models or arguments differ, before any of them waits for another.

    Parameters
    ----------
    run
        What this process trains on what.

    Raises
    ------
    ValueError
        In all processes, with what differs from the first.
    """
    if not processes.are_several:
        return
    first = Run(**json.loads(processes.broadcast(json.dumps(run._asdict()).encode())))
    own = run.difference(first, "in process 0", f"in process {processes.rank}")
    found = [json.loads(part) for part in processes.gather_bytes(json.dumps(own).encode())]
    others = [f"process {rank} ({'; '.join(words)})" for rank, words in enumerate(found) if words]
    if others:
        raise ValueError(
            f"The {processes.size} processes were not given the same. From process 0 differ {', '.join(others)}. Each "
            "has to make the same model of the same data, with cells and features in the same order, and to give the "
            "same arguments."
        )


def check_processes(
    processes: Processes,
    program: MultiVIProgram,
    train: Minibatches,
    validation: Minibatches | None,
    options: FitOptions,
) -> None:
    """Refuse processes whose models, cells or options differ, and shares without cells.

    Raises
    ------
    ValueError
        In all processes.
    """
    if not processes.are_several:
        return
    shapes = [(name, tuple(parameter.shape)) for name, parameter in program.named_parameters()]
    chosen = {name: value for name, value in vars(options).items() if isinstance(value, (int, float, str, type(None)))}
    del chosen["progress_bar"]
    held_out = None if validation is None else validation.index.tolist()
    described = {
        "the model": shapes,
        "the cells": (train.table.cell_names, train.index.tolist(), held_out),
        "the options of training": (chosen, train.batch_size),
    }
    processes.check_same(**{name: zlib.crc32(repr(value).encode()) for name, value in described.items()})
    train.shared(processes.rank, processes.size)


def share_weights(processes: Processes, program: nn.Module) -> None:
    """Give all processes the parameters and buffers of the first."""
    processes.broadcast_([value.data for value in (*program.parameters(), *program.buffers())])


def sum_gradients(processes: Processes, parameters: Sequence[nn.Parameter], loss: Tensor, share: float) -> Tensor:
    """Replace gradients of the mean over a share of the cells by those of the mean over all; return that mean.

    Parameters
    ----------
    parameters
        Parameters that are trained. One that got no gradient in any process has none afterwards.
    loss
        Mean over the cells of this process, a scalar.
    share
        Part of the minibatch's cells that this process has.
    """
    if not processes.are_several:
        return loss
    missing = [place for place, parameter in enumerate(parameters) if parameter.grad is None]
    for place in missing:
        parameters[place].grad = torch.zeros_like(parameters[place])
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        gradient.mul_(share)
    reached = loss.new_ones(len(parameters))
    reached[missing] = 0
    small = [gradient for gradient in gradients if gradient.numel() < _SMALL]
    together = [loss.detach().mul(share), reached, *small]
    flat = torch.cat([part.reshape(-1) for part in together])
    processes.sum_([flat, *(gradient for gradient in gradients if gradient.numel() >= _SMALL)])
    total, reached, *summed = flat.split([part.numel() for part in together])
    for gradient, value in zip(small, summed, strict=True):
        gradient.copy_(value.view_as(gradient))
    for place in missing:
        if not reached[place]:
            parameters[place].grad = None
    return total.squeeze(0)


def share_running_statistics(processes: Processes, program: nn.Module) -> None:
    """Give all processes the running statistics of the first's layers: batch statistics are those of each share."""
    if processes.are_several:
        processes.broadcast_([buffer for name, buffer in program.named_buffers() if "." in name])


def sum_terms(processes: Processes, terms: Terms, n_cells: int) -> Terms:
    """Sum terms over processes, which have so many cells together."""
    if not processes.are_several:
        return terms
    groups = (terms.log_likelihood, terms.kl, terms.training, terms.n_measured)
    entries = [(group, name) for group in groups for name in group]
    flat = torch.stack([group[name].double() for group, name in entries])
    processes.sum_([flat])
    for (group, name), value in zip(entries, flat, strict=True):
        group[name] = value
    return Terms(*groups, n_cells=n_cells)
