"""Training on cells that lack a modality, or batches: what the model knows of these stays."""

from __future__ import annotations

import pytest
import torch

import pyro_multivi as pm

OF_OTHERS = ("atac_", "accessibility_decoder.", "cell_factor_", "region_", "extra.protein.")


@pytest.fixture(scope="module")
def adata():
    return pm.simulate_multiome((60, 20, 20), n_genes=12, n_regions=14, n_batches=3, n_proteins=4, seed=0)


@pytest.fixture
def model(adata):
    reference = adata[adata.obs["batch"] != "batch_2"].copy()
    keys = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "protein_expression"}
    pm.MULTIVI.setup_anndata(reference, **keys)
    found = pm.MULTIVI(reference, n_hidden=6, n_latent=2)
    found.train(2, progress_bar=False)
    return found


def of_genes_alone(adata, batch):
    cells = adata[(adata.obs["batch"] == batch) & (adata.obs["modality"] == "expression")].copy()
    del cells.obsm["protein_expression"]
    return cells


def parameters_of(model, prefixes):
    named = model.program.named_parameters()
    return {name: value.detach().clone() for name, value in named if name.startswith(prefixes)}


@pytest.mark.parametrize("chosen", ["unfrozen", "freeze_expression", "freeze_decoder_first_layer"])
def test_a_query_of_genes_alone_forgets_no_other_modality(adata, model, chosen):
    query = of_genes_alone(adata, "batch_2")
    mapped = pm.MULTIVI.load_query_data(query, model, **{chosen: chosen == "unfrozen"})
    others, own = parameters_of(mapped, OF_OTHERS), parameters_of(mapped, ("rna_", "expression_decoder."))
    mapped.train(3, progress_bar=False)
    for name, value in parameters_of(mapped, OF_OTHERS).items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=0, msg=name)
    assert not all(value.equal(own[name]) for name, value in parameters_of(mapped, ("rna_", "expression_d")).items())


def test_nor_does_a_model_that_goes_on_with_such_cells(adata, model):
    known = parameters_of(model, OF_OTHERS)
    model.adata = of_genes_alone(adata, "batch_0")
    model.train(2, progress_bar=False, train_size=0.9)
    for name, value in parameters_of(model, OF_OTHERS).items():
        torch.testing.assert_close(value, known[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("chosen", ["unfrozen", "freeze_decoder_first_layer"])
def test_a_query_moves_no_batch_that_none_of_its_cells_is_of(adata, model, chosen):
    query = adata[adata.obs["batch"] == "batch_2"].copy()
    mapped = pm.MULTIVI.load_query_data(query, model, **{chosen: chosen == "unfrozen"})
    decoders = ("expression_decoder.stack.linear.0.weight", "extra.protein.decoder.linear.0.weight")
    last = ("expression_decoder.rho.weight", "accessibility_decoder.p.weight")
    before = parameters_of(mapped, decoders + last)
    mapped.train(3, progress_bar=False)
    for name, value in parameters_of(mapped, decoders).items():
        # Behind those of the state, a column for each batch.
        is_same = (value == before[name]).all(0).tolist()
        assert is_same == [False, False, True, True, False], name
    for name, value in parameters_of(mapped, last).items():
        assert (value == before[name]).all(0)[-3:].tolist() == [True, True, False], name


@pytest.mark.parametrize("chosen", ["unfrozen", "freeze_decoder_first_layer"])
def test_nor_an_intercept_of_a_batch_in_a_modality_that_it_lacks(adata, model, chosen):
    """That of a new batch stays the average of the known ones, that of a known batch what it was."""
    query = adata[(adata.obs["batch"] == "batch_0") | (adata.obs["modality"] == "expression")].copy()
    query.obs.loc[query.obs["batch"] == "batch_1", "batch"] = "batch_2"
    mapped = pm.MULTIVI.load_query_data(query, model, **{chosen: chosen == "unfrozen"})
    assert mapped.spec.batch_categories == ("batch_0", "batch_1", "batch_2")
    name = "accessibility_decoder.p.weight"
    before = parameters_of(mapped, (name,))[name]
    assert before[:, -1].any()
    mapped.train(3, progress_bar=False)
    is_same = (parameters_of(mapped, (name,))[name] == before).all(0)[-3:].tolist()
    assert is_same == [chosen != "unfrozen", True, True]


@pytest.mark.parametrize("train_size", [1.0, 0.8])
def test_what_is_known_of_features_that_a_query_lacks_stays(adata, model, train_size):
    query = adata[adata.obs["batch"] == "batch_2", 3:20].copy()
    assert query.n_obs > 30
    mapped = pm.MULTIVI.load_query_data(query, model, unfrozen=True)
    last = ("expression_decoder.rho.", "expression_decoder.pi.", "accessibility_decoder.p.")
    for value in dict(mapped.program.named_parameters()).values():
        value.data.add_(0.1)
    before = parameters_of(mapped, last)
    mapped.train(3, train_size=train_size, progress_bar=False)
    for name, value in parameters_of(mapped, last).items():
        lacks = slice(0, 3) if name.startswith("expression") else slice(8, 14)
        has = slice(3, 12) if name.startswith("expression") else slice(0, 8)
        torch.testing.assert_close(value[lacks], before[name][lacks], rtol=0, atol=0, msg=name)
        assert not torch.equal(value[has], before[name][has]), name


def test_and_of_proteins_that_it_lacks(adata, model):
    query = adata[adata.obs["batch"] == "batch_2"].copy()
    query.obsm["protein_expression"] = query.obsm["protein_expression"].iloc[:, 1:]
    mapped = pm.MULTIVI.load_query_data(query, model, unfrozen=True)
    name = "extra.protein."
    layers = tuple(name + each for each in ("log_ratio.weight", "odds.weight", "first_layer.counts.weight"))
    before = parameters_of(mapped, (*layers, name + "background_hidden.weight"))
    mapped.train(3, progress_bar=False)
    for key, value in parameters_of(mapped, tuple(before)).items():
        is_same = (value == before[key]).all(0 if "background" in key else 1).tolist()
        assert is_same == [True, False, False, False], key
