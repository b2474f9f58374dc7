"""Memory that is used again, and never while a tensor refers to it."""

from __future__ import annotations

import copy

import pytest
import torch

from pyro_multivi.distributions import PoissonCounts, Readout
from pyro_multivi.distributions.kernels.buffers import BufferPool

CPU = torch.device("cpu")


def test_memory_in_use_is_not_given_again() -> None:
    pool = BufferPool()
    first = pool.take((30, 4), torch.float32, CPU)
    second = pool.take((30, 4), torch.float32, CPU)
    assert first.data_ptr() != second.data_ptr()
    first.fill_(1)
    second.fill_(2)
    assert first.eq(1).all()


@pytest.mark.parametrize("hold", [
    lambda t: t[3:], lambda t: t.detach(), lambda t: t.view(torch.int32), lambda t: t.numpy(),
    lambda t: torch.nn.Parameter(t), lambda t: t.untyped_storage(),
])  # fmt: skip
def test_any_view_keeps_it_in_use(hold) -> None:  # type: ignore[no-untyped-def]
    pool = BufferPool()
    taken = pool.take((30, 4), torch.float32, CPU)
    address = taken.data_ptr()
    held = hold(taken)
    del taken
    assert pool.take((30, 4), torch.float32, CPU).data_ptr() != address
    del held
    assert address in {pool.take((30, 4), torch.float32, CPU).data_ptr() for _ in range(1)}


def test_released_memory_is_reused_also_for_another_shape_and_type() -> None:
    pool = BufferPool()
    taken = pool.take((30, 4), torch.float32, CPU)
    address, kept = taken.data_ptr(), pool.kept_bytes
    assert address % 64 == 0
    del taken
    again = pool.take((15, 4), torch.float64, CPU)
    assert again.data_ptr() == address
    assert again.dtype == torch.float64
    assert pool.kept_bytes == kept
    assert pool.take((7, 2), torch.bfloat16, CPU).dtype == torch.bfloat16


def test_much_smaller_requests_leave_large_memory_alone() -> None:
    pool = BufferPool()
    address = pool.take((1000,), torch.float32, CPU).data_ptr()
    small = pool.take((10,), torch.float32, CPU)
    assert small.data_ptr() != address
    assert pool.take((1000,), torch.float32, CPU).data_ptr() == address


def test_bound_drops_unused_memory_first_and_then_allocates_as_usual() -> None:
    pool = BufferPool(max_bytes=10_000)
    pool.take((1000,), torch.float32, CPU)
    pool.take((2200,), torch.float32, CPU)  # 4 kB and 8.8 kB do not fit together
    assert pool.kept_bytes < 10_000
    held = pool.take((2200,), torch.float32, CPU)
    beyond = pool.take((2200,), torch.float32, CPU)
    assert beyond.data_ptr() != held.data_ptr()
    assert pool.kept_bytes < 10_000


def test_copies_start_empty() -> None:
    pool = BufferPool(max_bytes=12345)
    held = pool.take((5,), torch.float32, CPU).fill_(3)
    twin = copy.deepcopy(pool)
    assert twin.max_bytes == 12345
    assert twin.kept_bytes == 0
    assert pool.kept_bytes > 0
    assert held.eq(3).all()


def test_zero_elements() -> None:
    assert BufferPool().take((0, 4), torch.float32, CPU).shape == (0, 4)


def make_loss(hidden: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    rho = Readout(hidden, layer.weight, layer.bias, "softmax")
    return PoissonCounts(rho, torch.full((len(hidden),), 5.0)).log_prob(torch.ones(len(hidden), 9)).sum()


def test_gradients_accumulate_over_backward_passes() -> None:
    layer, hidden = torch.nn.Linear(3, 9), torch.randn(2, 4, 3)
    singles = []
    for h in hidden:
        layer.zero_grad()
        make_loss(h, layer).backward()
        singles.append(layer.weight.grad.clone())
    layer.zero_grad()
    for h in hidden:
        make_loss(h, layer).backward()
    torch.testing.assert_close(layer.weight.grad, singles[0] + singles[1])


def test_two_graphs_alive_at_once_keep_their_gradients() -> None:
    layer, hidden = torch.nn.Linear(3, 9), torch.randn(2, 4, 3)
    expected = [torch.autograd.grad(make_loss(h, layer), layer.weight)[0].clone() for h in hidden]
    losses = [make_loss(h, layer) for h in hidden]
    found = [torch.autograd.grad(loss, layer.weight)[0] for loss in losses]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
