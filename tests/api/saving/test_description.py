"""Description of a saved model: any malformed content is one error, in every format; cells are known by name."""

from __future__ import annotations

import collections
import hashlib
import json
import logging

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.cli import main

SIZES = {"n_hidden": 6, "n_latent": 2}


@pytest.fixture
def model(mosaic):
    mosaic.obs["age"] = np.linspace(20, 80, 60)
    keys = {"continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["cell_type"]}
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality", **keys)
    made = pm.MULTIVI(mosaic, encode_covariates=True, **SIZES)
    made.train(2, progress_bar=False)
    return made


@pytest.fixture
def folder(model, tmp_path):
    model.save(tmp_path / "model", save_anndata=True)
    return tmp_path / "model"


def as_format_2(folder):
    """The folder as version 0.1 wrote it: a checksum of the weights only."""
    (folder / "SHA256SUMS").unlink()
    path = folder / "model.json"
    text = json.loads(path.read_text())
    split = {name: text["split"][name] for name in ("train", "validation")}
    path.write_text(json.dumps({**text, "format": 2, "split": split}))


def entries(text, place=()):
    """Every entry of nested objects, and of lists the first."""
    items = text.items() if isinstance(text, dict) else list(enumerate(text))[:1] if isinstance(text, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from entries(value, (*place, key))


def test_one_byte_changed_anywhere_is_noticed(folder, mosaic):
    seen = collections.Counter()
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in np.linspace(0, len(whole) - 1, 7).astype(int):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            line = whole[whole.rfind(b"\n", 0, place) + 1 :].partition(b"\n")[0]
            # Of data beside others that are given nothing is read.
            of_data = path.name == "adata.h5ad" or (path.name == "SHA256SUMS" and b"adata.h5ad" in line)
            for data in (None,) if of_data else (None, mosaic):
                with pytest.raises(pm.BrokenModelError):
                    pm.MULTIVI.load(folder, data)
                seen[path.name] += 1
        path.write_bytes(whole)
    assert seen.pop("SHA256SUMS") > 10
    assert seen == {"adata.h5ad": 7, "model.json": 14, "weights.pt": 14}
    pm.MULTIVI.load(folder)


def test_damage_of_data_that_are_not_read_is_no_obstacle(folder, mosaic):
    expected = pm.MULTIVI.load(folder).get_elbo()
    whole = (folder / "adata.h5ad").read_bytes()
    for content in (whole[:-9], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / "adata.h5ad").write_bytes(content)
        assert pm.MULTIVI.load(folder, mosaic).get_elbo() == pytest.approx(expected)
        with pytest.raises(pm.BrokenModelError, match="adata.h5ad is damaged"):
            pm.MULTIVI.load(folder)


def test_a_file_that_is_missing_or_added_is_named(folder, mosaic):
    data = (folder / "adata.h5ad").read_bytes()
    (folder / "adata.h5ad").unlink()
    with pytest.raises(pm.BrokenModelError, match="adata.h5ad is missing"):
        pm.MULTIVI.load(folder)
    pm.MULTIVI.load(folder, mosaic)
    (folder / "mdata.h5mu").write_bytes(data)
    (folder / "adata.h5ad").write_bytes(data)
    with pytest.raises(pm.BrokenModelError, match=r"mdata.h5mu was not saved with this model"):
        pm.MULTIVI.load(folder)
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(pm.BrokenModelError, match="SHA256SUMS is missing"):
        pm.MULTIVI.load(folder)


@pytest.mark.parametrize(
    "values",
    [(None, 5, "x", []), pytest.param((-1, 1.5, True, [[]], {}, {"x": 1}), marks=pytest.mark.slow)],
    ids=["plain", "odd"],
)
def test_a_description_of_wrong_types_is_broken_in_a_format_without_checksum(folder, model, values):
    """All entries, at any depth, with each of these values: nothing but the one error, or a model."""
    as_format_2(folder)
    (folder / "adata.h5ad").unlink()
    path = folder / "model.json"
    whole = path.read_text()
    loads, wrong = [], []
    for place in entries(json.loads(whole)):
        for value in values:
            text = json.loads(whole)
            part = text
            for key in place[:-1]:
                part = part[key]
            if part[place[-1]] == value:
                continue
            part[place[-1]] = value
            path.write_text(json.dumps(text))
            try:
                pm.MULTIVI.load(folder, model.adata)
            except pm.BrokenModelError:
                continue
            except Exception as error:
                wrong.append((place, value, repr(error)[:100]))
            else:
                loads.append(place)
    # What has the right type may name something that the data have not: an error about the data.
    names = ("rna_layer", "atac_layer", "batch_key", "modality_key", "feature_type_key", "size_factor_keys")
    names += ("feature_masks",)
    about_data = {("spec", "setup", name) for name in (*names, "gene_types", "region_types")}
    about_data |= {("spec", name, 0) for name in ("gene_names", "region_names", "batch_categories")}
    about_data |= {("spec", "categorical", "cell_type")}
    kinds = ("ValueError(", "UnknownKeyError(")
    assert [each for each in wrong if each[0][:3] not in about_data or not each[2].startswith(kinds)] == []
    # Values that are as good: a version, a loss, other choices of the same shape. A model whose data were minified
    # takes data with counts too.
    as_good = {"version", "config", "spec", "history", "split", "is_trained", "minified"}
    assert {place[0] for place in loads} <= as_good


@pytest.mark.parametrize("edit", [
    lambda text: text["config"].update(later=1),
    lambda text: text["spec"]["setup"].update(later=1),
    lambda text: text["config"].pop("n_genes"),
    lambda text: text["spec"].pop("gene_names"),
    lambda text: text["spec"].update(gene_names=text["spec"]["gene_names"][::-1][:-1]),
    lambda text: text["spec"].update(gene_names=["g"] * 40),
    lambda text: text["spec"].update(continuous_sd=[0.0]),
    lambda text: text["spec"].update(continuous_mean=[float("nan")]),
    lambda text: text["spec"].update(continuous_mean=[1.0, 2.0]),
    lambda text: text["split"].update(train=[0, 0]),
    lambda text: text["split"].update(train=[60]),
    lambda text: text["split"].update(train=[-1]),
    lambda text: text["split"].update(validation=text["split"]["train"]),
    lambda text: text["config"].update(n_hidden=10**7),
    lambda text: text["config"].update(n_hidden=10**30),
    lambda text: text["config"].update(n_layers_encoder=10**9),
    lambda text: text["config"].update(n_latent=10**400),
    lambda text: text["config"].update(dropout_rate=2),
    lambda text: text.update(program_class=["pyro_multivi.program:MultiVIProgram"]),
], ids=lambda edit: None)  # fmt: skip
def test_a_description_that_does_not_fit_is_broken(folder, model, edit):
    as_format_2(folder)
    path = folder / "model.json"
    text = json.loads(path.read_text())
    edit(text)
    path.write_text(json.dumps(text))
    with pytest.raises(pm.BrokenModelError, match=r"model.json is damaged"):
        pm.MULTIVI.load(folder, model.adata)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 2' + "}" * 3, "\udcff", '{"format": ' + "9" * 5000 + "}"])
def test_text_that_is_no_json_is_broken(folder, text):
    as_format_2(folder)
    (folder / "model.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(pm.BrokenModelError, match=r"model.json is damaged"):
        pm.MULTIVI.load(folder)


def test_weights_cut_anywhere_are_broken_also_with_a_checksum_that_fits(folder):
    as_format_2(folder)
    weights, path = folder / "weights.pt", folder / "model.json"
    whole = weights.read_bytes()
    for size in np.linspace(0, len(whole) - 1, 12).astype(int):
        weights.write_bytes(whole[:size])
        text = {**json.loads(path.read_text()), "weights_sha256": hashlib.sha256(whole[:size]).hexdigest()}
        path.write_text(json.dumps(text))
        with pytest.raises(pm.BrokenModelError, match=r"weights"):
            pm.MULTIVI.load(folder)


def test_data_of_a_format_without_checksum_that_cannot_be_read_are_broken(folder):
    as_format_2(folder)
    whole = (folder / "adata.h5ad").read_bytes()
    for content in (b"", b"not HDF5", whole[: len(whole) // 2]):
        (folder / "adata.h5ad").write_bytes(content)
        with pytest.raises(pm.BrokenModelError, match=r"adata.h5ad cannot be read"):
            pm.MULTIVI.load(folder)


def test_the_command_line_shows_no_trace_of_a_broken_model(folder, tmp_path, capsys):
    path = folder / "model.json"
    path.write_text(path.read_text().replace('"history": [', '"history": [[], '))
    assert main(["check", str(folder), "--out", str(tmp_path / "check")]) == 1
    printed = capsys.readouterr().err
    assert "model.json is damaged" in printed
    assert "Traceback" not in printed


# ---------------------------------------------------------------------- identity of cells


def test_held_out_cells_are_found_by_name_in_another_order(folder, model, mosaic, caplog):
    order = np.random.default_rng(0).permutation(60)
    held_out = set(mosaic.obs_names[model.validation_indices])
    loaded = pm.MULTIVI.load(folder, mosaic[order].copy())
    assert set(loaded.adata.obs_names[loaded.validation_indices]) == held_out
    assert not caplog.text


def test_a_model_loaded_with_other_cells_says_how_they_differ(folder, model, mosaic, caplog):
    other = mosaic[:40].copy()
    other.obs_names = [*mosaic.obs_names[:30], *(f"new_{number}" for number in range(10))]
    with caplog.at_level(logging.WARNING, "pyro_multivi"):
        loaded = pm.MULTIVI.load(folder, other)
    assert "lacks 30 of the 60 cells of training" in caplog.text
    assert "has 10 cells that are not among these: 'new_0'" in caplog.text
    # Saved again it still knows which cells of the first data were held out.
    loaded.save(folder.parent / "again")
    again = pm.MULTIVI.load(folder.parent / "again", mosaic)
    np.testing.assert_array_equal(again.validation_indices, model.validation_indices)


# ---------------------------------------------------------------------- saved during training


def test_a_model_saved_by_a_callback_is_trained_and_answers(model, mosaic, tmp_path):
    fresh = pm.MULTIVI(mosaic, encode_covariates=True, **SIZES)
    latents = {}

    def keep(epoch, row, program):
        fresh.save(tmp_path / "kept", overwrite=True)
        latents[epoch] = fresh.get_latent_representation()
        return epoch == 2

    fresh.train(5, progress_bar=False, callbacks=[keep])
    loaded = pm.MULTIVI.load(tmp_path / "kept", mosaic)
    assert loaded.is_trained
    assert len(loaded.history["train_loss"]) == 3
    np.testing.assert_array_equal(loaded.get_latent_representation(), latents[2])
    assert torch.equal(loaded._split.validation, fresh._split.validation)
    loaded.train(1, progress_bar=False)
    assert len(loaded.history["train_loss"]) == 4
