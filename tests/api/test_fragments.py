"""Models that count fragments, from the analyst's side: every result in its units, against formulas and the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm

N_GENES, N_REGIONS, RATE = 25, 60, 6.0


@pytest.fixture(scope="module")
def adata():
    made = pm.simulate_multiome(
        (120, 30, 30), N_GENES, N_REGIONS, n_types=2, n_latent=3, n_batches=2, fragments=RATE, seed=3
    )
    pm.MULTIVI.setup_anndata(made, modality_key="modality", batch_key="batch")
    return made


@pytest.fixture(scope="module")
def models(adata):
    """One of each likelihood, trained alike."""
    return {name: trained(adata, name, 25) for name in ("bernoulli", "poisson", "nb")}


def trained(adata, likelihood, n_epochs):
    made = pm.MULTIVI(adata, n_hidden=24, n_latent=3, accessibility_likelihood=likelihood)
    made.train(n_epochs, progress_bar=False, lr=4e-3)
    return made


@pytest.fixture(params=["poisson", "nb"])
def model(request, models):
    return models[request.param]


def counts(adata):
    return adata.X[:, N_GENES:].toarray()


def measured(adata):
    return (adata.obs["modality"] != "expression").to_numpy()


def closed(model, mean):
    """P(y = 0) at an expected number of fragments."""
    theta = getattr(model.program, "region_log_theta", None)
    if theta is None:
        return np.exp(-mean)
    theta = theta.exp().detach().numpy()
    return (theta / (theta + mean)) ** theta


def test_estimates_are_fragments_in_a_cell_of_typical_depth(adata, model):
    found = model.get_accessibility_estimates(return_numpy=True)
    cells = model.minibatch()
    program = model.program.eval()
    with torch.no_grad():
        z = torch.from_numpy(model.get_latent_representation())
        p = program.accessibility(z, cells.design).dense().numpy()
    expected = p * model.get_region_factors()
    np.testing.assert_allclose(found[measured(adata)], expected[measured(adata)], rtol=1e-4)
    np.testing.assert_array_equal(model.get_accessibility_estimates(normalize_regions=True, return_numpy=True), found)
    depth = counts(adata)[measured(adata)].sum(1)
    assert found[measured(adata)].sum(1).mean() == pytest.approx(np.exp(np.log1p(depth).mean()), rel=0.1)


def test_of_the_cells_own_depth_they_add_up_to_its_counts(adata, model):
    found = model.get_accessibility_estimates(normalize_cells=True, return_numpy=True)
    y = counts(adata)
    np.testing.assert_allclose(found[measured(adata)].sum(), y.sum(), rtol=0.05)
    truth = adata.obsm["true_p"] * adata.var["true_region_factor"].to_numpy()[N_GENES:]
    truth = RATE * truth * adata.obs["true_cell_factor"].to_numpy()[:, None]
    assert np.corrcoef(found.ravel(), truth.ravel())[0, 1] > 0.7


def test_detection_is_the_probability_of_a_fragment(model):
    for options in ({}, {"normalize_cells": True}, {"region_list": [4, 17], "transform_batch": "batch_1"}):
        mean = model.get_accessibility_estimates(return_numpy=True, **options)
        found = model.get_accessibility_estimates(detection=True, return_numpy=True, **options)
        columns = options.get("region_list", slice(None))
        theta = getattr(model.program, "region_log_theta", None)
        if theta is None:
            np.testing.assert_allclose(found, 1 - np.exp(-mean), rtol=1e-5, atol=1e-6)
        else:
            theta = theta.exp().detach().numpy()[columns]
            np.testing.assert_allclose(found, 1 - (theta / (theta + mean)) ** theta, rtol=1e-4, atol=1e-6)


def test_detection_is_averaged_over_draws_and_batches_not_the_mean(model):
    options = {"n_samples": 7, "normalize_cells": True, "return_numpy": True, "indices": range(60)}
    draws = model.get_accessibility_estimates(return_mean=False, **options)
    found = model.get_accessibility_estimates(return_mean=False, detection=True, **options)
    np.testing.assert_allclose(found, 1 - closed(model, draws), rtol=1e-4, atol=1e-6)
    # The function is concave: of the mean it is larger than its own mean.
    of_mean = 1 - closed(model, model.get_accessibility_estimates(**options))
    averaged = model.get_accessibility_estimates(detection=True, **options)
    assert (averaged < of_mean).mean() > 0.95
    of_each = [model.get_accessibility_estimates(transform_batch=batch, detection=True, **options) for batch in (0, 1)]
    both = model.get_accessibility_estimates(transform_batch=[0, 1], detection=True, **options)
    np.testing.assert_allclose(both, np.mean(of_each, 0), rtol=1e-4, atol=1e-6)


def test_detection_of_open_regions_is_what_it_was(models):
    one = models["bernoulli"]
    options = {"normalize_cells": True, "normalize_regions": True, "return_numpy": True}
    found = one.get_accessibility_estimates(detection=True, **options)
    np.testing.assert_array_equal(found, one.get_accessibility_estimates(**options))


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "nb"])
def test_detection_is_calibrated_as_that_of_open_regions_is(adata, likelihood):
    """After more epochs than the other tests need: factors of cells have a longer way to go."""
    rows, y = measured(adata), counts(adata)
    options = {"normalize_cells": True, "normalize_regions": True, "return_numpy": True}
    found = trained(adata, likelihood, 60).get_accessibility_estimates(detection=True, **options)
    assert found[rows].mean() == pytest.approx((y[rows] > 0).mean(), abs=0.05)


def test_imputed_layers_are_the_estimates(adata, model):
    filled = model.impute(normalize_cells=True)
    rows = ~measured(adata)
    expected = model.get_accessibility_estimates(normalize_cells=True, return_numpy=True)
    np.testing.assert_allclose(filled.layers["imputed"].toarray()[rows, N_GENES:], expected[rows], rtol=1e-5)
    truth = RATE * adata.obsm["true_p"] * adata.var["true_region_factor"].to_numpy()[N_GENES:]
    assert np.corrcoef(expected[rows].mean(0), truth[rows].mean(0))[0, 1] > 0.95
    # The depth of cells without ATAC is predicted, in fragments.
    assert expected[rows].sum(1).mean() == pytest.approx(counts(adata)[measured(adata)].sum(1).mean(), rel=0.3)


def test_depth_is_the_number_of_fragments(adata, model):
    found = model.get_library_size_factors()["accessibility"]
    assert np.isnan(found[~measured(adata)]).all()
    total = counts(adata).sum(1)[measured(adata)]
    assert np.corrcoef(np.log(found[measured(adata)]), np.log(total))[0, 1] > 0.95
    np.testing.assert_allclose(np.median(found[measured(adata)] / total), 1, rtol=0.2)


def test_replicates_are_counts(adata, model):
    drawn = model.posterior_predictive_sample(n_samples=3)["y"]
    rows = measured(adata)
    y = counts(adata)[rows]
    for one in drawn:
        values = one[rows].toarray() if hasattr(one, "toarray") else one[rows]
        assert values.max() > 1
        assert values.mean() == pytest.approx(y.mean(), rel=0.1)
        assert (values == 0).mean() == pytest.approx((y == 0).mean(), abs=0.05)


def test_checks_are_of_counts(model, models):
    check = model.posterior_predictive_check(n_samples=40, held_out=False)
    assert set(check.regions["statistic"]) == {"mean", "variance", "cv", "zero_fraction"}
    assert {"accessibility_depth", "detected_regions"} <= set(check.cells["statistic"])
    # Scores of genes and of fragments stand beside each other under names of their own.
    assert not check.scores.duplicated(["setting", "score"]).any()
    assert {"cells", "cells, fragments", "hidden accessibility"} <= set(check.scores["setting"])
    mean = check.regions.query("statistic == 'mean'")
    assert np.corrcoef(mean["observed"], mean["replicated"])[0, 1] > 0.99
    assert (check.histogram.groupby("count").size() == 1).all()
    assert set(models["bernoulli"].posterior_predictive_check(n_samples=40).regions["statistic"]) == {"detection_rate"}


def test_differential_tests_compare_fragments(adata, model):
    table = model.differential_accessibility(groupby="cell_type", group1="type_0", n_samples=300)
    rows = measured(adata)
    group = (adata.obs["cell_type"] == "type_0").to_numpy()
    y = counts(adata)
    np.testing.assert_allclose(table["emp_fragments1"], y[rows & group].mean(0), rtol=1e-5)
    np.testing.assert_allclose(table["emp_prob2"], (y[rows & ~group] > 0).mean(0), rtol=1e-5)
    np.testing.assert_allclose(table["emp_effect"], table["emp_fragments1"] - table["emp_fragments2"], atol=1e-6)
    np.testing.assert_allclose(table["effect_size"], table["est_fragments1"] - table["est_fragments2"])
    # Draws, as in the table: at the posterior mean, regions that are closed in one type are expected more closed.
    estimates = model.get_accessibility_estimates(n_samples=50, return_numpy=True)
    np.testing.assert_allclose(table["est_fragments1"], estimates[group].mean(0), rtol=0.15, atol=0.05)
    assert np.corrcoef(table["change_mean"], table["emp_effect"])[0, 1] > 0.8
    truth = adata.varm["true_at_centre"][N_GENES:]
    log_fold = np.log2(truth[:, 0] / truth[:, 1])
    found = model.differential_accessibility(
        groupby="cell_type", group1="type_0", change_fn="log-fold", n_samples=300, region_list=range(0, N_REGIONS, 2)
    )
    assert np.corrcoef(found["change_mean"], log_fold[::2])[0, 1] > 0.6


def test_differential_tests_of_cells_and_what_is_refused(model):
    options = {"groupby": "cell_type", "group1": "type_0", "n_samples": 200}
    table = model.differential_accessibility(unit="cell", **options)
    group = model.differential_accessibility(**options)
    np.testing.assert_allclose(table["est_fragments1"], group["est_fragments1"], rtol=0.15, atol=0.03)
    vanilla = model.differential_accessibility(mode="vanilla", **options)
    assert {"proba_m1", "est_fragments1", "emp_prob1"} <= set(vanilla)
    with pytest.raises(ValueError, match="probability='accessible' compares p, of which counts"):
        model.differential_accessibility(probability="accessible", **options)
    with pytest.raises(ValueError, match="change_fn='log-odds' compares probabilities: for counts"):
        model.differential_accessibility(change_fn="log-odds", **options)


def test_saved_models_are_the_same(adata, model, tmp_path):
    model.save(tmp_path / "m")
    loaded = pm.MULTIVI.load(tmp_path / "m", adata)
    options = {"normalize_cells": True, "detection": True, "return_numpy": True}
    np.testing.assert_array_equal(
        loaded.get_accessibility_estimates(**options), model.get_accessibility_estimates(**options)
    )
    name = model.program.config.accessibility_likelihood
    assert f", {name}" in repr(pm.describe(tmp_path / "m"))
    assert f"{N_REGIONS} regions ({name})" in repr(loaded)


def test_queries_bring_the_depths_of_their_batches(adata, model):
    query = adata[measured(adata)][:40].copy()
    query.obs["batch"] = "new"
    query.X[:, N_GENES:] = 3 * query.X[:, N_GENES:]
    mapped = pm.MULTIVI.load_query_data(query, model)
    total = query.X[:, N_GENES:].toarray().sum(1)
    new = mapped.program.fragments_log_mean[-1].item()
    assert new == pytest.approx(np.log(total).mean(), rel=1e-4)
    mapped.train(2, progress_bar=False)
    assert np.isfinite(mapped.get_elbo())
    # Without some of the regions: a typical cell tells what is missing.
    part = pm.MULTIVI.load_query_data(query[:, : N_GENES + 40].copy(), model)
    factors = part.get_library_size_factors()["accessibility"]
    assert np.corrcoef(np.log(factors), np.log(total))[0, 1] > 0.8


def test_comparison_of_likelihoods_is_on_the_same_data(adata, models):
    table = pm.compare_models(models, n_mc_samples=60)
    assert table.loc["bernoulli", "accessibility_likelihood"] == "bernoulli"
    # Counts up to six per region say more than open or not.
    assert table.loc["poisson", "log_likelihood"] > table.loc["bernoulli", "log_likelihood"] + 1
    assert table["open_difference"].max() == 0
    # Over four seeds -2.8 to 0.7.
    assert abs(table.loc["nb", "log_likelihood"] - table.loc["poisson", "log_likelihood"]) < 5
    alone = pm.compare_models({name: models[name] for name in ("poisson", "nb")}, n_mc_samples=60)
    assert "open_difference" not in alone
    np.testing.assert_allclose(alone["log_likelihood"], table.loc[alone.index, "log_likelihood"], rtol=1e-6)


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_minified_data_of_fragments_give_the_same_answers(likelihood):
    adata = pm.simulate_multiome((30, 10, 10), n_genes=12, n_regions=15, n_batches=2, fragments=2.0, seed=1)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2, accessibility_likelihood=likelihood)
    model.train(1, progress_bar=False)
    in_groups = {"groupby": "cell_type", "group1": "type_0", "unit": "cell", "all_stats": False, "n_samples": 50}

    def answers():
        interval = model.get_accessibility_estimates(n_samples=20, return_interval=0.9, normalize_cells=True)
        return [
            *interval,
            model.get_accessibility_estimates(normalize_cells=True, detection=True),
            model.get_accessibility_estimates(transform_batch="batch_1", n_samples=3),
            model.get_normalized_expression(n_samples=3, library_size="latent"),
            model.get_library_size_factors()["accessibility"],
            model.get_latent_representation(modality="accessibility"),
            model.differential_accessibility(**in_groups).select_dtypes("number"),
        ]

    before = answers()
    model.minify_adata()
    for found, expected in zip(answers(), before, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
