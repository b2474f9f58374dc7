"""Layers of encoders and decoders: sparse counts, normalisation, covariates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.networks import layers
from pyro_multivi.networks.layers import BatchNorm, CountsLinear, CovariateStack, NormActivate

SHAPES = [(6, 5), (1, 9), (3, 5000), (4, 4096), (4, 8193)]


def sparse_and_dense(n, features, density=0.3):
    dense = torch.poisson(torch.full((n, features), 2.0)) * (torch.rand(n, features) < density)
    return SparseCounts.from_dense(dense), dense


@pytest.fixture(params=["at random", "in order"])
def order(request, monkeypatch):
    """Order in which the weight of a first layer is read: a wide one feature by feature."""
    monkeypatch.setattr("pyro_multivi.networks.layers._CACHED", 0 if request.param == "in order" else 2**30)
    calls = []
    whole = layers._in_order
    monkeypatch.setattr(layers, "_in_order", lambda *args: calls.append(1) or whole(*args))
    yield
    assert bool(calls) == (request.param == "in order")


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparse_counts_pass_a_first_layer_as_dense_ones_do(shape):
    layer, (sparse, dense) = CountsLinear(shape[1], 7), sparse_and_dense(*shape)
    upstream = torch.randn(shape[0], 7)
    found = []
    for counts in (sparse, dense):
        layer.zero_grad()
        out = layer(counts)
        out.backward(upstream)
        found.append((out.detach(), layer.weight.grad.clone(), layer.bias.grad.clone()))
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][0], dense @ layer.weight.detach() + layer.bias.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("dense", [torch.zeros(3, 5), torch.zeros(0, 5)], ids=["empty rows", "no rows"])
def test_a_first_layer_takes_cells_without_counts(dense):
    layer = CountsLinear(5, 2)
    out = layer(SparseCounts.from_dense(dense))
    out.sum().backward()
    assert out.shape == (len(dense), 2)
    assert torch.equal(out, layer.bias.expand(len(dense), 2))
    assert not layer.weight.grad.any()


def test_gradients_of_two_minibatches_add_up():
    """Buffers are used again; gradients that were returned must not change afterwards."""
    layer = CountsLinear(5, 3)
    (a, dense_a), (b, dense_b) = sparse_and_dense(4, 5), sparse_and_dense(6, 5)
    layer(a).sum().backward()
    first = layer.weight.grad
    kept = first.clone()
    (layer(b).sum() * 2).backward()
    expected = dense_a.sum(0) + 2 * dense_b.sum(0)
    torch.testing.assert_close(layer.weight.grad, expected[:, None].expand(5, 3))
    torch.testing.assert_close(kept, dense_a.sum(0)[:, None].expand(5, 3))


def test_two_uses_of_one_layer_in_one_graph_add_up():
    layer = CountsLinear(5, 3)
    (a, dense_a), (b, dense_b) = sparse_and_dense(4, 5), sparse_and_dense(4, 5)
    (layer(a).sum() + 3 * layer(b).sum()).backward()
    expected = dense_a.sum(0) + 3 * dense_b.sum(0)
    torch.testing.assert_close(layer.weight.grad, expected[:, None].expand(5, 3))


# ---------------------------------------------------------------------- normalisation


def test_second_derivatives_of_a_first_layer_are_those_of_a_dense_product():
    sparse, dense = sparse_and_dense(4, 5)
    weight = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()
    layer = CountsLinear(5, 2).double()

    def total(counts):
        def of(weight):
            return torch.func.functional_call(layer, {"weight": weight}, (counts,)).tanh().sum()

        return of

    found, expected = (torch.autograd.functional.hessian(total(counts), weight) for counts in (sparse, dense.double()))
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(found, expected)


def test_batch_norm_is_torchs_for_a_minibatch():
    ours, theirs = BatchNorm(4, momentum=0.01, eps=1e-3), nn.BatchNorm1d(4, momentum=0.01, eps=1e-3)
    for _ in range(3):
        hidden = torch.randn(8, 4) * 3 + 1
        torch.testing.assert_close(ours(hidden), theirs(hidden))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    hidden = torch.randn(8, 4)
    torch.testing.assert_close(ours.eval()(hidden), theirs.eval()(hidden))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_of_one_cell_uses_the_running_statistics(training):
    layer = BatchNorm(4, momentum=0.01, eps=1e-3)
    layer(torch.randn(8, 4) * 3 + 1)
    before = layer.running_mean.clone()
    layer.train(training)
    cell = torch.randn(1, 4)
    expected = (cell - layer.running_mean) / (layer.running_var + 1e-3).sqrt()
    torch.testing.assert_close(layer(cell), expected)
    assert torch.equal(layer.running_mean, before)
    assert layer(torch.zeros(0, 4)).shape == (0, 4)


def test_batch_norm_takes_the_last_dimension_for_the_features():
    layer = BatchNorm(4)
    draws = torch.randn(5, 8, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    out = layer(draws)
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.reshape(-1, 4).var(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.5])
def test_layers_after_a_linear_map(batch_norm, layer_norm, dropout_rate):
    block = NormActivate(
        4, batch_norm=batch_norm, layer_norm=layer_norm, activation=nn.ReLU(), dropout_rate=dropout_rate
    )
    types = [type(part) for part in block.parts]
    expected = [BatchNorm] * batch_norm + [nn.LayerNorm] * layer_norm + [nn.ReLU] + [nn.Dropout] * (dropout_rate > 0)
    assert types == expected
    assert not any(isinstance(p, nn.LayerNorm) and p.elementwise_affine for p in block.parts)


# ---------------------------------------------------------------------- covariates


@pytest.mark.parametrize("everywhere", [True, False])
def test_covariates_enter_the_layers_they_should(everywhere):
    stack = CovariateStack(3, 5, 3, n_covariates=2, inject_everywhere=everywhere)
    assert [layer.in_features for layer in stack.linear] == ([5, 7, 7] if everywhere else [5, 5, 5])
    hidden, s = torch.randn(4, 3), torch.randn(4, 2)
    assert not torch.allclose(stack(hidden, s), stack(hidden, s.flip(0)))


def test_draws_share_the_covariates_of_their_cell():
    stack = CovariateStack(3, 5, 2, n_covariates=2, inject_everywhere=True)
    draws, s = torch.randn(6, 4, 3), torch.randn(4, 2)
    together = stack(draws, s)
    for draw, out in zip(draws, together, strict=True):
        torch.testing.assert_close(stack(draw, s), out)


def test_a_stack_without_layers_passes_on_its_input():
    stack = CovariateStack(3, 5, 0)
    hidden = torch.randn(2, 3)
    assert stack.n_out == 3
    assert torch.equal(stack(hidden, torch.zeros(2, 0)), hidden)
