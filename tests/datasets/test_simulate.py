from __future__ import annotations

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats

from pyro_multivi.datasets import simulate
from pyro_multivi.datasets.simulate import simulate_multiome


def full_counts(adata, n_genes):
    """What every cell would have shown in both modalities."""
    x = (adata.X[:, :n_genes] + adata.obsm["hidden_x"]).toarray()
    y = (adata.X[:, n_genes:] + adata.obsm["hidden_y"]).toarray()
    return x, y


def equal(left, right):
    return left.shape == right.shape and (left != right).nnz == 0


def test_layout(mosaic):
    assert mosaic.shape == (60, 100)
    assert isinstance(mosaic.X, sp.csr_matrix)
    assert mosaic.X.dtype == np.float32
    assert mosaic.var["feature_types"].tolist() == ["Gene Expression"] * 40 + ["Peaks"] * 60
    assert mosaic.obs["modality"].tolist() == ["paired"] * 30 + ["expression"] * 15 + ["accessibility"] * 15
    assert mosaic.obs["batch"].cat.categories.tolist() == ["batch_0", "batch_1"]
    assert mosaic.obs["cell_type"].nunique() == 4
    assert mosaic.obs_names.is_unique
    assert mosaic.var_names.is_unique


def test_what_was_not_measured_is_hidden_and_nothing_else(mosaic):
    x, y = mosaic.X[:, :40], mosaic.X[:, 40:]
    assert x[:45].sum(1).min() > 0
    assert x[45:].nnz == 0
    assert y[30:45].nnz == 0
    assert y[45:].sum(1).min() > 0
    hidden_x, hidden_y = mosaic.obsm["hidden_x"], mosaic.obsm["hidden_y"]
    assert hidden_x[:45].nnz == 0
    assert hidden_x[45:].sum(1).min() > 0
    assert hidden_y[30:45].sum(1).min() > 0
    assert hidden_y[:30].nnz == hidden_y[45:].nnz == 0


def test_truth_lies_in_its_domain():
    adata = simulate_multiome((20, 5, 5), 40, 60, dropout=0.2)
    np.testing.assert_allclose(adata.obsm["true_rho"].sum(1), 1, rtol=1e-5)
    for key in ("true_p", "true_pi"):
        assert 0 < adata.obsm[key].min() < adata.obsm[key].max() < 1
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    theta, r = adata.var["true_inverse_dispersion"], adata.var["true_region_factor"]
    assert (theta[genes] > 0).all()
    assert theta[~genes].isna().all()
    assert r[~genes].between(0, 1, inclusive="neither").all()
    assert r[genes].isna().all()
    assert adata.obs["true_cell_factor"].between(0, 1, inclusive="neither").all()
    assert (adata.obs["true_library"] > 0).all()


def test_counts_follow_the_stated_process():
    # Standardised sums: each is about Normal(0, 1) if mean and variance are as stated.
    adata = simulate_multiome((1500, 250, 250), 60, 80, n_batches=2, dropout=0.15, seed=3)
    x, y = full_counts(adata, 60)
    library = adata.obs["true_library"].to_numpy()[:, None]
    mean = library * adata.obsm["true_rho"]
    theta, pi = adata.var["true_inverse_dispersion"].to_numpy()[:60], adata.obsm["true_pi"]
    variance = (1 - pi) * (mean + mean**2 / theta + pi * mean**2)
    score_g = (x - (1 - pi) * mean).sum(0) / np.sqrt(variance.sum(0))
    q = (
        adata.obsm["true_p"]
        * adata.obs["true_cell_factor"].to_numpy()[:, None]
        * adata.var["true_region_factor"].to_numpy()[60:]
    )
    score_m = (y - q).sum(0) / np.sqrt((q * (1 - q)).sum(0))
    for score in (score_g, score_m):
        assert abs(score).max() < 4.5
        assert 0.7 < score.std() < 1.3
    # The dispersion, not only the mean: standardised squares average to 1.
    np.testing.assert_allclose(((x - (1 - pi) * mean) ** 2 / variance).mean(), 1, rtol=0.05)
    zero = pi + (1 - pi) * (theta / (theta + mean)) ** theta
    np.testing.assert_allclose((x == 0).mean(), zero.mean(), rtol=0.02)


