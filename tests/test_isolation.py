"""Calls under any state of torch, from threads and with Ctrl-C at any moment: they work and leave all as it was."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import warnings
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.poutine import runtime

import pyro_multivi as pm
from pyro_multivi.api.base import ModelBase
from pyro_multivi.api.scvi_tools.attributes import ScviAttributes
from pyro_multivi.isolation import isolated


@pytest.fixture(scope="module")
def cells():
    adata = pm.simulate_multiome((24, 12, 12), n_genes=12, n_regions=20, n_batches=2, seed=0)
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality", labels_key="cell_type")
    return adata


def new(cells):
    return pm.MULTIVI(cells, n_hidden=6, n_latent=2)


@pytest.fixture(scope="module")
def trained(cells):
    model = new(cells)
    model.train(2, progress_bar=False, train_size=0.7)
    return model


def train(model, folder):
    model = new(model.adata)
    model.train(2, progress_bar=False)
    return list(model.program.state_dict().values())


def save(model, folder):
    model.save(folder / "model", overwrite=True)
    return pm.MULTIVI.load(folder / "model", model.adata).get_latent_representation()


def write(model, folder):
    (folder / "out.h5ad").unlink(missing_ok=True)
    model.get_normalized_expression(out=folder / "out.h5ad", silent=True)
    return (folder / "out.h5ad").stat().st_size


def prepare(model, folder):
    adata = model.adata.copy()
    pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
    return train(new(adata), folder)


def compare(model, folder):
    return pm.compare_models({"one": model, "two": model}, n_mc_samples=3)


#: Every public method, and functions beside them.
VERBS = {
    "prepare": prepare,
    "train": train,
    "save": save,
    "write": write,
    "compare_models": compare,
    "to_device": lambda model, _: model.to_device("cpu"),
    "minibatch": lambda model, _: model.minibatch([1, 2]).x.to_dense(),
    "get_latent_representation": lambda model, _: model.get_latent_representation(give_mean=False),
    "get_library_size_factors": lambda model, _: list(model.get_library_size_factors().values()),
    "get_region_factors": lambda model, _: model.get_region_factors(),
    "get_elbo": lambda model, _: model.get_elbo(),
    "get_reconstruction_error": lambda model, _: list(model.get_reconstruction_error().values()),
    "get_marginal_ll": lambda model, _: model.get_marginal_ll(n_mc_samples=3),
    "get_normalized_expression": lambda model, _: model.get_normalized_expression(n_samples=2, transform_batch=0),
    "get_accessibility_estimates": lambda model, _: model.get_accessibility_estimates(normalize_cells=True),
    "get_normalized_accessibility": lambda model, _: model.get_normalized_accessibility(),
    "impute": lambda model, _: model.impute().layers["imputed"].toarray(),
    "posterior_predictive_sample": lambda model, _: [
        counts.toarray() for counts in model.posterior_predictive_sample(n_samples=2)["x"]
    ],
    "posterior_predictive_check": lambda model, _: model.posterior_predictive_check(n_samples=40).summary(),
    "to_inference_data": lambda model, _: model.to_inference_data(n_samples=2).posterior["z"].to_numpy(),
    "differential_expression": lambda model, _: model.differential_expression(groupby="cell_type", n_samples=50),
    "differential_accessibility": lambda model, _: model.differential_accessibility(
        groupby="cell_type", n_samples=50, unit="cell"
    ),
    "load_query_data": lambda model, _: model.load_query_data(query(model), model).get_latent_representation(),
    "prepare_query_anndata": lambda model, _: model.prepare_query_anndata(
        query(model), model, inplace=False
    ).X.toarray(),
    "transfer_labels": lambda model, _: model.transfer_labels(query(model), "cell_type"),
    "minify_adata": lambda model, folder: minified(model, folder).get_latent_representation(),
}


def query(model):
    return model.adata[:6].copy()


def minified(model, folder):
    model.save(folder / "model", save_anndata=True)
    copy = pm.MULTIVI.load(folder / "model")
    copy.minify_adata()
    return copy


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


def state():
    """All that a call could change."""
    return {
        "stack": list(runtime._PYRO_STACK),
        "plates": list(runtime._DIM_ALLOCATOR._stack),
        "settings": pyro.settings.get(),
        "params": list(pyro.get_param_store()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "sigint": signal.getsignal(signal.SIGINT),
        "random": torch.get_rng_state().tolist(),
    }


def same(found, expected):
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, pd.DataFrame):
        return found.equals(expected)
    return expected is None or np.array_equal(np.asarray(found), np.asarray(expected), equal_nan=True)


def call(verb, model, folder):
    with warnings.catch_warnings():
        # Of the small groups, and of ArviZ; they come in every mode.
        warnings.simplefilter("ignore")
        return VERBS[verb](model, folder)


@pytest.fixture(scope="module")
def expected(trained, tmp_path_factory):
    found = {}

    def of(verb):
        if verb not in found:
            found[verb] = call(verb, trained, tmp_path_factory.mktemp(verb))
        return found[verb]

    return of


#: Methods of extra modalities, which these cells do not have.
OF_EXTRA = (
    "get_normalized_protein_expression", "get_protein_foreground_probability", "get_extra_estimates",
    "differential_protein_expression", "differential_extra",
)  # fmt: skip


def test_every_public_method_is_among_these():
    methods = {name for name, value in inspect.getmembers(pm.MULTIVI, inspect.isroutine) if not name.startswith("_")}
    # Those of scvi-tools' names read the specification, and nothing of torch.
    reading = {name for name in vars(ScviAttributes) if name in methods}
    assert methods - set(VERBS) - reading == {
        "setup_anndata", "setup_mudata", "load", "minify_mudata", "prepare_query_mudata", *OF_EXTRA,
    }  # fmt: skip
    assert all(hasattr(getattr(pm.MULTIVI, name), "__wrapped__") for name in methods)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("verb", VERBS)
def test_a_call_is_the_same_under_any_state_of_torch(trained, expected, tmp_path, verb, mode):
    if verb == "to_inference_data":
        pytest.importorskip("arviz")
    wanted = expected(verb)
    with MODES[mode]():
        before = state()
        found = call(verb, trained, tmp_path)
        assert state() == before
    assert same(found, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_built_under_a_mode_is_trained_without_it(cells, mode):
    with MODES[mode]():
        model = new(cells)
    model.train(1, progress_bar=False)
    assert {value.dtype for value in model.program.parameters()} == {torch.float32}


def test_methods_of_a_users_class_are_isolated(cells):
    class Mine(pm.MULTIVI):
        def grad(self):
            return torch.is_grad_enabled()

    assert issubclass(Mine, ModelBase)
    model = Mine(cells, n_hidden=6, n_latent=2)
    with torch.no_grad():
        assert model.grad()


# ---------------------------------------------------------------------- threads


def test_threads_take_turns(cells):
    before, seen = state(), Counter()

    def go():
        try:
            model = new(cells)
            model.train(2, progress_bar=False)
            seen[model.get_elbo()] += 1
        except Exception as error:
            seen[repr(error)] += 1

    for _ in range(3):
        threads = [threading.Thread(target=go) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(seen) == 1, seen
    assert isinstance(next(iter(seen)), float), seen
    assert state() == before


# ---------------------------------------------------------------------- Ctrl-C


@contextmanager
def ctrl_c_at(number, twice=False):
    """A real signal at the n-th call of a function of Pyro or of ours; a list of how many there were."""
    seen = [0]

    def count(frame, event, argument):
        if event == "call" and f"{os.sep}pyro" in frame.f_code.co_filename:
            seen[0] += 1
            if seen[0] == number or (twice and seen[0] == number + 1):
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(count)
    try:
        yield seen
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("share", [0.05, 0.4, 0.7, 0.97])
@pytest.mark.parametrize("verb", ["train", "get_normalized_expression", "differential_expression"])
def test_ctrl_c_leaves_pyro_and_torch_as_they_were(trained, expected, tmp_path, verb, share, twice):
    with ctrl_c_at(-1) as seen:
        call(verb, trained, tmp_path)
    before = state()
    try:
        with ctrl_c_at(int(share * seen[0]), twice):
            call(verb, trained, tmp_path)
        stopped = False
    except KeyboardInterrupt:
        stopped = True
    assert stopped or verb == "train"
    assert state() == before
    assert same(call("get_elbo", trained, tmp_path), expected("get_elbo"))
    assert same(call(verb, trained, tmp_path), expected(verb))


@pytest.mark.parametrize("place", ["allocate", "free"])
def test_ctrl_c_inside_a_plate_of_pyro(cells, monkeypatch, caplog, place):
    whole, calls = getattr(runtime._DimAllocator, place), []

    def interrupted(*arguments):
        found = whole(*arguments)
        calls.append(place)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)
        return found

    model, before = new(cells), state()
    with monkeypatch.context() as patch:
        patch.setattr(runtime._DimAllocator, place, interrupted)
        model.train(3, progress_bar=False)
    assert "interrupted in epoch" in caplog.text
    assert "interrupted" in model._history.ending
    assert len(calls) >= 8, "the step was not completed"
    assert state() == before
    assert np.isfinite(model.get_elbo())


def test_a_second_ctrl_c_inside_a_plate_does_not_poison_pyro(cells, monkeypatch):
    whole, calls = runtime._DimAllocator.allocate, []

    def interrupted(*arguments):
        found = whole(*arguments)
        calls.append(found)
        if len(calls) == 8:
            raise KeyboardInterrupt  # A second one, which does not wait.
        return found

    model, before = new(cells), state()
    with monkeypatch.context() as patch:
        patch.setattr(runtime._DimAllocator, "allocate", interrupted)
        model.train(3, progress_bar=False)
    assert state() == before
    assert np.isfinite(model.get_elbo())


def test_an_error_inside_leaves_pyro_in_order():
    before = state()

    def fail():
        with isolated():
            runtime._PYRO_STACK.append(None)
            runtime._DIM_ALLOCATOR._stack.append("cells")
            pyro.settings.set(validate_poutine=False)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert state() == before


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_is_inside_leaves_no_lock():
    inside, done = threading.Event(), threading.Event()

    def hold():
        with isolated(), pyro.poutine.trace():
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            status = 1
            try:
                with isolated():
                    status = 0 if not runtime._PYRO_STACK else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        thread.join()
    with isolated():
        assert not runtime._PYRO_STACK
