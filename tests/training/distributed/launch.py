"""Scenarios of training that several processes run, each of which writes what it ended with.

    python launch.py FOLDER SCENARIO:PROCESSES ...

One process imports torch and forks the others, which find torchrun's variables in their environment.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import pyro_multivi as pm

#: Tables of a check; sums of scores are of whole numbers only but for rounding.
CHECKED = ("genes", "regions", "cells", "groups", "totals", "user", "histogram", "scores", "imputed")


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
    for module in model.program.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return trained(model, max_epochs=1, batch_size=64, train_size=1.0, n_epochs_kl_warmup=None)


def defaults(_: Path) -> dict[str, Any]:
    return trained(model_of(), max_epochs=8)


def learned(_: Path) -> dict[str, Any]:
    """As long as it takes until the loss has fallen far below its noise."""
    return trained(model_of((120, 60, 60), n_hidden=16), max_epochs=40, lr=1e-2, early_stopping=False)


def adversary(_: Path) -> dict[str, Any]:
    return trained(model_of(), adversarial_mixing=True, gradient_clip=5.0, seed=3)


def batch_norm(_: Path) -> dict[str, Any]:
    """More than 100 steps, from which on weights and running statistics are averaged."""
    return trained(model_of(use_batch_norm="both", dropout_rate=0.1), max_epochs=8, batch_size=4)


def few_held_out(_: Path) -> dict[str, Any]:
    return trained(model_of(), train_size=0.9, validation_size=0.05)


def listed(_: Path) -> dict[str, Any]:
    return trained(model_of(), external_indexing=[range(10, 60), range(7), range(7, 10)])


def continued(_: Path) -> dict[str, Any]:
    model = model_of()
    trained(model, max_epochs=2)
    return trained(model, max_epochs=2)


def stopped(_: Path) -> dict[str, Any]:
    """A callback of one process stops all."""
    rank = int(os.environ.get("RANK", "0"))
    return trained(model_of(), callbacks=[lambda epoch, row, program: rank == 0 and epoch == 1])


def in_epoch_two_of_process_one(act: Callable[[], object]) -> Callable[..., None]:
    def callback(epoch: int, row: dict[str, float], program: pm.MultiVIProgram) -> None:
        if os.environ.get("RANK") == "1" and epoch == 1:
            act()

    return callback


def uninterrupted(_: Path) -> dict[str, Any]:
    return trained(model_of(), adversarial_mixing=True)


def from_disk(folder: Path) -> dict[str, Any]:
    """Counts on disk, of which each process reads its share."""
    store = folder / f"cells{os.environ.get('RANK', '')}.h5ad"
    adata = pm.simulate_multiome((90, 30, 30), n_genes=40, n_regions=60, seed=0)
    adata.write_h5ad(store)
    adata = pm.open_stores(store)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    return trained(pm.MULTIVI(adata, n_hidden=6, n_latent=2), shuffle_block=8, shuffle_buffer=6)


def killed(folder: Path) -> dict[str, Any]:
    act = in_epoch_two_of_process_one(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return trained(
        model_of(), adversarial_mixing=True, checkpoint=folder / "killed", checkpoint_every=1, callbacks=[act]
    )


def terminated(folder: Path) -> dict[str, Any]:
    """One process gets SIGTERM: all end by it, between the same two steps, once the first has written."""
    save = torch.save

    def save_slowly(*given: Any) -> None:
        time.sleep(1)
        save(*given)

    torch.save = save_slowly
    act = in_epoch_two_of_process_one(lambda: os.kill(os.getpid(), signal.SIGTERM))
    return trained(model_of(), adversarial_mixing=True, checkpoint=folder / "terminated", callbacks=[act])


def resumed_after_kill(folder: Path) -> dict[str, Any]:
    return trained(model_of(), adversarial_mixing=True, checkpoint=folder / "killed", resume=True, checkpoint_every=1)


def resumed_after_termination(folder: Path) -> dict[str, Any]:
    return trained(model_of(), adversarial_mixing=True, checkpoint=folder / "terminated", resume=True)


def not_resumed(folder: Path) -> dict[str, Any]:
    return trained(model_of(), checkpoint=folder / "killed")


def fails(_: Path) -> dict[str, Any]:
    """One process raises an error."""

    def refuse() -> None:
        raise OSError("nothing works")

    return trained(model_of(), callbacks=[in_epoch_two_of_process_one(refuse)])


def numbers(table: pd.DataFrame) -> np.ndarray:
    return table.select_dtypes("number").to_numpy()


def posterior(folder: Path) -> dict[str, Any]:
    """Results of the same model, which each process has trained alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    variables = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    model = model_of()
    model.train(2, batch_size=16, progress_bar=False)
    os.environ.update(variables)
    groups = {"groupby": "cell_type", "silent": True, "seed": 1}
    with pm.distributed():
        model.save(folder / f"model{size}")
        calls: list[int] = []
        guide, pm.MultiVIProgram.guide = pm.MultiVIProgram.guide, lambda *given: calls.append(1) or guide(*given)  # type: ignore
        found: dict[str, Any] = {
            "latent": model.get_latent_representation(batch_size=8),
            "draws": model.get_latent_representation(batch_size=8, give_mean=False, n_samples=3),
            "elbo": model.get_elbo(return_mean=False, batch_size=8),
            "marginal": model.get_marginal_ll(return_mean=False, batch_size=8, n_mc_samples=100),
            "library": model.get_library_size_factors(batch_size=8)["expression"],
            "rho": model.get_normalized_expression(batch_size=8, n_samples=2).to_numpy(),
            "scaled": model.get_normalized_expression(batch_size=8, library_size="latent", return_numpy=True),
            "p": model.get_accessibility_estimates(batch_size=8, threshold=0.2, return_numpy=True).toarray(),
            "few": model.get_normalized_expression(indices=[3], return_numpy=True),
            "filled": model.impute(batch_size=8).layers["imputed"].toarray(),
            "de": numbers(model.differential_expression(**groups)),
            "da": numbers(model.differential_accessibility(**groups, unit="cell")),
            "vanilla": numbers(model.differential_expression(**groups, unit="cell", mode="vanilla", gene_list=[5, 9])),
            "sampled": [x.toarray() for x in model.posterior_predictive_sample(n_samples=3, batch_size=8)["y"]],
        }
        check = model.posterior_predictive_check(
            None, None, {"largest": lambda counts: counts.max()}, 4, False, groupby="cell_type", level=0.5, batch_size=8
        )
        for name in CHECKED:
            found[name] = numbers(getattr(check, name))
        query = pm.MULTIVI.load_query_data(model.adata[::2].copy(), model)
        found["labels"] = numbers(model.transfer_labels(query, "cell_type", n_neighbors=5))
        if find_spec("arviz"):
            exported = model.to_inference_data(indices=range(60), n_samples=4, batch_size=8)
            found["exported"] = np.concatenate(
                [each.to_numpy().ravel() for each in exported.posterior_predictive.values()]
            )
        pm.MultiVIProgram.guide = guide  # type: ignore[method-assign]
        out = model.get_normalized_expression(batch_size=8, out=folder / f"rho{size}.h5ad", silent=True)
        assert out == folder / f"rho{size}.h5ad"
        model.impute(batch_size=8, out=folder / f"imputed{size}.h5ad", silent=True)
    return {"calls": len(calls), **{name: torch.from_numpy(np.array(value)) for name, value in found.items()}}


