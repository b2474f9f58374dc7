"""Pictures of the latent space and of training: what they draw."""

import io
import itertools
import sys

import numpy as np
import pandas as pd
import pytest

from pyro_multivi import plots
from pyro_multivi.plots import latent, style

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


def drawn(ax):
    """Coordinates and colour of every cell."""
    [points] = ax.collections
    return {
        tuple(xy): tuple(colour)
        for xy, colour in zip(points.get_offsets().tolist(), points.get_facecolor(), strict=True)
    }


def test_latent_scatter_shows_every_cell_once_in_the_colour_of_its_label(ax):
    cells, labels = np.arange(12.0).reshape(6, 2), ["b", "a", "b", "a", "c", "a"]
    assert plots.latent_scatter(cells, labels, ax, "title") is ax
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c"]
    to_rgb = pytest.importorskip("matplotlib.colors").to_rgb
    colours = dict(zip("abc", (to_rgb(handle.get_color()) for handle in legend.legend_handles), strict=True))
    found = drawn(ax)
    assert len(found) == 6
    assert [found[tuple(xy)][:3] for xy in cells] == [colours[label] for label in labels]
    assert ax.get_xlabel() == "latent direction 1"


def test_latent_scatter_numbers_labels_past_the_palette(ax):
    labels = [f"type {number}" for number in range(45)] * 3
    latent = np.random.default_rng(0).normal(size=(45, 2)) * 100
    plots.latent_scatter(np.vstack([latent, latent + 1, latent - 1]), labels, ax)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts == [f"{number + 1}  type {number}" for number in range(45)]
    assert len(set(drawn(ax).values())) == 45
    # Its number stands at a cell of each category.
    places = {text.get_text(): text.get_position() for text in ax.texts}
    assert places["13"] == pytest.approx(tuple(latent[12]), abs=1.5)


def test_numbers_of_categories_lie_beside_each_other_where_there_is_room(ax):
    rng = np.random.default_rng(0)
    labels = np.repeat([f"batch {number}" for number in range(12)], 200)
    plots.latent_scatter(rng.normal(size=(len(labels), 2)), labels, ax)
    ax.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 12
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]
    assert ax.get_legend().get_window_extent().y1 < ax.xaxis.label.get_window_extent().y0


def test_long_names_are_cut_in_the_middle(ax):
    names = [f"CD4+ central memory T cell, subset {number}" for number in range(3)]
    plots.latent_scatter(np.eye(3)[:, :2], names, ax)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(set(texts)) == 3


def test_more_categories_than_can_be_told_apart_are_one_colour(ax):
    labels = [f"cell {number}" for number in range(100)] + ["cell 3"] * 5
    plots.latent_scatter(np.arange(210.0).reshape(-1, 2), labels, ax)
    assert ax.get_legend().get_texts()[-1].get_text() == "other (40 categories)"
    assert len(set(drawn(ax).values())) == 61


def test_numbers_have_a_colour_bar_and_missing_labels_are_grey(ax):
    latent = np.random.default_rng(0).normal(size=(50, 2))
    plots.latent_scatter(latent, np.r_[np.nan, np.linspace(0, 1, 49)], ax)
    missing, known = ax.collections
    assert (len(missing.get_offsets()), len(known.get_offsets())) == (1, 49)
    assert len(ax.figure.axes) == 2
    assert ax.get_legend() is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.linspace(0, 1, 50), True), (np.arange(100), True), (np.arange(50) % 10, False),
        (np.arange(50) % 2 == 0, False), (["1", "2"] * 25, False), ([0.5, 1.5] * 25, False),
        (np.full(50, np.nan), False),
    ],
)  # fmt: skip
def test_which_labels_are_numbers(labels, expected):
    assert latent.is_continuous(pd.Series(labels)) is expected


def test_colours_differ_as_seen():
    colours = style.distinct_colours(60)
    assert tuple(colours[: len(plots.PALETTE)]) == plots.PALETTE
    rgb = np.array([[int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)] for colour in colours])
    lab = style._lab(rgb)
    assert style._lab(np.ones((1, 3)))[0] == pytest.approx([100, 0, 0], abs=0.1)
    distance = np.linalg.norm(lab[:, None] - lab, axis=-1) + 1e9 * np.eye(60)
    # 2.3 is just noticeable.
    assert distance.min() > 15


