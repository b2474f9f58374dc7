"""Block-by-block value and gradients of every likelihood against its plain formula under autograd."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout, ScaledBernoulli
from pyro_multivi.distributions.kernels import accessibility, blocks, zero_inflation
from pyro_multivi.distributions.kernels.blocks import Entries, equal_weights
from pyro_multivi.distributions.kernels.numba import counts_walk as compiled_counts_walk

pytestmark = pytest.mark.usefixtures("small_blocks")
B = 6
UPSTREAM = {
    "ones": lambda shape: torch.ones(shape),
    "constant": lambda shape: torch.full(shape, -2.5),
    "zero": lambda shape: torch.zeros(shape),
    "random": lambda shape: torch.randn(shape),
}


# Those that take logarithms of products.
FOLDED = ["accessibility", "accessibility-no-region", "zinb", "zinb-cell", "zinb-softplus"]


def gradients(output: Tensor, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(output, list(inputs.values()), upstream.to(output))
    return dict(zip(inputs, found, strict=True))


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-7) -> None:
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape, name
        off = (found[name] - gradient).abs() - rtol * gradient.abs()
        assert (off <= rtol * gradient.abs().max()).all(), f"{name} is off by up to {off.max():.1e}"


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("lead", [(B,), (1,), (3, B), (2, 1, B)], ids=str)
def test_value_and_gradients(case: Any, lead: tuple[int, ...], upstream: str) -> None:
    inputs, x, g = case.inputs(*lead), case.value(lead[-1]), UPSTREAM[upstream](lead)
    expected, found = case.plain(inputs, x), case.build(inputs).log_prob(SparseCounts.from_dense(x))
    assert found.shape == lead
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert_gradients(gradients(found, inputs, g), gradients(expected, inputs, g.double()))


@pytest.mark.parametrize("mask", [
    [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], True, False,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("upstream", ["constant", "random"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "dense"])
@pytest.mark.parametrize("lead", [(B,), (3, B)], ids=str)
def test_masked_cells_contribute_exactly_zero(
    case: Any, lead: tuple[int, ...], mask: Any, upstream: str, lazy: bool
) -> None:
    inputs, x, g = case.inputs(*lead), case.value(B), UPSTREAM[upstream](lead)
    mask = mask if isinstance(mask, bool) else torch.tensor(mask).bool()
    keep = torch.as_tensor(mask).expand(lead)
    # Hold nonsense where nothing was measured: it must not be looked at.
    with torch.no_grad():
        inputs["hidden"][~keep] = torch.nan
    clean = {name: value.detach().nan_to_num().requires_grad_() for name, value in inputs.items()}
    expected = torch.where(keep, case.plain(clean, x), 0.0)
    distribution = case.build(inputs if lazy else clean, lazy).mask(mask)
    found = distribution.log_prob(SparseCounts.from_dense(x))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert (found[~keep] == 0).all()
    if mask is False:
        assert not found.requires_grad
        return
    by_input = gradients(found, inputs if lazy else clean, g)
    assert (by_input["hidden"][~keep] == 0).all()
    assert_gradients(by_input, gradients(expected, clean, g.double()))


def test_masks_combine(case: Any) -> None:
    x, inputs = SparseCounts.from_dense(case.value(B)), case.inputs(B)
    d = case.build(inputs)
    first, second = torch.tensor([1, 1, 0, 0, 1, 1]).bool(), torch.tensor([1, 0, 1, 0, 1, 1]).bool()
    expected = d.log_prob(x) * (first & second)
    torch.testing.assert_close(d.mask(first).mask(second).log_prob(x), expected)
    torch.testing.assert_close(d.mask(first).mask(True).mask(second.double()).log_prob(x), expected)
    assert (d.mask(first).mask(False).log_prob(x) == 0).all()
    assert (d.mask(False).mask(first).log_prob(x) == 0).all()
    per_particle = torch.rand(3, B) < 0.5
    torch.testing.assert_close(
        d.mask(per_particle).log_prob(x), torch.where(per_particle, d.log_prob(x), 0.0), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(d.log_prob(x), case.plain(inputs, x.to_dense()))  # itself unchanged


@pytest.mark.usefixtures("never_dense")
def test_never_multiplied_out(case: Any) -> None:
    d = case.build(case.inputs(B)).mask(torch.tensor([1, 1, 0, 1, 1, 1]).bool())
    d.expand([B]).log_prob(SparseCounts.from_dense(case.value(B))).sum().backward()
    d.log_prob(case.value(B)).sum().backward()


def test_dense_and_sparse_values_and_parameters_agree(case: Any) -> None:
    inputs, x = case.inputs(B), case.value(B)
    expected = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    torch.testing.assert_close(case.build(inputs).log_prob(x), expected, rtol=1e-12, atol=0)
    dense = case.build(inputs, lazy=False)
    torch.testing.assert_close(dense.log_prob(x), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(dense.log_prob(SparseCounts.from_dense(x)), expected, rtol=1e-9, atol=0)
    assert_gradients(gradients(dense.log_prob(x), inputs, torch.ones(B)), gradients(expected, inputs, torch.ones(B)))


def test_values_with_leading_dimensions(case: Any) -> None:
    inputs, x = case.inputs(B), case.value(5, B)
    if case.family == "accessibility":
        x = (x > 0).double()
    d = case.build(inputs)
    expected = torch.stack([d.log_prob(draw) for draw in x])
    torch.testing.assert_close(d.log_prob(x), expected)
    torch.testing.assert_close(d.expand([5, B]).log_prob(x), expected)
    one = SparseCounts.from_dense(x[0, :1])  # one cell's value for all
    torch.testing.assert_close(d.log_prob(one), d.log_prob(x[0, :1].expand(B, -1)))


def test_gradcheck(case: Any) -> None:
    inputs, x = case.inputs(3), SparseCounts.from_dense(case.value(3))

    def log_prob(*values: Tensor) -> Tensor:
        built = case.build(dict(zip(inputs, values, strict=True)))
        result: Tensor = built.log_prob(x)
        return result

    assert torch.autograd.gradcheck(log_prob, tuple(inputs.values()), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("way")
def test_float32(case: Any) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), case.value(B, dtype=torch.float32)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    found, expected = case.build(inputs).log_prob(SparseCounts.from_dense(x)), case.plain(exact, x.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    by_input = {n: g.double() for n, g in gradients(found, inputs, torch.ones(B)).items()}
    assert_gradients(by_input, gradients(expected, exact, torch.ones(B)), rtol=1e-4)


@pytest.mark.usefixtures("way")
def test_bfloat16_products(case: Any) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), SparseCounts.from_dense(case.value(B, dtype=torch.float32))
    exact = case.build(inputs).log_prob(x)
    found = case.build(inputs, gemm_dtype=torch.bfloat16).log_prob(x)
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0)
    one = torch.ones(B)
    for name, gradient in gradients(exact, inputs, one).items():
        again = torch.autograd.grad(found, inputs[name], one, retain_graph=True)[0]
        assert (again - gradient).norm() < 0.03 * gradient.norm(), name


def test_no_second_derivatives(case: Any) -> None:
    inputs = case.inputs(B)
    total = case.build(inputs).log_prob(SparseCounts.from_dense(case.value(B))).sum()
    (first,) = torch.autograd.grad(total, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivatives; give the distribution readout.dense\(\)"):
        (first.sum() + inputs["hidden"].sum()).backward()


def test_repeated_backward_and_frozen_inputs(case: Any) -> None:
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    expected = gradients(case.plain(inputs, x.to_dense()), inputs, torch.full((B,), 2.0))
    output = case.build(inputs).log_prob(x).sum() * 2
    for _ in range(2):
        found = torch.autograd.grad(output, list(inputs.values()), retain_graph=True)
        assert_gradients(dict(zip(inputs, found, strict=True)), expected)
    for name, gradient in expected.items():
        others = {n: v if n == name else v.detach() for n, v in inputs.items()}
        alone = torch.autograd.grad(case.build(others).log_prob(x).sum() * 2, inputs[name])[0]
        assert_gradients({name: alone}, {name: gradient})


def test_input_changed_in_place_is_noticed(case: Any) -> None:
    inputs = case.inputs(B)
    total = case.build(inputs).log_prob(SparseCounts.from_dense(case.value(B))).sum()
    with torch.no_grad():
        inputs["weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.parametrize("guess", [1.0, -0.125, 7.0])
@pytest.mark.parametrize("upstream", ["ones", "constant", "random"])
def test_promised_weights_are_checked_on_a_cpu(case: Any, guess: float, upstream: str) -> None:
    inputs, x, g = case.inputs(B), case.value(B), UPSTREAM[upstream]((B,))
    with equal_weights(guess):
        found = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    assert_gradients(gradients(found, inputs, g), gradients(case.plain(inputs, x), inputs, g.double()))


def test_gradients_are_formed_once(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant weight needs no second walk, other weights one more, no gradient none."""
    walks = []
    walk = Entries.blocks
    monkeypatch.setattr(Entries, "blocks", lambda self, width: walks.append(1) or walk(self, width))
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    for upstream, expected in (("constant", 1), ("random", 2)):
        walks.clear()
        gradients(case.build(inputs).log_prob(x), inputs, UPSTREAM[upstream]((B,)))
        assert len(walks) == expected
    formed: list[Any] = []
    value = blocks.Pending.value
    monkeypatch.setattr(
        blocks.Pending, "value", lambda self, n, like: (value(self, n, like), formed.append(self.formed))[0]
    )
    with torch.no_grad():
        assert not case.build(inputs).log_prob(x).requires_grad
    case.build({name: v.detach() for name, v in inputs.items()}).log_prob(x)
    assert formed == [None, None]


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_equal_weights_refuses(weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be a finite number other than 0"), equal_weights(weight):
        pass


@pytest.mark.parametrize("source", [None, [3, 0, 0], [2], [1, 1], [3, 2, 1, 0, 3, 2, 1, 0], []], ids=str)
@pytest.mark.parametrize("width", [1, 3, 4, 11, 20])
def test_entries_are_found_block_by_block(source: list[int] | None, width: int) -> None:
    x = torch.poisson(torch.full((4, 11), 0.8))
    x[1] = 0
    x[0, -1] = 3
    chosen = None if source is None else torch.tensor(source, dtype=torch.long)
    entries = Entries(SparseCounts.from_dense(x), chosen)
    expected = x if chosen is None else x[chosen]
    rebuilt, whole = torch.zeros_like(expected), torch.zeros(11, len(expected))
    for block in entries.blocks(width):
        part = torch.zeros(block.stop - block.start, len(expected))
        part.view(-1)[block.flat] = entries.values()[block.entries]
        rebuilt[:, block.features] = part.t()
        assert torch.equal(entries.row[block.entries], block.flat % max(1, len(expected)))
        assert torch.equal(entries.feature[block.entries], block.flat // max(1, len(expected)) + block.start)
    assert torch.equal(rebuilt, expected)
    whole.view(-1)[entries.place] = entries.values()
    assert torch.equal(whole.t(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0, 1, 2, 3, 7, 8, 9, 40])
def test_sum_of_logs_is_the_sum_of_logarithms_or_says_that_it_cannot(m: int, dtype: torch.dtype) -> None:
    factors = torch.rand(m, 5, dtype=dtype) + 1e-3
    factors[::2] *= -1
    expected = factors.double().abs().log().sum(0)
    found = blocks.sum_of_logs(factors.clone())
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
    if m:
        for bad in (0.0, torch.finfo(dtype).tiny, torch.nan):
            factors[m // 2, 1] = bad
            assert blocks.sum_of_logs(factors.clone()) is None


class _LargestResult(TorchDispatchMode):
    """Number of elements of the largest floating tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and part.is_floating_point():
                self.elements = max(self.elements, part.numel())
        return result


def test_cells_by_regions_is_never_made() -> None:
    n_cells, n_regions = 40, 1000
    hidden, weight = torch.randn(n_cells, 2), torch.randn(n_regions, 2)
    leaves = [hidden, weight, torch.zeros(n_regions), torch.rand(n_cells), torch.rand(n_regions)]
    hidden, weight, bias, d, r = (leaf.requires_grad_() for leaf in leaves)
    y = SparseCounts.from_dense((torch.rand(n_cells, n_regions) < 0.05).float())
    mask = torch.rand(n_cells) < 0.7
    with _LargestResult() as largest:
        total = ScaledBernoulli(Readout(hidden, weight, bias, "sigmoid"), d, r).mask(mask).log_prob(y)
        (total * torch.rand(n_cells)).sum().backward()
    assert 0 < largest.elements < n_cells * n_regions / 10


@pytest.mark.parametrize("promise", [None, 0.5])
def test_away_from_the_cpu_nothing_is_checked(
    case: Any, promise: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same logic on CPU tensors: gradients wait for the weights, unless these were promised equal."""
    prepare = blocks.Pending.__init__
    monkeypatch.setattr(
        blocks.Pending, "__init__", lambda self, sweep, _, wants: prepare(self, sweep, torch.device("cuda"), wants)
    )
    inputs, x = case.inputs(B), case.value(B)
    g = torch.randn(B) if promise is None else torch.full((B,), -3.0)
    with nullcontext() if promise is None else equal_weights(promise):
        found = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    by_input = gradients(found, inputs, g)
    monkeypatch.undo()
    assert_gradients(by_input, gradients(case.plain(inputs, x), inputs, g.double()))


def unlikely(case: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and a value under which products of a few probabilities underflow, in the second block of features."""
    inputs, x = case.inputs(B, dtype=dtype), case.value(B, dtype=dtype)
    size = 40.0 if dtype == torch.float32 else 300.0
    with torch.no_grad():
        if case.family == "accessibility":
            inputs["bias"][5:10] -= size  # open regions that should not be
            x[:, 5:10] = 1
        else:
            inputs["library"].mul_(1e4)  # zeros that should not be, neither as counts nor as dropouts
            inputs["theta"].clamp_(min=1e3)
            inputs["gate_bias"][5:10] -= size
            x[:, 5:10] = 0
    return inputs, x


@pytest.mark.parametrize("case", FOLDED, indirect=True)
@pytest.mark.parametrize("upstream", ["constant", "random"])
@pytest.mark.usefixtures("way")
def test_where_products_of_probabilities_underflow(case: Any, upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is too unlikely for the quick way takes the other; the rest of the blocks do not."""
    answers: list[bool] = []
    answer = blocks.sum_of_logs_of_products

    def watched(products: Tensor) -> Tensor | None:
        found = answer(products)
        answers.append(found is None)
        return found

    for module in (blocks, accessibility, compiled_counts_walk):
        monkeypatch.setattr(module, "sum_of_logs_of_products", watched)
    g = UPSTREAM[upstream]((B,))
    inputs, x = unlikely(case, torch.float32)
    exact = {n: value.detach().double().requires_grad_() for n, value in inputs.items()}
    expected = case.plain(exact, x.double())
    assert expected.isfinite().all()
    found = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    by_input = {n: gradient.double() for n, gradient in gradients(found, inputs, g).items()}
    assert_gradients(by_input, gradients(expected, exact, g.double()), rtol=1e-4)
    assert True in answers
    assert False in answers


@pytest.mark.parametrize("case", FOLDED, indirect=True)
def test_both_ways_to_a_value_agree(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(B)
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    quick = case.build(inputs).log_prob(x)
    for module in (accessibility, zero_inflation):
        monkeypatch.setattr(module, "sum_of_logs", lambda factors: None)
    slow = case.build(inputs).log_prob(x)
    torch.testing.assert_close(quick, slow, rtol=1e-12, atol=0)
    assert_gradients(gradients(quick, inputs, one), gradients(slow, inputs, one), rtol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("upstream", ["constant", "random"])
@pytest.mark.parametrize("promise", [False, True])
def test_on_a_cuda_device(case: Any, upstream: str, promise: bool) -> None:
    if promise and upstream == "random":
        pytest.skip("a promise is not checked there")
    inputs, x, g = case.inputs(B, device="cuda"), case.value(B).cuda(), UPSTREAM[upstream]((B,)).cuda()
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device="cuda").bool()
    inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    counts = SparseCounts.from_dense(x.cpu()).to("cuda")
    if promise:
        with equal_weights(0.5):
            found = case.build(inputs).mask(mask).log_prob(counts)
    else:
        found = case.build(inputs).mask(mask).log_prob(counts)
    expected = torch.where(mask, case.plain(inputs, x), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert_gradients(gradients(found, inputs, g), gradients(expected, inputs, g.double()))


def test_readout_of_the_wrong_link_is_refused() -> None:
    readout = Readout(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), "softmax")
    with pytest.raises(ValueError, match="p of ScaledBernoulli must have link 'sigmoid', got .* 'softmax'"):
        ScaledBernoulli(readout, torch.ones(2))
