"""Labels carried over from a reference to a query."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.api.query.labels import _measured_alike, _measured_as_much, batches_apart
from pyro_multivi.posterior.mapping.label_transfer import measured_as, p_values, transfer, vote


def test_a_frame_of_the_queries_cells(world):
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    table = world.model.transfer_labels(mapped, "cell_type", n_neighbors=5)
    assert list(table.index) == list(world.query.obs_names)
    assert list(table.columns) == ["label", "confidence", "nearest_label", "p_value"]
    assert list(table["label"].cat.categories) == ["type_0", "type_1", "unknown"]
    assert table["confidence"].between(0, 1).all()
    assert table["p_value"].between(0, 1).all()
    assert ((table["label"] == "unknown") == ((table["confidence"] < 0.5) | (table["p_value"] < 0.05))).all()
    certain = world.model.transfer_labels(mapped, "cell_type", n_neighbors=5, threshold=0.0, alpha=0.0)
    assert (certain["label"].astype(str) == certain["nearest_label"].astype(str)).all()
    # An object, and the model of the query that knows its reference.
    for other in (
        world.model.transfer_labels(world.query, "cell_type", 5),
        mapped.transfer_labels(world.query, "cell_type", 5),
    ):
        np.testing.assert_array_equal(other["confidence"], table["confidence"])


def test_labels_of_another_kind_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="key='true_library_x' is not in obs of the reference"):
        world.model.transfer_labels(world.query, "true_library_x")
    reference = world.model.adata
    reference.obs["score"] = np.linspace(0, 1, reference.n_obs)
    with pytest.raises(ValueError, match="key='score' holds numbers such as .*, no labels"):
        world.model.transfer_labels(world.query, "score")
    reference.obs["word"] = "unknown"
    with pytest.raises(ValueError, match="unknown='unknown' is a label of the reference"):
        world.model.transfer_labels(world.query, "word")
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    mapped.save(tmp_path / "query")
    loaded = pm.MULTIVI.load(tmp_path / "query", world.query)
    with pytest.raises(ValueError, match="data of the reference are not there"):
        loaded.transfer_labels(world.query, "cell_type")
    assert len(world.model.transfer_labels(loaded, "cell_type")) == world.query.n_obs


def test_a_query_is_the_reference_of_another(world):
    first = pm.MULTIVI.load_query_data(world.query, world.model)
    other = world.query[:5].copy()
    other.obs["batch"] = "batch_3"
    second = pm.MULTIVI.load_query_data(other, first)
    assert second.spec.batch_categories[2:] == ("batch_2", "batch_3")
    table = second.transfer_labels(other, "cell_type", n_neighbors=1, threshold=0.0)
    # The nearest cells of the first query are these cells themselves.
    assert table["nearest_label"].astype(str).tolist() == other.obs["cell_type"].astype(str).tolist()


def test_a_reference_that_changed_is_refused_and_a_minified_one_warned_of():
    adata = pm.simulate_multiome((60, 0, 0), n_genes=12, n_regions=14, n_types=2, seed=0)
    pm.MULTIVI.setup_anndata(adata)
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    query = adata[:20].copy()
    order = np.arange(60)[::-1]
    adata._inplace_subset_obs(order)
    with pytest.raises(ValueError, match="data of this model were changed in place"):
        model.transfer_labels(query, "cell_type")
    adata._inplace_subset_obs(order)
    whole = model.transfer_labels(query, "cell_type")
    model.minify_adata()
    with pytest.warns(UserWarning, match="The reference is minified"):
        found = model.transfer_labels(query, "cell_type")
    np.testing.assert_allclose(found["confidence"], whole["confidence"], rtol=1e-6)


def test_cells_without_a_label_do_not_vote(world):
    reference = world.model.adata
    reference.obs["some"] = reference.obs["cell_type"].astype(object).where(np.arange(reference.n_obs) % 2 == 0)
    table = world.model.transfer_labels(world.query, "some")
    assert set(table["nearest_label"].cat.categories) == {"type_0", "type_1"}
    reference.obs["one"] = "only"
    assert (world.model.transfer_labels(world.query, "one")["nearest_label"] == "only").all()


def test_one_cell_with_a_label_is_too_few(world):
    reference = world.model.adata
    reference.obs["one"] = ["T", *[None] * (reference.n_obs - 1)]
    with pytest.raises(ValueError, match="key='one' has a label for one cell of the reference"):
        world.model.transfer_labels(world.query, "one")
    reference.obs["two"] = ["T", "B", *[None] * (reference.n_obs - 2)]
    table = world.model.transfer_labels(world.query, "two", alpha=0)
    assert table[["confidence", "p_value"]].stack().between(0, 1).all()


def blobs(rng, centres, n):
    code = np.repeat(np.arange(len(centres)), n)
    return centres[code] + rng.normal(size=(len(code), 2)), code


def test_confidence_is_calibrated_and_new_kinds_are_unknown():
    rng = np.random.default_rng(0)
    # Two overlap, one lies apart, and one of the query is not in the reference.
    centres = np.array([[0.0, 0.0], [2.0, 0.0], [12.0, 0.0]])
    reference, code = blobs(rng, centres, 400)
    query, truth = blobs(rng, np.vstack([centres, [[0.0, 40.0]]]), 400)
    own = np.arange(len(reference))
    label, confidence, p_value = transfer(reference, code, query, reference, own, n_neighbors=15)
    known = truth < 3
    right = label == truth
    for low, high in ((0.5, 0.8), (0.8, 1.0)):
        inside = known & (confidence >= low) & (confidence < high)
        assert inside.sum() > 50
        assert abs(right[inside].mean() - confidence[inside].mean()) < 0.08
    assert (confidence[~known] < 0.5).mean() > 0.95
    assert (confidence[truth == 2] < 0.5).mean() < 0.02
    assert (p_value[~known] < 0.05).all()


@pytest.mark.parametrize(("n", "margin"), [(40, 0.06), (1000, 0.03)])
def test_the_share_of_cells_that_lie_apart_wrongly_is_alpha(n, margin):
    found = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        p_value = p_values(rng.gamma(3.0, size=n), rng.gamma(3.0, size=1000))
        found.append([(p_value < alpha).mean() for alpha in (0.02, 0.05, 0.1)])
    assert np.mean(found, 0) == pytest.approx([0.02, 0.05, 0.1], abs=0.02)
    assert np.abs(np.array(found)[:, 1] - 0.05).mean() < margin
    # Alike, and at zero.
    assert p_values(np.ones(5), np.array([0.0, 2.0])) == pytest.approx([1.0, 0.0], abs=1e-4)
    assert p_values(np.zeros(5), np.array([0.0, 2.0])) == pytest.approx([0.5, 0.0], abs=1e-4)


def test_distances_are_compared_with_those_of_cells_that_were_not_trained_on():
    rng = np.random.default_rng(0)
    reference, code = blobs(rng, np.zeros((1, 2)), 200)
    # Encoders know the cells of training: the others lie three times as far from the reference.
    is_held_out = np.arange(200) % 4 == 0
    calibration = reference * np.where(is_held_out, 3, 1)[:, None]
    query = 3 * rng.normal(size=(200, 2))
    arguments = (reference, code, query, calibration, np.arange(200), 15)
    assert (transfer(*arguments, is_held_out).p_value < 0.05).mean() < 0.15
    assert (transfer(*arguments).p_value < 0.05).mean() > 0.15


def test_a_batch_that_lies_apart_is_warned_of(world):
    table = world.model._training_table()
    names = world.model.spec.batch_categories
    is_apart = (table.batch_code == 1).numpy() & (np.arange(len(table)) % 4 > 0)
    (sentence,) = batches_apart(is_apart, table, names, alpha=0.05)
    n = int((table.batch_code == 1).sum())
    assert f"{is_apart.sum()} of the {n} cells of batch 'batch_1' lie farther from the reference than 95.0%" in sentence
    assert "freeze_expression=False" in sentence
    # So many are expected.
    assert not list(batches_apart(is_apart, table, names, alpha=0.5))


def test_a_cell_does_not_vote_for_itself():
    reference, code = np.array([[0.0], [1.0], [1.1]]), np.array([0, 1, 1])
    found = vote(reference, code, reference, n_neighbors=1, own=np.arange(3))
    assert found.code.tolist() == [1, 1, 1]
    assert found.distance == pytest.approx([1.0, 0.1, 0.1])


def test_proteins_that_the_query_lacks_are_taken_away():
    """Else confidence is that of cells whose proteins say more of their type than the query's genes do."""
    adata = pm.simulate_multiome((20, 0, 0), 5, 6, n_proteins=3, seed=0)
    adata.obsm["protein_expression"].iloc[:5] = np.nan
    adata.obsm["protein_expression"].iloc[5:10, 2] = np.nan
    pm.MULTIVI.setup_anndata(adata, modality_key="modality", protein_expression_obsm_key="protein_expression")
    model = pm.MULTIVI(adata, n_hidden=8, n_latent=2)
    table, every = model._training_table(), torch.arange(20)
    unstained, two, stained = torch.arange(5), torch.arange(5, 10), torch.arange(10, 20)
    assert {tuple(part.tolist()) for part in _measured_alike(table)} == {
        tuple(part.tolist()) for part in (unstained, two, stained)
    }
    for like, able, measured in (
        (unstained, every, [False] * 20),
        (two, every[5:], [False] * 5 + [True] * 15),
        (stained, stained, [False] * 5 + [True] * 15),
    ):
        cell = table.batch(like[:1])
        assert torch.equal(_measured_as_much(table, every, cell), able)
        seen = measured_as(table.batch(every), cell).extra["protein"]
        assert seen.measured.tolist() == measured
        lacks = torch.zeros(20, 3, dtype=torch.bool)
        lacks[5:, 2] = like is two
        lacks[5:10, 2] |= like is stained
        assert torch.equal(seen.values.isnan() & seen.measured[:, None], lacks)
