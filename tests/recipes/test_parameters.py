"""Parameters by name in Pyro's store, and as random variables."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO

import pyro_multivi as pm


def test_a_value_in_the_place_of_a_parameter_reaches_the_likelihood(recipes, randomised, stained):
    program = randomised(pm.MultiVIProgram)
    before = program.region_logit.detach().clone()
    drawn = poutine.trace(recipes.lifted).get_trace(program, stained).nodes
    latents = {name: drawn[name]["value"].detach() for name in ("z", "l", "d")}
    assert torch.equal(program.region_logit, before)
    with torch.no_grad():
        program.region_logit.copy_(drawn["r_logit"]["value"])
    plain = poutine.trace(poutine.condition(program.model, latents)).get_trace(stained)
    torch.testing.assert_close(drawn["y"]["fn"].mean, plain.nodes["y"]["fn"].mean)
    # The prior is learned by SVI: the value that was put in is none of its parameters.
    guide = poutine.block(program.guide, hide=["alignment", "mixing"])

    def with_factors(program, cells):
        pyro.sample("r_logit", dist.Normal(program.region_logit, 0.1).to_event(1))
        guide(cells)

    SVI(recipes.lifted, with_factors, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO()).step(program, stained)
    assert not torch.equal(program.region_logit, drawn["r_logit"]["value"])
    assert isinstance(recipes.Joint(program).program, pm.MultiVIProgram)


@pytest.mark.parametrize("handler", [
    lambda f: poutine.substitute(f, {"region_logit": torch.zeros(9)}),
    lambda f: poutine.lift(f, {"region_logit": dist.Normal(torch.zeros(9), 1.0).to_event(1)}),
], ids=["substitute", "lift"])  # fmt: skip
@pytest.mark.parametrize("statements", ["model", "guide"])
def test_values_that_no_network_reads_are_refused(randomised, stained, handler, statements):
    changed = handler(getattr(randomised(pm.MultiVIProgram), statements))
    with pytest.raises(NotImplementedError, match="gave the parameter 'region_logit' a value.*functional_call"):
        poutine.trace(changed).get_trace(stained)


def test_what_looks_at_parameters_may_replay_and_track_them(randomised, stained):
    program = randomised(pm.MultiVIProgram)
    trace = poutine.trace(program.model).get_trace(stained)
    params = {name: trace.nodes[name]["value"] for name in trace.param_nodes}
    poutine.trace(poutine.replay(program.model, trace=trace, params=params)).get_trace(stained)
    pyro.infer.inspect.get_dependencies(program.model, (stained,))


def test_optimisers_of_pyro_know_names_in_a_scope_of_the_store(recipes, randomised, stained, tmp_path):
    def stepped(*, load):
        program = randomised(pm.MultiVIProgram)
        names = dict(program.named_parameters())
        constraints = dict.fromkeys(names, dist.constraints.real)
        before = {name: value.detach().clone() for name, value in names.items()}
        optimizer = pyro.optim.Adam(lambda name: {"lr": 100 * recipes.by_name(name)["lr"]})
        if load:
            optimizer.load(tmp_path / "moments.pt")
        svi = SVI(program.model, program.guide, optimizer, TraceMeanField_ELBO())
        torch.manual_seed(0)
        with pyro.get_param_store().scope({"params": names, "constraints": constraints}):
            svi.step(stained)
            optimizer.save(tmp_path / "moments.pt")
        assert len(pyro.get_param_store()) == 0
        return {name: float((value.detach() - before[name]).abs().max()) for name, value in names.items()}

    first, second = stepped(load=False), stepped(load=True)
    # The first step of Adam is as long as its rate.
    for name, found in first.items():
        assert found == pytest.approx(100 * recipes.by_name(name)["lr"], rel=0.02)
    moments = torch.load(tmp_path / "moments.pt", weights_only=True)
    assert moments.keys() == second.keys()
    assert all(each["state"][0]["step"] == 2 for each in moments.values())
