"""Differential tests against plain NumPy that keeps every draw of every feature in memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm

from pyro_multivi import simulate_multiome
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior import exceedance, shrinkage
from pyro_multivi.posterior.differential import estimated_delta, expected_fdr_calls
from pyro_multivi.posterior.draws import draw
from pyro_multivi.posterior.pools import _evenly

N = 300
# The cells of the fixture `fitted`: two groups of different types, measured in all three ways, in both batches.
_TYPES = simulate_multiome(
    (100, 50, 50), 40, 70, n_latent=3, n_batches=2, effect_size=2.0, differential_fraction=0.6, seed=0
).obs["cell_type"]
IDX1, IDX2 = np.flatnonzero(_TYPES == "type_0"), np.flatnonzero(_TYPES.isin(["type_1", "type_2"]))
EPS = {"rho": 1e-6, "p": 1e-3}
DELTA = {("rho", "log-fold"): 0.25, ("p", "difference"): 0.05, ("p", "log-fold"): 0.25, ("p", "log-odds"): 0.5}


def log_odds(p):
    return np.log2(p) - np.log2(1 - p)


CHANGE = {
    "log-fold": lambda a, b, eps: np.log2(a + eps) - np.log2(b + eps),
    "difference": lambda a, b, eps: a - b,
    "log-odds": lambda a, b, eps: np.log2((a + eps) / (1 - a + eps)) - np.log2((b + eps) / (1 - b + eps)),
}


def method(model, site):
    return model.differential_expression if site == "rho" else model.differential_accessibility


def names(model, site):
    return list(model.spec.gene_names if site == "rho" else model.spec.region_names)


def compared(model, site, **arguments):
    asked = {"idx1": IDX1, "idx2": IDX2, "n_samples": N, **arguments}
    return method(model, site)(**asked).loc[names(model, site)]


def all_draws(model, site, index, stream, batches=(None,), seed=0):
    """Every draw of every feature, (N, F): whole, from the engine."""
    chosen, number = _evenly(np.random.default_rng([seed, stream]), len(index), N)
    cells = model.minibatch(index)
    values = []
    for code in batches:
        design = cells.design.clone()
        if code is not None:
            design[:, : model.spec.n_batch] = torch.eye(model.spec.n_batch)[code]
        drawn = draw(model.program, cells, (site,), int(number.max()) + 1, {"s": design}, seed)[site]
        values.append((drawn + 0).double().numpy())
    stratum = np.repeat(np.arange(len(batches)), [len(part) for part in np.array_split(np.arange(N), len(batches))])
    return np.stack(values)[stratum, number, chosen]


def two_groups(model, site, batches=(None,)):
    return all_draws(model, site, IDX1, 1, batches), all_draws(model, site, IDX2, 2, batches)


def combined(plus, minus, test_mode):
    return np.maximum(plus, minus) if test_mode == "three" else plus + minus


def close(found, expected, atol=2e-4):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=2e-3, atol=atol)


CASES = [("rho", "log-fold"), ("p", "difference"), ("p", "log-fold"), ("p", "log-odds")]


@pytest.mark.parametrize("test_mode", ["two", "three"])
@pytest.mark.parametrize(("site", "change"), CASES)
def test_cells_agree_with_brute_force(fitted, site, change, test_mode):
    a, b = two_groups(fitted, site)
    r = CHANGE[change](a, b, EPS[site])
    delta = DELTA[site, change]
    table = compared(
        fitted, site, unit="cell", change_fn=change, test_mode=test_mode, cred_interval_lvls=[0.5, 0.9]
    )
    probability = combined((r >= delta).mean(0), (r <= -delta).mean(0), test_mode)
    p = table["proba_de" if site == "rho" else "prob_da"].to_numpy()
    # A change within rounding of the bound may fall on either side.
    close(p, probability, atol=2.1 / N)
    close(table["bayes_factor"], np.log(p + 1e-8) - np.log(1 - p + 1e-8))
    prefix, scale = ("lfc", "scale") if site == "rho" else ("change", "est_prob")
    close(table[f"{scale}1"], a.mean(0))
    close(table[f"{scale}2"], b.mean(0))
    close(table[f"{prefix}_mean"], r.mean(0))
    close(table[f"{prefix}_std"], r.std(0, ddof=1))
    if site == "rho":
        for name, expected in (("median", np.median(r, 0)), ("min", r.min(0)), ("max", r.max(0))):
            close(table[f"lfc_{name}"], expected)
    else:
        close(table["effect_size"], a.mean(0) - b.mean(0))
    ordered = np.sort(r, 0)
    for level in (0.5, 0.9):
        ends = table[[f"{prefix}_confidence_interval_{level}_{end}" for end in ("min", "max")]].to_numpy()
        held = ((r >= ends[:, 0] - 1e-4) & (r <= ends[:, 1] + 1e-4)).mean(0)
        assert (held >= level).all()
        k = int(np.ceil(level * N)) - 1
        close(ends[:, 1] - ends[:, 0], (ordered[k:] - ordered[: N - k]).min(0), atol=1e-3)


@pytest.mark.parametrize("site", ["rho", "p"])
def test_vanilla_agrees_with_brute_force(fitted, site):
    a, b = two_groups(fitted, site)
    table = compared(fitted, site, unit="cell", mode="vanilla")
    close(table["proba_m1"], (a > b).mean(0), atol=1.1 / N)
    close(table["proba_m1"] + table["proba_m2"], 1.0)
    ratio = np.log(table["proba_m1"] + 1e-8) - np.log(table["proba_m2"] + 1e-8)
    close(table["bayes_factor"], ratio)
    means = compared(fitted, site, mode="vanilla", calibrated=False)
    error = np.sqrt(a.var(0, ddof=1) / len(IDX1) + b.var(0, ddof=1) / len(IDX2))
    close(means["proba_m1"], norm.cdf((a.mean(0) - b.mean(0)) / error), atol=2e-3)


def errors_of_means(a, b):
    return np.sqrt(a.var(0, ddof=1) / len(IDX1)), np.sqrt(b.var(0, ddof=1) / len(IDX2))


def slopes(change, first, second, eps):
    """Derivatives of the change with respect to both means, by hand."""
    ln2 = np.log(2)
    return {
        "log-fold": (1 / (first + eps) / ln2, 1 / (second + eps) / ln2),
        "difference": (1.0, 1.0),
        "log-odds": tuple((1 / (m + eps) + 1 / (1 - m + eps)) / ln2 for m in (first, second)),
    }[change]


@pytest.mark.parametrize("test_mode", ["two", "three"])
@pytest.mark.parametrize(("site", "change"), CASES)
def test_means_agree_with_brute_force(fitted, site, change, test_mode):
    a, b = two_groups(fitted, site)
    eps, delta = EPS[site], DELTA[site, change]
    estimate = CHANGE[change](a.mean(0), b.mean(0), eps)
    steep = slopes(change, a.mean(0), b.mean(0), eps)
    error = np.hypot(*(s * e for s, e in zip(steep, errors_of_means(a, b), strict=True)))
    table = compared(fitted, site, change_fn=change, test_mode=test_mode, calibrated=False, cred_interval_lvls=[0.9])
    p = table["proba_de" if site == "rho" else "prob_da"]
    plus, minus = norm.sf(delta, estimate, error), norm.cdf(-delta, estimate, error)
    close(p, combined(plus, minus, test_mode), atol=5e-3)
    prefix = "lfc" if site == "rho" else "change"
    close(table[f"{prefix}_mean"], estimate, atol=1e-3)
    close(table[f"{prefix}_std"], error, atol=1e-3)
    width = table[f"{prefix}_confidence_interval_0.9_max"] - table[f"{prefix}_confidence_interval_0.9_min"]
    # Of 300 draws: near the 3.29 standard deviations of a Normal.
    assert (width / error).mean() == pytest.approx(2 * norm.ppf(0.95), rel=0.15)


def support_of_counts(model, site, a, b, additive):
    """Means of the groups' counts with half a count added, and their standard errors, on the scale of the means."""
    cells = [model.minibatch(index) for index in (IDX1, IDX2)]
    seen = []
    for group in cells:
        if site == "p":
            y = (group.y.to_dense()[group.has_atac] > 0).double().numpy()
            n = len(y)
            rate = (y.sum(0) + 0.5) / (n + 1)
            seen.append((rate, np.sqrt(rate * (1 - rate) / n)))
        else:
            x = group.x.to_dense()[group.has_rna].double().numpy()
            n, one = len(x), 1e4 / x.sum(1).mean()
            scaled = 1e4 * x / x.sum(1, keepdims=True)
            seen.append((scaled.mean(0) + 0.5 * one / n, np.sqrt((scaled.var(0) + 0.5 * one**2 / n) / n)))
    if site == "p" and additive:
        common = (seen[0][0] + seen[1][0]) / 2
        numbers = [int(group.has_atac.sum()) for group in cells]
        seen = [
            (rate, np.maximum(error, np.sqrt(common * (1 - common) / n)))
            for (rate, error), n in zip(seen, numbers, strict=True)
        ]
    unit = (a.mean(0) + b.mean(0)) / (seen[0][0] + seen[1][0])
    half = (a.mean(0) + b.mean(0)) / 2
    return [(np.minimum(unit * mean, half), unit * error) for mean, error in seen]


