"""The command line, as a person types it."""

import importlib
import json
import os
import subprocess
import sys

import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.cli import main
from pyro_multivi.cli.parser import command_parser


def train(*arguments):
    return main(["train", *map(str, arguments), "--quiet", "--max-epochs", "2", "--accelerator", "cpu"])


def test_demo_analyses_the_built_in_cells(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--quiet", "--max-epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "1047 paired" in printed
    assert "neighbour_purity_30" in printed
    figures = json.loads((out / "figures.json").read_text())
    assert figures["cells"] == 1047
    assert figures["neighbour_purity_chance"] == pytest.approx(0.285, abs=0.005)
    latent = pd.read_csv(out / "latent.csv", index_col="cell")
    assert list(latent.index) == list(pm.cell_lines().obs_names)
    assert (out / "latent.png").stat().st_size > 10_000
    again = pm.MULTIVI.load(out / "model", pm.cell_lines())
    assert again.get_latent_representation() == pytest.approx(latent.to_numpy(), rel=1e-4, abs=1e-4)


def test_train_writes_a_model_of_mosaic_cells(mosaic_file, tmp_path, capsys):
    out = tmp_path / "result"
    status = train(
        mosaic_file, "--modality-key", "modality", "--batch-key", "batch", "--labels", "cell_type",
        "--n-latent", "3", "--out", out,
    )  # fmt: skip
    assert status == 0
    assert "30 paired, 15 RNA only, 15 ATAC only" in capsys.readouterr().out
    assert pd.read_csv(out / "latent.csv", index_col="cell").shape == (60, 3)
    history = pd.read_csv(out / "history.csv", index_col="epoch")
    assert {"elbo_train", "elbo_validation", "alignment_train"} <= set(history)
    assert pm.MULTIVI.load(out / "model").spec.n_batch == 2


@pytest.mark.usefixtures("no_pictures")
def test_train_reads_h5mu(tmp_path, capsys):
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=20, n_regions=30, seed=0, return_mudata=True)
    path = tmp_path / "mosaic.h5mu"
    with mudata_as_given():
        mdata.write(path)
    assert train(path, "--out", tmp_path / "result") == 0
    assert "20 paired, 10 RNA only, 10 ATAC only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "celltype"], "--labels 'celltype' is not a column of obs; there are"),
        (["--batch-key", "batsh"], "Did you mean 'batch'"),
        (["--min-fraction", "2"], "--min-fraction 2.0 is not allowed"),
        (["--layer", "spliced"], "--layer 'spliced' is not in layers"),
    ],
)
def test_errors_are_sentences_not_traces(mosaic_file, tmp_path, capsys, arguments, message):
    assert train(mosaic_file, "--out", tmp_path / "result", *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_file_is_named(tmp_path, capsys):
    assert train(tmp_path / "nothing.h5ad", "--out", tmp_path / "result") == 1
    assert "nothing.h5ad" in capsys.readouterr().err


def test_without_matplotlib_there_is_no_picture_and_a_hint(mosaic_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "result"
    assert train(mosaic_file, "--out", out) == 0
    assert "pip install 'pyro-multivi[plot]'" in capsys.readouterr().out
    assert not (out / "latent.png").exists()


def test_python_m_runs_it():
    done = subprocess.run(
        [sys.executable, "-m", "pyro_multivi", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == pm.__version__


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.filterwarnings("default:.* even numbers, as of reads")
def test_fragments_are_counted_when_asked_for(tmp_path, capsys):
    path, out = tmp_path / "reads.h5ad", tmp_path / "out"
    adata = pm.simulate_multiome((40, 10, 10), 20, 30, reads=True, truth=False, seed=0)
    pm.reads_to_fragments(adata)
    adata.uns.clear()
    adata.write_h5ad(path)
    options = ("--accessibility-likelihood", "poisson", "--modality-key", "modality", "--n-hidden", "8")
    assert train(path, "--out", out, "--layer", "fragments", *options) == 0
    assert "regions (poisson)" in capsys.readouterr().out
    # As the layer has them, and the same run.
    assert train(path, "--out", tmp_path / "of_reads", "--reads-to-fragments", *options) == 0
    figures = [json.loads((folder / "figures.json").read_text()) for folder in (out, tmp_path / "of_reads")]
    assert figures[0]["elbo_per_cell"] == figures[1]["elbo_per_cell"]
    table = tmp_path / "regions.csv"
    compare = ("--groupby", "cell_type", "--group1", "type_0", "--modality", "accessibility", "--n-samples", "50")
    assert main(["differential", str(out / "model"), str(path), "--out", str(table), "--quiet", *compare]) == 0
    assert {"est_fragments1", "emp_fragments1"} <= set(pd.read_csv(table))
    # Reads themselves are warned of, and a word that is none is refused by the option's name.
    assert train(path, "--out", tmp_path / "again", *options) == 0
    told = capsys.readouterr().err
    assert "even numbers, as of reads" in told
    assert "--reads-to-fragments makes fragments of them" in told
    # Also where a model of fragments is compared with reads.
    capsys.readouterr()
    model = str(tmp_path / "of_reads" / "model")
    checked = ("--n-samples", "40", "--all-cells", "--out", str(tmp_path / "checked"))
    assert main(["check", model, str(path), "--reads-to-fragments", *checked]) == 0
    assert "even numbers" not in capsys.readouterr().err
    assert main(["check", model, str(path), "--overwrite", *checked]) == 0
    assert "even numbers, as of reads" in capsys.readouterr().err
    assert train(path, "--out", tmp_path / "other", "--accessibility-likelihood", "x", "--min-counts", 1) != 0
    assert "--accessibility-likelihood" in capsys.readouterr().err


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_training_is_saved_and_ends_as_interrupted(mosaic_file, tmp_path, capsys, monkeypatch, epoch):
    module, scored = importlib.import_module("pyro_multivi.training.fit"), []
    score = module._scores

    def interrupts(*arguments):
        scored.append(1)
        if len(scored) == epoch:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(module, "_scores", interrupts)
    assert train(mosaic_file, "--modality-key", "modality", "--n-hidden", "8", "--out", tmp_path / "out") == 130
    printed = capsys.readouterr()
    assert "written to" in printed.out
    assert printed.err.endswith("pyro-multivi: interrupted\n")
    assert pm.MULTIVI.load(tmp_path / "out" / "model").is_trained


@pytest.mark.parametrize("at", ["fit_loadings._fit", "fit_scale._factors", "fit_residual._compare", "fit_depth.spread"])
def test_an_interrupted_calibration_is_saved_and_ends_as_interrupted(mosaic_file, tmp_path, capsys, monkeypatch, at):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    module, name = at.split(".")
    monkeypatch.setattr(importlib.import_module(f"pyro_multivi.posterior.calibration.{module}"), name, interrupted)
    assert train(mosaic_file, "--modality-key", "modality", "--n-hidden", "8", "--out", tmp_path / "out") == 130
    printed = capsys.readouterr()
    assert "latent.png" in printed.out
    assert printed.err.endswith("pyro-multivi: interrupted\n")
    assert pm.MULTIVI.load(tmp_path / "out" / "model").is_trained


@pytest.mark.usefixtures("no_pictures")
def test_cells_without_a_label_are_of_no_type(tmp_path, capsys):
    adata = pm.simulate_multiome((60, 0, 0), n_genes=20, n_regions=30, seed=0)
    adata.obs["one"] = pd.Categorical(["a"] * 40 + [None] * 20)
    adata.obs["few"] = pd.Categorical(["a"] * 30 + [None] * 30)
    adata.write_h5ad(tmp_path / "a.h5ad")
    for name in ("one", "few"):
        assert train(tmp_path / "a.h5ad", "--labels", name, "--n-hidden", "8", "--out", tmp_path / name) == 0
    figures = [json.loads((tmp_path / name / "figures.json").read_text()) for name in ("one", "few")]
    assert figures[0]["neighbour_purity_30"] == figures[0]["neighbour_purity_chance"] == 1
    assert "neighbour_purity_30" not in figures[1]


def test_a_reader_of_the_output_may_end(mosaic_file, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pyro_multivi", "convert", str(mosaic_file), str(tmp_path / "a.zarr"), "--quiet"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_every_option_of_training_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for said in ("(default: 200; in Python 500)", "learning rate", "width of hidden layers", "dimension of the latent"):
        assert said in told


def test_every_option_with_a_value_says_its_default():
    commands = next(action.choices for action in command_parser()._actions if action.dest == "command")
    options = [(name, action) for name, parser in commands.items() for action in parser._actions]
    without = [
        (name, action.dest)
        for name, action in options
        if action.option_strings and action.nargs != 0 and not action.required and "(default" not in (action.help or "")
    ]
    assert without == []
