"""Readers by the names, and with the columns, of ``scvi.data``."""

from __future__ import annotations

import os

import pandas as pd
from anndata import AnnData

from pyro_multivi.data.checks import checked
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


def _with_batch_id(adata: AnnData) -> AnnData:
    parts = adata.obs_names.to_series().str.extract(r"^(.*?)-(\d+)$")
    if parts.notna().to_numpy().all():
        adata.obs["batch_id"] = parts[1].astype(int).to_numpy()
        if parts[0].is_unique:
            adata.obs_names = pd.Index(parts[0].to_numpy())
    return adata
