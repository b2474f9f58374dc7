"""Training that goes on from a checkpoint: history and weights as if it had never been interrupted, bit by bit."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_multivi as pm

#: After every step: each takes longer than this.
EVERY_STEP = "0.000001 min"


class Died(BaseException):
    """The process ended: nothing in the package catches it."""


def dies_in_step(monkeypatch, number, act):
    """Something happens in the n-th step of training."""
    calls, whole = [], pm.MultiVIProgram.model

    def model(program, cells):
        if program.training:
            calls.append(1)
            if len(calls) == number:
                act()
        return whole(program, cells)

    monkeypatch.setattr(pm.MultiVIProgram, "model", model)


def die():
    raise Died


def assert_same(one, other):
    """The same rows but for the time they took, the same tensors with all that is calibrated after training."""
    rows = [[{k: repr(v) for k, v in row.items() if k != "seconds"} for row in m._history.rows] for m in (one, other)]
    assert rows[0] == rows[1]
    states = one.program.state_dict(), other.program.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    moments = one._optimizer_state["state"], other._optimizer_state["state"]
    assert all(torch.equal(moments[0][key]["exp_avg_sq"], moments[1][key]["exp_avg_sq"]) for key in moments[0])


def died(monkeypatch, train, model, step, folder, **options):
    """A training that died in a step, with checkpoints."""
    with monkeypatch.context() as patch:
        dies_in_step(patch, step, die)
        with pytest.raises(Died):
            train(model, checkpoint=folder, **options)


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (2, {}),
        (4, {}),
        (9, {"checkpoint_every": 1}),
        (10, {"early_stopping_patience": 3, "early_stopping_min_delta": 2.0, "max_epochs": 8}),
        # From the 100th step on there is an average.
        (110, {"batch_size": 2, "max_epochs": 5, "checkpoint_every": 1}),
        (7, {"adversarial_mixing": True, "n_steps_kl_warmup": 12}),
        (9, {"train_size": 1.0, "gradient_clip": 1.0, "average_steps": None}),
        (6, {"check_val_every_n_epoch": 3, "train_size": 0.5, "validation_size": 0.3, "seed": 4}),
        (5, {"elbo": Trace_ELBO(num_particles=2, vectorize_particles=True)}),
        (6, {"precision": "bf16", "shuffle_set_split": False, "effect_sd": None}),
    ],
    ids=lambda value: value if isinstance(value, int) else "-".join(value) or "defaults",
)
def test_history_and_weights_are_those_of_an_uninterrupted_run(build, train, monkeypatch, tmp_path, step, options):
    options = {"max_epochs": 4, **options}
    every = {"checkpoint_every": EVERY_STEP, **options}
    died(monkeypatch, train, build(), step, tmp_path, **every)
    options.pop("checkpoint_every", None)
    assert_same(train(build(), **options), train(build(seed=5), **options, checkpoint=tmp_path, resume=True))


@pytest.mark.parametrize("choices", [
    {"use_batch_norm": "both", "encode_covariates": True, "dispersion": "gene-batch"},
    {"modality_weights": "cell", "modality_penalty": "Jeffreys", "latent_distribution": "ln"},
    {"gene_likelihood": "nb", "library": "observed", "modality_penalty": None},
], ids=lambda value: "-".join(value))  # fmt: skip
def test_choices_of_the_model(build, train, monkeypatch, tmp_path, choices):
    died(monkeypatch, train, build(**choices), 7, tmp_path, checkpoint_every=EVERY_STEP)
    assert_same(train(build(**choices)), train(build(**choices), resume=tmp_path))


@pytest.mark.parametrize("kept", ["Gene Expression", "Peaks", "covariates"])
def test_one_modality_and_covariates(mosaic, train, monkeypatch, tmp_path, kept):
    if kept == "covariates":
        mosaic.obs["age"] = np.linspace(20, 60, len(mosaic))
        keys = {"continuous_covariate_keys": ["age"], "categorical_covariate_keys": ["cell_type"]}
        pm.MULTIVI.setup_anndata(mosaic, modality_key="modality", **keys)
    else:
        mosaic = mosaic[mosaic.obs["modality"] == "paired", mosaic.var["feature_types"] == kept].copy()
        pm.MULTIVI.setup_anndata(mosaic, batch_key="batch")

    def make():
        return pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)

    died(monkeypatch, train, make(), 5, tmp_path, checkpoint_every=EVERY_STEP)
    assert_same(train(make()), train(make(), checkpoint=tmp_path, resume=True))


def test_a_second_call_of_train_is_gone_on_with_in_a_model_that_was_never_trained(build, train, monkeypatch, tmp_path):
    whole, model = (train(build(), 2, train_size=0.7) for _ in range(2))
    died(monkeypatch, train, model, 6, tmp_path, checkpoint_every=EVERY_STEP)
    resumed = train(build(), checkpoint=tmp_path, resume=True)
    assert_same(train(whole), resumed)
    assert torch.equal(whole._split.validation, resumed._split.validation)
    assert len(resumed.history["train_loss"]) == 5
    assert_same(train(whole), train(resumed))


def test_it_dies_again_and_again(build, train, monkeypatch, tmp_path):
    for step in (2, 2, 5, 1, 3):
        died(
            monkeypatch,
            train,
            build(),
            step,
            tmp_path,
            checkpoint_every=EVERY_STEP,
            resume=tmp_path.exists() and any(tmp_path.iterdir()),
        )
    resumed = train(build(), checkpoint=tmp_path, resume=True)
    assert_same(train(build()), resumed)
    assert "checkpoints" not in resumed._history.ending.split("s (")[0]


def test_checkpoints_change_nothing(build, train, tmp_path):
    assert_same(train(build()), train(build(), checkpoint=tmp_path / "new" / "folder", checkpoint_every=EVERY_STEP))


def test_epochs_that_are_not_in_the_checkpoint_are_trained_again(build, train, monkeypatch, tmp_path):
    died(monkeypatch, train, build(), 16, tmp_path, max_epochs=5, checkpoint_every=2)
    called = []
    train(build(), 5, checkpoint=tmp_path, resume=True, callbacks=[lambda epoch, row, program: called.append(epoch)])
    assert called == [2, 3, 4]


# ---------------------------------------------------------------------- signals


@pytest.fixture
def _ctrl_c_acts():
    """It is ignored where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_acts")
