"""Training loop: same curves from the same seed, history, early stopping, going on."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import ClippedAdam

import pyro_multivi as pm
from pyro_multivi.training import History, kl_weight
from pyro_multivi.training.schedules import EarlyStopping


def train(model, max_epochs=3, **options):
    model.train(max_epochs, **{"progress_bar": False, "batch_size": 16, **options})
    return model


def curves(model):
    """All of the history that is not a time."""
    return {name: frame[name].to_numpy() for name, frame in model.history.items() if name != "seconds"}


def same(left, right):
    """Whether weights are equal."""
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


# ---------------------------------------------------------------------- determinism, global state


@pytest.mark.parametrize("choices", [{}, {"use_batch_norm": "both", "modality_weights": "cell"}], ids=str)
def test_same_seed_same_curve_bit_for_bit(build, choices, learned):
    one, two = train(build(**choices), seed=4), train(build(**choices), seed=4)
    for name, values in curves(one).items():
        np.testing.assert_array_equal(values, curves(two)[name])
    assert same(learned(one.program), learned(two.program))


def test_another_seed_another_curve(build):
    one, two = train(build(), seed=4), train(build(), seed=5)
    assert not np.array_equal(curves(one)["train_loss"], curves(two)["train_loss"])
    assert not torch.equal(one._split.validation, two._split.validation)


def test_the_seed_of_the_weights_is_not_the_seed_of_training(build, learned):
    one, two = build(seed=1), build(seed=2)
    assert same(learned(one.program), learned(build(seed=1).program))
    assert not same(learned(one.program), learned(two.program))


def test_what_a_callback_draws_is_no_part_of_training(build, learned):
    plain, drawn = train(build()), train(build(), callbacks=[lambda *_: bool(torch.rand(3).sum() < 0)])
    assert same(learned(plain.program), learned(drawn.program))


def validation_flags():
    return (
        pyro.infer.util.is_validation_enabled(),
        pyro.poutine.util.is_validation_enabled(),
        pyro.distributions.is_validation_enabled(),
        torch.distributions.Distribution._validate_args,
    )


@pytest.mark.parametrize("validate", [True, False])
def test_nothing_global_is_touched(build, global_rng_untouched, validate):
    pyro.param("of_somebody_else", torch.ones(1))
    filters = list(warnings.filters)
    with pyro.validation_enabled(validate):
        before = (*validation_flags(), torch.get_num_threads(), torch.is_grad_enabled())
        train(build(), 2)
        assert (*validation_flags(), torch.get_num_threads(), torch.is_grad_enabled()) == before
    assert list(pyro.get_param_store().keys()) == ["of_somebody_else"]
    assert warnings.filters == filters


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_global_is_touched_by_a_training_that_fails(build, global_rng_untouched, error):
    def fail(epoch, row, program):
        raise error

    before = (*validation_flags(), torch.get_num_threads())
    with contextlib.suppress(RuntimeError):
        train(build(), 2, callbacks=[fail])
    assert (*validation_flags(), torch.get_num_threads()) == before


def test_bf16_is_a_precision_of_training(build):
    """Its curve is another one, but near; and afterwards the decoders multiply in float32 again."""
    plain, half = train(build()), train(build(), precision="bf16")
    expected, found = (model.history["train_loss"].to_numpy() for model in (plain, half))
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    decoders = [half.program.expression_decoder, half.program.accessibility_decoder]
    assert [decoder.gemm_dtype for decoder in decoders] == [None, None]


# ---------------------------------------------------------------------- it learns


def test_the_elbo_rises_as_under_a_plain_svi(build, mosaic):
    """Both start from the same weights and reach the same neighbourhood."""
    model, twin = build(), build()
    start = twin.minibatch()
    torch.manual_seed(0)
    before = TraceMeanField_ELBO().loss(twin.program.model, twin.program.guide, start) / 60
    train(model, 40, lr=0.01, train_size=1.0, n_epochs_kl_warmup=None, batch_size=60)
    twin.program.train()
    svi = SVI(twin.program.model, twin.program.guide, ClippedAdam({"lr": 0.01}), TraceMeanField_ELBO())
    for _ in range(40):
        svi.step(start)
    twin.program.eval()
    twin.is_trained = True
    ours, theirs = -model.get_elbo(), -twin.get_elbo()
    assert ours < before - 5
    assert theirs < before - 5
    assert abs(ours - theirs) < 3


def test_another_elbo_may_be_given(build):
    one = train(build(), elbo=Trace_ELBO())
    two = train(build(), elbo=TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1))
    three = train(build())
    for model in (one, two):
        assert not np.array_equal(curves(model)["train_loss"], curves(three)["train_loss"])
        np.testing.assert_allclose(curves(model)["elbo_train"], curves(three)["elbo_train"], rtol=0.1)


# ---------------------------------------------------------------------- history


def test_history_holds_every_term_of_every_epoch(build):
    model = train(build(), 3)
    names = {"elbo", "reconstruction_loss", "reconstruction_expression", "reconstruction_accessibility",
             "kl_local", "kl_z", "kl_l", "kl_d", "alignment", "mixing"}  # fmt: skip
    expected = {f"{name}_{split}" for name in names for split in ("train", "validation")}
    of_scvi_tools = {
        "train_loss_epoch",
        "train_loss_step",
        "validation_loss",
        "kl_global_train",
        "kl_global_validation",
    }
    assert set(model.history) == expected | {"train_loss", "kl_weight", "seconds"} | of_scvi_tools
    row = {name: frame[name].iloc[-1] for name, frame in model.history.items()}
    penalties = row["alignment_validation"] + row["mixing_validation"]
    assert row["validation_loss"] == pytest.approx(row["elbo_validation"] + penalties)
    assert row["train_loss"] == row["train_loss_epoch"] == row["train_loss_step"]
    assert row["kl_global_train"] == row["kl_global_validation"] == 0
    for name, frame in model.history.items():
        assert frame.index.tolist() == [0, 1, 2]
        assert frame.index.name == "epoch"
        assert frame.columns.tolist() == [name]
        assert np.isfinite(frame[name]).all()


def test_losses_are_per_cell_and_reconstructions_per_measured_cell(build):
    model = train(build(), 1, train_size=1.0, lr=1e-12, n_epochs_kl_warmup=None, batch_size=60)
    row = {name: values[-1] for name, values in curves(model).items()}
    has_rna, has_atac = 45 / 60, 45 / 60
    total = row["reconstruction_expression_train"] * has_rna + row["reconstruction_accessibility_train"] * has_atac
    assert row["reconstruction_loss_train"] == pytest.approx(total, rel=1e-5)
    assert row["elbo_train"] == pytest.approx(row["reconstruction_loss_train"] + row["kl_local_train"], rel=1e-6)
    # In one minibatch without annealing the loss is these terms and those of training.
    of_training = row["alignment_train"] + row["mixing_train"]
    assert row["train_loss"] == pytest.approx(row["elbo_train"] + of_training, rel=1e-5)
    errors = model.get_reconstruction_error()
    # Dropout and the draw of z differ between training and evaluation.
    assert errors["reconstruction_loss_expression"] == pytest.approx(row["reconstruction_expression_train"], rel=0.1)


def test_a_minibatch_counts_by_its_cells(build):
    """Without learning, the loss of an epoch does not depend on how it is cut, but for noise."""
    means = []
    for batch_size in (7, 60):
        model = train(build(dropout_rate=0.0), 8, batch_size=batch_size, lr=1e-12, train_size=1.0, weight_decay=0.0,
                      n_epochs_kl_warmup=None)  # fmt: skip
        means.append(curves(model)["elbo_train"].mean())
    assert means[0] == pytest.approx(means[1], rel=0.01)


def test_annealing_is_in_the_loss_and_not_in_the_elbo(build):
    model = train(build(), 4, n_epochs_kl_warmup=4, batch_size=54, lr=1e-12)
    found = curves(model)
    np.testing.assert_allclose(found["kl_weight"], [0, 0.25, 0.5, 0.75])
    annealed = found["reconstruction_loss_train"] + found["kl_weight"] * found["kl_local_train"]
    of_training = found["alignment_train"] + found["mixing_train"]
    np.testing.assert_allclose(found["train_loss"], annealed + of_training, rtol=1e-5)
    np.testing.assert_allclose(found["elbo_train"], found["reconstruction_loss_train"] + found["kl_local_train"])
    by_steps = train(build(), 3, n_steps_kl_warmup=8, batch_size=16)  # 4 minibatches of 54 cells
    np.testing.assert_allclose(curves(by_steps)["kl_weight"], [3 / 8, 7 / 8, 1])


def test_the_warm_up_goes_from_zero_to_one():
    assert [kl_weight(e, 0, 4, None) for e in (0, 1, 4, 9)] == [0, 0.25, 1, 1]
    assert [kl_weight(0, s, 4, 2) for s in (0, 1, 2, 3)] == [0, 0.5, 1, 1]
    assert kl_weight(0, 0, None, None) == kl_weight(0, 0, 0, None) == kl_weight(0, 0, 9, 0) == 1


def test_histories_may_have_gaps():
    history = History([{"a": 1.0}, {"a": 2.0, "b": 3.0}])
    assert history.names == ["a", "b"]
    assert np.isnan(history["b"][0])
    assert history["b"][1] == 3
    with pytest.raises(KeyError, match="'c' is not in the history; recorded are a, b"):
        history["c"]


# ---------------------------------------------------------------------- early stopping


def test_early_stopping_counts_epochs_without_improvement():
    stopping = EarlyStopping("loss", patience=2, min_delta=0.5)
    answers = [stopping.update(value) for value in (10.0, 9.6, 9.4, 9.3, 9.2)]
    assert answers == [True, False, True, False, False]
    assert stopping.best == 9.4
    assert stopping.exhausted
    assert not stopping.update(float("nan"))


def stop(model, patience, **options):
    """Train while nothing can improve by as much as ``min_delta``."""
    return train(model, 7, early_stopping_patience=patience, early_stopping_min_delta=1e6, **options)


@pytest.mark.parametrize("monitor", ["elbo_validation", "reconstruction_loss_validation", "train_loss"])
@pytest.mark.parametrize("patience", [1, 3])
def test_patience_is_that_of_the_argument(build, monitor, patience):
    model = stop(build(), patience, early_stopping_monitor=monitor)
    assert len(model.history["train_loss"]) == 1 + patience


def test_early_stopping_can_be_switched_off(build):
    assert len(stop(build(), 1, early_stopping=False).history["train_loss"]) == 7


def test_without_validation_cells_nothing_is_monitored(build):
    model = stop(build(), 1, train_size=1.0)
    assert len(model.history["train_loss"]) == 7
    assert not any(name.endswith("validation") for name in model.history)


@pytest.mark.parametrize("max_epochs", [1, 5])
@pytest.mark.parametrize("early_stopping", [True, False])
def test_an_unknown_monitor_is_an_error_that_lists_the_known(build, max_epochs, early_stopping):
    with pytest.raises(ValueError, match="early_stopping_monitor='elbo_valid'.*elbo_validation"):
        train(build(), max_epochs, early_stopping_monitor="elbo_valid", early_stopping=early_stopping)


@pytest.mark.parametrize("max_epochs", [1, 3, 5, 6])
def test_cells_scored_now_and_then_lose_no_training(build, max_epochs, learned):
    model = build()
    start = learned(model.program)
    train(model, max_epochs, check_val_every_n_epoch=5)
    assert len(model.history["train_loss"]) == max_epochs
    assert not same(start, learned(model.program))
    scored = model.history["elbo_validation"]
    assert np.isfinite(scored["elbo_validation"]).all()
    # Every fifth epoch, and the last one: something has to tell which weights to keep.
    assert scored.index.tolist() == sorted({*range(4, max_epochs, 5), max_epochs - 1})
    assert scored.index.name == "epoch"
    assert model.history["validation_loss"].index.tolist() == scored.index.tolist()


def test_the_best_weights_come_back(build, learned):
    """Weights of each epoch are kept aside; those of the best validation score must be found at the end."""
    kept = []

    def keep(epoch, row, program):
        kept.append(learned(program))

    # A learning rate that overshoots.
    model = train(build(), 24, lr=0.3, callbacks=[keep], early_stopping=False, n_epochs_kl_warmup=None)
    scores = curves(model)["elbo_validation"]
    best = int(scores.argmin())
    assert 0 < best < 23, "the test needs a curve that rises again"
    assert same(learned(model.program), kept[best])


# ---------------------------------------------------------------------- going on


def test_training_again_goes_on(build):
    model = train(build(), 2)
    held_out, first = model._split.validation, curves(model)
    train(model, 3, n_epochs_kl_warmup=4)
    assert model.history["train_loss"].index.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(model._split.validation, held_out)
    for name, values in first.items():
        np.testing.assert_array_equal(curves(model)[name][:2], values)
    np.testing.assert_allclose(curves(model)["kl_weight"][2:], [0.5, 0.75, 1])
    # New noise and a new order, not the first epochs over again.
    assert not np.array_equal(curves(model)["train_loss"][2:4], first["train_loss"])


def test_order_and_noise_are_new_when_training_goes_on_and_under_another_seed(build, monkeypatch):
    orders, seeds, whole = [], [], pm.MultiVIProgram.guide

    def recorded(program, cells):
        if program.training:
            orders.append(tuple(cells.index.tolist()))
            seeds.append(torch.initial_seed())
        return whole(program, cells)

    monkeypatch.setattr(pm.MultiVIProgram, "guide", recorded)
    model = train(build(), 1, batch_size=60, train_size=1.0)
    train(model, 1, batch_size=60)
    train(build(), 1, batch_size=60, train_size=1.0, seed=5)
    # The first minibatch of each call; all hold the same cells.
    assert len(orders) == 3
    assert len(set(orders)) == len(set(seeds)) == 3
    assert len({frozenset(order) for order in orders}) == 1


def test_a_warm_up_by_steps_goes_on_too(build):
    model = train(build(), 2, n_steps_kl_warmup=16)  # 4 minibatches of 54 cells
    train(model, 1, n_steps_kl_warmup=16)
    np.testing.assert_allclose(curves(model)["kl_weight"], [3 / 16, 7 / 16, 11 / 16])


def test_training_again_keeps_the_moments_and_takes_the_new_rate(build):
    model = train(build(), 2)
    steps = [state["step"].item() for state in model._optimizer_state["state"].values()]
    train(model, 1, lr=1e-12, weight_decay=0.0)
    again = [state["step"].item() for state in model._optimizer_state["state"].values()]
    assert again == [step + 4 for step in steps]
    assert {group["lr"] for group in model._optimizer_state["param_groups"]} == {1e-12}


def test_new_sizes_make_a_new_split(build):
    model = train(build(), 1)
    with pytest.warns(UserWarning, match="24 were trained on before: only the other 6 count as held out"):
        train(model, 1, train_size=0.5)
    assert (len(model._split.train), len(model._split.validation)) == (30, 6)


def test_going_on_never_ends_worse(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality", batch_key="batch")
    model = pm.MULTIVI(mosaic, n_hidden=8, n_latent=2)
    model.train(max_epochs=15, lr=3e-3, progress_bar=False)
    best = model.history["elbo_validation"]["elbo_validation"].min()
    held_out = model._split.validation.numpy()
    before = model.get_elbo(indices=held_out)
    model.train(max_epochs=2, lr=1.0, progress_bar=False)
    assert model.history["elbo_validation"]["elbo_validation"].iloc[-2:].min() > best
    assert model.get_elbo(indices=held_out) == before


# ---------------------------------------------------------------------- odd sizes, clipping


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

    def recorded(optimizer, *args, **kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack([g.norm() for g in gradients]).norm().item())
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", recorded)
        train(model, 1)
        free = list(norms)
        norms.clear()
        train(build(), 1, gradient_clip=0.5)
    assert min(free) > 0.5
    assert norms == pytest.approx([0.5] * len(norms), rel=1e-3)