def shrink(estimate, error, delta):
    """P(change >= delta), P(change <= -delta) under the prior learnt from all features, step by step."""
    grid = 2 * np.sqrt(np.mean(estimate**2)) * np.r_[1e-3, np.geomspace(0.02, 1, 14)]
    likelihood = np.stack([norm.pdf(estimate, 0, np.hypot(sd, error)) for sd in grid], 1)
    share = np.full(15, 1 / 15)
    for _ in range(200):
        part = likelihood * share / (likelihood @ share)[:, None]
        share = part.sum(0)
        share[0] += 10
        share /= share.sum()
    part = likelihood * share / (likelihood @ share)[:, None]
    keep = grid**2 / (grid**2 + error[:, None] ** 2)
    loc, scale = keep * estimate[:, None], np.sqrt(keep) * error[:, None]
    return (part * norm.sf(delta, loc, scale)).sum(1), (part * norm.cdf(-delta, loc, scale)).sum(1)


@pytest.mark.parametrize(("site", "change"), CASES)
def test_calibrated_means_agree_with_brute_force(fitted, site, change):
    a, b = two_groups(fitted, site)
    eps, delta = EPS[site], DELTA[site, change]
    estimate = CHANGE[change](a.mean(0), b.mean(0), eps)
    support = support_of_counts(fitted, site, a, b, change == "difference")
    errors = [np.hypot(own, error) for own, (_, error) in zip(errors_of_means(a, b), support, strict=True)]
    reached = [np.maximum(draws.mean(0), mean) for draws, (mean, _) in zip((a, b), support, strict=True)]
    error = np.hypot(*(s * e for s, e in zip(slopes(change, *reached, eps), errors, strict=True)))
    table = compared(fitted, site, change_fn=change)
    plus, minus = shrink(estimate, error, delta)
    p = table["proba_de" if site == "rho" else "prob_da"]
    close(p, np.maximum(plus, minus), atol=5e-3)
    # Not all alike: there is something to agree on.
    assert p.max() - p.min() > 0.4


