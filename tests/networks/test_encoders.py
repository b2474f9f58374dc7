"""Encoders: hidden states of the measured cells, experts and depth heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.networks.encoders import HiddenState, LibraryHead, NormalHead, SharedFirstLayer


def sparse_counts(n, features):
    return SparseCounts.from_dense(torch.poisson(torch.full((n, features), 0.6)))


def first_layer(**changes):
    given = {"n_covariates": 2, "batch_norm": False, "layer_norm": True, "dropout_rate": 0.0, **changes}
    return SharedFirstLayer(5, 4, **given)


def test_only_measured_cells_are_encoded():
    layer, counts = first_layer(), sparse_counts(6, 5)
    measured = torch.tensor([True, False, True, True, False, False])
    s, depth = torch.randn(6, 2), torch.arange(6.0)
    some, every = layer(counts, measured, s, depth), layer(counts, measured | True, s, depth)
    assert some.rows.tolist() == [0, 2, 3]
    assert every.rows is None
    torch.testing.assert_close(some.hidden, every.hidden[measured])
    assert torch.equal(some.log_depth, depth[measured])
    assert torch.equal(some.s, s[measured])
    elsewhere = torch.full((6, 4), -7.0)
    scattered = some.scatter(some.hidden, elsewhere)
    torch.testing.assert_close(scattered[measured], some.hidden)
    assert (scattered[~measured] == -7).all()
    assert (elsewhere == -7).all()


def test_covariates_are_hidden_from_an_encoder_that_is_not_given_them():
    layer, counts = first_layer(n_covariates=0), sparse_counts(3, 5)
    every = torch.ones(3, dtype=torch.bool)
    one = layer(counts, every, torch.randn(3, 2), torch.zeros(3))
    other = layer(counts, every, torch.randn(3, 2), torch.zeros(3))
    assert torch.equal(one.hidden, other.hidden)
    assert one.s.shape == (3, 0)


@pytest.mark.parametrize("n_layers", [0, 2])
def test_an_expert_is_a_normal_whose_scale_never_overflows(n_layers):
    head = NormalHead(
        4, 3, n_layers, n_covariates=2, inject_everywhere=True, batch_norm=False, layer_norm=False, dropout_rate=0.0
    )
    loc, scale = head(HiddenState(None, torch.full((2, 4), 1e6), torch.randn(2, 2), torch.zeros(2)))
    assert loc.shape == scale.shape == (2, 3)
    assert torch.isfinite(scale).all()
    assert torch.isfinite(scale.square()).all()


def test_an_untrained_depth_head_returns_the_depth():
    head = LibraryHead(4, 2, start=-2.0)
    depth = torch.tensor([1.0, 5.0, 12.0])
    out = head(HiddenState(None, torch.randn(3, 4), torch.zeros(3, 0), depth), torch.tensor(3.0))
    torch.testing.assert_close(out, torch.stack([depth, torch.full((3,), -2.0)], 1))


def test_a_trained_depth_head_still_sees_the_depth_behind_a_layer_norm():
    head = LibraryHead(4, 1)
    nn.init.normal_(head.out.weight)
    hidden = torch.randn(1, 4).expand(2, 4)
    out = head(HiddenState(None, hidden, torch.zeros(2, 0), torch.tensor([2.0, 6.0])), torch.tensor(3.0))
    assert out[0, 0] != out[1, 0]
    departure = (out[:, 0] - torch.tensor([2.0, 6.0])).detach().numpy()
    assert np.ptp(departure) > 0


def test_input_dropout_hides_features_in_training_only():
    torch.manual_seed(0)
    plain, layer = first_layer(), first_layer(input_dropout_rate=0.5)
    layer.load_state_dict(plain.state_dict())
    counts = (torch.rand(2000, 5) < 0.7).float()
    given = torch.ones(2000, dtype=torch.bool), torch.zeros(2000, 2), torch.zeros(2000)

    def hidden_input(counts):
        seen = []
        handle = layer.counts.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        layer(counts, *given)
        handle.remove()
        return seen[0]

    sparse = SparseCounts.from_dense(counts)
    kept, product = hidden_input(sparse)
    # Half of the entries are left, at twice their value: the first layer's input keeps its mean.
    assert set(kept.val.tolist()) == {0.0, 2.0}
    assert abs(kept.val.mean().item() - 1.0) < 5 / len(kept.val) ** 0.5
    torch.testing.assert_close(product, kept.to_dense() @ layer.counts.weight + layer.counts.bias)
    assert torch.equal(sparse.val, torch.ones_like(sparse.val))
    dense, _ = hidden_input(counts)
    assert set(dense[counts > 0].tolist()) == {0.0, 2.0}
    torch.testing.assert_close(layer.eval()(sparse, *given).hidden, plain.eval()(sparse, *given).hidden)