def test_neighbours_stay_neighbours_where_principal_directions_mix_them():
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    group = np.arange(120) % 6
    # Six clusters at the ends of as many axes: two directions cannot keep them apart.
    points = (20 * np.eye(6)[group] + rng.normal(size=(120, 6))).astype(np.float32)
    xy, name = plots.neighbour_embedding(points)
    assert (xy.shape, name) == ((120, 2), "t-SNE")
    distance = np.linalg.norm(xy[:, None] - xy, axis=-1) + 1e9 * np.eye(120)
    assert (group[distance.argmin(1)] == group).all()
    assert plots.neighbour_embedding(points)[0] == pytest.approx(xy)


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-multivi\[plot\]'"):
        plots.neighbour_embedding(np.eye(8))


def summary():
    return pd.DataFrame(
        {
            "table": ["genes", "cells", "totals", "genes by batch"],
            "statistic": ["mean", "detected_genes", "sd_detected_genes", "mean"],
            "n": [100, 50, 1, 200], "data_above": [0.04, 0.3, 1, 0], "data_below": [0.02, 0.1, 0, 0], "expected": 0.05,
            "fails": [False, True, True, False],
        }
    )  # fmt: skip


def test_check_summary_has_a_bar_for_each_statistic_of_enough_values_or_that_fails(ax):
    table = summary()
    table.loc[len(table)] = {**table.iloc[2], "statistic": "mean_detected_genes", "data_above": 0.0, "fails": False}
    plots.check_summary(table.iloc[[0, 1, 4, 2, 3]], ax)
    labels = ["mean, genes", "detected genes, cells", "sd detected genes, totals"]
    assert [label.get_text() for label in ax.get_yticklabels()] == labels
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([6, 40, 100])
    assert ax.patches[0].get_facecolor() != ax.patches[1].get_facecolor()
    assert ax.get_title() == "predictive check: 2 of 4 fail"
    # Of a single value no share is told, and no number stands on the line of the share expected.
    assert [text.get_text().strip() for text in ax.texts] == ["6 %", "40 %", "1 of 1"]
    assert all(text.get_position()[0] >= 5 for text in ax.texts)


@pytest.mark.parametrize("n", [4, 14])
def test_names_of_bars_lie_below_each_other(n):
    rows = [{**summary().iloc[0], "statistic": f"statistic {place}", "table": "extra: protein"} for place in range(n)]
    history = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]})}
    xy = np.random.default_rng(0).normal(size=(30, 2))
    made = plots.overview(xy, "t-SNE", {"a": np.zeros(30), "b": np.zeros(30)}, history, pd.DataFrame(rows))
    made.draw_without_rendering()
    names = made.axes[-1].get_yticklabels()
    assert names[0].get_text() == "statistic 0, protein"
    boxes = [name.get_window_extent() for name in names]
    assert not [1 for one, other in itertools.pairwise(boxes) if one.overlaps(other)]


def test_check_summary_of_a_table_read_from_a_file(ax):
    """Verdicts with gaps are then objects."""
    table = summary()
    table["fails"] = [False, None, True, False]
    plots.check_summary(table.astype({"fails": object}), ax)
    assert "grey: no test" in ax.get_xlabel()


@pytest.mark.parametrize("n_types", [4, 45])
@pytest.mark.parametrize("with_batch", [False, True])
def test_overview_has_room_for_every_panel(n_types, with_batch):
    xy = np.random.default_rng(0).normal(size=(90, 2))
    types = np.array([f"a type of cells {number}" for number in range(n_types)], dtype=object)[np.arange(90) % n_types]
    colourings = {"type": types} | ({"batch": np.arange(90) % 2} if with_batch else {})
    history = {"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0]})}
    made = plots.overview(xy, "t-SNE", colourings, history, summary())
    made.savefig(io.BytesIO(), dpi=50)  # Lays it out.
    whole = made.get_window_extent()
    boxes = [ax.get_window_extent() for ax in made.axes]
    assert len(boxes) == 3 + with_batch
    assert all(box.width > 0.15 * whole.width and box.height > 0.15 * whole.height for box in boxes)
    legends = [legend for part in made.subfigs for legend in part.legends]
    assert len(legends) == (n_types == 45)


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
    assert {train.get_marker(), validation.get_marker()} == {""}
    assert [tick for tick in ax.get_xticks() if 1 <= tick <= 3] == [1, 2, 3]
    plots.training_history({"elbo_train": pd.DataFrame({"elbo_train": [3.0]})}, "elbo", ax)
    assert ax.get_lines()[-1].get_marker() == "o"
    with pytest.raises(KeyError, match="'kl' was not recorded; recorded are elbo"):
        plots.training_history(history, "kl", ax)
    with pytest.raises(KeyError, match="history is empty: the model was trained for no epoch"):
        plots.training_history({}, "elbo", ax)