def test_functions_of_ones_own(fitted):
    a, b = two_groups(fitted, "p")
    r = log_odds(a) - log_odds(b)
    table = compared(
        fitted, "p", unit="cell", change_fn=lambda p1, p2: log_odds(p1) - log_odds(p2), m1_domain_fn=lambda r: r > 1.5
    )
    close(table["prob_da"], (r > 1.5).mean(0), atol=2.1 / N)

    def outside(r):
        return r > 1.0, r < -2.0

    def with_offset(p1, p2, eps):
        return p1 - p2 + 1000 * eps

    shifted = a - b + 1.0
    table = compared(fitted, "p", unit="cell", change_fn=with_offset, m1_domain_fn=outside, test_mode="two")
    close(table["prob_da"], (shifted > 1.0).mean(0) + (shifted < -2.0).mean(0), atol=2.1 / N)
    close(table["change_mean"], shifted.mean(0))
    # Draws of means: the same change of the same posterior, counted instead of integrated.
    exact, counted = compared(fitted, "p"), compared(fitted, "p", m1_domain_fn=lambda r: (r >= 0.05, r <= -0.05))
    close(counted["prob_da"], exact["prob_da"], atol=0.08)


def test_one_sided_counts_only_more_open(fitted):
    a, b = two_groups(fitted, "p")
    table = compared(fitted, "p", unit="cell", two_sided=False)
    close(table["prob_da"], (a - b >= 0.05).mean(0), atol=2.1 / N)


