"""Compiled loops against SciPy, the plain formulas and PyTorch's operations."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions.kernels.numba import loops, scalar_math
from pyro_multivi.distributions.kernels.numba.switch import compiled_loops, loops_for
from pyro_multivi.networks.layers import CountsLinear

B = 6
LOOPS = {
    "accessibility": {"regions"},
    "nb": {"zeros", "nonzeros"},
    "zinb": {"zeros", "nonzeros"},
    "poisson": set(),
    "fragments-poisson": {"fragments"},
    "fragments-nb": {"fragments"},
}
OF_SOFTMAX = {"softmax", "softmax_slopes"}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loops that have been run."""
    names: list[str] = []

    def recorded(name: str, loop: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            names.append(name)
            return loop(*args)

        return run

    for name in ("regions", "fragments", "sparse_product", "zeros", "nonzeros", *OF_SOFTMAX):
        monkeypatch.setattr(loops, name, recorded(name, getattr(loops, name)))
    return names


def exact(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    for name, gradient in expected.items():
        assert (found[name].double() - gradient).norm() <= rtol * gradient.norm() + 1e-30, name


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("weights", ["equal", "random"])
@pytest.mark.parametrize("lead", [(B,), (1,), (3, B)], ids=str)
@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0]], ids=str)
def test_value_and_gradients_are_those_of_the_formula(
    case: Any, lead: tuple[int, ...], weights: str, mask: list[int] | None, threads: int, runs: list[str]
) -> None:
    inputs, x = case.inputs(*lead, dtype=torch.float32), case.value(lead[-1], dtype=torch.float32)
    g = torch.full(lead, -0.3) if weights == "equal" else torch.randn(lead)
    keep = torch.ones(lead[-1]) if mask is None else torch.tensor(mask[: lead[-1]], dtype=torch.float32)
    plain = exact(inputs)
    expected = case.plain(plain, x.double()) * keep
    with compiled_loops():
        distribution = case.build(inputs) if mask is None else case.build(inputs).mask(keep.bool())
        found = distribution.log_prob(SparseCounts.from_dense(x))
        by_input = case.gradients(found, inputs, g)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)
    close(by_input, case.gradients(expected, plain, g.double()), rtol=2e-5)
    per_cell = case.per_cell_theta and lead != (1,)  # one cell's dispersions are those of all
    of_link = OF_SOFTMAX if case.link == "softmax" and case.family in ("nb", "zinb") else set()
    assert set(runs) == (set() if per_cell else LOOPS[case.family] | of_link)


@pytest.mark.parametrize("case", ["accessibility", "zinb", "fragments-poisson", "fragments-nb"], indirect=True)
@pytest.mark.parametrize("gemm_dtype", [None, torch.bfloat16])
def test_frozen_inputs_and_no_gradients(case: Any, gemm_dtype: torch.dtype | None) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), SparseCounts.from_dense(case.value(B, dtype=torch.float32))
    eager = case.build(inputs, gemm_dtype=gemm_dtype).log_prob(x).detach()
    with compiled_loops():
        with torch.no_grad():
            torch.testing.assert_close(case.build(inputs, gemm_dtype=gemm_dtype).log_prob(x), eager)
        for name, value in inputs.items():
            some = {n: v.detach().requires_grad_(n == name) for n, v in inputs.items()}
            (found,) = torch.autograd.grad(case.build(some, gemm_dtype=gemm_dtype).log_prob(x).sum(), some[name])
            whole = case.build(inputs, gemm_dtype=gemm_dtype).log_prob(x).sum()
            torch.testing.assert_close(found, torch.autograd.grad(whole, value)[0])


@pytest.mark.parametrize("case", ["nb", "zinb"], indirect=True)
@pytest.mark.parametrize("change", ["fraction", "theta"])
def test_fractions_and_large_dispersions_are_left_to_torch(case: Any, change: str, runs: list[str]) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), case.value(B, dtype=torch.float32)
    if change == "fraction":
        x[2, 2] = 1.5
    else:
        with torch.no_grad():
            inputs["theta"][4] = 1e25
    distribution = case.build(inputs)
    distribution._validate_args = False
    eager = distribution.log_prob(SparseCounts.from_dense(x))
    with compiled_loops():
        found = distribution.log_prob(SparseCounts.from_dense(x))
    assert runs == []
    assert torch.equal(found, eager)


@pytest.mark.parametrize("case", ["accessibility", "zinb"], indirect=True)
def test_float16_products_are_left_to_torch(case: Any, runs: list[str]) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), SparseCounts.from_dense(case.value(B, dtype=torch.float32))
    eager = case.build(inputs, gemm_dtype=torch.float16).log_prob(x)
    with compiled_loops():
        assert torch.equal(case.build(inputs, gemm_dtype=torch.float16).log_prob(x), eager)
    assert runs == []


@pytest.mark.parametrize("case", ["accessibility", "zinb"], indirect=True)
def test_nan_stays_in_its_cell(case: Any) -> None:
    inputs, x = case.inputs(B, dtype=torch.float32), SparseCounts.from_dense(case.value(B, dtype=torch.float32))
    with torch.no_grad():
        inputs["hidden"][1, 0] = torch.nan
    with compiled_loops():
        found = case.build(inputs).log_prob(x)
    assert found.isnan().tolist() == [False, True, *[False] * (B - 2)]


