"""The mixture prior of the latent state: its density, and what becomes of it in training, queries and files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from scipy.special import logsumexp
from scipy.stats import norm

import pyro_multivi as pm


def log_density(prior, z, s):
    """By scipy, from the parameters."""
    centre, log_scale, logits = (value.detach().numpy() for value in prior.parameters())
    weights = logits - logsumexp(logits, 1, keepdims=True)
    parts = norm.logpdf(z[:, None], centre, np.exp(log_scale)).sum(-1)
    return logsumexp(weights[s.argmax(1)] + parts, 1)


def test_its_density_is_that_of_scipy_value_and_gradient(make_program, make_cells):
    program, cells = make_program(torch.float64, latent_prior="mixture"), make_cells(dtype=torch.float64)
    prior, s = program.latent_mixture, cells.design
    z = torch.randn(len(cells), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = program.z_prior(s).log_prob(z)
    np.testing.assert_allclose(found.detach(), log_density(prior, z.numpy(), s[:, :2].numpy()), rtol=1e-12)
    found.sum().backward()
    for parameter in prior.parameters():
        numeric = torch.zeros_like(parameter)
        for place in range(parameter.numel()):
            change = torch.zeros_like(parameter).view(-1)
            change[place] = 1e-5
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(sign * change.view_as(parameter))
                    values.append(log_density(prior, z.numpy(), s[:, :2].numpy()).sum())
                    parameter.sub_(sign * change.view_as(parameter))
            numeric.view(-1)[place] = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(parameter.grad, numeric, rtol=1e-6, atol=1e-7)


def test_at_first_it_has_about_the_moments_of_a_standard_normal():
    prior = pm.MultiVIProgram(pm.ProgramConfig(5, 0, n_latent=20, latent_prior="mixture")).z_prior(
        torch.ones(20_000, 1)
    )
    draws = prior.sample()
    assert abs(draws.mean().item()) < 0.15
    assert 0.85 < draws.var(0).mean().item() < 1.15


@pytest.fixture(scope="module")
def model():
    """Of two batches, the second of which lacks a type."""
    adata = pm.simulate_multiome((400, 0, 0), n_genes=40, n_regions=60, n_types=3, n_batches=2, seed=0)
    lacks = (adata.obs["batch"] == "batch_1") & (adata.obs["cell_type"] == "type_0")
    adata = adata[~lacks.to_numpy()].copy()
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    model = pm.MULTIVI(adata, n_hidden=16, n_latent=3, latent_prior="mixture")
    model.train(max_epochs=10, progress_bar=False)
    return model


def test_it_is_learned_and_evaluated(model):
    prior = model.program.latent_mixture
    assert not torch.equal(prior.logits[0], prior.logits[1])
    assert (model.history["kl_z_validation"] > 0).all().item()
    # The bound with importance weights is the tighter one.
    assert model.get_marginal_ll(n_mc_samples=50) > model.get_elbo()


def test_saving_keeps_it(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", model.adata)
    assert loaded.program.config.latent_prior == "mixture"
    assert loaded.get_elbo() == model.get_elbo()


def test_a_query_learns_the_weights_of_its_batch_alone(model):
    query = model.adata[model.adata.obs["cell_type"] == "type_0"].copy()
    query.obs["batch"] = "new"
    mapped = pm.MULTIVI.load_query_data(query, model)
    known, logits = model.program.latent_mixture.logits, mapped.program.latent_mixture.logits
    # A new batch starts as an average batch.
    torch.testing.assert_close(logits[2], known.mean(0))
    start = logits.detach().clone()
    mapped.train(max_epochs=5, progress_bar=False)
    assert torch.equal(logits[:2], start[:2])
    assert not torch.equal(logits[2], start[2])
    assert torch.equal(mapped.program.latent_mixture.centre, model.program.latent_mixture.centre)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_without_a_type_does_not_lie_beside_the_others(seed):
    """Cells of the types that all three batches have: neighbours of the same batch, 1/3 is mixed.

    Normal(0, I): 0.60 0.51 0.61 over three seeds; a mixture: 0.40 0.39 0.48.
    """
    adata = pm.simulate_multiome(
        (450, 0, 0), n_genes=200, n_regions=300, n_types=3, n_batches=3, batch_effect=1.0, seed=seed
    )
    batch, kind = (adata.obs[column].astype(str).to_numpy() for column in ("batch", "cell_type"))
    kept = ~((batch == "batch_0") & (kind == "type_0"))
    adata, batch, kind = adata[kept].copy(), batch[kept], kind[kept]
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", batch_key="batch")
    same = {}
    for prior in ("normal", "mixture"):
        model = pm.MULTIVI(adata, n_hidden=32, n_latent=6, latent_prior=prior)
        model.train(max_epochs=150, early_stopping=False, progress_bar=False)
        latent = model.get_latent_representation()
        near = KDTree(latent).query(latent, 16)[1][:, 1:]
        assert np.mean(kind[near] == kind[:, None]) > 0.98
        common = kind != "type_0"
        near = KDTree(latent[common]).query(latent[common], 16)[1][:, 1:]
        same[prior] = np.mean(batch[common][near] == batch[common][:, None])
    assert same["mixture"] < same["normal"] - 0.05
