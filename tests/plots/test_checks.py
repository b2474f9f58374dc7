"""Pictures of predictive checks: what they draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pyro_multivi import plots

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    return figure.Figure().subplots()


def table(p_values):
    n = len(p_values)
    replicated = np.arange(1.0, n + 1)
    return pd.DataFrame(
        {
            "statistic": "mean", "gene": [f"g{number}" for number in range(n)], "observed": replicated + 0.5,
            "replicated": replicated, "lower": replicated - 1, "upper": replicated + 1, "p_value": p_values,
        }
    )  # fmt: skip


def test_observed_against_replicated_marks_what_lies_outside(ax):
    genes = table([0.5, 0.001, 0.999, 0.3])
    assert plots.observed_against_replicated(genes, "mean", ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["inside (2)", "outside (2)"]
    with pytest.raises(KeyError, match="'cv' is not in the table: choose from 'mean'"):
        plots.observed_against_replicated(genes, "cv", ax)


def test_observed_against_replicated_draws_a_single_point_outside(ax):
    # Warnings are errors: a Series of one number is one to matplotlib.
    plots.observed_against_replicated(table([0.5, 0.4, 0.999]), "mean", ax)
    assert ax.get_legend().get_texts()[1].get_text() == "outside (1)"


def test_pictures_draw_into_the_axes_given(ax):
    histogram = pd.DataFrame({"count": range(4), "observed": [90, 9, 1, 0], "replicated": [80.0, 16.0, 4.0, 1.0]})
    histogram = histogram.assign(lower=histogram["replicated"] * 0.9, upper=histogram["replicated"] * 1.1)
    assert plots.rootogram(histogram, ax) is ax
    bars = ax.patches
    # They hang from the square root of what is expected and are as long as that of what is observed.
    assert [bar.get_y() + bar.get_height() for bar in bars] == pytest.approx(np.sqrt([80.0, 16.0, 4.0, 1.0]))
    assert [bar.get_height() for bar in bars] == pytest.approx(np.sqrt([90, 9, 1, 0]))
    reliability = pd.DataFrame({"setting": ["a", "a", "b"], "n": [500, 5, 500], "predicted": [0.1, 0.2, 0.1],
                                "observed": [0.1, 0.9, 0.2]})  # fmt: skip
    assert plots.calibration_curve(reliability, ax) is ax
    coverage = pd.DataFrame({"setting": "a", "counts": "all", "nominal": [0.5, 0.9], "covered": [0.6, 0.9]})
    assert plots.coverage_curve(coverage, ax) is ax
    assert plots.p_value_histogram(table([0.1, 0.9]), "mean", ax) is ax
    imputed = pd.DataFrame({"modality": "expression", "feature": ["g1", "g2"], "measured": [1.0, 2.0],
                            "imputed": [1.0, 3.0], "correlation": [0.5, np.nan]})  # fmt: skip
    assert plots.imputed_against_measured(imputed, "expression", ax) is ax
    # As in every picture of a check: predicted across, observed up.
    assert ax.collections[-1].get_offsets().data.tolist() == [[3.0, 2.0], [1.0, 1.0]]
    with pytest.raises(KeyError, match="modality='accessibility' was not hidden"):
        plots.imputed_against_measured(imputed, "accessibility", ax)


def test_settings_differ_without_colour(ax):
    settings = [*"abcdefgh"]
    coverage = pd.DataFrame({"setting": settings, "counts": "all", "nominal": 0.5, "covered": np.linspace(0.4, 0.6, 8)})
    plots.coverage_curve(coverage, ax)
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.get_lines()[:8]}
    assert len(looks) == 8


def test_the_highest_points_are_drawn_of_many(ax):
    """A few regions are open in most cells: a random part of all regions leaves most of them out."""
    observed = np.r_[np.full(12_000, 0.02), np.linspace(0.4, 0.9, 20)]
    regions = pd.DataFrame(
        {"statistic": "detection_rate", "region": "r", "observed": observed, "replicated": 0.02, "lower": 0.01,
         "upper": 0.03, "p_value": 0.5}
    )  # fmt: skip
    plots.observed_against_replicated(regions, "detection_rate", ax)
    drawn = np.concatenate([line.get_ydata() for line in ax.get_lines() if line.get_marker() in ("o", "^")])
    assert len(drawn) == 4000
    assert (drawn >= 0.4).sum() == 20
    assert ax.get_ylabel() == "detection rate (share of cells), observed"
    imputed = pd.DataFrame({"modality": "accessibility", "measured": observed, "imputed": 0.02, "correlation": 0.1})
    plots.imputed_against_measured(imputed, "accessibility", ax)
    assert (ax.collections[-1].get_offsets()[:, 1] >= 0.4).sum() == 20


def test_imputed_features_without_a_count_or_a_correlation_are_seen(ax):
    imputed = pd.DataFrame({"modality": "expression", "measured": [0.0, 0.01, 1.0], "imputed": [0.02, 0.02, 1.0],
                            "correlation": [np.nan, -0.2, 0.9]})  # fmt: skip
    plots.imputed_against_measured(imputed, "expression", ax)
    points = ax.collections[-1]
    points.update_scalarmappable()
    grey = [points.get_offsets()[place].tolist() for place, colour in enumerate(points.get_facecolors())
            if len(set(colour[:3])) == 1]  # fmt: skip
    assert grey == [[0.02, 0.0]]
    # Zero has a place on the axes.
    assert np.isfinite(ax.transData.transform([0.02, 0.0])).all()
    assert points.colorbar.extend == "min"


def test_what_is_counted_is_named(ax):
    plots.p_value_histogram(table([0.1, 0.9]), "mean", ax)
    assert ax.get_ylabel() == "number of genes"
