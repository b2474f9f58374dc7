"""Differential tests: columns, groups and memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from pyro_multivi import MULTIVI, simulate_multiome
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.differential import group_draws
from pyro_multivi.posterior.differential.effect import estimated_delta
from pyro_multivi.posterior.differential.tables import expected_fdr_calls
from pyro_multivi.posterior.engine import decode
from pyro_multivi.posterior.engine.draws import draw


def close(found, expected, atol=2e-4):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=2e-3, atol=atol)


def test_estimated_delta_lies_between_the_modes():
    rng = np.random.default_rng(0)
    change = np.concatenate([rng.normal(0, 0.05, 800), rng.normal(2, 0.2, 100), rng.normal(-1, 0.2, 100)])
    assert estimated_delta(change, 0.1) == pytest.approx(0.6 * 1.5, abs=0.05)
    assert estimated_delta(rng.normal(0, 1e-3, 100), 0.1) == 0.1
    assert estimated_delta(np.full(5, 2.0), 0.1) == 0.1


def test_fdr_calls_are_the_largest_prefix_within_the_target():
    p = np.array([0.2, 0.99, np.nan, 0.97, 0.90, 0.99, 0.5])
    assert expected_fdr_calls(p, 0.04).tolist() == [False, True, False, True, True, True, False]
    assert expected_fdr_calls(p, 0.03).tolist() == [False, True, False, True, False, True, False]
    assert not expected_fdr_calls(np.full(3, np.nan), 0.9).any()


@pytest.mark.parametrize("unit", ["group", "cell"])
@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_statistics_of_counts_are_of_measured_cells(fitted, groups, modality, unit):
    table = groups.compared(modality, unit=unit)
    for number, index in ((1, groups.first), (2, groups.second)):
        cells = fitted.minibatch(index)
        x = cells.x.to_dense()[cells.has_rna].double().numpy()
        y = cells.y.to_dense()[cells.has_atac].double().numpy()
        assert 0 < len(x) < len(index)
        if modality is ATAC:
            close(table[f"emp_prob{number}"], (y > 0).mean(0), atol=1e-9)
            continue
        close(table[f"raw_mean{number}"], x.mean(0), atol=1e-9)
        close(table[f"non_zeros_proportion{number}"], (x > 0).mean(0), atol=1e-9)
        close(table[f"raw_normalized_mean{number}"], (1e4 * x / x.sum(1, keepdims=True)).mean(0), atol=1e-6)
    if modality is ATAC:
        close(table["emp_effect"], table["emp_prob1"] - table["emp_prob2"])


def called(table):
    return table[next(name for name in table if name.startswith("is_d"))]


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_calls_of_imputed_groups_are_missing_and_it_is_said_once(groups, unit):
    atac_only = np.arange(150, 200)
    with pytest.warns(UserWarning, match="No cell of 'group 1' has RNA") as said:
        table = groups.compared(RNA, idx1=atac_only, idx2=np.arange(100), unit=unit)
    assert len(said) == 1
    assert table[["raw_mean1", "non_zeros_proportion1", "raw_normalized_mean1"]].isna().all(axis=None)
    assert table["raw_mean2"].notna().all()
    assert table["proba_de"].between(0, 1).all()
    assert called(table).dtype == "boolean"
    assert called(table).isna().all()
    with pytest.warns(UserWarning, match="No cell of 'group 1', 'group 2' has RNA"):
        both = groups.compared(RNA, idx1=atac_only[:25], idx2=atac_only[25:], unit=unit)
    assert called(both).isna().all()
    assert called(groups.compared(RNA, unit=unit)).notna().all()


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_groups_of_fewer_than_three_cells_say_nothing(groups, modality, n):
    options = {"idx1": np.arange(n), "idx2": np.arange(10, 100)}
    if n == 3:
        table = groups.compared(modality, **options)
        assert table.iloc[:, 0].notna().all()
        assert called(table).notna().all()
        return
    with pytest.warns(UserWarning, match="Fewer than 3 cells of 'group 1'"):
        table = groups.compared(modality, **options)
    unknown = ["proba_de", "bayes_factor", "lfc_mean"] if modality is RNA else ["prob_da", "change_mean", "change_std"]
    assert table[unknown].isna().all(axis=None)
    assert called(table).isna().all()
    assert table["scale1" if modality is RNA else "est_prob1"].notna().all()


def test_batches_are_corrected_where_groups_lie_unevenly(groups, caplog):
    batch = groups.model.adata.obs["batch"].to_numpy().astype(str)
    zero, one = (np.flatnonzero(batch == name) for name in ("batch_0", "batch_1"))
    idx1, idx2 = np.r_[zero[:40], one[:10]], np.r_[zero[40:55], one[10:60]]
    default, plain, corrected = (
        groups.compared(RNA, idx1=idx1, idx2=idx2, batch_correction=how) for how in (None, False, True)
    )
    pd.testing.assert_frame_equal(default, corrected)
    assert not default["lfc_mean"].equals(plain["lfc_mean"])
    both = ["batch_0", "batch_1"]
    assert default.attrs["batches"] == {"group 1 vs group 2": [both, both]}
    assert plain.attrs["batches"] == {"group 1 vs group 2": [None, None]}
    even = {"idx1": np.r_[zero[:20], one[:20]], "idx2": np.r_[zero[20:40], one[20:40]]}
    assert groups.compared(RNA, **even, batch_correction=None).attrs["batches"] == plain.attrs["batches"]
    # Groups that are the batches: to decode both in the same ones would take away what is asked for.
    assert groups.compared(RNA, idx1=zero, idx2=one, batch_correction=None).attrs["batches"] == plain.attrs["batches"]
    assert "the groups share no batch" in caplog.text
    named = groups.compared(RNA, **even, batch_correction=None, batchid1="batch_1")
    assert named.attrs["batches"] == {"group 1 vs group 2": [["batch_1"], ["batch_1"]]}


def test_a_change_of_nearly_all_genes_is_pointed_out(groups, monkeypatch, caplog):
    assert groups.compared(RNA).attrs["changed_as_a_whole"] == []
    monkeypatch.setattr("pyro_multivi.posterior.differential.tables._NEARLY_ALL", 0.3)
    assert groups.compared(RNA).attrs["changed_as_a_whole"] == ["group 1 vs group 2"]
    assert "Nearly all genes are called in 'group 1 vs group 2'" in caplog.text
    assert groups.compared(ATAC).attrs["changed_as_a_whole"] == []


def test_columns_and_order_are_those_scvi_users_know(fitted, groups):
    de = fitted.differential_expression(groupby="cell_type", n_samples=100)
    assert list(de.columns) == [
        "proba_de", "proba_not_de", "bayes_factor", "scale1", "scale2", "pseudocounts", "delta",
        "lfc_mean", "lfc_median", "lfc_std", "lfc_min", "lfc_max", "raw_mean1", "raw_mean2",
        "non_zeros_proportion1", "non_zeros_proportion2", "raw_normalized_mean1", "raw_normalized_mean2",
        "is_de_fdr_0.05", "comparison", "group1", "group2",
    ]  # fmt: skip
    assert de["comparison"].unique().tolist() == [f"type_{t} vs Rest" for t in range(4)]
    assert all(rows["proba_de"].is_monotonic_decreasing for _, rows in de.groupby("comparison"))
    da = fitted.differential_accessibility(groupby="cell_type", n_samples=100)
    assert list(da.columns) == [
        "prob_da", "is_da_fdr", "bayes_factor", "effect_size", "emp_effect", "est_prob1", "est_prob2",
        "emp_prob1", "emp_prob2", "change_mean", "change_std", "delta", "comparison", "group1", "group2",
    ]  # fmt: skip
    assert list(da.index) == 4 * groups.names(ATAC)
    short = fitted.differential_accessibility(groupby="cell_type", n_samples=100, all_stats=False)
    assert list(short.columns) == [name for name in da if not name.startswith("emp_")]
    pd.testing.assert_frame_equal(short, da[short.columns])
    vanilla = fitted.differential_expression(idx1=groups.first, mode="vanilla", n_samples=100, all_stats=False)
    assert list(vanilla.columns) == ["proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2"]


@pytest.mark.parametrize("unit", ["group", "cell"])
@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_sign_is_group_1_over_group_2(groups, modality, unit):
    change = "lfc_mean" if modality is RNA else "change_mean"
    # Of the model's means as they are: counts may turn a change that the decoder has wrong.
    table = groups.compared(modality, unit=unit, calibrated=False)
    first, second = ("scale1", "scale2") if modality is RNA else ("est_prob1", "est_prob2")
    ratio = np.log2(table[first] / table[second])
    # Means of logarithms and logarithms of means agree in sign where they are not near 0.
    sure = (ratio.abs() > 1).to_numpy()
    assert sure.sum() > 3
    assert (np.sign(table[change]) == np.sign(ratio))[sure].all()
    straight = groups.compared(modality, unit=unit)
    turned = groups.compared(modality, unit=unit, idx1=groups.second, idx2=groups.first)
    close(straight[change], -turned[change])


def test_a_cell_against_a_cell_has_spread(fitted):
    table = fitted.differential_expression(idx1=[0], idx2=[1], unit="cell", n_samples=200)
    assert (table["lfc_std"] > 1e-3).all()
    assert table["proba_de"].between(0.02, 0.98).any()


def test_ways_to_name_the_same_groups(fitted):
    obs = fitted.adata.obs
    chosen = (obs["cell_type"] == "type_1").to_numpy()
    by_column = fitted.differential_accessibility(groupby="cell_type", group1="type_1", n_samples=100)
    ways = [chosen, np.flatnonzero(chosen), list(obs_names(fitted)[chosen]), "cell_type == 'type_1'"]
    for idx1 in ways:
        table = fitted.differential_accessibility(idx1=idx1, n_samples=100)
        pd.testing.assert_frame_equal(table, by_column[table.columns])
    pair = fitted.differential_accessibility(groupby="cell_type", group1=["type_1", "type_3"], group2="type_0")
    assert pair["comparison"].unique().tolist() == ["type_1 vs type_0", "type_3 vs type_0"]


def obs_names(model):
    return model.adata.obs_names


def test_cells_without_a_group_are_in_no_rest(fitted):
    adata = fitted.adata.copy()
    adata.obs["part"] = ["a"] * 60 + ["b"] * 60 + [None] * 80
    table = fitted.differential_accessibility(adata, groupby="part", group1="a", n_samples=100)
    expected = fitted.differential_accessibility(idx1=np.arange(60), idx2=np.arange(60, 120), n_samples=100)
    pd.testing.assert_frame_equal(table[expected.columns], expected)


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_a_feature_list_gives_the_same_probabilities(fitted, groups, unit):
    table = groups.compared(RNA, unit=unit)
    some = fitted.differential_expression(
        idx1=groups.first, idx2=groups.second, n_samples=groups.n, unit=unit, batch_size=7,
        gene_list=["gene_07", "gene_30"],
    )  # fmt: skip
    assert sorted(some.index) == ["gene_07", "gene_30"]
    columns = [name for name in table if not name.startswith("is_")]
    pd.testing.assert_frame_equal(some.sort_index()[columns], table.loc[["gene_07", "gene_30"], columns], rtol=1e-3)


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_seeds_and_the_users_data(fitted, unit, global_rng_untouched):
    obs, uns, layers = fitted.adata.obs.copy(), list(fitted.adata.uns), list(fitted.adata.layers)
    first = fitted.differential_expression(groupby="cell_type", unit=unit, n_samples=100)
    pd.testing.assert_frame_equal(first, fitted.differential_expression(groupby="cell_type", unit=unit, n_samples=100))
    other = fitted.differential_expression(groupby="cell_type", unit=unit, n_samples=100, seed=1)
    assert not first["scale1"].sort_index().equals(other["scale1"].sort_index())
    pd.testing.assert_frame_equal(fitted.adata.obs, obs)
    assert (list(fitted.adata.uns), list(fitted.adata.layers)) == (uns, layers)


@pytest.mark.parametrize("weights", ["uniform", "importance"])
def test_the_batch_size_changes_nothing(groups, weights):
    once, often = (groups.compared(RNA, unit="cell", weights=weights, batch_size=size) for size in (512, 5))
    columns = ["proba_de", "scale1", "scale2", "lfc_mean"]
    pd.testing.assert_frame_equal(once[columns], often[columns], rtol=1e-3)


@pytest.mark.parametrize("unit", ["group", "cell"])
@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_no_tensor_holds_all_features_of_all_draws(groups, modality, unit, monkeypatch):
    widths = []
    logits_at = Readout._logits_at

    def spy(self, features):
        found = logits_at(self, features)
        widths.append(found.shape[-1])
        return found

    monkeypatch.setattr(Readout, "_logits_at", spy)
    monkeypatch.setattr(Readout, "dense", lambda self: pytest.fail("all features at once"))
    monkeypatch.setattr(decode, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(decode, "BLOCK", 8 * groups.n)
    monkeypatch.setattr("pyro_multivi.distributions.kernels.readout.STREAM_WIDTH", 8)
    whole = groups.compared(modality, unit=unit, cred_interval_lvls=[0.9], delta=None, pseudocounts=None)
    assert max(widths) == 8
    monkeypatch.undo()
    again = groups.compared(modality, unit=unit, cred_interval_lvls=[0.9], delta=None, pseudocounts=None)
    pd.testing.assert_frame_equal(whole, again, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_each_group_is_decoded_once_for_all_comparisons(fitted, unit, monkeypatch):
    # More draws than a group has cells: else its measured cells are drawn by themselves, beside all of them.
    drawn = []
    draw = group_draws.DrawSource.draw

    def spy(self, index, batches):
        drawn.append(len(index))
        return draw(self, index, batches)

    monkeypatch.setattr(group_draws.DrawSource, "draw", spy)
    fitted.differential_accessibility(groupby="cell_type", unit=unit, n_samples=60, pseudocounts=None, delta=None)
    assert sorted(drawn) == sorted(fitted.adata.obs["cell_type"].value_counts())


@pytest.fixture
def smooth(groups):
    """The groups, with decoders that have all features change too little."""
    cells = groups.model.minibatch(np.arange(5))
    weights = [draw(groups.model.program, cells, (site,))[site].weight for site in ("rho", "p")]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.mul_(0.3)
    yield groups
    for weight, value in zip(weights, kept, strict=True):
        weight.copy_(value)


@pytest.mark.parametrize("batch_correction", [False, True])
@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_counts_correct_what_the_decoder_smooths_away(smooth, modality, batch_correction):
    options = {"batch_correction": batch_correction, "all_stats": True}
    plain, corrected = (smooth.compared(modality, calibrated=calibrated, **options) for calibrated in (False, True))
    if modality is RNA:
        counted = np.log2(plain["raw_normalized_mean1"]) - np.log2(plain["raw_normalized_mean2"])
    else:
        counted = plain["emp_effect"]
    change = "lfc_mean" if modality is RNA else "change_mean"
    sure = np.abs(counted) > (0.8 if modality is RNA else 0.1)
    assert sure.sum() >= 8

    def slope(table):
        return (table[change] * counted)[sure].sum() / (counted[sure] ** 2).sum()

    assert slope(plain) < 0.6
    assert slope(corrected) > 0.75
    assert slope(corrected) < 1.1


def test_where_nothing_was_measured_counts_correct_nothing(smooth):
    rna_only = {"idx1": np.arange(100, 125), "idx2": np.arange(125, 150), "mode": "vanilla"}
    with pytest.warns(UserWarning, match="No cell of 'group 1', 'group 2' has ATAC"):
        plain, corrected = (smooth.compared(ATAC, calibrated=calibrated, **rna_only) for calibrated in (False, True))
    close(corrected["proba_m1"], plain["proba_m1"])


@pytest.mark.parametrize("probability", ["detected", "accessible"])
def test_regions_open_in_every_cell_do_not_differ(probability):
    adata = simulate_multiome((60, 30, 30), n_genes=30, n_regions=50, n_batches=2, seed=0)
    regions = np.flatnonzero(adata.var["feature_types"] == "Peaks")[20:23]
    x = adata.X.toarray()
    x[np.ix_(adata.obs["modality"] != "expression", regions)] = 1
    adata.X = csr_matrix(x)
    MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = MULTIVI(adata, n_hidden=16, n_latent=3)
    with torch.random.fork_rng():
        model.train(max_epochs=10, progress_bar=False)
    rows = model.differential_accessibility(groupby="cell_type", probability=probability, change_fn="log-odds")
    assert np.isfinite(rows["prob_da"]).all()
    rows = model.differential_accessibility(groupby="cell_type", probability=probability).loc[adata.var_names[regions]]
    assert (rows["emp_prob1"] == 1).all()
    assert (rows["emp_prob2"] == 1).all()
    assert not rows["is_da_fdr"].any(), rows
    assert (rows["change_mean"].abs() < 0.05).all(), rows


def test_cells_of_another_depth_do_not_differ():
    """Few cells, five times as deep as all others of the same type: their encoder hardly learns how deep they are."""
    rng, n, m = np.random.default_rng(0), 20, 300
    depth = np.r_[np.full(n, 5.0), np.ones(m)] * np.exp(0.3 * rng.standard_normal(n + m))
    opened = rng.poisson(depth[:, None] * np.exp(rng.normal(-2.5, 0.7, 150))) > 0
    counts = np.hstack([rng.poisson(3.0, (n + m, 30)), opened])
    adata = AnnData(csr_matrix(counts.astype(np.float32)))
    adata.var["feature_types"] = ["Gene Expression"] * 30 + ["Peaks"] * 150
    MULTIVI.setup_anndata(adata)
    model = MULTIVI(adata, n_hidden=16, n_latent=3)
    with torch.random.fork_rng():
        model.train(max_epochs=3, progress_bar=False)
    options = {"idx1": np.arange(n), "n_samples": 500}
    assert not model.differential_accessibility(**options)["is_da_fdr"].any()
    higher = model.differential_accessibility(**options, mode="vanilla")["proba_m1"]
    # In four simulations 0.48 to 0.52 and 0.03 to 0.09; by the depths of the encoder above 0.93 and 0.55.
    assert 0.35 < (higher > 0.5).mean() < 0.65
    assert (np.abs(higher - 0.5) > 0.475).mean() < 0.15


def test_all_genes_change_where_size_factors_say_so():
    """Cells with twice the RNA, as deep as all others by their size factors, and of three genes six times as much."""
    rng, n, up = np.random.default_rng(0), 100, np.r_[np.full(50, 2.0), np.ones(50)][:, None]
    size = np.exp(0.3 * rng.standard_normal((n, 1)))
    mean = 1000 * size * up * rng.dirichlet(np.full(40, 3.0)) * rng.gamma(3, 1 / 3, (n, 40))
    mean[:50, :3] *= 3
    adata = AnnData(csr_matrix(np.hstack([rng.poisson(mean), rng.random((n, 30)) < 0.3]).astype(np.float32)))
    adata.var["feature_types"] = ["Gene Expression"] * 40 + ["Peaks"] * 30
    adata.obs["size"] = 1e-6 * size
    MULTIVI.setup_anndata(adata, size_factor_key="size")
    model = MULTIVI(adata, n_hidden=16, n_latent=3, gene_likelihood="nb")
    with torch.random.fork_rng():
        model.train(max_epochs=3, progress_bar=False)
    table = model.differential_expression(idx1=np.arange(50), n_samples=500).loc[adata.var_names[:40]]
    assert table["is_de_fdr_0.05"].all()
    assert table["lfc_mean"].iloc[3:].median() == pytest.approx(1.0, abs=0.1)
    assert table["lfc_mean"].iloc[:3].mean() == pytest.approx(np.log2(6), abs=0.25)
    # They are no shares of a whole, of which a few took more.
    assert table.attrs["changed_as_a_whole"] == []
    nothing = model.differential_expression(idx1=np.arange(25), idx2=np.arange(25, 50), n_samples=500)
    assert not nothing["is_de_fdr_0.05"].any()


def test_a_group_of_an_empty_name_has_its_labels(fitted):
    adata = fitted.adata.copy()
    adata.obs["place"] = adata.obs["cell_type"].astype(str).replace("type_0", "")
    table = fitted.differential_expression(adata, groupby="place", group1=["", "type_1"])
    assert table["group1"].value_counts().to_dict() == {"": 40, "type_1": 40}
    assert set(table["comparison"]) == {" vs Rest", "type_1 vs Rest"}