@pytest.mark.parametrize("step", [3, 8])
def test_ctrl_c_writes_a_checkpoint_and_leaves_a_usable_model(
    build, train, monkeypatch, tmp_path, step, assert_usable, caplog
):
    model = build()
    with monkeypatch.context() as patch:
        dies_in_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(model, checkpoint=tmp_path)
    assert "interrupted in epoch" in caplog.text
    assert model.is_trained
    resumed = train(build(), checkpoint=tmp_path, resume=True)
    assert_same(train(build()), resumed)
    # In the same process the model itself can go on, though it was calibrated meanwhile.
    again = tmp_path / "again"
    model = build()
    with monkeypatch.context() as patch:
        dies_in_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
        train(model, checkpoint=again)
    assert_same(train(model, checkpoint=again, resume=True), resumed)
    assert_usable(model)


def test_sigterm_writes_a_checkpoint_and_acts(build, train, monkeypatch, tmp_path):
    def stop(number, frame):
        raise SystemExit(number)

    before = signal.signal(signal.SIGTERM, stop)
    model = build()
    try:
        with monkeypatch.context() as patch:
            dies_in_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(SystemExit):
                train(model, checkpoint=tmp_path)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    called = []
    resumed = train(build(), checkpoint=tmp_path, resume=True, callbacks=[lambda epoch, *_: called.append(epoch)])
    assert called == [1, 2]
    assert_same(train(build()), resumed)


def test_a_signal_that_is_ignored_stays_ignored(build, train, monkeypatch, tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            dies_in_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert_same(train(build(), checkpoint=tmp_path), train(build()))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# ---------------------------------------------------------------------- the end


def test_a_finished_run_says_so_and_brings_its_model_back(build, train, tmp_path):
    first = train(build(), checkpoint=tmp_path)
    with pytest.warns(UserWarning, match=r"this training is finished after 3 epochs \(max_epochs is reached\)"):
        again = train(build(), checkpoint=tmp_path, resume=True)
    assert_same(first, again)
    assert_same(train(first), train(again))


def test_a_process_that_dies_during_calibration(build, train, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("pyro_multivi.api.training.fit_posterior_scale", lambda *_: die())
        with pytest.raises(Died):
            train(build(), checkpoint=tmp_path)
    with pytest.warns(UserWarning, match="this training is finished"):
        resumed = train(build(), checkpoint=tmp_path, resume=True)
    assert_same(train(build()), resumed)


def test_what_a_callback_stopped_is_finished(build, train, tmp_path):
    train(build(), checkpoint=tmp_path, callbacks=[lambda epoch, *_: epoch == 1])
    with pytest.warns(UserWarning, match=r"finished after 2 epochs \(a callback stopped it\)"):
        assert len(train(build(), resume=tmp_path).history["train_loss"]) == 2
