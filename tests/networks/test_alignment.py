"""Penalties that draw modalities together in training, hidden from every ELBO."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial import KDTree
from scipy.special import logsumexp
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

import pyro_multivi as pm
from pyro_multivi.config import CONTRAST_WEIGHT, MIXING_WEIGHT
from pyro_multivi.networks.alignment import contrast, distillation, jeffreys, mmd, mmd_between_patterns, penalty
from pyro_multivi.networks.experts import Expert, measurement_patterns
from pyro_multivi.traces import measure


def expert(n=6, k=3, seed=0, measured=None):
    noise = torch.Generator().manual_seed(seed)
    loc = torch.randn(n, k, generator=noise, dtype=torch.float64)
    scale = torch.rand(n, k, generator=noise, dtype=torch.float64) + 0.3
    return Expert(loc, scale, torch.ones(n, dtype=torch.bool) if measured is None else torch.tensor(measured))


def points(loc):
    return Expert(loc, torch.ones_like(loc), torch.ones(len(loc), dtype=torch.bool))


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


# ---------------------------------------------------------------------- contrast


def contrast_by_hand(a, b):
    """For each row its mean surprisal of finding its partner, by numpy."""
    score = -((a[:, None] - b[None]) ** 2).sum(-1)
    there = np.diag(score) - logsumexp(score, axis=1)
    back = np.diag(score) - logsumexp(score, axis=0)
    return -(there + back) / 2


def one_batch(n):
    return torch.zeros(n, dtype=torch.long)


def test_contrast_by_hand_among_paired_cells_only():
    a = expert(seed=1, measured=[True, True, True, False, True, False])
    b = expert(seed=2, measured=[True, False, True, True, True, False])
    paired = [0, 2, 4]
    expected = contrast_by_hand(a.loc.numpy()[paired], b.loc.numpy()[paired])
    np.testing.assert_allclose(contrast(a, b, one_batch(6))[paired].numpy(), expected, rtol=1e-12)
    for divergence, plain in (("contrastive", jeffreys(a, b)[paired].numpy()), ("None", 0.0)):
        found = penalty(a, b, divergence, contrast_weight=1.7, batch=one_batch(6))
        np.testing.assert_allclose(found[paired].numpy(), plain + 1.7 * expected, rtol=1e-12)
        assert not np.delete(found.numpy(), paired).any()


def test_contrast_is_that_of_each_batch_alone():
    measured = [True, True, True, True, False, True, True]
    a, b = expert(7, seed=1, measured=measured), expert(7, seed=2)
    batch = torch.tensor([0, 1, 0, 1, 0, 2, 0])
    found = contrast(a, b, batch)
    for rows in ([0, 2, 6], [1, 3], [5]):
        expected = contrast_by_hand(a.loc.numpy()[rows], b.loc.numpy()[rows])
        np.testing.assert_allclose(found[rows].numpy(), expected, rtol=1e-12, atol=1e-15)


def test_a_latent_state_that_tells_batches_apart_is_not_rewarded():
    """Adding a large number to both experts of one batch finds a cell's half among all cells, not within a batch."""
    a, b, batch = expert(40, 3, seed=1), expert(40, 3, seed=2), torch.arange(40) % 2
    shift = torch.zeros(40, 3, dtype=a.loc.dtype)
    shift[:, 0] = 50.0 * batch
    apart = [Expert(side.loc + shift, side.scale, side.measured) for side in (a, b)]
    torch.testing.assert_close(contrast(*apart, batch), contrast(a, b, batch))
    assert contrast(*apart, one_batch(40)).sum() < contrast(a, b, one_batch(40)).sum()


def test_the_gradient_of_contrast_is_exact_and_stays_among_the_paired():
    a = expert(4, 2, seed=1, measured=[True, True, True, False])
    b = expert(4, 2, seed=2, measured=[True, True, False, False])
    loc = a.loc.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda means: penalty(Expert(means, a.scale, a.measured), b, "contrastive", 3.0, one_batch(4)), (loc,)
    )
    penalty(Expert(loc, a.scale, a.measured), b, "contrastive", 3.0, one_batch(4)).sum().backward()
    assert loc.grad[:2].any()
    assert not loc.grad[2:].any()


