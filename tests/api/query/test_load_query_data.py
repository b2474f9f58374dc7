"""Queries of new batches: what is mapped, what is trained, and what stays as it was."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given
from pyro_multivi.api.saving.folder import BrokenModelError
from pyro_multivi.training import fit

GENES = slice(0, 24)


def state(model):
    return {name: value.clone() for name, value in model.program.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_only_new_columns_are_trained_and_the_reference_stays(world):
    before, latent = state(world.model), world.model.get_latent_representation()
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    assert mapped.spec.batch_categories == ("batch_0", "batch_1", "batch_2")
    start = state(mapped)
    mapped.train(3, progress_bar=False)
    assert same(before, state(world.model))
    for found in (mapped.get_latent_representation(world.reference), world.model.get_latent_representation()):
        np.testing.assert_array_equal(found, latent)
    changed = {name: value != start[name] for name, value in state(mapped).items() if not value.equal(start[name])}
    n_hidden, n_latent = 8, 3
    # The prior of the cell factor has one number for each batch.
    assert changed.pop("cell_factor_loc").tolist() == [False, False, True]
    assert {name: where.nonzero()[:, 1].unique().tolist() for name, where in changed.items()} == {
        "rna_first_layer.covariates.weight": [2],
        "atac_first_layer.covariates.weight": [2],
        "expression_decoder.stack.linear.0.weight": [n_latent + 2],
        "accessibility_decoder.stack.linear.0.weight": [n_latent + 2],
        "expression_decoder.rho.weight": [n_hidden + 2],
        "accessibility_decoder.p.weight": [n_hidden + 2],
    }
    assert all(int(where.sum()) == len(where) for where in changed.values())


def test_cells_marked_as_measured_without_a_count_are_told(world):
    query = world.query.copy()
    query.obs["modality"] = "paired"
    alone = [(world.query.obs["modality"] == pattern).sum() for pattern in ("accessibility", "expression")]
    for call in (
        lambda: pm.MULTIVI.load_query_data(query, world.model),
        lambda: pm.MULTIVI.load_query_data(world.query, world.model).get_latent_representation(query),
    ):
        with pytest.warns(UserWarning, match="said to have") as caught:
            call()
        told = sorted(str(each.message) for each in caught if "said to have" in str(each.message))
        assert len(told) == 2
        for sentence, assay, size in zip(told, ("ATAC", "RNA"), reversed(alone), strict=True):
            assert sentence.startswith(
                f"{size} of the {query.n_obs} cells said to have {assay} have no count in adata.X"
            )


@pytest.mark.parametrize("kinds", [(int, float), (float, int), (int, "Float64"), (int, "category"), (int, object)])
def test_numbers_are_known_batches_whatever_their_type(kinds):
    adata = pm.simulate_multiome((60, 0, 0), n_genes=12, n_regions=20, n_batches=2, seed=0)
    adata.obs["batch"] = adata.obs["batch"].cat.codes.astype(kinds[0])
    adata.obs["donor"] = (np.arange(60) % 3).astype(kinds[0])
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", categorical_covariate_keys=["donor"])
    model = pm.MULTIVI(adata, n_hidden=4, n_latent=2)
    model.train(1, progress_bar=False)
    query = adata.copy()
    for name in ("batch", "donor"):
        numbers = query.obs[name].astype(float)
        query.obs[name] = numbers.astype(kinds[1])
    mapped = pm.MULTIVI.load_query_data(query, model)
    assert mapped.spec.batch_categories == model.spec.batch_categories
    assert mapped.spec.categorical == model.spec.categorical
    np.testing.assert_allclose(mapped.get_latent_representation(), model.get_latent_representation(query), atol=1e-6)
    query.obs["batch"] = 7.0
    assert pm.MULTIVI.load_query_data(query, model).spec.batch_categories[2:] == ("7.0",)


def test_a_new_batch_starts_as_the_average_of_the_known_ones(world):
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    weight = mapped.program.expression_decoder.stack.linear[0].weight
    torch.testing.assert_close(weight[:, 5], weight[:, 3:5].mean(1))


def test_the_factor_of_a_new_batch_is_expected_where_its_cells_are(world):
    """Whatever their depth: one of a quarter of it need not be trained to have a prior."""
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    cells = mapped.minibatch(np.arange(world.query.n_obs))
    with torch.no_grad():
        q = mapped.program.cell_factor_posterior(cells, cells.design, mapped.program.encode(cells, cells.design))
    new = cells.has_atac & (cells.design[:, 2] == 1)
    torch.testing.assert_close(mapped.program.cell_factor_loc[2], q.loc[new].mean())


@pytest.mark.parametrize(
    ("chosen", "whole"),
    [
        ({"freeze_expression": False}, {"rna_first_layer.counts.weight", "atac_first_layer.counts.bias"}),
        ({"freeze_decoder_first_layer": False}, {"expression_decoder.stack.linear.0.bias"}),
        ({"unfrozen": True}, {"expression_decoder.rho.weight", "log_theta", "region_logit"}),
    ],
)
def test_what_is_chosen_is_trained(world, chosen, whole):
    mapped = pm.MULTIVI.load_query_data(world.query, world.model, **chosen)
    start = state(mapped)
    mapped.train(2, progress_bar=False)
    changed = {name for name, value in state(mapped).items() if not value.equal(start[name])}
    assert whole <= changed
    frozen = {name for name, parameter in mapped.program.named_parameters() if not parameter.requires_grad}
    assert not changed & frozen
    assert bool(frozen) != ("unfrozen" in chosen)


def test_a_query_is_trained_on_all_cells_for_a_fixed_number_of_epochs(world, monkeypatch):
    given = []

    def once(program, train, validation, options, *others):
        given.append((options.max_epochs, options.early_stopping, len(train.index), validation is None))
        return fit(program, train, validation, replace(options, max_epochs=1), *others)

    monkeypatch.setattr("pyro_multivi.api.training.fit", once)
    mapped = pm.MULTIVI.load_query_data(world.query, world.model, freeze_expression=False)
    n = len(world.query)
    mapped.train(progress_bar=False)
    mapped.train(progress_bar=False)
    assert given == [(100, False, n, True)] * 2
    # What is said wins.
    for chosen, expected in (
        ({"max_epochs": 7, "plan_kwargs": {"weight_decay": 0.0}}, (7, False, n, True)),
        ({"early_stopping": True}, (100, True, round(0.9 * n), False)),
        ({"train_size": 0.5}, (100, False, n // 2, False)),
    ):
        pm.MULTIVI.load_query_data(world.query, world.model).train(**chosen, progress_bar=False)
        assert given[-1] == pytest.approx(expected, abs=1)
    pm.MULTIVI(world.reference, n_hidden=4, n_latent=2).train(progress_bar=False)
    assert given[-1][:2] == (500, True)


def test_a_calibration_that_needs_held_out_cells_is_not_lost_without_a_word(world, caplog):
    caplog.set_level(logging.INFO, logger="pyro_multivi")
    line = "towards the mean of the measured: 0 cells"
    depths, weights = ("rna_depth_regression", "atac_depth_regression"), ("rna_mean_weight", "atac_mean_weight")
    for freeze, is_lost in ((True, False), (False, True)):
        mapped = pm.MULTIVI.load_query_data(world.query, world.model, freeze_expression=freeze)
        for name in (*depths, *weights):
            getattr(mapped.program, name).fill_(0.5)
        caplog.clear()
        mapped.train(1, progress_bar=False)
        assert (line in caplog.text) == is_lost
        assert [bool(getattr(mapped.program, name).any()) for name in weights] == [not is_lost] * 2
        # These follow from the pairs that were trained on.
        kept = [bool((getattr(mapped.program, name) == 0.5).all()) for name in depths]
        assert kept == [not is_lost] * 2
        assert all(bool(getattr(mapped.program, name).any()) for name in depths)
    mapped = pm.MULTIVI.load_query_data(world.query, world.model, freeze_expression=False)
    caplog.clear()
    mapped.train(1, train_size=0.5, progress_bar=False)
    assert line not in caplog.text
    assert all(bool(getattr(mapped.program, name).any()) for name in (*depths, *weights))


def test_batch_normalisation_and_dropout_freeze():
    adata = pm.simulate_multiome((60, 0, 0), n_genes=12, n_regions=14, n_batches=2, seed=0)
    parts = [adata[adata.obs["batch"] == name].copy() for name in ("batch_0", "batch_1")]
    pm.MULTIVI.setup_anndata(parts[0], batch_key="batch")
    model = pm.MULTIVI(parts[0], n_hidden=6, n_latent=2, use_batch_norm="both")
    model.train(2, progress_bar=False)
    for decoder in (True, False):
        mapped = pm.MULTIVI.load_query_data(
            parts[1], model, freeze_dropout=True, freeze_batchnorm_decoder=decoder, freeze_batchnorm_encoder=True
        )
        start = state(mapped)
        mapped.train(2, progress_bar=False)
        changed = {name for name, value in state(mapped).items() if not value.equal(start[name])}
        assert any("decoder" in name and "running_mean" in name for name in changed) != decoder
        assert not any("first_layer" in name or "expert" in name for name in changed)
        dropouts = [part for part in mapped.program.modules() if isinstance(part, torch.nn.Dropout)]
        assert dropouts
        assert all(part.p == 0 for part in dropouts)
        np.testing.assert_array_equal(mapped.get_latent_representation(parts[0]), model.get_latent_representation())


@pytest.mark.parametrize("kind", ["Gene Expression", "Peaks"])
def test_one_modality_alone_in_any_order(world, kind):
    features = np.flatnonzero(world.query.var["feature_types"] == kind)
    pattern = ["paired", "expression" if kind == "Gene Expression" else "accessibility"]
    query = world.query[world.query.obs["modality"].isin(pattern)].copy()
    alone = query[:, np.random.default_rng(0).permutation(features)].copy()
    mapped = pm.MULTIVI.load_query_data(alone, world.model)
    latent = mapped.get_latent_representation()
    # The same as of the whole cells, of which the other modality was not measured.
    other = query[:, features].copy()
    np.testing.assert_array_equal(latent, mapped.get_latent_representation(other))
    assert mapped.query_report.n_cells[pattern[1]] == len(alone)
    assert mapped.get_normalized_expression().shape == (len(alone), 24)
    assert mapped.get_accessibility_estimates().shape == (len(alone), 30)
    mapped.train(2, progress_bar=False)


def test_missing_features_are_counted_and_unknown_ones_left_out(world):
    query = world.query[:, 6:].copy()
    query.var_names = ["new", *query.var_names[1:]]
    assert query.var["feature_types"].iloc[0] == "Gene Expression"
    mapped = pm.MULTIVI.load_query_data(query, world.model)
    report = mapped.query_report
    assert (report.shared, report.missing) == ({"genes": 17, "regions": 30}, {"genes": 7, "regions": 0})
    assert report.unknown == {"genes": 1, "regions": 0}
    assert report.new_batches == {"batch_2": len(query)}
    assert "17 shared" in str(report)
    # In the words of the setup's report.
    assert re.search(r"\d+ paired, \d+ RNA only, \d+ ATAC only\n", str(report))
    assert query.n_vars == 48


def test_a_query_of_the_known_batches_has_the_states_of_the_reference(world):
    mapped = pm.MULTIVI.load_query_data(world.reference, world.model)
    np.testing.assert_array_equal(mapped.get_latent_representation(), world.model.get_latent_representation())
    before = state(mapped)
    with pytest.warns(UserWarning, match="Nothing is trained.*freeze_expression=False"):
        mapped.train(1, progress_bar=False)
    assert same(before, state(mapped))
    assert mapped.query_report.new_batches == {}


def test_the_model_of_a_query_does_what_others_do(world, tmp_path):
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    mapped.train(2, progress_bar=False)
    assert mapped.get_normalized_expression(transform_batch="batch_2").shape == (len(world.query), 24)
    assert mapped.get_normalized_expression(world.reference, transform_batch="batch_2").shape[1] == 24
    table = mapped.differential_accessibility(groupby="cell_type", n_samples=20)
    assert len(table) == 60
    assert mapped.impute().shape == world.query.shape
    mapped.save(tmp_path / "query")
    loaded = pm.MULTIVI.load(tmp_path / "query", world.query)
    np.testing.assert_array_equal(loaded.get_latent_representation(), mapped.get_latent_representation())
    assert loaded.query_report == mapped.query_report
    trained = {name for name, parameter in loaded.program.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in mapped.program.named_parameters() if parameter.requires_grad}
    loaded.train(2, progress_bar=False)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(world.reference), world.model.get_latent_representation()
    )


def test_a_query_of_an_older_version_needs_its_reference_trained_on(world, tmp_path, caplog):
    mapped = pm.MULTIVI.load_query_data(world.query, world.model)
    scale = mapped.program.depth_scale
    del mapped.program.depth_scale
    mapped.program.register_buffer("depth_scale", scale, persistent=False)
    mapped.save(tmp_path / "query")
    pm.MULTIVI.load(tmp_path / "query", world.query)
    assert "too narrow. Training its reference on (train), and mapping the query again, brings it." in caplog.text


def test_a_folder_is_a_reference_as_its_model_is(world, tmp_path):
    world.model.save(tmp_path / "reference")
    of_folder = pm.MULTIVI.load_query_data(world.query[:, 3:].copy(), tmp_path / "reference")
    of_model = pm.MULTIVI.load_query_data(world.query[:, 3:].copy(), world.model)
    assert same(state(of_folder), state(of_model))
    description = json.loads((tmp_path / "reference" / "model.json").read_text())
    description["format"] = 99
    for name in ("SHA256SUMS",):
        (tmp_path / "reference" / name).unlink()
    (tmp_path / "reference" / "model.json").write_text(json.dumps(description))
    with pytest.raises(BrokenModelError, match="reference_model: .*format 99"):
        pm.MULTIVI.load_query_data(world.query, tmp_path / "reference")


def test_new_categories_of_covariates_and_labels_of_others(tmp_path):
    adata = pm.simulate_multiome((60, 0, 0), n_genes=12, n_regions=14, n_batches=2, seed=0)
    rng = np.random.default_rng(0)
    adata.obs["site"] = rng.choice(["a", "b"], len(adata))
    adata.obs["age"] = rng.normal(size=len(adata))
    parts = [adata[adata.obs["batch"] == name].copy() for name in ("batch_0", "batch_1")]
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["site"], "continuous_covariate_keys": ["age"]}
    pm.MULTIVI.setup_anndata(parts[0], labels_key="cell_type", **setup)
    model = pm.MULTIVI(parts[0], n_hidden=6, n_latent=2, dispersion="gene-batch", deeply_inject_covariates=True)
    model.train(2, progress_bar=False)
    parts[1].obs["site"] = "c"
    parts[1].obs["cell_type"] = 7
    mapped = pm.MULTIVI.load_query_data(parts[1], model)
    assert mapped.spec.categorical == {"site": ("a", "b", "c")}
    start = state(mapped)
    mapped.train(2, progress_bar=False)
    changed = state(mapped)
    assert (changed["log_theta"] != start["log_theta"]).any(1).tolist() == [False, True]
    weight = changed["expression_decoder.stack.linear.1.weight"] != start["expression_decoder.stack.linear.1.weight"]
    # Hidden units, then batches 0 and 1, sites a, b, c, age.
    assert weight.any(0).nonzero().squeeze(1).tolist() == [7, 10]
    np.testing.assert_array_equal(mapped.get_latent_representation(parts[0]), model.get_latent_representation())
    # Products with another number of columns may round otherwise.
    found, expected = mapped.get_normalized_expression(parts[0]), model.get_normalized_expression()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    del parts[1].obs["age"]
    with pytest.raises(ValueError, match="continuous_covariate_keys='age' is not in adata.obs"):
        pm.MULTIVI.load_query_data(parts[1], model)


class OfTypes(pm.MultiVIProgram):
    """The state of a cell has a prior mean of its label."""

    needs_labels = True

    def __init__(self, config):
        super().__init__(config)
        self.of_label = torch.nn.Parameter(torch.zeros(config.n_labels, config.latent))

    def observe_extra(self, cells, z, s):
        super().observe_extra(cells, z, s)
        pyro.factor("types", -(z - self.of_label[cells.label]).square().sum(-1))


@pytest.mark.parametrize("choices", [{"program_class": OfTypes}, {"protein_dispersion": "protein-label"}], ids=str)
def test_programs_that_read_labels_get_those_of_the_query(choices):
    adata = pm.simulate_multiome((40, 0, 0), n_genes=12, n_regions=14, n_proteins=4, n_batches=2, seed=0)
    keys = {"batch_key": "batch", "labels_key": "cell_type", "protein_expression_obsm_key": "protein_expression"}
    first, second = (adata[adata.obs["batch"] == name].copy() for name in ("batch_0", "batch_1"))
    pm.MULTIVI.setup_anndata(first, **keys)
    model = pm.MULTIVI(first, n_hidden=6, n_latent=2, **choices)
    model.train(1, progress_bar=False)
    second.obs["cell_type"] = first.obs["cell_type"].iloc[0]
    mapped = pm.MULTIVI.load_query_data(second, model)
    assert mapped.program.config.n_labels == model.program.config.n_labels
    mapped.train(1, progress_bar=False)
    assert np.isfinite(mapped.get_elbo())
    del second.obs["cell_type"]
    with pytest.raises(ValueError, match="labels_key='cell_type' is not in adata.obs"):
        pm.MULTIVI.load_query_data(second, model)


def test_wrong_queries_are_refused(world):
    query = world.query.copy()
    strangers = query.copy()
    strangers.var_names = [f"other_{name}" for name in query.var_names]
    with pytest.raises(ValueError, match="shares no genes with the model"):
        pm.MULTIVI.load_query_data(strangers, world.model)
    normalised = query.copy()
    normalised.X = query.X.multiply(0.37).tocsr()
    with pytest.raises(ValueError, match="not a whole number.*Raw counts are needed"):
        pm.MULTIVI.load_query_data(normalised, world.model)
    del query.obs["batch"]
    with pytest.raises(ValueError, match="batch_key='batch' is not in adata.obs"):
        pm.MULTIVI.load_query_data(query, world.model)
    untrained = pm.MULTIVI(world.reference, n_hidden=4, n_latent=2)
    with pytest.raises(pm.NotTrainedError, match="reference_model is not trained"):
        pm.MULTIVI.load_query_data(world.query, untrained)


def test_cells_of_a_known_batch_with_another_depth_are_warned_of(world):
    query = world.reference.copy()
    query.X = query.X.multiply(20).tocsr()
    with pytest.warns(UserWarning, match=r"The RNA depth of the query's cells is far.*'batch_0 \(\d+.* times\)'"):
        pm.MULTIVI.load_query_data(query, world.model)


def test_few_shared_features_are_warned_of(world):
    query = world.query[world.query.obs["modality"] == "paired", 20:].copy()
    with pytest.warns(UserWarning, match="shares 4 of the model's 24 genes"):
        pm.MULTIVI.load_query_data(query, world.model)


def test_a_mudata_is_mapped_onto_a_model_of_an_anndata(world):
    pytest.importorskip("mudata")
    types = {"rna": "Gene Expression", "atac": "Peaks"}
    query = world.query[world.query.obs["modality"] == "paired"].copy()
    parts = {name: query[:, query.var["feature_types"] == kind].copy() for name, kind in types.items()}
    with mudata_as_given() as mudata:
        mdata = mudata.MuData({"rna": parts["rna"][5:].copy(), "atac": parts["atac"]})
    mdata.obs["batch"] = query.obs["batch"].astype(str).reindex(mdata.obs_names)
    mapped = pm.MULTIVI.load_query_data(mdata, world.model)
    assert mapped.query_report.n_cells == {"paired": len(query) - 5, "expression": 0, "accessibility": 5}
    whole = pm.MULTIVI.load_query_data(query, world.model)
    by_name = dict(zip(mdata.obs_names, mapped.get_latent_representation(), strict=True))
    expected = dict(zip(query.obs_names, whole.get_latent_representation(), strict=True))
    for name in query.obs_names[5:]:
        np.testing.assert_allclose(by_name[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_report_is_logged(world, caplog):
    with caplog.at_level(logging.INFO, "pyro_multivi"):
        pm.MULTIVI.load_query_data(world.query, world.model)
    assert "new         batch_2" in caplog.text
