"""``pyro-multivi differential``, as a person types it."""

import sys

import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two models, one of which holds its data, and the file of the cells."""
    folder = tmp_path_factory.mktemp("saved")
    adata = pm.simulate_multiome((30, 15, 15), n_genes=20, n_regions=30, seed=0)
    adata.write_h5ad(folder / "cells.h5ad")
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=2, progress_bar=False)
    model.save(folder / "model")
    model.save(folder / "with_data", save_anndata=True)
    return folder


def differential(*arguments):
    return main(["differential", *map(str, arguments), "--quiet", "--n-samples", "100"])


def test_writes_a_table_of_all_groups(saved, tmp_path, capsys):
    out = tmp_path / "genes.csv"
    assert differential(saved / "model", saved / "cells.h5ad", "--groupby", "cell_type", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "type_0 vs Rest, 20 features: " in printed
    assert f"written to {out}" in printed
    table = pd.read_csv(out)
    assert list(table.columns[:2]) == ["feature", "proba_de"]
    assert len(table) == 4 * 20
    model = pm.MULTIVI.load(saved / "with_data")
    expected = model.differential_expression(groupby="cell_type", n_samples=100)
    assert table["feature"].tolist() == list(expected.index)
    assert table["proba_de"].to_numpy() == pytest.approx(expected["proba_de"].to_numpy())


def test_options_reach_the_test_and_saved_data_are_used(saved, tmp_path, capsys):
    out = tmp_path / "regions.csv"
    status = differential(
        saved / "with_data", "--groupby", "cell_type", "--group1", "type_0", "--group1", "type_2", "--group2", "type_1",
        "--modality", "accessibility", "--unit", "cell", "--delta", "0.1", "--fdr-target", "0.2", "--out", out,
    )  # fmt: skip
    assert status == 0
    table = pd.read_csv(out)
    assert table["comparison"].unique().tolist() == ["type_0 vs type_1", "type_2 vs type_1"]
    assert (table["delta"] == 0.1).all()
    assert "called at FDR 0.2" in capsys.readouterr().out
    vanilla = tmp_path / "vanilla.csv"
    assert differential(saved / "with_data", "--groupby", "cell_type", "--mode", "vanilla", "--out", vanilla) == 0
    assert "proba_m1" in pd.read_csv(vanilla)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("model", ["--groupby", "cell_type"], "holds no data: give DATA"),
        ("with_data", ["--groupby", "celltype"], "Did you mean 'cell_type'"),
        ("with_data", ["--groupby", "cell_type", "--group1", "type0"], "Did you mean 'type_0'"),
        ("with_data", ["--groupby", "cell_type", "--mode", "chance"], "--mode 'chance' is not allowed"),
        ("nowhere", ["--groupby", "cell_type"], "nowhere"),
    ],
)
def test_errors_are_sentences(saved, tmp_path, capsys, model, arguments, message):
    assert differential(saved / model, *arguments, "--out", tmp_path / "table.csv") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "message"), [("table.xlsx", "neither .csv nor .parquet"), ("nowhere/table.csv", "there is no folder")]
)
def test_where_to_write_is_checked_first(saved, tmp_path, capsys, name, message):
    assert differential(saved / "with_data", "--groupby", "cell_type", "--out", tmp_path / name) == 1
    assert message in capsys.readouterr().err


def test_parquet_needs_its_extra(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert differential(saved / "with_data", "--groupby", "cell_type", "--out", tmp_path / "table.parquet") == 1
    assert "pip install 'pyro-multivi[parquet]'" in capsys.readouterr().err


def test_parquet_holds_the_table(saved, tmp_path):
    pytest.importorskip("pyarrow")
    out = tmp_path / "table.parquet"
    assert differential(saved / "with_data", "--groupby", "cell_type", "--out", out) == 0
    written = pd.read_parquet(out)
    expected = pm.MULTIVI.load(saved / "with_data").differential_expression(groupby="cell_type", n_samples=100)
    pd.testing.assert_frame_equal(written, expected.rename_axis("feature").reset_index())