def test_state_has_the_moments_of_the_prior_and_separates_types():
    adata = simulate_multiome((3000, 0, 0), 5, 5, seed=1)
    z, label = adata.obsm["true_z"], adata.obs["cell_type"].cat.codes.to_numpy()
    np.testing.assert_allclose(z.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(z.var(0), 1, rtol=0.15)
    within = np.mean([z[label == t].var(0) for t in range(4)], axis=0)
    np.testing.assert_allclose(within, 0.1, rtol=0.1)
    for t in range(4):
        np.testing.assert_allclose(z[label == t].mean(0), adata.uns["true_centres"][t], atol=0.05)


def test_library_is_lognormal_per_batch():
    adata = simulate_multiome((4000, 0, 0), 5, 5, n_batches=2, library_sd=0.3, mean_library=500, seed=2)
    log_library = np.log(adata.obs["true_library"])
    by_batch = log_library.groupby(adata.obs["batch"], observed=True)
    np.testing.assert_allclose(by_batch.std(), 0.3, rtol=0.1)
    assert by_batch.mean().diff().abs().iloc[1] > 0.02
    np.testing.assert_allclose(by_batch.mean().mean(), np.log(500), atol=0.02)
    for _, values in by_batch:
        assert scipy.stats.kstest((values - values.mean()) / values.std(), "norm").pvalue > 1e-3


def test_only_differential_features_differ_between_types():
    adata = simulate_multiome((10, 0, 0), 300, 300, differential_fraction=0.2, seed=4)
    genes = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    differential = adata.var["is_differential"].to_numpy()
    assert differential[genes].sum() == differential[~genes].sum() == 60
    at_centre = np.log(adata.varm["true_at_centre"])
    spread = np.ptp(at_centre, axis=1)
    assert spread[~genes & ~differential].max() < 1e-5
    # The softmax moves all other genes by one common factor.
    shift_gt = at_centre[genes & ~differential] - at_centre[genes & ~differential][:1]
    np.testing.assert_allclose(np.ptp(shift_gt, axis=1), 0, atol=1e-5)
    assert np.median(spread[genes & differential]) > 1
    assert spread[differential].min() > 10 * spread[~genes & ~differential].max()


@pytest.mark.parametrize(("n_batches", "differs"), [(1, False), (3, True)])
def test_batches_shift_both_decoders(n_batches, differs):
    adata = simulate_multiome((60, 0, 0), 30, 30, n_batches=n_batches, type_separation=1.0, seed=5)
    for key in ("true_rho", "true_p"):
        # Without variation within a type, cells of one type differ by batch alone.
        one_type = adata.obsm[key][(adata.obs["cell_type"] == "type_0").to_numpy()]
        assert (np.ptp(one_type, axis=0).max() > 1e-3) == differs


def test_fragments_are_positive_as_often():
    adata = simulate_multiome((2000, 0, 0), 5, 50, fragments=True, mean_accessibility=0.7, seed=6)
    _, y = full_counts(adata, 5)
    assert y.max() > 2
    q = (
        adata.obsm["true_p"]
        * adata.obs["true_cell_factor"].to_numpy()[:, None]
        * adata.var["true_region_factor"].to_numpy()[5:]
    )
    score_m = ((y > 0) - q).sum(0) / np.sqrt((q * (1 - q)).sum(0))
    assert abs(score_m).max() < 4.5


def test_same_seed_same_data_and_global_state_unused(global_rng_untouched):
    first = simulate_multiome((10, 5, 5), 20, 30, seed=7)
    again = simulate_multiome((10, 5, 5), 20, 30, seed=7)
    other = simulate_multiome((10, 5, 5), 20, 30, seed=8)
    assert equal(first.X, again.X)
    assert not equal(first.X, other.X)
    np.testing.assert_array_equal(first.obsm["true_rho"], again.obsm["true_rho"])


def test_without_truth_the_same_counts_and_nothing_dense(mosaic):
    lean = simulate_multiome((30, 15, 15), 40, 60, n_batches=2, seed=0, truth=False)
    assert equal(lean.X, mosaic.X)
    assert set(lean.obsm) == {"true_z"}


def test_blocks_are_joined_in_order(monkeypatch):
    monkeypatch.setattr(simulate, "_BLOCK_ENTRIES", 350)
    adata = simulate_multiome((20, 5, 6), 20, 30, type_separation=0, inverse_dispersion=1e5, mean_library=1e5, seed=9)
    assert adata.shape == (31, 50)
    # Deep counts without overdispersion show each cell its own rho.
    x, _ = full_counts(adata, 20)
    np.testing.assert_allclose(x / x.sum(1, keepdims=True), adata.obsm["true_rho"], atol=0.01)
    assert np.ptp(adata.obsm["true_rho"], axis=0).max() > 0.1


def test_survives_h5ad(mosaic, tmp_path):
    mosaic.write_h5ad(tmp_path / "mosaic.h5ad")
    again = anndata.read_h5ad(tmp_path / "mosaic.h5ad")
    assert equal(again.X, mosaic.X)
    assert equal(again.obsm["hidden_y"], mosaic.obsm["hidden_y"])
    assert again.obs.equals(mosaic.obs)
    assert again.uns["simulation"]["n_cells"].tolist() == [30, 15, 15]


def test_mudata_holds_measured_cells_only(mosaic):
    pytest.importorskip("mudata")
    mdata = simulate_multiome((30, 15, 15), 40, 60, n_batches=2, seed=0, return_mudata=True)
    assert mdata.mod["rna"].obs_names.tolist() == mosaic.obs_names[:45].tolist()
    assert mdata.mod["atac"].obs_names.tolist() == [*mosaic.obs_names[:30], *mosaic.obs_names[45:]]
    assert equal(mdata.mod["rna"].X, mosaic.X[:45, :40])
    in_order = mosaic[mdata.obs_names]
    assert mdata.obs["cell_type"].tolist() == in_order.obs["cell_type"].tolist()
    np.testing.assert_array_equal(mdata.obsm["true_z"], in_order.obsm["true_z"])
    at_centre = mdata.mod["atac"].varm["true_at_centre"]
    np.testing.assert_array_equal(at_centre, mosaic.varm["true_at_centre"][40:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_cells": (1, 2)}, r"n_cells is \(1, 2\); give three numbers"),
        ({"n_cells": 300}, r"n_cells is \(300,\); give three numbers"),
        ({"n_cells": (0, 0, 0)}, "not all zero"),
        ({"n_genes": 0}, "n_genes is 0; it must be at least 1"),
        ({"n_batches": 0}, "n_batches=0 is not allowed: give a whole number of at least 1"),
        ({"mean_library": 0.0}, "mean_library is 0.0; it must be finite and positive"),
        ({"batch_effect": -1.0}, "batch_effect is -1.0"),
        ({"type_separation": 1.1}, r"type_separation is 1.1; it must lie in \[0, 1\]"),
        ({"dropout": 1.0}, r"dropout is 1.0; it must lie in \[0, 1\)"),
        ({"mean_accessibility": float("nan")}, "mean_accessibility=nan is not allowed: give a finite number"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        simulate_multiome(**arguments)


def test_one_type_keeps_all_variance_within():
    z = simulate_multiome((2000, 0, 0), 5, 5, n_types=1).obsm["true_z"]
    np.testing.assert_allclose(z.var(0), 1, rtol=0.15)
