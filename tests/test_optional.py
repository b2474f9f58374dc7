"""Optional dependencies: versions of mudata with and without its former options."""

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest

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


def test_a_missing_module_names_the_extra():
    with pytest.raises(ImportError, match=r"'no_such_module' is needed .*pip install 'pyro-multivi\[extra\]'"):
        require("no_such_module", "extra")
