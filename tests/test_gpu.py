"""Training on a GPU: the same model as on a CPU, and a host that never waits within a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyro
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.resident import ResidentTable
from pyro_multivi.training.divergence import DivergenceMonitor
from pyro_multivi.training.objective import NegativeELBO

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")]


@pytest.fixture
def build(mosaic):
    pm.MULTIVI.setup_anndata(mosaic, batch_key="batch", modality_key="modality")
    return lambda: pm.MULTIVI(mosaic, n_hidden=16, n_latent=3)


@pytest.mark.parametrize("resident", [True, False])
def test_it_learns_what_a_cpu_learns(build, monkeypatch, resident):
    """Noise differs between devices, so curves agree in the mean."""
    if not resident:
        monkeypatch.setattr("pyro_multivi.api.training.resident_if_it_fits", lambda table, device: table)
    curves = []
    for accelerator in ("cpu", "gpu"):
        model = build()
        model.train(30, lr=0.01, accelerator=accelerator, batch_size=16, progress_bar=False)
        assert model.device.type == ("cuda" if accelerator == "gpu" else "cpu")
        curves.append(model.history["elbo_train"]["elbo_train"].to_numpy())
        assert np.isfinite(model.get_latent_representation()).all()
    np.testing.assert_allclose(curves[1][0], curves[0][0], rtol=0.05)
    np.testing.assert_allclose(curves[1][-5:].mean(), curves[0][-5:].mean(), rtol=0.05)


@pytest.mark.parametrize("resident", [True, False])
def test_minibatches_are_those_of_a_cpu(build, resident):
    table = build()._training_table()
    there = ResidentTable(table, "cuda") if resident else table
    options = {"batch_size": 7, "shuffle": True, "seed": 1}
    pairs = zip(Minibatches(table, **options), Minibatches(there, device="cuda", **options), strict=True)
    for here, cells in pairs:
        assert cells.device.type == "cuda"
        assert all(part.device.type == "cuda" for part in cells.parts())
        for name in ("x", "y"):
            one, other = getattr(here, name), getattr(cells, name).to("cpu")
            assert torch.equal(one.to_dense(), other.to_dense())
            by_feature = getattr(cells, name).by_feature()
            assert torch.equal(one.by_feature().row, by_feature.row.cpu())
            assert torch.equal(one.by_feature().start, by_feature.start.cpu())
            assert torch.equal(one.by_feature().val, by_feature.val.cpu())
        assert torch.equal(here.index, cells.index.cpu())
        assert torch.equal(here.rna_rows, cells.rna_rows.cpu())


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_host_does_not_wait_within_a_step(build, precision):
    model = build()
    program = model.program.to("cuda").train()
    program.use_precision(precision)
    table = ResidentTable(model._training_table(), "cuda")
    train = Minibatches(table, batch_size=16, shuffle=True)
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-3, fused=True)
    objective = NegativeELBO(program)
    monitor = DivergenceMonitor(program, optimizer, train, check_gradients=True)
    monitor.begin_epoch(0)

    def step(place, cells):
        optimizer.zero_grad(set_to_none=True)
        with pyro.validation_enabled(False):
            loss = objective(cells, 0.5)
        monitor.check_loss(loss, cells, place)
        loss.backward()
        monitor.check_gradients()
        torch.nn.utils.clip_grad_norm_(program.parameters(), 10.0)
        optimizer.step()
        return objective.last_terms(cells)

    with pytest.raises(RuntimeError, match="synchronizing"), waiting_is_an_error():
        torch.ones(1, device="cuda").item()
    terms = None
    batches = iter(train)
    terms = step(0, next(batches))  # what is set up on the first call may wait
    with waiting_is_an_error():
        for place, cells in enumerate(batches, 1):
            terms += step(place, cells)
    assert len(monitor.end_epoch()) == len(train)
    assert np.isfinite(list(terms.per_cell().values())).all()


def test_a_loss_that_is_not_a_number_names_the_cells(build):
    model = build()

    def break_prior(epoch, row, program):
        with torch.no_grad():
            program.library_log_var[0] = torch.nan

    with pytest.raises(pm.TrainingDiverged, match="site 'l'"):
        model.train(5, accelerator="gpu", callbacks=[break_prior], progress_bar=False)
    assert all(torch.isfinite(parameter).all() for parameter in model.program.parameters())


def test_training_goes_on_from_a_checkpoint(build, tmp_path):
    class Died(BaseException):
        pass

    def die(epoch, row, program):
        if epoch == 2:
            raise Died

    options = {"max_epochs": 4, "accelerator": "gpu", "progress_bar": False, "adversarial_mixing": True}
    with pytest.raises(Died):
        build().train(**options, checkpoint=tmp_path, checkpoint_every=1, callbacks=[die])
    whole, resumed = build(), build()
    whole.train(**options)
    resumed.train(**options, checkpoint=tmp_path, resume=True)
    losses = [model.history["elbo_validation"]["elbo_validation"].to_numpy() for model in (whole, resumed)]
    # Sums on a GPU differ from run to run.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)
