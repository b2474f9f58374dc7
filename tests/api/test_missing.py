"""Missing modalities: no influence of what was not measured, and zeros that were measured count."""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext

import numpy as np
import pyro.poutine as poutine
import pytest
import scipy.sparse as sp
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_multivi as pm
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.data.sparse import SparseCounts

PAIRED, RNA_ONLY, ATAC_ONLY = slice(0, 5), slice(5, 8), slice(8, 12)
# Cells that lack a modality, and that modality.
LACKING = [pytest.param(RNA_ONLY, ATAC, id="rna"), pytest.param(ATAC_ONLY, RNA, id="atac")]
# First parts of the names of parameters that belong to a modality.
PARAMETERS = {
    RNA: ("rna_", "library_head", "expression_decoder", "log_theta", "weight_net.0"),
    ATAC: ("atac_", "cell_factor_", "accessibility_decoder", "region_logit", "weight_net.1"),
}


def rows(cells, chosen):
    """The chosen cells as a minibatch of their own."""
    index = torch.arange(len(cells))[chosen]
    taken = {name: getattr(cells, name)[index] for name in ("index", "has_rna", "has_atac", "design", "label")}
    return cells.replace(
        x=SparseCounts.from_dense(cells.x.to_dense()[index]),
        y=SparseCounts.from_dense(cells.y.to_dense()[index]),
        n_total=len(index),
        **taken,
    )


def log_probs(program, cells, latents):
    """Log probability of each cell at every site, of guide and model, at given latents."""
    fixed = {name: value.detach() for name, value in latents.items()}
    guide = poutine.trace(poutine.condition(program.guide, fixed)).get_trace(cells)
    model = poutine.trace(poutine.condition(program.model, fixed)).get_trace(cells)
    found = {}
    for role, trace in (("guide", guide), ("model", model)):
        trace.compute_log_prob()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and name != "cells":
                found[role, name] = site["unscaled_log_prob"]
    return found


def latents_of(program, cells):
    trace = poutine.trace(program.guide).get_trace(cells)
    return {name: trace.nodes[name]["value"].detach() for name in ("z", "l", "d")}


@pytest.mark.parametrize("chosen", [PAIRED, RNA_ONLY, ATAC_ONLY], ids=["paired", "rna", "atac"])
@pytest.mark.parametrize("weights", ["equal", "universal", "cell"])
def test_a_cell_does_not_notice_the_other_cells_of_a_mosaic(make_program, make_cells, chosen, weights):
    program = make_program(torch.float64, modality_weights=weights)
    cells = make_cells(dtype=torch.float64)
    latents = latents_of(program, cells)
    together = log_probs(program, cells, latents)
    alone = log_probs(program, rows(cells, chosen), {name: value[chosen] for name, value in latents.items()})
    assert together.keys() == alone.keys()
    # The distance between measurement patterns is a property of all cells.
    alone = {site: value for site, value in alone.items() if site[1] != "mixing"}
    for site, value in alone.items():
        torch.testing.assert_close(together[site][chosen].expand_as(value), value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("chosen", "lacking"), LACKING)
def test_a_missing_modality_is_an_absent_modality(make_program, make_cells, chosen, lacking):
    """The same cells under a program that has no such modality at all, with the same weights."""
    cells = rows(make_cells(dtype=torch.float64), chosen)
    both = make_program(torch.float64)
    one = make_program(torch.float64, **{f"n_{lacking.features}": 0})
    one.load_state_dict({name: both.state_dict()[name] for name in one.state_dict()})
    latents = latents_of(both, cells)
    for trace_of in (lambda p: p.guide, lambda p: p.model):
        found = {}
        for program in (both, one):
            kept = {name: value for name, value in latents.items() if name != lacking.depth}
            trace = poutine.trace(poutine.condition(trace_of(program), kept)).get_trace(cells)
            trace.compute_log_prob()
            found[program] = trace
        for name, node in found[one].nodes.items():
            if node["type"] == "sample" and name != "cells":
                expected, got = node["unscaled_log_prob"], found[both].nodes[name]["unscaled_log_prob"]
                torch.testing.assert_close(got.expand_as(expected), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("chosen", "lacking"), LACKING)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
