"""Files that the command line writes: nothing replaced unasked, no trained model lost."""

from __future__ import annotations

import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main

QUIET = ("--quiet", "--max-epochs", "1", "--accelerator", "cpu", "--n-hidden", "6", "--n-latent", "2")


@pytest.fixture
def no_training(monkeypatch):
    """Fails the test if a model is trained."""
    monkeypatch.setattr(pm.MULTIVI, "train", lambda *_, **__: pytest.fail("trained before the output was checked"))


def train(file, out, *more):
    arguments = ["train", file, "--modality-key", "modality", "--out", out, *QUIET, *more]
    return main([str(argument) for argument in arguments])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_training_needs_overwrite(mosaic_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert train(mosaic_file, out) == 0
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(pm.MULTIVI, "train", lambda *_, **__: pytest.fail("trained before the output was checked"))
        assert train(mosaic_file, out) == 1
    assert "holds 'model', 'latent.csv'" in (error := capsys.readouterr().err)
    assert "--overwrite" in error
    assert files(out) == before
    assert train(mosaic_file, out, "--overwrite", "--seed", "1") == 0
    assert files(out).keys() == before.keys()
    assert files(out) != before


@pytest.mark.parametrize("name", ["model/.DS_Store", "model/note.txt", "latent.csv", "history.csv", "latent.png"])
def test_what_is_there_is_named_before_training(mosaic_file, tmp_path, capsys, no_training, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    for more in ([], ["--overwrite"]) if name.startswith("model/") else ([],):
        assert train(mosaic_file, tmp_path / "out", *more) == 1
        assert path.name in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_data_of_other_cells_in_the_folder_are_named_before_training(mosaic_file, tmp_path, capsys, no_training):
    other = pm.simulate_multiome((20, 0, 0), n_genes=10, n_regions=20, seed=1)
    pm.MULTIVI.setup_anndata(other, modality_key="modality")
    (tmp_path / "out").mkdir()
    pm.MULTIVI(other, n_hidden=6).save(tmp_path / "out" / "model", save_anndata=True)
    assert train(mosaic_file, tmp_path / "out", "--overwrite") == 1
    assert "adata.h5ad, perhaps the only copy" in capsys.readouterr().err
    assert pm.MULTIVI.load(tmp_path / "out" / "model").adata.n_obs == 20


@pytest.mark.filterwarnings("default:.*has no held-out")
@pytest.mark.usefixtures("no_pictures")
def test_a_model_from_disk_holds_no_data_and_is_replaced(mosaic, mosaic_file, tmp_path):
    out = tmp_path / "out"
    assert train(mosaic_file, out, "--from-disk", "--min-fraction", "0.3") == 0
    # Fewer features, then other cells, then counts in memory.
    other = tmp_path / "other.h5ad"
    mosaic.obs_names = "other_" + mosaic.obs_names
    mosaic.write_h5ad(other)
    for file, more in ((mosaic_file, ["--from-disk"]), (other, ["--from-disk"]), (mosaic_file, [])):
        assert train(file, out, "--overwrite", *more) == 0
        model = pm.MULTIVI.load(out / "model")
        assert model.spec.n_genes == 40
        assert (model.adata is None) == (not more)
        assert not (out / "model-2").exists()


def test_a_file_at_the_place_of_the_folder_is_named(mosaic_file, tmp_path, capsys, no_training):
    (tmp_path / "out").write_text("mine")
    assert train(mosaic_file, tmp_path / "out", "--overwrite") == 1
    assert "is a file" in capsys.readouterr().err


def test_the_model_is_saved_before_anything_else_can_fail(mosaic_file, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no latent space today")

    monkeypatch.setattr(pm.MULTIVI, "get_latent_representation", fail)
    assert train(mosaic_file, tmp_path / "out") == 1
    assert "no latent space today" in capsys.readouterr().err
    assert pm.MULTIVI.load(tmp_path / "out" / "model").is_trained


@pytest.mark.usefixtures("no_pictures")
def test_a_folder_taken_during_training_costs_no_model(mosaic_file, tmp_path, capsys, monkeypatch):
    real, folder = pm.MULTIVI.train, tmp_path / "out" / "model"

    def meanwhile(model, **arguments):
        real(model, **arguments)
        folder.mkdir()
        (folder / "note.txt").write_text("mine")

    monkeypatch.setattr(pm.MULTIVI, "train", meanwhile)
    assert train(mosaic_file, tmp_path / "out") == 0
    assert "the model is in" in capsys.readouterr().out
    assert (folder / "note.txt").read_text() == "mine"
    assert pm.MULTIVI.load(tmp_path / "out" / "model-2").is_trained


def test_a_picture_of_an_earlier_run_does_not_stay(mosaic_file, tmp_path, monkeypatch):
    assert train(mosaic_file, tmp_path / "out") == 0
    assert (tmp_path / "out" / "latent.png").exists()

    def missing(*_):
        raise ImportError("no matplotlib")

    monkeypatch.setattr("pyro_multivi.cli.outputs.picture.require", missing)
    assert train(mosaic_file, tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "latent.png").exists()


@pytest.mark.usefixtures("no_pictures")
def test_tables_and_checks_are_not_replaced_unasked(mosaic, tmp_path, capsys):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model", save_anndata=True)
    table, checked = tmp_path / "table.csv", tmp_path / "checked"
    commands = {
        table: ["differential", tmp_path / "model", "--groupby", "cell_type", "--out", table, "--n-samples", "100"],
        checked / "genes.csv": ["check", tmp_path / "model", "--out", checked, "--n-samples", "40", "--all-cells"],
    }
    checked.mkdir()
    (checked / "user.csv").write_text("of an earlier run")
    for path, command in commands.items():
        words = [str(word) for word in command]
        path.write_text("mine")
        assert main(words) == 1
        assert "--overwrite" in capsys.readouterr().err
        assert path.read_text() == "mine"
        assert main([*words, "--overwrite"]) == 0
        assert len(pd.read_csv(path)) > 10
        assert not [left for left in path.parent.iterdir() if left.name.startswith(".")]
    assert not (checked / "user.csv").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_check_is_written_as_a_whole(mosaic, tmp_path, capsys, monkeypatch):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
    model.is_trained = True
    model.save(tmp_path / "model", save_anndata=True)
    words = ["check", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--n-samples", "40", "--all-cells"]

    def full(*_):
        raise OSError(28, "No space left on device", "check.html")

    with monkeypatch.context() as patch:
        patch.setattr("pyro_multivi.plots.report.write_whole", full)
        assert main(words) == 1
    assert "No space left on device: 'check.html'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    before = files(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("pyro_multivi.plots.report.write_whole", full)
        assert main([*words, "--overwrite", "--seed", "1"]) == 1
    assert files(tmp_path / "out") == before
