"""The quality benchmark: scores where the answer is known, tables, and a run on tiny cells without scvi-tools."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
TINY = {"n_cells": (120, 0, 0), "n_genes": 40, "n_regions": 60, "n_types": 3}


@pytest.fixture
def module(monkeypatch) -> Iterator[object]:
    """Loads a script of the benchmark, which is no package; nothing of it stays behind."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    scripts = [path.stem for path in (*FOLDER.glob("*.py"), *FOLDER.parent.glob("*.py"))]

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        # Where dataclasses, and scripts that import each other, look for it.
        sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    yield load
    for name in scripts:
        sys.modules.pop(name, None)


@pytest.fixture
def hidden(module, tmp_path):
    """Simulated cells with a part hidden."""
    protocol = module("protocol")
    path = tmp_path / "cells.h5ad"
    module("simulated").simulate(0, **TINY).write_h5ad(path)
    return protocol.prepare(path, seed=0)


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


def record(system, seed, seconds=10.0, checkpoints=None, **scores):
    base = {"atac_base_auprc_per_cell": 0.2, "atac_oracle_auprc_per_cell": 0.6}
    result = {"scores": {**base, **scores}, "seconds": seconds, "epochs": 9, "n_cells": 5, "n_genes": 6, "n_regions": 7}
    if checkpoints is not None:
        result["checkpoints"] = checkpoints
    kind = system.split()[0]
    return {"data": "cells", "seed": seed, "system": system, "kind": kind, "result": result, "failed": None}


def rows(text: str) -> list[dict[str, str]]:
    """Every line of every table, by heading."""
    found, header = [], None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = cells
        elif set("".join(cells)) - set("-: "):
            found.append(dict(zip(header, cells, strict=True)))
    return found


def test_gains_are_over_the_best_setting_of_each_score_within_seeds(module):
    auprc, nll = "atac_imputed_auprc_per_cell", "rna_imputed_poisson_nll_per_count"
    records = [
        record("peer a", 0, **{auprc: 0.3, nll: 2.0}), record("peer a", 1, **{auprc: 0.4, nll: 2.0}),
        record("peer b", 0, **{auprc: 0.2, nll: 1.0}), record("peer b", 1, **{auprc: 0.2, nll: 1.5}),
        record("ours", 0, 2.0, **{auprc: 0.4, nll: 1.5}), record("ours", 1, 2.0, **{auprc: 0.5, nll: 1.5}),
    ]  # fmt: skip
    table = rows(module("summary").render(records))
    found = {row["metric"]: row for row in table if "metric" in row}
    gap = {row["share of the gap closed"]: row for row in table if "metric" not in row}
    assert list(gap) == [auprc]
    assert (gap[auprc]["peer a"], gap[auprc]["ours"]) == ("0.375 ± 0.177", "0.625 ± 0.177")
    assert found[auprc]["ours: gain over best peer"] == "+0.100 ± 0.000"
    assert found[auprc]["mean of the measured"] == "0.200 ± 0.000"
    assert found[nll]["ours: gain over best peer"] == "-0.250 ± 0.354"
    assert found[nll]["peer b"] == "1.250 ± 0.354"
    assert found["training, s"]["ours: gain over best peer"] == "5.000 ± 0.000×"


def test_ours_stands_beside_the_best_of_all_others(module):
    purity, nll = "knn_celltype_purity", "rna_imputed_poisson_nll_per_count"
    records = [
        record("linear", 0, **{purity: 0.3, nll: 2.0}), record("linear", 1, **{purity: 0.4, nll: 2.0}),
        record("regression", 0, **{purity: 0.2, nll: 1.0}), record("regression", 1, **{purity: 0.2, nll: 1.5}),
        # The best, in one seed of two: no mean to be held against.
        record("peer", 0, **{purity: 0.9, nll: 0.1}),
        record("ours", 0, **{purity: 0.4, nll: 1.5}), record("ours", 1, **{purity: 0.6, nll: 1.5}),
    ]  # fmt: skip
    summary = module("summary")
    found = {row["metric"]: row for row in rows(summary.render_rivals(records))}
    assert found[purity]["ours"] == "0.500 ± 0.141"
    assert found[purity]["best other"] == "0.350 ± 0.071 linear"
    assert found[purity]["gain over the best"] == "+0.1500 ± 0.0500"
    assert found[nll]["best other"] == "1.250 ± 0.354 regression"
    assert found[nll]["gain over the best"] == "-0.2500 ± 0.2500"
    # The mean of the measured is one of them.
    for one in records:
        one["result"]["scores"]["atac_imputed_auprc_per_cell"] = 0.1
    found = {row["metric"]: row for row in rows(summary.render_rivals(records))}
    assert found["atac_imputed_auprc_per_cell"]["best other"] == "0.200 ± 0.000 mean of the measured"
    every = {row["metric"]: row for row in rows(summary.render_rivals(records, every=True))}
    assert every[purity]["gain over the best"] == "+0.1500 ± 0.0500 (linear)"
    assert (every[purity]["linear"], every[purity]["regression"]) == ("0.350 ± 0.071", "0.200 ± 0.000")
    assert summary.render_rivals(records[:4]) == ""


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
    np.testing.assert_allclose(atac.std(axis=0), 1)
    assert both.shape == (120, rna.shape[1] + atac.shape[1])
    # Neither modality outweighs the other.
    assert both[:, : rna.shape[1]].var(axis=0).sum() == pytest.approx(1)
    assert both[:, rna.shape[1] :].var(axis=0).sum() == pytest.approx(1)


