"""Functions by the names of ``scvi.data``, with the columns and names of cells that scvi-tools gives."""

from __future__ import annotations

import os
from typing import Any

import pandas as pd
from anndata import AnnData

from pyro_multivi.data.checks import checked
from pyro_multivi.datasets import organize
from pyro_multivi.datasets.mtx import read_10x_mtx

_RENAMED = {"gene_ids": "ID", "feature_types": "modality"}


@checked
def read_10x_multiome(base_path: str | os.PathLike[str]) -> AnnData:
    """Read a folder of Cell Ranger ARC as ``scvi.data.read_10x_multiome`` does.

    Parameters
    ----------
    base_path
        Folder with ``matrix.mtx``, ``features.tsv`` and ``barcodes.tsv``, each plain or ``.gz``.

    Returns
    -------
    AnnData
        As from :func:`pyro_multivi.read_10x_mtx`, with the columns of scvi-tools: ``var`` has ``ID``, ``modality``
        (Gene Expression or Peaks, recognised by ``setup_anndata``) and, where the file has them, ``chr``, ``start`` and
        ``end``; ``obs["batch_id"]`` is the number behind a barcode, which is cut where the rest is unique.
    """
    adata = read_10x_mtx(base_path)
    var = adata.var.rename(columns=_RENAMED)
    var["modality"] = var["modality"].astype(str)
    if "interval" in var:
        places = var.pop("interval").str.extract(r"^(.*):(\d+)-(\d+)$")
        var["chr"] = places[0]
        var["start"], var["end"] = (pd.to_numeric(places[column]) for column in (1, 2))
    adata.var = var
    return _with_batch_id(adata)


@checked
def read_10x_atac(base_path: str | os.PathLike[str]) -> AnnData:
    """Read a folder of Cell Ranger ATAC, with ``peaks.bed``, as ``scvi.data.read_10x_atac`` does.

    Parameters
    ----------
    base_path
        Folder with ``matrix.mtx``, ``peaks.bed`` and ``barcodes.tsv``, each plain or ``.gz``.

    Returns
    -------
    AnnData
        As from :func:`read_10x_multiome`.
    """
    return read_10x_multiome(base_path)


def organize_multiome_anndatas(
    multi_anndata: AnnData | Any | None = None,
    rna_anndata: AnnData | None = None,
    atac_anndata: AnnData | None = None,
    modality_key: str = "modality",
    **options: Any,
) -> AnnData:
    """Join data as :func:`pyro_multivi.organize_multiome_anndatas`, and name cells as scvi-tools does.

    Scripts cut off the end of every name that scvi-tools adds; of names without it they cut off a part.

    Parameters
    ----------
    multi_anndata, rna_anndata, atac_anndata, modality_key, options
        As there.

    Returns
    -------
    AnnData
        As there; behind each name in ``obs_names`` is what was measured: ``"_paired"``, ``"_expression"`` or
        ``"_accessibility"``.
    """
    joined = organize.organize_multiome_anndatas(multi_anndata, rna_anndata, atac_anndata, modality_key, **options)
    parts = [part for part in (multi_anndata, rna_anndata, atac_anndata) if part is not None]
    names = [name for part in parts for name in part.obs_names]
    joined.obs_names = [f"{name}_{kind}" for name, kind in zip(names, joined.obs[modality_key], strict=True)]
    return joined


def _with_batch_id(adata: AnnData) -> AnnData:
    parts = adata.obs_names.to_series().str.extract(r"^(.*?)-(\d+)$")
    if parts.notna().to_numpy().all():
        adata.obs["batch_id"] = parts[1].astype(int).to_numpy()
        if parts[0].is_unique:
            adata.obs_names = pd.Index(parts[0].to_numpy())
    return adata
