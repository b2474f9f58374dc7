"""Saved models: the same after loading, also elsewhere; refused when broken; no code in them is run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pyro_multivi as pm

ROOT = Path(__file__).parents[2]


class OwnProgram(pm.MultiVIProgram):
    """A program of a user's own."""


@pytest.fixture
def model(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality", labels_key="cell_type")
    made = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, dispersion="gene-label", modality_penalty=None)
    made.train(2, progress_bar=False, batch_size=32)
    return made


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model")
    return tmp_path / "model"


def results(model):
    mean, variance = model.get_latent_representation(return_dist=True)
    sizes = model.get_library_size_factors()
    elbo = np.array(model.get_elbo(return_mean=False))
    draws = model.get_latent_representation(give_mean=False, n_samples=2, seed=3)
    return {"mean": mean, "variance": variance, "draws": draws, "elbo": elbo, "r": model.get_region_factors(), **sizes}


def assert_equal(left, right):
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)


ELSEWHERE = """
import sys, anndata, numpy as np, torch, pyro
torch.set_num_threads(1)
import pyro_multivi as pm
folder, data, out = sys.argv[1:]
model = pm.MULTIVI.load(folder, anndata.read_h5ad(data) if data else None)
mean, variance = model.get_latent_representation(return_dist=True)
draws = model.get_latent_representation(give_mean=False, n_samples=2, seed=3)
np.savez(out, mean=mean, variance=variance, draws=draws, elbo=model.get_elbo(return_mean=False),
         r=model.get_region_factors(), **model.get_library_size_factors())
assert len(pyro.get_param_store()) == 0
"""


def elsewhere(folder, data, out):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(data), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as found:
        return dict(found)


# ---------------------------------------------------------------------- the same again


def test_another_process_gives_the_same_bits(model, folder, mosaic, tmp_path):
    mosaic.write_h5ad(tmp_path / "data.h5ad")
    assert_equal(results(model), elsewhere(folder, tmp_path / "data.h5ad", tmp_path / "out.npz"))


def test_a_model_saved_with_its_data_needs_nothing_else(model, tmp_path):
    model.save(tmp_path / "model", save_anndata=True)
    assert_equal(results(model), elsewhere(tmp_path / "model", "", tmp_path / "out.npz"))


def test_everything_else_comes_back_too(model, folder, mosaic):
    loaded = pm.MULTIVI.load(folder, mosaic)
    assert loaded.is_trained
    assert loaded.program.config == model.program.config
    assert loaded.spec == model.spec
    assert not loaded.program.training
    assert loaded.history.keys() == model.history.keys()
    for name, frame in model.history.items():
        np.testing.assert_array_equal(frame, loaded.history[name])
    for split in ("train", "validation"):
        assert torch.equal(getattr(loaded._split, split), getattr(model._split, split))
    assert all(torch.equal(v, loaded.program.state_dict()[k]) for k, v in model.program.state_dict().items())


def test_a_loaded_model_trains_on(model, folder, mosaic):
    loaded = pm.MULTIVI.load(folder, mosaic)
    loaded.train(1, progress_bar=False)
    assert loaded.history["train_loss"].index.tolist() == [0, 1, 2]
    assert torch.equal(loaded._split.validation, model._split.validation)


def test_training_on_other_cells_holds_out_cells_of_theirs(folder, mosaic):
    fewer = mosaic[::2].copy()
    loaded = pm.MULTIVI.load(folder, fewer)
    loaded.train(1, progress_bar=False)
    both = torch.cat([loaded._split.train, loaded._split.validation])
    assert sorted(both.tolist()) == list(range(30))


def test_an_untrained_model_stays_untrained(mosaic, tmp_path):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    pm.MULTIVI(mosaic, n_hidden=6).save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", mosaic)
    with pytest.raises(pm.NotTrainedError, match="not trained"):
        loaded.get_latent_representation()


def test_without_data_each_method_asks_for_them(model, folder, mosaic):
    loaded = pm.MULTIVI.load(folder)
    for ask in (loaded.get_latent_representation, loaded.get_elbo, loaded.train):
        with pytest.raises(ValueError, match="loaded without data: give adata"):
            ask()
    np.testing.assert_array_equal(loaded.get_latent_representation(mosaic), model.get_latent_representation())
    np.testing.assert_array_equal(loaded.get_region_factors(), model.get_region_factors())
    with pytest.raises(ValueError, match="save_anndata=True, but this model was loaded without data"):
        loaded.save(folder.parent / "again", save_anndata=True)
    loaded.save(folder.parent / "again")
    assert_equal(results(model), results(pm.MULTIVI.load(folder.parent / "again", mosaic)))


