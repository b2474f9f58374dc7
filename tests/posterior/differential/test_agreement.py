"""Differential tests against plain NumPy that keeps every draw of every feature in memory."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm, t

from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.posterior.differential.effect import estimated_delta

EPS = {RNA: 1e-6, ATAC: 1e-3}
DELTA = {(RNA, "log-fold"): 0.25, (ATAC, "difference"): 0.05, (ATAC, "log-fold"): 0.25, (ATAC, "log-odds"): 0.5}
CASES = [(RNA, "log-fold"), (ATAC, "difference"), (ATAC, "log-fold"), (ATAC, "log-odds")]


def log_odds(p):
    return np.log2(p) - np.log2(1 - p)


CHANGE = {
    "log-fold": lambda a, b, eps: np.log2(a + eps) - np.log2(b + eps),
    "difference": lambda a, b, eps: a - b,
    "log-odds": lambda a, b, eps: np.log2((a + eps) / (1 - a + eps)) - np.log2((b + eps) / (1 - b + eps)),
}


def combined(plus, minus, test_mode):
    return np.maximum(plus, minus) if test_mode == "three" else plus + minus


def close(found, expected, atol=2e-4):
    np.testing.assert_allclose(np.asarray(found, dtype=float), expected, rtol=2e-3, atol=atol)


def scale(groups, modality):
    return groups.detection() if modality is ATAC else 1.0


@pytest.mark.parametrize("test_mode", ["two", "three"])
@pytest.mark.parametrize(("modality", "change"), CASES)
def test_cells(groups, modality, change, test_mode):
    a, b = groups.both(modality)
    factor = scale(groups, modality)
    r = CHANGE[change](factor * a, factor * b, EPS[modality])
    delta, n = DELTA[modality, change], groups.n
    table = groups.compared(modality, unit="cell", change_fn=change, test_mode=test_mode, cred_interval_lvls=[0.5, 0.9])
    probability = combined((r >= delta).mean(0), (r <= -delta).mean(0), test_mode)
    p = table["proba_de" if modality is RNA else "prob_da"].to_numpy()
    # A change within rounding of the bound may fall on either side.
    close(p, probability, atol=2.1 / n)
    close(table["bayes_factor"], np.log(p + 1e-8) - np.log(1 - p + 1e-8))
    prefix, of = ("lfc", "scale") if modality is RNA else ("change", "est_prob")
    close(table[f"{of}1"], a.mean(0))
    close(table[f"{of}2"], b.mean(0))
    close(table[f"{prefix}_mean"], r.mean(0))
    close(table[f"{prefix}_std"], r.std(0, ddof=1))
    if modality is RNA:
        for name, expected in (("median", np.median(r, 0)), ("min", r.min(0)), ("max", r.max(0))):
            close(table[f"lfc_{name}"], expected)
    else:
        close(table["effect_size"], a.mean(0) - b.mean(0))
    ordered = np.sort(r, 0)
    for level in (0.5, 0.9):
        ends = table[[f"{prefix}_confidence_interval_{level}_{end}" for end in ("min", "max")]].to_numpy()
        held = ((r >= ends[:, 0] - 1e-4) & (r <= ends[:, 1] + 1e-4)).mean(0)
        assert (held >= level).all()
        k = int(np.ceil(level * n)) - 1
        close(ends[:, 1] - ends[:, 0], (ordered[k:] - ordered[: n - k]).min(0), atol=1e-3)


def test_p_itself(groups):
    a, b = groups.both(ATAC)
    table = groups.compared(ATAC, unit="cell", probability="accessible")
    close(table["prob_da"], np.maximum((a - b >= 0.05).mean(0), (a - b <= -0.05).mean(0)), atol=2.1 / groups.n)
    close(table["change_mean"], a.mean(0) - b.mean(0))
    means = groups.compared(ATAC, probability="accessible", calibrated=False)
    close(means["change_mean"], a.mean(0) - b.mean(0))


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_vanilla(groups, modality):
    a, b = groups.both(modality)
    table = groups.compared(modality, unit="cell", mode="vanilla")
    close(table["proba_m1"], (a > b).mean(0), atol=1.1 / groups.n)
    close(table["proba_m1"] + table["proba_m2"], 1.0)
    ratio = np.log(table["proba_m1"] + 1e-8) - np.log(table["proba_m2"] + 1e-8)
    close(table["bayes_factor"], ratio)
    means = groups.compared(modality, mode="vanilla", calibrated=False)
    close(means["proba_m1"], norm.cdf((a.mean(0) - b.mean(0)) / np.hypot(*errors_of_means(groups, a, b))), atol=2e-3)


def errors_of_means(groups, a, b):
    return np.sqrt(a.var(0, ddof=1) / len(groups.first)), np.sqrt(b.var(0, ddof=1) / len(groups.second))


def slopes(change, first, second, eps):
    """Derivatives of the change with respect to both means, by hand."""
    ln2 = np.log(2)
    return {
        "log-fold": (1 / (first + eps) / ln2, 1 / (second + eps) / ln2),
        "difference": (1.0, 1.0),
        "log-odds": tuple((1 / (m + eps) + 1 / (1 - m + eps)) / ln2 for m in (first, second)),
    }[change]


@pytest.mark.parametrize("test_mode", ["two", "three"])
@pytest.mark.parametrize(("modality", "change"), CASES)
def test_means(groups, modality, change, test_mode):
    a, b = (scale(groups, modality) * draws for draws in groups.both(modality))
    eps, delta = EPS[modality], DELTA[modality, change]
    estimate = CHANGE[change](a.mean(0), b.mean(0), eps)
    steep = slopes(change, a.mean(0), b.mean(0), eps)
    error = np.hypot(*(s * e for s, e in zip(steep, errors_of_means(groups, a, b), strict=True)))
    table = groups.compared(modality, change_fn=change, test_mode=test_mode, calibrated=False, cred_interval_lvls=[0.9])
    p = table["proba_de" if modality is RNA else "prob_da"]
    plus, minus = norm.sf(delta, estimate, error), norm.cdf(-delta, estimate, error)
    close(p, combined(plus, minus, test_mode), atol=5e-3)
    prefix = "lfc" if modality is RNA else "change"
    close(table[f"{prefix}_mean"], estimate, atol=1e-3)
    close(table[f"{prefix}_std"], error, atol=1e-3)
    width = table[f"{prefix}_confidence_interval_0.9_max"] - table[f"{prefix}_confidence_interval_0.9_min"]
    # Of 300 draws: near the 3.29 standard deviations of a Normal.
    assert (width / error).mean() == pytest.approx(2 * norm.ppf(0.95), rel=0.15)


def shrink(estimate, error, delta, common):
    """P(change >= delta), P(change <= -delta) under the prior learnt from all features, step by step."""
    grid = 2 * np.sqrt(np.mean(estimate**2)) * np.r_[1e-3, np.geomspace(0.02, 1, 14)]
    total = np.hypot(grid, error[:, None])
    share, centre = np.full(15, 1 / 15), 0.0
    for _ in range(10):
        for _ in range(20):
            part = norm.pdf(estimate[:, None], centre, total) * share
            part /= part.sum(1, keepdims=True)
            share = part.sum(0)
            share[0] += 10
            share /= share.sum()
        part = norm.pdf(estimate[:, None], centre, total) * share
        part /= part.sum(1, keepdims=True)
        weight = (part / total**2).sum(1)
        precision = weight.sum() + 10 / (grid[0] ** 2 + np.median(error) ** 2)
        if common is not None:
            centre = weight @ estimate / precision
    if common is not None:
        grid = np.sqrt(grid**2 + common**2 + 1 / precision)
        total = np.hypot(grid, error[:, None])
    part = norm.pdf(estimate[:, None], centre, total) * share
    part /= part.sum(1, keepdims=True)
    keep = (grid / total) ** 2
    loc, sd = centre + keep * (estimate[:, None] - centre), np.sqrt(keep) * error[:, None]
    return (part * norm.sf(delta, loc, sd)).sum(1), (part * norm.cdf(-delta, loc, sd)).sum(1)


def counted(groups, modality, index, draws):
    """Counts of a group, depths of its cells, and exposure of its mean (of regions of -log(1 - mean)), by hand."""
    chosen = groups.chosen(index)[0]
    cells = groups.model.minibatch(index)
    if modality is ATAC:
        y = (cells.y.to_dense()[cells.has_atac] > 0).double().numpy()
        d = groups.cell_factors(index)
        measured = np.isfinite(d)
        expected = (draws * np.nan_to_num(d)[:, None])[measured].mean(0) * groups.model.get_region_factors()
        # As deep as the cells are: so many times the rate of opening that all regions have their number of open cells.
        deeper = brentq(lambda times: (1 - (1 - expected) ** times).sum() - y.mean(0).sum(), 0.01, 100, xtol=1e-12)
        exposure = len(y) * deeper * np.log(1 - expected) / np.log(1 - groups.detection() * draws.mean(0))
        return y, np.ones(len(y)), exposure
    x = cells.x.to_dense()[cells.has_rna].double().numpy()
    depth = x.sum(1)
    of_draw = cells.x.to_dense().double().numpy().sum(1)[chosen][cells.has_rna.numpy()[chosen]]
    expected = of_draw @ groups.expected(index)[cells.has_rna.numpy()[chosen]]
    exposure = depth.sum() * expected / expected.sum() / draws.mean(0)
    return x, depth, exposure


def dispersion(x, depth, exposure, rate, both):
    """Moments of each gene, drawn to those of all genes, themselves drawn to those of both groups."""
    n = len(x)
    own_rate = x.sum(0) / depth.sum()
    excess = ((x - np.outer(depth, own_rate)) ** 2 / depth[:, None]).sum(0) - (n - 1) * own_rate
    base = own_rate**2 * depth.sum() * (n - 1) / n
    typical = ((n - 1) * excess.sum() / base.sum() + 2 * both) / (n + 1)
    weight = 1 / (1 + 2 / (n - 1) * (1 + 1 / (typical * rate * exposure / n)) ** 2)
    return np.maximum(weight * excess / base + (1 - weight) * typical, 0.1 * typical), (excess, base)


def two_sample_test(groups, modality, plain):
    """Means with one more cell each, and z of the likelihood ratio: SciPy's densities, its optimiser, its t."""
    found = [counted(groups, modality, *both) for both in zip((groups.first, groups.second), plain, strict=True)]
    (x1, depth1, e1), (x2, depth2, e2) = found
    k1, k2, n1, n2 = x1.sum(0), x2.sum(0), len(x1), len(x2)
    if modality is ATAC:
        return (*two_sample_test_of_open_cells(k1, k2, n1, n2, e1 / n1, e2 / n2), None)
    rate = (k1 + k2 + 0.5) / (e1 + e2)
    moments = [dispersion(x, depth, e, rate, 0.0)[1] for x, depth, e in found]
    both = sum(one.sum() for one, _ in moments) / sum(one.sum() for _, one in moments)
    phi1, phi2 = (dispersion(x, depth, e, rate, both)[0] for x, depth, e in found)
    size1, size2 = (d.sum() ** 2 / (d**2).sum() * (n + 1) / n for d, n in ((depth1, n1), (depth2, n2)))
    k1, k2, e1, e2 = k1 + rate * e1 / n1, k2 + rate * e2 / n2, e1 * (1 + 1 / n1), e2 * (1 + 1 / n2)

    def log_density(j, first, second):
        parts = ((k1[j], size1 / phi1[j], e1[j] * first), (k2[j], size2 / phi2[j], e2[j] * second))
        # Counts need not be whole here: the density of SciPy, without its factorial.
        return sum(k * np.log(mu / (mu + r)) + r * np.log(r / (mu + r)) for k, r, mu in parts)

    first, second = k1 / e1, k2 / e2
    z, error = np.empty(len(first)), np.empty((2, len(first)))
    for j in range(len(first)):
        best = likeliest(lambda mean, j=j: log_density(j, mean, mean), first[j], second[j])
        root = np.sqrt(max(2 * (log_density(j, first[j], second[j]) - log_density(j, best, best)), 0))
        variance = [best / e[j] + best**2 * phi[j] / size for e, phi, size in ((e1, phi1, size1), (e2, phi2, size2))]
        free = sum(variance) ** 2 / sum(v**2 / (n + 9) for v, n in zip(variance, (n1, n2), strict=True))
        error[:, j] = np.sqrt(variance)
        z[j] = np.sign(first[j] - second[j]) * norm.isf(t.sf(root, free))
    return first, second, z, error


