"""``poutine.scale`` in a program's own statements."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_multivi import ContractError, MultiVIProgram
from pyro_multivi.posterior.calibration.fit_scale import gradients
from pyro_multivi.posterior.engine.likelihood import elbo_parts, marginal_likelihood
from pyro_multivi.traces import TRAINING_SITES, measure, terms_of
from pyro_multivi.training import NegativeELBO


class Whole(MultiVIProgram):
    """Everything counts half."""

    def model(self, cells):
        with poutine.scale(scale=0.5):
            super().model(cells)

    def guide(self, cells):
        with poutine.scale(scale=0.5):
            super().guide(cells)


class Weighed(MultiVIProgram):
    """An observation counts three times, in some cells seven times."""

    def observe_extra(self, cells, z, s):
        for name, scale in (("level", 3.0), ("rank", torch.where(cells.has_rna, 7.0, 1.0))):
            with poutine.scale(scale=scale):
                pyro.sample(name, dist.Normal(z.sum(-1), 1.0), obs=torch.ones(len(cells)))


class OnlyTheModel(Whole):
    guide = MultiVIProgram.guide


CLASSES = [Whole, Weighed, OnlyTheModel]


@pytest.fixture
def scaled(make_program):
    """A program of a class with the weights of ``make_program``."""

    def make(program_class):
        program = program_class(make_program().config)
        program.load_state_dict(make_program().state_dict())
        return program.eval()

    return make


@pytest.mark.parametrize("program_class", CLASSES)
def test_the_reported_elbo_is_that_of_many_draws_of_pyro(scaled, make_cells, program_class):
    program, cells = scaled(program_class), make_cells()
    guide = poutine.block(program.guide, hide=list(TRAINING_SITES))
    elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = -elbo.loss(program.model, guide, cells)
    assert elbo_parts(program, [cells], 2000).elbo.sum() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("program_class", [Whole, Weighed])
def test_the_history_has_the_terms_of_the_loss(scaled, make_cells, program_class, kl_weight):
    program, cells = scaled(program_class), make_cells(n_total=36)
    objective = NegativeELBO(program, TraceMeanField_ELBO())
    loss = objective(cells, kl_weight)
    terms = objective.last_terms(cells)
    total = sum(terms.training.values()) - sum(terms.log_likelihood.values()) + kl_weight * sum(terms.kl.values())
    assert float(total) / 12 == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("program_class", CLASSES)
def test_a_minibatch_and_its_traces_have_the_same_terms(scaled, make_cells, program_class):
    program, cells = scaled(program_class), make_cells(n_total=36)
    torch.manual_seed(1)
    found = measure(program, cells)
    torch.manual_seed(1)
    guide = poutine.trace(program.guide).get_trace(cells)
    model = poutine.trace(poutine.replay(program.model, trace=guide)).get_trace(cells)
    for trace in (guide, model):
        trace.compute_log_prob()
    assert terms_of(cells, model, guide).elbo == found.elbo


def test_a_scaled_guide_has_no_importance_weights(scaled, make_cells):
    with pytest.raises(ValueError, match="The guide scales 'z' by poutine.scale.*no marginal likelihood"):
        marginal_likelihood(scaled(Whole), [make_cells()], 5)
    program, cells = scaled(Weighed), make_cells()
    assert np.isfinite(marginal_likelihood(program, [cells], 5).log_likelihood).all()


def test_what_is_scaled_as_a_whole_has_the_same_posterior(scaled, make_cells):
    cells, sites = make_cells(), ("z", "l")
    plain, whole = (gradients(scaled(each), cells, sites) for each in (MultiVIProgram, Whole))
    for site in sites:
        for found, expected in zip(whole[site], plain[site], strict=True):
            torch.testing.assert_close(found, expected)


def test_training_in_closed_form_refuses_scales_that_differ(build):
    model = build(program_class=OnlyTheModel)
    with pytest.raises(ContractError, match=r"'z' is scaled otherwise in the model than in the guide.*Trace_ELBO\(\)"):
        model.train(1, progress_bar=False)
    model.train(1, progress_bar=False, elbo=Trace_ELBO())
    assert np.isfinite(model.get_elbo())