def test_loading_leaves_the_random_state_alone(folder, mosaic, global_rng_untouched):
    assert pm.MULTIVI.load(folder, mosaic).is_trained


def test_a_model_of_a_mudata(tmp_path):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=20, n_regions=30, return_mudata=True)
    pm.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = pm.MULTIVI(mdata, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model", save_anndata=True)
    assert (tmp_path / "model" / "mdata.h5mu").is_file()
    assert_equal(results(model), results(pm.MULTIVI.load(tmp_path / "model")))
    assert_equal(results(model), results(pm.MULTIVI.load(tmp_path / "model", mdata)))


# ---------------------------------------------------------------------- classes of one's own


def test_a_subclass_is_imported_by_the_user_and_never_by_the_file(mosaic, tmp_path):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, program_class=OwnProgram)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="OwnProgram, not .*MultiVIProgram.*give program_class=OwnProgram"):
        pm.MULTIVI.load(tmp_path / "model", mosaic)
    loaded = pm.MULTIVI.load(tmp_path / "model", mosaic, program_class=OwnProgram)
    assert type(loaded.program) is OwnProgram
    assert_equal(results(model), results(loaded))


def test_a_class_that_was_not_used_is_refused(folder, mosaic):
    with pytest.raises(ValueError, match="MultiVIProgram, not .*OwnProgram"):
        pm.MULTIVI.load(folder, mosaic, program_class=OwnProgram)


# ---------------------------------------------------------------------- broken and malicious folders


def edit(folder, change):
    path = folder / "model.json"
    text = json.loads(path.read_text())
    change(text)
    path.write_text(json.dumps(text))
    seal(folder)


def seal(folder):
    """Checksums that fit what is there now."""
    sums = folder / "SHA256SUMS"
    names = [line.split()[1] for line in sums.read_text().splitlines()]
    sums.write_text("".join(f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names))


def forge(folder, payload):
    """Weights of somebody else's, with a checksum that fits."""
    (folder / "weights.pt").write_bytes(payload)
    edit(folder, lambda text: text.update(weights_sha256=hashlib.sha256(payload).hexdigest()))


class Malice:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


@pytest.mark.parametrize("as_state", [True, False])
def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path, as_state):
    import io

    buffer, target = io.BytesIO(), tmp_path / "owned"
    payload = Malice(target)
    torch.save({"log_theta": payload} if as_state else payload, buffer)
    forge(folder, buffer.getvalue())
    with pytest.raises(pm.BrokenModelError, match=r"weights.pt .*not .*tensors"):
        pm.MULTIVI.load(folder)
    assert not target.exists()
    # Proof that the payload was live.
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert target.exists()


def test_weights_that_are_no_archive_are_refused(folder):
    forge(folder, b"not a file of torch")
    with pytest.raises(pm.BrokenModelError, match="weights.pt"):
        pm.MULTIVI.load(folder)


@pytest.mark.parametrize("damage", [
    lambda whole: whole[: len(whole) // 2],
    lambda whole: b"",
    lambda whole: whole[:300] + bytes([whole[300] ^ 1]) + whole[301:],
], ids=["truncated", "empty", "one bit"])  # fmt: skip
def test_damaged_weights_are_refused(folder, damage):
    path = folder / "weights.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(pm.BrokenModelError, match="weights.pt is damaged or truncated"):
        pm.MULTIVI.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": "1", "weights_sha256": ""}',
                                  '{"format": null, "weights_sha256": ""}'])  # fmt: skip
def test_a_damaged_description_is_refused(folder, text):
    (folder / "model.json").write_text(text)
    seal(folder)
    with pytest.raises(pm.BrokenModelError, match="model.json is damaged"):
        pm.MULTIVI.load(folder)


@pytest.mark.parametrize("key", ["config", "spec", "program_class", "history", "split", "is_trained"])
def test_a_description_that_lacks_something_is_refused(folder, key):
    edit(folder, lambda text: text.pop(key))
    with pytest.raises(pm.BrokenModelError, match=f"model.json is damaged.*{key}"):
        pm.MULTIVI.load(folder)


def test_weights_of_another_model_are_refused(folder):
    edit(folder, lambda text: text["config"].update(n_hidden=7))
    with pytest.raises(pm.BrokenModelError, match="the weights do not fit the model"):
        pm.MULTIVI.load(folder)


