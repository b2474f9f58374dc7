"""Checkpoints of ``pyro-multivi train``: a process that is terminated, and one that goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pyro_multivi.cli import main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(mosaic, tmp_path):
    """Arguments of a training of some seconds."""
    path = tmp_path / "cells.h5ad"
    mosaic.write_h5ad(path)
    options = ["--modality-key", "modality", "--n-hidden", "6", "--n-latent", "2", "--accelerator", "cpu", "--quiet"]
    return ["train", str(path), *options, "--max-epochs", "20", "--batch-size", "16"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_process_that_ends_is_gone_on_with_in_another(command, tmp_path, number, capsys):
    folder = tmp_path / "checkpoints"
    resumable = [*command, "--checkpoint", str(folder), "--checkpoint-every", "1", "--out", str(tmp_path / "resumed")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_multivi", *resumable], env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None and not any(folder.glob("checkpoint-2")):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == -number, errors
    assert max(json.loads(path.read_text())["epoch"] for path in folder.glob("*/run.json")) < 20

    assert main([*resumable, "--resume"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    tables = [pd.read_csv(tmp_path / name / "latent.csv", index_col=0) for name in ("whole", "resumed")]
    np.testing.assert_array_equal(*tables)
    tables = [pd.read_csv(tmp_path / name / "history.csv", index_col=0) for name in ("whole", "resumed")]
    np.testing.assert_array_equal(*[table.drop(columns="seconds") for table in tables])


@pytest.mark.filterwarnings("default")
def test_messages_are_in_the_words_of_the_command_line(command, tmp_path, capsys):
    folder, command = tmp_path / "checkpoints", [*command[:-3], "1"]

    def said(*options: str, out: str = "out") -> str:
        status = main([*command, "--out", str(tmp_path / out), *options])
        return f"{status} {capsys.readouterr().err}"

    assert "--resume needs the folder of the checkpoints: give --checkpoint 'folder' too" in said("--resume")
    assert "--checkpoint-every 3 needs the folder" in said("--checkpoint-every", "3")
    given = ("--checkpoint", str(folder))
    assert "--checkpoint-every 'often' is not allowed" in said(*given, "--checkpoint-every", "often")
    assert said(*given, "--resume").startswith(f"0 pyro-multivi: warning: --checkpoint '{folder}' holds no checkpoint")
    assert "holds checkpoints already: give --resume to go on" in said(*given, out="two")
    other = said(*given, "--resume", "--lr", "0.01", "--batch-size", "16", out="two")
    assert "is of another run: lr: 0.002 then, 0.01 now; --batch-size: 32 then, 16 now. Give the same again" in other
    finished = said(*given, "--resume", out="two")
    assert finished.startswith("0 ")
    assert "this training is finished after 1 epochs" in finished
    assert "train()" not in finished
    assert (tmp_path / "two" / "model").is_dir()
