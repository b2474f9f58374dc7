"""Options of training: the same for train() and fit(), and checked by either."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.training import FitOptions, fit, resolve_device


def test_fit_has_the_options_of_train_and_their_defaults():
    arguments = inspect.signature(pm.MULTIVI.train).parameters
    differing = [field.name for field in fields(FitOptions) if arguments[field.name].default != field.default]
    # train() takes the seed of pyro_multivi.settings where none is given, and has other defaults for a query.
    assert differing == ["max_epochs", "early_stopping", "seed"]
    others = {"self", "accelerator", "devices", "train_size", "validation_size", "shuffle_set_split", "batch_size"}
    others |= {"checkpoint", "checkpoint_every", "resume", "shuffle_block", "shuffle_buffer", "external_indexing"}
    assert arguments.keys() - {field.name for field in fields(FitOptions)} == others


def test_train_gives_every_option_to_fit(build, monkeypatch):
    given = []
    monkeypatch.setattr("pyro_multivi.api.training.fit", lambda *args: given.append(args) or fit(*args))
    chosen = {"max_epochs": 2, "lr": 1e-2, "callbacks": [lambda *_: None], "early_stopping_patience": 7, "seed": 3}
    build().train(**chosen, progress_bar=False)
    options = given[0][3]
    assert {name: getattr(options, name) for name in chosen} == {**chosen, "callbacks": options.callbacks}
    # The first notes that an epoch was completed.
    assert options.callbacks[1:] == tuple(chosen["callbacks"])
    assert options.early_stopping


def test_fit_stops_early_by_the_same_options(build):
    table = build()._training_table()
    for early_stopping, n_epochs in ((True, 3), (False, 6)):
        options = FitOptions(
            6, early_stopping=early_stopping, early_stopping_patience=2, early_stopping_min_delta=1e6,
            progress_bar=False,
        )  # fmt: skip
        cells = Minibatches(table, torch.arange(40)), Minibatches(table, torch.arange(40, 60))
        history, _ = fit(build().program, *cells, options)
        assert history.n_epochs == n_epochs


WRONG = [
    ({"max_epochs": -1}, "max_epochs=-1 is not allowed: give a whole number of at least 0"),
    ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0 is not allowed: give a whole number of at least 1"),
    ({"early_stopping_patience": 0}, "early_stopping_patience=0 is not allowed: give a whole number of at least 1"),
    ({"average_steps": 0}, "average_steps=0 is not allowed: give a whole number of at least 1"),
    ({"n_epochs_kl_warmup": -1}, "n_epochs_kl_warmup=-1 is not allowed: give a whole number of at least 0"),
    ({"n_steps_kl_warmup": -1}, "n_steps_kl_warmup=-1 is not allowed: give a whole number of at least 0"),
    ({"gradient_clip": 0.0}, "gradient_clip=0.0 is not allowed: give a norm above 0, or None"),
    ({"effect_sd": 0.0}, "effect_sd=0.0 is not allowed: give a standard deviation above 0, or None"),
    ({"effect_sd": np.nan}, "effect_sd=nan is not allowed"),
    ({"precision": "fp16"}, "precision='fp16' is not allowed: choose one of 'fp32', 'bf16'"),
    ({"adversarial_target": "donor"}, "adversarial_target='donor' is not allowed: choose 'modality' or 'batch'"),
    ({"adversarial_schedule": "cosine"}, "adversarial_schedule='cosine' is not allowed: choose 'warmup' or 'constant'"),
    ({"adversarial_weight": -1.0}, "adversarial_weight=-1.0 is not allowed: give a number of at least 0"),
    ({"adversarial_weight": np.inf}, "adversarial_weight=inf is not allowed: give a finite number"),
]


@pytest.mark.parametrize(("options", "match"), WRONG)
def test_wrong_options_are_refused_whoever_makes_them(options, match):
    with pytest.raises(ValueError, match=match):
        FitOptions(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_size": 0.0}, "train_size=0.0 is not allowed"),
        ({"train_size": 1.1}, "train_size=1.1 is not allowed"),
        ({"train_size": 90}, "train_size=90 is not allowed"),
        ({"train_size": 0.8, "validation_size": 0.3}, "validation_size=0.3 is not allowed with train_size=0.8"),
        ({"validation_size": -0.1}, "validation_size=-0.1 is not allowed"),
        ({"validation_size": 1.0}, "validation_size=1.0 is not allowed"),
        ({"validation_size": 1.5}, "validation_size=1.5 is not allowed"),
        ({"max_epochs": -1}, "max_epochs=-1 is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0 is not allowed"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 is not allowed"),
        ({"n_epochs_kl_warmup": -1}, "n_epochs_kl_warmup=-1 is not allowed"),
        ({"n_steps_kl_warmup": -1}, "n_steps_kl_warmup=-1 is not allowed"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0 is not allowed"),
        ({"lr": -1.0}, "lr=-1.0 is not allowed: give a number of at least 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is not allowed: give a number of at least 0"),
        ({"early_stopping_min_delta": np.nan}, "early_stopping_min_delta=nan is not allowed: give a finite number"),
        ({"devices": 7, "accelerator": "cpu"}, "devices=7 is not allowed: give 'auto' or 1"),
        ({"early_stopping_monitor": "nonsense"}, "early_stopping_monitor='nonsense' is not recorded; choose one of"),
        ({"early_stopping_monitor": "nonsense", "train_size": 1.0}, "'nonsense' is not recorded"),
        ({"early_stopping_monitor": "adversary_train"}, "'adversary_train' is not recorded"),
        ({"accelerator": "tpu"}, "accelerator='tpu' is not allowed"),
    ],
)
def test_wrong_arguments_are_named_before_anything_happens(build, options, match, train):
    model = build()
    start = {name: value.clone() for name, value in model.program.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        model.train(**{"max_epochs": 1, "progress_bar": False, **options})
    assert not model.is_trained
    assert all(torch.equal(value, start[name]) for name, value in model.program.state_dict().items())


def test_a_wrong_monitor_is_refused_before_anything_is_learned(build):
    model, seen = build(), []
    model.train(1, progress_bar=False)
    before = {name: value.clone() for name, value in model.program.state_dict().items()}
    with pytest.raises(ValueError, match="early_stopping_monitor='elbo' is not recorded"):
        model.train(1, progress_bar=False, early_stopping_monitor="elbo", callbacks=[lambda *_: seen.append(1)])
    assert seen == []
    assert len(model.history["train_loss"]) == 1
    assert all(torch.equal(value, before[name]) for name, value in model.program.state_dict().items())


def test_a_column_of_the_adversary_may_be_monitored(build):
    model = build()
    model.train(2, progress_bar=False, adversarial_mixing=True, early_stopping_monitor="classifier_train")
    assert len(model.history["classifier_train"]) == 2


@pytest.mark.parametrize(
    ("accelerator", "devices", "found"),
    [("auto", "auto", "cuda"), ("gpu", 1, "cuda"), ("cuda", np.int64(0), "cuda:0"), ("gpu", "2", "cuda:2"),
     ("cpu", 1, "cpu"), ("cpu", -1, "cpu"), ("cpu", "auto", "cpu")],
)  # fmt: skip
def test_devices_of_a_machine_with_three_gpus(monkeypatch, accelerator, devices, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert resolve_device(accelerator, devices) == torch.device(found)
    for wrong in (3, -2, "all", True, 1.0, None):
        with pytest.raises(ValueError, match=r"devices=.* is not allowed: give 'auto' or 1"):
            resolve_device(accelerator, wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(build, train):
    with pytest.raises(ValueError, match="finds no GPU: use accelerator='cpu'"):
        train(build(), accelerator="gpu")


def test_a_learning_rate_of_0_learns_nothing_and_stops_early(build):
    model = build(dropout_rate=0.0)
    before = {name: value.clone() for name, value in model.program.named_parameters()}
    model.train(50, plan_kwargs={"lr": 0}, early_stopping=True, early_stopping_patience=2, progress_bar=False)
    assert len(model.history["elbo_train"]) < 50
    calibrated = {"expression_decoder.rho.weight", "accessibility_decoder.p.weight"}
    moved = {name for name, value in model.program.named_parameters() if not torch.equal(value, before[name])}
    assert moved <= calibrated, moved - calibrated


@pytest.mark.parametrize(
    ("word", "ours"),
    [("32", "fp32"), (32, "fp32"), ("32-true", "fp32"), ("bf16-mixed", "bf16"), ("16-mixed", "bf16"), (16, "bf16")],
)
def test_words_of_lightning_for_a_precision(word, ours):
    assert FitOptions(precision=word).precision == ours


@pytest.mark.parametrize("word", ["64", "64-true", "bf16-true", "16-true", None])
def test_precisions_that_are_not_here(word):
    with pytest.raises(ValueError, match="precision=.* is not allowed: choose one of 'fp32', 'bf16'"):
        FitOptions(precision=word)
