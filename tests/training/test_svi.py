"""A modeler's own ``pyro.infer.SVI`` trains the program, and no global store is involved."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pyro
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam, ClippedAdam, ExponentialLR

from pyro_multivi.traces import TRAINING_SITES
from pyro_multivi.training import AnnealLatents, NegativeELBO

ELBOS = [
    Trace_ELBO(),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    TraceMeanField_ELBO(num_particles=2),
    Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1),
    RenyiELBO(alpha=0.5, num_particles=2),
    RenyiELBO(alpha=0.5, num_particles=2, vectorize_particles=True, max_plate_nesting=1),
]


def trained(program, cells, steps=3, elbo=None, optimizer=None, seed=0):
    """Losses of some steps of a plain SVI."""
    svi = SVI(program.model, program.guide, optimizer or ClippedAdam({"lr": 0.02}), elbo or TraceMeanField_ELBO())
    torch.manual_seed(seed)
    return [svi.step(cells) for _ in range(steps)]


def weights(program):
    return {name: p.detach().clone() for name, p in program.named_parameters()}


def moved(program, before):
    return {name for name, p in program.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("elbo", ELBOS, ids=lambda elbo: f"{type(elbo).__name__}-{elbo.num_particles}")
def test_every_parameter_trains_and_the_store_stays_empty(make_program, make_cells, elbo):
    program, cells = make_program(modality_weights="universal"), make_cells()
    before = weights(program)
    trained(program, cells, elbo=elbo)
    assert moved(program, before) == set(before)
    assert all(torch.isfinite(p).all() for p in program.parameters())
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_loss_falls(make_program, make_cells, elbo):
    program, cells = make_program(), make_cells((30, 10, 10))
    losses = trained(program, cells, 60, elbo())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_learning_rate_schedules_reach_the_parameters(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = weights(program)
    schedule = ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1e-4}, "gamma": 0.0})
    trained(program, cells, 1, optimizer=schedule)
    first = weights(program)
    assert moved(program, before)
    schedule.step()
    trained(program, cells, 1, optimizer=schedule)
    assert not moved(program, first)


def test_frozen_parameters_stay(make_program, make_cells):
    program, cells = make_program(), make_cells()
    program.log_theta.requires_grad_(False)
    before = weights(program)
    trained(program, cells)
    assert moved(program, before) == set(before) - {"log_theta"}


def test_two_programs_train_interleaved_as_they_do_alone(make_program, make_cells):
    cells = make_cells()
    alone = []
    for seed in (1, 2):
        program = make_program(seed=seed)
        trained(program, cells, 4, seed=seed)
        alone.append(weights(program))
    programs = [make_program(seed=seed) for seed in (1, 2)]
    svis = [SVI(p.model, p.guide, ClippedAdam({"lr": 0.02}), TraceMeanField_ELBO()) for p in programs]
    noise = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        noise.append(torch.get_rng_state())
    for _ in range(4):
        for k, svi in enumerate(svis):
            torch.set_rng_state(noise[k])
            svi.step(cells)
            noise[k] = torch.get_rng_state()
            pyro.clear_param_store()
    for program, expected in zip(programs, alone, strict=True):
        assert not moved(program, expected)


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # by pickle, with torch 2.4 and 2.5
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_a_program_of_its_own(make_program, make_cells, how):
    program, cells = make_program(), make_cells()
    trained(program, cells, 2)
    twin = copy.deepcopy(program) if how == "deepcopy" else pickle.loads(pickle.dumps(program))  # noqa: S301
    before = weights(program)
    assert not moved(twin, before)
    trained(twin, cells, 3)
    assert moved(twin, before) == set(before)
    assert not moved(program, before)
    trained(program, cells, 3)
    assert not moved(program, weights(twin))


@pytest.mark.filterwarnings("ignore:You are using `torch.load`:FutureWarning")  # by pickle, with torch 2.4 and 2.5
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_program_and_its_copy_train_in_one_svi(make_program, make_cells, how):
    program, cells, elbo = make_program(), make_cells(), TraceMeanField_ELBO()
    twin = copy.deepcopy(program) if how == "deepcopy" else pickle.loads(pickle.dumps(program))  # noqa: S301
    both = [program, twin]
    before = [weights(each) for each in both]

    def loss(_model, _guide, cells):
        return sum(elbo.differentiable_loss(each.model, each.guide, cells) for each in both)

    SVI(program.model, program.guide, ClippedAdam({"lr": 0.02}), loss).step(cells)
    assert [moved(each, start) for each, start in zip(both, before, strict=True)] == [set(before[0])] * 2


def test_weights_assigned_from_a_state_dict_train(make_program, make_cells):
    program, cells, source = make_program(seed=1), make_cells(), make_program(seed=2)
    trained(program, cells, 1)
    state = {name: value.clone() for name, value in source.state_dict().items()}
    program.load_state_dict(state, assign=True)
    before = weights(program)
    trained(program, cells)
    assert moved(program, before) == set(before)


def test_a_deleted_program_is_freed(make_program, make_cells):
    program = make_program()
    trained(program, make_cells())
    alive = weakref.ref(program.log_theta)
    del program
    gc.collect()
    assert alive() is None


def test_an_automatic_guide_fits_the_decoders(make_program, make_cells):
    program, cells = make_program(), make_cells()
    before = weights(program)
    guide = AutoNormal(poutine.block(program.model, hide=["s", "rho", "p"]))
    svi = SVI(program.model, guide, Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(cells) for _ in range(40)]
    assert sum(losses[-5:]) < sum(losses[:5])
    changed = moved(program, before)
    assert "expression_decoder.rho.weight" in changed
    assert not any(name.startswith(("rna_first_layer", "atac_first_layer")) for name in changed)


def test_names_of_two_programs_differ_and_carry_no_state(make_program, make_cells):
    cells = make_cells()
    names = []
    for program in (make_program(), make_program()):
        nodes = poutine.trace(program.guide).get_trace(cells).nodes
        names.append({name for name, site in nodes.items() if site["type"] == "param"})
        assert {name.split("$$$")[1] for name in names[-1]} == {name for name, _ in program.named_parameters()}
    assert not names[0] & names[1]


# ---------------------------------------------------------------------- our objective and theirs


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_the_trainers_objective_is_the_elbo_per_cell(make_program, make_cells, elbo):
    program, cells = make_program(), make_cells(n_total=60)
    torch.manual_seed(1)
    ours = NegativeELBO(program, elbo())(cells)
    torch.manual_seed(1)
    theirs = elbo().differentiable_loss(program.model, program.guide, cells)
    assert ours.item() == pytest.approx(theirs.item() / 60, rel=1e-6)
    found = []
    for loss in (ours * 60, theirs):
        program.zero_grad()
        loss.backward()
        found.append([p.grad.clone() for p in program.parameters()])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_an_elbo_object_is_left_as_it_was(make_program, make_cells):
    elbo = TraceMeanField_ELBO()
    before = dict(vars(elbo))
    NegativeELBO(make_program(), elbo)(make_cells())
    assert vars(elbo) == before


# ---------------------------------------------------------------------- annealing


@pytest.mark.parametrize("weight", [0.4, 1e-6])
@pytest.mark.parametrize("make_elbo", [
    Trace_ELBO,
    TraceMeanField_ELBO,
    lambda: TraceMeanField_ELBO(num_particles=3),
    lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
], ids=["Trace", "MeanField", "sequential", "vectorised"])  # fmt: skip
def test_annealing_is_pyros_scale_on_what_is_not_observed(make_program, make_cells, weight, make_elbo):
    """Loss = rest + weight x latents: what ``poutine.scale`` takes off the latents, annealing takes off all."""
    program, cells = make_program(dtype=torch.float64), make_cells(dtype=torch.float64, n_total=60)
    latents_only = poutine.block(program.model, hide=["x", "y"])

    def loss_and_gradients(model, handler):
        torch.manual_seed(2)
        program.zero_grad()
        with handler:
            guide = poutine.block(program.guide, hide=list(TRAINING_SITES))
            loss = make_elbo().differentiable_loss(model, guide, cells)
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in program.parameters()]
        return [loss.detach(), *gradients]

    whole = [loss_and_gradients(program.model, AnnealLatents(w)) for w in (1.0, weight)]
    latents = [loss_and_gradients(latents_only, poutine.scale(scale=w)) for w in (1.0, weight)]
    assert latents[0][0] > 0
    for one, less, of_one, of_less in zip(*whole, *latents, strict=True):
        torch.testing.assert_close(one - less, of_one - of_less, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(of_less, weight * of_one, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO])
def test_a_weight_of_zero_leaves_likelihood_and_alignment(make_program, make_cells, elbo):
    program, cells = make_program(dtype=torch.float64), make_cells(dtype=torch.float64)
    objective = NegativeELBO(program, elbo())
    loss = objective(cells, 0.0)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in program.parameters() if p.grad is not None)
    terms = objective.last_terms(cells)
    rest = sum(terms.training.values()) - sum(terms.log_likelihood.values())
    assert loss.item() == pytest.approx(float(rest) / 12, rel=1e-10)
    assert terms.kl["z"] > 0


@pytest.mark.parametrize(
    "elbo",
    [TraceMeanField_ELBO(), TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)],
    ids=["one", "vectorised"],
)
def test_reported_terms_know_nothing_of_annealing_or_particles(make_program, make_cells, elbo):
    program, cells = make_program(dtype=torch.float64), make_cells(dtype=torch.float64, n_total=60)
    found = []
    for weight in (0.0, 0.5, 1.0):
        objective = NegativeELBO(program, elbo)
        torch.manual_seed(1)
        loss = objective(cells, weight)
        found.append(objective.last_terms(cells))
    assert found[0] == found[1] == found[2]
    # Without annealing the loss is these terms.
    rest = sum(found[2].training.values()) - found[2].elbo
    assert loss.item() == pytest.approx(float(rest) / 12, rel=1e-9)
    assert found[2].n_cells == 12
