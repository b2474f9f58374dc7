"""Replicated counts, and requests for them that are refused."""

from __future__ import annotations

import pytest
import scipy.sparse as sp
import torch
from pyro import poutine

from pyro_multivi.data.checks import NotInModelError
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.modality import RNA
from pyro_multivi.posterior.engine import replicates as predictive
from pyro_multivi.posterior.engine.draws import draw
from pyro_multivi.posterior.engine.replicates import hide, observed_matrix, replicate
from pyro_multivi.program import MultiVIProgram


def drawn(program, cells, n_samples, **choices):
    """All draws of both sites, (S, B, F), and their expectations."""
    parts = list(replicate(program, cells, n_samples, **choices))
    assert [draws.start for draws, _ in parts] == sorted(draws.start for draws, _ in parts)
    return {
        site: tuple(torch.cat(side) for side in zip(*((f[site].values, f[site].mean()) for _, f in parts), strict=True))
        for site in ("x", "y")
    }


def test_replicates_are_counts_of_measured_and_missing_cells_alike(make_program, make_cells):
    program, cells = make_program(), make_cells()
    found = drawn(program, cells, 400)
    x, y = found["x"][0], found["y"][0]
    assert x.shape == (400, 12, 7)
    assert y.shape == (400, 12, 9)
    assert bool((x == x.round()).all() and (x >= 0).all())
    assert set(y.unique().tolist()) == {0.0, 1.0}
    missing = ~cells.has_rna
    assert bool((x[:, missing].sum((0, 2)) > 0).all())
    # Their mean is that of the distributions they were drawn from.
    for values, mean in found.values():
        values, mean = values.sum(-1), mean.sum(-1)
        error = values.std(0) / 400**0.5
        assert bool(((values.mean(0) - mean.mean(0)).abs() < 5 * error).all())


def test_draws_do_not_depend_on_their_number_nor_on_where_blocks_end(make_program, make_cells, monkeypatch):
    program, cells = make_program(), make_cells()
    many = drawn(program, cells, 30)["x"][1]
    monkeypatch.setattr(predictive, "_BLOCK", 12 * 9 * 7)
    # Expectations depend on latents alone.
    torch.testing.assert_close(drawn(program, cells, 10)["x"][1], many[:10])


class Hidden(MultiVIProgram):
    """A program that hides the counts of regions from handlers outside."""

    def model(self, cells):
        with poutine.block(hide=["y"]):
            super().model(cells)


def test_a_site_that_the_model_lacks_is_named(make_program, make_cells):
    program = make_program()
    program.__class__ = Hidden
    with pytest.raises(NotInModelError, match="Hidden.model has no site 'y', at which counts of regions would be rep"):
        next(replicate(program, make_cells(), 2))


def test_same_seed_same_replicates_and_no_global_state(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = torch.get_rng_state()
    first, again, other = (drawn(program, cells, 5, seed=seed)["x"][0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(("site", "other"), [("x", "y"), ("y", "x")])
def test_hidden_counts_are_not_seen(make_program, make_cells, site, other):
    program, cells = make_program(), make_cells((6, 0, 0))
    changed = cells.replace(**{site: getattr(make_cells((6, 0, 0), seed=1), site)})
    before, after = (drawn(program, these, 20, hidden=site, hidden_depth="prior") for these in (cells, changed))
    for name in (site, other):
        assert torch.equal(before[name][1], after[name][1])
    seen = drawn(program, cells, 20)
    assert not torch.equal(seen[other][1], before[other][1])


def test_depth_of_a_hidden_modality_is_that_inferred_from_it(make_program, make_cells):
    program, cells = make_program(), make_cells((6, 0, 0))
    hidden = drawn(program, cells, 20, hidden="x")["x"][1]
    shares = draw(program, hide(cells, RNA), ("rho",), 20)["rho"].dense()
    library = draw(program, cells, ("l",), 20)["l"]
    # Zero inflation takes part of the mean away; the rest is depth times profile.
    ratio = hidden / (shares * library[..., None])
    assert bool((ratio <= 1 + 1e-4).all())
    assert bool((ratio > 0).all())
    by_prior = drawn(program, cells, 20, hidden="x", hidden_depth="prior")["x"][1]
    assert not torch.allclose(by_prior, hidden)


def test_sample_returns_sparse_counts_of_the_features_asked_for(fitted):
    found = fitted.posterior_predictive_sample(
        indices=range(30), n_samples=4, gene_list=[3, 1], region_list=["region_05"], seed=1
    )
    assert {site: [part.shape for part in parts] for site, parts in found.items()} == {
        "x": [(30, 2)] * 4, "y": [(30, 1)] * 4,
    }  # fmt: skip
    assert all(sp.issparse(part) for parts in found.values() for part in parts)
    whole = fitted.posterior_predictive_sample(indices=range(30), n_samples=4, sites="x", seed=1)
    assert list(whole) == ["x"]
    assert (whole["x"][2].toarray()[:, [3, 1]] == found["x"][2].toarray()).all()


def test_too_many_samples_are_refused_with_the_alternative(fitted, monkeypatch):
    monkeypatch.setattr(predictive, "MEMORY_LIMIT", 10_000)
    with pytest.raises(MemoryError, match=r"900 replicates of 200 cells would take .* ask for fewer n_samples"):
        fitted.posterior_predictive_sample(n_samples=900)
    with pytest.raises(MemoryError, match="Statistics of 100 replicates of 110 features"):
        fitted.posterior_predictive_check()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"sites": ["z"]}, r"sites=\['z'\] is not allowed: choose from 'x', 'y'"),
    ({"sites": []}, r"sites=\[\] is not allowed"),
    ({"n_samples": 0}, "n_samples=0 is not allowed"),
    ({"gene_list": ["gene_99"]}, "gene_list holds 'gene_99': no gene of the model"),
])  # fmt: skip
def test_sample_refuses(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted.posterior_predictive_sample(**arguments)


def test_observed_matrix_is_the_data_as_the_model_sees_them(fitted):
    matrix = observed_matrix(fitted.program, Minibatches(fitted._table, batch_size=64)).toarray()
    counts = fitted.adata.X.toarray()
    n_genes = fitted.spec.n_genes
    assert (matrix[:, :n_genes] == counts[:, :n_genes]).all()
    assert (matrix[:, n_genes:] == (counts[:, n_genes:] > 0)).all()
