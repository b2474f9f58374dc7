"""Scenarios of training that several processes run, each of which writes what it ended with.

    python launch.py FOLDER SCENARIO:PROCESSES ...

One process imports torch and forks the others, which find torchrun's variables in their environment.
"""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyro_multivi as pm


def model_of(n: tuple[int, int, int] = (30, 15, 15), program: type | None = None, **choices: Any) -> pm.MULTIVI:
    adata = pm.simulate_multiome(n, n_genes=40, n_regions=60, n_batches=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    return pm.MULTIVI(adata, **{"n_hidden": 6, "n_latent": 2, **choices})


def outcome(model: pm.MULTIVI) -> dict[str, Any]:
    moments = model._optimizer_state["state"]
    return {
        "history": [{k: float(v) for k, v in row.items()} for row in model._history.rows],
        "weights": dict(model.program.state_dict()),
        "moments": {key: value["exp_avg"] for key, value in moments.items()},
    }


def trained(model: pm.MULTIVI, **options: Any) -> dict[str, Any]:
    model.train(**{"max_epochs": 4, "batch_size": 16, "progress_bar": False, **options})
    return outcome(model)


def one_step(_: Path) -> dict[str, Any]:
    """One step without noise, on a number of cells that two and three do not divide."""
    torch.distributions.normal._standard_normal = lambda shape, dtype, device: torch.zeros(shape, dtype=dtype)  # type: ignore[attr-defined]
    pm.MultiVIProgram.seen = lambda _, experts: experts  # type: ignore[method-assign]
    model = model_of((31, 15, 15), modality_penalty="None", dropout_rate=0.0)
    return trained(model, max_epochs=1, batch_size=64, train_size=1.0, n_epochs_kl_warmup=None)


def defaults(_: Path) -> dict[str, Any]:
    return trained(model_of(), max_epochs=12)


def adversary(_: Path) -> dict[str, Any]:
    return trained(model_of(), adversarial_mixing=True, gradient_clip=5.0, seed=3)


def batch_norm(_: Path) -> dict[str, Any]:
    """More than 100 steps, from which on weights and running statistics are averaged."""
    return trained(model_of(use_batch_norm="both", dropout_rate=0.1), max_epochs=9, batch_size=4)


def few_held_out(_: Path) -> dict[str, Any]:
    return trained(model_of(), train_size=0.9, validation_size=0.05)


def continued(_: Path) -> dict[str, Any]:
    model = model_of()
    trained(model, max_epochs=2)
    return trained(model, max_epochs=2)


def stopped(_: Path) -> dict[str, Any]:
    """A callback of one process stops all."""
    rank = int(os.environ.get("RANK", "0"))
    return trained(model_of(), callbacks=[lambda epoch, row, program: rank == 0 and epoch == 1])


def no_cells(_: Path) -> dict[str, Any]:
    return trained(model_of((2, 1, 1)), train_size=0.75, validation_size=0.0)


def other_cells(_: Path) -> dict[str, Any]:
    return trained(model_of((30, 15, 15 + int(os.environ.get("RANK", "0")))))


def run(scenario: Callable[[Path], dict[str, Any]], folder: Path, size: int) -> None:
    """Call a scenario in so many processes; write the outcome of each, or its error in place of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if size > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        try:
            found = scenario(folder)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        torch.save(found, folder / f"{scenario.__name__}-{size}-{rank}.pt")
        os._exit(0)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    for asked in sys.argv[2:]:
        name, number = asked.split(":")
        run(globals()[name], Path(sys.argv[1]), int(number))
