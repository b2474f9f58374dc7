"""Description of a saved model, read without its tensors."""

from __future__ import annotations

import json

import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    adata = pm.simulate_multiome((40, 10, 15), 20, 30, n_batches=2, seed=0)
    adata.obs["age"] = 1.0
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", continuous_covariate_keys=["age"])
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=3)
    model.train(2, train_size=0.8, progress_bar=False)
    path = tmp_path_factory.mktemp("describe") / "model"
    model.save(path)
    model.minify_adata()
    model.save(path.parent / "small", save_anndata=True)
    return path


def test_what_it_tells(folder, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("tensors were loaded"))
    found = pm.describe(folder)
    assert (found.spec.n_genes, found.spec.n_regions, found.spec.batch_categories) == (20, 30, ("batch_0", "batch_1"))
    assert (found.n_epochs, found.is_trained, found.minified) == (2, True, False)
    assert (found.n_train, found.n_validation) == (52, 13)
    assert set(found.files) == {"model.json", "weights.pt", "SHA256SUMS"}
    for part in (
        "65: 40 paired, 10 RNA only, 15 ATAC only", "2: batch_0, batch_1", "covariate   age",
        "latent 3, hidden 8, zinb",
        "2 epochs on 52 cells, 13 held out, elbo_train", "not saved with it: load(path, adata)",
    ):  # fmt: skip
        assert part in repr(found)


def test_minified_data(folder):
    found = pm.describe(folder.parent, prefix="small")
    assert found.minified
    assert "adata.h5ad (minified): " in repr(found)
    assert "not saved with it" not in repr(found)


def test_weights_are_not_read(folder, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes() if path.suffix != ".pt" else b"damaged")
    assert pm.describe(copy).n_epochs == 2
    with pytest.raises(pm.BrokenModelError, match="weights.pt is damaged"):
        pm.MULTIVI.load(copy)
    text = json.loads((copy / "model.json").read_text())
    (copy / "model.json").write_text(json.dumps({**text, "history": []}))
    with pytest.raises(pm.BrokenModelError, match="model.json is damaged"):
        pm.describe(copy)


def test_what_is_no_model(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a saved model"):
        pm.describe(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"Its folder '{folder.name}' is one: give that"):
        pm.describe(folder.parent)


def test_the_command(folder, tmp_path, capsys):
    assert main(["describe", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == repr(pm.describe(folder))
    assert main(["describe", str(tmp_path)]) == 1
    assert "is not a saved model" in capsys.readouterr().err
