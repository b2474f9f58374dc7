"""Optional dependencies: versions of mudata with and without its former options."""

from __future__ import annotations

import logging
import random
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest

import pyro_multivi as pm
from pyro_multivi._optional import mudata_as_given, require


@pytest.fixture
def mudata(monkeypatch):
    """A stand-in of mudata 0.4."""
    module = ModuleType("mudata")
    monkeypatch.setitem(sys.modules, "mudata", module)
    return module


def test_mudata_without_options(mudata):
    with mudata_as_given() as found:
        assert found is mudata


def test_mudata_with_options_has_them_back(mudata):
    options = {"pull_on_update": None}

    @contextmanager
    def set_options(**chosen):
        before = options.copy()
        options.update(chosen)
        yield
        options.update(before)

    mudata.set_options = set_options
    with mudata_as_given() as found:
        assert found is mudata
        assert options == {"pull_on_update": False}
    assert options == {"pull_on_update": None}


def test_messages_of_mudata_install_no_handler_of_logging(monkeypatch):
    pytest.importorskip("mudata")
    monkeypatch.setattr(logging.root, "handlers", [])
    with mudata_as_given():
        assert logging.root.handlers == []
    assert logging.root.handlers == []


def test_names_that_mudata_draws_leave_the_random_numbers_of_python(tmp_path):
    pytest.importorskip("mudata")
    made = pm.simulate_multiome((20, 10, 10), n_genes=10, n_regions=20, return_mudata=True, seed=0)
    random.seed(0)
    before = random.getstate()
    pm.MULTIVI.setup_mudata(made, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    model = pm.MULTIVI(made, n_hidden=4, n_latent=2)
    model.train(1, progress_bar=False)
    model.impute()
    model.save(tmp_path / "model", save_anndata=True)
    pm.MULTIVI.load(tmp_path / "model").minify_mudata()
    assert random.getstate() == before


def test_a_missing_module_names_the_extra():
    with pytest.raises(ImportError, match=r"'no_such_module' is needed .*pip install 'pyro-multivi\[extra\]'"):
        require("no_such_module", "extra")
