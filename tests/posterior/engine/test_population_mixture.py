"""Mixture of a cell's own posterior with the aggregate posterior of its batch, and where it is used."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.posterior.engine import replicates
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.depth_regression import normal_in
from pyro_multivi.posterior.engine.draws import draw, draw_latents, imputation_latents, mean_latents, replay
from pyro_multivi.posterior.engine.population_mixture import (
    AggregatePosterior,
    draw_from_mixture,
    population_buffer,
    weight_buffer,
)
from pyro_multivi.posterior.engine.replicates import expected_counts, hide, replicate
from pyro_multivi.traces import evaluation_mode

LACKS_RNA, LACKS_ATAC = slice(8, 12), slice(5, 8)  # of make_cells' 5 paired, 3 RNA-only, 4 ATAC-only cells


def _populated(program, modality, sizes=(12, 30), seed=0):
    """Random states of so many cells of each batch, stored in a program; returned by batch."""
    stored = population_buffer(program, modality)
    stored.fill_(-1.0)
    n_latent = stored.shape[1] - 1
    noise = torch.Generator().manual_seed(seed)
    of_batches = [3.0 * torch.randn(n, n_latent, generator=noise) for n in sizes]
    first = 0
    for code, z in enumerate(of_batches):
        stored[first : first + len(z), 0] = code
        stored[first : first + len(z), 1:] = z
        first += len(z)
    return of_batches


def test_a_new_program_has_no_population(make_program):
    assert AggregatePosterior.of(make_program(), RNA) is None


def test_a_batch_of_few_cells_has_all_cells_for_a_population(make_program):
    program = make_program()
    few, many = _populated(program, RNA, (9, 30))
    population = AggregatePosterior.of(program, RNA)
    assert (population.start.tolist(), population.size.tolist()) == ([0, 9], [39, 30])
    torch.testing.assert_close(population.mean(torch.tensor([0, 1]))[0], torch.cat([few, many]).mean(0))
    _populated(program, ATAC, (10, 0))
    population = AggregatePosterior.of(program, ATAC)
    assert (population.start.tolist(), population.size.tolist()) == ([0, 0], [10, 10])


def test_a_place_in_a_population_is_a_cell(make_program):
    program = make_program()
    of_batches = _populated(program, RNA, (12, 30))
    population = AggregatePosterior.of(program, RNA)
    place, batch = torch.tensor([0.0, 0.49, 1 - 1e-12, 1 - 1e-17]), torch.tensor([0, 1, 1, 0])
    expected = [of_batches[0][0], of_batches[1][14], of_batches[1][29], of_batches[0][11]]
    assert torch.equal(population.draw(place, batch), torch.stack(expected))


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.85, 1.0])
def test_draws_are_those_of_the_mixture(make_program, weight):
    """Own draws with probability t, each cell of the population with the same share of the rest."""
    program = make_program()
    of_batches = _populated(program, RNA, (12, 30))
    n, batch = 4000, torch.tensor([0, 1, 1])
    own = 100.0 + torch.arange(n)[:, None, None].expand(n, 3, 3)
    noise = CellNoise(torch.tensor([3, 4, 9]), seed=1)
    drawn = draw_from_mixture(own, AggregatePosterior.of(program, RNA), weight, batch, noise)
    for cell, code in enumerate(batch.tolist()):
        is_own = (drawn[:, cell] == own[:, cell]).all(-1)
        # Evenly spread numbers: far less than the 30 that independent draws would be off by.
        assert abs(int(is_own.sum()) - weight * n) <= 2
        same = (drawn[~is_own, cell, None] == of_batches[code]).all(-1)
        assert bool((same.sum(1) == 1).all())
        times = same.sum(0)
        assert bool(((times - (1 - weight) * n / len(times)).abs() <= 12).all())


def test_the_mean_is_that_of_the_mixture(make_program):
    program = make_program()
    of_batches = _populated(program, RNA, (12, 30))
    mean, batch = torch.tensor([[[1.0, 2.0, 3.0], [-1.0, 0.0, 5.0]]]), torch.tensor([1, 0])
    found = draw_from_mixture(mean, AggregatePosterior.of(program, RNA), 0.7, batch, None)
    expected = 0.7 * mean[0] + 0.3 * torch.stack([of_batches[1].mean(0), of_batches[0].mean(0)])
    torch.testing.assert_close(found[0], expected)


def test_evenly_spread_numbers_belong_to_a_cell_and_are_uniform():
    noise = CellNoise(torch.arange(2000), seed=3)
    found = noise.evenly("z", 40)
    assert found.shape == (40, 2000, 2)
    later = CellNoise(torch.tensor([7, 1999]), seed=3, first=30).evenly("z", 10)
    torch.testing.assert_close(later, found[30:, [7, 1999]], rtol=0, atol=1e-12)
    for number in (0, 17):
        for column in found[number].T.numpy():
            assert scipy.stats.kstest(column, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(found[number].T.numpy())[0, 1]) < 0.08
    # Within a cell any box holds its share of the draws, up to a few.
    boxes = ((found < torch.tensor([0.5, 0.25])).all(-1)).sum(0)
    assert bool(((boxes - 40 / 8).abs() <= 3).all())


def test_only_what_was_not_measured_is_decoded_from_the_mixture(make_program, make_cells):
    program, cells = make_program(), make_cells()
    for modality in MODALITIES:
        _populated(program, modality)
    sites = ("z", "l", "d", "rho", "p")
    plain = draw(program, cells, sites, n_samples=5)
    program.rna_mixture_weight.fill_(0.3)
    found = draw(program, cells, sites, n_samples=5)
    assert list(found) == list(sites)
    for site in ("z", "l", "d"):
        assert torch.equal(found[site], plain[site])
    assert torch.equal(found["p"].dense(), plain["p"].dense())
    assert torch.equal(found["rho"].dense()[:, :8], plain["rho"].dense()[:, :8])
    with evaluation_mode(program):
        batch = cells.design[:, 1].long()
        moved = draw_from_mixture(
            found["z"], AggregatePosterior.of(program, RNA), 0.3, batch, CellNoise(cells.index, 0)
        )
        expected = program.expression(moved, cells.design).rho.dense()[:, LACKS_RNA]
    torch.testing.assert_close(found["rho"].dense()[:, LACKS_RNA], expected)
    assert not torch.allclose(expected, plain["rho"].dense()[:, LACKS_RNA])
    program.atac_mixture_weight.fill_(0.2)
    both = draw(program, cells, ("p", "rho"), n_samples=5)
    assert torch.equal(both["rho"].dense(), found["rho"].dense())
    changed = (both["p"].dense() != plain["p"].dense()).flatten(2).any(-1).any(0)
    assert changed.nonzero().squeeze(-1).tolist() == [5, 6, 7]
    with evaluation_mode(program):
        latents = draw_latents(program, cells, 5)
        left = replay(program, cells, latents, ("rho", "p"), plain=True)
    for site, values in left.items():
        assert torch.equal(values.dense(), plain[site].dense())


def test_without_a_population_latents_are_those_of_the_guide(make_program, make_cells):
    program, cells = make_program(), make_cells()
    program.rna_mixture_weight.fill_(0.3)
    with evaluation_mode(program):
        [(sites, latents)] = imputation_latents(
            program, cells, (drawn := draw_latents(program, cells)), ("rho", "p", "x")
        )
    assert sites == ["rho", "p", "x"]
    assert latents is drawn


def test_counts_are_drawn_from_what_is_imputed(make_program, make_cells):
    program, cells = make_program(), make_cells((0, 0, 4))
    _populated(program, RNA)
    program.rna_mixture_weight.fill_(0.2)
    drawn = draw(program, cells, ("x", "y", "rho"), n_samples=4000)
    found = [part["x"] for _, part in replicate(program, cells, 4000)]
    torch.testing.assert_close(torch.cat([part.fn.rho.dense() for part in found]), drawn["rho"].dense())
    expected = torch.cat([part.mean() for part in found]).mean(0)
    for values in (drawn["x"], torch.cat([part.values for part in found])):
        assert bool(((values.mean(0) - expected).abs() < 5 * values.std(0) / 4000**0.5).all())


def test_a_posterior_need_not_be_normal(make_program, make_cells):
    class Heavy(MultiVIProgram):
        def mix(self, experts):
            return dist.StudentT(5.0, *self.averaged(experts)).to_event(1)

    program, cells = Heavy(make_program().config).eval(), make_cells()
    _populated(program, RNA)
    program.rna_mixture_weight.fill_(0.3)
    with evaluation_mode(program):
        drawn = draw_latents(program, cells, 50)
        assert normal_in(drawn.trace.nodes["z"]["fn"]) is None
        (sites, imputing), rest = imputation_latents(program, cells, drawn, ("rho", "p"))
        mean = imputation_latents(program, cells, mean_latents(program, cells), ("rho",))[0][1].trace.nodes["z"][
            "value"
        ]
    assert (sites, rest) == (["rho"], (["p"], drawn))
    z, before = (latents.trace.nodes["z"]["value"] for latents in (imputing, drawn))
    same = (z == before).all(-1)
    assert bool(same[:, :8].all())
    assert set(same[:, LACKS_RNA].sum(0).tolist()) <= {14, 15, 16}
    assert mean.shape == (1, 12, 3)


@pytest.fixture
def with_mixture(fitted):
    """The model of all tests with other populations and weights, and as it was afterwards."""
    before = {name: value.clone() for name, value in fitted.program.state_dict().items()}
    for modality in MODALITIES:
        _populated(fitted.program, modality, (40, 40))
    fitted.program.rna_mixture_weight.fill_(0.2)
    fitted.program.atac_mixture_weight.fill_(0.4)
    yield fitted
    fitted.program.load_state_dict(before)


def test_all_results_impute_the_same(with_mixture):
    model = with_mixture
    lacks_rna = np.flatnonzero((model.adata.obs["modality"] == "accessibility").to_numpy())
    cells = model.minibatch(lacks_rna)
    rho = draw(model.program, cells, ("rho",), n_samples=8)["rho"].dense().mean(0).numpy()
    given = {"indices": lacks_rna, "n_samples": 8}
    np.testing.assert_allclose(model.get_normalized_expression(return_numpy=True, **given), rho, rtol=2e-5)
    filled = model.impute(**given)
    np.testing.assert_allclose(filled.layers["imputed"].toarray()[:, : rho.shape[1]], rho, rtol=2e-5)
    # One estimate at the mean of the latents is drawn towards the population too.
    at_mean = model.get_normalized_expression(indices=lacks_rna, return_numpy=True)
    model.program.rna_mixture_weight.fill_(1.0)
    unmixed = model.get_normalized_expression(indices=lacks_rna, return_numpy=True)
    spread = [np.log(found).std(0).mean() for found in (at_mean, unmixed)]
    assert spread[0] < 0.5 * spread[1]


def test_groups_are_compared_without_the_mixture(with_mixture):
    model = with_mixture
    types, modality = (model.adata.obs[name].astype(str).to_numpy() for name in ("cell_type", "modality"))
    first = (types == "type_0") & (modality == "accessibility")
    arguments = {"idx1": first, "idx2": types == "type_1", "seed": 2, "silent": True}
    with pytest.warns(UserWarning, match="has RNA: means are imputed"):
        before = model.differential_expression(**arguments)
    model.program.rna_mixture_weight.fill_(1.0)
    with pytest.warns(UserWarning, match="has RNA: means are imputed"):
        after = model.differential_expression(**arguments)
    pd.testing.assert_frame_equal(before, after)


@pytest.mark.parametrize("modality", MODALITIES, ids=lambda modality: modality.key)
def test_expectations_are_linear_in_the_weight(make_program, make_cells, modality, monkeypatch):
    """The fit relies on it: it scores every t from the two extremes."""
    program, cells = make_program(), make_cells((6, 0, 0))
    _populated(program, modality)
    weight = weight_buffer(program, modality)
    found = {}
    for t in (0.0, 0.35, 1.0):
        weight.fill_(t)
        found[t] = expected_counts(program, cells, modality, 20_000)
    assert not torch.allclose(found[0.0], found[1.0], rtol=0.05)
    torch.testing.assert_close(found[0.35], 0.35 * found[1.0] + 0.65 * found[0.0], rtol=0.01, atol=1e-3)
    # However few draws are decoded at once.
    weight.fill_(0.35)
    few = expected_counts(program, cells, modality, 200)
    monkeypatch.setattr(replicates, "_BLOCK", 6 * 9 * 4)
    torch.testing.assert_close(expected_counts(program, cells, modality, 200), few, rtol=1e-5, atol=1e-6)


def test_cells_in_which_nothing_was_measured_keep_their_prior(make_program, make_cells):
    program, cells = make_program(), make_cells()
    nothing = torch.zeros(12, dtype=torch.bool)
    cells = hide(hide(cells, RNA), ATAC)
    assert torch.equal(cells.has_rna | cells.has_atac, nothing)
    plain = draw(program, cells, ("rho", "p"), n_samples=4)
    for modality in MODALITIES:
        _populated(program, modality)
        weight_buffer(program, modality).fill_(0.2)
    for site, values in draw(program, cells, ("rho", "p"), n_samples=4).items():
        assert torch.equal(values.dense(), plain[site].dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_that_lacks_a_modality_is_imputed_from_all_others(make_program, make_cells, dtype):
    program, cells = make_program(dtype), make_cells(dtype=dtype)
    _, many = _populated(program, RNA, (0, 30))
    program.rna_mixture_weight.fill_(0.0)
    found = draw(program, cells, ("rho",), n_samples=60)["rho"].dense()
    of_first = [cell for cell in range(8, 12) if cells.design[cell, 0] == 1]
    assert of_first
    for cell in of_first:
        expected = program.expression(many.to(dtype), cells.design[[cell]].expand(30, -1)).rho.dense()
        distance = (found[:, cell, None] - expected).abs().amax(-1)
        assert bool((distance.min(1).values < 1e-5).all())
        # Each of the thirty about twice: of independent draws one would come up six times.
        times = torch.bincount(distance.argmin(1), minlength=30)
        assert int(times.max()) <= 4
        assert int((times > 0).sum()) >= 22


def test_the_mixture_is_saved(fitted):
    program = MultiVIProgram(fitted.program.config)
    _populated(program, ATAC, (20, 0))
    program.atac_mixture_weight.fill_(0.35)
    again = MultiVIProgram(fitted.program.config)
    again.load_state_dict(program.state_dict())
    assert float(again.atac_mixture_weight) == pytest.approx(0.35)
    assert torch.equal(again.atac_population, program.atac_population)


def test_a_hidden_modality_is_predicted_as_a_missing_one(make_program, make_cells):
    """Checks on held-out cells score the same imputation as that of cells that lack a modality."""
    program, cells = make_program(), make_cells((4, 0, 0))
    _populated(program, RNA)
    program.rna_mixture_weight.fill_(0.2)
    [(_, found)] = replicate(program, cells, 10, hidden="x", hidden_depth="prior")
    expected = draw(program, hide(cells, RNA), ("rho", "l"), 10)
    torch.testing.assert_close(found["x"].fn.rho.dense(), expected["rho"].dense())
