"""Weights averaged over the latest steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from anndata import AnnData
from torch import nn

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.training.averaging import RunningAverage
from pyro_multivi.training.fit import evaluate


def walk(n_steps: int) -> np.ndarray:
    """A weight that wanders: its value after each step, in float64."""
    return np.random.default_rng(0).standard_normal(n_steps).cumsum() / 10


def averaged(values: np.ndarray, steps: int | None) -> float:
    """What the module holds in place after being given ``values``, one per step."""
    layer = nn.Linear(1, 1, bias=False).double()
    average = RunningAverage(layer, steps)
    for step, value in enumerate(values, 1):
        layer.weight.data.fill_(value)
        average.update(step)
    with average.in_place():
        return float(layer.weight.detach())


@pytest.mark.parametrize("steps", [7, 50, 1000])
def test_the_average_by_a_formula_written_as_a_sum(steps):
    values = walk(3000)
    # Which steps were taken in, and with what weight; then each one's share of the average as a product.
    taken, weight = [100], [1.0]
    for t in range(101, len(values) + 1):
        reach = min(t // 10, steps)
        if t % max(reach // 10, 1) == 0:
            taken.append(t)
            weight.append(max(reach // 10, 1) / reach)
    weights = np.array(weight)
    share = weights * np.append(np.cumprod((1 - weights)[:0:-1])[::-1], 1.0)
    assert share.sum() == pytest.approx(1)
    expected = float(share @ values[np.array(taken) - 1])
    assert averaged(values, steps) == pytest.approx(expected, rel=1e-10)


def test_it_lies_closer_to_where_noise_is_around_than_the_latest_weights():
    noise = np.random.default_rng(1).standard_normal((40, 2000))
    errors = np.array([averaged(values, 100) for values in noise])
    # Every tenth value enters with a weight of 1/10: a variance of (1/10) / (2 - 1/10) of that of one value.
    assert errors.std() == pytest.approx((1 / 19) ** 0.5, rel=0.3)
    assert noise[:, -1].std() > 0.8


@pytest.mark.parametrize(("n_steps", "steps"), [(99, 100), (3000, None), (3000, 1)])
def test_the_latest_weights_where_there_is_no_average(n_steps, steps):
    values = walk(n_steps)
    assert averaged(values, steps) == values[-1]


def test_in_place_nothing_is_copied_and_training_goes_on_from_the_latest_weights():
    layer = nn.Linear(3, 2)
    average = RunningAverage(layer, 20)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1, fused=True)

    def go(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
            average.update(step)

    go(range(1, 151))
    latest, where = layer.weight.detach().clone(), layer.weight.data_ptr()
    with average.in_place():
        assert layer.weight.data_ptr() != where
        assert not torch.equal(layer.weight, latest)
    assert layer.weight.data_ptr() == where
    assert torch.equal(layer.weight, latest)
    go(range(151, 153))
    assert not torch.equal(layer.weight, latest)


def test_statistics_are_averaged_and_what_is_not_trained_is_left_alone():
    layer = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    layer[0].bias.requires_grad_(False)
    average = RunningAverage(layer, 100)
    for step in range(1, 301):
        layer[1].running_mean.fill_(float(step))
        layer[0].bias.data.fill_(float(step))
        average.update(step)
    average.settle()
    assert 250 < float(layer[1].running_mean[0]) < 300
    assert float(layer[0].bias[0]) == 300
    assert int(layer[1].num_batches_tracked) == 0


# ---------------------------------------------------------------------- in training


@pytest.fixture
def build(mosaic: AnnData):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")

    def train(**options) -> pm.MULTIVI:
        model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
        settings = {"max_epochs": 30, "batch_size": 8, "early_stopping": False, "progress_bar": False, "lr": 1e-2}
        model.train(**{**settings, **options})
        return model

    return train


def test_averaging_changes_the_model_and_not_the_path_of_training(build):
    with_average, without = build(train_size=1.0), build(train_size=1.0, average_steps=None)
    assert len(with_average.history["train_loss"]) == 30
    for name in ("train_loss", "elbo_train"):
        np.testing.assert_array_equal(with_average.history[name], without.history[name])
    one, other = (model.program.expression_decoder.state_dict() for model in (with_average, without))
    assert all(torch.allclose(one[name], other[name], atol=0.2) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_callbacks_see_the_weights_that_training_would_end_with(build, learned):
    seen = []

    def look(epoch: int, row: dict[str, float], program: nn.Module) -> None:
        seen.append(learned(program))

    model = build(train_size=1.0, callbacks=[look])
    ended = learned(model.program)
    assert all(torch.equal(seen[-1][name], ended[name]) for name in ended)
    assert any(not torch.equal(seen[-2][name], ended[name]) for name in ended)


def test_the_weights_kept_are_those_that_scored_best(build):
    model = build(train_size=0.8)
    scores = model.history["elbo_validation"]["elbo_validation"]
    held_out = Minibatches(model._training_table(), model._split.validation, batch_size=8)
    assert evaluate(model.program, held_out).per_cell()["elbo"] == scores.min()
    # Going on scores the weights of now first, so the next best can only be as good or better.
    kept = {name: value.clone() for name, value in model.program.state_dict().items()}
    model.train(1, batch_size=8, lr=0.5, progress_bar=False)
    assert model.history["elbo_validation"]["elbo_validation"].iloc[-1] > scores.min()
    assert all(torch.equal(kept[name], value) for name, value in model.program.state_dict().items())


def test_an_average_over_no_step_is_refused(build):
    with pytest.raises(ValueError, match="average_steps=0 is not allowed: give a whole number of at least 1"):
        build(average_steps=0)
