"""Models of batches with other panels of features: what was not measured is as if it were absent."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import scipy.sparse as sp
import torch
from pyro.infer import Trace_ELBO

import pyro_multivi as pm
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.networks.panels import log_depth
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity


def panels_of(whole, lacking):
    """Samples of the batches, without the features that each lacks."""
    return {
        batch: whole[whole.obs["batch"] == batch, ~whole.var_names.isin(lost)].copy() for batch, lost in lacking.items()
    }


@pytest.fixture(scope="module")
def world():
    whole = pm.simulate_multiome((120, 0, 0), n_genes=24, n_regions=30, n_batches=4, n_types=3, seed=0)
    names = whole.var_names
    genes, regions = names[:24], names[24:]
    lacking = {
        "batch_0": [*genes[:6], *regions[:8]],
        "batch_1": [*genes[20:], *regions],
        "batch_2": [*genes, *regions[20:]],
        "batch_3": [*regions[25:]],
    }
    samples = panels_of(whole, lacking)
    joined = pm.join_samples(samples, features="union", sample_key="batch")
    joined.obs["half"] = np.where(np.arange(len(joined)) % 2, "odd", "even")
    pm.MULTIVI.setup_anndata(joined, batch_key="batch", modality_key="modality", labels_key="cell_type")
    model = pm.MULTIVI(joined, n_hidden=8, n_latent=3)
    model.train(3, progress_bar=False)
    return SimpleNamespace(whole=whole, samples=samples, joined=joined, model=model, lacking=lacking, genes=genes)


def own_columns(program, world, batch, z, s, l, d):
    """Log-probabilities of the counts of a sample on its own columns, from Pyro's distributions, and dense decoders."""
    sample, names = world.samples[batch], world.model.spec
    decoded = program.expression(z, s)
    total = torch.zeros(len(sample))
    genes = [name for name in names.gene_names if name in sample.var_names]
    if genes:
        at = [names.gene_names.index(name) for name in genes]
        mu = l[:, None] * decoded.rho.dense()[:, at]
        theta, gate = program.log_theta[0].exp()[at], decoded.pi_logits.dense()[:, at]
        counts = dist.ZeroInflatedDistribution(dist.GammaPoisson(theta, theta / mu), gate_logits=gate)
        total = total + counts.log_prob(torch.from_numpy(sample[:, genes].X.toarray())).sum(1)
    regions = [name for name in names.region_names if name in sample.var_names]
    if regions:
        at = [names.region_names.index(name) for name in regions]
        p = program.accessibility(z, s).dense()[:, at] * d[:, None] * program.region_logit.sigmoid()[at]
        total = total + dist.Bernoulli(p).log_prob((torch.from_numpy(sample[:, regions].X.toarray()) > 0).float()).sum(
            1
        )
    return total