@pytest.mark.parametrize("name", ["weights.pt", "model.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises((pm.BrokenModelError, FileNotFoundError), match=f"{name} is missing"):
        pm.MULTIVI.load(folder)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a saved model"):
        pm.MULTIVI.load(tmp_path / "nothing")


def test_a_model_of_format_1_is_read_under_todays_names(model, folder):
    """Format 1 had other names for two kinds of tensors and for extra modalities, and tensors that are not used now."""
    before = {
        "rna_first_layer.": "rna_reader.",
        "atac_first_layer.": "atac_reader.",
        "_depth_regression": "_depth_link",
    }
    state = {}
    for name, value in torch.load(folder / "weights.pt", weights_only=True).items():
        for now, then in before.items():
            name = name.replace(now, then)
        state[name] = value
    assert len(state.keys() - model.program.state_dict().keys()) == 2 * 2 + 2
    state |= {"rna_trust": torch.tensor(0.5), "atac_population": torch.zeros(512, 4)}
    torch.save(state, folder / "weights.pt")

    def rename(text):
        text.update(format=1, weights_sha256=hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest())
        for part in (text["config"], text["spec"], text["spec"]["setup"]):
            part["further"] = part.pop("extra")

    edit(folder, rename)
    (folder / "SHA256SUMS").unlink()
    assert_equal(results(pm.MULTIVI.load(folder, model.adata)), results(model))


def leave_out(folder, part):
    """Take tensors out of the weights, as a version that did not know them; return their number."""
    state = torch.load(folder / "weights.pt", weights_only=True)
    payload, kept = io.BytesIO(), {name: value for name, value in state.items() if part not in name}
    torch.save(kept, payload)
    forge(folder, payload.getvalue())
    return len(state) - len(kept)


def load_and_log(folder, adata, caplog):
    """A saved model, and the warnings that loading it logs."""
    caplog.clear()
    with caplog.at_level("WARNING", logger="pyro_multivi"):
        return pm.MULTIVI.load(folder, adata), caplog.text


@pytest.mark.parametrize(("missing", "number", "words"), [
    ("_weight_", 4, "a posterior of the decoders' last layers"),
    ("_residual_sd", 2, "the variation that the state does not explain"),
    ("depth_scale", 1, "the correction of the spread of depths"),
    ("posterior_scale", 1, "the correction of the spread of states"),
])  # fmt: skip
def test_a_model_without_a_part_of_the_calibration_says_so(model, folder, caplog, missing, number, words):
    assert leave_out(folder, missing) == number
    loaded, log = load_and_log(folder, model.adata, caplog)
    assert f"saved by a version without {words}: its intervals leave that out, and are as a rule too narrow" in log
    assert "Training it on (train) brings it" in log
    assert bool(loaded.program.rna_weight_sd.any()) == (missing != "_weight_")
    edit(folder, lambda text: text.update(is_trained=False))
    assert "a version without" not in load_and_log(folder, model.adata, caplog)[1]
    model.save(folder, overwrite=True)
    again, log = load_and_log(folder, model.adata, caplog)
    assert "too narrow" not in log
    assert torch.equal(again.program.rna_weight_sd, model.program.rna_weight_sd)


def test_a_newer_format_says_upgrade(folder):
    edit(folder, lambda text: text.update(format=99, version="9.9"))
    with pytest.raises(pm.BrokenModelError, match="saved in format 99 by version 9.9.*Upgrade"):
        pm.MULTIVI.load(folder)


# ---------------------------------------------------------------------- what is replaced and what is not


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_model_is_replaced_only_if_asked_for(model, folder):
    before = files(folder)
    with pytest.raises(FileExistsError, match="exists: choose another path or give overwrite=True"):
        model.save(folder)
    assert files(folder) == before
    model.train(1, progress_bar=False)
    model.save(folder, overwrite=True)
    assert files(folder).keys() == before.keys()
    assert files(folder) != before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("names", [
    ["thesis.txt"], ["thesis.txt", "weights.pt"], ["thesis.txt", "model.json"],
    ["thesis.txt", "model.json", "weights.pt"],
], ids=str)  # fmt: skip
def test_a_folder_with_anything_else_in_it_is_never_replaced(model, tmp_path, names):
    home = tmp_path / "home"
    home.mkdir()
    for name in names:
        (home / name).write_text("{}")
    before = files(home)
    with pytest.raises(FileExistsError, match="and is not replaced"):
        model.save(home, overwrite=True)
    assert files(home) == before
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_file_is_never_replaced(model, tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match="is not replaced"):
        model.save(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model").read_text() == "mine"


def test_an_empty_folder_may_be_used_if_asked_for(model, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="exists"):
        model.save(tmp_path / "model")
    model.save(tmp_path / "model", overwrite=True)
    assert pm.MULTIVI.load(tmp_path / "model").is_trained


def test_folders_above_that_are_not_there_are_made(model, tmp_path):
    model.save(tmp_path / "nowhere" / "yet" / "model")
    assert pm.MULTIVI.load(tmp_path / "nowhere" / "yet" / "model").is_trained
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        model.save(tmp_path / "file" / "model")
