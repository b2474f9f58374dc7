"""Readouts: tensors to all of PyTorch and Pyro, multiplied out only on demand."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.provenance import get_provenance, track_provenance
from torch import Tensor
from torch.nn.functional import softplus

from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.kernels import readout as module

LINKS = ["softmax", "sigmoid", "softplus", "identity"]


def make(link: str = "softmax", lead: tuple[int, ...] = (4,), n_features: int = 7) -> Readout:
    hidden = torch.randn(*lead, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n_features, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n_features, dtype=torch.float64, requires_grad=True)
    return Readout(hidden, weight, bias, link)  # type: ignore[arg-type]


def by_hand(readout: Readout) -> Tensor:
    logits = readout.hidden @ readout.weight.T + readout.bias
    return {
        "softmax": lambda: logits.exp() / logits.exp().sum(-1, keepdim=True),
        "sigmoid": lambda: 1 / (1 + torch.exp(-logits)),
        "softplus": lambda: softplus(logits),
        "identity": lambda: logits,
    }[readout.link]()


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("lead", [(), (4,), (3, 1, 4)])
def test_any_operation_sees_the_dense_values_and_their_gradient(link: str, lead: tuple[int, ...]) -> None:
    readout = make(link, lead)
    upstream = torch.randn(*lead, 7, dtype=torch.float64)
    factors = (readout.hidden, readout.weight, readout.bias)
    expected, found = by_hand(readout), readout * 1
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(found, factors, upstream),
        torch.autograd.grad(expected, factors, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_gradients_it_has_none_afterwards_either() -> None:
    inputs = make(lead=(2,))
    with torch.no_grad():
        gate = Readout(inputs.hidden, inputs.weight, inputs.bias, "identity")
        # PyTorch computes the gate from its logits when the mean is asked for, with gradients.
        mean = dist.ZeroInflatedPoisson(torch.ones(2, 7).double(), gate_logits=gate).mean
    assert not gate.requires_grad
    assert not (2 * gate).requires_grad
    assert not mean.requires_grad


@pytest.mark.usefixtures("never_dense")
def test_metadata_expand_and_detach_cost_nothing() -> None:
    readout = make(lead=(2, 4))
    assert readout.shape == (2, 4, 7)
    assert readout.size(-1) == 7
    assert readout.dim() == readout.ndim == 3
    assert readout.numel() == 56
    assert len(readout) == 2
    assert readout.dtype == torch.float64
    assert readout.device == torch.device("cpu")
    assert readout.is_floating_point()
    assert torch.is_tensor(readout)
    assert readout.requires_grad
    assert not readout.detach().requires_grad
    assert readout.expand(2, 4, 7) is readout
    assert readout.expand([-1, -1, -1]) is readout
    assert {readout: 1}[readout] == 1
    wide = readout.expand(torch.Size([5, 2, 4, 7]))
    assert isinstance(wide, Readout)
    assert wide.shape == (5, 2, 4, 7)
    assert repr(wide) == "Readout(shape=(5, 2, 4, 7), link='softmax')"


def test_expanded_values_are_those_of_the_original() -> None:
    readout = make(lead=(1, 4))
    torch.testing.assert_close(readout.expand(3, 4, 7).dense(), by_hand(readout).expand(3, 4, 7))
    one = make("sigmoid", n_features=1)
    torch.testing.assert_close(one.expand(4, 6), by_hand(one).expand(4, 6))


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("width", [2, 7, 100])
def test_select_and_blocks_stream_to_the_dense_values(link: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_WIDTH", width)
    readout, features = make(link, (2, 4)), torch.tensor([6, 0, 3, 3])
    expected = by_hand(readout)
    monkeypatch.setattr(Readout, "dense", None)
    torch.testing.assert_close(readout.select(features), expected[..., features])
    pieces = list(readout.blocks(width))
    assert [part.stop - part.start for part, _ in pieces] == [len(values[0, 0]) for _, values in pieces]
    torch.testing.assert_close(torch.cat([values for _, values in pieces], -1), expected)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("lead", [(), (4,), (3, 1, 4)])
def test_blocks_without_gradients_are_in_memory_of_their_own(link: str, lead: tuple[int, ...]) -> None:
    readout = make(link, lead)
    with torch.no_grad():
        pieces = list(readout.blocks(2))
        torch.testing.assert_close(torch.cat([values for _, values in pieces], -1), by_hand(readout))


@pytest.mark.parametrize("link", LINKS)
def test_select_is_differentiable(link: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STREAM_WIDTH", 2)
    readout, features = make(link), torch.tensor([1, 5])

    def select(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return Readout(hidden, weight, bias, readout.link).select(features)

    assert torch.autograd.gradcheck(select, (readout.hidden, readout.weight, readout.bias))


def test_select_by_dimension_is_that_of_a_tensor() -> None:
    readout = make()
    torch.testing.assert_close(readout.select(0, 2), by_hand(readout)[2])


def test_log_normalizer() -> None:
    readout = make()
    expected = (readout.hidden @ readout.weight.T + readout.bias).logsumexp(-1)
    torch.testing.assert_close(readout.log_normalizer(), expected)
    with pytest.raises(ValueError, match="only a readout with link 'softmax' has a normalizer, got 'sigmoid'"):
        make("sigmoid").log_normalizer()


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # by pickle, with torch 2.4 and 2.5
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])  # noqa: S301
def test_copies_hold_the_values(copied) -> None:  # type: ignore[no-untyped-def]
    readout = make("softplus")
    twin = copied(readout)
    assert isinstance(twin, Readout)
    torch.testing.assert_close(twin.dense(), readout.dense())


def test_deepcopy_shares_no_memory() -> None:
    readout = make()
    before = readout.detach().dense()
    twin = copy.deepcopy(readout)
    twin.weight.zero_()
    torch.testing.assert_close(readout.detach().dense(), before)


def test_survives_what_is_done_to_tensors() -> None:
    readout = make()
    assert torch.stack([readout, readout]).shape == (2, 4, 7)
    assert torch.cat([readout, by_hand(readout)]).shape == (8, 7)
    with torch.no_grad():
        values = by_hand(readout)
        assert isinstance(readout.detach().numpy(), np.ndarray)
        np.testing.assert_allclose(np.asarray(readout.detach()), values.numpy())
        assert readout.tolist() == readout.dense().tolist()
        torch.testing.assert_close(readout[1:3, -1], values[1:3, -1])
        torch.testing.assert_close(torch.where(values > 0, readout, 0.0), values)
        assert torch.equal(readout.reshape(-1), readout.dense().reshape(-1))


def test_carries_provenance_through_its_factors() -> None:
    readout = make()
    tracked = Readout(track_provenance(readout.hidden, frozenset({"z"})), readout.weight, readout.bias, "softmax")
    assert get_provenance(tracked) == {"z"}
    assert get_provenance(tracked + 1) == {"z"}
    assert get_provenance(track_provenance(tracked, frozenset({"rho"}))) >= {"rho"}


@pytest.mark.parametrize("change", [
    lambda r: r.add_(1), lambda r: r.__setitem__(0, 1.0), lambda r: r.requires_grad_(),
    lambda r: setattr(r, "requires_grad", False),
])  # fmt: skip
def test_refuses_changes_in_place(change) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match="cannot be changed in place"):
        change(make())


def test_bfloat16_products_are_close() -> None:
    exact = Readout(torch.randn(8, 32), torch.randn(50, 32) / 6, torch.randn(50), "softmax")
    rounded = Readout(exact.hidden, exact.weight, exact.bias, "softmax", torch.bfloat16)
    assert rounded.dense().dtype == torch.float32
    difference = (rounded.logits() - exact.logits()).abs().max()
    assert 0 < difference < 0.05


def test_refuses_what_does_not_fit() -> None:
    hidden, weight, bias = torch.zeros(4, 3), torch.zeros(7, 3), torch.zeros(7)
    with pytest.raises(ValueError, match="link must be one of softmax, .* got 'tanh'"):
        Readout(hidden, weight, bias, "tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(7, 2\) and \(7,\)"):
        Readout(hidden, weight[:, :2], bias, "softmax")
    with pytest.raises(ValueError, match=r"\(F,\)"):
        Readout(hidden, weight, bias[:1], "softmax")
    with pytest.raises(TypeError, match="one dtype"):
        Readout(hidden.double(), weight, bias, "softmax")
    with pytest.raises(ValueError, match="at least one feature"):
        Readout(hidden, weight[:0], bias[:0], "softmax").log_normalizer()