@pytest.mark.parametrize("named", [{}, {"batchid1": ["batch_0", "batch_1"], "batchid2": ["batch_0", "batch_1"]}])
def test_batch_correction_decodes_both_groups_in_the_same_batches(fitted, named):
    a, b = two_groups(fitted, "p", (0, 1))
    table = compared(fitted, "p", unit="cell", batch_correction=True, **named)
    close(table["est_prob1"], a.mean(0))
    close(table["change_std"], (a - b).std(0, ddof=1))


def test_groups_of_different_batches_are_decoded_in_the_union(fitted):
    batch = fitted.adata.obs["batch"].to_numpy().astype(str)
    idx1, idx2 = np.flatnonzero(batch == "batch_0"), np.flatnonzero(batch == "batch_1")
    corrected = compared(fitted, "p", idx1=idx1, idx2=idx2, batch_correction=True)
    a, b = all_draws(fitted, "p", idx1, 1, (0, 1)), all_draws(fitted, "p", idx2, 2, (0, 1))
    close(corrected["effect_size"], a.mean(0) - b.mean(0))
    # One batch named stands for both groups.
    one = compared(fitted, "p", idx1=idx1, idx2=idx2, batch_correction=True, batchid1="batch_1")
    a, b = all_draws(fitted, "p", idx1, 1, (1,)), all_draws(fitted, "p", idx2, 2, (1,))
    close(one["effect_size"], a.mean(0) - b.mean(0))
    different = compared(
        fitted, "p", unit="cell", idx1=idx1, idx2=idx2, batch_correction=True, batchid1="batch_0", batchid2="batch_1"
    )
    close(different["est_prob1"], all_draws(fitted, "p", idx1, 1, (0,)).mean(0))
    close(different["est_prob2"], b.mean(0))


