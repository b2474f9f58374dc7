"""The quality benchmark: scores where the answer is known, and systems on tiny cells without scvi-tools."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score


def test_each_pattern_is_a_third_and_nothing_else_is_seen(hidden):
    assert np.bincount(hidden.part).tolist() == [40, 40, 40]
    whole, seen = (data.X.toarray() for data in (hidden.whole, hidden.seen))
    genes = np.arange(whole.shape[1]) < hidden.n_genes
    expected = np.where(genes, hidden.has_rna[:, None], hidden.has_atac[:, None]) * whole
    np.testing.assert_array_equal(seen, expected)
    assert (seen != whole).any()
    assert list(hidden.seen.obs) == ["batch"]
    assert not hidden.seen.layers
    assert not hidden.seen.obsm


def test_the_share_of_pairs_is_the_one_asked_for(module, hidden):
    protocol = sys.modules["protocol"]
    n = hidden.whole.n_obs
    few = protocol.hide(hidden.whole, hidden.n_genes, 0, paired=0.1)
    counts = np.bincount(few.part, minlength=3)
    assert counts[protocol.PAIRED] == round(0.1 * n)
    assert abs(counts[protocol.RNA_ONLY] - counts[protocol.ATAC_ONLY]) <= 1
    assert few.seen.X[few.part == protocol.ATAC_ONLY][:, : hidden.n_genes].nnz == 0


def test_twins_are_pairs_that_nobody_sees_as_pairs(module, hidden):
    protocol = sys.modules["protocol"]
    twice = protocol.hide(hidden.whole, hidden.n_genes, 0, twins=0.25)
    one, two = twice.twins
    assert (len(one), two.tolist()) == (30, list(range(120, 150)))
    assert (twice.whole.X[one] != twice.whole.X[two]).nnz == 0
    assert (twice.part[one] == protocol.RNA_ONLY).all()
    assert (twice.part[two] == protocol.ATAC_ONLY).all()
    others = np.setdiff1d(np.arange(120), one)
    np.testing.assert_array_equal(twice.part[others], hidden.part[others])
    assert twice.seen.obs_names.is_unique
    # Twins that lie at the same place, far from all others; and imputation is asked for of other cells only.
    place = np.arange(150.0)
    place[two] = one
    asked = []

    def imputed(cells, columns):
        asked.append(cells)
        return twice.whole.layers[protocol.TRUE_RATE][cells][:, columns]

    scores = protocol.score(
        twice,
        {
            "latent": place[:, None],
            "rho": lambda cells: imputed(cells, slice(None, twice.n_genes)),
            "p": lambda cells: imputed(cells, slice(twice.n_genes, None)),
        },
    )
    assert scores["twin_foscttm"] == 0
    assert scores["twin_label_transfer"] == 1
    assert not np.isin(np.concatenate(asked), [*one, *two]).any()


def test_predicting_depth_alone_earns_nothing_within_strata_of_depth(module):
    protocol = module("protocol")
    rng = np.random.default_rng(0)
    depth, region = rng.uniform(0.1, 0.9, 400), rng.uniform(0.3, 0.7, 50)
    mark = rng.random((400, 50)) < 0.5
    truth = rng.random((400, 50)) < 0.6 * depth[:, None] + 0.4 * mark
    name = "atac_imputed_auroc_per_region_in_depth_strata"
    by_depth = protocol._accessibility("imputed", truth, depth[:, None] * region)
    assert by_depth["atac_imputed_auroc_per_region_top2000"] > 0.65
    assert by_depth[name] < 0.57
    assert protocol._accessibility("imputed", truth, 0.1 + mark)[name] > 0.65


def test_true_rates_are_the_oracle(module, hidden):
    """True rates beat the mean of the measured; and a system that returns them scores the same."""
    protocol = sys.modules["protocol"]
    rate = hidden.whole.layers[protocol.TRUE_RATE]
    label = protocol._codes(hidden.whole.obs["cell_type"])
    found = {
        "latent": np.eye(3)[label] + 1e-3 * np.random.default_rng(0).standard_normal((120, 3)),
        "rho": lambda cells: 7 * rate[cells, : hidden.n_genes],
        "p": lambda cells: rate[cells, hidden.n_genes :],
    }
    scores = protocol.score(hidden, found, batch_key="batch" if hidden.whole.obs["batch"].nunique() > 1 else None)
    metrics = module("summary").METRICS
    for name, metric in metrics.items():
        if metric.baseline is None:
            continue
        assert scores[name] == pytest.approx(scores[name.replace("imputed", "oracle")], rel=1e-5)
        base = scores[metric.baseline] if isinstance(metric.baseline, str) else metric.baseline
        assert metric.gain(scores[name], base) > 0, name
    assert scores["ari_kmeans"] == 1
    assert scores["silhouette_celltype"] > 0.95
    assert "foscttm_paired" not in scores


def test_scores_of_the_latent_space(module):
    protocol = module("protocol")
    rng = np.random.default_rng(0)
    z_nk = rng.standard_normal((600, 2))
    kind = np.repeat([0, 1, 2], 200)
    assert protocol.mixing(z_nk, kind) > 0.95
    # Far apart: every cell has neighbours of its own group only.
    assert protocol.mixing(z_nk + 100 * kind[:, None], kind) == pytest.approx(0, abs=1e-6)
    assert protocol.neighbours(np.array([[0.0], [1.0], [3.0]]), 1).tolist() == [[1], [0], [1]]
    assert protocol.foscttm(z_nk, z_nk) == 0
    assert protocol.foscttm(z_nk, rng.standard_normal((600, 2))) == pytest.approx(0.5, abs=0.05)
    # Of three cells on a line, the first two are exchanged: for each one other is closer, of three.
    assert protocol.foscttm(np.array([[0.0], [1.0], [9.0]]), np.array([[1.0], [0.0], [9.0]])) == pytest.approx(2 / 9)


def test_ranks(module):
    protocol = module("protocol")
    rng = np.random.default_rng(0)
    # Few values: many ties.
    truth, value = rng.random((40, 5)) < 0.3, rng.integers(0, 4, (40, 5))
    expected = [roc_auc_score(truth[:, j], value[:, j]) for j in range(5)]
    np.testing.assert_allclose(protocol.auroc(truth, value), expected)
    a = np.array([[1.0, 1.0, 5.0], [2.0, 3.0, 5.0], [3.0, 2.0, 5.0]])
    b = np.array([[10.0, 1.0, 1.0], [20.0, 2.0, 2.0], [90.0, 3.0, 3.0]])
    np.testing.assert_allclose(protocol.spearman(a, b), [1, 0.5, np.nan])


@pytest.mark.filterwarnings("ignore:Only 40 of 120 cells are paired:UserWarning")
@pytest.mark.parametrize(
    ("system", "settings"),
    [
        ("ours", {"model": {"n_hidden": 8, "n_latent": 2}}),
        ("linear", None),
        ("regression", {"method": "ridge"}),
        ("regression", {"method": "partial least squares"}),
        ("regression", {"method": "canonical correlations"}),
    ],
)
def test_systems_keep_the_contract(module, hidden, system, settings):
    before = hidden.seen.copy()
    fit = module(system).fit
    more = {} if settings is None else {"settings": settings}
    found = fit(hidden.seen, hidden.n_genes, hidden.has_rna, hidden.has_atac, 2, 0, **more)
    scores = sys.modules["protocol"].score(hidden, found)
    assert np.isfinite(list(scores.values())).all()
    assert {"foscttm_paired", "modality_mixing", "rna_imputed_poisson_nll_per_count"} < scores.keys()
    assert found["seconds"] > 0
    assert (hidden.seen.X != before.X).nnz == 0
    assert list(hidden.seen.obs) == list(before.obs)


@pytest.mark.filterwarnings("ignore:Only 40 of 120 cells are paired:UserWarning")
def test_watching_ours_changes_nothing_and_is_not_timed(module, hidden, monkeypatch):
    ours = module("ours")
    seen = []
    # A clock that moves whenever it is read.
    clock = itertools.count(100.0)
    monkeypatch.setattr(ours, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def watch(epoch, seconds, found):
        seen.append((epoch, seconds, found["latent"]))

    arguments = (hidden.seen, hidden.n_genes, hidden.has_rna, hidden.has_atac, 3, 0, {"model": {"n_latent": 2}})
    watched = ours.fit(*arguments, watch=watch, watched=(1, 3))
    alone = ours.fit(*arguments)
    np.testing.assert_array_equal(watched["latent"], alone["latent"])
    assert [epoch for epoch, *_ in seen] == [1, 3]
    # Read at the start; on each of two looks before and after; at the end.
    assert [seconds for _, seconds, _ in seen] == [1.0, 2.0]
    assert watched["seconds"] == 3.0
    assert not np.array_equal(seen[0][2], seen[1][2])


def test_unknown_settings_are_refused(module, hidden):
    with pytest.raises(ValueError, match=r"settings has \['trian'\]: allowed are setup, model"):
        module("ours").fit(hidden.seen, hidden.n_genes, hidden.has_rna, hidden.has_atac, 1, 0, {"trian": {}})


def test_labels_are_told_by_weighted_neighbours(module):
    """Two groups that are cliques: every hidden label is told right; without edges none is."""
    worker = module("paired_worker")
    label = np.repeat(["a", "b"], 20)
    same = sp.csr_matrix((label[:, None] == label[None]) - np.eye(40))
    known = np.ones(40, dtype=bool)
    assert worker.score_transfer(same, label, known, 0) == {"label_transfer": 1.0}
    assert worker.score_transfer(sp.csr_matrix((40, 40)), label, known, 0) == {"label_transfer": 0.0}
    # Weights decide, not the number of neighbours.
    other = sp.csr_matrix(1.0 * (label[:, None] != label[None]))
    assert worker.score_transfer(same + 3 * other, label, known, 0) == {"label_transfer": 0.0}
    # A cell without a type neither votes nor counts.
    assert worker.score_transfer(same + 3 * other, label, label == "a", 0) == {"label_transfer": 1.0}
    coarse, right = np.zeros(40), (label == "a").astype(int)
    assert worker.score_clusters([coarse, right], label, known) == {"ari_leiden": 1.0, "ami_leiden": 1.0}
    assert worker.mixing(same, label) == pytest.approx(0, abs=1e-6)
    assert worker.mixing(same + other, label) == pytest.approx(1, abs=0.01)


def test_spaces_of_the_modalities_of_paired_cells(module, hidden):
    worker = module("paired_worker")
    rna, atac, both = (
        space(hidden.whole, hidden.n_genes, 0)
        for space in (worker.principal_components, worker.semantic_indexing, worker.concatenation)
    )
    # In single precision: how far from 1 it is rounded differs between processors.
    np.testing.assert_allclose(atac.std(axis=0), 1, rtol=1e-6)
    assert both.shape == (120, rna.shape[1] + atac.shape[1])
    # Neither modality outweighs the other.
    assert both[:, : rna.shape[1]].var(axis=0).sum() == pytest.approx(1)
    assert both[:, rna.shape[1] :].var(axis=0).sum() == pytest.approx(1)
