"""A mosaic on disk in every form that is read by cells."""

from __future__ import annotations

import warnings

import pytest
import scipy.sparse as sp
import zarr

import pyro_multivi as pm

try:
    from anndata.io import write_elem
except ImportError:  # anndata before 0.11
    from anndata.experimental import write_elem

FORMS = ("h5ad", "zarr2", "zarr3", "dense")


def write_form(adata, path, form):
    """Write an AnnData; the features' kinds alternate among its columns."""
    if form == "h5ad":
        adata.write_h5ad(path)
    elif form == "dense":
        other = adata.copy()
        other.X = other.X.toarray()
        other.write_h5ad(path)
    else:
        if zarr.__version__.startswith("2."):
            if form[-1] != "2":
                pytest.skip("zarr 2 writes format 2 only")
            group = zarr.open_group(str(path), mode="w")
        else:
            group = zarr.open_group(str(path), mode="w", zarr_format=int(form[-1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr 3 warns of texts
            write_elem(group, "/", adata)
    return path


@pytest.fixture
def mosaic():
    adata = pm.simulate_multiome((60, 30, 30), n_genes=14, n_regions=26, n_batches=2, n_types=2, seed=0)
    adata.X = sp.csr_matrix(adata.X)
    for key in ("obsm", "varm"):
        for name in list(getattr(adata, key)):
            del getattr(adata, key)[name]
    adata.uns.clear()
    return adata[:, list(range(0, 40, 2)) + list(range(1, 40, 2))].copy()


@pytest.fixture(params=FORMS)
def on_disk(request, mosaic, tmp_path):
    suffix = "zarr" if request.param.startswith("zarr") else "h5ad"
    return write_form(mosaic, tmp_path / f"cells.{suffix}", request.param)
