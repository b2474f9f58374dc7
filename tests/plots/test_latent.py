"""Pictures of the latent space and of training: what they draw."""

import numpy as np
import pandas as pd
import pytest

from pyro_multivi import plots

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    return figure.Figure().subplots()


def test_principal_plane_keeps_the_two_widest_directions():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(200, 4)) * [0.1, 5.0, 0.1, 2.0] + 3.0
    plane = plots.principal_plane(latent)
    assert abs(np.corrcoef(plane[:, 0], latent[:, 1])[0, 1]) > 0.999
    assert abs(np.corrcoef(plane[:, 1], latent[:, 3])[0, 1]) > 0.999
    assert plane.mean(0) == pytest.approx([0, 0], abs=1e-9)


def test_latent_scatter_shows_every_cell_once_with_its_label(ax):
    latent = np.arange(12.0).reshape(6, 2)
    assert plots.latent_scatter(latent, ["b", "a", "b", "a", "c", "a"], ax, "title") is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]
    assert [len(collection.get_offsets()) for collection in ax.collections] == [3, 2, 1]
    assert np.asarray(ax.collections[2].get_offsets()).tolist() == [[8.0, 9.0]]


def test_latent_scatter_distinguishes_more_labels_than_there_are_colours(ax):
    labels = [f"type {number:02d}" for number in range(20)]
    plots.latent_scatter(np.random.default_rng(0).normal(size=(20, 3)), labels, ax)
    looks = {(c.get_facecolor().tobytes(), c.get_paths()[0].vertices.tobytes()) for c in ax.collections}
    assert len(looks) == 20


def test_training_history_draws_both_splits(ax):
    epochs = pd.RangeIndex(3, name="epoch")
    history = {
        "elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0, 1.0]}, index=epochs),
        "elbo_validation": pd.DataFrame({"elbo_validation": [4.0, np.nan, 2.0]}, index=epochs),
    }
    plots.training_history(history, "elbo", ax)
    train, validation = ax.get_lines()
    assert train.get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert validation.get_xydata().tolist() == [[1, 4], [3, 2]]
    with pytest.raises(KeyError, match="'kl' was not recorded; recorded are elbo"):
        plots.training_history(history, "kl", ax)
