"""scvi-tools' MULTIVI in one fresh process: trains or predicts once and prints one line of JSON.

Runs in the environment of scvi-tools, where pyro_multivi is not installed.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from itertools import pairwise
from typing import Any

warnings.filterwarnings("ignore")

import scvi  # noqa: E402
import torch  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402
from make_data import check_shape, load  # noqa: E402
from measure import Memory, report, seconds, task  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class EpochEnds(Callback):
    """When each epoch ended."""

    def __init__(self) -> None:
        self.at = [time.perf_counter()]

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the time, when all that was sent to a GPU is done."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())


def main() -> None:
    """Do one task."""
    job = task()
    memory = Memory()
    on_gpu = job["accelerator"] == "gpu"
    torch.set_num_threads(job["threads"])
    mdata = load(job["data"])
    scvi.model.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = scvi.model.MULTIVI(mdata, n_hidden=job["n_hidden"], n_latent=job["n_latent"])
    ends = EpochEnds()
    model.train(
        max_epochs=job["epochs"],
        lr=job["lr"],
        accelerator=job["accelerator"],
        train_size=job["train_size"],
        validation_size=0.0,
        batch_size=job["batch_size"],
        early_stopping=False,
        adversarial_mixing=False,
        callbacks=[ends],
        enable_progress_bar=False,
    )
    result: dict[str, Any] = {
        "versions": {"scvi-tools": scvi.__version__, "torch": torch.__version__},
        "peak_reset": memory.resettable,
        "import_bytes": memory.start,
    }
    if job["part"] == "train":
        result["epoch_seconds"] = [end - start for start, end in pairwise(ends.at)]
        result["n_steps"] = math.ceil(mdata.n_obs / job["batch_size"])
        result["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else memory.peak()
    else:
        result["latent_seconds"], _ = seconds(model.get_latent_representation)
        memory.reset()
        result["accessibility_seconds"], p = seconds(lambda: model.get_normalized_accessibility(return_numpy=True))
        result["accessibility_peak_bytes"] = memory.peak()
        check_shape(p, mdata)
    report(result)


if __name__ == "__main__":
    main()
