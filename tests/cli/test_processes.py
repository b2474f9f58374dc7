"""Commands in several processes, as torchrun starts them: they share the work, and the first alone writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from pyro_multivi.cli import main
for line in sys.stdin.read().splitlines():
    assert main(line.split()) == 0, line
"""


@pytest.fixture
def folder(mosaic, tmp_path):
    """A folder with a model and files."""
    mosaic.write_h5ad(tmp_path / "cells.h5ad")
    query = mosaic[:20].copy()
    query.obs_names = "q" + query.obs_names
    query.write_h5ad(tmp_path / "query.h5ad")
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    model.save(tmp_path / "model", save_anndata=True)
    return tmp_path


def start(folder, commands, rank, size, port):
    """A process that runs commands in a folder of its own."""
    (folder / f"{rank}").mkdir()
    variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN], cwd=folder / f"{rank}", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, **alone, **{k: str(v) for k, v in variables.items()}},
    )  # fmt: skip
    process.stdin.write("\n".join(commands))
    process.stdin.close()
    process.stdin = None
    return process


def test_processes_share_a_command_and_the_first_writes(folder, monkeypatch, capsys):
    train = "--modality-key modality --n-hidden 6 --n-latent 2 --max-epochs 1 --batch-size 30 --accelerator cpu --quiet"
    commands = [
        "differential ../model --groupby cell_type --out table.csv --n-samples 100 --quiet",
        "check ../model --out check --n-samples 40 --all-cells",
        "map ../model ../query.h5ad --labels cell_type --out mapped.csv --quiet",
        "describe ../model",
        "convert ../cells.h5ad cells.zarr --quiet",
        f"train ../cells.h5ad --out result {train}",
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start(folder, commands, rank, 2, port) for rank in range(2)]
    (printed, error), (other_printed, other_error) = (process.communicate(timeout=300) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], error + other_error
    assert not list((folder / "1").iterdir())
    assert other_printed == ""
    assert printed.count("written to") == 4
    assert (folder / "0" / "cells.zarr").is_dir()
    assert (folder / "0" / "check" / "check.html").is_file()
    assert (folder / "0" / "result" / "latent.csv").is_file()
    (folder / "alone").mkdir()
    monkeypatch.chdir(folder / "alone")
    for command in commands[:3]:
        assert main(command.split()) == 0
    for name in ("table.csv", "mapped.csv", "check/genes.csv"):
        pd.testing.assert_frame_equal(pd.read_csv(name), pd.read_csv(folder / "0" / name))


def test_half_an_environment_of_torchrun_is_refused(folder, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["describe", str(folder / "model")]) == 1
    assert "The environment has RANK=1 and no WORLD_SIZE" in capsys.readouterr().err
