"""Figures of differential tests."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest

from pyro_multivi import MULTIVI, plots, simulate_multiome

figure = pytest.importorskip("matplotlib.figure")
Text = pytest.importorskip("matplotlib.text").Text


@pytest.fixture(scope="module")
def fitted():
    """Cells of 3 types, distinct enough for features to be called."""
    adata = simulate_multiome(
        (60, 20, 20), 30, 40, n_latent=3, n_types=3, effect_size=2.0, differential_fraction=0.6, seed=0
    )
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=16, n_latent=3)
    model.train(max_epochs=8, batch_size=32, lr=1e-2, progress_bar=False)
    return model


@pytest.fixture
def ax():
    return figure.Figure().subplots()


def test_volcano_draws_each_feature_once_by_its_call(fitted, ax):
    table = fitted.differential_expression(groupby="cell_type", n_samples=100)
    assert plots.volcano(table, "type_1 vs Rest", ax, n_labels=2) is ax
    rows = table[table["group1"] == "type_1"]
    hit = rows["is_de_fdr_0.05"]
    sizes = [len(points.get_offsets()) for points in ax.collections]
    expected = [(~hit).sum(), (hit & (rows["lfc_mean"] > 0)).sum(), (hit & (rows["lfc_mean"] <= 0)).sum()]
    assert sizes == expected
    assert sum(sizes[1:]) > 1
    written = {text.get_text() for text in ax.texts}
    assert rows["lfc_mean"][hit].idxmax() in written
    assert len(written) <= 2
    assert "group 1 over group 2" in ax.get_xlabel()


def test_names_are_drawn_as_they_are_written(fitted, ax):
    table = fitted.differential_expression(groupby="cell_type", n_samples=100)
    names = {"type_0 vs Rest": "$x_1^$ vs Rest", "type_1 vs Rest": "_1 vs Rest", "type_2 vs Rest": "a$ vs b$"}
    table["comparison"] = table["comparison"].map(names)
    table.index = [f"$^{gene}$" for gene in table.index]
    plots.top_features(table, ax=ax)
    assert len(ax.get_legend().get_texts()) == 3
    # A formula that is none is an error as soon as it is drawn.
    ax.figure.draw_without_rendering()
    others = figure.Figure().subplots(2)
    plots.volcano(table, "$x_1^$ vs Rest", others[0])
    plots.latent_scatter(np.zeros((3, 2)), ["$x_1^$", "_1", "a"], others[1])
    others[0].figure.draw_without_rendering()


def test_volcano_of_cells_given_by_hand(fitted, ax):
    table = fitted.differential_accessibility(idx1=np.arange(40), n_samples=100)
    plots.volcano(table, ax=ax)
    assert sum(len(points.get_offsets()) for points in ax.collections) == len(table)


def test_top_features_draws_the_strongest_of_each_group(fitted, ax):
    table = fitted.differential_expression(groupby="cell_type", n_samples=100)
    assert plots.top_features(table, n=2, ax=ax) is ax
    labels = [text.get_text() for text in ax.get_yticklabels()]
    expected = []
    for name in table["comparison"].unique():
        rows = table[(table["comparison"] == name) & table["is_de_fdr_0.05"] & (table["lfc_mean"] > 0)]
        expected += list(rows["lfc_mean"].nlargest(2).index)
    assert labels == expected


def test_tables_that_cannot_be_drawn_are_refused(fitted, ax):
    table = fitted.differential_expression(groupby="cell_type", n_samples=100)
    with pytest.raises(ValueError, match="comparison=None is not in the table: choose one of"):
        plots.volcano(table, ax=ax)
    with pytest.raises(ValueError, match="comparison='B vs T' is not in the table"):
        plots.volcano(table, "B vs T", ax)
    with pytest.raises(ValueError, match="holds a single one without a name"):
        plots.volcano(table.drop(columns=["comparison"]), "B vs T", ax)
    vanilla = fitted.differential_expression(groupby="cell_type", mode="vanilla", n_samples=100)
    for draw in (plots.volcano, plots.top_features):
        with pytest.raises(ValueError, match="no changes and calls, for it has no column lfc_mean or change_mean"):
            draw(vanilla, ax=ax)
        with pytest.raises(ValueError, match="for it has no column is_de_fdr_... or is_da_fdr"):
            draw(table.drop(columns=["is_de_fdr_0.05"]), ax=ax)
    # Nothing of a table is left: nothing is drawn, whether or not comparisons were named.
    assert plots.volcano(table[:0], ax=ax) is plots.volcano(table[:0].drop(columns=["comparison"]), ax=ax)
    with pytest.raises(ValueError, match="nothing to draw"):
        plots.top_features(table.assign(**{"is_de_fdr_0.05": False}), ax=ax)


def test_names_in_a_volcano_do_not_lie_on_each_other(ax):
    """Points with the greatest Bayes factor stand side by side."""
    change = np.r_[np.linspace(-2, -1, 20), np.linspace(1, 2, 20)]
    table = pd.DataFrame(
        {"lfc_mean": change, "bayes_factor": 18.4, "is_de_fdr_0.05": True}, index=[f"ENSG{n:011d}" for n in range(40)]
    )
    plots.volcano(table, ax=ax)
    ax.figure.draw_without_rendering()
    # Of an annotation the box would hold its line too, which is upright beside the names.
    texts = [Text.get_window_extent(text) for text in ax.texts]
    assert len(texts) == 10
    assert not [1 for one, other in itertools.combinations(texts, 2) if one.overlaps(other)]


def test_top_features_of_many_comparisons_have_colours_and_rows_of_their_own():
    names = np.repeat([f"type {number} vs Rest" for number in range(30)], 5)
    table = pd.DataFrame(
        {"comparison": names, "lfc_mean": 1.0, "lfc_std": 0.1, "is_de_fdr_0.05": True},
        index=[f"gene {number}" for number in range(150)],
    )
    ax = plots.top_features(table)
    ax.figure.draw_without_rendering()
    assert len({bar.get_facecolor() for bar in ax.patches}) == 30
    rows = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not [1 for one, other in itertools.pairwise(rows) if one.overlaps(other)]
    # Nothing is cut off at the edges of a figure of its own.
    whole = ax.figure.bbox
    assert min(row.x0 for row in rows) >= whole.x0
    assert ax.get_legend().get_window_extent().x1 <= whole.x1
