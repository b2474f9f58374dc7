"""``train`` started again, or twice at a time: nothing is done twice, and no files of two runs are mixed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(mosaic, tmp_path, monkeypatch):
    """Arguments of a training with checkpoints."""
    monkeypatch.chdir(tmp_path)
    mosaic.write_h5ad("cells.h5ad")
    sizes = ["--n-hidden", "6", "--n-latent", "2", "--accelerator", "cpu", "--quiet", "--max-epochs", "1"]
    return ["train", "cells.h5ad", "--modality-key", "modality", "--out", "out", "--checkpoint", "checkpoints", *sizes]


def files(folder="."):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


@pytest.mark.filterwarnings("default:.*holds no checkpoint yet")
def test_a_finished_training_is_not_done_again(command, mosaic, capsys, monkeypatch):
    assert main([*command, "--resume"]) == 0
    before, results = files(), files("out")
    with monkeypatch.context() as patch:
        patch.setattr("pyro_multivi.cli.train.read_cells", lambda *_: pytest.fail("the cells were read"))
        capsys.readouterr()
        # How often checkpoints are written, and from where the cells are read, makes no difference.
        assert main([*command, "--resume", "--checkpoint-every", "1"]) == 0
        assert main(["train", str(Path("cells.h5ad").resolve()), *command[2:], "--resume"]) == 0
        assert capsys.readouterr().out.count("out holds all that this command writes: nothing is left to do.") == 2
        # Without --resume, and with anything else, it is refused.
        for more, message in {
            (): "give --overwrite",
            ("--resume", "--lr", "0.01"): "holds what another training wrote: --lr: 0.002 then, 0.01 now. Give",
            ("--resume", "--labels", "cell_type"): "--labels: None then, 'cell_type' now",
        }.items():
            assert main([*command, *more]) == 1
            assert message in capsys.readouterr().err
        assert files() == before
        mosaic[:50].write_h5ad("cells.h5ad")
        assert main([*command, "--resume"]) == 1
        assert "other cells in sample 'cells'" in capsys.readouterr().err
        assert files("out") == results


@pytest.mark.filterwarnings("default:.*this training is finished")
def test_what_a_killed_run_did_not_write_is_written(command, capsys):
    assert main(command) == 0
    record = json.loads(Path("out/command.json").read_text())
    assert record["outputs"] == ["model/", "latent.csv", "history.csv", "figures.json", "latent.png"]
    latent = Path("out/latent.csv").read_bytes()
    Path("out/latent.csv").unlink()
    assert main([*command, "--resume"]) == 0
    assert "begun to write" in capsys.readouterr().out
    assert Path("out/latent.csv").read_bytes() == latent
    assert json.loads(Path("out/command.json").read_text()) == record


def test_an_interrupted_training_goes_on(command, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("pyro_multivi.training.fit"), "_scores", interrupt)
        assert main(command) == 130
    assert json.loads(Path("out/command.json").read_text())["outputs"] == []
    assert main([*command, "--resume"]) == 0
    assert "latent.png" in json.loads(Path("out/command.json").read_text())["outputs"]


def test_what_left_no_record_is_refused(command, capsys):
    assert main([each for each in command if each not in ("--checkpoint", "checkpoints")]) == 0
    assert main([*command, "--resume"]) == 1
    assert "left no record for --resume" in capsys.readouterr().err


def test_resume_needs_its_folder_before_anything_is_read(command, capsys, monkeypatch):
    monkeypatch.setattr("pyro_multivi.cli.train.read_cells", lambda *_: pytest.fail("the cells were read"))
    assert main([*[each for each in command if each not in ("--checkpoint", "checkpoints")], "--resume"]) == 1
    assert "--resume needs the folder of the checkpoints" in capsys.readouterr().err


HOLDER = """
import time
from pathlib import Path
from pyro_multivi.cli.outputs.folder import folder_to_write
with folder_to_write(Path("out"), [], overwrite=True):
    print("taken", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="locks of fcntl")
def test_a_folder_that_another_command_writes_to_is_refused_until_that_is_killed(command, mosaic, capsys, monkeypatch):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
    model.is_trained = True
    model.save("model", save_anndata=True)
    check = ["check", "model", "--out", "out", "--n-samples", "40", "--all-cells"]
    try:
        assert other.stdout.readline() == "taken\n"
        with monkeypatch.context() as patch:
            patch.setattr(pm.MULTIVI, "train", lambda *_, **__: pytest.fail("trained before the folder was taken"))
            for refused in (command, [*command, "--overwrite"], check):
                assert main(refused) == 1
                assert f"--out out is in use: process {other.pid} on " in (error := capsys.readouterr().err)
                assert "would be mixed. Wait until that one has ended, or give another --out." in error
    finally:
        other.kill()
        other.communicate()
    assert main(command) == 0
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


def test_a_training_that_fails_leaves_no_folder(command, capsys):
    assert main([*command, "--lr", "-1"]) == 1
    assert "--lr -1.0 is not allowed" in capsys.readouterr().err
    assert not Path("out").exists()


def test_cells_are_compared_by_samples_of_large_files(tmp_path, monkeypatch):
    record = importlib.import_module("pyro_multivi.cli.outputs.record")
    monkeypatch.setattr(record, "_BLOCK", 4)

    def checksum(**contents):
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        return record._checksum(tmp_path)

    whole = checksum(a=b"0123456789", b=b"")
    assert checksum(a=b"012345678x") != whole
    assert checksum(a=b"0123456789", b=b"x") != whole
    assert checksum(b=b"") == whole
    assert record._checksum(tmp_path / "a") != record._checksum(tmp_path / "b")
    # Of three blocks the first and the third.
    monkeypatch.setattr(record, "_MOST_BLOCKS", 2)
    samples = checksum()
    assert checksum(a=b"01234567xx") != samples
    assert checksum(a=b"0123xxxx89") == samples
    assert checksum(a=b"0123xxxx890") != samples