def likeliest(log_density, *ends):
    """Value between two others at which a density is largest."""
    return minimize_scalar(
        lambda value: -log_density(value), bounds=sorted(ends), method="bounded", options={"xatol": 1e-12}
    ).x


def two_sample_test_of_open_cells(k1, k2, n1, n2, depth1, depth2):
    """Means and z of numbers of open cells, each closed with probability (1 - mean)^depth, one more cell in each."""
    both = (k1 + k2 + 0.5) / (n1 + n2)
    closed = (1 - both) ** ((n1 + n2) / (n1 * depth1 + n2 * depth2))
    k1, k2, n1, n2 = k1 + 1 - closed**depth1, k2 + 1 - closed**depth2, n1 + 1, n2 + 1
    first, second = (1 - (1 - k / n) ** (1 / depth) for k, n, depth in ((k1, n1, depth1), (k2, n2, depth2)))
    z = np.empty(len(first))

    def log_density(j, first, second):
        parts = (k1[j], n1, 1 - (1 - first) ** depth1[j]), (k2[j], n2, 1 - (1 - second) ** depth2[j])
        return sum(k * np.log(p) + (n - k) * np.log1p(-p) for k, n, p in parts)

    for j in range(len(first)):
        best = likeliest(lambda mean, j=j: log_density(j, mean, mean), first[j], second[j])
        root = np.sqrt(max(2 * (log_density(j, first[j], second[j]) - log_density(j, best, best)), 0))
        z[j] = np.sign(first[j] - second[j]) * root
    return first, second, z


