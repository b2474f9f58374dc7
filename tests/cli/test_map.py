"""``pyro-multivi map``: a query on a saved model."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.cli.messages import in_options

QUICK = ["--quiet", "--max-epochs", "1", "--n-latent", "2", "--n-hidden", "8", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """reference.h5ad, the model of it in out/model, and query.h5ad: RNA of another donor, without three genes."""
    folder = tmp_path_factory.mktemp("map")
    whole = pm.simulate_multiome((120, 0, 0), n_genes=20, n_regions=30, n_batches=2, n_types=2, seed=0)
    whole.obs = whole.obs[["cell_type", "batch"]].rename(columns={"batch": "donor"})
    first = (whole.obs["donor"] == "batch_0").to_numpy()
    whole[first].copy().write_h5ad(folder / "reference.h5ad")
    query = whole[~first, 3:20].copy()
    del query.obs["donor"], query.obs["cell_type"]
    query.write_h5ad(folder / "query.h5ad")
    given = ["train", str(folder / "reference.h5ad"), "--batch-key", "donor", "--out", str(folder / "out"), *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_multivi.cli.train.first_picture", lambda *_: None)
        assert main(given) == 0
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)

    def run(*arguments):
        status = main(["map", *arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return printed.out if status == 0 else f"error: {printed.err}"

    return run


def test_states_and_labels_of_a_query(run):
    out = run("out/model", "query.h5ad", "--batch", "new", "--labels", "cell_type", "--reference", "reference.h5ad",
              "--out", "mapped.csv", "--quiet")  # fmt: skip
    assert "17 shared with the model; 3 missing" in out
    table = pd.read_csv("mapped.csv", index_col="cell")
    assert list(table.columns) == ["z1", "z2", "label", "confidence", "nearest_label", "p_value"]
    reference, query = anndata.read_h5ad("reference.h5ad"), anndata.read_h5ad("query.h5ad")
    model = pm.MULTIVI.load("out/model", reference)
    query.obs["donor"] = "new"
    mapped = pm.MULTIVI.load_query_data(query, model)
    np.testing.assert_allclose(table[["z1", "z2"]], mapped.get_latent_representation(), atol=1e-5)
    labels = model.transfer_labels(mapped, "cell_type")
    assert table["label"].tolist() == labels["label"].tolist()
    assert "already: give --overwrite" in run("out/model", "query.h5ad", "--batch", "new", "--out", "mapped.csv")


def test_states_alone_and_training(run):
    assert "new         late (" in run("out/model", "query.h5ad", "--batch", "late", "--out", "states.csv", "--quiet")
    assert list(pd.read_csv("states.csv").columns) == ["cell", "z1", "z2"]
    run("out/model", "query.h5ad", "--batch", "late", "--max-epochs", "1", "--out", "trained.csv", "--quiet")
    states, trained = pd.read_csv("states.csv"), pd.read_csv("trained.csv")
    # Encoders do not see the batch: what is learned of it moves no cells, unless they are trained too.
    pd.testing.assert_frame_equal(trained, states)
    aligned = ["--align", "--max-epochs", "1", "--out", "aligned.csv", "--quiet"]
    run("out/model", "query.h5ad", "--batch", "late", *aligned)
    assert not np.allclose(pd.read_csv("aligned.csv")["z1"], states["z1"])
    assert in_options(
        "load_query_data(query, model, freeze_expression=False) and train() align a batch; alpha=0", ["alpha"]
    ) == ("--align moves it; --alpha 0")


def test_errors_in_the_words_of_the_command_line(run):
    out = ["--out", "x.csv"]
    assert "no column 'donor' of batches: give --batch NAME" in run("out/model", "query.h5ad", *out)
    assert "--batch new: the query has a column 'donor'" in run("out/model", "reference.h5ad", "--batch", "new", *out)
    given = ["out/model", "query.h5ad", "--batch", "new", "--labels", "cell_type"]
    assert "holds no data: give --reference DATA" in run(*given, *out)
    error = run("out/model", "query.h5ad", "--batch", "new", "--labels", "kind", "--reference", "reference.h5ad", *out)
    assert "kind is not in obs of the reference. Known: 'cell_type'" in error
    assert "--threshold" in run(*given, "--reference", "reference.h5ad", "--threshold", "2", *out)
    assert "neither .csv nor .parquet" in run("out/model", "query.h5ad", "--out", "x.txt")
