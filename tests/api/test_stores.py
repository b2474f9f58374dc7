"""A model of data on disk: trained, resumed, saved and asked, without the counts in memory."""

from __future__ import annotations

import os
import shutil

import anndata as ad
import numpy as np
import pytest
import torch

import pyro_multivi as pm

SIZES = {"n_hidden": 8, "n_latent": 3}
SHUFFLE = {"batch_size": 16, "shuffle_block": 4, "shuffle_buffer": 8, "progress_bar": False}
QUIET = {"progress_bar": False}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    adata = pm.simulate_multiome((60, 30, 30), n_genes=14, n_regions=26, n_batches=2, n_types=2, seed=0)
    path = tmp_path_factory.mktemp("store") / "cells.h5ad"
    adata.write_h5ad(path)
    return path


def opened(path):
    adata = pm.open_stores(path)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    return adata


@pytest.fixture(scope="module")
def model(path):
    model = pm.MULTIVI(opened(path), **SIZES)
    model.train(max_epochs=3, **SHUFFLE)
    return model


def test_every_result_is_that_of_the_same_weights_on_data_in_memory(model, path, tmp_path):
    model.save(tmp_path / "model")
    memory = pm.MULTIVI.load(tmp_path / "model", pm.read(path))
    assert model._table.on_disk
    assert not memory._table.on_disk
    for name, arguments in {
        "get_latent_representation": {},
        "get_normalized_expression": {"n_samples": 2, "seed": 0},
        "get_accessibility_estimates": {"indices": [5, 90, 3]},
        "get_elbo": {},
        "get_library_size_factors": {},
        "differential_expression": {"groupby": "cell_type", "n_samples": 50},
        "differential_accessibility": {"groupby": "batch", "n_samples": 50},
    }.items():
        one, other = (getattr(each, name)(**arguments) for each in (model, memory))
        if isinstance(one, dict):
            assert one.keys() == other.keys()
            assert all(np.array_equal(one[key], other[key], equal_nan=True) for key in one)
        elif hasattr(one, "equals"):
            assert one.equals(other), name
        else:
            assert np.array_equal(one, other, equal_nan=True), name
    checks = [each.posterior_predictive_check(n_samples=40, seed=0).summary() for each in (model, memory)]
    assert checks[0].equals(checks[1])


def test_training_goes_on_bit_by_bit_from_a_checkpoint_within_an_epoch(path, tmp_path, monkeypatch):
    whole = pm.MULTIVI(opened(path), **SIZES)
    whole.train(max_epochs=4, **SHUFFLE)
    calls, step = [], pm.MultiVIProgram.model

    class Died(BaseException):
        pass

    def dies(program, cells):
        calls.extend([1] * program.training)
        if len(calls) == 17:
            raise Died
        return step(program, cells)

    options = {**SHUFFLE, "max_epochs": 4, "checkpoint": tmp_path / "checkpoints", "checkpoint_every": "0.000001 min"}
    with monkeypatch.context() as patch:
        patch.setattr(pm.MultiVIProgram, "model", dies)
        with pytest.raises(Died):
            pm.MULTIVI(opened(path), **SIZES).train(**options)
    # The data may lie elsewhere when training goes on.
    moved = tmp_path / "moved.h5ad"
    shutil.copy(path, moved)
    resumed = pm.MULTIVI(opened(moved), **SIZES)
    resumed.train(**options, resume=True)
    one, other = whole.program.state_dict(), resumed.program.state_dict()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert whole.history["elbo_validation"].equals(resumed.history["elbo_validation"])


def test_another_shuffling_is_another_run(path, tmp_path):
    pm.MULTIVI(opened(path), **SIZES).train(max_epochs=1, **SHUFFLE, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="shuffle_block: 4 then, 8 now"):
        pm.MULTIVI(opened(path), **SIZES).train(
            max_epochs=1, **{**SHUFFLE, "shuffle_block": 8}, checkpoint=tmp_path, resume=True
        )


