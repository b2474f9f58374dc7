"""Train on a file and write results, in one process or in several: torchrun ... train_shared.py DATA OUT.

Every process runs this from start to end. The first writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pyro_multivi as pm


def main(data: str, out: str) -> None:
    """Train with checkpoints, then write the model, latent states and normalized expression."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    adata = pm.read(data)
    pm.MULTIVI.setup_anndata(adata)
    model = pm.MULTIVI(adata)
    with pm.distributed() as processes:
        model.train(max_epochs=100, checkpoint=folder / "checkpoints", resume=(folder / "checkpoints").exists())
        model.save(folder / "model", overwrite=True)
        adata.obsm["X_multivi"] = model.get_latent_representation()
        model.get_normalized_expression(out=folder / "expression.h5ad")
    if processes.is_first:
        adata.write_h5ad(folder / "cells.h5ad")


if __name__ == "__main__":
    main(*sys.argv[1:3])
