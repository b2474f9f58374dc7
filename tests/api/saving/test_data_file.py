"""Data saved with a model: written without a change of the user's object, and never deleted unasked."""

from __future__ import annotations

import logging
import os

import anndata
import numpy as np
import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.api.saving import data_file
from pyro_multivi.files import RecordingFile

SIZES = {"n_hidden": 6, "n_latent": 2}


@pytest.fixture
def model(build):
    made = build()
    made.train(1, progress_bar=False)
    return made


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model", save_anndata=True)
    return tmp_path / "model"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------- the user's object


def test_columns_of_text_stay_columns_of_text(model, tmp_path):
    obs = model.adata.obs
    obs["note"] = pd.Series(["a", "b"] * 30, index=obs.index, dtype=object)
    before = obs.dtypes
    model.save(tmp_path / "model", save_anndata=True)
    pd.testing.assert_series_equal(model.adata.obs.dtypes, before)
    assert pm.MULTIVI.load(tmp_path / "model").adata.obs["note"].tolist() == obs["note"].tolist()


@pytest.mark.parametrize("gap", [None, np.nan, pd.NA])
def test_text_with_gaps_is_saved_as_categories(mosaic, tmp_path, gap):
    mosaic.raw = mosaic.copy()
    for table in (mosaic.obs, mosaic.var, mosaic.raw.var):
        table["note"] = pd.Series(["a", "b", gap] * len(table), dtype=object)[: len(table)].to_numpy()
        table["seen"] = pd.Series([True, gap] * len(table), dtype=object)[: len(table)].to_numpy()
    before = mosaic.obs.copy()
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, **SIZES)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model", save_anndata=True)
    pd.testing.assert_frame_equal(mosaic.obs, before)
    loaded = pm.MULTIVI.load(tmp_path / "model").adata
    for table in (loaded.obs, loaded.var, loaded.raw.var):
        assert table["note"].isna().tolist() == [place % 3 == 2 for place in range(len(table))]
        assert list(table["note"].cat.categories) == ["a", "b"]
        assert table["seen"].isna().tolist() == [place % 2 == 1 for place in range(len(table))]


@pytest.mark.parametrize(
    ("column", "first"),
    [
        (pd.qcut(np.arange(60), 3), "Interval"),
        (pd.date_range("2024-01-01", periods=60), "Timestamp"),
        (pd.Categorical(pd.date_range("2024-01-01", periods=60, tz="UTC")), "Timestamp"),
        (pd.timedelta_range("1 day", periods=60), "Timedelta"),
        (pd.period_range("2024-01", periods=60, freq="M"), "Period"),
    ],
)
def test_columns_that_no_file_holds_are_named(model, tmp_path, column, first):
    model.adata.obs["note"] = column
    with pytest.raises(TypeError, match=rf"obs\['note'\] holds {first}\(.*: make the column text by .astype\(str\)"):
        model.save(tmp_path / "model", save_anndata=True)
    assert not (tmp_path / "model").exists()
    model.adata.obs["note"] = model.adata.obs["note"].astype(str)
    model.save(tmp_path / "model", save_anndata=True)


def test_other_kinds_of_columns_are_written_as_what_they_hold(model, tmp_path):
    obs = model.adata.obs
    obs["score"] = pd.array([0.5, None] * 30, dtype="Float32")
    obs["count"] = pd.arrays.SparseArray([0, 3] * 30)
    obs["kit"] = pd.Categorical([1, "a"] * 30)
    before = obs.copy()
    with pytest.warns(UserWarning, match=r"obs\['kit'\]: text beside numbers"):
        model.save(tmp_path / "model", save_anndata=True)
    pd.testing.assert_frame_equal(obs, before)
    found = pm.MULTIVI.load(tmp_path / "model").adata.obs
    np.testing.assert_array_equal(found["score"].to_numpy(), np.array([0.5, np.nan] * 30, dtype=np.float32))
    assert found["count"].tolist() == [0, 3] * 30
    assert found["kit"].tolist() == ["1", "a"] * 30


def test_names_of_columns_that_are_no_text_are_named(model, tmp_path):
    model.adata.obsm["adt"] = pd.DataFrame(np.ones((60, 2)), index=model.adata.obs_names)
    with pytest.raises(TypeError, match=r"obsm/adt has a column called 0, .* text .*columns.astype\(str\)"):
        model.save(tmp_path / "model", save_anndata=True)


