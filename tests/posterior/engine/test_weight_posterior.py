"""Draws of the decoders' last layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyro_multivi import MultiVIProgram
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.decode import Average, decode
from pyro_multivi.posterior.engine.draws import draw_latents, feature_blocks, replay
from pyro_multivi.posterior.engine.replicates import replicate
from pyro_multivi.posterior.engine.weight_posterior import residual_buffer, weight_buffers, with_weight_noise
from pyro_multivi.traces import evaluation_mode

SITES = {"rho": RNA, "p": ATAC}
DRAWS = Average(n_samples=6, use_mean=False, keep_draws=True)


@pytest.fixture
def program(make_program):
    """A program with posteriors of its last layers, of standard deviations around 0.3."""
    program = make_program()
    generator = torch.Generator().manual_seed(0)
    for modality in SITES.values():
        directions, sd = weight_buffers(program, modality)
        directions.copy_(torch.randn(directions.shape, generator=generator) / directions.shape[1] ** 0.5)
        # The batch has this factor in the layer's input.
        directions[:, program.config.hidden : -1] /= program.config.hidden**0.5
        sd.copy_(0.3 * torch.rand(sd.shape, generator=generator))
    return program


def by_hand(program, modality, readout, seed):
    """Logits of draws, from the formula of the module's docstring."""
    directions, sd = weight_buffers(program, modality)
    n_draws, n_features, n_directions = readout.shape[0], *sd.shape
    hidden = torch.cat([readout.hidden, torch.ones_like(readout.hidden[..., :1])], -1)
    phi = hidden @ directions.T
    features = CellNoise(torch.arange(n_features), seed)
    noise = features.coarse_normal(f"{modality.decoded} weights", n_draws, n_directions)
    logits = readout.logits()
    slope = {"softmax": lambda a: a.exp(), "sigmoid": torch.sigmoid}[readout.link]
    first, second = derivatives(slope, logits)
    variance = torch.einsum("sbr,fr->sbf", phi**2, sd**2)
    return logits + torch.einsum("sbr,fr,sfr->sbf", phi, sd, noise) - 0.5 * second / first * variance


def derivatives(link, logits):
    a = logits.double().detach().requires_grad_()
    (first,) = torch.autograd.grad(link(a).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), a)
    return first.detach(), second


@pytest.mark.parametrize("site", SITES)
def test_draws_are_those_of_the_formula(program, make_cells, site):
    cells = make_cells()
    with evaluation_mode(program):
        plain = replay(program, cells, draw_latents(program, cells, 6), (site,))[site]
        found = decode(program, cells, DRAWS, (site,)).sites[0][site]
    logits = by_hand(program, SITES[site], plain, seed=0)
    expected = logits.softmax(-1) if site == "rho" else logits.sigmoid()
    assert not torch.allclose(found.dense(), plain.dense(), rtol=0.05)
    torch.testing.assert_close(found.dense(), expected.float(), rtol=1e-4, atol=1e-6)
    some = torch.tensor([5, 0, 3])
    torch.testing.assert_close(found.select(some), expected[..., some].float(), rtol=1e-4, atol=1e-6)
    for features in (None, some):
        blocks = torch.cat([block.clone() for _, block in feature_blocks(found, features, 2)], -1)
        wanted = expected if features is None else expected[..., features]
        torch.testing.assert_close(blocks, wanted.float(), rtol=1e-4, atol=1e-6)


def test_a_weight_errs_alike_in_every_cell(program, make_cells):
    cells = make_cells()
    with evaluation_mode(program):
        noise, layer = CellNoise(cells.index, 3), program.accessibility_decoder.p
        one = Readout(torch.ones(6, 5, layer.in_features), layer.weight.detach(), layer.bias.detach(), "sigmoid")
        values = with_weight_noise(program, "p", one, noise).dense()
        torch.testing.assert_close(values, values[:, :1].expand_as(values))
        assert values.std(0).min() > 0
        later = with_weight_noise(program, "p", one.with_hidden(one.hidden[4:]), CellNoise(cells.index, 3, 4)).dense()
    torch.testing.assert_close(values[4:], later)


