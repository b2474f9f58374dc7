"""The page of a predictive check, and the command that makes it."""

from __future__ import annotations

import base64
import re

import numpy as np
import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.plots import report

plt = pytest.importorskip("matplotlib.pyplot")


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
    assert not re.search(r"(src|href)='(?!data:|#)", page)
    assert len(re.findall(r"<p class='help'>[^<]{40,}</p>\s*<img", page)) == 10

    # The list of contents leads to every section, in order.
    sections = re.findall(r"<h2 id='(\w+)'>([^<]+)</h2>", page)
    assert re.findall(r"<li><a href='#(\w+)'>([^<]+)</a></li>", page) == sections
    assert sections[-1][1] == "Terms"


def test_page_and_console_and_tables_say_the_same(trained, tmp_path, capsys):
    arguments = ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(tmp_path)]
    assert main([*arguments, "--n-samples", "40"]) == 0
    printed = capsys.readouterr().out
    summary = pd.read_csv(tmp_path / "summary.csv", dtype={"fails": "boolean"})
    page = (tmp_path / "check.html").read_text(encoding="utf-8")
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in re.findall(r"<tr(?:[^>]*)>(<td.*?)</tr>", page)]
    rows = rows[: len(summary)]
    assert len(summary) == 25
    lines = [line for line in printed.splitlines() if re.search(r" (ok|FAILS|n/a)$", line)]
    words = {True: "FAILS", False: "ok"}
    for of_table, on_page, line in zip(summary.to_dict("records"), rows, lines, strict=True):
        count = round((of_table["data_above"] + of_table["data_below"]) * of_table["n"])
        word = "n/a" if pd.isna(of_table["fails"]) else words[bool(of_table["fails"])]
        assert on_page[:3] == [of_table["table"], of_table["statistic"], f"{count} of {of_table['n']}"]
        assert on_page[-1] == word
        assert line.split()[-1] == word
        assert f" {count} of {of_table['n']} " in line
    sentence = f"FAILS: {int(summary['fails'].sum())} of {summary['fails'].notna().sum()} tested rows"
    assert sentence in printed
    assert sentence in page
    assert page.count("<tr class='fails'>") == summary["fails"].sum() > 0
    # A share of 40 replicates is known to be below 1 in 40, not to be 0.
    assert "&lt; 0.03" in page


def test_observed_values_are_on_the_vertical_axis(trained):
    model = pm.MULTIVI.load(trained / "model", pm.read(trained / "cells.h5ad"))
    check = model.posterior_predictive_check(n_samples=40)
    for picture in report.pictures(model, check):
        for panel in picture.panels:
            ax = panel()
            assert "observed" not in ax.get_xlabel()
            if picture.title.startswith(("Genes: o", "Regions: o", "Cells: o", "Is pred", "Are int", "Predicted")):
                assert "observed" in ax.get_ylabel()
            plt.close(ax.figure)


def test_a_missing_label_is_no_label_of_that_name(trained):
    model = pm.MULTIVI.load(trained / "model", pm.read(trained / "cells.h5ad"))
    model.adata.obs["label"] = pd.Categorical([None, *np.resize(["A", "B"], model.adata.n_obs - 1)])
    check = model.posterior_predictive_check(n_samples=40, hide_modalities=False, statistics="mean")
    ax = report.pictures(model, check, labels="label")[-1].panels[-1]()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A", "B", "missing"]
    plt.close(ax.figure)


def test_check_of_all_cells_with_the_prior_for_hidden_depth(trained, tmp_path, capsys):
    arguments = ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(tmp_path)]
    assert main([*arguments, "--n-samples", "40", "--all-cells", "--hidden-depth", "prior"]) == 0
    assert "40 replicates of 100 cells" in capsys.readouterr().out


def test_check_reports_missing_data_and_bad_arguments(trained, tmp_path, capsys):
    assert main(["check", str(trained / "model"), "--out", str(tmp_path)]) == 1
    assert "holds no data: give DATA" in capsys.readouterr().err
    arguments = ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(tmp_path)]
    assert main([*arguments, "--labels", "kind"]) == 1
    assert "--labels 'kind' is no column of obs" in capsys.readouterr().err
    assert main([*arguments, "--n-samples", "3"]) == 1
    assert "--n-samples 3 is too few" in capsys.readouterr().err
    others = pm.read(trained / "cells.h5ad")
    others.obs_names = "other " + others.obs_names
    others.write_h5ad(tmp_path / "others.h5ad")
    assert main(["check", str(trained / "model"), str(tmp_path / "others.h5ad"), "--out", str(tmp_path)]) == 1
    assert "held out: give the data of training, or --all-cells." in capsys.readouterr().err


def test_worst_features_come_first():
    replicated = np.arange(1.0, 9)
    genes = pd.DataFrame(
        {
            "statistic": "mean", "gene": [f"g{number}" for number in range(8)], "observed": replicated,
            "replicated": replicated, "lower": replicated - 1, "upper": replicated + 1, "p_value": 0.5,
        }
    )  # fmt: skip
    genes.loc[5, "observed"] += 10
    genes.loc[2, "observed"] -= 5
    assert report.worst(genes, 2)["gene"].tolist() == ["g5", "g2"]