@pytest.mark.parametrize(
    ("place", "shape"), [("layers", (60, 100)), ("obsm", (60, 2)), ("varm", (100, 2)), ("obsp", (60, 60))]
)
@pytest.mark.parametrize("name", ["a/b", ""])
def test_entries_whose_names_no_file_gives_back_are_refused(model, tmp_path, place, shape, name):
    getattr(model.adata, place)[name] = np.ones(shape)
    with pytest.raises(ValueError, match=f"{place} has an entry called '{name}', .* give it another, without '/'"):
        model.save(tmp_path / "model", save_anndata=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("names", [["a", "a/b"], ["a/b/c", "a/b"], ["/a"], [""]])
def test_columns_whose_names_no_file_gives_back_are_refused(model, tmp_path, names):
    for name in names:
        model.adata.obs[name] = 1.5
    for write in (
        lambda: model.save(tmp_path / "model", save_anndata=True),
        lambda: model.impute(out=tmp_path / "out.h5ad", silent=True),
    ):
        with pytest.raises(ValueError, match=r"obs has a column called '.*', .* give it another, without '/'"):
            write()
    assert not list(tmp_path.glob("[!.]*"))


def test_a_column_with_a_slash_in_its_name_is_written(model, tmp_path):
    model.adata.obs["CD4/CD8"] = np.arange(60)
    model.adata.uns["CD4/CD8_colors"] = ["red", "blue"]
    with pytest.warns(UserWarning, match=r"uns\['CD4/CD8_colors'\]: what stands before a '/' becomes an entry"):
        model.save(tmp_path / "model", save_anndata=True)
    found = pm.MULTIVI.load(tmp_path / "model").adata
    assert found.obs["CD4/CD8"].tolist() == list(range(60))
    assert found.uns["CD4"]["CD8_colors"].tolist() == ["red", "blue"]
    with pytest.raises(ValueError, match="obs has a column called 'CD4/CD8', .* give it another, without '/'"):
        model.impute(out=tmp_path / "out.zarr", silent=True)


def test_numbers_beside_text_become_text_and_other_objects_are_named(model, tmp_path):
    obs = model.adata.obs
    obs["note"] = pd.Series([1, "b", None] * 20, index=obs.index, dtype=object)
    with pytest.warns(UserWarning, match=r"obs\['note'\]: text beside numbers"):
        model.save(tmp_path / "model", save_anndata=True)
    found = pm.MULTIVI.load(tmp_path / "model").adata.obs["note"]
    assert found[:2].tolist() == ["1", "b"]
    assert found.isna().sum() == 20
    obs["note"] = pd.Series([[1]] * 60, index=obs.index, dtype=object)
    with pytest.raises(TypeError, match=r"obs\['note'\] holds \[1\], .*: make the column text by .astype\(str\)"):
        model.save(tmp_path / "other", save_anndata=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_backed_anndata_stays_at_its_file(mosaic, tmp_path, mode):
    mosaic.raw = mosaic.copy()
    mosaic.write_h5ad(tmp_path / "mine.h5ad")
    backed = anndata.read_h5ad(tmp_path / "mine.h5ad", backed=mode)
    pm.MULTIVI.setup_anndata(backed, modality_key="modality")
    model = pm.MULTIVI(backed, **SIZES)
    model.train(1, progress_bar=False)
    expected = model.get_elbo()
    model.save(tmp_path / "model", save_anndata=True)
    assert os.path.samefile(backed.filename, tmp_path / "mine.h5ad")
    backed.file.close()
    assert model.get_elbo() == expected
    loaded = pm.MULTIVI.load(tmp_path / "model")
    assert loaded.get_elbo() == expected
    for part, original in ((loaded.adata.X, mosaic.X), (loaded.adata.raw.X, mosaic.raw.X)):
        np.testing.assert_array_equal(part.toarray(), original.toarray())


@pytest.mark.parametrize("backed", [False, True])
def test_a_mudata_stays_as_it_is(tmp_path, backed):
    mudata = pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=20, n_regions=30, return_mudata=True, seed=0)
    for part in mdata.mod.values():
        part.obs["note"] = pd.Series(["a", None] * part.n_obs, dtype=object)[: part.n_obs].to_numpy()
    if backed:
        data_file.write_data(tmp_path, mdata)
        with mudata_as_given():
            mdata = mudata.read_h5mu(tmp_path / "mdata.h5mu", backed="r")
    pm.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = pm.MULTIVI(mdata, **SIZES)
    model.train(1, progress_bar=False)
    before = {name: part.obs.dtypes.to_dict() for name, part in {"": mdata, **mdata.mod}.items()}
    model.save(tmp_path / "model", save_anndata=True)
    assert {name: part.obs.dtypes.to_dict() for name, part in {"": mdata, **mdata.mod}.items()} == before
    if backed:
        assert os.path.samefile(mdata.filename, tmp_path / "mdata.h5mu")
    loaded = pm.MULTIVI.load(tmp_path / "model")
    assert loaded.get_elbo() == model.get_elbo()
    assert list(loaded.adata.mod) == list(mdata.mod)
    assert (tmp_path / "model" / "mdata.h5mu").read_bytes()[:6] == b"MuData"


def test_a_view_of_the_data_is_written_whole(mosaic, tmp_path):
    view = mosaic[::2]
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, **SIZES)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model")
    part = pm.MULTIVI.load(tmp_path / "model", view)
    part.save(tmp_path / "part", save_anndata=True)
    assert view.is_view
    assert pm.MULTIVI.load(tmp_path / "part").adata.obs_names.tolist() == view.obs_names.tolist()


