"""Proteins in model and guide: the terms of the ELBO, masks, and where parameters start."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from scipy import special, stats
from torch.distributions import Normal, kl_divergence

import pyro_multivi as pm
from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.minibatch import Cells, Measurement
from pyro_multivi.networks.extra import ExtraModality
from pyro_multivi.networks.extra.protein_marginals import ProteinMarginals
from pyro_multivi.networks.layers import BatchNorm
from pyro_multivi.networks.surgery import Training
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode, measure

B, G, M, F = 12, 5, 7, 4


@pytest.fixture
def cells():
    """Every subset of the three modalities is there, none too; one protein is missing in the second batch."""
    noise = torch.Generator().manual_seed(1)
    code = torch.arange(B)
    has_rna, has_atac, has_protein = (code % 2 == 0), (code // 2 % 2 == 0), (code // 4 % 2 == 0)
    batch = torch.nn.functional.one_hot(code % 3 // 2, 2).double()
    y = torch.poisson(5 * torch.rand(B, F, generator=noise, dtype=torch.float64) + 1, generator=noise)
    y[batch[:, 1] == 1, 2] = torch.nan
    y[~has_protein] = 0.0
    return Cells(
        index=code, n_total=B, has_rna=has_rna, has_atac=has_atac, design=batch, label=code % 3,
        x=has_rna[:, None] * torch.ones(B, G).double(), y=has_atac[:, None] * torch.ones(B, M).double(),
        extra={"protein": Measurement(y, has_protein)},
    )  # fmt: skip


def program_of(proteins=True, **choices):
    torch.manual_seed(0)
    extra = {"protein": F} if proteins else {}
    sizes = {"n_genes": G, "n_regions": M, "n_batch": 2, "n_covariates": 2, "n_labels": 3, "n_hidden": 6, "n_latent": 3}
    program = MultiVIProgram(ProgramConfig(**sizes, extra=extra, proteins=proteins, **choices)).double()
    if proteins:
        with torch.no_grad():
            for parameter in program.extra.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return program.eval()


def traces(program, cells):
    guide = poutine.trace(program.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
    guide.compute_log_prob()
    model.compute_log_prob()
    return model.nodes, guide.nodes


@pytest.mark.parametrize("dispersion", ["protein", "protein-batch", "protein-label"])
def test_likelihood_and_background_are_those_of_the_formulas(cells, dispersion):
    program = program_of(protein_dispersion=dispersion)
    with torch.no_grad():
        model, guide = traces(program, cells)
    w = {name: value.numpy() for name, value in program.extra["protein"].state_dict().items()}
    s = cells.design.numpy()
    values, has = (part.numpy() for part in cells.extra["protein"])
    known = ~np.isnan(values) & has[:, None]
    y = np.where(known, values, 0.0)

    hidden = np.log1p(y) * known - w["input_mean"] * known
    hidden = hidden @ w["background_hidden.weight"].T + w["background_hidden.bias"]
    hidden = np.where(hidden > 0, hidden, 0.01 * hidden)
    loc, log_scale = np.split(hidden @ w["background_head.weight"].T + w["background_head.bias"], 2, axis=1)
    log_scale = log_scale.clip(-10, 1)
    scale = np.exp(log_scale)
    kl = np.where(known, 0.5 * (scale**2 + loc**2 - 1) - log_scale, 0.0).sum(1)
    found = kl_divergence(guide["protein_background"]["fn"], model["protein_background"]["fn"])
    np.testing.assert_allclose(found, kl)

    u = guide["protein_background"]["value"].numpy()
    beta = np.exp(s @ w["background_log_mean"] + (s @ np.exp(w["background_log_sd"])) * u)
    h = np.concatenate([guide["z"]["value"].numpy(), s], 1)
    for layer in range(2):
        h = h @ w[f"decoder.linear.{layer}.weight"].T + w[f"decoder.linear.{layer}.bias"]
        h = h - h.mean(1, keepdims=True)
        h = h / np.sqrt((h**2).mean(1, keepdims=True) + 1e-5)
        h = np.where(h > 0, h, 0.01 * h)
    mu = beta * (1 + np.exp(h @ w["log_ratio.weight"].T + w["log_ratio.bias"]))
    logit = h @ w["odds.weight"].T + w["odds.bias"]
    phi = np.exp(w["log_theta"])
    which = {"protein": np.zeros(B, int), "protein-batch": s.argmax(1), "protein-label": cells.label.numpy()}
    phi = phi[which[dispersion]]

    def nb(mean):
        return stats.nbinom.logpmf(y, phi, phi / (phi + mean))

    mixture = np.logaddexp(special.log_expit(-logit) + nb(beta), special.log_expit(logit) + nb(mu))
    np.testing.assert_allclose(model["protein"]["log_prob"], (mixture * known).sum(1))
    np.testing.assert_allclose(model["protein_foreground_mean"]["value"], special.expit(logit) * mu)
    np.testing.assert_allclose(model["protein_mean"]["value"], beta + special.expit(logit) * (mu - beta))


def test_the_elbo_has_both_terms_and_both_elbos_agree(cells):
    program = program_of()
    with evaluation_mode(program):
        terms = measure(program, cells)
    assert terms.n_measured["protein"] == cells.extra["protein"].measured.sum()
    assert terms.kl["protein_background"] > 0
    guide = poutine.block(program.guide, hide=["alignment", "mixing"])

    def loss(elbo):
        torch.manual_seed(3)
        particles = elbo(num_particles=300, vectorize_particles=True, max_plate_nesting=1)
        return particles.loss(program.model, guide, cells)

    assert loss(Trace_ELBO) == pytest.approx(loss(TraceMeanField_ELBO), rel=0.02)


def test_gradients_of_the_background_are_those_of_a_normal(cells):
    program = program_of()
    part = program.extra["protein"]
    torch.manual_seed(5)
    loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)
    found = torch.autograd.grad(loss, [part.background_log_mean, part.background_head.bias])

    torch.manual_seed(5)
    model, guide = traces(program, cells)
    q = guide["protein_background"]["fn"].base_dist
    fresh = kl_divergence(Normal(q.loc, q.scale), Normal(torch.zeros_like(q.loc), torch.ones_like(q.loc))).sum()
    written = fresh - model["protein"]["log_prob"].sum()
    expected = torch.autograd.grad(written, [part.background_log_mean, part.background_head.bias])
    torch.testing.assert_close(found, expected)


def test_what_was_not_measured_counts_for_nothing(cells):
    program = program_of()
    values, has = cells.extra["protein"]
    garbage = torch.where(has[:, None], values, 1e6)
    results = []
    for given in (values, garbage):
        torch.manual_seed(0)
        loss = TraceMeanField_ELBO().differentiable_loss(
            program.model, program.guide, cells.replace(extra={"protein": Measurement(given, has)})
        )
        gradients = torch.autograd.grad(loss, [*program.parameters()], allow_unused=True)
        results.append([loss, *(part for part in gradients if part is not None)])
    assert all(map(torch.equal, *results))
    assert all(part.isfinite().all() for part in results[0])


def test_a_program_whose_cells_lack_proteins_is_the_program_without(cells):
    """Masked is absent: the same ELBO and gradients of all that both have."""
    none = Measurement(torch.zeros(B, F).double(), torch.zeros(B, dtype=torch.bool))
    unstained = cells.replace(extra={"protein": none})
    plain, more = program_of(proteins=False), program_of()
    more.load_state_dict({**more.state_dict(), **plain.state_dict()})
    results = []
    for program in (plain, more):
        torch.manual_seed(0)
        loss = TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, unstained)
        shared = [dict(program.named_parameters())[name] for name, _ in plain.named_parameters()]
        results.append([loss, *torch.autograd.grad(loss, shared)])
    torch.testing.assert_close(*results)
    own = torch.autograd.grad(
        TraceMeanField_ELBO().differentiable_loss(more.model, more.guide, unstained),
        [*more.extra.parameters()], allow_unused=True,
    )  # fmt: skip
    assert all(part is None or not part.any() for part in own)


def test_the_expert_of_proteins_joins_the_average(cells):
    program = program_of()
    with torch.no_grad():
        experts = program.experts(cells, cells.design, program.encode(cells, cells.design))
        assert list(experts) == ["expression", "accessibility", "protein"]
        alone = cells.extra["protein"].measured & ~cells.has_rna & ~cells.has_atac
        loc, scale = program.averaged(experts)
    assert alone.any()
    torch.testing.assert_close(loc[alone], experts["protein"].loc[alone])
    torch.testing.assert_close(scale[alone], experts["protein"].scale[alone])
    nothing = ~cells.extra["protein"].measured & ~cells.has_rna & ~cells.has_atac
    assert nothing.any()
    assert (loc[nothing] == 0).all()
    assert (scale[nothing] == 1).all()


def test_another_batch_moves_the_background_there(cells):
    program = program_of()
    other = cells.design[:, [1, 0]]
    with torch.no_grad():
        part, u = program.extra["protein"], torch.randn(B, F).double()
        log_beta = part.background(u, other).log()
        sd = other @ part.background_log_sd.exp()
        torch.testing.assert_close((log_beta - other @ part.background_log_mean) / sd, u)


def test_parameters_start_at_the_background_of_each_batch():
    rng = np.random.default_rng(0)
    background = np.array([[4.0, 20.0, 8.0], [8.0, 10.0, 8.0]])
    batch = np.repeat([0, 1], 1000)
    is_foreground = rng.random((2000, 3)) < [0.3, 0.6, 0.0]
    mean = background[batch] * np.where(is_foreground, 15.0, 1.0) * rng.gamma(20, 1 / 20, (2000, 3))
    counts = torch.from_numpy(rng.poisson(mean)).float()
    counts[batch == 1, 2] = torch.nan
    found = ProteinMarginals.of(Measurement(counts, torch.ones(2000, dtype=torch.bool)), torch.from_numpy(batch), 2)
    expected = background.copy()
    expected[1, 2] = expected[0, 2]  # not measured: that of the others
    np.testing.assert_allclose(found.background_log_mean.exp(), expected, rtol=0.1)
    np.testing.assert_allclose(found.foreground_log_ratio[:2].exp(), 15.0, rtol=0.15)
    np.testing.assert_allclose(found.foreground_logit[:2].sigmoid(), [0.3, 0.6], atol=0.05)
    np.testing.assert_allclose(found.log_theta.exp(), 20.0, rtol=0.5)


def test_the_background_starts_without_bias():
    adata = pm.simulate_multiome((1000, 0, 0), n_genes=5, n_regions=5, n_batches=2, n_proteins=40, type_separation=0.6)
    counts = torch.from_numpy(adata.obsm["protein_expression"].to_numpy().copy())
    batch = torch.from_numpy(adata.obs["batch"].cat.codes.to_numpy().astype(np.int64))
    found = ProteinMarginals.of(Measurement(counts, torch.ones(1000, dtype=torch.bool)), batch, 2)
    error = found.background_log_mean.exp().numpy() / adata.uns["true_protein_background"] - 1
    # The mean of a LogNormal is 2 % above its median. That of Normals of the logs is 5 to 9 % above it.
    assert abs(error.mean() - 0.01) < 0.025
    assert np.median(np.abs(error)) < 0.045


@pytest.mark.parametrize("counts", [torch.zeros(0, 2), torch.zeros(3, 2), torch.full((1, 2), 7.0)])
def test_next_to_no_data_gives_finite_starts(counts):
    measured = torch.ones(len(counts), dtype=torch.bool)
    found = ProteinMarginals.of(Measurement(counts, measured), torch.zeros(len(counts), dtype=torch.long), 1)
    assert all(part.isfinite().all() for part in vars(found).values())


def test_a_program_refuses_an_extra_modality_that_data_lack():
    class Own(MultiVIProgram):
        extra_modalities: ClassVar = {"adt": ExtraModality}

    with pytest.raises(ValueError, match=r"models 'adt', which the data do not have.*extra_obsm_keys=\['adt'\]"):
        Own(ProgramConfig(n_genes=3, n_regions=0))
    with pytest.raises(ValueError, match="proteins=True needs extra"):
        ProgramConfig(n_genes=3, n_regions=0, proteins=True)
    with pytest.raises(ValueError, match="protein_dispersion='protein-label' needs labels"):
        ProgramConfig(n_genes=3, n_regions=0, protein_dispersion="protein-label")


def test_two_programs_in_one_process_stay_apart():
    one, two = program_of(), program_of()
    assert not {id(part) for part in one.parameters()} & {id(part) for part in two.parameters()}
    assert pm.MultiVIProgram.extra_modalities == {}


FROZEN = {
    "unfrozen": False, "freeze_dropout": True, "freeze_expression": True, "freeze_decoder_first_layer": True,
    "freeze_batchnorm_encoder": True, "freeze_batchnorm_decoder": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "layer"), [("freeze_expression", "first_layer"), ("freeze_decoder_first_layer", "decoder.linear.0")]
)
def test_first_layers_of_a_query_are_trained_as_those_of_other_modalities(chosen, layer):
    program = program_of()
    training = Training.chosen(program, {}, **{**FROZEN, chosen: False})
    parameters = [name for name, _ in program.named_parameters() if name.startswith(f"extra.protein.{layer}.")]
    assert len(parameters) == 2
    assert {name for name in training.parts if name.startswith("extra.")} == set(parameters)
    assert training.changes_encoders == (layer == "first_layer")


def test_batch_normalisation_of_a_query_stays_that_of_the_reference():
    program = program_of(use_batch_norm="both")
    training = Training.chosen(program, {}, **{**FROZEN, "freeze_batchnorm_decoder": False})
    # So the calibration of the reference is kept.
    assert training.parts
    assert not training.changes_encoders
    training.apply(program)
    frozen = {name: module.frozen for name, module in program.extra.named_modules() if isinstance(module, BatchNorm)}
    assert len(frozen) == 4
    assert all(is_frozen != (".decoder." in name) for name, is_frozen in frozen.items())
