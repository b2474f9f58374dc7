"""How what the modalities say is weighed, averaged and drawn together."""

from __future__ import annotations

import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import pyro_multivi as pm
from pyro_multivi.networks.experts import Expert, average, jeffreys, mixing_weights, mmd
from pyro_multivi.terms import measure


def expert(n=6, k=3, seed=0, measured=True):
    noise = torch.Generator().manual_seed(seed)
    loc = torch.randn(n, k, generator=noise, dtype=torch.float64)
    scale = torch.rand(n, k, generator=noise, dtype=torch.float64) + 0.3
    return Expert(loc, scale, torch.full((n,), measured))


def points(loc, like=None):
    return Expert(loc, torch.ones_like(loc), torch.ones(len(loc), dtype=torch.bool))


# ---------------------------------------------------------------------- weights and average


def test_the_average_has_the_moments_of_a_monte_carlo_average():
    a, b = expert(seed=1), expert(seed=2)
    weights = torch.tensor([[0.2, 0.8]], dtype=torch.float64).expand(6, 2)
    loc, scale = average([a, b], weights)
    draws = sum(
        w * Normal(e.loc, e.scale).sample((200_000,)) for w, e in zip((0.2, 0.8), (a, b), strict=True)
    )
    # Six standard errors; a weight that entered as its square root would be off by two to five times.
    torch.testing.assert_close(draws.mean(0), loc, atol=6 * 1.3 / 200_000**0.5, rtol=0)
    torch.testing.assert_close(draws.std(0), scale, atol=0, rtol=6 * 0.5**0.5 / 200_000**0.5)


def test_two_equal_experts_halve_the_variance_and_one_alone_is_itself():
    a = expert()
    both = torch.full((6, 2), 0.5, dtype=torch.float64)
    loc, scale = average([a, a], both)
    torch.testing.assert_close(loc, a.loc)
    torch.testing.assert_close(scale.square(), a.scale.square() / 2)
    first = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand(6, 2)
    loc, scale = average([a, expert(seed=5)], first)
    assert torch.equal(loc, a.loc)
    torch.testing.assert_close(scale, a.scale)


