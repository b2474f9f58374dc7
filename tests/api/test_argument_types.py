"""Arguments in other types than the documented ones: numpy's own, lists of any kind, scvi-tools' defaults: taken."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_multivi as pm


def _as_numpy(value: Any) -> Any:
    """The same number, truth value or word, as numpy holds it."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, (int, str)):
        return np.array(value)
    return np.float64(value) if isinstance(value, float) else value


VERBS = {
    "get_latent_representation": {"give_mean": False, "n_samples": 2},
    "get_normalized_expression": {"n_samples": 3, "transform_batch": "batch_0", "library_size": 7.5},
    "get_accessibility_estimates": {"n_samples": 3, "threshold": 0.25},
    "get_marginal_ll": {"n_mc_samples": 3},
    "differential_expression": {"groupby": "cell_type", "n_samples": 20, "delta": 0.1, "fdr_target": 0.25},
    "posterior_predictive_check": {"n_samples": 40, "groupby": "cell_type"},
}


@pytest.mark.parametrize("name", VERBS)
def test_numpy_numbers_and_words_are_taken_for_their_values(world, name):
    verb, given = getattr(world.model, name), {**VERBS[name], "seed": 3}
    if name != "differential_expression":
        given["batch_size"] = 5
    expected, found = verb(**given), verb(**{key: _as_numpy(value) for key, value in given.items()})
    if name == "posterior_predictive_check":
        expected, found = expected.genes, found.genes
    for one, other in zip(np.asarray(expected).ravel(), np.asarray(found).ravel(), strict=True):
        assert one == other or one != one


def test_arguments_of_numpy_are_recorded_with_what_is_imputed(world):
    batches, sizes = np.array(["batch_0", "batch_1"]), np.full(24, 2.0)
    filled = world.model.impute(transform_batch=batches, library_size=sizes, threshold=np.float64(0.25))
    kept = json.loads(filled.uns["imputation"])
    assert (kept["transform_batch"], kept["library_size"]) == (["batch_0", "batch_1"], "one number per cell")
    assert json.loads(world.model.impute(library_size=np.array(3)).uns["imputation"])["library_size"] == 3


CELLS = [4, 1, 0]


@pytest.mark.parametrize(
    "given",
    [tuple(CELLS), np.array(CELLS), np.array(CELLS, dtype=np.uint8), pd.Index(CELLS), pd.Series(CELLS),
     torch.tensor(CELLS), dict.fromkeys(CELLS).keys(), iter(CELLS), pd.array(CELLS, dtype="Int64"),
     np.array(CELLS, dtype=object)],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_any_list_of_cells_and_genes_is_taken(world, given):
    given = list(given) if isinstance(given, type(iter([]))) else given
    found = world.model.get_normalized_expression(indices=given, gene_list=given)
    names = world.adata.obs_names[CELLS], world.adata.var_names[CELLS]
    assert found.index.tolist() == names[0].tolist()
    assert found.columns.tolist() == names[1].tolist()
    by_name = world.model.get_normalized_expression(indices=iter(names[0]), gene_list=pd.Series(names[1]))
    pd.testing.assert_frame_equal(found, by_name)


def test_defaults_that_scvi_tools_users_pass_on(world):
    model = pm.MULTIVI(world.adata, n_hidden=np.int64(4), n_latent=np.int32(2), seed=np.uint8(3))
    assert model.program.config.to_dict() == pm.MULTIVI(world.adata, n_hidden=4, n_latent=2).program.config.to_dict()
    for devices, precision, device in (("auto", "32", "auto"), (1, "32-true", "cpu")):
        accelerator = "auto" if devices == "auto" else "cpu"
        model.train(accelerator=accelerator, devices=devices, batch_size=None, precision=precision, callbacks=None,
                    train_size=np.float32(0.5), progress_bar=np.bool_(False), max_epochs=np.int64(1))  # fmt: skip
        model.to_device(device)
    assert model.get_latent_representation(batch_size=None).shape == (24, 2)
    assert pm.MULTIVI.load(str(world.folder / "model"), world.adata, device="auto").is_trained


def test_two_columns_compare_by_their_combination(world):
    groups = ["cell_type", "batch"]
    table = world.model.differential_expression(groupby=groups, n_samples=20)
    assert table["group1"].unique().tolist() == [f"type_{t}, batch_{b}" for t in (0, 1) for b in (0, 1)]
    other = world.adata.obs[groups].astype(str).agg("|".join, axis=1)
    labelled = world.adata.copy()
    labelled.obs["both"] = other
    by_hand = world.model.differential_expression(labelled, groupby="both", n_samples=20)
    np.testing.assert_array_equal(table["lfc_mean"], by_hand["lfc_mean"])
    check = world.model.posterior_predictive_check(groupby=groups, n_samples=40)
    assert "cell_type, batch" in set(check.groups["by"])


@pytest.mark.parametrize("key", ["batch_key", "labels_key"])
def test_one_column_is_asked_for_where_several_would_be_a_guess(world, key):
    remedy = r"make a column of it: obs\['cell_type_batch'\] = obs\['cell_type'\].astype\(str\) \+ ', ' \+"
    with pytest.raises(TypeError, match=rf"{key}=\['cell_type', 'batch'\] is not allowed: give one string.*{remedy}"):
        pm.MULTIVI.setup_anndata(world.adata, **{key: ["cell_type", "batch"]})
