"""A check of what was asked for: statistics, cells and features; a request that makes no sense is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pyro_multivi import MULTIVI


@pytest.mark.parametrize(("function", "error", "message"), [
    (lambda counts: counts, TypeError, "returned csr_matrix: return a number or a flat array"),
    (lambda counts: "many", TypeError, r"statistics\['mine'\] returned str"),
    (lambda counts: np.ones((2, 3)), ValueError, r"returned an array of shape \(2, 3\)"),
    (lambda counts: [], ValueError, r"returned an array of shape \(0,\)"),
    (lambda counts: counts.data, ValueError, "its shape must not depend on the counts"),
    (3, TypeError, "give a function of counts"),
])  # fmt: skip
def test_statistic_of_the_wrong_shape_is_refused(fitted, function, error, message):
    with pytest.raises(error, match=message):
        fitted.posterior_predictive_check(statistics={"mine": function}, n_samples=40, hide_modalities=False)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"statistics": ["median"]}, "statistics holds 'median': choose from 'mean', 'variance'"),
    ({"statistics": []}, "statistics is empty"),
    ({"statistics": {"mean": np.sum}}, "statistics holds 'mean', the name of a built-in"),
    ({"n_samples": 10}, "n_samples=10 is too few for level=0.95: give at least 40"),
    ({"level": 1.5}, "level=1.5 is not allowed"),
    ({"hidden_depth": "none"}, "hidden_depth='none' is not allowed: choose one of 'observed', 'predicted', 'prior'"),
    ({"groupby": "cell_typ"}, "groupby='cell_typ' is no column of obs"),
])  # fmt: skip
def test_check_refuses(fitted, arguments, message):
    with pytest.raises(ValueError, match=message):
        fitted.posterior_predictive_check(**arguments)


def test_missing_held_out_cells_are_reported(fitted, mosaic):
    with pytest.raises(ValueError, match="adata is other data: give held_out=False"):
        fitted.posterior_predictive_check(mosaic)
    trained_on = np.setdiff1d(np.arange(200), fitted.validation_indices)
    with pytest.raises(ValueError, match="none of the 180 cells asked for was held out"):
        fitted.posterior_predictive_check(indices=trained_on)
    MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = MULTIVI(mosaic, n_hidden=8, n_latent=2)
    model.train(max_epochs=1, train_size=1.0, progress_bar=False)
    with pytest.raises(ValueError, match="no cell is known to be held out: train with validation_size above 0"):
        model.posterior_predictive_check()
    assert model.posterior_predictive_check(held_out=False, n_samples=40).n_cells == 60


def test_a_mosaic_is_checked_where_it_was_measured(fitted):
    found = fitted.posterior_predictive_check(statistics=["mean", "accessible_regions"], held_out=False, n_samples=40)
    assert set(found.genes["statistic"]) == {"mean"}
    assert set(found.cells["statistic"]) == {"accessible_regions"}
    assert found.cells["cell"].nunique() == 150
    assert found.coverage.groupby("setting")["n"].first().to_dict() == {
        "cells": 150 * 40, "hidden expression": 100 * 40,
    }  # fmt: skip
    assert set(found.groups["group"]) == {"batch_0", "batch_1"}
    unpaired = fitted.posterior_predictive_check(indices=range(100, 200), held_out=False, n_samples=40)
    assert unpaired.notes == ["no modality was hidden and predicted: none of these cells has both"]
    rna_only = fitted.posterior_predictive_check(indices=range(100, 150), held_out=False, n_samples=40)
    assert "accessibility was measured in none of these cells" in rna_only.notes
    assert not len(rna_only.regions)
    assert "note: " in repr(rna_only)


def test_fewer_features_are_checked_if_asked(fitted):
    found = fitted.posterior_predictive_check(gene_list=[2, 5], region_list=["region_07"], n_samples=40)
    assert found.genes["gene"].unique().tolist() == ["gene_02", "gene_05"]
    assert found.regions["region"].tolist() == ["region_07"]


def test_a_statistic_that_changes_the_counts_changes_no_other(fitted):
    def total(counts):
        return counts.sum()

    def binary(counts):
        counts.data[:] = 1
        return counts.sum()

    given = {"n_samples": 40, "hide_modalities": False}
    alone = fitted.posterior_predictive_check(statistics={"total": total}, **given).user
    both = fitted.posterior_predictive_check(statistics={"binary": binary, "total": total}, **given).user
    pd.testing.assert_frame_equal(both[both["statistic"] == "total"].reset_index(drop=True), alone)