@pytest.mark.parametrize("penalty", ["contrastive", "Jeffreys", "MMD", "None"])
def test_a_missing_modality_has_no_value_and_no_gradient(make_program, make_cells, chosen, lacking, elbo, penalty):
    program = make_program(modality_weights="cell", modality_penalty=penalty)
    cells = rows(make_cells(), chosen)
    model = poutine.trace(program.model).get_trace(cells)
    model.compute_log_prob()
    assert torch.equal(model.nodes[lacking.counts]["log_prob"], torch.zeros(len(cells)))
    elbo().differentiable_loss(program.model, program.guide, cells).backward()
    silent = {name for name, _ in program.named_parameters() if name.startswith(PARAMETERS[lacking])}
    assert len(silent) > 10
    for name, parameter in program.named_parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        # Weights of an average of one expert are 1 whatever their logits.
        assert moved == (name not in silent and not name.startswith("weight_net")), name


@pytest.mark.parametrize("modality", MODALITIES, ids=["rna", "atac"])
def test_junk_behind_the_mask_is_not_read(make_program, make_cells, modality):
    """Counts that stand where nothing was measured change no value and no gradient."""
    program, cells = make_program(), make_cells(sparse=False)
    junk = torch.where(modality.measured_in(cells)[:, None], modality.counts_in(cells), torch.tensor(1e6))

    def loss_and_gradients(given):
        torch.manual_seed(0)
        program.zero_grad()
        loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, given)
        loss.backward()
        return loss.item(), [p.grad.clone() for p in program.parameters()]

    clean, dirty = loss_and_gradients(cells), loss_and_gradients(cells.replace(**{modality.counts: junk}))
    assert clean[0] == dirty[0]
    for left, right in zip(clean[1], dirty[1], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("modality", MODALITIES, ids=["rna", "atac"])
def test_a_measured_empty_cell_is_not_a_missing_one(make_program, make_cells, modality):
    program, cells = make_program(), make_cells()
    dense = modality.counts_in(cells).to_dense().clone()
    dense[0] = 0  # a paired cell without any count
    empty = cells.replace(**{modality.counts: SparseCounts.from_dense(dense)})
    off = modality.measured_in(cells).clone()
    off[0] = False
    missing = empty.replace(**{f"has_{modality.key}": off})
    found = {}
    for name, given in (("empty", empty), ("missing", missing)):
        guide = poutine.trace(program.guide).get_trace(given)
        model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(given)
        model.compute_log_prob()
        guide.compute_log_prob()
        found[name] = (
            model.nodes[modality.counts]["log_prob"][0].item(),
            guide.nodes["alignment"]["log_prob"][0].item(),
            guide.nodes["z"]["fn"].mean[0],
        )
    assert found["empty"][0] < 0
    assert found["missing"][0] == 0
    assert found["empty"][1] > 0
    assert found["missing"][1] == 0
    assert not torch.equal(found["empty"][2], found["missing"][2])


def test_a_cell_with_nothing_measured_has_the_prior_as_its_posterior(make_program, make_cells):
    program, cells = make_program(), make_cells()
    off = cells.has_rna.clone(), cells.has_atac.clone()
    off[0][0] = off[1][0] = False
    cells = cells.replace(has_rna=off[0], has_atac=off[1])
    guide = poutine.trace(program.guide).get_trace(cells)
    assert torch.equal(guide.nodes["z"]["fn"].mean[0], torch.zeros(3))
    assert torch.equal(guide.nodes["z"]["fn"].stddev[0], torch.ones(3))
    TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells).backward()
    assert all(torch.isfinite(p.grad).all() for p in program.parameters())


def test_guide_of_l_and_d_is_the_prior_where_unmeasured(make_program, make_cells):
    program, cells = make_program(), make_cells((0, 40, 40))
    guide = poutine.trace(program.guide).get_trace(cells)
    l, no_rna = guide.nodes["l"]["fn"], ~cells.has_rna
    code = cells.design[:, :2].argmax(1)
    torch.testing.assert_close(l.loc[no_rna], program.library_log_mean[code][no_rna])
    torch.testing.assert_close(l.scale[no_rna].square(), program.library_log_var[code][no_rna])
    d, no_atac = guide.nodes["d"]["fn"], ~cells.has_atac
    torch.testing.assert_close(d.loc[no_atac], program.cell_factor_loc[code][no_atac])
    torch.testing.assert_close(d.scale[no_atac], program.cell_factor_sd[code][no_atac])