def test_a_saved_model_refers_to_the_store(model, path, tmp_path):
    model.save(tmp_path / "model", save_anndata=True)
    saved = ad.read_h5ad(tmp_path / "model" / "adata.h5ad")
    assert saved.X is None
    again = pm.MULTIVI.load(tmp_path / "model")
    assert again._table.on_disk
    assert again.adata.obs_names.equals(model.adata.obs_names)
    assert np.array_equal(again.get_latent_representation(), model.get_latent_representation())


def test_cells_and_features_of_a_store_are_found_by_name(model, path):
    whole = opened(path)
    some = whole[[77, 3, 50], ::-1].copy()
    latent = model.get_latent_representation()
    assert np.allclose(model.get_latent_representation(some), latent[[77, 3, 50]], atol=1e-5)
    assert model.get_normalized_expression(some).index.tolist() == ["cell_077", "cell_003", "cell_050"]
    renamed = whole[:3].copy()
    renamed.obs_names = ["a", "b", "c"]
    with pytest.raises(ValueError, match="3 cells that are in none of its stores: 'a', 'b', 'c'"):
        model.get_latent_representation(renamed)


def test_a_store_that_changes_in_training_ends_it_and_leaves_the_model_usable(path, tmp_path):
    own = tmp_path / "own.h5ad"
    shutil.copy(path, own)
    model = pm.MULTIVI(opened(own), **SIZES)

    def touch(epoch, row, program):
        if epoch == 1:
            os.utime(own, ns=(1, 1))

    with pytest.raises(pm.StoreChangedError, match=r"own\.h5ad was changed while it was in use"):
        model.train(max_epochs=4, **SHUFFLE, callbacks=[touch])
    assert len(model.history["elbo_train"]) == 2
    assert np.isfinite(model.get_latent_representation(opened(path))).all()


def test_a_model_of_a_path_that_was_set_up(path, tmp_path):
    adata = pm.read(path)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    adata.write_h5ad(tmp_path / "ready.h5ad")
    model = pm.MULTIVI(tmp_path / "ready.h5ad", **SIZES)
    assert model._table.on_disk
    assert model.spec.setup.batch_key == "batch"
    with pytest.raises(ValueError, match="was not set up"):
        pm.MULTIVI(path)
    with pytest.raises(TypeError, match=r"open_stores\(path\)"):
        pm.MULTIVI.setup_anndata(path)


def test_minified_data_need_the_store_no_more(path, tmp_path):
    own = tmp_path / "own.h5ad"
    shutil.copy(path, own)
    model = pm.MULTIVI(opened(own), **SIZES)
    model.train(max_epochs=1, **SHUFFLE)
    before = model.get_latent_representation()
    model.minify_adata()
    own.unlink()
    assert np.array_equal(model.get_latent_representation(), before)


def test_a_query_on_disk(model, path, tmp_path):
    """As it is, and put in the order of the reference, also where it lacks features."""
    query = pm.read(path)[:40, ::-1].copy()
    query = query[:, ~query.var_names.isin(["gene_03", "region_07"])].copy()
    query.obs["batch"] = "new"
    query.write_h5ad(tmp_path / "query.h5ad")
    memory = pm.MULTIVI.load_query_data(query, model).get_latent_representation()
    stored = pm.open_stores(tmp_path / "query.h5ad")
    mapped = pm.MULTIVI.load_query_data(stored, model)
    assert mapped._table.on_disk
    assert np.allclose(mapped.get_latent_representation(), memory, atol=1e-5)
    prepared = pm.MULTIVI.prepare_query_anndata(stored, model, inplace=False)
    assert prepared.var_names.tolist() == [*model.spec.gene_names, *model.spec.region_names]
    again = pm.MULTIVI.load_query_data(prepared, model)
    assert again._table.on_disk
    assert np.allclose(again.get_latent_representation(), memory, atol=1e-5)
