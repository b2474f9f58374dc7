"""Arguments that differential tests refuse, and the messages."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pyro_multivi import MULTIVI, simulate_multiome

TYPE = {"groupby": "cell_type", "group1": "type_0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groupby": "celltype"}, "groupby='celltype' is no column of obs. Did you mean 'cell_type'"),
        ({"groupby": ["cell_type", "donor"]}, "groupby='donor' is no column of obs"),
        ({"groupby": []}, "groupby=\\[\\] names no column of obs"),
        ({"groupby": ["cell_type", "batch"], "group1": "type_0"}, "no group of obs.* Known: 'type_0, batch_0'"),
        ({"groupby": "cell_type", "group1": "type0"}, "group1='type0' is no group .* Did you mean 'type_0'"),
        ({**TYPE, "group2": "type_9"}, "group2='type_9' is no group"),
        ({**TYPE, "group2": "type_0"}, "group1 and group2 are both 'type_0'"),
        ({"groupby": "cell_type", "group1": []}, "group1 is an empty list"),
        ({"groupby": "cell_type", "group1": ["type_0", "type_0"]}, "'type_0' more than once"),
        ({"groupby": "cell_type", "idx1": [0]}, "groupby and idx1 or idx2 are given"),
        ({"group1": "type_0"}, "without groupby"),
        ({}, "neither groupby nor idx1 is given"),
        ({"idx2": [1]}, "idx2 is given without idx1"),
        ({"idx1": [0, 1, 2], "idx2": [2, 3]}, "idx1 and idx2 share 1 cells"),
        ({"idx1": np.arange(200)}, "idx1 holds every cell"),
        ({"idx1": np.zeros(200, dtype=bool)}, "idx1 selects no cell"),
        ({"idx1": []}, "idx1 selects no cell"),
        ({"idx1": [0], "idx2": [777]}, "idx2 holds 777"),
        ({"idx1": np.ones(3, dtype=bool)}, "idx1 is a mask of 3 cells"),
        ({"idx1": ["nobody"]}, "idx1 holds 'nobody'"),
        ({"idx1": "cell_type == 'type_7'"}, "selects no cell"),
        ({"idx1": "cell_tipe == 'type_0'"}, "is no query of obs"),
        ({**TYPE, "mode": "changes"}, "mode='changes' is not allowed: choose 'change' or 'vanilla'"),
        ({**TYPE, "test_mode": "one"}, "test_mode='one' is not allowed"),
        ({**TYPE, "unit": "cells"}, "unit='cells' is not allowed"),
        ({**TYPE, "weights": "robust"}, "weights='robust' is not allowed"),
        ({**TYPE, "change_fn": "lfc"}, "change_fn='lfc' is not allowed: choose one of 'log-fold'"),
        ({**TYPE, "change_fn": lambda a: a}, "change_fn takes 1 arguments"),
        ({**TYPE, "change_fn": lambda a, b: a[0], "delta": 1}, "change_fn returned shape"),
        ({**TYPE, "change_fn": lambda a, b: a - b}, "has no default bound: give delta"),
        ({**TYPE, "m1_domain_fn": 0.3}, "m1_domain_fn=0.3 is not a function"),
        ({**TYPE, "m1_domain_fn": lambda r: r}, "m1_domain_fn returned .* return a boolean array"),
        ({**TYPE, "delta": -0.1}, "delta=-0.1 is not allowed"),
        ({**TYPE, "delta": "big"}, "delta='big' is not allowed: give a finite number"),
        ({**TYPE, "pseudocounts": -1}, "pseudocounts=-1 is not allowed"),
        ({**TYPE, "threshold_counts": float("nan")}, "threshold_counts=nan is not allowed: give a finite number"),
        ({**TYPE, "fdr_target": 5}, "fdr_target=5 is not allowed"),
        ({**TYPE, "cred_interval_lvls": [0.9, 95]}, "cred_interval_lvls holds 95"),
        ({**TYPE, "n_samples": 1}, "a test needs at least 2 draws"),
        ({**TYPE, "n_samples": 2.5}, "n_samples=2.5 is not allowed"),
        ({**TYPE, "unit": "cell", "calibrated": True}, "calibrated=True is of means of groups"),
        ({**TYPE, "use_permutation": True}, "use_permutation=True pairs cells"),
        ({**TYPE, "use_permutation": True, "unit": "cell", "m_permutation": 0}, "m_permutation=0 is not allowed"),
        ({**TYPE, "batchid1": "batch_0", "batch_correction": False}, "batchid1 is given and batch_correction=False"),
        ({**TYPE, "batchid2": "batch_7", "batch_correction": True}, "batchid2='batch_7': Batch 'batch_7' is not known"),
    ],
)
@pytest.mark.parametrize("what", ["expression", "accessibility"])
def test_refused(fitted, what, arguments, message):
    compare = getattr(fitted, f"differential_{what}")
    with pytest.raises(ValueError, match=message):
        compare(**{"n_samples": 20, **arguments})


def test_refused_for_one_of_them(fitted):
    with pytest.raises(ValueError, match="change_fn='log-odds' compares probabilities"):
        fitted.differential_expression(**TYPE, change_fn="log-odds")
    with pytest.raises(ValueError, match="'difference' has no default bound: give delta"):
        fitted.differential_expression(**TYPE, change_fn="difference")
    with pytest.raises(ValueError, match="gene_list holds 'gene_x': no gene of the model"):
        fitted.differential_expression(**TYPE, gene_list=["gene_x"])
    with pytest.raises(ValueError, match="probability='p' is not allowed: choose 'detected' or 'accessible'"):
        fitted.differential_accessibility(**TYPE, probability="p")
    with pytest.raises(ValueError, match="region_list selects no region"):
        fitted.differential_accessibility(**TYPE, region_list=[])


def test_a_category_without_cells(fitted):
    adata = fitted.adata.copy()
    adata.obs["part"] = pd.Categorical(["a"] * 100 + ["b"] * 100, ["a", "b", "c"])
    with pytest.raises(ValueError, match="group1='c' is a category of .* that no cell has"):
        fitted.differential_expression(adata, groupby="part", group1="c")
    # Without names, empty categories are passed over.
    table = fitted.differential_expression(adata, groupby="part", n_samples=20)
    assert table["group1"].unique().tolist() == ["a", "b"]
    adata.obs["part"] = "a"
    with pytest.raises(ValueError, match="holds every cell of obs"):
        fitted.differential_expression(adata, groupby="part")


def test_a_model_without_the_modality():
    adata = simulate_multiome((40, 0, 0), 20, 30, seed=0)[:, :20].copy()
    MULTIVI.setup_anndata(adata)
    model = MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=1, progress_bar=False)
    with pytest.raises(ValueError, match="differential_accessibility: this model has no regions"):
        model.differential_accessibility(groupby="cell_type")


def test_an_untrained_model(mosaic):
    MULTIVI.setup_anndata(mosaic, modality_key="modality")
    with pytest.warns(UserWarning, match="results are those of random weights"):
        MULTIVI(mosaic).differential_expression(groupby="cell_type")
