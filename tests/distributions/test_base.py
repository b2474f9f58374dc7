"""Masks, batch shapes, and the values that a likelihood takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout, ScaledBernoulli

pytestmark = pytest.mark.usefixtures("small_blocks")
B = 6


@pytest.mark.parametrize("mask", [
    [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0], True, False,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("upstream", ["constant", "random"])
@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "dense"])
@pytest.mark.parametrize("lead", [(B,), (3, B)], ids=str)
def test_masked_cells_contribute_exactly_zero(
    case: Any, lead: tuple[int, ...], mask: Any, upstream: str, lazy: bool
) -> None:
    inputs, x, g = case.inputs(*lead), case.value(B), case.upstream(upstream, lead)
    mask = mask if isinstance(mask, bool) else torch.tensor(mask).bool()
    keep = torch.as_tensor(mask).expand(lead)
    # Invalid numbers where nothing was measured: they must not be used.
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
    by_input = case.gradients(found, inputs if lazy else clean, g)
    assert (by_input["hidden"][~keep] == 0).all()
    case.assert_gradients(by_input, case.gradients(expected, clean, g.double()))


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
def test_readouts_are_never_multiplied_out(case: Any) -> None:
    inputs, x, rows = case.inputs(B), case.value(B), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    d = case.build(inputs).mask(rows)
    for value in (SparseCounts.from_dense(x), x):
        found = d.expand([B]).log_prob(value)
        assert (found != 0).equal(rows)
        assert all(part.isfinite().all() for part in case.gradients(found, inputs, torch.ones(B)).values())


def test_dense_and_sparse_values_and_parameters_agree(case: Any) -> None:
    inputs, x = case.inputs(B), case.value(B)
    expected = case.build(inputs).log_prob(SparseCounts.from_dense(x))
    torch.testing.assert_close(case.build(inputs).log_prob(x), expected, rtol=1e-12, atol=0)
    dense = case.build(inputs, lazy=False)
    torch.testing.assert_close(dense.log_prob(x), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(dense.log_prob(SparseCounts.from_dense(x)), expected, rtol=1e-9, atol=0)
    case.assert_gradients(
        case.gradients(dense.log_prob(x), inputs, torch.ones(B)), case.gradients(expected, inputs, torch.ones(B))
    )


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


def test_readout_of_the_wrong_link_is_refused() -> None:
    readout = Readout(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(5), "softmax")
    with pytest.raises(ValueError, match="p of ScaledBernoulli must have link 'sigmoid', got .* 'softmax'"):
        ScaledBernoulli(readout, torch.ones(2))
