"""Proteins as an analyst meets them: any subset of modalities, estimates, differential tests, files, queries."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.plots.report import check_and_report

KEYS = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "protein_expression"}


def simulated(**changes):
    sizes = {"n_genes": 20, "n_regions": 25, "n_batches": 2, "n_proteins": 6, "stained": 0.6, "seed": 1}
    adata = pm.simulate_multiome((60, 20, 20), **{**sizes, **changes})
    # One antibody less in the second panel.
    counts = adata.obsm["protein_expression"]
    counts.loc[adata.obs["batch"] == "batch_1", "protein_5"] = 0.0
    return adata


@pytest.fixture(scope="module")
def adata():
    found = simulated()
    pm.MULTIVI.setup_anndata(found, **KEYS)
    return found


@pytest.fixture(scope="module")
def model(adata):
    found = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    found.train(3, batch_size=64, progress_bar=False)
    return found


def test_history_and_elbo_have_the_terms_of_proteins(model, adata):
    for name in ("reconstruction_protein_train", "kl_protein_background_train"):
        assert np.isfinite(model.history[name].to_numpy()).all()
    errors = model.get_reconstruction_error(return_mean=False)["reconstruction_loss_protein"]
    np.testing.assert_array_equal(np.isnan(errors), ~adata.obs["has_protein"])
    assert np.isfinite(model.get_elbo())
    assert model.n_proteins == 6
    assert "6 protein" in repr(model)


def test_the_state_given_proteins_alone(model, adata):
    alone = model.get_latent_representation(modality="protein")
    np.testing.assert_array_equal(np.isnan(alone).all(1), ~adata.obs["has_protein"])


def test_normalized_expression_is_that_of_the_formula(model):
    cells = model.minibatch()
    sites = ("protein_foreground_probability", "protein_foreground_mean", "protein_mean", "protein_background_mean")
    drawn = pm.posterior.draw(model.program, cells, sites, n_samples=3, seed=4)
    probability, foreground, mean, background = (drawn[site].numpy() for site in sites)
    found = model.get_normalized_protein_expression(n_samples=3, seed=4, return_mean=False)
    np.testing.assert_allclose(found, foreground, rtol=1e-5)
    both = model.get_normalized_protein_expression(n_samples=3, seed=4, include_protein_background=True)
    np.testing.assert_allclose(both, mean.mean(0), rtol=1e-5)
    np.testing.assert_allclose(mean, foreground + (1 - probability) * background, rtol=1e-4)
    share = model.get_protein_foreground_probability(n_samples=3, seed=4, protein_list=["protein_3", "protein_0"])
    assert list(share.columns) == ["protein_3", "protein_0"]
    np.testing.assert_allclose(share, probability.mean(0)[:, [3, 0]], rtol=1e-5)
    shares = model.get_normalized_protein_expression(scale_protein=True, protein_list=[1, 2])
    whole = model.get_normalized_protein_expression()
    np.testing.assert_allclose(shares, whole.iloc[:, [1, 2]].div(whole.sum(axis=1), axis=0), rtol=1e-4)
    pd.testing.assert_frame_equal(model.get_extra_estimates("protein"), whole)


def test_estimates_do_not_depend_on_the_batch_size_and_have_intervals(model, adata, tmp_path):
    given = {"n_samples": 40, "return_interval": 0.9}
    found = model.get_normalized_protein_expression(**given)
    assert (found.lower <= found.upper).all(axis=None)
    both = model.get_normalized_protein_expression(include_protein_background=True, **given)
    assert (both.lower > 0).all(axis=None)
    assert (both.lower < both.upper).all(axis=None)
    # Of draws that know the counts; where there are none it is the expectation given the state.
    hidden = ~adata.obs["has_protein"].to_numpy()
    expected = model.get_normalized_protein_expression(n_samples=400)[hidden].mean()
    drawn = model.get_normalized_protein_expression(n_samples=400, return_interval=0.9).mean[hidden].mean()
    np.testing.assert_allclose(drawn, expected, rtol=0.1)
    shares = model.get_normalized_protein_expression(scale_protein=True, **given)
    assert shares.upper.max(axis=None) <= 1
    small = model.get_normalized_protein_expression(batch_size=7, **given)
    np.testing.assert_allclose(small.upper, found.upper, rtol=1e-4)
    path = model.get_normalized_protein_expression(out=tmp_path / "proteins.h5ad", **given)
    assert pm.read(path).shape == (100, 6)
    few = model.get_normalized_protein_expression(batch_size=7)
    np.testing.assert_allclose(few, model.get_normalized_protein_expression(), rtol=1e-4)


def test_proteins_are_imputed_beside_the_others(model, adata, tmp_path):
    found = model.impute()
    stained = adata.obs["has_protein"].to_numpy()
    in_panel = (adata.obs["batch"] == "batch_0").to_numpy()
    assert list(found.var["feature_types"]) == ["Gene Expression"] * 20 + ["Peaks"] * 25 + ["Antibody Capture"] * 6
    kinds = np.where(~stained, "imputed", np.where(in_panel, "measured", "measured in part"))
    assert list(found.obs["protein_source"]) == list(kinds)
    counts, imputed = found.X[:, 45:].toarray(), found.layers["imputed"][:, 45:].toarray()
    np.testing.assert_array_equal(counts, adata.obsm["protein_expression"])
    gaps = np.repeat(~stained[:, None], 6, axis=1)
    gaps[:, 5] |= ~in_panel
    whole = model.get_normalized_protein_expression(return_numpy=True)
    np.testing.assert_allclose(imputed, np.where(gaps, whole, 0), rtol=1e-4)
    given = {"n_samples": 20, "return_interval": 0.9, "indices": np.arange(0, 100, 9)}
    both = model.impute(**given, include_protein_background=True, measured_too=True)
    expected = model.get_normalized_protein_expression(**given, include_protein_background=True, return_numpy=True)
    np.testing.assert_allclose(both.layers["imputed_upper"][:, 45:].toarray(), expected.upper, rtol=1e-4)
    path = model.impute(**given, include_protein_background=True, measured_too=True, out=tmp_path / "filled.h5ad")
    assert (pm.read(path).layers["imputed_lower"] != both.layers["imputed_lower"]).nnz == 0


def test_of_a_mudata_comes_a_mudata_with_proteins():
    pytest.importorskip("mudata")
    mdata = pm.simulate_multiome((20, 10, 10), n_genes=8, n_regions=9, n_proteins=3, stained=0.5, return_mudata=True)
    mdata.mod["adt"] = mdata.mod.pop("protein")
    pm.MULTIVI.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac", "protein_layer": "adt"})
    model = pm.MULTIVI(mdata, n_hidden=8, n_latent=2)
    model.train(1, progress_bar=False)
    found = model.impute()
    assert {name: part.shape for name, part in found.mod.items()} == {"rna": (40, 8), "atac": (40, 9), "adt": (40, 3)}
    missing = (found.obs["protein_source"] == "imputed").to_numpy()
    assert (found.mod["adt"].layers["imputed"][missing].toarray() > 0).all()


def test_predictive_checks_know_proteins(model, adata, tmp_path):
    replicates = model.posterior_predictive_sample(n_samples=2)
    assert list(replicates) == ["x", "y", "protein"]
    assert replicates["protein"][1].shape == (100, 6)
    check = model.posterior_predictive_check(n_samples=40, held_out=False)
    assert set(check.extra["statistic"]) == {"mean", "variance", "cv", "zero_fraction"}
    # The last is of one panel only.
    assert set(check.extra["feature"]) == {f"protein_{place}" for place in range(5)}
    stained = adata.obsm["protein_expression"][adata.obs["has_protein"]].to_numpy()[:, :5]
    means = check.extra[check.extra["statistic"] == "mean"]
    np.testing.assert_allclose(means["observed"], stained.mean(0), rtol=1e-6)
    depth = check.cells[check.cells["statistic"] == "protein_depth"]
    np.testing.assert_allclose(depth["observed"], stained.sum(1))
    summary = check.summary()
    assert (summary["table"] == "extra: protein").sum() == 4
    assert not summary.loc[summary["statistic"] == "protein_depth", "fails"].isna().any()
    assert {"cells, proteins", "hidden protein", "hidden expression"} <= set(check.scores["setting"])
    assert (check.imputed["modality"] == "protein").sum() == 5
    assert list(check.feature_tables) == ["genes", "regions", "proteins"]
    check_and_report(model, tmp_path, n_samples=40, held_out=False)
    page = (tmp_path / "check.html").read_text()
    assert "Proteins: observed against replicated" in page
    assert "Proteins reproduced worst" in page


def test_another_batch_is_decoded_with_its_background(model):
    one, other = (model.get_normalized_protein_expression(transform_batch=name) for name in ("batch_0", "batch_1"))
    both = model.get_normalized_protein_expression(transform_batch=["batch_0", "batch_1"])
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-4)
    assert not np.allclose(one, other, rtol=0.01)


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_differential_expression_of_proteins(model, adata, unit):
    table = model.differential_protein_expression(groupby="cell_type", group1="type_0", unit=unit, n_samples=200)
    assert sorted(table.index) == [f"protein_{place}" for place in range(6)]
    in_group = (adata.obs["cell_type"] == "type_0").to_numpy() & adata.obs["has_protein"].to_numpy()
    # The last is of one panel only: it is compared between cells of that panel.
    in_panel = in_group & (adata.obs["batch"] == "batch_0").to_numpy()
    mean = adata.obsm["protein_expression"][in_group].mean()
    mean["protein_5"] = adata.obsm["protein_expression"]["protein_5"][in_panel].mean()
    np.testing.assert_allclose(table["raw_mean1"], mean[table.index], rtol=1e-5)
    n_measured = {name: in_group.sum() for name in table.index} | {"protein_5": in_panel.sum()}
    assert table["n_measured1"].to_dict() == n_measured
    assert table["proba_de"].between(0, 1).all()
    one = model.differential_protein_expression(groupby="cell_type", protein_list=["protein_5"], n_samples=50)
    assert set(one.index) == {"protein_5"}
    extra = model.differential_extra("protein", groupby="cell_type", group1="type_0", n_samples=200)
    assert "raw_mean1" not in extra


def test_the_test_of_counts_finds_a_protein_that_differs():
    adata = simulated(stained=1.0, n_batches=1)
    is_first = (adata.obs["cell_type"] == "type_0").to_numpy()
    rng = np.random.default_rng(0)
    counts = adata.obsm["protein_expression"]
    counts["protein_0"] = rng.poisson(np.where(is_first, 40.0, 10.0)).astype(np.float32)
    counts["protein_1"] = rng.poisson(10.0, size=len(counts)).astype(np.float32)
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(2, progress_bar=False)
    found = model.differential_protein_expression(groupby="cell_type", group1="type_0")
    expected = np.log2((counts["protein_0"][is_first].mean() + 1) / (counts["protein_0"][~is_first].mean() + 1))
    assert found.loc["protein_0", "lfc_mean"] == pytest.approx(expected, abs=0.15)
    assert found.loc["protein_0", "is_de_fdr_0.05"]
    assert not found.loc["protein_1", "is_de_fdr_0.05"]
    assert found.attrs["changed_as_a_whole"] == []


def test_saved_and_loaded_it_is_the_same(model, adata, tmp_path):
    model.save(tmp_path / "model", save_anndata=True)
    again = pm.MULTIVI.load(tmp_path / "model")
    assert again.get_elbo() == model.get_elbo()
    assert again.spec == model.spec
    assert again.spec.missing_proteins == {"batch_1": ("protein_5",)}
    pd.testing.assert_frame_equal(again.get_normalized_protein_expression(), model.get_normalized_protein_expression())


@pytest.mark.parametrize("kept", [("x",), ("y",), ("x", "y")])
def test_proteins_beside_one_modality_or_both(kept):
    adata = simulated()
    types = {"x": "Gene Expression", "y": "Peaks"}
    adata = adata[:, adata.var["feature_types"].isin([types[name] for name in kept])].copy()
    adata = adata[(adata.X.sum(1).A1 > 0) | adata.obs["has_protein"].to_numpy()].copy()
    without = adata.X.sum(1).A1 == 0
    report = pm.MULTIVI.setup_anndata(adata, **{**KEYS, "modality_key": None})
    assert report.n_cells.get("protein", 0) == without.sum()
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(2, progress_bar=False)
    assert np.isfinite(model.get_elbo())
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_normalized_protein_expression()).all(axis=None)
    # From proteins alone, too.
    imputed = model.impute(normalize_regions=True).layers["imputed"].toarray()
    n_measured = adata.n_vars
    assert (imputed[without][:, :n_measured] > 0).all()
    assert (imputed[~adata.obs["has_protein"].to_numpy()][:, n_measured:] > 0).all()
    if "x" in kept:
        assert np.isfinite(model.get_normalized_expression()).all(axis=None)
    if "y" in kept:
        assert np.isfinite(model.get_accessibility_estimates()).all(axis=None)


def test_a_model_without_proteins_says_how_to_have_them():
    adata = simulated()
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", extra_obsm_keys=["protein_expression"])
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(1, progress_bar=False)
    for method in (
        model.get_normalized_protein_expression,
        model.get_protein_foreground_probability,
        model.differential_protein_expression,
    ):
        with pytest.raises(ValueError, match=f"{method.__name__}: this model has no proteins.*protein_layer"):
            method()
    with pytest.raises(ValueError, match="name='protein_expression': this model has no extra modality"):
        model.get_extra_estimates("protein_expression")
    assert model.n_proteins == 0


def test_minified_data_keep_proteins_and_what_follows_from_them(adata):
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(1, progress_bar=False)
    before = model.get_normalized_protein_expression(n_samples=4)
    upper = model.get_normalized_protein_expression(n_samples=40, return_interval=0.9).upper
    model.minify_adata()
    again = model.get_normalized_protein_expression(n_samples=40, return_interval=0.9).upper
    pd.testing.assert_frame_equal(again, upper, rtol=1e-4)
    pd.testing.assert_frame_equal(model.get_normalized_protein_expression(n_samples=4), before, rtol=1e-4)
    assert model.get_latent_representation(modality="protein").shape == (100, 2)


def test_a_query_has_its_own_panel_and_background(adata):
    adata = simulated(n_batches=3, stained=1.0)
    reference = adata[adata.obs["batch"] != "batch_2"].copy()
    query = adata[adata.obs["batch"] == "batch_2"].copy()
    counts = query.obsm["protein_expression"]
    counts["protein_2"] = 0.0
    query.obsm["protein_expression"] = counts.drop(columns="protein_4")
    pm.MULTIVI.setup_anndata(reference, **KEYS)
    model = pm.MULTIVI(reference, n_hidden=8, n_latent=2)
    model.train(1, progress_bar=False)
    mapped = pm.MULTIVI.load_query_data(query, model)
    assert mapped.spec.missing_proteins["batch_2"] == ("protein_2", "protein_4")
    report = mapped.query_report
    assert report.missing_proteins == {"batch_2": 2}
    assert "proteins    2 without a count in batch_2, where they count as not measured" in str(report)
    saved = report.to_dict()
    assert type(report).from_dict(saved) == report
    del saved["missing_proteins"]  # as versions before wrote it
    assert type(report).from_dict(saved).new_batches == report.new_batches
    background = mapped.program.extra["protein"].background_log_mean.detach().numpy()
    kept = [0, 1, 3, 5]
    true = adata.uns["true_protein_background"][2, kept]
    np.testing.assert_allclose(background[2, kept], np.log(true), atol=0.7)
    np.testing.assert_allclose(background[2, [2, 4]], background[:2, [2, 4]].mean(0), rtol=1e-5)
    mapped.train(1, progress_bar=False)
    assert mapped.get_normalized_protein_expression(transform_batch="batch_0").shape == (query.n_obs, 6)
    # A few cells of a batch may all be foreground.
    few = pm.MULTIVI.load_query_data(query[:5].copy(), model).program.extra["protein"].background_log_mean.detach()
    np.testing.assert_allclose(few[2], few[:2].mean(0), rtol=1e-5)


@pytest.mark.slow
def test_truth_is_recovered():
    adata = pm.simulate_multiome((900, 300, 300), n_genes=200, n_regions=200, n_batches=2, n_proteins=20, stained=0.7)
    pm.MULTIVI.setup_anndata(adata, **KEYS)
    model = pm.MULTIVI(adata, n_hidden=64, n_latent=8)
    model.train(120, progress_bar=False)
    true = adata.uns["true_protein_background"]
    learned = model.program.extra["protein"].background_log_mean.detach().exp().numpy()
    error = np.abs(learned / true - 1)
    # The mean background of a hundred cells is itself known to some 5 %.
    assert np.median(error) < 0.05
    assert (error < 0.1).mean() > 0.9
    probability = model.get_protein_foreground_probability().to_numpy()
    is_foreground = adata.obsm["true_protein_foreground"].to_numpy()
    stained = adata.obs["has_protein"].to_numpy()
    assert np.mean([auroc(is_foreground[stained, t], probability[stained, t]) for t in range(20)]) >= 0.95
    imputed = model.get_normalized_protein_expression(include_protein_background=True).to_numpy()
    mean = adata.obsm["true_protein_mean"].to_numpy()
    logs = np.log(imputed[~stained]), np.log(mean[~stained])
    correlation = [np.corrcoef(logs[0][:, t], logs[1][:, t])[0, 1] for t in range(20)]
    assert np.mean(correlation) > 0.7
    found = model.get_normalized_protein_expression(
        include_protein_background=True, n_samples=100, return_interval=0.9, return_numpy=True
    )
    held = (found.lower <= mean) & (mean <= found.upper)
    # 87 to 94 % over five seeds.
    for cells in (stained, ~stained):
        assert 0.85 < held[cells].mean() < 0.96


def auroc(is_positive, score):
    rank = pd.Series(score).rank().to_numpy()
    n, m = is_positive.sum(), (~is_positive).sum()
    return (rank[is_positive].sum() - n * (n + 1) / 2) / (n * m)


def test_models_are_compared_on_the_same_proteins_only(model, adata):
    given = {"indices": model.validation_indices[:4], "n_mc_samples": 3}
    assert pm.compare_models({"one": model, "two": model}, **given)["difference"].tolist() == [0, 0]
    without = adata.copy()
    pm.MULTIVI.setup_anndata(without, batch_key="batch", modality_key="modality")
    fewer = adata.copy()
    fewer.obsm["protein_expression"] = adata.obsm["protein_expression"].iloc[:, :4]
    pm.MULTIVI.setup_anndata(fewer, **KEYS)
    more = adata.copy()
    more.obsm["protein_expression"] = adata.obsm["protein_expression"] * 2
    pm.MULTIVI.setup_anndata(more, **KEYS)
    for other, says in (
        (without, r"extra modalities \['protein'\] and \[\]"),
        (fewer, "different features of 'protein'"),
        (more, "different values of 'protein'"),
    ):
        found = pm.MULTIVI(other, n_hidden=8, n_latent=2)
        found.is_trained = True
        with pytest.raises(ValueError, match=says):
            pm.compare_models({"one": model, "two": found}, **given)