def test_random_pairs_share_a_batch(fitted):
    a, b = two_groups(fitted, "rho", (0, 1))
    table = compared(
        fitted, "rho", unit="cell", batch_correction=True, use_permutation=True, m_permutation=20_000
    )
    half = [slice(0, N // 2), slice(N // 2, N)]
    every = [
        (CHANGE["log-fold"](a[rows][:, None], b[rows][None], 1e-6) >= 0.25).mean((0, 1)) for rows in half
    ]
    below = [
        (CHANGE["log-fold"](a[rows][:, None], b[rows][None], 1e-6) <= -0.25).mean((0, 1)) for rows in half
    ]
    close(table["proba_de"], np.maximum(np.mean(every, 0), np.mean(below, 0)), atol=0.015)


def test_importance_weights_follow_the_posterior_of_the_model(continuum):
    """Means under importance weights agree with self-normalised importance sampling, and move from the guide's."""
    from pyro_multivi.posterior.draws import draw_latents, evaluating
    from pyro_multivi.posterior.evidence import log_weights, scored_traces

    index = np.arange(0, 20)
    cells, n = continuum.minibatch(index), 64
    with evaluating(continuum.program):
        log_w = log_weights(*scored_traces(continuum.program, cells, draw_latents(continuum.program, cells, n))).numpy()
    values = (draw(continuum.program, cells, ("rho",), n)["rho"] + 0).numpy()
    share = np.exp(log_w - log_w.max(0))
    share /= share.sum(0)
    expected = (share[..., None] * values).sum(0).mean(0)
    arguments = {"idx1": index, "idx2": np.arange(20, 60), "n_samples": 2000}
    table = continuum.differential_expression(weights="importance", **arguments).loc[names(continuum, "rho")]
    plain = continuum.differential_expression(**arguments).loc[names(continuum, "rho")]
    np.testing.assert_allclose(table["scale1"], expected, rtol=0.03)
    np.testing.assert_allclose(plain["scale1"], values.mean((0, 1)), rtol=0.03)


def test_estimated_pseudocounts(fitted):
    threshold = float(np.median(compared(fitted, "rho")["raw_mean1"]))
    table = compared(fitted, "rho", unit="cell", pseudocounts=None, threshold_counts=threshold)
    a, b = two_groups(fitted, "rho")
    low1, low2 = (table["raw_mean1"] < threshold).to_numpy(), (table["raw_mean2"] < threshold).to_numpy()
    expected = max(np.quantile(a.max(0)[low1], 0.9), np.quantile(b.max(0)[low2], 0.9))
    close(table["pseudocounts"], expected, atol=1e-6)
    close(table["lfc_mean"], CHANGE["log-fold"](a, b, expected).mean(0))
    assert (compared(fitted, "rho", pseudocounts=None, threshold_counts=0)["pseudocounts"] == 1e-10).all()


def test_estimated_delta_lies_between_the_modes(fitted):
    rng = np.random.default_rng(0)
    change = np.concatenate([rng.normal(0, 0.05, 800), rng.normal(2, 0.2, 100), rng.normal(-1, 0.2, 100)])
    assert estimated_delta(change, 0.1) == pytest.approx(0.6 * 1.5, abs=0.05)
    assert estimated_delta(rng.normal(0, 1e-3, 100), 0.1) == 0.1
    assert estimated_delta(np.full(5, 2.0), 0.1) == 0.1
    for unit in ("cell", "group"):
        delta = compared(fitted, "rho", unit=unit, delta=None)["delta"]
        assert delta.nunique() == 1
        assert 0.1 < delta.iloc[0] < 3


def test_fdr_calls_are_the_largest_prefix_within_the_target():
    p = np.array([0.2, 0.99, np.nan, 0.97, 0.90, 0.99, 0.5])
    assert expected_fdr_calls(p, 0.04).tolist() == [False, True, False, True, True, True, False]
    assert expected_fdr_calls(p, 0.03).tolist() == [False, True, False, True, False, True, False]
    assert not expected_fdr_calls(np.full(3, np.nan), 0.9).any()


@pytest.mark.parametrize("unit", ["group", "cell"])
@pytest.mark.parametrize("site", ["rho", "p"])
def test_statistics_of_counts_are_of_measured_cells(fitted, site, unit):
    table = compared(fitted, site, unit=unit)
    for number, index in ((1, IDX1), (2, IDX2)):
        cells = fitted.minibatch(index)
        x = cells.x.to_dense()[cells.has_rna].double().numpy()
        y = cells.y.to_dense()[cells.has_atac].double().numpy()
        assert 0 < len(x) < len(index)
        if site == "p":
            close(table[f"emp_prob{number}"], (y > 0).mean(0), atol=1e-9)
            continue
        close(table[f"raw_mean{number}"], x.mean(0), atol=1e-9)
        close(table[f"non_zeros_proportion{number}"], (x > 0).mean(0), atol=1e-9)
        close(table[f"raw_normalized_mean{number}"], (1e4 * x / x.sum(1, keepdims=True)).mean(0), atol=1e-6)
    if site == "p":
        close(table["emp_effect"], table["emp_prob1"] - table["emp_prob2"])


def test_without_measured_cells_counts_are_nan_and_it_is_said(fitted, caplog):
    atac_only = np.arange(150, 200)
    table = compared(fitted, "rho", idx1=atac_only, idx2=np.arange(100))
    assert "Group 1 has no cell with RNA" in caplog.text
    assert table[["raw_mean1", "non_zeros_proportion1", "raw_normalized_mean1"]].isna().all(axis=None)
    assert table["raw_mean2"].notna().all()
    assert table["proba_de"].between(0, 1).all()


def test_columns_and_order_are_those_scvi_users_know(fitted):
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
    assert list(da.index) == 4 * names(fitted, "p")
    short = fitted.differential_accessibility(groupby="cell_type", n_samples=100, all_stats=False)
    assert list(short.columns) == [name for name in da if not name.startswith("emp_")]
    pd.testing.assert_frame_equal(short, da[short.columns])
    vanilla = fitted.differential_expression(idx1=IDX1, mode="vanilla", n_samples=100, all_stats=False)
    assert list(vanilla.columns) == ["proba_m1", "proba_m2", "bayes_factor", "scale1", "scale2"]


@pytest.mark.parametrize("unit", ["group", "cell"])
@pytest.mark.parametrize("site", ["rho", "p"])
def test_sign_is_group_1_over_group_2(fitted, site, unit):
    change = "lfc_mean" if site == "rho" else "change_mean"
    table, turned = compared(fitted, site, unit=unit), compared(fitted, site, unit=unit, idx1=IDX2, idx2=IDX1)
    first, second = ("scale1", "scale2") if site == "rho" else ("est_prob1", "est_prob2")
    sure = (table[change].abs() > 0.1).to_numpy()
    assert sure.sum() > 3
    assert (np.sign(table[change]) == np.sign(table[first] - table[second]))[sure].all()
    assert (np.sign(table[change]) == -np.sign(turned[change]))[sure].all()


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
def test_a_feature_list_gives_the_same_probabilities(fitted, unit):
    table = compared(fitted, "rho", unit=unit)
    some = fitted.differential_expression(
        idx1=IDX1, idx2=IDX2, n_samples=N, unit=unit, gene_list=["gene_07", "gene_30"], batch_size=7
    )
    assert sorted(some.index) == ["gene_07", "gene_30"]
    columns = [name for name in table if not name.startswith("is_")]
    pd.testing.assert_frame_equal(some.sort_index()[columns], table.loc[["gene_07", "gene_30"], columns], rtol=1e-3)


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_seeds_and_the_users_data(fitted, unit, global_rng_untouched):
    obs, uns, layers = fitted.adata.obs.copy(), list(fitted.adata.uns), list(fitted.adata.layers)
    first = fitted.differential_expression(groupby="cell_type", unit=unit, n_samples=100)
    pd.testing.assert_frame_equal(
        first, fitted.differential_expression(groupby="cell_type", unit=unit, n_samples=100)
    )
    other = fitted.differential_expression(groupby="cell_type", unit=unit, n_samples=100, seed=1)
    assert not first["scale1"].sort_index().equals(other["scale1"].sort_index())
    pd.testing.assert_frame_equal(fitted.adata.obs, obs)
    assert (list(fitted.adata.uns), list(fitted.adata.layers)) == (uns, layers)


@pytest.mark.parametrize("unit", ["group", "cell"])
@pytest.mark.parametrize("site", ["rho", "p"])
def test_no_tensor_holds_all_features_of_all_draws(fitted, site, unit, monkeypatch):
    widths = []
    logits_at = Readout._logits_at

    def spy(self, features):
        found = logits_at(self, features)
        widths.append(found.shape[-1])
        return found

    monkeypatch.setattr(Readout, "_logits_at", spy)
    monkeypatch.setattr(Readout, "dense", lambda self: pytest.fail("all features at once"))
    monkeypatch.setattr(exceedance, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(exceedance, "BLOCK", 8 * N)
    monkeypatch.setattr("pyro_multivi.distributions.readout.STREAM_WIDTH", 8)
    whole = compared(fitted, site, unit=unit, cred_interval_lvls=[0.9], delta=None, pseudocounts=None)
    assert max(widths) == 8
    monkeypatch.undo()
    again = compared(fitted, site, unit=unit, cred_interval_lvls=[0.9], delta=None, pseudocounts=None)
    pd.testing.assert_frame_equal(whole, again, rtol=1e-3, atol=1e-5)


def test_shrinkage_controls_false_discoveries_where_a_flat_prior_does_not():
    realised = {"flat": [], "shrunk": []}
    for seed in range(10):
        rng = np.random.default_rng(seed)
        truth = np.where(rng.random(2000) < 0.2, rng.normal(0, 0.3, 2000), 0.0)
        error = rng.uniform(0.05, 0.2, 2000)
        estimate = truth + error * rng.standard_normal(2000)
        for kind, changes in (
            ("flat", shrinkage.as_estimated(estimate, error)), ("shrunk", shrinkage.shrunk(estimate, error, rng))
        ):  # fmt: skip
            called = expected_fdr_calls(np.maximum(changes.above(0.05), changes.below(-0.05)), 0.05)
            assert called.sum() > 50
            realised[kind].append((called & (np.abs(truth) < 0.05)).sum() / called.sum())
    assert np.mean(realised["shrunk"]) < 0.06
    assert np.mean(realised["flat"]) > 0.12


def test_draws_of_a_posterior_follow_it():
    rng = np.random.default_rng(0)
    changes = shrinkage.shrunk(np.linspace(-1, 1, 50), np.full(50, 0.2), rng)
    draws = changes.draws(20_000, rng)
    np.testing.assert_allclose(draws.mean(0), changes.mean(), atol=0.01)
    np.testing.assert_allclose(draws.std(0), changes.std(), atol=0.01)
    np.testing.assert_allclose((draws >= 0.3).mean(0), changes.above(0.3), atol=0.02)