@pytest.mark.parametrize("measured", [[False, False], [True, False]])
def test_contrast_without_other_cells_is_zero(measured):
    a, b = expert(2, seed=1, measured=measured), expert(2, seed=2, measured=measured)
    assert not contrast(a, b, one_batch(2))[torch.tensor(measured)].any()
    assert torch.isfinite(penalty(a, b, "contrastive", 3.0, one_batch(2))).all()


def test_contrast_does_not_reward_experts_that_ignore_the_cell():
    separate, constant = points(10 * torch.randn(8, 3)), points(torch.zeros(8, 3))
    assert jeffreys(constant, constant).sum() == 0
    torch.testing.assert_close(contrast(constant, constant, one_batch(8)), torch.full((8,), 8.0).log())
    assert contrast(separate, separate, one_batch(8)).max() < 0.1


# ---------------------------------------------------------------------- measurement patterns


def one_hot(*sizes):
    return torch.eye(len(sizes), dtype=torch.long).repeat_interleave(torch.tensor(sizes), 0)


def between_patterns_by_hand(loc, pattern_nc):
    """Sum over pairs of patterns of the unbiased squared discrepancy, cell by cell."""
    squared = ((loc[:, None] - loc[None]) ** 2).sum(-1)
    median = np.sort(squared, axis=None)[(squared.size - 1) // 2]

    def kernel(i, j):
        return np.mean([np.exp(-squared[i, j] / (width * median)) for width in (0.05, 0.1, 0.25, 0.5, 1)])

    sets = [np.flatnonzero(column) for column in pattern_nc.T]
    sets = [cells for cells in sets if len(cells) > 1]
    total = 0.0
    for k, a in enumerate(sets):
        for b in sets[:k]:
            total += np.mean([kernel(i, j) for i in a for j in a if i != j])
            total += np.mean([kernel(i, j) for i in b for j in b if i != j])
            total -= 2 * np.mean([kernel(i, j) for i in a for j in b])
    return total


@pytest.mark.parametrize("sizes", [(4, 3, 5), (6, 1, 5), (7, 5, 0), (12, 0, 0)], ids=str)
def test_mmd_between_patterns_by_hand(sizes):
    loc, pattern = torch.randn(12, 3, dtype=torch.float64), one_hot(*sizes)
    pattern[-1] = 0  # a cell in which nothing was measured takes no part
    found = mmd_between_patterns(loc, pattern)
    assert found.item() == pytest.approx(between_patterns_by_hand(loc.numpy(), pattern.numpy()), rel=1e-9, abs=1e-12)


def test_mmd_between_patterns_of_one_distribution_is_zero_on_average():
    values = torch.stack([mmd_between_patterns(torch.randn(40, 2), one_hot(30, 4, 6)) for _ in range(400)])
    assert abs(values.mean()) < 4 * values.std() / 20
    assert values.min() < 0 < values.max()
    shifted = one_hot(30, 4, 6)[:, :1] * 2.0
    assert (
        torch.stack([mmd_between_patterns(torch.randn(40, 2) + shifted, one_hot(30, 4, 6)) for _ in range(100)]).mean()
        > 0.3
    )


def test_the_gradient_of_mmd_between_patterns_brings_them_together():
    pattern = one_hot(20, 20)
    loc = (torch.randn(40, 2) + 2.0 * pattern[:, 1:]).requires_grad_()
    mmd_between_patterns(loc, pattern).backward()
    # A step against the gradient moves the second pattern back and the first towards it.
    assert (loc.grad[20:].sum(0) > 0).all()
    assert (loc.grad[:20].sum(0) < 0).all()


def test_measurement_patterns_of_a_mosaic(make_program, make_cells):
    program, cells = make_program(), make_cells()
    experts = program.experts(cells, cells.design, program.encode(cells, cells.design))
    both = cells.has_rna & cells.has_atac
    expected = torch.stack([cells.has_rna & ~both, cells.has_atac & ~both, both], -1)
    assert torch.equal(measurement_patterns(list(experts.values())).bool(), expected)
    mixing = program.mixing(experts)
    assert mixing.shape == (12,)
    assert (mixing == mixing[0]).all()
    assert mixing[0] != 0


def test_weights_are_those_given_and_part_of_the_default_penalty_only():
    choices = [{}, {"modality_penalty": "Jeffreys"}, {"modality_penalty": None}]
    choices += [{"modality_penalty": "MMD", "contrast_weight": 1.0, "mixing_weight": 2.0}]
    choices += [{"contrast_weight": 0.0, "mixing_weight": 0}]
    configs = [pm.ProgramConfig(n_genes=3, n_regions=3, **choice) for choice in choices]
    assert [config.contrast for config in configs] == [CONTRAST_WEIGHT, 0.0, 0.0, 1.0, 0.0]
    assert [config.mixing for config in configs] == [MIXING_WEIGHT, 0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("name", ["contrast_weight", "mixing_weight"])
@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_negative_or_infinite_weights_are_refused(name, wrong):
    with pytest.raises(ValueError, match=rf"{name}={wrong} is not allowed: give a finite number"):
        pm.ProgramConfig(n_genes=3, n_regions=3, **{name: wrong})


@pytest.mark.parametrize("divergence", ["contrastive", "Jeffreys", "MMD", "None"])
def test_the_alignment_of_a_program_is_its_divergence_and_its_contrast(make_program, make_cells, divergence):
    cells, found = make_cells(), []
    for weight in (0.0, 0.5, 2.0):
        program = make_program(modality_penalty=divergence, contrast_weight=weight)
        experts = program.experts(cells, cells.design, program.encode(cells, cells.design))
        found.append(program.alignment(experts, cells.design))
    paired = cells.has_rna & cells.has_atac
    batch = cells.design[:, : program.config.n_batch].argmax(1)
    apart = torch.where(paired, contrast(experts["expression"], experts["accessibility"], batch), 0.0)
    # The only pair of its batch has none to be told from.
    assert (apart[paired] > 0).sum() == 4
    torch.testing.assert_close(found[1], found[0] + 0.5 * apart)
    torch.testing.assert_close(found[2], found[0] + 2.0 * apart)


def test_every_two_of_three_experts_are_drawn_together(make_program):
    program = make_program(contrast_weight=0.5, modality_penalty="Jeffreys")
    experts = {name: expert(5, 3, seed=seed) for seed, name in enumerate(("expression", "accessibility", "protein"))}
    pairs = [("expression", "accessibility"), ("expression", "protein"), ("accessibility", "protein")]
    expected = sum(penalty(experts[a], experts[b], "Jeffreys", 0.5, one_batch(5)) for a, b in pairs)
    torch.testing.assert_close(program.alignment(experts, torch.ones(5, program.config.n_covariates)), expected)


def test_the_weights_given_to_a_model_are_those_of_its_program(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    config = pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, contrast_weight=0.25, mixing_weight=0.75).program.config
    assert (config.contrast, config.mixing) == (0.25, 0.75)


@pytest.mark.slow
def test_counts_outweigh_the_mixing_of_patterns_that_hold_other_cell_types():
    """RNA-only cells of two types, ATAC-only cells of the other two: mixing blurs them a little, and 0 does not."""
    adata = pm.simulate_multiome(
        (200, 500, 500), n_genes=500, n_regions=1500, n_types=4, mean_library=500, mean_accessibility=0.1, seed=0
    )
    of_type, pattern = adata.obs["cell_type"].cat.codes.to_numpy(), adata.obs["modality"].astype(str).to_numpy()
    kept = (pattern == "paired") | ((pattern == "expression") == (of_type < 2))
    adata, of_type = adata[kept].copy(), of_type[kept]
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    purity = {}
    for weight in (0.0, None):
        model = pm.MULTIVI(adata, mixing_weight=weight)
        model.train(max_epochs=60, progress_bar=False)
        near = KDTree(model.get_latent_representation()).query(model.get_latent_representation(), 31)[1][:, 1:]
        purity[weight] = (of_type[near] == of_type[:, None]).mean()
    assert purity[0.0] > 0.96
    assert 0.9 < purity[None] < purity[0.0]


# ---------------------------------------------------------------------- distillation


def test_distillation_is_the_divergence_from_the_joint_posterior():
    """Against the integral by draws of log q(z | both) - log q(z | one)."""
    joint, *alone = (expert(n=4, seed=seed) for seed in (3, 4, 5))
    z = Normal(joint.loc, joint.scale).sample((200_000,))

    def log_q(of):
        return norm.logpdf(z, of.loc, of.scale).sum(-1)

    ratios = sum(log_q(joint) - log_q(each) for each in alone)
    error = ratios.std(0) / len(z) ** 0.5
    assert (np.abs(distillation(joint, alone).numpy() - ratios.mean(0)) < 5 * error).all()
    assert not distillation(joint, [joint, joint]).any()


def test_distillation_draws_the_posteriors_of_one_modality_alone():
    """Their gradient is that of minus their log density at draws of the joint posterior, which itself stays."""
    parts = [expert(n=3, k=1, seed=seed) for seed in (6, 7)]
    for each in parts:
        each.loc.requires_grad_(), each.scale.requires_grad_()
    joint, alone = parts
    distillation(joint, [alone]).sum().backward()
    assert joint.loc.grad is None
    assert joint.scale.grad is None
    m, s, mu, sigma = (value.detach() for each in parts for value in (each.loc, each.scale))
    torch.testing.assert_close(alone.loc.grad, (mu - m) / sigma**2)
    torch.testing.assert_close(alone.scale.grad, 1 / sigma - (s**2 + (m - mu) ** 2) / sigma**3)


def test_distillation_leaves_out_cells_that_lack_a_modality():
    measured = [True, False, True, False, True, True]
    joint, alone = expert(seed=1, measured=measured), expert(seed=2)
    alone = replace(alone, loc=torch.where(joint.measured[:, None], alone.loc, torch.nan))
    assert ((distillation(joint, [alone]) > 0) == joint.measured).all()


# ---------------------------------------------------------------------- the term of training


@pytest.mark.parametrize("penalty", ["contrastive", "Jeffreys", "MMD"])
def test_only_paired_cells_are_drawn_together(make_program, make_cells, penalty):
    program, cells = make_program(modality_penalty=penalty), make_cells()
    penalties = program.alignment(
        program.experts(cells, cells.design, program.encode(cells, cells.design)), cells.design
    )
    assert penalties.shape == (12,)
    assert (penalties[:5] != 0).all()
    assert not penalties[5:].any()


@pytest.mark.parametrize("penalty", ["None", None])
def test_no_alignment_is_zero(make_program, make_cells, penalty):
    program, cells = make_program(modality_penalty=penalty), make_cells()
    terms = measure(program, cells)
    assert terms.training == {"alignment": 0.0, "mixing": 0.0}
    assert torch.isfinite(torch.tensor(terms.elbo))


def test_elbos_that_are_reported_hide_the_alignment(mosaic):
    """Two models of the same weights that differ in the penalty alone."""
    pm.MULTIVI.setup_anndata(mosaic, modality_key="modality")
    penalties = ("contrastive", "Jeffreys", "MMD", None)
    models = [pm.MULTIVI(mosaic, n_hidden=6, n_latent=2, modality_penalty=penalty) for penalty in penalties]
    for model in models:
        model.program.load_state_dict(models[0].program.state_dict())
        model.is_trained = True
    elbos = {model.get_elbo() for model in models}
    assert len(elbos) == 1
    alignment = [measure(model.program, next(iter(model._cells(None, None, 60)))).training for model in models]
    assert alignment[0]["alignment"] > 0
    assert alignment[-1]["alignment"] == 0
