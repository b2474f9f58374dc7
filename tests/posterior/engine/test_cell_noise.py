"""Noise that belongs to a cell."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyro_multivi.posterior.engine.cell_noise import CellNoise, MirroredNoise

pytestmark = pytest.mark.usefixtures("global_rng_untouched")


def expanded(fn, n_samples, n_cells):
    return fn.expand((n_samples, n_cells))


def test_it_is_uniform_and_independent():
    unit = CellNoise(torch.arange(60), seed=0).uniform("z", 50, (20,)).numpy()
    assert unit.min() > 0
    assert unit.max() < 1
    assert scipy.stats.kstest(unit.ravel(), "uniform").pvalue > 1e-3
    # Neighbours along each axis: draws, cells, components.
    for axis in range(3):
        left, right = (np.take(unit, np.arange(start, unit.shape[axis] - 1 + start), axis).ravel() for start in (0, 1))
        assert abs(np.corrcoef(left, right)[0, 1]) < 4 / np.sqrt(left.size)
    assert len(np.unique(unit)) == unit.size


@pytest.mark.parametrize("change", ["site", "seed"])
def test_another_site_or_seed_is_unrelated(change):
    one = CellNoise(torch.arange(500), seed=3).uniform("z", 4)
    other = CellNoise(torch.arange(500), seed=4 if change == "seed" else 3).uniform("l" if change == "site" else "z", 4)
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("seed", [0, -1, 2**70, -(2**63)])
def test_any_whole_number_is_a_seed(seed):
    assert CellNoise(torch.arange(3), seed=seed).uniform("z", 2).shape == (2, 3)


def test_a_number_depends_on_its_cell_and_draw_alone():
    every = CellNoise(torch.arange(10), seed=1).uniform("z", 6, (2,))
    some = CellNoise(torch.tensor([7, 2]), seed=1).uniform("z", 4, (2,))
    assert torch.equal(some, every[:4][:, [7, 2]])
    later = CellNoise(torch.arange(10), seed=1, first=2).uniform("z", 4, (2,))
    assert torch.equal(later, every[2:])


CASES = {
    "normal": (dist.Normal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])).to_event(1), None),
    "lognormal": (dist.LogNormal(0.5, 0.4), scipy.stats.lognorm(0.4, scale=np.exp(0.5))),
    "uniform": (dist.Uniform(1.0, 3.0), scipy.stats.uniform(1, 2)),
    "laplace": (dist.Laplace(1.0, 2.0), scipy.stats.laplace(1, 2)),
    "masked": (dist.Normal(0.0, 2.0).mask(torch.tensor(False)), scipy.stats.norm(0, 2)),
    "by torch": (dist.Gamma(2.0, 3.0), scipy.stats.gamma(2, scale=1 / 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_their_distribution(case):
    fn, truth = CASES[case]
    drawn = CellNoise(torch.arange(200), seed=5).draw("site", expanded(fn, 50, 200))
    assert drawn.shape == (50, 200, *fn.event_shape)
    assert drawn.dtype == torch.float32
    if truth is None:
        for component, (loc, scale) in enumerate([(1.0, 0.5), (-2.0, 3.0)]):
            values = drawn[..., component].ravel().numpy()
            assert scipy.stats.kstest(values, scipy.stats.norm(loc, scale).cdf).pvalue > 1e-3
    else:
        assert scipy.stats.kstest(drawn.ravel().numpy(), truth.cdf).pvalue > 1e-3


def test_correlated_and_transformed_normals():
    tril = torch.tensor([[1.0, 0.0], [0.9, 0.3]])
    normal = dist.MultivariateNormal(torch.tensor([1.0, 2.0]), scale_tril=tril)
    drawn = CellNoise(torch.arange(300), seed=0).draw("z", expanded(normal, 40, 300)).reshape(-1, 2)
    np.testing.assert_allclose(np.cov(drawn.T.numpy()), tril @ tril.T, atol=0.05)
    stick = torch.distributions.transforms.StickBreakingTransform()
    simplex = dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [stick])
    drawn = CellNoise(torch.arange(5), seed=0).draw("z", expanded(simplex, 4, 5))
    assert drawn.shape == (4, 5, 3)
    np.testing.assert_allclose(drawn.sum(-1), 1.0, rtol=1e-5)


def test_draws_by_torch_are_reproducible_and_shared_ones_depend_on_no_cell():
    gamma = dist.Gamma(2.0, 3.0)
    one, other = CellNoise(torch.arange(4), seed=0), CellNoise(torch.arange(4, 8), seed=0)
    assert torch.equal(one.draw("a", expanded(gamma, 3, 4)), one.draw("a", expanded(gamma, 3, 4)))
    assert not torch.equal(one.draw("a", expanded(gamma, 3, 4)), other.draw("a", expanded(gamma, 3, 4)))
    shared = dist.Normal(0.0, 1.0).expand((3, 1))
    assert torch.equal(one.draw("a", shared, of_cells=False), other.draw("a", shared, of_cells=False))
    later = CellNoise(torch.arange(4), seed=0, first=3)
    assert not torch.equal(one.draw("a", shared, of_cells=False), later.draw("a", shared, of_cells=False))


@pytest.mark.parametrize("noise_class", [CellNoise, MirroredNoise])
def test_what_cells_share_depends_on_the_number_of_the_draw_alone(noise_class):
    def drawn(first, n):
        fn = dist.Normal(torch.zeros(n, 1, 2), 1.0).to_event(1)
        return noise_class(torch.arange(first, first + 3), seed=2, first=first).draw("r", fn, of_cells=False)

    together = drawn(0, 6)
    assert torch.equal(together, torch.cat([drawn(0, 2), drawn(2, 4)]))
    assert together.shape == (6, 1, 2)
    assert len(together.unique()) == together.numel()
