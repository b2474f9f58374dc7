"""Options of ``train`` that are arguments of the model, of its training and of the setup."""

from __future__ import annotations

import warnings

import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.cli import main

SIZES = ["--n-hidden", "6", "--n-latent", "2", "--accelerator", "cpu", "--quiet", "--max-epochs", "1"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Train on a file: the model, the arguments of its training, and the error."""
    monkeypatch.chdir(tmp_path)

    def run(name, *options, command="train"):
        found = {}
        with monkeypatch.context() as patch:
            if command == "train":
                patch.setattr(pm.MULTIVI, "train", lambda model, **given: found.update(model=model, **given))
                patch.setattr("pyro_multivi.cli.train._write", lambda *_: None)
            status = main([command, name, *options])
        error = capsys.readouterr().err
        assert (status == 0) == (error == "")
        return found, error

    return run


def test_weights_and_kinds_of_training_arrive(run):
    pm.simulate_multiome((30, 0, 0), n_genes=12, n_regions=20, seed=0).write_h5ad("cells.h5ad")
    given = ("--modality-key", "modality", "--out", "out", *SIZES)
    found, _ = run("cells.h5ad", *given)
    config = found["model"].program.config
    assert (config.fully_paired, found["precision"], found["compile"]) == (True, "fp32", False)
    assert config.latent_prior == "normal"
    more = ("--no-fully-paired", "--mixing-weight", "0", "--contrast-weight", "1.5", "--precision", "bf16", "--compile")
    found, _ = run("cells.h5ad", *given, *more)
    config = found["model"].program.config
    assert (config.fully_paired, config.mixing_weight, config.contrast_weight) == (False, 0, 1.5)
    assert (found["precision"], found["compile"]) == ("bf16", True)
    found, _ = run("cells.h5ad", *given, "--latent-prior", "mixture")
    assert found["model"].program.config.latent_prior == "mixture"
    # A weight alone keeps the penalty, as in Python.
    found, _ = run("cells.h5ad", *given, "--mixing-weight", "2")
    assert found["model"].program.config.fully_paired is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixing-weight", "-1"], "--mixing-weight -1.0 is not allowed"),
        (["--contrast-weight", "-1"], "--contrast-weight -1.0 is not allowed"),
        (["--fully-paired"], "--fully-paired"),
        (["--latent-prior", "vamp"], "--latent-prior 'vamp' is not allowed: choose one of 'normal', 'mixture'"),
        (["--protein", "adt"], "--protein 'adt' is not in obsm. Known: 'hidden_protein', 'protein_expression'"),
        (
            ["--protein", "protein_expression", "--from-disk"],
            "of one file in memory, not of several samples nor --from-",
        ),
        (["other.h5ad", "--protein", "protein_expression"], "of one file in memory, not of several samples"),
    ],
)
def test_wrong_ones_are_named(run, options, message):
    cells = pm.simulate_multiome((20, 10, 0), n_genes=12, n_regions=20, n_proteins=4, truth=False, seed=0)
    cells.write_h5ad("cells.h5ad")
    cells.write_h5ad("other.h5ad")
    assert message in run("cells.h5ad", *options, "--out", "out", *SIZES)[1]


@pytest.mark.parametrize("kind", ["h5ad", "h5mu"])
def test_proteins_are_a_third_modality(run, kind):
    pytest.importorskip("mudata")
    make = {"n_genes": 12, "n_regions": 20, "n_proteins": 4, "truth": False, "seed": 0}
    data = pm.simulate_multiome((30, 10, 10), **make, return_mudata=kind == "h5mu")
    file, name = f"cells.{kind}", "protein" if kind == "h5mu" else "protein_expression"
    with warnings.catch_warnings(), mudata_as_given():
        warnings.simplefilter("ignore", FutureWarning)
        data.write(file)
    found, _ = run(file, "--protein", name, "--modality-key", "modality", "--out", "out", *SIZES)
    model = found["model"]
    assert len(model.spec.extra["protein"]) == 4
    model.is_trained = True
    model.save("model")
    options = ("--modality", "protein", "--groupby", "cell_type", "--out", "t.csv", "--quiet", "--n-samples", "50")
    run("model", file, *options, command="differential")
    assert pd.read_csv("t.csv")["feature"].nunique() == 4


def test_cells_with_proteins_alone_stay(run):
    data = pm.simulate_multiome((30, 10, 10), n_genes=12, n_regions=20, n_proteins=4, truth=False, seed=0)
    x = data.X.toarray()
    x[:3] = 0
    data.X = x
    data.write_h5ad("cells.h5ad")
    found, _ = run("cells.h5ad", "--protein", "protein_expression", "--out", "out", *SIZES)
    assert found["model"].adata.n_obs == 50