def test_weights_sum_to_one_over_the_measured_modalities():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [5.0, -5.0], [2.0, 3.0]])
    measured = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    weights = mixing_weights(logits, measured)
    sigmoid = torch.tensor(1.0).sigmoid().item()
    expected = torch.tensor([[1 - sigmoid, sigmoid], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(weights, expected)


def test_unmeasured_experts_do_not_disturb_gradients():
    logits = torch.zeros(4, 2, requires_grad=True)
    measured = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    loc = torch.randn(4, 3, requires_grad=True)
    scale = torch.full((4, 3), 0.7, requires_grad=True)
    experts = [Expert(loc, scale, measured[:, 0]), Expert(loc * 2, scale * 3, measured[:, 1])]
    mean, sd = average(experts, mixing_weights(logits, measured))
    (mean.sum() + sd.log().sum()).backward()
    for tensor in (logits, loc, scale):
        assert torch.isfinite(tensor.grad).all()
        assert not tensor.grad[3].any()
    assert logits.grad[0].any()
    assert not logits.grad[1:].any()


def test_equal_weights_are_one_half(make_program, make_cells):
    program, cells = make_program(modality_weights="equal"), make_cells()
    experts = program.experts(cells, cells.design, program.read(cells, cells.design))
    q = program.mix(experts)
    rna, atac = experts["expression"], experts["accessibility"]
    torch.testing.assert_close(q.mean[:5], (rna.loc + atac.loc)[:5] / 2)
    torch.testing.assert_close(q.variance[:5], (rna.scale.square() + atac.scale.square())[:5] / 4)
    torch.testing.assert_close(q.mean[5:8], rna.loc[5:8])
    torch.testing.assert_close(q.variance[8:], atac.scale.square()[8:])


@pytest.mark.parametrize("weights", ["universal", "cell"])
def test_learned_weights_learn(make_program, make_cells, weights):
    program, cells = make_program(modality_weights=weights), make_cells()
    names = [name for name, _ in program.named_parameters() if name.startswith("weight")]
    assert names
    poutine.trace(program.guide).get_trace(cells).nodes["z"]["fn"].mean.sum().backward()
    moved = [name for name, p in program.named_parameters() if name in names and p.grad.any()]
    assert moved == names


def test_cell_weights_start_equal():
    program = pm.MultiVIProgram(pm.ProgramConfig(n_genes=3, n_regions=3, n_latent=3, modality_weights="cell"))
    one = Expert(torch.randn(4, 3), torch.rand(4, 3) + 0.1, torch.ones(4, dtype=torch.bool))
    for name in ("expression", "accessibility"):
        assert not program.weight_logit(name, one).any()


# ---------------------------------------------------------------------- Jeffreys


def test_jeffreys_is_both_kl_divergences_per_cell():
    a, b = expert(seed=1), expert(seed=2)
    p, q = Normal(a.loc, a.scale), Normal(b.loc, b.scale)
    expected = (kl_divergence(p, q) + kl_divergence(q, p)).sum(-1)
    torch.testing.assert_close(jeffreys(a, b), expected)
    torch.testing.assert_close(jeffreys(b, a), expected)
    assert (jeffreys(a, a).abs() < 1e-12).all()


# ---------------------------------------------------------------------- MMD


def test_mmd_of_a_set_with_itself_is_zero():
    a = points(torch.randn(20, 3))
    assert mmd(a, a).abs() < 1e-6


def test_mmd_of_two_samples_of_one_distribution_is_zero_on_average():
    values = torch.stack([mmd(points(torch.randn(16, 2)), points(torch.randn(16, 2))) for _ in range(400)])
    # Unbiased: the biased estimate would stand near 0.05.
    assert abs(values.mean()) < 4 * values.std() / 20
    assert values.min() < 0 < values.max()
    assert values.std() < 0.06


def test_mmd_does_not_depend_on_the_number_of_cells():
    means = {
        n: torch.stack([mmd(points(torch.randn(n, 2)), points(torch.randn(n, 2) + 1.5)) for _ in range(300)])
        for n in (4, 16, 64)
    }
    assert means[64].mean() > 0.1
    for n in (4, 16):
        # The bandwidth is a median of the minibatch, hence the few percent beside the sampling error.
        error = 4 * means[n].std() / 300**0.5
        assert abs(means[n].mean() - means[64].mean()) < error + 0.1 * means[64].mean()


def test_mmd_grows_with_the_distance_and_pulls_together():
    base = torch.randn(30, 2)
    values = [mmd(points(base), points(torch.randn(30, 2) + shift)) for shift in (0.0, 1.0, 3.0)]
    assert values[0] < values[1] < values[2]
    other = (torch.randn(30, 2) + 1.0).requires_grad_()
    mmd(points(base), points(other)).backward()
    # A step against the gradient moves the set back.
    assert (other.grad.sum(0) > 0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_mmd_of_fewer_than_two_cells_is_zero_with_a_gradient(n):
    loc = torch.randn(n, 2, requires_grad=True)
    value = mmd(points(loc), points(loc * 2))
    value.backward()
    assert value == 0
    assert not loc.grad.any()


def test_identical_points_give_no_nan():
    loc = torch.zeros(5, 2, requires_grad=True)
    value = mmd(points(loc), points(loc + 0.0))
    value.backward()
    assert value.abs() < 1e-6
    assert torch.isfinite(loc.grad).all()


# ---------------------------------------------------------------------- the term of training


@pytest.mark.parametrize("penalty", ["Jeffreys", "MMD"])
def test_only_paired_cells_are_drawn_together(make_program, make_cells, penalty):
    program, cells = make_program(modality_penalty=penalty), make_cells()
    penalties = program.alignment(program.experts(cells, cells.design, program.read(cells, cells.design)))
    assert penalties.shape == (12,)
    assert (penalties[:5] != 0).all()
    assert not penalties[5:].any()


@pytest.mark.parametrize("penalty", ["None", None])
def test_no_alignment_is_zero(make_program, make_cells, penalty):
    program, cells = make_program(modality_penalty=penalty), make_cells()
    terms = measure(program, cells)
    assert terms.training == {"alignment": 0.0}
    assert torch.isfinite(torch.tensor(terms.elbo))


def test_elbos_that_are_reported_hide_the_alignment(mosaic):
    """Two models of the same weights that differ in the penalty alone."""
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    models = [
        pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, modality_penalty=penalty) for penalty in ("Jeffreys", "MMD", None)
    ]
    for model in models:
        model.program.load_state_dict(models[0].program.state_dict())
        model.is_trained = True
    elbos = {model.get_elbo() for model in models}
    assert len(elbos) == 1
    alignment = [measure(model.program, next(iter(model._cells(None, None, 60)))).training for model in models]
    assert alignment[0]["alignment"] > 0
    assert alignment[2]["alignment"] == 0
