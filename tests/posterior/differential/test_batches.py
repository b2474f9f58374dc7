"""Batches in which groups are decoded, against plain NumPy that keeps every draw of every feature in memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pyro_multivi.data.modality import ATAC, RNA

close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("named", [{}, {"batchid1": ["batch_0", "batch_1"], "batchid2": ["batch_0", "batch_1"]}])
def test_batch_correction_decodes_both_groups_in_the_same_batches(groups, named):
    a, b = groups.both(ATAC, (0, 1))
    table = groups.compared(ATAC, unit="cell", batch_correction=True, probability="accessible", **named)
    close(table["est_prob1"], a.mean(0))
    close(table["change_std"], (a - b).std(0, ddof=1))


def test_groups_of_different_batches_are_decoded_in_the_union(groups):
    batch = groups.model.adata.obs["batch"].to_numpy().astype(str)
    idx1, idx2 = np.flatnonzero(batch == "batch_0"), np.flatnonzero(batch == "batch_1")
    options = {"idx1": idx1, "idx2": idx2, "batch_correction": True}
    corrected = groups.compared(ATAC, **options)
    close(corrected["effect_size"], groups.draws(ATAC, idx1, (0, 1)).mean(0) - groups.draws(ATAC, idx2, (0, 1)).mean(0))
    # One batch named stands for both groups.
    one = groups.compared(ATAC, batchid1="batch_1", **options)
    close(one["effect_size"], groups.draws(ATAC, idx1, (1,)).mean(0) - groups.draws(ATAC, idx2, (1,)).mean(0))
    different = groups.compared(ATAC, unit="cell", batchid1="batch_0", batchid2="batch_1", **options)
    close(different["est_prob1"], groups.draws(ATAC, idx1, (0,)).mean(0))
    close(different["est_prob2"], groups.draws(ATAC, idx2, (1,)).mean(0))


def test_a_group_in_two_comparisons_is_decoded_in_the_batches_of_each(groups):
    adata = groups.model.adata.copy()
    batch = adata.obs["batch"].to_numpy().astype(str)
    part = np.where(batch == "batch_0", "a", "b").astype(object)
    part[np.flatnonzero(batch == "batch_0")[:40]] = "c"
    adata.obs["part"] = part
    table = groups.compared(
        ATAC, adata=adata, idx1=None, idx2=None, groupby="part", group1=["a", "b"], group2="c", batch_correction=True
    )
    cells = {name: np.flatnonzero(part == name) for name in "abc"}
    for name, batches in (("a", (0,)), ("b", (0, 1))):
        rows = table[table["group1"] == name]
        close(rows["est_prob1"], groups.draws(ATAC, cells[name], batches).mean(0))
        close(rows["est_prob2"], groups.draws(ATAC, cells["c"], batches).mean(0))


def test_random_pairs_share_a_batch(groups):
    a, b = groups.both(RNA, (0, 1))
    table = groups.compared(RNA, unit="cell", batch_correction=True, use_permutation=True, m_permutation=20_000)
    half = [slice(0, groups.n // 2), slice(groups.n // 2, groups.n)]
    every = [np.log2(a[rows][:, None] + 1e-6) - np.log2(b[rows][None] + 1e-6) for rows in half]
    above, below = (
        np.mean([extreme.mean((0, 1)) for extreme in part], 0)
        for part in ([r >= 0.25 for r in every], [r <= -0.25 for r in every])
    )
    close(table["proba_de"], np.maximum(above, below), atol=0.015)


@pytest.mark.parametrize("modality", [RNA, ATAC], ids=["RNA", "ATAC"])
def test_counts_are_judged_by_draws_of_measured_cells(groups, modality):
    """Of many cells of which few were measured, few draws are of these, or none."""
    cells = groups.model.minibatch()
    has, other = (cells.has_rna, cells.has_atac) if modality is RNA else (cells.has_atac, cells.has_rna)
    lacks, paired = (~has).nonzero()[:, 0].numpy(), (has & other).nonzero()[:, 0].numpy()
    sure = []
    for seed in range(5):
        options = {"idx1": np.concatenate([lacks, paired[::20]]), "idx2": np.delete(paired, np.s_[::20])}
        table = groups.compared(modality, mode="vanilla", n_samples=8, seed=seed, **options)
        sure.append((np.abs(table["proba_m1"] - 0.5) > 0.499).mean())
    assert max(sure) < 0.1