def test_masked_is_absent_in_value_and_gradient(world):
    program = world.model.program
    cells = world.model.minibatch()
    weights = [part for name, part in program.named_parameters() if "first_layer" not in name]

    def slopes(loss):
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        return [torch.zeros_like(w) if slope is None else slope for w, slope in zip(weights, found, strict=True)]

    latents = poutine.block(program.guide, hide=["alignment", "mixing"])
    torch.manual_seed(3)
    elbo = -Trace_ELBO().differentiable_loss(program.model, latents, cells)
    found = slopes(elbo)
    torch.manual_seed(3)
    guide = poutine.trace(latents).get_trace(cells)
    guide.compute_log_prob()
    z, l, d = (guide.nodes[name]["value"] for name in ("z", "l", "d"))
    expected = -sum(guide.nodes[name]["log_prob_sum"] for name in ("z", "l", "d"))
    prior = dist.LogNormal(*program.library_moments(cells.design))
    expected = expected + dist.Normal(0.0, 1.0).log_prob(z).sum() + prior.log_prob(l).sum()
    batch = cells.design[:, : program.config.n_batch]
    of_logit = dist.Normal(batch @ program.cell_factor_loc, batch @ program.cell_factor_sd)
    expected = expected + (of_logit.log_prob(d.logit()) - d.log() - (1 - d).log()).sum()
    for batch in world.samples:
        rows = torch.from_numpy(np.flatnonzero(world.joined.obs["batch"] == batch))
        part = own_columns(program, world, batch, z[rows], cells.design[rows], l[rows], d[rows])
        expected = expected + part.sum()
    torch.testing.assert_close(elbo, expected, rtol=1e-5, atol=1e-2)
    for one, other in zip(found, slopes(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def test_typical_cells_and_depths_are_those_of_the_cells_that_measured_a_feature(world):
    table, program = world.model._training_table(), world.model.program
    spec = world.model.spec
    x = world.joined[:, list(spec.gene_names)].X.toarray()
    measured = (table.rna_panels.measured[table.rna_panels.code] & table.has_rna[:, None]).numpy()
    share = program.rna_typical[0].numpy()
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-5)
    total = x.sum(1) / (measured @ share).clip(1e-9)
    # The likelihood's condition: the counts of a gene are its share of the depth of the cells that measured it.
    of_measured = [(x[:, g][measured[:, g]].sum() + 0.5) / total[measured[:, g]].sum() for g in range(len(share))]
    np.testing.assert_allclose(share, np.array(of_measured) / np.sum(of_measured), rtol=1e-3)
    depths = log_depth(program, world.model.minibatch(), RNA).numpy()
    np.testing.assert_allclose(depths[table.has_rna], np.log(total[table.has_rna]), rtol=1e-4)
    y = world.joined[:, list(spec.region_names)].X.toarray() > 0
    seen = (table.atac_panels.measured[table.atac_panels.code] & table.has_atac[:, None]).numpy()
    rate = np.array([y[seen[:, j], j].mean() for j in range(y.shape[1])])
    np.testing.assert_allclose(program.atac_typical[1].numpy(), rate, rtol=1e-4)
    # Priors of depth are of whole cells too.
    for code in (0, 1, 3):
        own = (table.batch_code == code).numpy() & table.has_rna.numpy()
        np.testing.assert_allclose(program.library_log_mean[code], np.log(total[own]).mean(), rtol=1e-3)


def test_panels_without_a_common_share_do_not_shift_depth():
    """Half of the genes measured in half of the cells: depths are those of all genes, not half of them."""
    whole = pm.simulate_multiome((120, 0, 0), n_genes=20, n_regions=10, n_batches=2, batch_effect=0.0, seed=1)
    lost = {"batch_0": [], "batch_1": list(whole.var_names[:10])}
    joined = pm.join_samples(panels_of(whole, lost), features="union", sample_key="batch")
    pm.MULTIVI.setup_anndata(joined, batch_key="batch", modality_key="modality")
    pm.MULTIVI.setup_anndata(whole, batch_key="batch")
    masked, full = pm.MULTIVI(joined).program, pm.MULTIVI(whole).program
    torch.testing.assert_close(masked.library_log_mean, full.library_log_mean, rtol=0.0, atol=0.1)
    torch.testing.assert_close(masked.rna_log_depth, full.rna_log_depth, rtol=0.0, atol=0.1)


def test_results_are_the_same_after_saving(world, tmp_path):
    model = world.model
    model.save(tmp_path / "model", save_anndata=True)
    loaded = pm.MULTIVI.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_elbo() == model.get_elbo()
    bare = world.joined.copy()
    del bare.varm["pyro_multivi_measured"]
    with pytest.raises(ValueError, match="has no such key"):
        pm.MULTIVI.load(tmp_path / "model", bare).get_latent_representation()


def test_a_query_keeps_the_reference_where_it_is(world):
    query = world.whole[world.whole.obs["batch"] == "batch_0", 3:].copy()
    query.obs["batch"] = "new"
    mapped = pm.MULTIVI.load_query_data(query, world.model)
    assert mapped.query_report.missing == {"genes": 3, "regions": 0}
    np.testing.assert_array_equal(
        mapped.get_latent_representation(world.joined), world.model.get_latent_representation()
    )
    table = world.model.transfer_labels(mapped, "cell_type")
    assert table["nearest_label"].isin(world.joined.obs["cell_type"].unique()).all()
    # A query of several panels itself, which brings its masks.
    parts = {"one": query[:20, 3:].copy(), "two": query[20:, :-4].copy()}
    several = pm.join_samples(parts, features="union", sample_key="library")
    both = pm.MULTIVI.load_query_data(several, world.model)
    alone = pm.MULTIVI.load_query_data(parts["one"].copy(), world.model)
    np.testing.assert_allclose(
        both.get_latent_representation()[:20], alone.get_latent_representation(), rtol=1e-4, atol=1e-5
    )
    prepared = pm.MULTIVI.prepare_query_anndata(several, world.model, inplace=False)
    again = pm.MULTIVI.load_query_data(prepared, world.model)
    np.testing.assert_array_equal(again.get_latent_representation(), both.get_latent_representation())


def test_what_was_not_measured_is_imputed_and_nothing_else(world):
    filled = world.model.impute()
    table = world.model._training_table()
    for modality, columns in ((RNA, slice(0, 24)), (ATAC, slice(24, 54))):
        panels = modality.panels_in(table)
        measured = (panels.measured[panels.code] & modality.measured_in(table)[:, None]).numpy()
        imputed = filled.layers["imputed"][:, columns].toarray()
        assert ((imputed > 0) == ~measured).all()
    assert filled.obs["expression_source"].tolist()[0] == "measured in part"
    assert (filled.X != world.joined.X).nnz == 0


def test_checks_are_of_features_that_all_cells_measured(world, caplog):
    cells = np.flatnonzero(world.joined.obs["batch"] == "batch_1")
    check = world.model.posterior_predictive_check(indices=cells, held_out=False, n_samples=40, hide_modalities=False)
    assert sorted(check.genes["gene"].unique()) == sorted(world.genes[:20])
    everything = world.model.posterior_predictive_check(held_out=False, n_samples=40, hide_modalities=False)
    assert sorted(everything.genes["gene"].unique()) == sorted(world.genes[6:20])
    with pytest.raises(ValueError, match="gene_list holds .*, which were not measured in all of these cells"):
        world.model.posterior_predictive_check(gene_list=[world.genes[0]], held_out=False, n_samples=40)


def test_a_gene_is_tested_with_the_cells_that_measured_it(world):
    compared = {"groupby": "cell_type", "group1": "type_0", "group2": "type_1"}
    table = world.model.differential_expression(**compared, n_samples=200).loc[list(world.genes)]
    batch, kind = world.joined.obs["batch"], world.joined.obs["cell_type"]
    for number in (1, 2):
        for gene in world.genes:
            measured = [name for name, lost in world.lacking.items() if gene not in lost]
            cells = world.joined[(batch.isin(measured) & (kind == f"type_{number - 1}")).to_numpy(), gene].X.toarray()
            assert table.loc[gene, f"n_measured{number}"] == len(cells)
            np.testing.assert_allclose(table.loc[gene, f"raw_mean{number}"], cells.mean(), rtol=1e-5)
    expected = np.log2((table["raw_normalized_mean1"] + 1) / (table["raw_normalized_mean2"] + 1))
    assert np.corrcoef(expected, table["lfc_mean"])[0, 1] > 0.9
    # Genes of one panel alone are called like others, where they differ.
    called = table["is_de_fdr_0.05"]
    assert called.iloc[:6].any()
    assert called.iloc[6:20].any()
    assert world.model.differential_expression(groupby="half", group1="odd", n_samples=200)["is_de_fdr_0.05"].sum() == 0


def test_a_gene_that_a_group_did_not_measure_is_not_called(world, caplog):
    for unit in ("group", "cell"):
        table = world.model.differential_expression(
            groupby="batch", group1="batch_0", group2="batch_1", n_samples=200, unit=unit
        )
        unknown = table["is_de_fdr_0.05"].isna()
        assert sorted(table.index[unknown]) == sorted([*world.genes[:6], *world.genes[20:]])
        assert (table.loc[unknown, ["n_measured1", "n_measured2"]].min(axis=1) == 0).all()
        assert table.loc[unknown, "proba_de"].isna().all() == (unit == "group")
    # Of the cells of one batch, the genes that it measured.
    idx = {"idx1": "batch == 'batch_0' and half == 'odd'", "idx2": "batch == 'batch_0' and half == 'even'"}
    table = world.model.differential_expression(**idx, n_samples=200)
    assert table["is_de_fdr_0.05"].notna().sum() == 18
    regions = world.model.differential_accessibility(groupby="batch", group1="batch_0", group2="batch_2", n_samples=200)
    lost = {*world.lacking["batch_0"], *world.lacking["batch_2"]}
    assert set(regions.index[regions["is_da_fdr"].isna()]) == lost & set(regions.index)


def test_statistics_of_users_see_nothing_of_what_was_not_measured(world):
    lost = world.joined.var_names.isin(world.lacking["batch_0"])
    cells = np.flatnonzero(world.joined.obs["batch"] == "batch_0")
    check = world.model.posterior_predictive_check(
        indices=cells, held_out=False, n_samples=40, statistics={"lost": lambda x: x[:, lost].sum()}
    )
    found = check.user.iloc[0]
    assert found["observed"] == found["replicated"] == 0


def test_models_of_other_masks_are_not_compared(world):
    bare = world.joined.copy()
    del bare.varm["pyro_multivi_measured"], bare.uns["pyro_multivi"]
    with pytest.warns(UserWarning, match="as if zeros had been filled in|says the same"):
        pm.MULTIVI.setup_anndata(bare, batch_key="batch", modality_key="modality")
    zeros = pm.MULTIVI(bare, n_hidden=8, n_latent=3)
    zeros.train(1, progress_bar=False)
    with pytest.raises(ValueError, match=r"take different genes as measured.*feature_masks"):
        pm.compare_models({"masks": world.model, "zeros": zeros}, indices=[0, 1, 2], n_mc_samples=4)


def test_training_with_pyro_needs_no_more(world):
    """The plain program trains on a table with panels under Pyro's own SVI."""
    program = world.model.program
    svi = pyro.infer.SVI(program.model, program.guide, pyro.optim.Adam({"lr": 0.0}), Trace_ELBO())
    assert np.isfinite(svi.step(world.model.minibatch([0, 40, 80])))


def test_a_run_of_other_masks_is_not_gone_on_with(world, tmp_path):
    joined, gene = world.joined.copy(), world.genes[-1]
    model = pm.MULTIVI(joined, n_hidden=8, n_latent=3)
    model.train(1, progress_bar=False, checkpoint=tmp_path / "checkpoint")
    lost = np.outer(joined.obs["batch"] == "batch_3", joined.var_names == gene)
    joined.X = sp.csr_matrix(joined.X.toarray() * ~lost)
    masks = joined.varm["pyro_multivi_measured"].copy()
    masks.loc[gene, "batch_3"] = False
    joined.varm["pyro_multivi_measured"] = masks
    with pytest.raises(ValueError, match="1 of the.*not measured|in no batch"):
        pm.MULTIVI(joined[joined.obs["batch"].isin(["batch_1", "batch_3"])].copy())
    other = pm.MULTIVI(joined, n_hidden=8, n_latent=3)
    with pytest.raises(ValueError, match="other genes measured in the cells"):
        other.train(1, progress_bar=False, checkpoint=tmp_path / "checkpoint", resume=True)


def test_minified_data_give_the_same(world):
    joined = world.joined.copy()
    pm.MULTIVI.setup_anndata(joined, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(joined, n_hidden=8, n_latent=3)
    model.train(1, progress_bar=False)
    before = model.get_latent_representation(), model.get_normalized_expression()
    model.minify_adata()
    np.testing.assert_array_equal(model.get_latent_representation(), before[0])
    pd.testing.assert_frame_equal(model.get_normalized_expression(), before[1])


@pytest.mark.slow
def test_a_union_tells_types_apart_and_imputes_what_a_sample_lacks():
    """Two samples of 300 cells that share half of their genes: types are found, and missing genes beat their mean."""
    whole = pm.simulate_multiome((300, 0, 0), n_genes=80, n_regions=100, n_batches=2, n_types=3, seed=2)
    genes, regions = whole.var_names[:80], whole.var_names[80:]
    lacking = {"batch_0": [*genes[:20], *regions[:20]], "batch_1": [*genes[60:], *regions[80:]]}
    joined = pm.join_samples(panels_of(whole, lacking), features="union", sample_key="batch")
    pm.MULTIVI.setup_anndata(joined, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(joined, n_hidden=32, n_latent=5)
    model.train(60, progress_bar=False)
    purity = neighbour_purity(model.get_latent_representation(), joined.obs["cell_type"].to_numpy(), 15)
    assert purity > 0.9
    for batch, other in (("batch_0", "batch_1"), ("batch_1", "batch_0")):
        missing, cells = lacking[batch][:20], joined.obs_names[joined.obs["batch"] == batch]
        truth, depth = whole[cells, missing].X.toarray(), np.asarray(whole[cells, genes].X.sum(1))
        measured = whole[whole.obs["batch"] == other]
        mean = np.asarray(measured[:, missing].X.sum(0) / measured[:, genes].X.sum()) * depth
        imputed = model.get_normalized_expression(indices=cells, gene_list=missing, return_numpy=True) * depth
        losses = [np.square(np.log1p(truth) - np.log1p(guess)).mean() for guess in (imputed, mean)]
        assert losses[0] < 0.95 * losses[1]
