"""Features that a query lacks: not measured, which is another thing than zero."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.minibatch import Panels
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.networks.panels import log_depth, missing_input
from pyro_multivi.posterior.mapping.typical import set_typical


def paired(world):
    return world.query[world.query.obs["modality"] == "paired"].copy()


def test_zeros_and_what_is_missing_are_told_apart(world):
    query = paired(world)
    zeros = query.copy()
    dense = zeros.X.toarray()
    dense[:, :8] = 0
    zeros.X = dense
    missing = pm.MULTIVI.load_query_data(query[:, 8:].copy(), world.model)
    as_zero = pm.MULTIVI.load_query_data(zeros, world.model)
    whole = pm.MULTIVI.load_query_data(query, world.model).get_latent_representation()
    errors = [np.abs(each.get_latent_representation() - whole).mean() for each in (missing, as_zero)]
    assert errors[0] < errors[1]
    assert missing.get_reconstruction_error() != as_zero.get_reconstruction_error()


def test_depth_is_that_of_all_features(world):
    query = paired(world)
    whole = pm.MULTIVI.load_query_data(query, world.model).get_library_size_factors()["expression"]
    partial = pm.MULTIVI.load_query_data(query[:, 8:].copy(), world.model)
    found = partial.get_library_size_factors()["expression"]
    share = np.log(found / whole)
    # Without the correction, all would be short by the share of the missing genes.
    measured = np.asarray(query.X[:, 8:24].sum(1) / query.X[:, :24].sum(1)).ravel()
    assert abs(share.mean()) < 0.5 * abs(np.log(measured).mean())


def test_the_first_layer_sums_as_if_everything_was_measured(make_cells, make_program):
    program, cells = make_program(), make_cells((6, 0, 0))
    set_typical(program)
    measured = torch.tensor([[True, False, True, True, False, True, True]])
    x = cells.x.to_dense() * measured
    some = cells.replace(x=x, rna_panels=Panels(measured, torch.zeros(6, dtype=torch.int64)))
    share, mean = program.rna_typical
    weight, bias = program.rna_first_layer.counts.weight, program.rna_first_layer.counts.bias
    given = program.rna_input(x, (share * measured[0]).sum().expand(6))
    part = (mean * measured[0]).sum() / mean.sum()
    expected = bias + mean @ weight + ((given - mean) * measured) @ weight / part
    missing = missing_input(program, some, RNA)
    found = missing.scale * (program.rna_first_layer.counts(given) - bias) + bias + missing.input @ weight
    torch.testing.assert_close(found, expected)
    encoded = program.encode(some, some.design).rna.hidden
    torch.testing.assert_close(encoded, program.rna_first_layer.after(expected))
    # A typical cell has the sum that it would have if all had been measured.
    typical = missing.scale * (mean * measured[0]) @ weight + missing.input @ weight
    torch.testing.assert_close(typical[0], mean @ weight)
    depth = (x.sum(1) / (share * measured[0]).sum()).clamp(min=1).log()
    torch.testing.assert_close(log_depth(program, some, RNA), depth)
    assert log_depth(program, cells, ATAC).equal((cells.y.to_dense() > 0).sum(1).float().log1p())


def test_each_cell_of_a_table_is_read_by_its_own_panel(make_cells, make_program):
    program, cells = make_program(), make_cells((6, 0, 0))
    set_typical(program)
    measured = torch.tensor(
        [[True, False, True, True, False, True, True], [True, True, True, False, True, True, False]]
    )
    code = torch.tensor([0, 1, 1, 0, 1, 0])
    x = cells.x.to_dense() * measured[code]
    both = cells.replace(x=x, rna_panels=Panels(measured, code))
    found, depth = program.encode(both, both.design).rna.hidden, log_depth(program, both, RNA)
    for panel in range(2):
        alone = cells.replace(x=x, rna_panels=Panels(measured[panel : panel + 1], torch.zeros_like(code)))
        own = code == panel
        torch.testing.assert_close(found[own], program.encode(alone, alone.design).rna.hidden[own])
        torch.testing.assert_close(depth[own], log_depth(program, alone, RNA)[own])


def test_typical_inputs_are_those_of_cells_of_the_model(make_program):
    program = make_program()
    set_typical(program, 2)
    first = program.rna_typical.clone()
    set_typical(program, 2)
    assert first.equal(program.rna_typical)
    torch.testing.assert_close(first[0].sum(), torch.tensor(1.0))
    assert (program.atac_typical[1] > 0).all()
    assert (program.atac_typical[1] < 1).all()


def test_typical_cells_are_of_the_categories_that_there_are():
    adata = pm.simulate_multiome((60, 0, 0), n_genes=12, n_regions=14, n_types=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, categorical_covariate_keys=["cell_type"])
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    query = adata[:, 4:].copy()
    found = pm.MULTIVI.load_query_data(query, model).program
    # Each cell is of one category: what all of them add is no other than the intercept.
    for decoder in (model.program.expression_decoder, model.program.accessibility_decoder):
        layer, shift = decoder.stack.linear[0], torch.linspace(-2, 2, 6)
        layer.weight.data[:, -2:] += shift[:, None]
        layer.bias.data -= shift
    same = pm.MULTIVI.load_query_data(query, model).program
    torch.testing.assert_close(same.rna_typical, found.rna_typical)
    torch.testing.assert_close(same.atac_typical, found.atac_typical)


def test_results_have_all_features(world):
    partial = pm.MULTIVI.load_query_data(paired(world)[:, 8:].copy(), world.model)
    partial.train(2, train_size=0.9, progress_bar=False)
    expression = partial.get_normalized_expression()
    assert list(expression.columns) == list(world.model.spec.gene_names)
    np.testing.assert_allclose(expression.sum(axis=1), 1.0, rtol=1e-4)
    table = partial.differential_expression(groupby="cell_type", group1="type_0", n_samples=20)
    missing, there = list(world.model.spec.gene_names[:8]), list(world.model.spec.gene_names[8:])
    # Nothing is known of what was not measured: neither tested nor checked, but imputed.
    assert sorted(table.index) == sorted(there)
    assert partial.posterior_predictive_check(n_samples=40).genes["gene"].isin(there).all()
    with pytest.raises(ValueError, match=r"gene_list holds .*, which were not measured in all of these cells"):
        partial.differential_expression(groupby="cell_type", gene_list=missing[:2], n_samples=20)


def test_whole_cells_pass_the_model_of_a_partial_query_as_the_reference(world):
    partial = pm.MULTIVI.load_query_data(paired(world)[:, 8:].copy(), world.model)
    np.testing.assert_array_equal(
        partial.get_latent_representation(world.reference), world.model.get_latent_representation()
    )


def test_a_model_of_regions_alone_may_have_size_factors_of_genes():
    adata = pm.simulate_multiome((0, 0, 40), n_genes=12, n_regions=14, seed=0)
    cells = adata[:, adata.var["feature_types"] == "Peaks"].copy()
    cells.obs["size"] = 1.0
    pm.MULTIVI.setup_anndata(cells, size_factor_key="size")
    model = pm.MULTIVI(cells, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    mapped = pm.MULTIVI.load_query_data(cells, model)
    np.testing.assert_array_equal(mapped.get_latent_representation(), model.get_latent_representation())
