"""pyro_multivi in one fresh process: trains or predicts once and prints one line of JSON."""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import torch
import torch._dynamo  # the first optimiser imports it; scvi-tools does so when it is imported itself
from make_data import check_shape, load
from measure import Memory, report, seconds, task

import pyro_multivi as pm


def main() -> None:
    """Do one task."""
    job = task()
    memory = Memory()
    on_gpu = job["accelerator"] == "gpu"
    torch.set_num_threads(job["threads"])
    mdata = load(job["data"])
    pm.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    # The penalty of scvi-tools: the same objective.
    model = pm.MULTIVI(mdata, n_hidden=job["n_hidden"], n_latent=job["n_latent"], modality_penalty="Jeffreys")
    ends = [time.perf_counter()]

    def epoch_ended(*_: Any) -> None:
        if on_gpu:
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    # Defaults are not named, so that the benchmark also runs on versions that have nothing else.
    precision, _, compiled = job["precision"].partition("+")
    how = {**({} if precision == "fp32" else {"precision": precision}), **({"compile": True} if compiled else {})}
    model.train(
        max_epochs=job["epochs"],
        lr=job["lr"],
        accelerator=job["accelerator"],
        train_size=job["train_size"],
        validation_size=0.0,
        batch_size=job["batch_size"],
        early_stopping=False,
        callbacks=[epoch_ended],
        progress_bar=False,
        **how,
    )
    result: dict[str, Any] = {
        "versions": {"pyro_multivi": pm.__version__, "torch": torch.__version__},
        "peak_reset": memory.resettable,
        "import_bytes": memory.start,
    }
    if job["part"] == "train":
        result["epoch_seconds"] = [end - start for start, end in pairwise(ends)]
        result["n_steps"] = math.ceil(mdata.n_obs / job["batch_size"])
        result["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else memory.peak()
    else:
        result["latent_seconds"], _ = seconds(model.get_latent_representation)
        memory.reset()
        result["accessibility_seconds"], p = seconds(lambda: model.get_accessibility_estimates(return_numpy=True))
        result["accessibility_peak_bytes"] = memory.peak()
        check_shape(p, mdata)
    report(result)


if __name__ == "__main__":
    main()
