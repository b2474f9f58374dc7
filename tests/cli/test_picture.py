"""First picture of a trained model."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli.outputs import picture

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def model():
    adata = pm.simulate_multiome((40, 20, 20), n_genes=12, n_regions=20, n_batches=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=3)
    model.train(max_epochs=1, progress_bar=False)
    return model


@pytest.fixture
def drawn(model, monkeypatch):
    """Arguments with which the figure is drawn."""
    found = {}
    real = picture.overview

    def overview(xy, directions, colourings, history, summary):
        found.update(xy=xy, directions=directions, colourings=colourings, summary=summary)
        return real(xy, directions, colourings, history, summary)

    monkeypatch.setattr(picture, "overview", overview)

    def draw(labels):
        png = picture.first_picture(model, model.get_latent_representation(), labels, 0)
        assert png.startswith(b"\x89PNG")
        return found

    return draw


def test_labels_stand_beside_what_should_be_mixed(drawn, model):
    found = drawn({"cell_type": model.adata.obs["cell_type"]})
    assert [*found["colourings"]] == ["cell_type", "measured modalities"]
    assert set(found["colourings"]["measured modalities"]) == {"paired", "RNA only", "ATAC only"}
    assert found["directions"] == "t-SNE"
    assert len(found["summary"])


def test_without_labels_origins_are_shown(drawn):
    assert [*drawn(None)["colourings"]] == ["measured modalities", "batch"]


def test_numbers_stay_numbers_and_missing_labels_missing(drawn, model):
    numbers = pd.Series(np.r_[np.nan, np.linspace(0, 1, 79)], index=model.adata.obs_names)
    assert drawn({"age": numbers})["colourings"]["age"].dtype == float
    words = pd.Series(["a", None] * 40, dtype="category", index=model.adata.obs_names)
    assert drawn({"word": words})["colourings"]["word"].tolist() == ["a", None] * 40


def test_some_of_many_cells_are_drawn_and_that_is_said(drawn, model, monkeypatch):
    monkeypatch.setattr(picture, "_MOST_CELLS", 50)
    found = drawn({"cell_type": model.adata.obs["cell_type"]})
    assert "cell_type (50 of 80 cells)" in found["colourings"]
    assert found["xy"].shape == (50, 2)


def test_without_scikit_learn_the_picture_says_what_it_shows(drawn, capsys, monkeypatch):
    for name in ("sklearn", "sklearn.manifold"):
        monkeypatch.setitem(sys.modules, name, None)
    assert drawn(None)["directions"] == "principal direction"
    printed = capsys.readouterr().out
    assert "shows the two principal directions instead of neighbours" in printed
    assert "pip install 'pyro-multivi[plot]'" in printed
