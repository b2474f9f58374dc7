"""A training step on a GPU, without one: on torch's meta device tensors have shapes and no numbers.

Whoever looks at a number makes the host wait for a GPU; here it is an error. tests/test_gpu.py asks a real one.
"""

from __future__ import annotations

import pyro
import pytest
import torch

from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.resident import ResidentTable
from pyro_multivi.traces import Terms
from pyro_multivi.training.divergence import DivergenceMonitor
from pyro_multivi.training.objective import NegativeELBO

META = torch.device("meta")
LOOKED = "meta|[Dd]ata.dependent"


def train(program, minibatches):
    """An epoch as in fit(), without the optimiser and up to where the host reads what became of it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    objective = NegativeELBO(program)
    watch = DivergenceMonitor(program, optimizer, minibatches, check_gradients=True, steps_unseen=9)
    watch.begin(0)
    terms = Terms()
    for place, cells in enumerate(minibatches):
        program.zero_grad(set_to_none=True)
        with pyro.validation_enabled(False):
            loss = objective(cells, 0.5)
        watch.loss(loss, cells, place)
        loss.backward()
        watch.gradients()
        torch.nn.utils.clip_grad_norm_(program.parameters(), 10.0)
        terms += objective.last_terms(cells)
    return watch, terms


CHOICES = [{}, {"gene_likelihood": "nb", "dispersion": "gene-batch"}, {"gene_likelihood": "poisson"},
           {"modality_weights": "cell", "use_batch_norm": "both"}, {"region_factors": False}]  # fmt: skip


@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nobody_looks_at_a_number_within_an_epoch(build, choices, precision):
    model = build(**choices)
    program = model.program.to(META).train()
    program.use_precision(precision)
    minibatches = Minibatches(ResidentTable(model._table, META), batch_size=16, shuffle=True)
    watch, terms = train(program, minibatches)
    assert all(parameter.grad.shape == parameter.shape for parameter in program.parameters())
    assert terms.n_cells == 60
    assert all(value.device == META for value in (*terms.kl.values(), *terms.log_likelihood.values()))
    # The host looks at the end of the epoch, not before.
    with pytest.raises((RuntimeError, NotImplementedError), match=LOOKED):
        watch.end()


def test_rows_that_have_to_be_looked_up_are_noticed(build):
    model = build()
    minibatches = Minibatches(ResidentTable(model._table, META), batch_size=60)
    whole = minibatches.cut
    minibatches.cut = lambda index: whole(index).replace(rna_rows=None)
    with pytest.raises((RuntimeError, NotImplementedError), match=LOOKED):
        train(model.program.to(META), minibatches)
