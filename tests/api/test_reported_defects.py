"""Defects of other implementations of MultiVI, one test each."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.networks.alignment import mmd
from pyro_multivi.networks.experts import Expert, average
from pyro_multivi.posterior.calibration.fit_shrinkage import clear_shrinkage
from pyro_multivi.posterior.calibration.fit_weights import clear_weight_posteriors


@pytest.fixture
def ready(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality", labels_key="cell_type")
    return mosaic


def trained(adata, epochs=2, **choices):
    options = {name: choices.pop(name) for name in list(choices) if name in TRAINING}
    model = pm.MULTIVI(adata, **{"n_hidden": 6, "n_latent": 2, **choices})
    model.train(epochs, **{"progress_bar": False, "batch_size": 16, **options})
    return model


TRAINING = ("gradient_clip", "early_stopping_monitor", "early_stopping_patience", "early_stopping_min_delta", "seed")


def mudata():
    return pytest.importorskip("mudata")


def as_mudata(adata, order=("rna", "atac")):
    """Each modality with the cells it was measured in."""
    kind = {"rna": "Gene Expression", "atac": "Peaks"}
    word = {"rna": "accessibility", "atac": "expression"}
    parts = {}
    for name in order:
        has = (adata.obs["modality"] != word[name]).to_numpy()
        parts[name] = adata[has, (adata.var["feature_types"] == kind[name]).to_numpy()].copy()
    with mudata_as_given():
        made = mudata().MuData(parts)
    # By name: the cells that only ATAC has come first if ATAC does.
    made.obs["batch"] = adata.obs["batch"].astype(str).reindex(made.obs_names)
    return made


# ---------------------------------------------------------------------- setup


@pytest.mark.parametrize("order", [("rna", "atac"), ("atac", "rna")], ids=str)
def test_cells_need_not_be_padded_with_zeros_nor_modalities_be_in_order(mosaic, order):
    mdata = as_mudata(mosaic, order)
    assert [part.n_obs for part in mdata.mod.values()] == [45, 45]
    report = pm.MULTIVI.setup_mudata(mdata, batch_key="batch", modalities={"rna_layer": "rna", "atac_layer": "atac"})
    assert report.n_cells == {"paired": 30, "expression": 15, "accessibility": 15}
    latent = pd.DataFrame(trained(mdata).get_latent_representation(), mdata.obs_names)
    assert np.isfinite(latent).all(axis=None)
    assert latent.shape == (60, 2)


def test_the_order_of_modalities_changes_nothing(mosaic):
    results = []
    for order in (("rna", "atac"), ("atac", "rna")):
        mdata = as_mudata(mosaic[:30].copy(), order)
        pm.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
        results.append(trained(mdata).get_latent_representation())
    np.testing.assert_array_equal(*results)


def test_modalities_need_not_be_named_when_they_have_their_usual_names(mosaic):
    mdata = as_mudata(mosaic)
    assert pm.MULTIVI.setup_mudata(mdata).n_cells["paired"] == 30


def test_no_protein_and_no_other_modality_is_needed(mosaic):
    mdata = as_mudata(mosaic)
    pm.MULTIVI.setup_mudata(mdata)
    program = trained(mdata).program
    assert not [name for name, _ in program.named_parameters() if "protein" in name]
    with mudata_as_given():
        rna = mudata().MuData({"rna": mdata.mod["rna"].copy()})
    pm.MULTIVI.setup_mudata(rna)
    assert trained(rna).get_latent_representation().shape == (45, 2)


def test_an_anndata_is_taken_as_it_is(ready):
    assert trained(ready).get_latent_representation().shape == (60, 2)


def test_setup_writes_one_documented_key_and_no_index_column(mosaic):
    obs, var, keys = mosaic.obs.copy(), mosaic.var.copy(), set(mosaic.uns)
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch")
    pd.testing.assert_frame_equal(mosaic.obs, obs)
    pd.testing.assert_frame_equal(mosaic.var, var)
    assert set(mosaic.uns) - keys == {"pyro_multivi"}


def test_a_size_factor_is_a_column_or_two(mosaic):
    mosaic.obs["rna_size"], mosaic.obs["atac_size"] = 1.5, 0.4
    for key in ("rna_size", ["rna_size"], ["rna_size", "atac_size"], [None, "atac_size"]):
        pm.MULTIVI.setup_anndata(mosaic, modality_key="modality", size_factor_key=key)
        assert np.isfinite(trained(mosaic).get_elbo())


def test_the_count_check_reads_no_global_random_numbers(mosaic, global_rng_untouched):
    report = pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    assert "raw counts (whole numbers)" in str(report)


# ---------------------------------------------------------------------- the model


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "negative_binomial", "poisson"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-label", "gene-cell"])
def test_every_dispersion_trains(ready, dispersion, likelihood):
    model = trained(ready, dispersion=dispersion, gene_likelihood=likelihood, gradient_clip=100.0)
    assert np.isfinite(model.get_elbo())
    if likelihood != "poisson" and dispersion != "gene-cell":
        rows = {"gene": 1, "gene-batch": 2, "gene-label": 4}[dispersion]
        assert model.program.log_theta.shape == (rows, 40)
        assert model.program.log_theta.any(1).all(), "every set of dispersions has learned"


def test_a_paired_cell_has_the_width_of_an_average_of_two_normals(ready):
    """A weight of one half, squared: 2.83 times narrower than with its square root."""
    model = trained(ready)
    _, joint = model.get_latent_representation(return_dist=True, indices=range(30))
    parts = [model.get_latent_representation(modality=m, return_dist=True, indices=range(30))[1]
             for m in ("expression", "accessibility")]  # fmt: skip
    np.testing.assert_allclose(joint, 0.25 * (parts[0] + parts[1]), rtol=1e-5)
    one = Expert(torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([True]))
    assert average([one, one], torch.tensor([[0.5, 0.5]]))[1].item() ** 2 == pytest.approx(0.5)


def test_mmd_does_not_grow_with_the_batch_size():
    torch.manual_seed(0)
    a, b = torch.randn(64, 2), torch.randn(64, 2) + 2

    def expert(loc):
        return Expert(loc, torch.ones_like(loc), torch.ones(len(loc), dtype=torch.bool))

    whole = mmd(expert(a), expert(b))
    quarters = torch.stack([mmd(expert(x), expert(y)) for x, y in zip(a.split(16), b.split(16), strict=True)])
    assert 0.7 < quarters.mean() / whole < 1.4


@pytest.mark.parametrize("penalty", [None, "None"])
def test_a_model_without_penalty_has_an_elbo(ready, penalty):
    assert np.isfinite(trained(ready, modality_penalty=penalty).get_elbo())


def test_the_elbo_holds_no_penalty(ready):
    model = trained(ready, modality_penalty="Jeffreys")
    elbo = model.get_elbo()
    model.program.alignment = lambda experts, s: next(iter(experts.values())).loc.sum(-1) * 0 + 1e6
    assert model.get_elbo() == elbo


def test_the_library_size_sees_the_depth(ready):
    """Ten times the counts of a cell, ten times its library: normalisation does not hide them."""
    model = trained(ready)
    deeper = ready.copy()
    deeper.X = deeper.X * 10
    sizes = [model.get_library_size_factors(data)["expression"][:45] for data in (ready, deeper)]
    np.testing.assert_allclose(np.log(sizes[1] / sizes[0]), np.log(10), rtol=0.2)
    depth = np.ravel(ready.X[:45, :40].sum(1))
    assert np.corrcoef(np.log(sizes[0]), np.log(depth))[0, 1] > 0.95
    assert np.log(sizes[0]).std() > 0.8 * np.log(depth).std()


def test_the_library_size_is_a_latent_variable_with_a_prior(ready):
    assert (trained(ready).history["kl_l_train"]["kl_l_train"] > 0).all()


def test_a_measured_cell_of_zeros_is_not_taken_for_missing(mosaic):
    rows = mosaic.X.tolil()
    rows[0, 40:] = 0
    mosaic.X = rows.tocsr()
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = trained(mosaic)
    assert np.isfinite(model.get_latent_representation(modality="accessibility", indices=[0])).all()


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("monitor", ["elbo_validation", "reconstruction_loss_validation", "kl_local_validation"])
def test_monitor_patience_and_min_delta_are_the_users(ready, monitor):
    model = trained(ready, 20, early_stopping_monitor=monitor, early_stopping_patience=2, early_stopping_min_delta=1e6)
    assert len(model.history["elbo_train"]) == 3


def test_gradients_may_be_clipped(ready):
    free, clipped = trained(ready), trained(ready, gradient_clip=1e-6)
    assert not torch.equal(free.program.log_theta, clipped.program.log_theta)


def test_history_tells_the_parts(ready):
    names = set(trained(ready).history)
    assert {"reconstruction_expression_train", "reconstruction_accessibility_validation", "kl_z_train",
            "alignment_train"} <= names  # fmt: skip


def test_reconstructions_are_not_diluted_by_cells_that_lack_the_modality(ready):
    model = trained(ready)
    errors = model.get_reconstruction_error(seed=3)
    of_rna = model.get_reconstruction_error(indices=range(45), seed=3)
    assert errors["reconstruction_loss_expression"] == pytest.approx(of_rna["reconstruction_loss_expression"], rel=1e-5)


def test_one_batch_trains_without_nan(mosaic):
    mosaic.obs["one"] = "only"
    pm.MULTIVI.setup_anndata(mosaic, batch_key="one", modality_key="modality")
    assert np.isfinite(trained(mosaic).history["train_loss"]).all(axis=None)


# ---------------------------------------------------------------------- latent state and accessors


@pytest.mark.parametrize("weights", ["universal", "cell"])
def test_learned_weights_serve_cells_that_were_held_out_or_are_new(ready, weights):
    model = trained(ready, 8, modality_weights=weights)
    new = pm.simulate_multiome((12, 5, 5), n_genes=40, n_regions=60, n_batches=2, seed=9)
    latent = model.get_latent_representation(new)
    assert latent.shape == (22, 2)
    assert np.isfinite(latent).all()
    held_out = model._split.validation.numpy()
    assert np.isfinite(model.get_latent_representation(indices=held_out)).all()
    if weights == "cell":
        cells = model.minibatch(held_out)
        experts = model.program.experts(cells, cells.design, model.program.encode(cells, cells.design))
        logits = [model.program.weight_logit(name, expert) for name, expert in experts.items()]
        assert (logits[0] - logits[1]).std() > 0, "the weights of held-out cells are their own"


def test_a_mean_of_ln_does_not_vary(ready):
    model = trained(ready, latent_distribution="ln")
    np.testing.assert_array_equal(model.get_latent_representation(), model.get_latent_representation())


def test_cells_without_a_modality_get_nan_and_no_constant_vector(ready):
    latent = trained(ready).get_latent_representation(modality="expression")
    assert np.isnan(latent[45:]).all()


def test_library_sizes_are_counts_and_nan_where_not_measured(ready):
    sizes = trained(ready).get_library_size_factors()
    assert sizes["expression"][:45].min() > 50
    assert np.isnan(sizes["expression"][45:]).all()
    assert np.isnan(sizes["accessibility"][30:45]).all()


def test_models_of_rna_alone_answer_or_say_what_they_cannot(mosaic):
    rna = mosaic[:45, :40].copy()
    pm.MULTIVI.setup_anndata(rna)
    model = trained(rna)
    assert set(model.get_library_size_factors()) == {"expression"}
    assert model.get_normalized_expression().shape == (45, 40)
    for ask in (model.get_region_factors, model.get_accessibility_estimates):
        with pytest.warns(UserWarning, match=r"no regions.*: the result is empty"):
            assert ask().size == 0


def test_posterior_samples_are_samples_of_the_posterior(ready):
    model = trained(ready)
    draws = model.get_normalized_expression(n_samples=3, return_mean=False, return_numpy=True)
    assert draws.shape == (3, 60, 40)
    assert np.ptp(draws, 0).max() > 0
    assert model.get_normalized_expression(n_samples_overall=3).shape == (60, 40)
    # A mean is that of the fitted decoder, and what is imputed is drawn towards the mean of the measured; draws are of
    # the last layer too.
    clear_weight_posteriors(model.program)
    clear_shrinkage(model.program)
    draws = model.get_normalized_expression(n_samples=3, return_mean=False, return_numpy=True)
    mean = model.get_normalized_expression(n_samples=3, return_mean=True, return_numpy=True)
    np.testing.assert_allclose(draws.mean(0), mean, rtol=1e-4)


def test_there_is_a_marginal_likelihood(ready):
    model = trained(ready)
    assert model.get_marginal_ll(n_mc_samples=20) > model.get_elbo(n_particles=20)


def test_draws_have_seeds_of_their_own(ready, global_rng_untouched):
    model = trained(ready)
    one = model.get_latent_representation(give_mean=False, seed=1)
    np.testing.assert_array_equal(one, model.get_latent_representation(give_mean=False, seed=1))


# ---------------------------------------------------------------------- files


def test_a_loaded_model_needs_no_training_step(ready, tmp_path):
    model = trained(ready)
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", ready)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert len({tuple(row) for row in loaded.get_latent_representation()}) == 60


def test_training_goes_on_where_it_stopped(ready, tmp_path):
    model = trained(ready)
    model.save(tmp_path / "model")
    loaded = pm.MULTIVI.load(tmp_path / "model", ready)
    loaded.train(2, progress_bar=False)
    assert len(loaded.history["train_loss"]) == 4