@pytest.mark.parametrize("site", SITES)
def test_cells_of_one_state_differ_by_what_is_left(program, make_cells, site):
    cells, modality = make_cells(), SITES[site]
    sd = torch.linspace(0.0, 1.0, len(residual_buffer(program, modality)))
    readouts = {"rho": program.expression_decoder.rho, "p": program.accessibility_decoder.p}
    layer, n = readouts[site], 4000
    hidden = torch.ones(n, len(cells), layer.in_features)
    # Links for which the mean of a draw is that of its logit, or of its exponential.
    one = Readout(hidden, layer.weight.detach(), layer.bias.detach(), "identity")
    noise = CellNoise(cells.index, 3)
    plain = with_weight_noise(program, site, one, noise).dense()
    residual_buffer(program, modality).copy_(sd)
    drawn = with_weight_noise(program, site, one, noise).dense() - plain
    torch.testing.assert_close(drawn[..., 0], torch.zeros_like(drawn[..., 0]), atol=1e-5, rtol=0.0)
    torch.testing.assert_close(drawn.mean((0, 1)), -0.5 * sd.square(), atol=0.03, rtol=0.0)
    torch.testing.assert_close(drawn.std(0).mean(0), sd, atol=0.03, rtol=0.0)
    # Cells differ from each other, features of a cell do not follow each other.
    flat = (drawn[..., 1:] - drawn[..., 1:].mean(0)) / sd[1:]
    assert (flat[:, 0] * flat[:, 1]).mean(0).abs().max() < 0.1
    assert (flat[..., 0] * flat[..., 1]).mean(0).abs().max() < 0.1
    assert torch.equal(with_weight_noise(program, site, one, noise, residual=False).dense(), plain)
    some = with_weight_noise(program, site, one.with_hidden(hidden[5:9, 2:4]), CellNoise(cells.index[2:4], 3, 5))
    torch.testing.assert_close(some.dense(), (drawn + plain)[5:9, 2:4])
    rows = torch.tensor([4, 1])
    torch.testing.assert_close(
        with_weight_noise(program, site, one, noise).of_cells(rows).dense(), (drawn + plain)[:, rows]
    )


def test_replicates_have_it_in_their_dispersion_already(program, make_cells):
    cells = make_cells()
    ((_, before),) = replicate(program, cells, 6)
    program.rna_residual_sd.fill_(1.0)
    ((_, after),) = replicate(program, cells, 6)
    assert torch.equal(before["x"].values, after["x"].values)


def test_draws_do_not_depend_on_minibatches_or_on_the_features_asked_for(fitted):
    options = {"n_samples": 6, "return_mean": False, "return_numpy": True}
    whole = fitted.get_normalized_expression(**options)
    part = fitted.get_normalized_expression(indices=[60, 7], batch_size=1, gene_list=[3, 9], **options)
    np.testing.assert_allclose(whole[:, [60, 7]][..., [3, 9]], part, rtol=1e-4)


def test_means_stay_where_the_fitted_weights_have_them(program, make_cells):
    cells = make_cells()
    many = Average(n_samples=2000, use_mean=False, level=0.9)
    with evaluation_mode(program):
        for site in SITES:
            plain, perturbed = (
                decode(program, cells, average, (site,)).sites[0][site].dense()
                for average in (Average(n_samples=2000, use_mean=False), many)
            )
            assert (perturbed.std(0) > 1.1 * plain.std(0)).float().mean() > 0.8
            torch.testing.assert_close(perturbed.mean(0), plain.mean(0), rtol=0.05, atol=0.0)
            if site == "rho":
                torch.testing.assert_close(perturbed.sum(-1), torch.ones(perturbed.shape[:2]))


def test_averages_without_an_interval_are_of_the_fitted_weights(program, make_cells):
    cells, bare = make_cells(), MultiVIProgram(program.config)
    state = {name: value for name, value in program.state_dict().items() if "_weight_" not in name}
    for modality in SITES.values():
        for buffer in weight_buffers(bare, modality):
            buffer.fill_(1.0)
    # As a model that was saved before there were posteriors of weights.
    bare.load_state_dict(state)
    for average, alike in ((Average(), True), (Average(n_samples=5), True), (DRAWS, False)):
        found = []
        for one in (program, bare):
            with evaluation_mode(one):
                found.append(decode(one, cells, average, tuple(SITES)).sites[0])
        for site in SITES:
            assert torch.equal(found[0][site].dense(), found[1][site].dense()) == alike


def test_replicates_are_of_drawn_weights(program, make_cells):
    cells = make_cells()
    ((_, found),) = replicate(program, cells, 6)
    with evaluation_mode(program):
        decoded = decode(program, cells, DRAWS, ("rho", "p"))
    torch.testing.assert_close(found["x"].fn.rho.dense(), decoded.sites[0]["rho"].dense())
    torch.testing.assert_close(found["y"].fn.p.dense(), decoded.sites[0]["p"].dense())
