"""Divergence: found, explained and survived, whether the host checks each step, as on a CPU, or some, as on a GPU."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.training import TrainingDiverged
from pyro_multivi.training.divergence import DivergenceMonitor

# Not an attribute of its package, where the function of the same name is.
loop = importlib.import_module("pyro_multivi.training.fit")


class Diverging(pm.MultiVIProgram):
    """The density of l of cell 3 is NaN while training, once armed."""

    armed = False

    def library_posterior(self, cells, s, hidden):
        q = super().library_posterior(cells, s, hidden)
        hit = (cells.index == 3) & (self.armed and self.training)
        return type(q)(torch.where(hit, torch.nan, q.loc), q.scale, validate_args=False)


@pytest.fixture
def run(mosaic, monkeypatch):
    """Train with a host that checks after so many steps (an epoch has four); return model and error."""
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")

    def train(check_every, callback=None, **options):
        monkeypatch.setattr(loop, "DivergenceMonitor", partial(DivergenceMonitor, check_every=check_every))
        model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, program_class=Diverging)
        callbacks = [] if callback is None else [callback]
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


@pytest.mark.parametrize("check_every", [2, 3, 100])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_checking_less_often_changes_nothing(run, check_every, train_size):
    (one, _), (other, error) = run(1, train_size=train_size), run(check_every, train_size=train_size)
    assert error is None
    assert same_weights(one, other)
    for name, frame in one.history.items():
        assert name == "seconds" or frame.equals(other.history[name])


def arm(epoch, row, program):
    program.armed = epoch >= 1


@pytest.mark.parametrize("check_every", [2, 100])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_a_loss_that_is_not_a_number_is_found_with_its_site_cells_and_weights(run, check_every, train_size):
    """The unchecked steps that follow it change no weight: site and cells can still be named."""
    (one, at_once), (other, later) = run(1, arm, train_size=train_size), run(check_every, arm, train_size=train_size)
    assert later == at_once
    assert "site 'l' of the guide is not finite for 1 cells, the first at positions [3]" in later
    assert "epoch 3, minibatch 4" not in later, "the test needs steps after the bad one"
    assert same_weights(one, other)
    assert len(other.history["train_loss"]) == 2


@pytest.mark.parametrize("check_every", [2, 100])
def test_a_gradient_that_is_not_a_number_never_reaches_the_weights(run, check_every):
    def break_once(epoch, row, program):
        calls = []

        def broken(gradient):
            calls.append(1)
            return gradient * torch.nan if len(calls) == 2 else gradient

        if epoch == 1:
            program.log_theta.register_hook(broken)

    runs = [run(every, break_once, train_size=1.0) for every in (1, check_every)]
    (one, at_once), (other, later) = runs
    assert "epoch 3, minibatch 2: the gradient of parameter 'log_theta' is not finite" in at_once
    assert later == at_once
    assert same_weights(one, other)


# ---------------------------------------------------------------------- by the loop on a CPU


def diverging(site, cell):
    """A program in which one cell's density of one site becomes NaN while training."""

    class Diverging(pm.MultiVIProgram):
        armed = False

        def _nan_where_hit(self, cells, value):
            hit = (cells.index == cell) & (self.armed and self.training)
            return torch.where(hit, torch.nan, value)

        def library_posterior(self, cells, s, hidden):
            q = super().library_posterior(cells, s, hidden)
            return type(q)(self._nan_where_hit(cells, q.loc), q.scale, validate_args=False) if site == "l" else q

        def cell_factor(self, cells, hidden):
            d = super().cell_factor(cells, hidden)
            return self._nan_where_hit(cells, d) if site == "d" else d

        def alignment(self, experts, s):
            penalty = super().alignment(experts, s)
            return penalty * torch.nan if site == "alignment" and self.armed and self.training else penalty

    return Diverging


