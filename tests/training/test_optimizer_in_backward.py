"""Steps of wide layers as soon as their gradients are complete."""

from __future__ import annotations

import pytest
import torch
from anndata import AnnData
from torch import Tensor, nn

import pyro_multivi as pm
from pyro_multivi.training import optimizer_in_backward as early
from pyro_multivi.training.optimizer_in_backward import OptimizerInBackward


@pytest.fixture(autouse=True)
def everything_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early, "_WIDE", 10)


class Network(nn.Module):
    """Wide layers with a bias and without, a narrow one, and a wide parameter that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 6, bias=False)
        self.last = nn.Linear(6, 1)
        self.offset = nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.second(self.first(x).tanh()).tanh()) + self.offset.sum()
        return result


def train(network: Network, ahead: bool, n_steps: int = 5) -> tuple[torch.optim.Optimizer, list[list[str]]]:
    """A few steps; also the names of the gradients left for the optimiser in each."""
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": [p for p in network.parameters() if p.dim() == 1]}]
    optimizer = torch.optim.Adam(groups, lr=0.01, fused=True)
    steps = OptimizerInBackward(network, optimizer) if ahead else None
    x, left = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)), []
    for _ in range(n_steps):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        left.append([name for name, parameter in network.named_parameters() if parameter.grad is not None])
        optimizer.step()
    if steps is not None:
        steps.remove()
    return optimizer, left


def test_same_parameters_and_moments_as_one_step_for_all() -> None:
    early_network, network = Network(), Network()
    (early_optimizer, left), (optimizer, _) = train(early_network, ahead=True), train(network, ahead=False)
    assert left == [["offset", "first.bias", "last.weight", "last.bias"]] * 5
    for found, expected in zip(early_network.parameters(), network.parameters(), strict=True):
        assert torch.equal(found, expected)
    found, expected = early_optimizer.state_dict(), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for place, moments in expected["state"].items():
        for name, value in moments.items():
            assert torch.equal(found["state"][place][name], value), name


def test_afterwards_the_optimiser_steps_alone() -> None:
    network = Network()
    optimizer, _ = train(network, ahead=True)
    network(torch.ones(1, 4)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    before = network.first.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(network.first.weight, before)


@pytest.mark.parametrize("bad", ["first.bias", "second.weight"])
def test_a_gradient_that_is_not_finite_is_left_for_others_to_refuse(bad: str) -> None:
    network = Network()
    parameters = dict(network.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    steps = OptimizerInBackward(network, torch.optim.Adam(network.parameters()))
    parameters[bad].register_hook(lambda gradient: gradient * torch.nan)
    network(torch.ones(2, 4)).sum().backward()
    weight = bad.split(".")[0] + ".weight"
    assert torch.equal(parameters[weight], before[weight])
    assert parameters[weight].grad is not None
    other = "second.weight" if bad == "first.bias" else "first.weight"
    assert not torch.equal(parameters[other], before[other])
    steps.remove()


def test_a_frozen_layer_stays() -> None:
    network = Network()
    network.first.requires_grad_(False)
    steps = OptimizerInBackward(network, torch.optim.Adam([p for p in network.parameters() if p.requires_grad]))
    before = network.first.weight.clone()
    network(torch.ones(2, 4)).sum().backward()
    assert torch.equal(network.first.weight, before)
    assert network.second.weight.grad is None
    steps.remove()


def test_training_is_the_same_with_and_without(mosaic: AnnData, monkeypatch: pytest.MonkeyPatch) -> None:
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    steps: list[int] = []
    came = early._Layer.gradient_came
    monkeypatch.setattr(early._Layer, "gradient_came", lambda self, part: (steps.append(1), came(self, part))[1])

    def weights(wide: int, **options: float) -> dict[str, Tensor]:
        steps.clear()
        monkeypatch.setattr(early, "_WIDE", wide)
        torch.manual_seed(0)
        model = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2)
        model.train(2, batch_size=16, progress_bar=False, **options)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.program.parameters())
        return model.program.state_dict()

    expected = weights(10**9)
    assert not steps
    found = weights(10)
    assert steps
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    weights(10, gradient_clip=1.0)
    assert not steps  # clipping needs all gradients at once
