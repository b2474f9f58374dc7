"""What the simulator put into the data is found again by the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import pyro_multivi as pm

PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 200), slice(200, 300), slice(300, 400)
HAS_RNA, HAS_ATAC = np.arange(300), np.r_[0:200, 300:400]


@pytest.fixture(scope="module")
def fitted():
    """A mosaic of four types in two batches, and a model of it."""
    adata = pm.simulate_multiome(
        (200, 100, 100), 100, 300, n_batches=2, differential_fraction=0.6, mean_accessibility=0.4, seed=2
    )
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=32, n_latent=5, gene_likelihood="nb", modality_penalty="MMD")
    with torch.random.fork_rng():
        # After 40 some seeds have not found the types from ATAC alone (0.77); after 80 it is 0.94 at least.
        model.train(80, lr=1e-2, batch_size=32, progress_bar=False, n_epochs_kl_warmup=10)
    return adata, model


def of_the_same_type(adata, latent, queried, among, k=10):
    """Share of the k nearest ``among`` cells that are of the type of the ``queried`` cell."""
    labels = adata.obs["cell_type"].to_numpy().astype(str)
    _, found = cKDTree(latent[among]).query(latent[queried], k=k)
    return (labels[among][found] == labels[queried][:, None]).mean()


def test_training_explains_the_data_better_than_the_marginals(fitted):
    adata, model = fitted
    before = pm.MULTIVI(adata, n_hidden=32, n_latent=5, gene_likelihood="nb")
    before.is_trained = True
    held_out = model._split.validation.numpy()
    assert model.get_elbo(indices=held_out) > before.get_elbo(indices=held_out) + 15


def test_library_sizes_are_recovered(fitted):
    adata, model = fitted
    size = model.get_library_size_factors()["expression"][HAS_RNA]
    truth = adata.obs["true_library"].to_numpy()[HAS_RNA]
    assert np.corrcoef(np.log(size), np.log(truth))[0, 1] > 0.95
    # On the scale of counts, not only in order.
    assert abs(np.log(size / truth).mean()) < 0.1
    assert 0.8 < np.log(size).std() / np.log(truth).std() < 1.25


def test_accessibility_factors_are_recovered_in_order(fitted):
    adata, model = fitted
    d, truth = model.get_library_size_factors()["accessibility"], adata.obs["true_cell_factor"].to_numpy()
    assert np.corrcoef(np.log(d[HAS_ATAC]), np.log(truth[HAS_ATAC]))[0, 1] > 0.6
    truth = adata.var["true_region_factor"].to_numpy()[100:]
    # p and r are identified only where p varies.
    assert np.corrcoef(model.get_region_factors(), truth)[0, 1] > 0.3


def test_neighbours_in_the_latent_space_are_of_one_type(fitted):
    adata, model = fitted
    latent, every = model.get_latent_representation(), np.arange(400)
    assert of_the_same_type(adata, latent, every, every) > 0.9


@pytest.mark.parametrize(
    ("queried", "among"),
    [(RNA_ONLY, ATAC_ONLY), (ATAC_ONLY, RNA_ONLY), (RNA_ONLY, PAIRED), (ATAC_ONLY, PAIRED)],
    ids=["rna-atac", "atac-rna", "rna-paired", "atac-paired"],
)
def test_neighbours_across_modalities_are_of_one_type(fitted, queried, among):
    adata, model = fitted
    assert of_the_same_type(adata, model.get_latent_representation(), queried, among) > 0.85


def test_both_modalities_place_a_paired_cell_alike(fitted):
    _, model = fitted
    rna = model.get_latent_representation(modality="expression")[PAIRED]
    atac = model.get_latent_representation(modality="accessibility")[PAIRED]
    spread = np.square(rna - rna.mean(0)).sum(1).mean()
    assert np.square(rna - atac).sum(1).mean() < 0.3 * spread


def test_batches_do_not_separate_within_a_type(fitted):
    adata, model = fitted
    latent, batch = model.get_latent_representation(), adata.obs["batch"].to_numpy().astype(str)
    _, found = cKDTree(latent).query(latent, k=21)
    mixed = (batch[found[:, 1:]] != batch[:, None]).mean()
    assert mixed > 0.7 * np.mean([np.mean(batch != one) for one in batch])


def test_expression_that_was_not_measured_is_imputed(fitted):
    adata, model = fitted
    found = model.get_normalized_expression(indices=np.arange(400)[ATAC_ONLY], return_numpy=True)
    truth = adata.obsm["true_rho"]
    differential = adata.var["is_differential"].to_numpy()[:100]

    def error(guess):
        return np.square(np.log(guess) - np.log(truth[ATAC_ONLY]))[:, differential].mean()

    # Better than the mean profile of the cells that have RNA.
    assert error(found) < 0.5 * error(truth[HAS_RNA].mean(0)[None])


def test_accessibility_that_was_not_measured_is_imputed(fitted):
    adata, model = fitted
    found = model.get_accessibility_estimates(indices=np.arange(400)[RNA_ONLY], return_numpy=True)
    truth = adata.obsm["true_p"][RNA_ONLY]
    differential = adata.var["is_differential"].to_numpy()[100:]
    # p is known up to a factor of the region: cells are compared within each region.
    # A region that is open in nearly every cell may be at 1 in float32.
    varies = found.std(0) > 0
    assert varies[differential].mean() > 0.95
    within = [np.corrcoef(found[:, j], truth[:, j])[0, 1] for j in np.flatnonzero(differential & varies)]
    assert np.median(within) > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("library", ["latent", "observed"])
@pytest.mark.parametrize("penalty", ["Jeffreys", "MMD", None])
def test_other_choices_find_the_types_too(penalty, library):
    adata = pm.simulate_multiome((300, 150, 150), n_genes=150, n_regions=400, differential_fraction=0.6, seed=0)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=32, n_latent=5, modality_penalty=penalty, library=library)
    model.train(150, lr=1e-2, batch_size=16, progress_bar=False)
    every = np.arange(600)
    assert of_the_same_type(adata, model.get_latent_representation(), every, every) > 0.9
