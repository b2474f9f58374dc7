"""Cells of training, validation and test that the user lists."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm


@pytest.fixture
def lists():
    """Of the 60 cells of the mosaic, in no order."""
    return np.split(np.random.default_rng(0).permutation(60), [42, 54])


def indices(model):
    return [model.train_indices.tolist(), model.validation_indices.tolist(), model.test_indices.tolist()]


def test_the_listed_cells_are_trained_on_and_held_out(build, train, lists):
    model = train(build(), 2, external_indexing=lists)
    assert indices(model) == [sorted(part.tolist()) for part in lists]
    assert model.history["elbo_validation"].shape == (2, 1)
    # Going on keeps them.
    assert indices(train(model, 1)) == indices(model)


def test_the_split_that_was_chosen_gives_the_same_model_when_it_is_listed(build, train, learned):
    chosen = train(build(), train_size=0.7, validation_size=0.2)
    listed = train(build(), external_indexing=[np.array(part) for part in indices(chosen)])
    one, other = learned(chosen.program), learned(listed.program)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert torch.equal(chosen.program.posterior_scale, listed.program.posterior_scale)


def test_datasplitter_kwargs_of_scvi_tools_say_the_same_and_stay_as_they_are(build, train, lists):
    given = {"external_indexing": [lists[0], np.concatenate(lists[1:])]}
    model = train(build(), 1, datasplitter_kwargs=given)
    assert indices(model) == [sorted(lists[0]), sorted([*lists[1], *lists[2]]), []]
    assert len(given["external_indexing"]) == 2


def test_a_batch_is_held_out_by_masks(build, train, mosaic):
    batch = mosaic.obs["batch"].to_numpy()
    first, none = batch == "batch_0", np.zeros(60, dtype=bool)
    model = train(build(), external_indexing=(first, ~first, none), early_stopping_patience=1)
    assert indices(model) == [np.flatnonzero(first).tolist(), np.flatnonzero(~first).tolist(), []]
    assert np.isfinite(model.get_latent_representation()).all()
    for estimates in (model.get_normalized_expression, model.get_accessibility_estimates):
        assert np.isfinite(estimates(return_numpy=True)).all()


def test_without_validation_cells_all_epochs_are_run(build, train, mosaic, lists):
    names = mosaic.obs_names.to_numpy()
    model = train(build(), 2, external_indexing=[names[np.concatenate(lists[:2])].tolist(), None, names[lists[2]]])
    assert indices(model) == [sorted([*lists[0], *lists[1]]), [], sorted(lists[2])]
    assert "elbo_validation" not in model.history
    assert len(model.history["train_loss"]) == 2


def test_sizes_have_no_effect_beside_it_as_a_warning_says(build, train, lists):
    with pytest.warns(UserWarning, match="train_size and validation_size have no effect: external_indexing lists the"):
        model = train(build(), 1, external_indexing=lists, train_size=0.2, shuffle_set_split=False)
    assert indices(model)[0] == sorted(lists[0])


def test_cells_that_were_trained_on_are_never_held_out(build, train, lists):
    model = train(build(), 1, external_indexing=lists)
    with pytest.warns(
        UserWarning, match="lists 42 cells for validation and 12 for test, of which 42 and 0 were trained"
    ):
        train(model, 1, external_indexing=[lists[2], lists[0], lists[1]])
    assert indices(model) == [sorted(lists[2]), [], sorted(lists[1])]


def test_a_training_goes_on_from_a_checkpoint_with_the_same_lists_alone(build, train, learned, lists, tmp_path):
    def stop(epoch, row, program):
        raise KeyboardInterrupt

    options = {"checkpoint": tmp_path, "checkpoint_every": 1}
    train(build(), external_indexing=lists, callbacks=[stop], **options)
    with pytest.raises(ValueError, match=r"is of another run: .*other cells in external_indexing"):
        train(build(), external_indexing=lists[::-1], resume=True, **options)
    with pytest.raises(ValueError, match=r"is of another run: .*other cells in external_indexing"):
        train(build(), resume=True, **options)
    resumed = train(build(), external_indexing=[part[::-1] for part in lists], resume=True, **options)
    assert indices(resumed) == [sorted(part.tolist()) for part in lists]
    whole = learned(train(build(), external_indexing=lists).program)
    other = learned(resumed.program)
    assert [name for name in whole if not torch.equal(whole[name], other[name])] == []


def test_a_saved_model_knows_them(build, train, lists, mosaic, tmp_path):
    train(build(), 1, external_indexing=lists).save(tmp_path / "model")
    again = pm.MULTIVI.load(tmp_path / "model", adata=mosaic[::-1].copy())
    assert indices(again) == [sorted(59 - part) for part in lists]


def test_counts_on_disk(mosaic_file, train, lists):
    stored = pm.open_stores(mosaic_file)
    pm.MULTIVI.setup_anndata(stored, batch_key="batch", modality_key="modality")
    model = train(pm.MULTIVI(stored, n_hidden=6, n_latent=2), 1, external_indexing=lists, shuffle_block=4)
    assert indices(model) == [sorted(part.tolist()) for part in lists]


def test_the_model_of_a_query_holds_out_what_is_listed(build, train, mosaic, lists):
    reference = train(build(), 1)
    query = mosaic[lists[0]].copy()
    query.obs["batch"] = "new"
    mapped = train(pm.MULTIVI.load_query_data(query, reference), 1, external_indexing=[range(30), range(30, 42)])
    assert indices(mapped) == [[*range(30)], [*range(30, 42)], []]


def test_a_refused_list_leaves_the_model_as_it_was(build, train, lists):
    model = build()
    with pytest.raises(ValueError, match=r"external_indexing leaves out 6 of 60 cells"):
        train(model, 1, external_indexing=lists[:2])
    assert not model.is_trained
    assert indices(model) == [[], [], []]
