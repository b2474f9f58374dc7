"""Latent state, depth and the bound of a model."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest

import pyro_multivi as pm
from pyro_multivi.posterior.engine.posterior_scale import pattern_code
from pyro_multivi.posterior.mapping.typical import set_typical
from pyro_multivi.traces import measure

PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 30), slice(30, 45), slice(45, 60)


# ---------------------------------------------------------------------- the latent state


def test_moments_and_draws_of_the_latent_state(shared):
    mean = shared.get_latent_representation()
    loc, variance = shared.get_latent_representation(return_dist=True)
    np.testing.assert_array_equal(mean, loc)
    assert mean.shape == variance.shape == (60, 2)
    assert mean.dtype == variance.dtype == np.float32
    draws = shared.get_latent_representation(give_mean=False, n_samples=4000)
    assert draws.shape == (4000, 60, 2)
    # Draws have corrected standard deviations.
    variance = variance * (shared.program.posterior_scale[pattern_code(shared.minibatch())] ** 2).numpy()
    z = (draws.mean(0) - loc) / np.sqrt(variance / 4000)
    assert np.abs(z).max() < 5
    np.testing.assert_allclose(draws.var(0), variance, rtol=6 * np.sqrt(2 / 4000))
    one = shared.get_latent_representation(give_mean=False)
    assert one.shape == (60, 2)
    np.testing.assert_array_equal(one, shared.get_latent_representation(give_mean=False, seed=0))
    assert not np.array_equal(one, shared.get_latent_representation(give_mean=False, seed=1))
    np.testing.assert_array_equal(one, draws[0])


class OnTheSphere(pm.MultiVIProgram):
    """z ~ uniform on the sphere; the mean of its posterior is known, its variance is not."""

    def z_prior(self, s):
        return dist.ProjectedNormal(s.new_zeros(*s.shape[:-1], self.config.latent))

    def mix(self, experts):
        return dist.ProjectedNormal(self.averaged(experts)[0])


def test_a_posterior_without_a_variance_has_a_mean(ready):
    model = pm.MULTIVI(ready, n_hidden=8, n_latent=3, program_class=OnTheSphere)
    model.is_trained = True
    z = model.get_latent_representation()
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    assert model.get_latent_representation(modality="expression").shape == z.shape
    with pytest.raises(ValueError, match="of 'z', ProjectedNormal, knows no variance: leave return_dist out"):
        model.get_latent_representation(return_dist=True)


def test_a_modality_alone_is_nan_where_it_was_not_measured(shared):
    rna = shared.get_latent_representation(modality="expression")
    atac = shared.get_latent_representation(modality="accessibility")
    assert np.isnan(rna[ATAC_ONLY]).all()
    assert np.isnan(atac[RNA_ONLY]).all()
    assert np.isfinite(rna[:45]).all()
    assert np.isfinite(np.delete(atac, RNA_ONLY, 0)).all()
    assert len(np.unique(rna[:45], axis=0)) == 45
    joint, variance = shared.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(joint[PAIRED], (rna + atac)[PAIRED] / 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(joint[RNA_ONLY], rna[RNA_ONLY])
    np.testing.assert_array_equal(joint[ATAC_ONLY], atac[ATAC_ONLY])
    _, of_rna = shared.get_latent_representation(modality="expression", return_dist=True)
    _, of_atac = shared.get_latent_representation(modality="accessibility", return_dist=True)
    np.testing.assert_allclose(variance[PAIRED], (of_rna + of_atac)[PAIRED] / 4, rtol=1e-5)
    for moment in shared.get_latent_representation(modality="expression", return_dist=True):
        np.testing.assert_array_equal(np.isnan(moment).all(1), np.arange(60) >= 45)
    draws = shared.get_latent_representation(modality="expression", give_mean=False, n_samples=3)
    assert np.isnan(draws[:, ATAC_ONLY]).all()
    assert np.isfinite(draws[:, :45]).all()


def test_a_modality_that_no_chosen_cell_has_is_an_error(shared):
    with pytest.raises(ValueError, match="none of the 15 cells has it. Use modality='joint'"):
        shared.get_latent_representation(modality="expression", indices=list(range(45, 60)))
    with pytest.raises(ValueError, match="modality='rna' is not allowed: choose one of 'joint'"):
        shared.get_latent_representation(modality="rna")
    with pytest.raises(ValueError, match="n_samples=0 is not allowed"):
        shared.get_latent_representation(give_mean=False, n_samples=0)


def test_ln_is_what_the_decoders_read_and_does_not_vary(ready, trained):
    model = trained(ready, latent_distribution="ln")
    mean = model.get_latent_representation()
    np.testing.assert_array_equal(mean, model.get_latent_representation(seed=7))
    np.testing.assert_allclose(mean.sum(1), 1, rtol=1e-5)
    loc, _ = model.get_latent_representation(return_dist=True)
    np.testing.assert_allclose(mean, np.exp(loc) / np.exp(loc).sum(1, keepdims=True), rtol=1e-5)
    draws = model.get_latent_representation(give_mean=False, n_samples=3)
    np.testing.assert_allclose(draws.sum(-1), 1, rtol=1e-5)
    assert np.ptp(draws, 0).max() > 0


# ---------------------------------------------------------------------- depth


def test_library_sizes_are_near_the_observed_depth_before_any_learning(ready, small):
    model = small(ready)
    model.is_trained = True
    sizes = model.get_library_size_factors()
    depth = np.ravel(ready.X[:, :40].sum(1))
    # The mean of a LogNormal of log standard deviation exp(-2).
    np.testing.assert_allclose(sizes["expression"][:45], depth[:45] * np.exp(np.exp(-4) / 2), rtol=1e-3)
    assert np.isnan(sizes["expression"][ATAC_ONLY]).all()
    assert np.isnan(sizes["accessibility"][RNA_ONLY]).all()
    d = np.delete(sizes["accessibility"], RNA_ONLY)
    n_open = np.delete((ready.X[:, 40:] > 0).sum(1), RNA_ONLY)
    assert ((d > 0) & (d < 1)).all()
    assert np.corrcoef(np.log(np.ravel(n_open)), np.log(d / (1 - d)))[0, 1] > 0.99


def test_an_observed_library_is_the_total_count(ready, trained):
    sizes = trained(ready, library="observed").get_library_size_factors()["expression"]
    np.testing.assert_allclose(sizes[:45], np.ravel(ready.X[:45, :40].sum(1)))


def test_the_unit_of_size_factors_does_not_matter(ready, small):
    # As counts of a cell, or as shares of a typical one; none where RNA was not measured.
    depth = np.where(np.arange(ready.n_obs) < 45, np.ravel(ready.X[:, :40].sum(1)), np.nan)
    found = []
    for unit in (1.0, np.nanmedian(depth)):
        adata = ready.copy()
        adata.obs["size"] = depth / unit
        pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", size_factor_key="size")
        model = small(adata)
        model.is_trained = True
        found.append(model.get_normalized_expression(library_size="latent", return_numpy=True))
        set_typical(model.program)
        found.append(model.program.rna_typical[1].numpy())
    np.testing.assert_allclose(found[0], found[2], rtol=1e-3)
    np.testing.assert_allclose(found[1], found[3], rtol=0.05)
    # A size factor of 1 is the typical cell of the unit given last; rho stands for shares, so that logits are logs.
    counts = model.get_normalized_expression(return_numpy=True)
    sizes = adata.obs["size"].to_numpy()[:45]
    np.testing.assert_allclose(counts[:45] * sizes[:, None], found[2][:45], rtol=1e-4)
    own = model.get_normalized_expression(library_size=sizes, indices=range(45), return_numpy=True)
    np.testing.assert_allclose(own, found[2][:45], rtol=1e-4)
    share = pm.posterior.draw(model.program, model.minibatch(), "rho")["rho"].sum(-1)
    np.testing.assert_allclose(share, 1, rtol=0.01)
    totals = found[0].sum(1)
    assert 0.8 < totals[:45].mean() / np.nanmean(depth) < 1.25
    assert 0.8 < totals[ATAC_ONLY].mean() / totals[:45].mean() < 1.25


def test_region_factors(ready, shared, trained):
    r = shared.get_region_factors()
    assert r.shape == (60,)
    assert ((r > 0) & (r < 1)).all()
    with pytest.raises(ValueError, match="region_factors=False was chosen"):
        trained(ready, region_factors=False).get_region_factors()
    rna = ready[:45, :40].copy()
    model = trained(rna)
    with pytest.warns(UserWarning, match="get_region_factors: this model has no regions"):
        assert model.get_region_factors().shape == (0,)
    with pytest.warns(UserWarning, match="no regions, and so no accessibility: the result is empty"):
        found = model.get_normalized_accessibility(indices=[3, 1])
    assert found.shape == (2, 0)
    assert list(found.index) == list(rna.obs_names[[3, 1]])
    with pytest.raises(ValueError, match="no regions, and so no accessibility"):
        model.get_normalized_accessibility(return_interval=0.9, n_samples=50)


# ---------------------------------------------------------------------- the bound


def test_the_elbo_is_that_of_the_program(shared):
    cells = shared.minibatch()
    values = [measure(shared.program, cells).elbo / 60 for _ in range(50)]
    found = shared.get_elbo(n_particles=50)
    assert abs(found - np.mean(values)) < 5 * np.std(values) * np.sqrt(2 / 50)
    rows = [measure(shared.program, cells).per_cell() for _ in range(50)]
    errors = shared.get_reconstruction_error(n_particles=50)
    assert set(errors) == {"reconstruction_loss_expression", "reconstruction_loss_accessibility"}
    for name, value in errors.items():
        drawn = [row[name.replace("_loss", "")] for row in rows]
        assert abs(value - np.mean(drawn)) < 5 * np.std(drawn) * np.sqrt(2 / 50)