@pytest.mark.parametrize(("modality", "change"), CASES)
def test_calibrated_means(groups, modality, change):
    eps, delta = EPS[modality], DELTA[modality, change]
    first, second, z, errors = two_sample_test(groups, modality, groups.both(modality))
    estimate = CHANGE[change](first, second, eps)
    error = np.abs(estimate / z)
    assert (np.abs(z) > 1e-3).all()
    n = min(
        len(counted(groups, modality, index, draws)[0])
        for index, draws in zip((groups.first, groups.second), groups.both(modality), strict=True)
    )
    common = 2 * t.ppf(0.975, n - 1) / 1.96 * np.sqrt((errors**2).sum()) / np.log(2) if modality is RNA else None
    plus, minus = shrink(estimate, error, delta, common)
    table = groups.compared(modality, change_fn=change)
    p = table["proba_de" if modality is RNA else "prob_da"]
    close(p, np.maximum(plus, minus), atol=5e-3)
    # Not all alike: there is something to agree on.
    assert p.max() - p.min() > 0.3
    vanilla = groups.compared(modality, mode="vanilla")
    close(vanilla["proba_m1"], norm.cdf(z), atol=1e-3)


def test_p_is_tested_as_it_is_detected(groups):
    tables = [groups.compared(ATAC, mode="vanilla", probability=name) for name in ("accessible", "detected")]
    close(tables[0]["proba_m1"], tables[1]["proba_m1"], atol=1e-9)
    first, second, z = two_sample_test(groups, ATAC, groups.both(ATAC))[:3]
    estimate = np.minimum(first / groups.detection(), 1) - np.minimum(second / groups.detection(), 1)
    error = np.abs(estimate / z)
    p = groups.compared(ATAC, probability="accessible")["prob_da"]
    close(p, np.maximum(*shrink(estimate, error, 0.05, None)), atol=5e-3)


