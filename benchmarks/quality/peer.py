"""scvi-tools' MULTIVI as a system of the protocol. Runs in its environment."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import anndata  # noqa: E402
import mudata  # noqa: E402
import numpy as np  # noqa: E402
import scvi  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(
    adata: Any,
    n_genes: int,
    has_rna: np.ndarray,
    has_atac: np.ndarray,
    epochs: int | None,
    seed: int,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train once, with its defaults except for ``settings``.

    Parameters
    ----------
    epochs
        At most; None is its default.
    settings
        ``{"batch_key": ..., "model": {...}, "train": {...}}``, all optional. The batch is the
        modality, as its users do it for its adversary to mix modalities, unless a column
        of obs is named.
    """
    chosen = {"batch_key": "modality", "model": {}, "train": {}} | (settings or {})
    scvi.settings.seed = seed
    part = np.select([has_rna & has_atac, has_rna], ["paired", "expression"], "accessibility")
    obs = adata.obs.assign(modality=part).astype({"modality": "category"})
    parts = {
        name: anndata.AnnData(adata.X[:, columns].copy(), obs=obs.copy(), var=adata.var.iloc[columns].copy())
        # In this order: with another, version 1.4.2 does not run.
        for name, columns in (("rna", slice(None, n_genes)), ("atac", slice(n_genes, None)))
    }
    mdata = mudata.MuData(parts)
    scvi.model.MULTIVI.setup_mudata(
        mdata,
        batch_key=chosen["batch_key"],
        modalities={"rna_layer": "rna", "atac_layer": "atac", "batch_key": "rna"},
    )
    model = scvi.model.MULTIVI(mdata, **chosen["model"])
    options = {"accelerator": "cpu", "enable_progress_bar": False, **chosen["train"]}
    if epochs is not None:
        # Its default of 50 would leave a short run without a KL term.
        options = {"max_epochs": epochs, "n_epochs_kl_warmup": min(50, epochs // 2), **options}
    started = time.perf_counter()
    model.train(**options)
    seconds = time.perf_counter() - started
    return {
        "latent": model.get_latent_representation(),
        "z_rna": model.get_latent_representation(modality="expression"),
        "z_atac": model.get_latent_representation(modality="accessibility"),
        "rho": lambda cells: model.get_normalized_expression(indices=cells, return_numpy=True),
        "p": lambda cells: model.get_normalized_accessibility(indices=cells, return_numpy=True, normalize_regions=True),
        "seconds": seconds,
        "epochs": len(model.history["elbo_train"]),
    }
