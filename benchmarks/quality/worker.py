"""One system on one data set in one fresh process; prints one line of JSON.

Runs in the environment of the system: ours, or that of scvi-tools, where pyro_multivi is not installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import protocol  # noqa: E402
import summary  # noqa: E402
from measure import Memory, report, task  # noqa: E402

PACKAGES = ("pyro_multivi", "scvi-tools", "torch")


def main() -> None:
    """Do one task."""
    job = task()
    import torch

    torch.set_num_threads(job["threads"])
    system = importlib.import_module(job["system"])
    hidden = protocol.prepare(job["data"], job["seed"], job["n_cells"], twins=job["twins"], paired=job["paired"])
    memory = Memory()
    checkpoints: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    if job["checkpoints"]:
        more = {"watched": tuple(job["checkpoints"]), "watch": watcher(hidden, job, checkpoints)}
    found = system.fit(
        hidden.seen, hidden.n_genes, hidden.has_rna, hidden.has_atac,
        job["epochs"], job["seed"], job["settings"], **more,
    )  # fmt: skip
    peak = memory.peak()
    result = {
        "scores": protocol.score(hidden, found, job["batch_key"]),
        "seconds": found["seconds"],
        "epochs": found.get("epochs"),
        "peak_bytes": peak,
        "n_cells": hidden.whole.n_obs,
        "n_genes": hidden.n_genes,
        "n_regions": hidden.whole.n_vars - hidden.n_genes,
        "versions": versions(),
    }
    if checkpoints:
        result["checkpoints"] = checkpoints
    report(result)


def watcher(hidden: protocol.Hidden, job: dict[str, Any], checkpoints: list[dict[str, Any]]) -> Any:
    """A function that scores a model during training."""
    groups = sorted({summary.METRICS[name].group for name in job["scored"]})

    def watch(epoch: int, seconds: float, found: dict[str, Any]) -> None:
        scores = protocol.score(hidden, found, job["batch_key"], groups)
        chosen = {name: scores[name] for name in job["scored"]}
        checkpoints.append({"epochs": epoch, "seconds": seconds, "scores": chosen})

    return watch


def versions() -> dict[str, str]:
    """Versions of the packages that matter, where they are installed."""
    found = {}
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(module.__version__)
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
