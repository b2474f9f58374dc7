"""Normalized expression and accessibility."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_multivi import MULTIVI, MultiVIProgram, NotTrainedError, simulate_multiome
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.base import CellDistribution
from pyro_multivi.posterior.engine import decode as decoding
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.engine.draws import draw, mean_latents, mirrored_latents, replay
from pyro_multivi.posterior.quantities.estimates import Quantity
from pyro_multivi.traces import evaluation_mode

METHODS = ["get_normalized_expression", "get_accessibility_estimates"]
SOME = [3, 120, 121, 199]  # paired, RNA-only twice, ATAC-only


def features(method):
    return ("gene_list", "gene") if method == METHODS[0] else ("region_list", "region")


# ---------------------------------------------------------------------- what is computed


def test_one_sample_at_the_mean_decodes_the_mean(fitted_weights):
    """What was measured; of what was not, the hidden layer is averaged over points of the posterior."""
    fitted = fitted_weights
    cells, program = fitted.minibatch(), fitted.program
    z_nk = torch.from_numpy(fitted.get_latent_representation())
    with evaluation_mode(program):
        z_snk = mirrored_latents(program, cells, decoding.IMPUTATION_POINTS).trace.nodes["z"]["value"]
    torch.testing.assert_close(z_snk.mean(0), z_nk, rtol=1e-4, atol=1e-5)
    rho_layer, p_layer = program.expression_decoder.rho, program.accessibility_decoder.p

    def averaged(stack, at_mean_nh, measured_n):
        hidden_nh = torch.stack([stack(z, cells.design) for z in z_snk]).mean(0)
        batch = cells.design[:, : program.config.n_intercepts] * hidden_nh.shape[1] ** 0.5
        hidden_nh = torch.cat([hidden_nh, batch], 1)
        return torch.where(measured_n[:, None], at_mean_nh, hidden_nh)

    with torch.no_grad():
        at_mean = program.expression(z_nk, cells.design).rho, program.accessibility(z_nk, cells.design)
        rna = averaged(program.expression_decoder.stack, at_mean[0].hidden, cells.has_rna)
        atac = averaged(program.accessibility_decoder.stack, at_mean[1].hidden, cells.has_atac)
        rho = torch.nn.functional.linear(rna, rho_layer.weight, rho_layer.bias).softmax(-1).numpy()
        p = torch.nn.functional.linear(atac, p_layer.weight, p_layer.bias).sigmoid().numpy()
    given = {"return_numpy": True}
    np.testing.assert_allclose(fitted.get_normalized_expression(**given), rho, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(fitted.get_accessibility_estimates(**given), p, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(fitted.get_normalized_expression(batch_size=7, **given), rho, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(rho.sum(1), 1, rtol=1e-5)
    lacks = ~cells.has_rna.numpy()
    assert np.abs(rho - at_mean[0].dense().detach().numpy())[lacks].max() > 1e-3
    filled = fitted.impute().layers["imputed"].toarray()[:, : rho.shape[1]]
    np.testing.assert_allclose(filled[lacks], rho[lacks], rtol=1e-4, atol=1e-7)
    # One draw is something else.
    assert np.abs(fitted.get_normalized_expression(use_z_mean=False, **given) - rho).max() > 1e-3


def test_a_custom_decoder_is_averaged_where_it_ends(make_program, make_cells, monkeypatch):
    """Dense values, of which no hidden layer is known, are averaged themselves, a few draws at a time."""

    class Dense(MultiVIProgram):
        def accessibility(self, z, s):
            return super().accessibility(z, s).dense()

    program, cells = Dense(make_program().config).eval(), make_cells()
    with evaluation_mode(program):
        latents = mirrored_latents(program, cells, decoding.IMPUTATION_POINTS)
        drawn = replay(program, cells, latents, ("p",))["p"].mean(0)
    monkeypatch.setattr(decoding, "ROWS", 3 * len(cells))
    with evaluation_mode(program):
        found = decoding.decode(program, cells, Average(), ("p",)).sites[0]["p"][0]
        mean = replay(program, cells, mean_latents(program, cells), ("p",))["p"][0]
    torch.testing.assert_close(found, torch.where(cells.has_atac[:, None], mean, drawn))
    assert not torch.allclose(mean, drawn)


@pytest.mark.parametrize("method", METHODS)
def test_all_draws_are_those_of_the_latent_state_and_average_to_the_mean(fitted_weights, method):
    get = getattr(fitted_weights, method)
    draws = get(indices=SOME, n_samples=30, return_mean=False, seed=4)
    assert isinstance(draws, np.ndarray)
    z = torch.from_numpy(fitted_weights.get_latent_representation(indices=SOME, give_mean=False, n_samples=30, seed=4))
    cells, program = fitted_weights.minibatch(SOME), fitted_weights.program
    with torch.no_grad():
        decode = (lambda: program.expression(z, cells.design).rho) if method == METHODS[0] else None
        expected = (decode() if decode else program.accessibility(z, cells.design)).dense().numpy()
    np.testing.assert_allclose(draws, expected, rtol=1e-4, atol=1e-7)
    mean = get(indices=SOME, n_samples=30, seed=4)
    np.testing.assert_allclose(mean, draws.mean(0), rtol=1e-5)
    # With several draws the mean is not decoded, whatever use_z_mean says.
    np.testing.assert_array_equal(mean, get(indices=SOME, n_samples_overall=30, use_z_mean=False, seed=4))


@pytest.mark.parametrize("options", [{}, {"use_z_mean": False}, {"return_numpy": True}])
@pytest.mark.parametrize("method", METHODS)
def test_one_draw_has_the_form_of_a_mean_as_in_scvi_tools(fitted, method, options):
    get = getattr(fitted, method)
    found, expected = get(indices=SOME, return_mean=False, **options), get(indices=SOME, **options)
    assert type(found) is type(expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("site", ["rho", "p"])
def test_samples_converge_at_the_monte_carlo_rate(make_program, make_cells, compute, site):
    program, cells = make_program(), make_cells()

    def mean(n_samples, seed):
        return compute(program, [cells], Quantity(site), Average(n_samples, seed=seed))["mean"]

    truth = mean(20_000, 1000)
    error = {n: np.sqrt(np.mean([(mean(n, seed) - truth) ** 2 for seed in range(20)])) for n in (4, 64)}
    # A factor 16 in draws is one of 4 in error; 20 seeds x some 30 independent numbers fix it to a few per cent.
    assert 3.4 < error[4] / error[64] < 4.6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_samples", [1, 25])
def test_results_do_not_depend_on_batch_size_or_other_cells(fitted, method, n_samples):
    get = getattr(fitted, method)
    extra = {"library_size": "latent"} if method == METHODS[0] else {"normalize_cells": True}
    whole = get(n_samples=n_samples, use_z_mean=False, return_numpy=True, **extra)
    for batch_size in (7, 64):
        part = get(n_samples=n_samples, use_z_mean=False, batch_size=batch_size, return_numpy=True, **extra)
        np.testing.assert_allclose(part, whole, rtol=2e-5, atol=1e-7)
    some = get(indices=SOME, n_samples=n_samples, use_z_mean=False, batch_size=1, return_numpy=True, **extra)
    np.testing.assert_allclose(some, whole[SOME], rtol=2e-5, atol=1e-7)


@pytest.mark.usefixtures("global_rng_untouched")
def test_seeds_decide_and_global_state_is_left_alone(fitted):
    fitted.program.train()
    try:
        one = fitted.get_normalized_expression(n_samples=3, seed=1)
        assert fitted.program.training
    finally:
        fitted.program.eval()
    pd.testing.assert_frame_equal(one, fitted.get_normalized_expression(n_samples=3, seed=1))
    assert not one.equals(fitted.get_normalized_expression(n_samples=3, seed=2))


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_samples", [1, 4])
def test_a_cells_own_batch_is_the_identity(fitted, method, n_samples):
    get, batch = getattr(fitted, method), fitted.adata.obs["batch"].to_numpy()
    observed = get(n_samples=n_samples)
    for code, name in enumerate(["batch_0", "batch_1"]):
        there = get(n_samples=n_samples, transform_batch=name)
        own = batch == name
        np.testing.assert_array_equal(there[own], observed[own])
        assert np.abs(there[~own] - observed[~own]).to_numpy().max() > 1e-3
        pd.testing.assert_frame_equal(get(n_samples=n_samples, transform_batch=code), there)


@pytest.mark.parametrize("method", METHODS)
def test_a_list_of_batches_is_averaged_draw_by_draw(fitted, method):
    get = getattr(fitted, method)
    each = [get(n_samples=25, transform_batch=batch, return_mean=False) for batch in (0, 1)]
    both = get(n_samples=25, transform_batch=["batch_0", "batch_1"], return_mean=False)
    # A batch that is named twice counts once.
    np.testing.assert_array_equal(get(n_samples=25, transform_batch=["batch_0", 1, 0], return_mean=False), both)
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, rtol=1e-5)
    found = get(n_samples=25, transform_batch=["batch_0", 1], return_interval=0.8, return_numpy=True)
    np.testing.assert_allclose(found.mean, both.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.upper, np.quantile(both, 0.9, axis=0), rtol=1e-4)


def test_the_latent_state_stays_that_of_the_own_batch(mosaic):
    MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = MULTIVI(mosaic, n_hidden=8, n_latent=2, encode_covariates=True)
    model.train(max_epochs=2, batch_size=32, lr=1e-2, progress_bar=False)
    cells, program = model.minibatch(), model.program
    z = torch.from_numpy(model.get_latent_representation())
    design = torch.tensor([[1.0, 0.0]]).expand(len(cells), 2)
    with torch.no_grad():
        expected = program.expression(z, design).rho.dense().numpy()
        moved = draw(program, cells.replace(design=design), ("z",), n_samples=1)["z"]
        assert not torch.equal(moved, draw(program, cells, ("z",), n_samples=1)["z"])
    has_rna = cells.has_rna.numpy()
    found = model.get_normalized_expression(transform_batch=0, return_numpy=True)
    np.testing.assert_allclose(found[has_rna], expected[has_rna], rtol=1e-5)


# ---------------------------------------------------------------------- features and scales


@pytest.mark.parametrize("method", METHODS)
def test_some_features_are_the_columns_of_all(fitted_weights, method, monkeypatch):
    get, (argument, kind) = getattr(fitted_weights, method), features(method)
    whole = get(n_samples=25, return_interval=0.9)
    wanted = [f"{kind}_11", f"{kind}_02", f"{kind}_37"]
    part = get(n_samples=25, return_interval=0.9, **{argument: wanted})
    for name, frame in part._asdict().items():
        pd.testing.assert_frame_equal(frame, getattr(whole, name)[wanted], rtol=1e-5, atol=1e-7)
    mask = np.isin(whole.mean.columns, wanted)
    for chosen in ([11, 2, 37], mask, pd.Index(wanted), np.array(wanted)):
        assert set(get(**{argument: chosen}).columns) == set(wanted)
    assert list(get(**{argument: f"{kind}_05"}).columns) == [f"{kind}_05"]
    # Blocks narrower than the chosen features.
    monkeypatch.setattr(decoding, "BLOCK", 1)
    monkeypatch.setattr(decoding, "_LEAST_WIDTH", 2)
    np.testing.assert_allclose(get(n_samples=25, **{argument: wanted}), part.mean, rtol=1e-5)
    np.testing.assert_allclose(get(n_samples=25), whole.mean, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_features_never_cost_the_rest(fitted, method, monkeypatch):
    """No matrix of cells x all features is made on the way, no likelihood is evaluated."""
    argument, kind = features(method)
    n_features = len(fitted.spec.gene_names if kind == "gene" else fitted.spec.region_names)
    seen = []
    logits_at = Readout._logits_at

    def watched(self, chosen):
        logits = logits_at(self, chosen)
        seen.append(logits.shape[-1])
        return logits

    def never(*_, **__):
        raise AssertionError("made something wide")

    monkeypatch.setattr(Readout, "_logits_at", watched)
    monkeypatch.setattr(CellDistribution, "log_prob", never)
    for owner, name in ((Readout, "dense"), (Readout, "logits"), (SparseCounts, "to_dense")):
        monkeypatch.setattr(owner, name, never)
    found = getattr(fitted, method)(n_samples=3, transform_batch=[0, 1], **{argument: [f"{kind}_05", f"{kind}_31"]})
    assert found.shape == (200, 2)
    if kind == "region":
        assert set(seen) == {2}
    else:  # a softmax needs its sum over all genes
        assert set(seen) == {2, n_features}


# ---------------------------------------------------------------------- models, names, bad input


def test_the_specifications_name_is_an_alias(fitted):
    pd.testing.assert_frame_equal(fitted.get_normalized_accessibility(), fitted.get_accessibility_estimates())


@pytest.mark.parametrize("kind", ["Gene Expression", "Peaks"])
def test_models_of_one_modality(kind):
    adata = simulate_multiome((40, 0, 0), n_genes=20, n_regions=60, seed=0)
    adata = adata[:, adata.var["feature_types"] == kind].copy()
    adata.obs["modality"] = "expression" if kind == "Gene Expression" else "accessibility"
    MULTIVI.setup_anndata(adata, modality_key="modality")
    model = MULTIVI(adata, n_hidden=8, n_latent=2)
    model.train(max_epochs=2, batch_size=20, progress_bar=False)
    has, lacks = METHODS if kind == "Gene Expression" else METHODS[::-1]
    assert getattr(model, has)(n_samples=20, return_interval=0.9).mean.shape == adata.shape
    what = "regions" if kind == "Gene Expression" else "genes"
    with pytest.raises(ValueError, match=f"impute: this model has no {what}"):
        model.impute()
    with pytest.raises(ValueError, match=f"{lacks}: this model has no {what}"):
        getattr(model, lacks)(n_samples=20, return_interval=0.9)
    with pytest.warns(UserWarning, match=f"{lacks}: this model has no {what}.*the result is empty"):
        assert getattr(model, lacks)().shape == (40, 0)


@pytest.mark.parametrize("choices", [
    {"latent_distribution": "ln", "gene_likelihood": "poisson"},
    {"dispersion": "gene-cell", "library": "observed", "region_factors": False},
    {"use_batch_norm": "both", "modality_weights": "cell", "dispersion": "gene-batch"},
], ids=str)  # fmt: skip
def test_every_kind_of_model(make_program, make_cells, compute, choices):
    program, cells = make_program(**choices), make_cells()
    for quantity in (Quantity("rho", by_cell="l"), Quantity("p", by_cell="d")):
        found = compute(program, [cells], quantity, Average(30, batches=(0, 1), level=0.9))
        assert np.isfinite(found["mean"]).all()
        assert (found["lower"] <= found["upper"]).all()


def test_other_cells_by_name(fitted):
    other = fitted.adata[[5, 130, 180]].copy()
    other.obs_names = ["a", "b", "c"]
    found = fitted.get_normalized_expression(other, indices=["c", "a"])
    assert list(found.index) == ["c", "a"]
    np.testing.assert_allclose(found, fitted.get_normalized_expression(indices=[180, 5]), rtol=1e-5)


@pytest.mark.parametrize(("method", "arguments", "message"), [
    (METHODS[0], {"gene_list": ["gene_3"]}, "gene_list holds 'gene_3': no gene of the model. Did you mean 'gene_3"),
    (METHODS[0], {"gene_list": []}, "gene_list selects no gene"),
    (METHODS[0], {"gene_list": ["gene_03", "gene_03"]}, "gene_list holds 'gene_03' more than once"),
    (METHODS[0], {"gene_list": [40]}, "gene_list holds position 40, and the model has 40 genes"),
    (METHODS[0], {"gene_list": [True]}, r"is a mask of 1 and the model has 40 genes: .* adata.var_names\[mask\]"),
    (METHODS[1], {"region_list": ["regoin_03", "no"]}, r"region_list holds 'regoin_03', 'no'.* mean 'region_03'"),
    (METHODS[0], {"transform_batch": "batch1"}, "transform_batch='batch1': Batch 'batch1' is not known. .*'batch_1'"),
    (METHODS[1], {"transform_batch": ["batch_0", 7]}, "transform_batch=.*Batch 7 is not known"),
    (METHODS[1], {"transform_batch": []}, "transform_batch is an empty list"),
    (METHODS[0], {"n_samples": 0}, "n_samples=0 is not allowed"),
    (METHODS[0], {"n_samples": 2.5}, "n_samples=2.5 is not allowed"),
    (METHODS[1], {"n_samples_overall": -1}, "n_samples_overall=-1 is not allowed"),
    (METHODS[1], {"n_samples_overall": 5, "n_samples": 3}, "n_samples=3 and n_samples_overall=5 both mean"),
    (METHODS[0], {"library_size": [1.0, 2.0]}, r"library_size has shape \(2,\) and 200 cells are asked for"),
    (METHODS[0], {"library_size": [np.nan] * 200}, "library_size holds nan at position 0"),
    (METHODS[0], {"library_size": [1.0] * 199 + [-1.0]}, "library_size holds -1.0 at position 199"),
    (METHODS[0], {"library_size": -2}, "library_size=-2 is not allowed: a library size is positive"),
    (METHODS[0], {"library_size": float("nan")}, "library_size=nan is not allowed: give a finite number"),
    (METHODS[0], {"library_size": "observed"}, "library_size='observed' is not allowed: give 'latent'"),
    (METHODS[1], {"threshold": 1.5}, "threshold=1.5 is not allowed"),
    (METHODS[1], {"threshold": "high"}, "threshold='high' is not allowed: give a finite number"),
    (METHODS[1], {"threshold": 0.5, "n_samples": 20, "return_interval": 0.9}, "threshold makes one sparse matrix"),
    (METHODS[1], {"threshold": 0.5, "n_samples": 2, "return_mean": False}, "return_mean=False asks for more"),
    (METHODS[0], {"return_interval": 0.9}, "return_interval=0.9 needs at least 20 draws.* give n_samples=100"),
    (METHODS[0], {"return_interval": 90, "n_samples": 100}, "return_interval=90 is not allowed"),
    (METHODS[0], {"return_interval": 0.9, "n_samples": 20, "return_mean": False}, "return_interval is a summary"),
    (METHODS[0], {"batch_size": 0}, "batch_size=0 is not allowed"),
])  # fmt: skip
def test_bad_input_is_named_with_what_is_allowed(fitted, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(fitted, method)(**arguments)


@pytest.mark.parametrize("batch", [True, 1.5])
def test_a_batch_is_a_name_or_a_position(fitted, batch):
    with pytest.raises(TypeError, match="transform_batch=.*A batch is a name or a position"):
        fitted.get_normalized_expression(transform_batch=batch)


def test_an_untrained_model_warns_of_its_estimates(mosaic):
    MULTIVI.setup_anndata(mosaic, modality_key="modality")
    model = MULTIVI(mosaic, n_hidden=8, n_latent=2)
    for method in (*METHODS, "get_elbo", "get_reconstruction_error"):
        with pytest.warns(UserWarning, match=r"results are those of random weights. Call model.train\(\)"):
            getattr(model, method)()
    for method in ("impute", "get_marginal_ll"):  # scvi-tools gives none either
        with pytest.raises(NotTrainedError, match="call model.train"):
            getattr(model, method)()
