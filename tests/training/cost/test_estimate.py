"""Cost of a training, estimated before it is run."""

from __future__ import annotations

import pytest
import torch

from pyro_multivi.cli import main
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.training import FitOptions
from pyro_multivi.training.cost import estimate
from pyro_multivi.training.cost.estimate import TrainingCost, available_memory, timed_cost

OPTIONS = FitOptions(max_epochs=20)


@pytest.fixture
def given(build):
    model = build()
    index = torch.arange(60)
    batches = [Minibatches(model._training_table(), part, batch_size=8) for part in (index[:54], index[54:])]
    return model.program, *batches


def test_memory_and_disk_are_copies_of_the_weights(given):
    program, train, _ = given
    weights = sum(value.nbytes for value in program.state_dict().values())
    cost = TrainingCost.of_sizes(program, train, OPTIONS, checkpoint=True)
    assert (cost.weights, cost.model, cost.more, cost.checkpoints) == (weights, weights, 5 * weights, 15 * weights)
    assert TrainingCost.of_sizes(program, train, OPTIONS, checkpoint=False).checkpoints == 0


def test_a_checkpoint_is_no_larger_than_estimated(build, train, tmp_path):
    model = build(n_hidden=64)
    table = Minibatches(model._training_table())
    cost = TrainingCost.of_sizes(model.program, table, OPTIONS, checkpoint=True)
    train(model, 9, checkpoint=tmp_path, batch_size=4)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    # Beside the tensors there are names, history and random states, which matter for a model as small as this.
    assert 0.5 * cost.checkpoints < 3 / 2 * size < cost.checkpoints + 500_000


def test_time_is_that_of_the_steps(given, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))
    cost = timed_cost(*given, OPTIONS)
    # Seven steps of one tick and a validation minibatch of one.
    assert cost.epoch == 8.0
    assert "8 s an epoch, 2.7 min for all 20 at most" in str(cost)


def test_random_state_is_left_alone(given, global_rng_untouched):
    timed_cost(*given, OPTIONS)


def test_shortages_are_told(given, monkeypatch, tmp_path):
    cost = TrainingCost.of_sizes(*given[:2], OPTIONS, checkpoint=True)
    assert cost.shortages(tmp_path / "not" / "there") == []
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda _: type("", (), {"free": 2000}))
    memory, disk = cost.shortages(tmp_path)
    assert memory.startswith("training needs ")
    assert memory.endswith(" more memory and 0.0 MB are free")
    assert disk.endswith("and 0.0 MB are free")


def test_available_memory_is_positive_where_it_is_known():
    free = available_memory()
    assert free is None or free > 0


def test_a_dry_run_says_the_cost_and_writes_nothing(mosaic, tmp_path, capsys):
    path = tmp_path / "cells.h5ad"
    mosaic.write_h5ad(path)
    out, checkpoints = tmp_path / "out", tmp_path / "checkpoints"
    command = ["train", str(path), "--out", str(out), "--max-epochs", "7", "--checkpoint", str(checkpoints)]
    assert main([*command, "--n-hidden", "6", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "for all 7 at most" in said
    assert "of checkpoints at most" in said
    assert said.endswith("dry run: nothing is written\n")
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_run_that_will_not_fit_is_announced(mosaic, tmp_path, capsys, monkeypatch):
    path = tmp_path / "cells.h5ad"
    mosaic.write_h5ad(path)
    monkeypatch.setattr(estimate, "available_memory", lambda: 1000)
    assert main(["train", str(path), "--out", str(tmp_path / "out"), "--max-epochs", "1", "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "this run will not fit: training needs " in said
    assert said.index("will not fit") < said.index("written to")
