"""The loop: Ctrl-C, divergence, odd sizes and wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.split import Split
from pyro_multivi.training import TrainingDiverged


def train(model, max_epochs=3, **options):
    model.train(max_epochs, **{"progress_bar": False, "batch_size": 16, **options})
    return model


def usable(model):
    """Finite weights, evaluation mode, no gradients left, results, and training that goes on."""
    program = model.program
    assert all(torch.isfinite(p).all() for p in program.parameters())
    assert not program.training
    assert all(p.grad is None for p in program.parameters())
    assert np.isfinite(model.get_latent_representation()).all()
    n = len(next(iter(model.history.values()), []))
    train(model, 1)
    assert len(model.history["train_loss"]) == n + 1
    assert np.isfinite(model.get_elbo())
    return True


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
def test_ctrl_c_within_an_epoch_leaves_a_usable_model(build, monkeypatch, at, train_size, caplog):
    model = build()
    with monkeypatch.context() as patch:
        Break(patch, pm.MultiVIProgram, at, KeyboardInterrupt())
        train(model, 5, train_size=train_size)
    assert model.is_trained
    assert len(model.history.get("train_loss", [])) == (at - 1) // 4
    assert "interrupted in epoch" in caplog.text
    assert usable(model)


def test_ctrl_c_from_a_callback_keeps_the_epoch(build):
    def interrupt(epoch, row, program):
        if epoch == 1:
            raise KeyboardInterrupt

    model = train(build(), 5, callbacks=[interrupt])
    assert len(model.history["train_loss"]) == 2
    assert usable(model)


def test_ctrl_c_goes_back_to_the_best_epoch(build, monkeypatch):
    kept = {}

    def keep(epoch, row, program):
        kept[row["elbo_validation"]] = {k: v.clone() for k, v in program.state_dict().items()}

    model = build()
    with monkeypatch.context() as patch:
        Break(patch, pm.MultiVIProgram, 11, KeyboardInterrupt())
        train(model, 5, callbacks=[keep])
    best = kept[min(kept)]
    assert all(torch.equal(value, best[name]) for name, value in model.program.state_dict().items())


def test_without_held_out_cells_a_bad_gradient_is_refused_before_the_step(build):
    model = build()

    def spoil(epoch, row, program):
        kept.update({k: v.clone() for k, v in program.state_dict().items()})
        hooks.append(program.log_theta.register_hook(lambda grad: grad * torch.nan))

    kept, hooks = {}, []
    with pytest.raises(pm.TrainingDiverged, match="epoch 2, minibatch 1: the gradient of parameter 'log_theta'"):
        train(model, 5, callbacks=[spoil], train_size=1.0)
    assert all(torch.equal(value, kept[name]) for name, value in model.program.state_dict().items())
    hooks[0].remove()
    assert usable(model)


def test_ctrl_c_before_the_first_score_keeps_the_last_whole_epoch(build):
    kept = []

    def interrupt(epoch, row, program):
        kept.append({k: v.clone() for k, v in program.state_dict().items()})
        if epoch == 1:
            raise KeyboardInterrupt

    model = train(build(), 20, callbacks=[interrupt], check_val_every_n_epoch=10)
    assert all(torch.equal(value, kept[1][name]) for name, value in model.program.state_dict().items())


def test_a_callback_stops_training_and_all_are_called(build):
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


def test_an_error_of_a_callback_is_not_swallowed(build):
    def fail(epoch, row, program):
        raise RuntimeError("mine")

    model = build()
    with pytest.raises(RuntimeError, match="mine"):
        train(model, 5, callbacks=[fail])
    assert usable(model)


# ---------------------------------------------------------------------- divergence


def poison(site, cell):
    """A program in which one cell's density of one site becomes NaN while training."""

    class Poisoned(pm.MultiVIProgram):
        armed = False

        def _spoil(self, cells, value):
            hit = (cells.index == cell) & (self.armed and self.training)
            return torch.where(hit, torch.nan, value)

        def library_posterior(self, cells, s, read):
            q = super().library_posterior(cells, s, read)
            return type(q)(self._spoil(cells, q.loc), q.scale, validate_args=False) if site == "l" else q

        def cell_factor(self, cells, read):
            d = super().cell_factor(cells, read)
            return self._spoil(cells, d) if site == "d" else d

        def alignment(self, experts):
            penalty = super().alignment(experts)
            return penalty * torch.nan if site == "alignment" and self.armed and self.training else penalty

    return Poisoned


@pytest.mark.parametrize("train_size", [0.9, 1.0])
@pytest.mark.parametrize(("site", "said"), [("l", "'l'"), ("d", "'[dy]'"), ("alignment", "'alignment' of the guide")])
def test_nan_stops_and_names_site_and_cells(build, site, said, train_size):
    model = build(program_class=poison(site, cell=3))

    def arm(epoch, row, program):
        program.armed = epoch >= 1

    named = "" if site == "alignment" else r".*1 cells, the first at positions \[3\]"
    with pytest.raises(TrainingDiverged, match=f"epoch 3, minibatch . *: site {said}{named}.*gradient_clip"):
        train(model, 5, callbacks=[arm], train_size=train_size, seed=1)
    assert model.is_trained
    assert len(model.history["train_loss"]) == 2
    model.program.armed = False
    assert usable(model)


