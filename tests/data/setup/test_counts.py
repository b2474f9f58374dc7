"""Reading counts: the same numbers, in as little memory as holds them."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import pyro_multivi as pm
from pyro_multivi.data.setup import counts as extract
from pyro_multivi.data.setup.spec import DataSpec


def read(counts):
    """A table of cells with two genes and as many regions as there are columns left."""
    n, width = counts.shape
    kinds = ["Gene Expression"] * 2 + ["Peaks"] * (width - 2)
    var = pd.DataFrame({"feature_types": kinds}, index=[f"f{i}" for i in range(width)])
    adata = ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(index=[f"c{i}" for i in range(n)]), var=var)
    pm.MULTIVI.setup_anndata(adata)
    return DataSpec.of(adata).table(adata)


def held_once(values):
    return values.untyped_storage().nbytes() == values.element_size()


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize(
    ("largest", "held"), [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.float32)]
)
@pytest.mark.parametrize("block_rows", [1, 4096])
def test_the_smallest_type_that_holds_all_counts(monkeypatch, kind, largest, held, block_rows):
    monkeypatch.setattr(extract, "_BLOCK_ROWS", block_rows)
    counts = np.array([[1, 2, 1, 1], [3, largest, 0, 1], [5, 1, 1, 0]], dtype=kind)
    table = read(counts)
    assert table.x.val.dtype == held
    assert torch.equal(table.x.to_dense().double(), torch.from_numpy(counts[:, :2]).double())
    # Ones are not written down at all; counts of regions other than one are kept.
    assert held_once(table.y.val)
    cells = table.batch(torch.tensor([2, 1]))
    assert cells.x.dtype == cells.y.dtype == torch.float32
    assert torch.equal(cells.x.to_dense(), torch.from_numpy(counts[[2, 1], :2]).float())
    assert torch.equal(cells.y.to_dense(), torch.from_numpy(counts[[2, 1], 2:]).float())


def test_what_no_small_type_holds_stays_as_it_is():
    counts = np.array([[1, 1, 0.5, 2, 1], [3, 1, 0, 1, 1]], dtype=np.float32)
    table = read(counts)
    assert table.y.val.dtype == torch.float32
    assert torch.equal(table.y.to_dense(), torch.from_numpy(counts[:, 2:]))


def test_types_that_differ_from_block_to_block(monkeypatch):
    monkeypatch.setattr(extract, "_BLOCK_ROWS", 1)
    counts = np.array([[1, 1, 1, 300], [3, 1, 1.5, 0], [255, 1, 2, 0]], dtype=np.float32)
    assert torch.equal(read(counts).y.to_dense(), torch.from_numpy(counts[:, 2:]))


@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize(
    ("part", "place", "value"), [("indptr", 3, 10**6), ("indptr", 3, 0), ("indices", 5, 10**6), ("indices", 5, -1)]
)
def test_a_damaged_matrix_is_refused(form, part, place, value):
    """It may come out of a damaged file, as anndata checks nothing; SciPy crashes at some uses of it."""
    adata = pm.simulate_multiome((20, 0, 0), n_genes=10, n_regions=20, seed=0)
    adata.X = form(adata.X)
    getattr(adata.X, part)[place] = value
    with pytest.raises(
        ValueError, match=r"adata\.X is damaged: positions of its entries \(indptr, indices\) do not fit"
    ):
        pm.MULTIVI.setup_anndata(adata)


@pytest.mark.parametrize("value", [1e-50, 1e300])
def test_values_of_regions_that_single_precision_does_not_hold_are_refused(value):
    counts = np.array([[1.0, 2.0, 1.0, 0.0], [3.0, 0.0, 0.0, value]])
    message = r"ATAC values that are out of the range of single precision .* cell 'c1' and region 'f3'"
    with pytest.raises(ValueError, match=message):
        read(counts)
    counts[1, 3] = 1e-40
    assert read(counts).y.to_dense()[1, 1] > 0
