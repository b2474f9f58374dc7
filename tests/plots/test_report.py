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

pytest.importorskip("matplotlib")


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


def test_check_reports_missing_data_and_bad_arguments(trained, tmp_path, capsys):
    assert main(["check", str(trained / "model"), "--out", str(tmp_path)]) == 1
    assert "holds no data: give DATA" in capsys.readouterr().err
    arguments = ["check", str(trained / "model"), str(trained / "cells.h5ad"), "--out", str(tmp_path)]
    assert main([*arguments, "--labels", "kind"]) == 1
    assert "--labels 'kind' is no column of obs" in capsys.readouterr().err
    assert main([*arguments, "--n-samples", "3"]) == 1
    assert "--n-samples 3 is too few" in capsys.readouterr().err


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
