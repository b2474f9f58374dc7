"""What the simulator put into the data is found again by the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import pyro_multivi as pm

N = (120, 90, 90)
PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 120), slice(120, 210), slice(210, 300)


@pytest.fixture(scope="module")
def fitted():
    """A mosaic of four types in two batches, and a model of it."""
    adata = pm.simulate_multiome(
        N, n_genes=80, n_regions=160, n_batches=2, differential_fraction=0.6, mean_accessibility=0.4, seed=2
    )
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=16, n_latent=4, gene_likelihood="nb")
    with torch.random.fork_rng():
        model.train(80, lr=5e-3, batch_size=32, progress_bar=False, n_epochs_kl_warmup=10)
    return adata, model


def of_the_same_type(latent, labels, asked, among, k=10):
    """Share of the k nearest ``among`` cells that are of the type of the ``asked`` cell."""
    _, found = cKDTree(latent[among]).query(latent[asked], k=k)
    return (labels[among][found] == labels[asked][:, None]).mean()


def test_training_explains_the_data_better_than_the_marginals(fitted):
    adata, model = fitted
    before = pm.MULTIVI(adata, n_hidden=16, n_latent=4, gene_likelihood="nb")
    before.is_trained = True
    assert model.get_elbo() > before.get_elbo() + 5


def test_library_sizes_are_recovered(fitted):
    adata, model = fitted
    size, truth = model.get_library_size_factors()["expression"][:210], adata.obs["true_library"].to_numpy()[:210]
    assert np.corrcoef(np.log(size), np.log(truth))[0, 1] > 0.95
    # On the scale of counts, not only in order.
    assert abs(np.log(size / truth).mean()) < 0.1


def test_accessibility_factors_are_recovered_in_order(fitted):
    adata, model = fitted
    measured = np.r_[0:120, 210:300]
    d, truth = model.get_library_size_factors()["accessibility"], adata.obs["true_cell_factor"].to_numpy()
    assert np.corrcoef(np.log(d[measured]), np.log(truth[measured]))[0, 1] > 0.6
    r, truth = model.get_region_factors(), adata.var["true_region_factor"].to_numpy()[80:]
    assert np.corrcoef(r, truth)[0, 1] > 0.2


def test_neighbours_in_the_latent_space_are_of_one_type(fitted):
    adata, model = fitted
    latent, labels = model.get_latent_representation(), adata.obs["cell_type"].to_numpy().astype(str)
    everyone = np.arange(300)
    # Eleven neighbours, the first of which is the cell itself.
    _, found = cKDTree(latent).query(latent, k=11)
    assert (labels[found[:, 1:]] == labels[everyone][:, None]).mean() > 0.8


@pytest.mark.parametrize(
    ("asked", "among"),
    [(RNA_ONLY, ATAC_ONLY), (ATAC_ONLY, RNA_ONLY), (RNA_ONLY, PAIRED), (ATAC_ONLY, PAIRED)],
    ids=["rna-atac", "atac-rna", "rna-paired", "atac-paired"],
)
def test_neighbours_across_modalities_are_of_one_type(fitted, asked, among):
    adata, model = fitted
    latent, labels = model.get_latent_representation(), adata.obs["cell_type"].to_numpy().astype(str)
    chance = max(np.mean(labels[among] == label) for label in np.unique(labels))
    share = of_the_same_type(latent, labels, asked, among)
    assert share > 0.7
    assert share > chance + 0.25


def test_both_modalities_place_a_paired_cell_alike(fitted):
    _, model = fitted
    rna = model.get_latent_representation(modality="expression")[PAIRED]
    atac = model.get_latent_representation(modality="accessibility")[PAIRED]
    spread = np.square(rna - rna.mean(0)).sum(1).mean()
    assert np.square(rna - atac).sum(1).mean() < 0.5 * spread


def test_expression_that_was_not_measured_is_imputed(fitted):
    adata, model = fitted
    found = model.get_normalized_expression(indices=np.arange(210, 300), return_numpy=True)
    truth = adata.obsm["true_rho"][ATAC_ONLY]
    differential = adata.var["is_differential"].to_numpy()[:80]

    def error(guess):
        return np.square(np.log(guess) - np.log(truth))[:, differential].mean()

    # Better than the mean profile of the cells that have RNA.
    assert error(found) < 0.6 * error(adata.obsm["true_rho"][:210].mean(0)[None])


def test_accessibility_that_was_not_measured_is_imputed(fitted):
    adata, model = fitted
    found = model.get_accessibility_estimates(indices=np.arange(120, 210), return_numpy=True)
    truth = adata.obsm["true_p"][RNA_ONLY]
    differential = adata.var["is_differential"].to_numpy()[80:]
    # p is known up to a factor of the region: cells are compared within each region.
    within = [np.corrcoef(found[:, j], truth[:, j])[0, 1] for j in np.flatnonzero(differential)]
    assert np.median(within) > 0.5
