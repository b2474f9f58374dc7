"""The parts of the benchmarks that need neither scvi-tools nor time: the table, and reports of failures."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CASE = {
    "name": "example",
    "n_genes": 2_000,
    "n_regions": 5_000,
    "n_train": 384,
    "n_predict": 10_000,
    "n_hidden": 70,
    "n_latent": 8,
    "batch_size": 128,
}


def module(name: str) -> ModuleType:
    """A script of the benchmarks, which are no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def record(system, number, result, precision="fp32", part="train", failed=None, detail=None):
    return {
        "system": system,
        "precision": precision,
        "part": part,
        "round": number,
        "result": result,
        "failed": failed,
        "detail": detail,
    }


def training(*epoch_seconds, peak=1_000_000_000):
    return {"epoch_seconds": list(epoch_seconds), "n_steps": 4, "peak_bytes": peak, "import_bytes": 400_000_000}


def prediction(latent, accessibility):
    return {
        "latent_seconds": latent,
        "accessibility_seconds": accessibility,
        "accessibility_peak_bytes": 2_500_000_000,
        "peak_reset": True,
    }


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the table by the text of the first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(row) for row in table}) == 1, "rows differ in length"
    return {row[0]: row[1:] for row in table}


def test_results_survive_kills_at_lines_of_the_code():
    pytest.importorskip("zarr")
    command = [sys.executable, BENCHMARKS / "kill_results.py", "--trials", "6", "--steps", "--seed", "2"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kill: a part to go on from" in done.stdout
    assert "FAULT" not in done.stdout


def test_ratios_are_paired_within_rounds():
    # scvi-tools 8, 12, 40 and ours 4, 3, 20: the medians have ratio 3, the paired ratios are 2, 4, 2.
    records = [record("peer", n, training(99.0, epoch)) for n, epoch in enumerate((8.0, 12.0, 40.0))]
    # In another order than those of scvi-tools, as when the turns alternate.
    records += [record("ours", n, training(99.0, epoch)) for n, epoch in ((1, 3.0), (0, 4.0), (2, 20.0))]
    table = rows(module("table").render(CASE, records))
    assert table[""] == ["peer", "ours, fp32", "peer / ours"]
    assert table["epoch, s"] == ["12.0", "4.00", "**2.00** (2.00–4.00)"]
    assert table["training step, s"] == ["3.00", "1.00", "**2.00** (2.00–4.00)"]
    assert table["training, peak memory, MB"] == ["1000", "1000", "**1.00** (1.00–1.00)"]


def test_first_epoch_is_not_counted():
    records = [record("ours", 0, training(100.0, 2.0, 4.0, 3.0))]
    assert rows(module("table").render(CASE, records))["epoch, s"] == ["3.00"]


def test_each_precision_has_columns_and_its_own_floor():
    floors = {"fp32": (0.5, 0.25, 0.25), "bf16": (0.25, 0.125, 0.125)}
    records = [record("peer", 0, training(9.0, 8.0))]
    for precision, parts in floors.items():
        names = ("decoder_seconds", "encoder_seconds", "optimizer_seconds")
        records.append(record("floor", 0, dict(zip(names, parts, strict=True)), precision))
    records += [record("ours", 0, training(9.0, 8.0), "fp32"), record("ours", 0, training(9.0, 4.0), "bf16")]
    table = rows(module("table").render(CASE, records))
    assert table[""] == ["peer", "ours, fp32", "peer / ours", "ours, bf16", "peer / ours"]
    assert table["floor, training step, s"] == ["", "1.00", "", "0.500", ""]
    assert table["ours / floor"] == ["", "**2.00** (2.00–2.00)", "", "**2.00** (2.00–2.00)", ""]
    assert table["floor without encoders, training step, s"] == ["", "0.750", "", "0.375", ""]


def test_compiled_training_is_measured_against_the_same_floor():
    names = ("decoder_seconds", "encoder_seconds", "optimizer_seconds")
    records = [record("floor", 0, dict(zip(names, (0.25, 0.125, 0.125), strict=True)), "bf16")]
    records += [record("ours", 0, training(9.0, 2.0), "bf16+compile"), record("ours", 0, training(9.0, 4.0), "bf16")]
    records += [record("ours", 0, training(9.0, 8.0), "fp32")]
    table = rows(module("table").render(CASE, records))
    assert table[""] == ["ours, fp32", "ours, bf16", "ours, bf16+compile"]
    assert table["ours / floor"] == ["–", "**2.00** (2.00–2.00)", "**1.00** (1.00–1.00)"]


def test_scvi_tools_out_of_memory_is_shown():
    records = [
        record("peer", 0, None, failed="out of memory", detail="stopped at 21.0 GB"),
        record("ours", 0, training(1.0, 1.0)),
        record("ours", 1, training(1.0, 3.0)),
    ]
    text = module("table").render(CASE, records)
    assert rows(text)["epoch, s"] == ["out of memory", "2.00", "–"]
    assert "- peer, fp32, train, round 1: out of memory (stopped at 21.0 GB)" in text


def test_a_failed_round_leaves_the_others():
    records = [record("peer", n, training(1.0, 4.0)) for n in (0, 1)]
    records += [record("ours", 0, training(1.0, 2.0)), record("ours", 1, None, failed="timed out", detail="after 9 s")]
    text = module("table").render(CASE, records)
    assert rows(text)["epoch, s"] == ["4.00", "2.00", "**2.00** (2.00–2.00)"]
    assert "timed out" in text


def test_prediction_alone():
    records = [
        record("peer", 0, prediction(6.0, 12.0), part="predict"),
        record("ours", 0, prediction(2.0, 3.0), part="predict"),
    ]
    text = module("table").render(CASE, records)
    table = rows(text)
    assert "epoch, s" not in table
    assert table["latent of 10 000 cells, s"] == ["6.00", "2.00", "**3.00** (3.00–3.00)"]
    assert table["accessibility of 10 000 cells × 5 000 regions, s"] == ["12.0", "3.00", "**4.00** (4.00–4.00)"]
    assert table["that accessibility, peak memory, MB"] == ["2500", "2500", "**1.00** (1.00–1.00)"]
    assert "forget its peak" not in text
    records[0]["result"]["peak_reset"] = False
    assert "forget its peak" in module("table").render(CASE, records)


@pytest.fixture
def differential(monkeypatch):
    """The benchmark of differential tests, whose neighbours are found as when it is run as a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return module("differential")


def test_differential_ratios_are_paired_within_rounds(differential):
    def tested(system, number, seconds, megabytes):
        sizes = {"working_bytes": megabytes * 1_000_000, "table_bytes": 5_000_000}
        return {**record(system, number, {"seconds": seconds, **sizes}), "n_regions": 10}

    records = [tested("peer", n, seconds, 900) for n, seconds in enumerate((8.0, 12.0, 40.0))]
    records += [tested("ours group", n, seconds, 30) for n, seconds in enumerate((4.0, 3.0, 20.0))]
    records.append({**record("ours cell", 0, None, failed="out of memory"), "n_regions": 10})
    table = rows(differential.render(records, 10))
    assert table["peer"] == ["12.0", "900", "5", "1.0 (1.0–1.0)", "1.0 (1.0–1.0)"]
    assert table["ours group"] == ["4.0", "30", "5", "2.0 (2.0–4.0)", "30.0 (30.0–30.0)"]
    assert table["ours cell"][0] == "out of memory"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmarks read /proc")


@linux
def test_a_worker_reports_in_its_last_line():
    outcome = module("launch").launch([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"])
    assert outcome == ({"a": 1}, None, None)


@linux
@pytest.mark.parametrize(
    ("code", "failed", "detail"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed", "signal 9"),
        ("raise MemoryError('no room')", "out of memory", "MemoryError: no room"),
        ("raise KeyError('x')", "failed", "exit status 1: KeyError"),
        ("print('hello')", "failed", "no JSON: 'hello'"),
    ],
)
def test_a_worker_that_fails_is_reported(code, failed, detail):
    outcome = module("launch").launch([sys.executable, "-c", code])
    assert outcome.result is None
    assert outcome.failed == failed
    assert detail in outcome.detail


@linux
@pytest.mark.parametrize(
    ("limits", "failed"), [({"timeout": 0.1}, "timed out"), ({"memory_limit": 1_000_000}, "out of memory")]
)
def test_a_worker_is_stopped_at_its_limits(limits, failed):
    outcome = module("launch").launch([sys.executable, "-c", "import time; time.sleep(60)"], **limits)
    assert (outcome.result, outcome.failed) == (None, failed)
    assert "stopped" in outcome.detail


@linux
@pytest.mark.slow
def test_differential_runs_without_scvi_tools(tmp_path):
    sizes = {"regions": 300, "genes": 30, "cells": 80, "groups": 3, "samples": 50, "rounds": 1, "threads": 1}
    arguments = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    out = tmp_path / "records.json"
    env = {name: value for name, value in os.environ.items() if name != "PYRO_MULTIVI_PEER_PYTHON"}
    command = [sys.executable, str(BENCHMARKS / "differential.py"), *arguments, "--out", str(out)]
    printed = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    records = json.loads(out.read_text())
    assert [one["system"] for one in records] == ["ours cell", "ours group"]
    assert all(one["result"]["table_bytes"] > 0 for one in records), records
    assert rows(printed[printed.index("| |") :])["peer"][0] == "not run"


def test_processes_that_end_with_another_loss_are_reported(capsys):
    def row(loss, steps):
        return {"elbo_train": loss, "elbo_validation": loss, "steps": steps}

    report = module("distributed").report
    assert report({1: row(100.0, 10.0), 2: row(101.0, 15.0), 3: row(99.0, 12.0)}, 2, 0.02) == 0
    said = capsys.readouterr().out
    assert said.startswith("2 cores\n")
    # Three processes on two cores can be twice as fast as one.
    assert [line.split()[-1] for line in said.splitlines()[2:5]] == ["100%", "75%", "60%"]
    assert report({1: row(100.0, 10.0), 2: row(103.0, 15.0)}, 2, 0.02) == 1
