"""The counts of an object are read once, and again when it holds something else."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import pyro_multivi as pm
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.setup import counts as reader
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores.matrix import StoreChangedError
from pyro_multivi.data.table import CellTable

KEYS = {"batch_key": "batch", "modality_key": "modality"}


@pytest.fixture
def adata() -> ad.AnnData:
    return pm.simulate_multiome((20, 10, 10), n_genes=12, n_regions=18, n_batches=2, seed=0)


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The matrices read so far."""
    found: list[str] = []
    blocks = reader._blocks

    def counted(counts, stored):
        found.append(counts.where)
        return blocks(counts, stored)

    monkeypatch.setattr(reader, "_blocks", counted)
    return found


def assert_same(one: CellTable, other: CellTable) -> None:
    for modality in MODALITIES:
        assert torch.equal(modality.counts_in(one).to_dense(), modality.counts_in(other).to_dense())
        assert torch.equal(modality.measured_in(one), modality.measured_in(other))
    assert torch.equal(one.design, other.design)
    assert one.cell_names == other.cell_names


def test_setup_and_constructor_read_once(adata, sweeps):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    assert sweeps == ["adata.X"]
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    assert sweeps == ["adata.X"]
    assert_same(model.spec.table(adata), model.spec.table(adata.copy()))


def test_each_modality_of_a_mudata_is_read_once(adata, sweeps):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=12, n_regions=18, seed=0, return_mudata=True)
    pm.MULTIVI.setup_mudata(mdata)
    pm.MULTIVI(mdata, n_hidden=8, n_latent=2)
    assert sweeps == ["mdata.mod['rna'].X", "mdata.mod['atac'].X"]
    mdata.mod["atac"].X.data[0] += 1
    DataSpec.of(mdata)
    assert len(sweeps) == 4


def test_queries_of_the_same_object_read_once(adata, sweeps):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=1, progress_bar=False)
    query = adata[::2].copy()
    before = len(sweeps)
    first = model.get_latent_representation(query)
    model.get_normalized_expression(query)
    np.testing.assert_array_equal(model.get_latent_representation(query), first)
    assert len(sweeps) == before + 1
    np.testing.assert_array_equal(model.get_latent_representation(adata)[::2], first)
    assert len(sweeps) == before + 1  # the data of training are in the model
    view = adata[::2]
    np.testing.assert_array_equal(model.get_latent_representation(view), first)
    np.testing.assert_array_equal(model.get_latent_representation(view), first)
    assert len(sweeps) == before + 2


def normalise(adata: ad.AnnData) -> None:
    adata.X.data[:] = np.log1p(adata.X.data)


def double_one(adata: ad.AnnData) -> None:
    adata.X.data[7] *= 2


def become(adata: ad.AnnData, part: ad.AnnData) -> None:
    """Make an object hold something else, as scanpy's filters do by a private method of anndata."""
    adata.__init__(part.copy())


def reorder(adata: ad.AnnData) -> None:
    become(adata, adata[::-1])


def filter_cells(adata: ad.AnnData) -> None:
    become(adata, adata[:-1])


def reorder_features(adata: ad.AnnData) -> None:
    become(adata, adata[:, ::-1])


def rename_cells(adata: ad.AnnData) -> None:
    adata.obs_names = [f"new_{name}" for name in adata.obs_names]


def move_a_cell(adata: ad.AnnData) -> None:
    adata.obs.loc[adata.obs_names[0], "batch"] = ({"batch_0", "batch_1"} - {adata.obs["batch"].iloc[0]}).pop()


def exchange_types(adata: ad.AnnData) -> None:
    adata.var["feature_types"] = adata.var["feature_types"].cat.rename_categories(
        {"Peaks": "Gene Expression", "Gene Expression": "Peaks"}
    )


@pytest.mark.parametrize(
    "change", [double_one, reorder, filter_cells, reorder_features, rename_cells, move_a_cell, exchange_types]
)
@pytest.mark.parametrize("of_a_query", [False, True])
def test_a_changed_object_is_read_anew(adata, sweeps, change: Callable[[ad.AnnData], None], of_a_query: bool):
    adata.obs["modality"] = "paired"
    with pytest.warns(UserWarning, match=r"10 of the 40 cells said to have (RNA|ATAC) have no count in adata.X"):
        pm.MULTIVI.setup_anndata(adata, **KEYS)
    spec = DataSpec.of(adata)
    data = adata.copy() if of_a_query else adata
    spec.table(data)
    before = len(sweeps)
    spec.table(data)
    assert len(sweeps) == before
    change(data)
    if of_a_query and change is exchange_types:
        with pytest.raises(ValueError, match="lacks 12 of the model's 12 genes"):
            spec.table(data)
        return
    now = spec if of_a_query else DataSpec.of(data)
    table = now.table(data)
    assert len(sweeps) == before + 1
    assert_same(table, now.table(data.copy()))