def test_time_to_the_quality_of_scvi_tools(module):
    purity, nll = "knn_celltype_purity", "rna_imputed_poisson_nll_per_count"

    def at(epochs, seconds, *scores):
        return {"epochs": epochs, "seconds": seconds, "scores": dict(zip((purity, nll), scores, strict=True))}

    checkpoints = [at(1, 0.5, 0.5, 2.0), at(2, 1.0, 0.9, 2.0), at(3, 2.0, 0.5, 1.0), at(4, 4.0, 0.8, 1.2)]
    records = [
        record("peer", 0, 100.0, **{purity: 0.8, nll: 1.2}),
        record("ours", 0, 5.0, checkpoints, **{purity: 0.9, nll: 1.1}),
        # In the second seed scvi-tools is out of reach.
        record("peer", 1, 100.0, **{purity: 1.0, nll: 1.2}),
        record("ours", 1, 5.0, checkpoints, **{purity: 0.9, nll: 1.1}),
    ]
    summary = module("summary")
    table = {row["to reach"]: row for row in rows(summary.render_times(records, [purity, nll]))}
    assert (table[purity]["ours, s"], table[purity]["peer / ours"], table[purity]["reached"]) == (
        "1.000", "100.0×", "1 of 2",
    )  # fmt: skip
    assert (table[nll]["ours, s"], table[nll]["reached"]) == ("2.000 ± 0.000", "2 of 2")
    # Both at the same time, not each at its own.
    assert table["all of these at once"]["ours, s"] == "4.000"
    assert table["all of these at once"]["ours, epochs"] == "4.000"
    # In the mean 0.9 is to be reached, and 1.2: at the end.
    means = table["all at once, means over seeds"]
    assert (means["ours, s"], means["ours, epochs"], means["reached"]) == ("5.000 ± 0.000", "9", "yes")
    records[2]["result"]["scores"][purity] = 1.1
    table = {row["to reach"]: row for row in rows(summary.render_times(records, [purity, nll]))}
    assert table["all at once, means over seeds"]["reached"] == "no"


def test_time_to_the_mean_quality_of_scvi_tools(module):
    purity = "knn_celltype_purity"

    def at(epochs, seconds, score):
        return {"epochs": epochs, "seconds": seconds, "scores": {purity: score}}

    records = [
        # 0.85 in the mean: out of reach of ours in the second seed, where it ends after two epochs.
        record("peer", 0, 90.0, **{purity: 0.8}),
        record("peer", 1, 110.0, **{purity: 0.9}),
        record("ours", 0, 9.0, [at(1, 1.0, 0.7), at(2, 2.0, 0.8), at(4, 4.0, 0.9), at(8, 9.0, 0.95)], **{purity: 0.95}),
        record("ours", 1, 6.0, [at(1, 2.0, 0.7), at(2, 3.0, 0.8)], **{purity: 0.8}),
    ]
    for one, epochs in ((records[2], 8), (records[3], 3)):
        one["result"]["epochs"] = epochs
    table = {row["to reach"]: row for row in rows(module("summary").render_times(records, [purity]))}
    found = table["all at once, means over seeds"]
    assert (found["ours, s"], found["ours, epochs"]) == ("5.000 ± 1.414", "4")
    assert (found["peer / ours"], found["reached"]) == ("20.00×", "yes")
    # A run that was only looked at at its end counts from there: two epochs of the other are not held against it.
    records[3]["result"]["checkpoints"] = []
    table = {row["to reach"]: row for row in rows(module("summary").render_times(records, [purity]))}
    assert table["all at once, means over seeds"]["ours, epochs"] == "4"
    # Without a seed of both there is nothing to compare.
    apart = [records[0], records[3]]
    table = {row["to reach"]: row for row in rows(module("summary").render_times(apart, [purity]))}
    found = table["all at once, means over seeds"]
    assert (found["peer, s"], found["ours, s"], found["reached"]) == ("–", "–", "no")


def test_failures_are_named(module):
    lost = {**record("peer", 0), "result": None, "failed": "out of memory", "detail": "stopped at 9 GB"}
    text = module("summary").render([lost, record("ours", 0, knn_celltype_purity=0.5)])
    assert "- peer, seed 0: out of memory (stopped at 9 GB)" in text
    assert rows(text)[0]["ours"] == "0.500"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmarks read /proc")
def test_from_the_command_line(tmp_path):
    out = tmp_path / "found.jsonl"
    command = [
        sys.executable, str(FOLDER / "compare.py"), "--data", "simulated", "--simulate", json.dumps(TINY),
        "--seeds", "0", "--systems", "linear", "ours", "--epochs", "3", "--time", "--out", str(out),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["system"], one["failed"]) for one in records] == [("linear", None), ("ours", None)]
    assert [point["epochs"] for point in records[1]["result"]["checkpoints"]] == [1, 2, 3]
    assert "share of the gap closed" in done.stdout