# ---------------------------------------------------------------------- data in a folder that is replaced


def test_data_stay_when_their_model_is_replaced(model, folder, caplog):
    before = files(folder)
    loaded = pm.MULTIVI.load(folder)
    loaded.train(1, progress_bar=False)
    with caplog.at_level(logging.INFO, "pyro_multivi"):
        loaded.save(folder, overwrite=True)
    assert "adata.h5ad stays as it was saved" in caplog.text
    after = files(folder)
    assert after.keys() == before.keys()
    assert after["adata.h5ad"] == before["adata.h5ad"]
    assert after["weights.pt"] != before["weights.pt"]
    again = pm.MULTIVI.load(folder)
    assert again.get_elbo() == loaded.get_elbo()
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_data_stay_where_there_are_no_links(model, folder, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    before = files(folder)["adata.h5ad"]
    pm.MULTIVI.load(folder).save(folder, overwrite=True)
    assert files(folder)["adata.h5ad"] == before
    assert pm.MULTIVI.load(folder).get_elbo() == model.get_elbo()


def test_paths_that_cannot_be_meant_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for call in (model.save, pm.MULTIVI.load, lambda path: model.impute(out=path)):
        with pytest.raises(ValueError, match=r"='~/x.h5ad' begins with '~'.*os.path.expanduser\('~/x.h5ad'\)"):
            call("~/x.h5ad")
    for path in ("file/x", "file/x/y"):
        with pytest.raises(NotADirectoryError, match="dir_path='file/.*: 'file' is a file, and no folder can be in it"):
            model.save(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_name_that_no_file_holds_is_refused(tmp_path):
    mudata = pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=20, n_regions=30, return_mudata=True, seed=0)
    with mudata_as_given():
        mdata = mudata.MuData({"a/b": mdata.mod["rna"], "atac": mdata.mod["atac"]})
    with pytest.raises(ValueError, match="save_anndata=True: .* as 'a/b' of mdata.mod"):
        data_file.write_data(tmp_path, mdata)
    assert not list(tmp_path.iterdir())


def test_a_model_is_replaced_from_a_folder_that_was_deleted(model, folder, monkeypatch):
    gone = folder.parent / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    model.train(1, progress_bar=False)
    model.save(folder, overwrite=True)
    assert len(pm.MULTIVI.load(folder).history["train_loss"]) == 2


@pytest.mark.parametrize("change", ["cells", "features"])
def test_data_of_another_model_are_not_deleted(folder, change):
    other = pm.simulate_multiome((30, 15, 15), n_genes=40, n_regions=60, seed=1)
    if change == "cells":
        other.obs_names = [f"other_{name}" for name in other.obs_names]
    else:
        other.var_names = [f"other_{name}" for name in other.var_names]
    pm.MULTIVI.setup_anndata(other, modality_key="modality")
    model = pm.MULTIVI(other, **SIZES)
    before = files(folder)
    with pytest.raises(
        FileExistsError, match=f"adata.h5ad, perhaps the only copy.*lacks .* {change}.*save_anndata=True"
    ):
        model.save(folder, overwrite=True)
    assert files(folder) == before
    model.save(folder, overwrite=True, save_anndata=True)
    assert pm.MULTIVI.load(folder).adata.var_names.tolist() == other.var_names.tolist()


def test_data_stay_when_a_model_loaded_with_a_part_of_them_is_saved(folder, mosaic):
    before = files(folder)["adata.h5ad"]
    pm.MULTIVI.load(folder, mosaic[::2].copy()).save(folder, overwrite=True)
    assert files(folder)["adata.h5ad"] == before


def test_damage_of_kept_data_is_not_hidden_by_a_new_checksum(model, folder):
    path = folder / "adata.h5ad"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    model.save(folder, overwrite=True)
    with pytest.raises(pm.BrokenModelError, match="adata.h5ad is damaged"):
        pm.MULTIVI.load(folder)


# ---------------------------------------------------------------------- disk full


@pytest.mark.parametrize("size", [0, 1000, 20_000, 60_000])
def test_a_full_disk_leaves_the_old_model_and_no_litter(model, folder, monkeypatch, size):
    before = files(folder)
    left = [size]
    real = RecordingFile.write

    def write(self, data):
        left[0] -= len(memoryview(data).cast("B"))
        if left[0] < 0 and self.error is None:
            self.error = OSError(28, "No space left on device")
        return real(self, data)

    monkeypatch.setattr(RecordingFile, "write", write)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\): what was there .* unchanged"):
        model.save(folder, overwrite=True, save_anndata=True)
    assert files(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    monkeypatch.undo()
    assert pm.MULTIVI.load(folder).get_elbo() == model.get_elbo()
