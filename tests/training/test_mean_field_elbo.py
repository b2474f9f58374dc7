"""MeanFieldELBO is Pyro's, number for number and gradient for gradient; only the host does not read the number."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO

from pyro_multivi import MultiVIProgram
from pyro_multivi.training.objective import MeanFieldELBO


def loss_and_gradients(elbo, program, cells, validate):
    torch.manual_seed(0)
    program.zero_grad()
    with pyro.validation_enabled(validate):
        loss = elbo.differentiable_loss(program.model, program.guide, cells)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in program.parameters() if p.grad is not None)]


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"num_particles": 3}, {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}]
)
def test_it_is_that_of_pyro(make_program, make_cells, options, validate):
    program, cells = make_program().train(), make_cells(n_total=100)
    theirs = loss_and_gradients(TraceMeanField_ELBO(**options), program, cells, True)
    ours = loss_and_gradients(MeanFieldELBO(**options), program, cells, validate)
    assert len(ours) == len(theirs) > 10
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


class Mixture(MultiVIProgram):
    """A prior of z without a closed-form KL."""

    def z_prior(self, s):
        loc = torch.stack([s.new_full((len(s), self.config.latent), value) for value in (-1.0, 1.0)], -2)
        parts = dist.Normal(loc, 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=s.new_zeros(len(s), 2)), parts)


def test_a_kl_without_a_closed_form_is_sampled(make_program, make_cells):
    config = make_program().config
    program, cells = Mixture(config).train(), make_cells()
    theirs = loss_and_gradients(TraceMeanField_ELBO(), program, cells, False)
    ours = loss_and_gradients(MeanFieldELBO(), program, cells, False)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_without_validation_the_host_never_looks(make_program, make_cells, monkeypatch):
    program, cells = make_program().train(), make_cells((5, 0, 0))

    def refuse(tensor):
        raise AssertionError("the loss was read")

    with monkeypatch.context() as patch:
        patch.setattr("pyro.infer.trace_mean_field_elbo.torch_item", refuse)
        patch.setattr("pyro.infer.trace_elbo.torch_item", refuse)
        with pyro.validation_enabled(False):
            MeanFieldELBO().differentiable_loss(program.model, program.guide, cells)
            with pytest.raises(AssertionError, match="was read"):
                TraceMeanField_ELBO().differentiable_loss(program.model, program.guide, cells)
