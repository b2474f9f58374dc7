"""The watch over losses and gradients: on a CPU at once; on a GPU, as here by force, after some steps."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.training.divergence import DivergenceMonitor

# Not an attribute of its package, where the function of the same name is.
loop = importlib.import_module("pyro_multivi.training.fit")


class Poisoned(pm.MultiVIProgram):
    """Cell 3 spoils the density of its l while training, once armed."""

    armed = False

    def library_posterior(self, cells, s, read):
        q = super().library_posterior(cells, s, read)
        hit = (cells.index == 3) & (self.armed and self.training)
        return type(q)(torch.where(hit, torch.nan, q.loc), q.scale, validate_args=False)


@pytest.fixture
def run(mosaic, monkeypatch):
    """Train with a host that looks after so many steps (an epoch has four); give back model and error."""
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")

    def train(steps_unseen, spoil=None, **options):
        monkeypatch.setattr(loop, "DivergenceMonitor", partial(DivergenceMonitor, steps_unseen=steps_unseen))
        model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, program_class=Poisoned)
        callbacks = [] if spoil is None else [spoil]
        error = None
        try:
            model.train(3, progress_bar=False, batch_size=16, callbacks=callbacks, seed=1, **options)
        except pm.TrainingDiverged as raised:
            error = str(raised)
        return model, error

    return train


def same_weights(one, other):
    state = other.program.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.program.state_dict().items())


@pytest.mark.parametrize("steps_unseen", [2, 3, 100])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_looking_less_often_changes_nothing(run, steps_unseen, train_size):
    (one, _), (other, error) = run(1, train_size=train_size), run(steps_unseen, train_size=train_size)
    assert error is None
    assert same_weights(one, other)
    for name, frame in one.history.items():
        assert name == "seconds" or frame.equals(other.history[name])


def arm(epoch, row, program):
    program.armed = epoch >= 1


@pytest.mark.parametrize("steps_unseen", [2, 100])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_a_loss_that_is_not_a_number_is_found_with_its_site_cells_and_weights(run, steps_unseen, train_size):
    """The steps that follow it unseen change no weight: site and cells can still be told."""
    (one, at_once), (other, later) = run(1, arm, train_size=train_size), run(steps_unseen, arm, train_size=train_size)
    assert later == at_once
    assert "site 'l' of the guide is not finite for 1 cells, the first at positions [3]" in later
    assert "epoch 3, minibatch 4" not in later, "the test needs steps after the bad one"
    assert same_weights(one, other)
    assert len(other.history["train_loss"]) == 2


@pytest.mark.parametrize("steps_unseen", [2, 100])
def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(run, steps_unseen):
    def spoil_once(epoch, row, program):
        calls = []

        def spoiled(gradient):
            calls.append(1)
            return gradient * torch.nan if len(calls) == 2 else gradient

        if epoch == 1:
            program.log_theta.register_hook(spoiled)

    runs = [run(unseen, spoil_once, train_size=1.0) for unseen in (1, steps_unseen)]
    (one, at_once), (other, later) = runs
    assert "epoch 3, minibatch 2: the gradient of parameter 'log_theta' is not finite" in at_once
    assert later == at_once
    assert same_weights(one, other)