@pytest.mark.parametrize("train_size", [0.9, 1.0])
@pytest.mark.parametrize(("site", "said"), [("l", "'l'"), ("d", "'[dy]'"), ("alignment", "'alignment' of the guide")])
def test_nan_stops_and_names_site_and_cells(build, site, said, train_size, train, assert_usable):
    model = build(program_class=diverging(site, cell=3))

    def arm(epoch, row, program):
        program.armed = epoch >= 1

    named = "" if site == "alignment" else r".*1 cells, the first at positions \[3\]"
    with pytest.raises(TrainingDiverged, match=f"epoch 3, minibatch . *: site {said}{named}.*gradient_clip"):
        train(model, 5, callbacks=[arm], train_size=train_size, seed=1)
    assert model.is_trained
    assert len(model.history["train_loss"]) == 2
    model.program.armed = False
    assert_usable(model)


@pytest.mark.parametrize("train_size", [0.9, 1.0])
@pytest.mark.parametrize("site", ["l", "alignment"])
def test_nan_in_the_first_minibatch_goes_back_to_the_start(build, train_size, site, train):
    model = build(program_class=diverging(site, cell=3))
    start = {name: value.clone() for name, value in model.program.state_dict().items()}
    model.program.armed = True
    with pytest.raises(TrainingDiverged, match=f"epoch 1, minibatch 1: site '{site}'"):
        train(model, 5, train_size=train_size, seed=1, batch_size=60)
    assert not model.is_trained
    assert all(torch.equal(value, start[name]) for name, value in model.program.state_dict().items())
    with pytest.raises(pm.NotTrainedError, match="call model.train"):
        model.get_latent_representation()


@pytest.mark.parametrize("epoch", [1, 2], ids=["second", "last"])
@pytest.mark.parametrize("at", [1, 4], ids=["first step", "last step"])
@pytest.mark.parametrize("train_size", [0.9, 1.0])
def test_a_nan_gradient_never_reaches_the_weights_that_are_kept(build, epoch, at, train_size, train, assert_usable):
    """Also where the loss itself stays finite until it is too late, and in the last step of all."""
    model = build()
    bias, steps = model.program.expression_decoder.rho.bias, []

    def break_gradient(gradient):
        steps.append(1)
        return gradient * torch.nan if len(steps) == 4 * epoch + at else gradient

    handle = bias.register_hook(break_gradient)
    with pytest.raises(TrainingDiverged, match="parameter .* is not finite. Try a smaller lr or gradient_clip=10.0.$"):
        train(model, 3, train_size=train_size)
    handle.remove()
    assert_usable(model)


def test_divergence_while_going_on_does_not_change_the_moments_kept(build, train, assert_usable):
    model = train(build(), 1)
    bias = model.program.expression_decoder.rho.bias
    handle = bias.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingDiverged, match="not finite"):
        train(model, 2)
    handle.remove()
    assert_usable(model)


def test_a_rate_far_too_large_is_survived(build, train):
    model = build()
    with pytest.raises(TrainingDiverged, match="Try a smaller lr"):
        train(model, 5, lr=1e30)
    assert all(torch.isfinite(p).all() for p in model.program.parameters())


def test_an_error_in_a_model_of_ones_own_is_shown_as_it_is(build, train):
    class Wrong(pm.MultiVIProgram):
        def z_prior(self, s):
            return super().z_prior(s).base_dist  # the event dimension forgotten

    model = build(program_class=Wrong)
    with pytest.raises(ValueError, match="z"):
        train(model)
    assert not model.is_trained


def test_without_held_out_cells_a_bad_gradient_is_refused_before_the_step(build, train, assert_usable):
    model = build()

    def break_gradient(epoch, row, program):
        kept.update({k: v.clone() for k, v in program.state_dict().items()})
        hooks.append(program.log_theta.register_hook(lambda grad: grad * torch.nan))

    kept, hooks = {}, []
    with pytest.raises(pm.TrainingDiverged, match="epoch 2, minibatch 1: the gradient of parameter 'log_theta'"):
        train(model, 5, callbacks=[break_gradient], train_size=1.0)
    assert all(torch.equal(value, kept[name]) for name, value in model.program.state_dict().items())
    hooks[0].remove()
    assert_usable(model)
