"""The optimiser applies the priors it says it does, and to those parameters only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.training import FitOptions
from pyro_multivi.training.optimizer import loadings, make_optimizer

CHOICES = {"lr": 1e-2, "weight_decay": 0.0, "effect_sd": 0.2, "eps": 1e-8}


def gradients(program, seed=0):
    noise = torch.Generator().manual_seed(seed)
    return {name: 1e-3 * torch.randn(p.shape, generator=noise) for name, p in program.named_parameters()}


def stepped(program, given, **choices):
    """Values of all parameters after two steps along the gradients given."""
    optimizer = make_optimizer(program, 50, FitOptions(**{**CHOICES, **choices}))
    for _ in range(2):
        for name, parameter in program.named_parameters():
            parameter.grad = given[name].clone()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in program.named_parameters()}


def test_loadings_are_the_last_weights_of_the_decoders(make_program):
    program = make_program(dispersion="gene-cell")
    assert set(loadings(program)) == {f"expression_decoder.{name}.weight" for name in ("rho", "pi", "theta")} | {
        "accessibility_decoder.p.weight"
    }


def test_the_prior_is_a_normal_one(make_program):
    """Two Adam steps by hand, on the gradient of the loss plus that of -log Normal(w | 0, sd) / N."""
    program = make_program()
    given = gradients(program)
    name = "accessibility_decoder.p.weight"
    w = dict(program.named_parameters())[name].detach().double().numpy()
    n, lr, eps, first, second = 50, 1e-2, 1e-8, 0.0, 0.0
    sd = 0.2 / 5**0.5  # of 5 hidden units
    for step in (1, 2):
        # d/dw of w^2 / (2 sd^2 N), which is minus the log density per cell up to a constant
        g = given[name].double().numpy() + w / (sd**2 * n)
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        w = w - lr * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + eps)
    np.testing.assert_allclose(stepped(program, given)[name].numpy(), w, rtol=1e-4, atol=1e-6)


def test_only_loadings_feel_it(make_program):
    given = gradients(make_program())
    flat, tight = (stepped(make_program(), given, effect_sd=sd) for sd in (None, 0.2))
    differ = {name for name in flat if not torch.equal(flat[name], tight[name])}
    assert differ == set(loadings(make_program()))


def test_weight_decay_is_of_the_other_weights(make_program):
    given = gradients(make_program())
    without, with_it = (stepped(make_program(), given, weight_decay=decay) for decay in (0.0, 0.1))
    differ = {name for name in without if not torch.equal(without[name], with_it[name])}
    weights = {name for name in without if name.endswith("weight")}
    assert differ == weights - set(loadings(make_program()))


def test_frozen_loadings_stay(make_program):
    program = make_program()
    for parameter in loadings(program).values():
        parameter.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in loadings(program).items()}
    make_optimizer(program, 50, FitOptions(**CHOICES)).step()
    assert all(torch.equal(before[name], parameter) for name, parameter in loadings(program).items())


def test_a_tighter_prior_leaves_smaller_loadings(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    norms = []
    for sd in (0.05, 0.5, None):
        model = pm.MULTIVI(mosaic, n_hidden=8, n_latent=2)
        model.train(max_epochs=5, lr=1e-2, effect_sd=sd, early_stopping=False, progress_bar=False)
        norms.append(model.program.accessibility_decoder.p.weight.norm().item())
    assert norms[0] < 0.7 * norms[1] < 0.7 * norms[2]


@pytest.mark.parametrize("sd", [0.0, -1.0])
def test_an_impossible_standard_deviation_is_refused(mosaic, sd):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    with pytest.raises(ValueError, match="effect_sd=.*above 0"):
        pm.MULTIVI(mosaic, n_hidden=8).train(max_epochs=1, effect_sd=sd, progress_bar=False)


def test_an_untrained_model_gives_every_cell_the_mean_profile(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(mosaic, n_hidden=8, n_latent=2)
    model.is_trained = True
    rho = model.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(rho, np.broadcast_to(rho[0], rho.shape), rtol=1e-5)
    p = model.get_accessibility_estimates(return_numpy=True)
    np.testing.assert_allclose(p, np.broadcast_to(p[0], p.shape), rtol=1e-5)


def test_intercepts_of_a_query_have_the_prior_and_the_frozen_rest_of_the_layer_stays():
    adata = pm.simulate_multiome((60, 0, 0), n_genes=20, n_regions=30, n_batches=3, seed=0)
    is_new = (adata.obs["batch"] == "batch_2").to_numpy()
    reference, query = adata[~is_new].copy(), adata[is_new][:5].copy()
    pm.MULTIVI.setup_anndata(reference, batch_key="batch", modality_key="modality")
    model = pm.MULTIVI(reference, n_hidden=8, n_latent=2)
    model.train(max_epochs=5, progress_bar=False)
    sizes = []
    for sd in (0.05, 1.0, None):
        mapped = pm.MULTIVI.load_query_data(query, model)
        before = {name: weight.detach().clone() for name, weight in loadings(mapped.program).items()}
        # Five cells, of which it follows each as far as it is let.
        mapped.train(effect_sd=sd, lr=1e-2, progress_bar=False)
        for name, weight in loadings(mapped.program).items():
            assert torch.equal(weight[:, :-1], before[name][:, :-1])
        sizes.append(mapped.program.expression_decoder.rho.weight[:, -1].norm().item())
    assert sizes[0] < 0.2 * sizes[1] < 0.19 * sizes[2]
