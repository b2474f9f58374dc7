"""Weights of the experts, and their average."""

from __future__ import annotations

import pyro.poutine as poutine
import pytest
import torch
from torch.distributions import Normal

import pyro_multivi as pm
from pyro_multivi.networks.experts import Expert, average, expert_weights, seen_from_one


def expert(n=6, k=3, seed=0, measured=True):
    noise = torch.Generator().manual_seed(seed)
    loc = torch.randn(n, k, generator=noise, dtype=torch.float64)
    scale = torch.rand(n, k, generator=noise, dtype=torch.float64) + 0.3
    return Expert(loc, scale, torch.full((n,), measured))


# ---------------------------------------------------------------------- weights and average


def test_the_average_has_the_moments_of_a_monte_carlo_average():
    a, b = expert(seed=1), expert(seed=2)
    weights = torch.tensor([[0.2, 0.8]], dtype=torch.float64).expand(6, 2)
    loc, scale = average([a, b], weights)
    draws = sum(w * Normal(e.loc, e.scale).sample((200_000,)) for w, e in zip((0.2, 0.8), (a, b), strict=True))
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
    weights = expert_weights(logits, measured)
    sigmoid = torch.tensor(1.0).sigmoid().item()
    expected = torch.tensor([[1 - sigmoid, sigmoid], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(weights, expected)


def test_unmeasured_experts_do_not_disturb_gradients():
    logits = torch.zeros(4, 2, requires_grad=True)
    measured = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    loc = torch.randn(4, 3, requires_grad=True)
    scale = torch.full((4, 3), 0.7, requires_grad=True)
    experts = [Expert(loc, scale, measured[:, 0]), Expert(loc * 2, scale * 3, measured[:, 1])]
    mean, sd = average(experts, expert_weights(logits, measured))
    (mean.sum() + sd.log().sum()).backward()
    for tensor in (logits, loc, scale):
        assert torch.isfinite(tensor.grad).all()
        assert not tensor.grad[3].any()
    assert logits.grad[0].any()
    assert not logits.grad[1:].any()


def test_equal_weights_are_one_half(make_program, make_cells):
    program, cells = make_program(modality_weights="equal"), make_cells()
    experts = program.experts(cells, cells.design, program.encode(cells, cells.design))
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


def test_a_share_of_the_paired_cells_is_seen_from_one_modality():
    """Each with the same chance; what was not measured stays so, and cells of one modality keep it."""
    n = 6000
    flags_nm = torch.tensor([[True, True, True], [True, True, False], [False, True, False], [False, False, False]])
    measured_nm = flags_nm.repeat(n // 4, 1)
    experts = {
        name: Expert(torch.zeros(n, 1), torch.ones(n, 1), measured_nm[:, place]) for place, name in enumerate("abc")
    }
    torch.manual_seed(0)
    seen_nm = torch.stack([expert.measured for expert in seen_from_one(experts, share=0.3).values()], -1)
    assert not bool((seen_nm & ~measured_nm).any())
    unpaired_n = measured_nm.sum(1) < 2
    assert torch.equal(seen_nm[unpaired_n], measured_nm[unpaired_n])
    for flags, n_measured in ((flags_nm[0], 3), (flags_nm[1], 2)):
        of_pattern_nm = seen_nm[(measured_nm == flags).all(1)]
        is_one_n = of_pattern_nm.sum(1) == 1
        assert bool((of_pattern_nm.sum(1)[~is_one_n] == n_measured).all())
        # Five standard errors of a share of 1 500 cells, and of a third of 450.
        assert abs(float(is_one_n.float().mean()) - 0.3) < 5 * (0.3 * 0.7 / 1500) ** 0.5
        chosen_m = of_pattern_nm[is_one_n].float().mean(0)[flags]
        assert bool(((chosen_m - 1 / n_measured).abs() < 5 * (0.25 / 400) ** 0.5).all())


def test_training_alone_sees_cells_from_one_modality(make_program, make_cells):
    program, cells = make_program(), make_cells((400, 3, 4))

    def z_of():
        with torch.no_grad():
            experts = program.experts(cells, cells.design, program.encode(cells, cells.design))
            fn = poutine.trace(program.guide).get_trace(cells).nodes["z"]["fn"]
        return fn.base_dist.loc, [expert.loc for expert in experts.values()]

    loc, (rna, atac) = z_of()
    torch.testing.assert_close(loc[:400], (rna + atac)[:400] / 2)
    # Without the encoders' dropout, which training switches on as well.
    program.training = True
    torch.manual_seed(0)
    loc, (rna, atac) = z_of()
    seen = [torch.isclose(loc, value).all(1)[:400].float().mean() for value in ((rna + atac) / 2, rna, atac)]
    assert [float(share) for share in seen] == pytest.approx([0.5, 0.25, 0.25], abs=0.1)
    assert sum(map(float, seen)) == pytest.approx(1)
    torch.testing.assert_close(loc[400:403], rna[400:403])