def of_types(groups):
    types = groups.model.adata.obs["cell_type"].to_numpy().astype(str)
    return {name: np.flatnonzero(types == name) for name in np.unique(types)}


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_means_of_the_rest_are_those_of_its_groups(groups, modality):
    cells = of_types(groups)
    table = groups.compared(modality, idx1=None, idx2=None, groupby="cell_type", calibrated=False, change_fn="log-fold")
    drawn = {name: groups.draws(modality, index) for name, index in cells.items()}
    for name, rows in table.groupby("group1"):
        others = [other for other in cells if other != name]
        factor = groups.detection(*cells.values()) if modality is ATAC else 1.0
        share = np.array([len(cells[other]) for other in others]) / sum(len(cells[other]) for other in others)
        mean = share @ np.array([drawn[other].mean(0) for other in others])
        squares = [drawn[other].var(0, ddof=1) + drawn[other].mean(0) ** 2 for other in others]
        square = share @ np.array(squares)
        rest_error = np.sqrt((square - mean**2) / sum(len(cells[other]) for other in others))
        of, prefix = ("scale", "lfc") if modality is RNA else ("est_prob", "change")
        close(rows[f"{of}1"], drawn[name].mean(0))
        close(rows[f"{of}2"], mean)
        means = factor * drawn[name].mean(0), factor * mean
        close(rows[f"{prefix}_mean"], CHANGE["log-fold"](*means, EPS[modality]))
        steep = slopes("log-fold", *means, EPS[modality])
        own_error = drawn[name].std(0, ddof=1) / np.sqrt(len(cells[name]))
        close(rows[f"{prefix}_std"], np.hypot(steep[0] * factor * own_error, steep[1] * factor * rest_error))


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_cells_of_the_rest_are_drawn_in_proportion(groups, modality):
    cells = of_types(groups)
    table = groups.compared(modality, idx1=None, idx2=None, groupby="cell_type", unit="cell", mode="vanilla")
    drawn = {name: groups.draws(modality, index) for name, index in cells.items()}
    of = "scale" if modality is RNA else "est_prob"
    for name, rows in table.groupby("group1"):
        rest = np.concatenate([drawn[other][:, None] for other in cells if other != name], 1)
        share = np.array([len(cells[other]) for other in cells if other != name])
        share = share / share.sum()
        close(rows[f"{of}1"], drawn[name].mean(0))
        expected = (rest.mean(0) * share[:, None]).sum(0)
        # 300 of the draws stand for the rest: within four standard errors of all.
        error = np.sqrt((rest.var(0) * share[:, None]).sum(0) / groups.n) + 0.01 * np.ptp(rest.mean(0), 0)
        assert (np.abs(rows[f"{of}2"] - expected) < 4 * error).all()
        larger = np.array([(drawn[name][:, None] > rest[None, :, k]).mean((0, 1)) for k in range(len(share))])
        close(rows["proba_m1"], (larger * share[:, None]).sum(0), atol=0.12)


