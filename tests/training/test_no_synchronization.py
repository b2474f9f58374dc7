"""A training step on a GPU, without one: on torch's meta device tensors have shapes and no numbers.

Reading a number makes the host wait for a GPU; here it is an error. tests/test_gpu.py uses a real one.
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
READ = "[Mm]eta|[Dd]ata.dependent"


def train(program, minibatches):
    """An epoch as in fit(), without the optimiser and up to where the host reads the losses."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    objective = NegativeELBO(program)
    monitor = DivergenceMonitor(program, optimizer, minibatches, check_gradients=True, check_every=9)
    monitor.begin_epoch(0)
    terms = Terms()
    for place, cells in enumerate(minibatches):
        program.zero_grad(set_to_none=True)
        with pyro.validation_enabled(False):
            loss = objective(cells, 0.5)
        monitor.check_loss(loss, cells, place)
        loss.backward()
        monitor.check_gradients()
        torch.nn.utils.clip_grad_norm_(program.parameters(), 10.0)
        terms += objective.last_terms(cells)
    return monitor, terms


CHOICES = [{}, {"gene_likelihood": "nb", "dispersion": "gene-batch"}, {"gene_likelihood": "poisson"},
           {"modality_weights": "cell", "use_batch_norm": "both"}, {"region_factors": False},
           {"accessibility_likelihood": "poisson"}, {"accessibility_likelihood": "nb"}]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ATAC holds no count above 1")
@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_number_is_read_within_an_epoch(build, choices, precision):
    model = build(**choices)
    program = model.program.to(META).train()
    program.use_precision(precision)
    minibatches = Minibatches(ResidentTable(model._table, META), batch_size=16, shuffle=True)
    monitor, terms = train(program, minibatches)
    assert all(parameter.grad.shape == parameter.shape for parameter in program.parameters())
    assert terms.n_cells == 60
    assert all(value.device == META for value in (*terms.kl.values(), *terms.log_likelihood.values()))
    # The host reads them at the end of the epoch, not before.
    with pytest.raises((RuntimeError, NotImplementedError), match=READ):
        monitor.end_epoch()


def test_rows_that_have_to_be_looked_up_are_noticed(build):
    model = build()
    minibatches = Minibatches(ResidentTable(model._table, META), batch_size=60)
    whole = minibatches.cut
    minibatches.cut = lambda index: whole(index).replace(rna_rows=None)
    with pytest.raises((RuntimeError, NotImplementedError), match=READ):
        train(model.program.to(META), minibatches)
