"""Entries by block, logarithms by products, and the memory that a likelihood takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout, ScaledBernoulli
from pyro_multivi.distributions.kernels import accessibility, blocks, zero_inflation
from pyro_multivi.distributions.kernels.blocks import Entries
from pyro_multivi.distributions.kernels.numba import counts_walk as compiled_counts_walk

pytestmark = pytest.mark.usefixtures("small_blocks")
B = 6
# Likelihoods that take logarithms of products.
FOLDED = ["accessibility", "accessibility-no-region", "zinb", "zinb-cell", "zinb-softplus"]


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
def test_sum_of_logs_is_exact_or_none(m: int, dtype: torch.dtype) -> None:
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
@pytest.mark.usefixtures("eager_or_compiled")
def test_products_of_probabilities_that_underflow(case: Any, upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is too unlikely for products takes logarithms; the other blocks do not."""
    were_too_small: list[bool] = []
    answer = blocks.sum_of_logs_of_products

    def watched(products: Tensor) -> Tensor | None:
        found = answer(products)
        were_too_small.append(found is None)
        return found

    for module in (blocks, accessibility, compiled_counts_walk):
        monkeypatch.setattr(module, "sum_of_logs_of_products", watched)
    g = case.upstream(upstream, (B,))
    inputs, x = unlikely(case, torch.float32)
    exact = {n: value.detach().double().requires_grad_() for n, value in inputs.items()}
    expected = case.plain(exact, x.double())
    assert expected.isfinite().all()
    found = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    by_input = {n: gradient.double() for n, gradient in case.gradients(found, inputs, g).items()}
    case.assert_gradients(by_input, case.gradients(expected, exact, g.double()), rtol=1e-4)
    assert True in were_too_small
    assert False in were_too_small


@pytest.mark.parametrize("case", FOLDED, indirect=True)
def test_products_and_logarithms_give_the_same_value(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(B)
    inputs, x = case.inputs(B), SparseCounts.from_dense(case.value(B))
    by_products = case.build(inputs).log_prob(x)
    for module in (accessibility, zero_inflation):
        monkeypatch.setattr(module, "sum_of_logs", lambda factors: None)
    by_logs = case.build(inputs).log_prob(x)
    torch.testing.assert_close(by_products, by_logs, rtol=1e-12, atol=0)
    case.assert_gradients(case.gradients(by_products, inputs, one), case.gradients(by_logs, inputs, one), rtol=1e-10)


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