@pytest.mark.parametrize(("n", "has", "lacks"), [((0, 40, 0), RNA, ATAC), ((0, 0, 40), ATAC, RNA)], ids=["rna", "atac"])
@pytest.mark.parametrize("features", ["dropped", "kept"])
def test_models_of_one_modality_run_end_to_end(n, has, lacks, features):
    """With the other modality's features in the data, measured in no cell, and without them."""
    adata = pm.simulate_multiome(n, n_genes=20, n_regions=30, n_batches=2)
    if features == "dropped":
        adata = adata[:, adata.var["feature_types"] == has.feature_type].copy()
    unmeasured = pytest.warns(UserWarning, match=f"No cell was measured for {lacks.assay}")
    with unmeasured if features == "kept" else nullcontext():
        pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(4, progress_bar=False, batch_size=16)
    assert model.history["train_loss"].iloc[-1, 0] < model.history["train_loss"].iloc[0, 0] + 5
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_elbo())
    sizes = model.get_library_size_factors()
    assert np.isfinite(sizes[has.name]).all()
    assert lacks.name not in sizes or np.isnan(sizes[lacks.name]).all()
    np.testing.assert_array_equal(model.get_latent_representation(modality=has.name), model.get_latent_representation())
    with pytest.raises(ValueError, match="and so no|none of the 40 cells has it"):
        model.get_latent_representation(modality=lacks.name)


def test_rows_of_zeros_marked_as_measured_stay_measured():
    adata = pm.simulate_multiome((20, 5, 5), n_genes=20, n_regions=30)
    x = adata.X.tolil()
    x[0, :20] = 0
    adata.X = sp.csr_matrix(x)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(1, progress_bar=False)
    assert np.isfinite(model.get_latent_representation(modality="expression", indices=[0])).all()
    assert np.isfinite(model.get_library_size_factors(indices=[0])["expression"]).all()
    assert model.get_reconstruction_error(indices=[0])["reconstruction_loss_expression"] > 0


@pytest.fixture(scope="module")
def uneven():
    """A model of three batches, the second without RNA and the third without proteins."""
    adata = pm.simulate_multiome((90, 0, 0), n_genes=12, n_regions=14, n_batches=3, n_proteins=4, seed=0)
    is_second, is_third = ((adata.obs["batch"] == f"batch_{number}").to_numpy() for number in (1, 2))
    adata.obs["modality"] = np.where(is_second, "accessibility", "paired")
    adata.X = sp.csr_matrix(adata.X.toarray() * ~(is_second[:, None] & (np.arange(26) < 12)))
    adata.obsm["protein_expression"] = adata.obsm["protein_expression"].astype(float)
    adata.obsm["protein_expression"].loc[is_third] = np.nan
    keys = {"batch_key": "batch", "modality_key": "modality", "protein_expression_obsm_key": "protein_expression"}
    pm.MULTIVI.setup_anndata(adata, **keys)
    model = pm.MULTIVI(adata, n_hidden=6, n_latent=2)
    model.train(2, progress_bar=False)
    return model


def test_batches_that_never_had_a_modality_are_told(uneven):
    query = uneven.adata[:20].copy()
    query.obs["batch"] = "new"
    mapped = pm.MULTIVI.load_query_data(query, uneven)
    both = {"transform_batch": ["batch_0", "batch_1", "batch_2"], "indices": [0, 1]}
    rna = "'batch_1', in which RNA was measured in no cell .* Measured: 'batch_0', 'batch_2'"
    protein = "'batch_2', in which protein was measured in no cell .* Measured: 'batch_0', 'batch_1'"
    for call, told in (
        (uneven.get_normalized_expression, [rna]),
        (uneven.get_accessibility_estimates, []),
        (uneven.get_normalized_protein_expression, [protein]),
        (uneven.impute, [rna, protein]),
        (mapped.get_normalized_expression, ["'batch_1', in which RNA .* Measured: 'batch_0', 'batch_2', 'new'"]),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(**both)
        assert len(caught) == len(told)
        for warning, sentence in zip(caught, told, strict=True):
            assert re.search(f"transform_batch names {sentence}", str(warning.message))
    uneven.get_normalized_expression(transform_batch="batch_0", indices=[0])
    with pytest.warns(UserWarning, match="batchid2 names 'batch_1', in which RNA was measured in no cell"):
        uneven.differential_expression(
            groupby="batch", group1="batch_0", group2="batch_2", batch_correction=True, batchid1=[0], batchid2=[1],
            unit="cell", n_samples=20, silent=True,
        )  # fmt: skip
