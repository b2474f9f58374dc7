"""Public names are imported at their first use; the command line's parser needs nothing heavy."""

from __future__ import annotations

import subprocess
import sys
import typing
from importlib import import_module
from pathlib import Path

import pytest

import pyro_multivi as pm

ROOT = Path(__file__).parents[2]
#: Slow to import, and of no use to a parser.
HEAVY = {"torch", "pyro", "anndata", "pandas", "scipy", "h5py", "mudata", "matplotlib"}


def modules_after(statements: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after some statements, which must not have failed."""
    script = f"import sys\n{statements}\nprint('modules', *{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        [],
        ["demo", "--help"],
        ["train", "--help"],
        ["check", "--help"],
        ["differential", "--help"],
        ["train", "cells.h5ad"],
        ["demo", "--out", "x", "--max-epochs", "many"],
        ["unknown"],
    ],
)
def test_help_and_errors_of_arguments_import_nothing_heavy(arguments):
    run = f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\nelse:\n    raise AssertionError"
    assert not modules_after(f"from pyro_multivi.cli import main\n{run}") & HEAVY


def test_the_package_itself_imports_nothing_heavy():
    assert not modules_after("import pyro_multivi") & HEAVY


def test_the_analysts_class_does_not_import_scipy_stats():
    # It takes longer than everything else that the class imports.
    script = "import sys\nfrom pyro_multivi import MULTIVI\nprint('scipy.stats' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize("name", sorted(set(pm.__all__) - {"__version__", "settings"}))
def test_a_public_name_is_that_of_its_module(name):
    value = getattr(import_module("pyro_multivi"), name)
    assert value.__name__ == name
    assert value is getattr(sys.modules[value.__module__], name)
    assert name in dir(pm)


def test_names_for_type_checkers_are_those_at_run_time():
    source = (ROOT / "pyro_multivi" / "__init__.py").read_text()
    known: dict[str, typing.Any] = {"__name__": "checked"}
    exec(source.replace("if TYPE_CHECKING:", "if True:").replace("if not TYPE_CHECKING:", "if False:"), known)
    assert set(known["_MODULE_OF"]) == set(pm.__all__) - {"__version__"}
    for name in known["_MODULE_OF"]:
        assert known[name] is getattr(pm, name)


def test_submodules_are_attributes():
    assert pm.posterior.draw is import_module("pyro_multivi.posterior").draw
    with pytest.raises(AttributeError, match="has no attribute 'MULTIVY'"):
        getattr(pm, "MULTIVY")  # noqa: B009