def test_large_counts_and_dispersions_against_scipy() -> None:
    x, theta = np.meshgrid([1, 2, 3, 63, 64, 65, 255, 256, 3000, 100_000], np.logspace(-12, 12, 25))
    found = np.array([scalar_math.rising(*pair) for pair in zip(x.ravel() * 1.0, theta.ravel(), strict=True)])
    # In extended precision: lgamma(x + theta) - lgamma(theta) - x log(theta), term by term.
    for (n, t), (logs, slopes) in zip(zip(x.ravel(), theta.ravel(), strict=True), found, strict=True):
        k = np.arange(n, dtype=np.longdouble)
        assert logs == pytest.approx(float(np.log1p(k / t).sum()), rel=1e-7, abs=1e-10)
        assert slopes == pytest.approx(float((k / (t + k)).sum()), rel=1e-7, abs=1e-10)


def apply(function: Any, *columns: np.ndarray) -> np.ndarray:
    return np.array([function(*row) for row in zip(*columns, strict=True)])


def test_elementary_functions_are_close_to_numpy() -> None:
    x = np.linspace(-125.9, 125.9, 5001).astype(np.float32)
    np.testing.assert_allclose(apply(scalar_math.exp2, x), np.exp2(x.astype(float)), rtol=2e-7)
    u = np.concatenate([[0], np.logspace(-37, 37, 5001)]).astype(np.float32)
    np.testing.assert_allclose(apply(scalar_math.log1p, u), np.log1p(u.astype(float)), rtol=3e-7)
    softplus = scipy.special.log1p(np.exp2(x.astype(float)))
    np.testing.assert_allclose(apply(scalar_math.softplus, x), softplus, rtol=3e-7)
    edges = np.array([np.nan, np.inf, -np.inf, 1000, -1000], np.float32)
    np.testing.assert_array_equal(apply(scalar_math.exp2, edges), np.exp2([np.nan, 126, -126, 126, -126]).astype("f4"))


def test_bfloat16_conversions_are_those_of_torch() -> None:
    x = torch.cat([torch.randn(2000) * 10.0 ** torch.randint(-30, 30, (2000,)), torch.tensor([0, -0.0, torch.inf])])
    x = torch.cat([x, 1 + torch.arange(512) / 2**16, torch.tensor([torch.nan])])  # with ties
    halves = apply(scalar_math.to_half, x.numpy()).astype(np.uint16)
    torch.testing.assert_close(
        torch.from_numpy(halves).view(torch.bfloat16), x.bfloat16(), rtol=0, atol=0, equal_nan=True
    )
    back = torch.from_numpy(apply(scalar_math.from_half, halves).astype(np.float32))
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("n_features", [1, 5, 3000])
def test_sparse_product_of_a_first_layer(binary: bool, n_features: int, threads: int, runs: list[str]) -> None:
    dense = torch.poisson(torch.full((B, n_features), 0.3))
    dense[0] = 0
    counts = SparseCounts.from_dense(dense)
    counts, dense = (counts.binary(), dense.clamp(max=1)) if binary else (counts, dense)
    layer = CountsLinear(n_features, 7)
    with compiled_loops():
        found = layer(counts)
        by_weight, by_bias = torch.autograd.grad(found.square().sum(), [layer.weight, layer.bias])
    expected = layer(dense)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    by_dense_weight = torch.autograd.grad(expected.square().sum(), layer.weight)[0]
    torch.testing.assert_close(by_weight, by_dense_weight, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(by_bias, 2 * expected.sum(0), rtol=1e-5, atol=1e-4)
    assert runs == ["sparse_product"]


def test_threads_and_settings_of_others_are_restored(threads: int) -> None:
    before, priority = numba.get_num_threads(), numba.config.THREADING_LAYER_PRIORITY
    torch.set_num_threads(threads)  # the calls above may have changed it
    with compiled_loops():
        assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
        assert torch.get_num_threads() == threads
        assert loops_for(torch.zeros(1)) is loops
        assert loops_for(torch.zeros(1).double()) is None
    assert loops_for(torch.zeros(1)) is None
    assert (numba.get_num_threads(), torch.get_num_threads()) == (before, threads)
    assert numba.config.THREADING_LAYER_PRIORITY is priority


def test_the_first_use_in_a_process_leaves_the_threads_of_torch() -> None:
    code = """
import torch
from pyro_multivi.distributions.kernels.numba.switch import compiled_loops
torch.set_num_threads(1)
with compiled_loops():
    print(torch.get_num_threads())
print(torch.get_num_threads())
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "1"]


def test_without_numba_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"pyro-multivi\[compile\]"), compiled_loops():
        raise AssertionError("entered")
    assert loops_for(torch.zeros(1)) is None


def test_without_a_cache_the_error_names_the_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no locator available")

    monkeypatch.delitem(sys.modules, loops.__name__)
    monkeypatch.delattr("pyro_multivi.distributions.kernels.numba.loops")
    monkeypatch.setattr(numba, "njit", refuse)
    with pytest.raises(RuntimeError, match=r"no locator available.*NUMBA_CACHE_DIR.*compile=False"), compiled_loops():
        raise AssertionError("entered")
    assert loops_for(torch.zeros(1)) is None
