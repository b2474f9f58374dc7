"""Known positions of the measured cells: a loss and gradients as without them, and no look-up."""

from __future__ import annotations

import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.training.objective import MeanFieldELBO

SIZES = [(5, 3, 4), (4, 0, 0), (0, 3, 0), (0, 0, 2), (1, 1, 1)]


def with_rows(cells):
    rows = {f"{m.key}_rows": m.measured_in(cells).nonzero().squeeze(-1) for m in MODALITIES}
    return cells.replace(**rows)


def loss_and_gradients(program, cells, elbo):
    torch.manual_seed(0)
    program.zero_grad()
    loss = elbo.differentiable_loss(program.model, program.guide, cells)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in program.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


ELBOS = {
    "ours": MeanFieldELBO,
    "draws": lambda: TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
    "scores": Trace_ELBO,
}


@pytest.mark.parametrize("n", SIZES, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("elbo", ELBOS)
def test_loss_and_gradients_with_known_rows_are_the_same(make_program, make_cells, n, sparse, elbo):
    program, cells = make_program(torch.float64), make_cells(n, dtype=torch.float64, sparse=sparse)
    expected, expected_gradients = loss_and_gradients(program, cells, ELBOS[elbo]())
    found, found_gradients = loss_and_gradients(program, with_rows(cells), ELBOS[elbo]())
    torch.testing.assert_close(found, expected)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)


def test_known_rows_are_not_looked_up(make_program, make_cells, monkeypatch):
    program, cells = make_program(), with_rows(make_cells())

    def refuse(tensor):
        raise AssertionError("positions were looked up")

    monkeypatch.setattr(torch.Tensor, "nonzero", refuse)
    loss_and_gradients(program, cells, MeanFieldELBO())
    with pytest.raises(AssertionError, match="looked up"):
        loss_and_gradients(program, cells.replace(has_rna=cells.has_rna), MeanFieldELBO())


def test_a_second_mask_forgets_the_rows_of_the_first(make_program, make_cells):
    """Only the cells that both masks keep count."""
    program, cells = make_program(), with_rows(make_cells())
    keep = torch.arange(len(cells)) % 2 == 0

    def x_log_prob(change):
        z = torch.zeros(len(cells), program.config.latent)
        decoded = program.expression(z, cells.design)
        theta = torch.ones(program.config.n_genes)
        fn = program.expression_dist(torch.ones(len(cells)), decoded.rho, theta, decoded.pi_logits)
        return change(fn).log_prob(cells.x)

    twice = x_log_prob(lambda fn: fn.mask(cells.has_rna, cells.rna_rows).mask(keep))
    once = x_log_prob(lambda fn: fn.mask(cells.has_rna & keep))
    torch.testing.assert_close(twice, once)
    assert (twice[~keep] == 0).all()
