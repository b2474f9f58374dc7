"""The page and the pictures of a predictive check, and the command that makes them."""

from __future__ import annotations

import base64
import re

import numpy as np
import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.plots import checks as check_plots
from pyro_multivi.plots import report

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def ax():
    return figure.Figure().subplots()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with a trained model of a mosaic and its data."""
    folder = tmp_path_factory.mktemp("check")
    adata = pm.simulate_multiome((60, 20, 20), n_genes=20, n_regions=30, n_batches=2, seed=0)
    adata.write_h5ad(folder / "cells.h5ad")
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=2, validation_size=0.3, progress_bar=False)
    model.save(folder / "model")
    return folder


TABLES = {
    "cells", "coverage", "genes", "groups", "histogram", "imputed", "regions", "reliability", "scores", "summary",
    "totals",
}  # fmt: skip


def test_check_writes_tables_and_one_page(trained, tmp_path, capsys):
    out = tmp_path / "new" / "check"
    status = main(
        ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(out), "--n-samples", "40",
         "--labels", "cell_type"]
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    assert {path.stem for path in out.glob("*.csv")} == TABLES
    assert "40 replicates of 30 held-out cells" in printed.out
    genes = pd.read_csv(out / "genes.csv")
    assert genes["p_value"].between(0, 1).all()
    assert set(pd.read_csv(out / "groups.csv")["by"]) == {"batch", "cell_type"}
    page = (out / "check.html").read_text(encoding="utf-8")
    pictures = re.findall(r"src='data:image/png;base64,([^']+)'", page)
    assert len(pictures) == page.count("<img") == 10
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    # Self-contained: nothing is fetched, and every picture has its sentence before it.
    assert not re.search(r"(src|href)='(?!data:)", page)
    assert len(re.findall(r"<p class='help'>[^<]{40,}</p>\s*<img", page)) == 10


def test_check_of_all_cells_with_the_prior_for_hidden_depth(trained, tmp_path, capsys):
    arguments = ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(tmp_path)]
    assert main([*arguments, "--n-samples", "40", "--all-cells", "--hidden-depth", "prior"]) == 0
    assert "40 replicates of 100 cells" in capsys.readouterr().out


def test_check_says_what_is_missing(trained, tmp_path, capsys):
    assert main(["check", str(trained / "model"), "--out", str(tmp_path)]) == 1
    assert "holds no data: give DATA" in capsys.readouterr().err
    arguments = ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(tmp_path)]
    assert main([*arguments, "--labels", "kind"]) == 1
    assert "groupby='kind' is no column of obs" in capsys.readouterr().err
    assert main([*arguments, "--n-samples", "3"]) == 1
    assert "n_samples=3 is too few" in capsys.readouterr().err


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
    assert check_plots.observed_against_replicated(genes, "mean", ax) is ax
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["inside (2)", "outside (2)"]
    with pytest.raises(KeyError, match="'cv' is not in the table: choose from 'mean'"):
        check_plots.observed_against_replicated(genes, "cv", ax)


def test_observed_against_replicated_draws_a_single_point_outside(ax):
    # Warnings are errors: a Series of one number is one to matplotlib.
    check_plots.observed_against_replicated(table([0.5, 0.4, 0.999]), "mean", ax)
    assert ax.get_legend().get_texts()[1].get_text() == "outside (1)"


def test_pictures_draw_into_the_axes_given(ax):
    histogram = pd.DataFrame({"count": range(4), "observed": [90, 9, 1, 0], "replicated": [80.0, 16.0, 4.0, 1.0]})
    histogram = histogram.assign(lower=histogram["replicated"] * 0.9, upper=histogram["replicated"] * 1.1)
    assert check_plots.rootogram(histogram, ax) is ax
    bars = ax.patches
    # They hang from the square root of what is expected and are as long as that of what is observed.
    assert [bar.get_y() + bar.get_height() for bar in bars] == pytest.approx(np.sqrt([80.0, 16.0, 4.0, 1.0]))
    assert [bar.get_height() for bar in bars] == pytest.approx(np.sqrt([90, 9, 1, 0]))
    reliability = pd.DataFrame({"setting": ["a", "a", "b"], "n": [500, 5, 500], "predicted": [0.1, 0.2, 0.1],
                                "observed": [0.1, 0.9, 0.2]})  # fmt: skip
    assert check_plots.calibration_curve(reliability, ax) is ax
    coverage = pd.DataFrame({"setting": "a", "counts": "all", "nominal": [0.5, 0.9], "covered": [0.6, 0.9]})
    assert check_plots.coverage_curve(coverage, ax) is ax
    assert check_plots.p_value_histogram(table([0.1, 0.9]), "mean", ax) is ax
    imputed = pd.DataFrame({"modality": "expression", "feature": ["g1", "g2"], "measured": [1.0, 2.0],
                            "imputed": [1.0, 3.0], "correlation": [0.5, np.nan]})  # fmt: skip
    assert check_plots.imputed_against_measured(imputed, "expression", ax) is ax
    with pytest.raises(KeyError, match="modality='accessibility' was not hidden"):
        check_plots.imputed_against_measured(imputed, "accessibility", ax)


def test_settings_are_told_apart_without_colour(ax):
    coverage = pd.DataFrame({"setting": ["a", "b", "c"], "counts": "all", "nominal": 0.5, "covered": [0.4, 0.5, 0.6]})
    check_plots.coverage_curve(coverage, ax)
    looks = {(line.get_linestyle(), line.get_marker()) for line in ax.get_lines()[:3]}
    assert len(looks) == 3


def test_worst_features_come_first():
    genes = table([0.5] * 8)
    genes.loc[5, "observed"] += 10
    genes.loc[2, "observed"] -= 5
    assert report.worst(genes, 2)["gene"].tolist() == ["g5", "g2"]
