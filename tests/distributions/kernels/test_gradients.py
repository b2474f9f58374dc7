"""Value and gradients of every likelihood against its plain formula under autograd."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions.kernels.blocks import Entries
from pyro_multivi.distributions.kernels.gradients import Pending, equal_weights

pytestmark = pytest.mark.usefixtures("small_blocks")
B = 6


@pytest.mark.parametrize("upstream", ["ones", "constant", "zero", "random"])
@pytest.mark.parametrize("lead", [(B,), (1,), (3, B), (2, 1, B)], ids=str)
def test_value_and_gradients(case: Any, lead: tuple[int, ...], upstream: str) -> None:
    inputs, x, g = case.inputs(*lead), case.value(lead[-1]), case.upstream(upstream, lead)
    expected, found = case.plain(inputs, x), case.build(inputs).log_prob(SparseCounts.from_dense(x))
    assert found.shape == lead
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    case.assert_gradients(case.gradients(found, inputs, g), case.gradients(expected, inputs, g.double()))


def test_gradcheck(case: Any) -> None:
    inputs, x = case.inputs(3), SparseCounts.from_dense(case.value(3))

    def log_prob(*values: Tensor) -> Tensor:
        built = case.build(dict(zip(inputs, values, strict=True)))
        result: Tensor = built.log_prob(x)
        return result

    assert torch.autograd.gradcheck(log_prob, tuple(inputs.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("eager_or_compiled")
def test_float32_is_close_to_float64(case: Any) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), case.value(B, dtype=torch.float32)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    found, expected = case.build(inputs).log_prob(SparseCounts.from_dense(x)), case.plain(exact, x.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    by_input = {n: g.double() for n, g in case.gradients(found, inputs, torch.ones(B)).items()}
    case.assert_gradients(by_input, case.gradients(expected, exact, torch.ones(B)), rtol=1e-4)


@pytest.mark.usefixtures("eager_or_compiled")
def test_bfloat16_products_are_close_to_float32(case: Any) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), SparseCounts.from_dense(case.value(B, dtype=torch.float32))
    exact = case.build(inputs).log_prob(x)
    found = case.build(inputs, gemm_dtype=torch.bfloat16).log_prob(x)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)
    one = torch.ones(B)
    for name, gradient in case.gradients(exact, inputs, one).items():
        again = torch.autograd.grad(found, inputs[name], one, retain_graph=True)[0]
        assert (again - gradient).norm() < 0.03 * gradient.norm(), name


@pytest.mark.parametrize("by", ["backward", "grad", "hessian", "weights"])
def test_second_derivatives_are_refused(case: Any, by: str) -> None:
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    for name in inputs:
        with pytest.raises(RuntimeError, match=r"no second derivatives; give the distribution readout.dense\(\)"):
            _second_derivative(case, inputs, x, name, by)


def _second_derivative(case: Any, inputs: dict[str, Tensor], x: SparseCounts, name: str, by: str) -> None:
    value, weights = inputs[name], torch.ones(B, requires_grad=True)

    def weighted(changed: Tensor) -> Tensor:
        result: Tensor = (weights * case.build({**inputs, name: changed}).log_prob(x)).sum()
        return result

    if by == "hessian":
        torch.autograd.functional.hessian(lambda changed: weighted(changed.tanh()), value.detach())
        return
    (first,) = torch.autograd.grad(weighted(value), value, create_graph=True)
    if by == "backward":
        (first.sum() + value.sum()).backward()
    else:
        torch.autograd.grad(first.sum(), weights if by == "weights" else value)


def test_repeated_backward_and_frozen_inputs(case: Any) -> None:
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    expected = case.gradients(case.plain(inputs, x.to_dense()), inputs, torch.full((B,), 2.0))
    output = case.build(inputs).log_prob(x).sum() * 2
    for _ in range(2):
        found = torch.autograd.grad(output, list(inputs.values()), retain_graph=True)
        case.assert_gradients(dict(zip(inputs, found, strict=True)), expected)
    for name, gradient in expected.items():
        others = {n: v if n == name else v.detach() for n, v in inputs.items()}
        alone = torch.autograd.grad(case.build(others).log_prob(x).sum() * 2, inputs[name])[0]
        case.assert_gradients({name: alone}, {name: gradient})


def test_input_changed_in_place_is_noticed(case: Any) -> None:
    inputs = case.inputs(B)
    total = case.build(inputs).log_prob(SparseCounts.from_dense(case.value(B))).sum()
    with torch.no_grad():
        inputs["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("guess", [1.0, -0.125, 7.0])
@pytest.mark.parametrize("upstream", ["ones", "constant", "random"])
def test_declared_weights_are_checked_on_a_cpu(case: Any, guess: float, upstream: str) -> None:
    inputs, x, g = case.inputs(B), case.value(B), case.upstream(upstream, (B,))
    with equal_weights(guess):
        found = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    case.assert_gradients(case.gradients(found, inputs, g), case.gradients(case.plain(inputs, x), inputs, g.double()))


def test_gradients_are_formed_once(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant weight needs no second walk, other weights one more, no gradient none."""
    walks = []
    walk = Entries.blocks
    monkeypatch.setattr(Entries, "blocks", lambda self, width: walks.append(1) or walk(self, width))
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    for upstream, expected in (("constant", 1), ("random", 2)):
        walks.clear()
        case.gradients(case.build(inputs).log_prob(x), inputs, case.upstream(upstream, (B,)))
        assert len(walks) == expected
    formed: list[Any] = []
    value = Pending.value
    monkeypatch.setattr(Pending, "value", lambda self, hidden: (value(self, hidden), formed.append(self.formed))[0])
    with torch.no_grad():
        assert not case.build(inputs).log_prob(x).requires_grad
    case.build({name: v.detach() for name, v in inputs.items()}).log_prob(x)
    assert formed == [None, None]


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_equal_weights_refuses_weights_that_no_objective_has(weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be a finite number other than 0"), equal_weights(weight):
        pass


@pytest.mark.parametrize("declared", [None, 0.5])
def test_away_from_the_cpu_nothing_is_checked(
    case: Any, declared: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logic on CPU tensors: gradients wait for the weights, unless these are declared equal."""
    prepare = Pending.__init__
    monkeypatch.setattr(
        Pending, "__init__", lambda self, evaluate, _, wants: prepare(self, evaluate, torch.device("cuda"), wants)
    )
    inputs, x = case.inputs(B), case.value(B)
    g = torch.randn(B) if declared is None else torch.full((B,), -3.0)
    with nullcontext() if declared is None else equal_weights(declared):
        found = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    by_input = case.gradients(found, inputs, g)
    monkeypatch.undo()
    case.assert_gradients(by_input, case.gradients(case.plain(inputs, x), inputs, g.double()))


@pytest.mark.gpu
@pytest.mark.parametrize("upstream", ["constant", "random"])
@pytest.mark.parametrize("declared", [False, True])
def test_on_a_cuda_device(case: Any, upstream: str, declared: bool) -> None:
    if declared and upstream == "random":
        pytest.skip("declared weights are not checked there")
    inputs, x, g = case.inputs(B, device="cuda"), case.value(B).cuda(), case.upstream(upstream, (B,)).cuda()
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device="cuda").bool()
    inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    counts = SparseCounts.from_dense(x.cpu()).to("cuda")
    if declared:
        with equal_weights(0.5):
            found = case.build(inputs).mask(mask).log_prob(counts)
    else:
        found = case.build(inputs).mask(mask).log_prob(counts)
    expected = torch.where(mask, case.plain(inputs, x), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    case.assert_gradients(case.gradients(found, inputs, g), case.gradients(expected, inputs, g.double()))
