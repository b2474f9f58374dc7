"""The line on which training ends: why, with which weights, and where the time went."""

from __future__ import annotations

import re

import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.training.history import Stopwatch


def lines(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", text) if line.startswith("trained")]


def test_one_line_and_a_bar_of_calibration_follow(build, train, capsys):
    model = train(build(), 3, progress_bar=True)
    printed = capsys.readouterr()
    [line] = lines(printed.err)
    best = int(model.history["elbo_validation"]["elbo_validation"].argmin()) + 1
    assert line.startswith("trained 3 epochs in ")
    assert re.search(r"s \(.*steps \d+ %.*\)", line)
    assert f": max_epochs is reached; the model's weights are those of epoch {best}, the best elbo_validation" in line
    assert line.endswith("; calibration follows")
    assert "calibration: 100%" in printed.err
    assert printed.out == ""


def test_it_is_quiet_when_the_bar_is_silenced(build, train, capsys):
    model = train(build(), 1)
    printed = capsys.readouterr()
    assert printed.err == printed.out == ""
    assert model._history.ending.startswith("trained 1 epochs")


def test_with_one_modality_only_standard_deviations_are_calibrated(capsys, train):
    adata = pm.simulate_multiome((40, 0, 0), n_genes=10, n_regions=12, seed=0)
    rna = adata[:, adata.var["feature_types"] == "Gene Expression"].copy()
    pm.MULTIVI.setup_anndata(rna)
    train(pm.MULTIVI(rna, n_hidden=6, n_latent=2), 1, progress_bar=True)
    printed = capsys.readouterr().err
    # And the last layer, its posterior, and what the state does not explain.
    assert "4/4" in printed
    assert len(lines(printed)) == 1


def stop(epoch, row, program):
    return epoch == 1


def interrupt(epoch, row, program):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("options", "said"), [
    ({"callbacks": [stop]}, "trained 2 epochs in .*: a callback stopped it; the model's weights are those of epoch"),
    ({"callbacks": [interrupt]}, "trained 1 epochs in .*: interrupted; the model's weights are those of epoch 1, the"),
    ({"early_stopping_patience": 1, "early_stopping_min_delta": 1e9},
     "trained 2 epochs in .*: elbo_validation has not improved for 1 epochs; the model's weights are those of epoch 1"),
    ({"train_size": 1.0}, "max_epochs is reached; the model's weights are the latest$"),
    ({"train_size": 1.0, "batch_size": 1}, r"the model's weights are the latest \(averaged over the steps before\)$"),
])  # fmt: skip
def test_the_line_says_why_training_ended(build, train, options, said):
    model = train(build(), 5, **options)
    assert re.search(said, model._history.ending), model._history.ending


def test_going_on_without_improvement_keeps_the_weights(build, train):
    model = train(build(), 2)
    train(model, 1, lr=0.5)
    assert "the model's weights are those of before, which no epoch improved on" in model._history.ending


def test_the_command_line_says_it_unless_it_is_quiet(mosaic, tmp_path, capsys):
    path = tmp_path / "cells.h5ad"
    mosaic.write_h5ad(path)
    common = ["train", str(path), "--modality-key", "modality", "--max-epochs", "1", "--accelerator", "cpu"]
    assert main([*common, "--out", str(tmp_path / "one")]) == 0
    assert len(lines(capsys.readouterr().err)) == 1
    assert main([*common, "--out", str(tmp_path / "two"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_stopwatch_shows_what_took_time():
    watch = Stopwatch()
    watch.seconds = {"steps": 2.0, "validation": 1.0, "callbacks": 0.0}
    assert str(watch) == "3.0 s (steps 67 %, validation 33 %)"
    watch.seconds["steps"] = 124.0
    assert str(watch).startswith("2 min 5 s")


def test_a_callback_may_not_train_its_own_model(build, train, assert_usable):
    model, other = build(), build()

    def again(epoch, row, program):
        train(other, 1)
        model.train(1)

    with pytest.raises(RuntimeError, match="in training.*Return True"):
        train(model, 3, callbacks=[again])
    assert len(model.history["train_loss"]) == 1
    assert len(other.history["train_loss"]) == 1
    assert_usable(model)
