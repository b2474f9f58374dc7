"""Messages as a person reads them who knows the command line alone."""

from __future__ import annotations

import logging
import shutil

import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.cli.messages import in_options


@pytest.mark.parametrize(
    ("message", "arguments", "said"),
    [
        ("batch_key='donor' is not in adata.obs.", [], "the model's --batch-key 'donor' is not in obs."),
        ("mark them so (modality_key)", [], "mark them so (the model's --modality-key)"),
        ("n_latent=0: give at least 1, or None.", ["n_latent"], "--n-latent 0: give at least 1."),
        ("reference_model is not trained: call reference_model.train() first.", [],
         "the model is not trained: train it with pyro-multivi train."),
        ("Raw counts are needed, perhaps by layer.", ["layer"],
         "Raw counts are needed, perhaps in a layer: give --layer NAME."),
        ("adata.layers['n'] looks like counts, put them there: adata.X = adata.layers['n'].copy().", [],
         "layers['n'] looks like counts: put them into X of the file."),
        ("adata.raw looks like counts, put them there: adata.X = adata.raw[:, adata.var_names].X.", [],
         "raw looks like counts: put them into X of the file."),
        ("adata lacks 2 cells; none are in adata: adata.X", [], "the file lacks 2 cells; none are in the file: X"),
    ],
)  # fmt: skip
def test_words_of_python_become_those_of_the_command_line(message, arguments, said):
    assert in_options(message, arguments) == said


@pytest.fixture
def here(mosaic, tmp_path, monkeypatch):
    """Runs commands in a folder with cells.h5ad and the folder model, which holds them: the status and the messages."""
    monkeypatch.chdir(tmp_path)
    mosaic.write_h5ad("cells.h5ad")
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    model.save("model", save_anndata=True)
    return tmp_path


TABLE = ["--out", "table.csv", "--quiet"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["differential", "model", "--groupby", "cell_type", *TABLE, "--min-counts", "5"],
         "--min-counts change the cells of DATA, and none are given"),
        (["map", "model", "cells.h5ad", *TABLE, "--reference", "cells.h5ad"], "give --labels KEY too"),
        (["describe", "cells.h5ad"], "Give the folder 'model' in the --out of pyro-multivi train."),
        (["train", "empty.zarr", "--out", "out"], "empty.zarr is no zarr store: it has neither zarr.json nor .zgroup"),
        (["train", "other.h5mu", "--out", "out"], "other.h5mu looks like a .h5ad file: give it that suffix."),
        (["train", "missing.h5ad", "--from-disk", "--out", "out"], "DATA: there is no file or folder"),
        (["train", "cells.h5ad", "--labels", "Cell_Type", "--out", "out"], "Did you mean 'cell_type'?"),
        (["train", "cells.h5ad", "--out", "cells.h5ad/out", "--n-hidden", "6"],
         "--out cells.h5ad/out cannot be made (Not a directory): give another folder."),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_that_says_what_to_do(here, capsys, command, message):
    (here / "empty.zarr").mkdir()
    shutil.copy("cells.h5ad", "other.h5mu")
    before = set(here.iterdir())
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert set(here.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--out", ""], "argument --out: it is empty: is a variable of the script not set?"),
        (["--out", "~/out"], "argument --out: '~/out' begins with '~', which the shell has not replaced: write $HOME."),
        (["--checkpoint", "~/x"], "argument --checkpoint: '~/x' begins with '~'"),
        (["--min-counts", "-1"], "argument --min-counts: -1 is not allowed"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_at_once(capsys, option, message):
    with pytest.raises(SystemExit) as ended:
        main(["train", "cells.h5ad", *(["--out", "out"] if "--out" not in option else []), *option])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_log_lines_are_those_of_the_command(here, mosaic, capsys):
    mosaic[:50].write_h5ad("cells.h5ad")
    assert main(["differential", "model", "cells.h5ad", "--groupby", "cell_type", *TABLE, "--n-samples", "50"]) == 0
    assert "pyro-multivi: note: the file lacks 10 of the 60 cells of training" in capsys.readouterr().err
    assert not logging.getLogger("pyro_multivi").handlers


def test_names_that_are_made_unique_are_said_once(here, mosaic, capsys):
    mosaic.obs_names = ["cell", "cell", *mosaic.obs_names[2:]]
    mosaic.write_h5ad("cells.h5ad")
    assert main(["map", "model", "cells.h5ad", *TABLE]) == 0
    printed = capsys.readouterr()
    assert "1 names of cells occur more than once" in printed.out
    assert "unique" not in printed.err


@pytest.mark.parametrize("n", [1, 2])
def test_one_cell_has_a_picture(n, here, mosaic):
    mosaic[:n].write_h5ad("cells.h5ad")
    quick = ["--max-epochs", "1", "--n-hidden", "6", "--n-latent", "2", "--quiet"]
    assert main(["train", "cells.h5ad", "--out", "out", "--accelerator", "cpu", *quick]) == 0
    assert (here / "out" / "latent.png").is_file()