def out_of_one(folder: Path) -> dict[str, Any]:
    """Without the block each process is alone, and a file is that of the first."""
    model = model_of()
    model.is_trained = True
    return {"path": str(model.get_normalized_expression(out=folder / "alone.h5ad", silent=True))}


def no_cells(_: Path) -> dict[str, Any]:
    return trained(model_of((2, 1, 1)), train_size=0.75, validation_size=0.0)


def other_cells(_: Path) -> dict[str, Any]:
    return trained(model_of((30, 15, 15 + int(os.environ.get("RANK", "0")))))


def other_given(_: Path) -> dict[str, Any]:
    """Messages where process 1 was given something else, by what that is."""
    is_other, found = os.environ.get("RANK") == "1", {}

    def message(choices: dict[str, Any], options: dict[str, Any], change: Callable[[Any], object]) -> str:
        adata = pm.simulate_multiome((30, 15, 15), n_genes=40, n_regions=60, n_batches=2, seed=0)
        adata.obs["age"] = np.arange(60.0)
        if is_other:
            change(adata)
        keys = {"batch_key": "batch", "modality_key": "modality", "continuous_covariate_keys": ["age"]}
        pm.MULTIVI.setup_anndata(adata, **keys)
        model = pm.MULTIVI(adata, n_hidden=6, n_latent=2, **(choices if is_other else {}))
        try:
            model.train(**{"max_epochs": 1, "batch_size": 16, "progress_bar": False, **(options if is_other else {})})
        except ValueError as error:
            return str(error)
        return ""

    def more_counts(adata: Any) -> None:
        adata.X.data[:50] += 3

    def other_names(adata: Any) -> None:
        adata.var_names = [f"x{name}" for name in adata.var_names]

    def other_batches(adata: Any) -> None:
        adata.obs["batch"] = np.where(np.arange(60) % 2, "batch_0", "batch_1")

    def other_age(adata: Any) -> None:
        adata.obs["age"] = adata.obs["age"].to_numpy()[::-1]

    def fewer_measured(adata: Any) -> None:
        adata.obs["modality"] = adata.obs["modality"].astype(str)
        adata.X[0, :40] = 0
        adata.X.eliminate_zeros()
        adata.obs.iloc[0, adata.obs.columns.get_loc("modality")] = "accessibility"

    with pm.distributed():
        for change in (more_counts, other_names, other_batches, other_age, fewer_measured):
            found[change.__name__] = message({}, {}, change)
        for name, value in {"mixing_weight": 0.0, "contrast_weight": 0.0, "dropout_rate": 0.3}.items():
            found[name] = message({name: value}, {}, lambda _: None)
        lists = {"external_indexing": [range(6, 60), range(6)]}
        for name, value in {"checkpoint": "unused", "lr": 1e-3, "seed": 5, **lists}.items():
            found[name] = message({}, {name: value}, lambda _: None)
        found["nothing"] = message({"seed": 3}, {}, lambda _: None)
    return found


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
    while children:
        child, status = os.wait()
        children.remove(child)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM:
            for other in children:  # as torchrun does
                os.kill(other, signal.SIGTERM)


if __name__ == "__main__":
    # Once for all that are forked: what is imported when a model is made, and when an optimizer is.
    import torch._dynamo

    model_of()
    for asked in sys.argv[2:]:
        name, number = asked.split(":")
        run(globals()[name], Path(sys.argv[1]), int(number))
