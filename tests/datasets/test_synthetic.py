"""``scvi.data.synthetic_iid``: its shapes and names."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

import pyro_multivi as scvi
from pyro_multivi.data import synthetic_iid


def test_an_anndata():
    adata = synthetic_iid(batch_size=20, n_genes=7, n_proteins=3, n_regions=5, n_batches=3, n_labels=2)
    assert adata.shape == (60, 7)
    assert list(adata.var_names[:2]) == ["gene_0", "gene_1"]
    assert adata.obs["batch"].value_counts().to_dict() == {"batch_0": 20, "batch_1": 20, "batch_2": 20}
    assert set(adata.obs["labels"]) == {"label_0", "label_1"}
    assert adata.obsm["protein_expression"].shape == (60, 3)
    assert adata.obsm["accessibility"].shape == (60, 5)
    assert list(adata.uns["protein_names"]) == ["protein_0", "protein_1", "protein_2"]


def test_a_mudata():
    pytest.importorskip("mudata")
    mdata = synthetic_iid(10, return_mudata=True, protein_expression_key="protein", generate_coordinates=True)
    assert {name: part.shape for name, part in mdata.mod.items()} == {
        "rna": (20, 100), "accessibility": (20, 100), "protein": (20, 100),
    }  # fmt: skip
    assert {"batch", "labels"} <= set(mdata.obs)
    assert mdata.mod["accessibility"].var_names[0] == "region_0"
    assert mdata.obsm["coordinates"].shape == (20, 2)


def test_what_may_be_left_out():
    adata = synthetic_iid(10, n_proteins=0, n_regions=0, n_labels=0, sparse_format="csr_matrix")
    assert isinstance(adata.X, sp.csr_matrix)
    assert not adata.obsm
    assert list(adata.obs) == ["batch"]


def test_seeds():
    one, two = synthetic_iid(10).X, synthetic_iid(10).X
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, synthetic_iid(10, seed=1).X)
    scvi.settings.seed = 1
    try:
        np.testing.assert_array_equal(synthetic_iid(10).X, synthetic_iid(10, seed=1).X)
    finally:
        scvi.settings.seed = None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_batches": 0}, "n_batches=0 is not allowed"),
        ({"n_genes": 0}, "n_genes=0 is not allowed"),
        ({"rna_dist": "poisson"}, "rna_dist='poisson' is not allowed: choose one of 'nb', 'normal'"),
        ({"sparse_format": "coo"}, "sparse_format='coo' is not allowed"),
    ],
)
def test_bad_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        synthetic_iid(**given)