def test_functions_of_ones_own(groups):
    a, b = (groups.detection() * draws for draws in groups.both(ATAC))
    r = log_odds(a) - log_odds(b)
    table = groups.compared(
        ATAC, unit="cell", change_fn=lambda p1, p2: log_odds(p1) - log_odds(p2), m1_domain_fn=lambda r: r > 1.5
    )
    close(table["prob_da"], (r > 1.5).mean(0), atol=2.1 / groups.n)

    def outside(r):
        return r > 1.0, r < -2.0

    def with_offset(p1, p2, eps):
        return p1 - p2 + 1000 * eps

    shifted = a - b + 1.0
    table = groups.compared(ATAC, unit="cell", change_fn=with_offset, m1_domain_fn=outside, test_mode="two")
    close(table["prob_da"], (shifted > 1.0).mean(0) + (shifted < -2.0).mean(0), atol=2.1 / groups.n)
    close(table["change_mean"], shifted.mean(0))
    # Draws of means: the same change of the same posterior, counted instead of integrated.
    exact = groups.compared(ATAC)
    counted = groups.compared(ATAC, m1_domain_fn=lambda r: (r >= 0.05, r <= -0.05))
    close(counted["prob_da"], exact["prob_da"], atol=0.08)


def test_one_sided_counts_only_more_open(groups):
    a, b = (groups.detection() * draws for draws in groups.both(ATAC))
    table = groups.compared(ATAC, unit="cell", two_sided=False)
    close(table["prob_da"], (a - b >= 0.05).mean(0), atol=2.1 / groups.n)


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_estimated_pseudocounts(groups, unit):
    threshold = float(np.median(groups.compared(RNA)["raw_mean1"]))
    table = groups.compared(RNA, unit=unit, pseudocounts=None, threshold_counts=threshold, calibrated=False)
    a, b = groups.both(RNA)
    low1, low2 = (table["raw_mean1"] < threshold).to_numpy(), (table["raw_mean2"] < threshold).to_numpy()
    expected = max(np.quantile(a.max(0)[low1], 0.9), np.quantile(b.max(0)[low2], 0.9))
    close(table["pseudocounts"], expected, atol=1e-6)
    if unit == "cell":
        close(table["lfc_mean"], CHANGE["log-fold"](a, b, expected).mean(0))
    else:
        close(table["lfc_mean"], CHANGE["log-fold"](a.mean(0), b.mean(0), expected), atol=1e-3)
    assert (groups.compared(RNA, pseudocounts=None, threshold_counts=0)["pseudocounts"] == 1e-10).all()


@pytest.mark.parametrize("unit", ["group", "cell"])
def test_estimated_delta(groups, unit):
    a, b = groups.both(RNA)
    change = CHANGE["log-fold"]
    r = change(a, b, 1e-6).mean(0) if unit == "cell" else change(a.mean(0), b.mean(0), 1e-6)
    table = groups.compared(RNA, unit=unit, delta=None, calibrated=False)
    close(table["delta"], estimated_delta(r, 0.1), atol=1e-3)


@pytest.mark.parametrize("unit", ["cell", "group"])
def test_functions_may_change_what_they_are_given(groups, unit):
    def in_place(first, second):
        first *= 2
        second += 1
        return first - second

    def bounds(change):
        change *= -1
        return change < -0.1

    given = {"unit": unit, "cred_interval_lvls": [0.9]}
    expected = groups.compared(ATAC, change_fn=lambda a, b: 2 * a - (b + 1), m1_domain_fn=lambda r: r > 0.1, **given)
    found = groups.compared(ATAC, change_fn=in_place, m1_domain_fn=bounds, **given)
    pd.testing.assert_frame_equal(found, expected)
