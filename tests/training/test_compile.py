"""train(compile=True): the same training in other loops."""

from __future__ import annotations

import sys

import numba
import numpy as np
import pytest
import torch

import pyro_multivi as pm
from pyro_multivi.distributions.kernels.numba import loops as compiled


def train(model, max_epochs=4, **options):
    model.train(max_epochs, **{"progress_bar": False, "batch_size": 16, "early_stopping": False, **options})
    return model


CHOICES = [{}, {"gene_likelihood": "nb"}, {"gene_likelihood": "poisson"}, {"region_factors": False},
           {"accessibility_likelihood": "poisson"}, {"accessibility_likelihood": "nb"}]  # fmt: skip


@pytest.mark.filterwarnings("ignore:ATAC holds no count above 1")
@pytest.mark.parametrize("choices", CHOICES, ids=str)
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 2e-5), ("bf16", 2e-3)])
def test_the_history_is_that_of_eager_training(build, choices, precision, rtol):
    eager, loops = (train(build(**choices), precision=precision, compile=on) for on in (False, True))
    assert list(loops.history) == list(eager.history)
    for name in set(eager.history) - {"seconds"}:
        np.testing.assert_allclose(loops.history[name], eager.history[name], rtol=rtol, atol=5 * rtol, err_msg=name)


def test_the_loops_are_run_in_training_only(build, monkeypatch):
    calls = []
    names = {"regions", "softmax", "zeros", "nonzeros", "softmax_slopes", "sparse_product"}
    for name in names:
        loop = getattr(compiled, name)
        monkeypatch.setattr(compiled, name, lambda *args, name=name, loop=loop: (calls.append(name), loop(*args)))
    model = train(build(), 1, compile=True)
    assert set(calls) == names
    calls.clear()
    model.get_latent_representation()
    model.get_elbo()
    train(model, 1)
    assert calls == []


def test_eager_and_compiled_training_may_take_turns(build):
    model = train(build(), 2)
    train(model, 2, compile=True)
    train(model, 2)
    expected = train(train(train(build(), 2), 2), 2)
    np.testing.assert_allclose(model.history["train_loss"], expected.history["train_loss"], rtol=2e-5)


def test_nothing_global_is_touched(build, global_rng_untouched):
    before = torch.get_num_threads(), numba.get_num_threads()
    train(build(), 1, compile=True)
    assert (torch.get_num_threads(), numba.get_num_threads()) == before


def test_a_bad_weight_still_stops_training_and_is_named(build):
    model = build()
    hooks = []

    def break_prior(epoch, row, program):
        hooks.append(program.log_theta.register_hook(lambda grad: grad * torch.nan))

    with pytest.raises(pm.TrainingDiverged, match="epoch 2, minibatch 1: the gradient of parameter 'log_theta'"):
        train(model, 5, callbacks=[break_prior], train_size=1.0, compile=True)
    hooks[0].remove()
    assert np.isfinite(model.get_latent_representation()).all()


def test_without_numba_nothing_is_changed(build, monkeypatch):
    model = build()
    before = {name: value.clone() for name, value in model.program.state_dict().items()}
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-multivi\[compile\]'"):
        train(model, compile=True, precision="bf16")
    monkeypatch.undo()
    assert not model.is_trained
    assert all(torch.equal(value, before[name]) for name, value in model.program.state_dict().items())
    assert train(model).history["train_loss"].equals(train(build()).history["train_loss"])
