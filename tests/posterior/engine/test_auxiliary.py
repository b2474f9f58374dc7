"""Auxiliary sites of a guide."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO

from pyro_multivi import MultiVIProgram
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.traces import TRAINING_SITES
from pyro_multivi.training.fit import evaluate

AUXILIARY = {"is_auxiliary": True}


class Jittered(MultiVIProgram):
    """q(z | u) lies around a u that nothing in the model answers for."""

    def mix(self, experts):
        q = super().mix(experts).base_dist
        u = pyro.sample("u", dist.Normal(torch.zeros_like(q.loc[:, 0]), 30.0), infer=AUXILIARY)
        return dist.Normal(q.loc + 0.01 * u[..., None], q.scale).to_event(1)


class Doubled(MultiVIProgram):
    """z is twice a u, written as a change of variables."""

    def mix(self, experts):
        u = pyro.sample("u", super().mix(experts), infer=AUXILIARY)
        change = torch.full(u.shape[:-1], -u.shape[-1] * float(np.log(2.0)))
        return dist.Delta(2 * u, log_density=change, event_dim=1)


class DoubledInOneSite(MultiVIProgram):
    """The same posterior without the auxiliary site."""

    def mix(self, experts):
        q = super().mix(experts).base_dist
        return dist.Normal(2 * q.loc, 2 * q.scale).to_event(1)


@pytest.fixture
def programs(make_program):
    """Programs of one set of weights."""

    def make(*classes):
        made = [each(make_program().config).eval() for each in classes]
        for program in made:
            program.load_state_dict(make_program().state_dict())
        return made

    return make


def test_a_function_of_an_auxiliary_site_has_the_density_of_the_change_of_variables(programs, make_cells):
    (one, other), cells = programs(Doubled, DoubledInOneSite), make_cells()
    likelihoods = [marginal_likelihood(each, [cells], 4000) for each in (one, other)]
    error = np.hypot(*(found.standard_error for found in likelihoods))
    assert (np.abs(np.subtract(*(found.log_likelihood for found in likelihoods))) < 5 * error).all()
    found, expected = (elbo_parts(each, [cells], 4000).elbo.sum() for each in (one, other))
    assert found == pytest.approx(expected, rel=0.01)
    terms = [sum(evaluate(each, [cells], seed).elbo for seed in range(200)) / 200 for each in (one, other)]
    assert terms[0] == pytest.approx(expected, rel=0.02)
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        pyros = -elbo.loss(one.model, poutine.block(one.guide, hide=list(TRAINING_SITES)), cells)
    assert found == pytest.approx(pyros, rel=0.01)


def test_noise_of_the_guide_is_no_part_of_the_weights(programs, make_cells):
    (noisy, plain), cells = programs(Jittered, MultiVIProgram), make_cells()
    found, expected = (marginal_likelihood(each, [cells], 4000) for each in (noisy, plain))
    error = np.hypot(found.standard_error, expected.standard_error)
    assert (np.abs(found.log_likelihood - expected.log_likelihood) < 5 * error).all()
    # Each draw of it has a bound of its own, so that their average is one.
    assert (elbo_parts(noisy, [cells], 500).elbo < found.log_likelihood + 3 * found.standard_error).all()
    assert set(elbo_parts(noisy, [cells]).kl) == {"z", "l", "d"}


def test_a_factor_of_the_guide_is_no_part_of_the_weights(programs, make_cells):
    class Penalised(MultiVIProgram):
        def guide_extra(self, cells, s):
            pyro.factor("penalty", torch.full((len(cells),), 100.0), has_rsample=True)

    (penalised, plain), cells = programs(Penalised, MultiVIProgram), make_cells()
    found, expected = (marginal_likelihood(each, [cells], 50).log_likelihood for each in (penalised, plain))
    np.testing.assert_array_equal(found, expected)