@pytest.mark.parametrize("train_size", [0.9, 1.0])
@pytest.mark.parametrize("site", ["l", "alignment"])
def test_nan_in_the_first_minibatch_goes_back_to_the_start(build, train_size, site):
    model = build(program_class=poison(site, cell=3))
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
def test_a_nan_gradient_never_reaches_the_weights_that_are_kept(build, epoch, at, train_size):
    """Also where the loss itself stays finite until it is too late, and in the last step of all."""
    model = build()
    bias, steps = model.program.expression_decoder.rho.bias, []

    def spoil(gradient):
        steps.append(1)
        return gradient * torch.nan if len(steps) == 4 * epoch + at else gradient

    handle = bias.register_hook(spoil)
    with pytest.raises(TrainingDiverged, match="parameter .* is not finite"):
        train(model, 3, train_size=train_size)
    handle.remove()
    assert usable(model)


def test_divergence_while_going_on_does_not_spoil_the_moments_kept(build):
    model = train(build(), 1)
    bias = model.program.expression_decoder.rho.bias
    handle = bias.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(TrainingDiverged, match="not finite"):
        train(model, 2)
    handle.remove()
    assert usable(model)


def test_a_rate_far_too_large_is_survived(build):
    model = build()
    with pytest.raises(TrainingDiverged, match="Try a smaller lr"):
        train(model, 5, lr=1e30)
    assert all(torch.isfinite(p).all() for p in model.program.parameters())


def test_an_error_in_a_model_of_ones_own_is_shown_as_it_is(build):
    class Wrong(pm.MultiVIProgram):
        def z_prior(self, s):
            return super().z_prior(s).base_dist  # the event dimension forgotten

    model = build(program_class=Wrong)
    with pytest.raises(ValueError, match="z"):
        train(model)
    assert not model.is_trained


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("train_size", "validation_size", "n_train", "n_validation"),
    [(None, None, 9, 1), (0.9, None, 9, 1), (1.0, None, 10, 0), (None, 0.3, 7, 3), (0.5, 0.2, 5, 2), (0.5, 0.0, 5, 0),
     (0.25, None, 3, 7), (1e-6, None, 1, 9), (0.7, 0.3, 7, 3), (0.999, None, 10, 0)],
)  # fmt: skip
def test_shares_of_ten_cells(train_size, validation_size, n_train, n_validation):
    split = Split.of(10, train_size, validation_size, shuffle=True, seed=0)
    assert (len(split.train), len(split.validation)) == (n_train, n_validation)
    both = torch.cat([split.train, split.validation])
    assert len(both.unique()) == len(both)
    assert set(both.tolist()) <= set(range(10))
    again = Split.from_dict(split.to_dict())
    assert torch.equal(again.train, split.train)
    assert torch.equal(again.validation, split.validation)


def test_unshuffled_splits_hold_out_the_last_cells():
    split = Split.of(10, 0.6, None, shuffle=False, seed=0)
    assert split.train.tolist() == [0, 1, 2, 3, 4, 5]
    assert split.validation.tolist() == [6, 7, 8, 9]


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
        ({"max_epochs": 0}, "max_epochs=0 is not allowed"),
        ({"batch_size": 0}, "batch_size=0 is not allowed"),
        ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch=0 is not allowed"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0 is not allowed"),
        ({"n_epochs_kl_warmup": -1}, "n_epochs_kl_warmup=-1 is not allowed"),
        ({"n_steps_kl_warmup": -1}, "n_steps_kl_warmup=-1 is not allowed"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0 is not allowed"),
        ({"lr": -1.0}, "[Ll]earning rate|lr=-1.0"),
        ({"accelerator": "tpu"}, "accelerator='tpu' is not allowed"),
    ],
)
def test_wrong_arguments_are_named_before_anything_happens(build, options, match):
    model = build()
    start = {name: value.clone() for name, value in model.program.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        model.train(**{"max_epochs": 1, "progress_bar": False, **options})
    assert not model.is_trained
    assert all(torch.equal(value, start[name]) for name, value in model.program.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(build):
    with pytest.raises(ValueError, match="finds no GPU: use accelerator='cpu'"):
        train(build(), accelerator="gpu")


@pytest.mark.parametrize("batch_size", [1, 53, 54, 1000])
@pytest.mark.parametrize("use_batch_norm", ["both", "none"])
def test_a_last_minibatch_of_one_cell_and_other_odd_sizes(build, batch_size, use_batch_norm):
    model = train(build(use_batch_norm=use_batch_norm), 1, batch_size=batch_size)
    assert np.isfinite(model.history["train_loss"]["train_loss"]).all()


@pytest.mark.parametrize("n", [(1, 0, 0), (2, 0, 0), (1, 1, 1), (0, 2, 1)], ids=str)
@pytest.mark.parametrize("use_batch_norm", ["both", "none"])
def test_a_handful_of_cells_trains(n, use_batch_norm):
    adata = pm.simulate_multiome(n, n_genes=20, n_regions=30)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2, use_batch_norm=use_batch_norm, modality_penalty="MMD")
    train(model, 2)
    assert np.isfinite(model.get_latent_representation()).all()


def test_gradients_are_clipped(build):
    norms = []
    model = build()
    step = torch.optim.Adam.step

    def watched(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", watched)
        train(model, 1)
        free = list(norms)
        norms.clear()
        train(build(), 1, gradient_clip=0.5)
    assert min(free) > 0.5
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-3)
