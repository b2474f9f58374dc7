"""Training that is interrupted: Ctrl-C, callbacks that stop it, errors of others."""

from __future__ import annotations

import pytest
import torch

import pyro_multivi as pm


class Break:
    """Something that goes wrong in the n-th step of training."""

    def __init__(self, monkeypatch, program_class, at, error):
        self.calls, whole = 0, program_class.model

        def model(program, cells):
            if program.training:
                self.calls += 1
                if self.calls == at:
                    raise error
            return whole(program, cells)

        monkeypatch.setattr(program_class, "model", model)


# ---------------------------------------------------------------------- Ctrl-C


@pytest.mark.parametrize("at", [1, 3, 6, 8], ids=["first step", "first epoch", "second epoch", "its end"])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_ctrl_c_within_an_epoch_leaves_a_usable_model(build, monkeypatch, at, train_size, caplog, train, assert_usable):
    model = build()
    with monkeypatch.context() as patch:
        Break(patch, pm.MultiVIProgram, at, KeyboardInterrupt())
        train(model, 5, train_size=train_size)
    assert model.is_trained
    assert len(model.history.get("train_loss", [])) == (at - 1) // 4
    assert "interrupted in epoch" in caplog.text
    assert_usable(model)


def test_ctrl_c_from_a_callback_keeps_the_epoch(build, train, assert_usable):
    def interrupt(epoch, row, program):
        if epoch == 1:
            raise KeyboardInterrupt

    model = train(build(), 5, callbacks=[interrupt])
    assert len(model.history["train_loss"]) == 2
    assert_usable(model)


def test_ctrl_c_goes_back_to_the_best_epoch(build, monkeypatch, train, learned):
    kept = {}

    def keep(epoch, row, program):
        kept[row["elbo_validation"]] = learned(program)

    model = build()
    with monkeypatch.context() as patch:
        Break(patch, pm.MultiVIProgram, 11, KeyboardInterrupt())
        train(model, 5, callbacks=[keep])
    best = kept[min(kept)]
    assert all(torch.equal(value, best[name]) for name, value in learned(model.program).items())


def test_ctrl_c_in_the_first_epoch_of_a_later_training_goes_back_to_the_weights_of_before(
    build, monkeypatch, train, learned
):
    model = train(build(), 3)
    before = learned(model.program)
    with monkeypatch.context() as patch:
        Break(patch, pm.MultiVIProgram, 3, KeyboardInterrupt())
        train(model, 5, lr=0.1)
    assert len(model.history["train_loss"]) == 3
    # The decoders' last layers are fitted once more.
    assert all(torch.equal(value, before[name]) for name, value in learned(model.program).items() if "expert" in name)


def test_ctrl_c_before_the_first_score_keeps_the_last_whole_epoch(build, train, learned):
    kept = []

    def interrupt(epoch, row, program):
        kept.append(learned(program))
        if epoch == 1:
            raise KeyboardInterrupt

    model = train(build(), 20, callbacks=[interrupt], check_val_every_n_epoch=10)
    assert all(torch.equal(value, kept[1][name]) for name, value in learned(model.program).items())


def test_a_callback_stops_training_and_all_are_called(build, train):
    called = []
    callbacks = [
        lambda epoch, row, program: epoch == 1,
        lambda epoch, row, program: called.append((epoch, row["train_loss"], program)),
    ]
    model = build()
    train(model, 5, callbacks=callbacks)
    assert [epoch for epoch, *_ in called] == [0, 1]
    assert [loss for _, loss, _ in called] == model.history["train_loss"]["train_loss"].tolist()
    assert all(program is model.program for *_, program in called)


def test_an_error_of_a_callback_is_not_swallowed(build, train, assert_usable):
    def fail(epoch, row, program):
        raise RuntimeError("mine")

    model = build()
    with pytest.raises(RuntimeError, match="mine"):
        train(model, 5, callbacks=[fail])
    assert_usable(model)