def test_a_changed_object_is_checked_anew(adata):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    spec = DataSpec.of(adata)
    spec.table(adata)
    normalise(adata)
    with pytest.raises(ValueError, match="RNA values that are not a whole number"):
        pm.MULTIVI(adata)
    with pytest.raises(ValueError, match="RNA values that are not a whole number"):
        spec.table(adata)


def test_what_the_table_is_not_made_from_may_change(adata, sweeps):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    adata.obs["cluster"] = "a"
    adata.layers["log"] = adata.X.log1p()
    adata.obsm["latent"] = np.zeros((adata.n_obs, 2))
    DataSpec.of(adata).table(adata)
    assert len(sweeps) == 1


def test_another_setup_reads_anew(adata, sweeps):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    assert DataSpec.of(adata).n_batch == 2
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    spec = DataSpec.of(adata)
    assert spec.n_batch == 1
    assert spec.table(adata).design.tolist() == [[1.0]] * adata.n_obs
    assert len(sweeps) == 2


def test_a_query_is_not_taken_for_the_data_of_a_model(adata):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    spec = DataSpec.of(adata)
    query = adata[::2, ::-1].copy()
    spec.table(query)
    own = DataSpec.of(query)
    assert own.gene_names == spec.gene_names[::-1]
    assert own.table(query).x.shape == (20, 12)
    assert_same(spec.table(query), spec.table(adata[::2]))


@pytest.mark.parametrize("form", ["frame", "array", "sparse"])
def test_a_changed_extra_modality_is_read_anew(adata, form):
    protein = np.random.default_rng(0).poisson(3.0, (adata.n_obs, 3)).astype(np.float32)
    frame = pd.DataFrame(protein, index=adata.obs_names, columns=["a", "b", "c"])
    adata.obsm["protein"] = {"frame": frame, "array": protein, "sparse": sp.csr_matrix(protein)}[form]
    pm.MULTIVI.setup_anndata(adata, **KEYS, extra_obsm_keys=["protein"])
    spec = DataSpec.of(adata)
    before = spec.table(adata)
    assert spec.table(adata) is before
    held = adata.obsm["protein"]
    if form == "frame":
        held.iloc[0, 0] += 1
    else:
        (held.data if form == "sparse" else held.reshape(-1))[0] += 1
    assert spec.table(adata).extra["protein"].values.sum() == before.extra["protein"].values.sum() + 1


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_dense_matrix_is_compared_by_its_values(adata, order, sweeps):
    adata.X = np.array(adata.X.toarray(), order=order)
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    table = DataSpec.of(adata).table(adata)
    assert len(sweeps) == 1
    adata.X[0, 0] += 1
    assert DataSpec.of(adata).table(adata).x.to_dense()[0, 0] == table.x.to_dense()[0, 0] + 1


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_a_file_is_read_once_and_again_when_rewritten(adata, tmp_path, form, sweeps):
    path = tmp_path / "a.h5ad"
    if form == "dense":
        adata.X = adata.X.toarray()
    adata.write_h5ad(path)
    backed = ad.read_h5ad(path, backed="r")
    pm.MULTIVI.setup_anndata(backed, **KEYS)
    before = DataSpec.of(backed).table(backed)
    then = before.x.to_dense()
    assert len(sweeps) == 1
    backed.file.close()
    adata.X = adata.X * 2
    adata.write_h5ad(path)
    os.utime(path, ns=(10**18, 10**18))
    after = DataSpec.of(backed).table(backed)
    backed.file.close()
    assert len(sweeps) == 2
    assert torch.equal(after.x.to_dense(), 2 * then)
    with pytest.raises(StoreChangedError, match=r"a\.h5ad was changed while it was in use"):
        before.x.to_dense()


def test_a_file_open_for_writing_is_always_read(adata, tmp_path, sweeps):
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r+")
    pm.MULTIVI.setup_anndata(backed, **KEYS)
    DataSpec.of(backed).table(backed)
    backed.file.close()
    assert len(sweeps) == 3


def test_the_object_is_not_kept_alive_nor_its_table_after_it(adata):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    spec = DataSpec.of(adata)
    query = adata[::2].copy()
    held, matrix, table = weakref.ref(query), weakref.ref(query.X), weakref.ref(spec.table(query))
    assert table() is not None
    del query
    gc.collect()
    assert held() is matrix() is table() is None


def test_only_the_latest_table_is_kept(adata):
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    spec = DataSpec.of(adata)
    one, other = adata[::2].copy(), adata[1::2].copy()
    table = weakref.ref(spec.table(one))
    spec.table(other)
    gc.collect()
    assert table() is None
