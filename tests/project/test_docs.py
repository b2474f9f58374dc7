"""The reference: it builds without a warning, and no public name is missing from it."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_multivi as pm
from pyro_multivi import plots

FOLDER = Path(__file__).parents[2] / "docs"


def listed(page: str) -> set[str]:
    """Names that a page documents."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    entries = re.findall(r"^   (\w[\w.]*)$", text, re.MULTILINE)
    return {*entries, *re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE)}


def public(owner: type) -> set[str]:
    """Methods and properties of ours, not those of torch."""
    ours = [base for base in owner.__mro__ if base.__module__.startswith("pyro_multivi")]
    members = {name: value for base in ours for name, value in vars(base).items() if not name.startswith("_")}
    methods = (property, staticmethod, classmethod)
    named = {name for name, value in members.items() if inspect.isroutine(value) or isinstance(value, methods)}
    return {f"{owner.__name__}.{name}" for name in named}


def test_every_method_of_the_analyst_and_every_public_name_is_listed():
    pages = listed("analyst.rst") | listed("program.rst")
    names = {name for name in pm.__all__ if not name.startswith("__")}
    assert not (public(pm.MULTIVI) | names) - pages


def test_every_method_of_the_program_is_listed():
    assert not public(pm.MultiVIProgram) - listed("program.rst")


def test_every_figure_is_listed():
    made = {f"plots.{name}" for name in plots.__all__ if callable(getattr(plots, name))}
    assert made == listed("plots.rst")


def test_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs")
    pytest.importorskip("numpydoc", reason="needs the extra docs")
    # A copy: autosummary writes its pages beside the sources.
    source = shutil.copytree(FOLDER, tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "generated"))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(tmp_path / "html")]
    built = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "html" / "program.html").read_text(encoding="utf-8")
    assert r"\mathrm{Bernoulli}" in page
    assert "cell factor of accessibility, in (0, 1)" in page


def test_architecture_lists_every_file_of_the_package():
    text = (FOLDER / "architecture.md").read_text(encoding="utf-8")
    tree = text.split("```\npyro_multivi/\n")[1].split("```")[0]
    found, folders = set(), ["pyro_multivi"]
    for line in tree.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.add("/".join(folders))
    package = FOLDER.parent / "pyro_multivi"
    assert found == {path.relative_to(FOLDER.parent).as_posix() for path in package.rglob("*.py")}


@pytest.mark.parametrize("page", sorted(FOLDER.glob("*.md")), ids=lambda page: page.stem)
def test_pages_of_the_repository_link_to_what_exists(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (FOLDER / target).exists()] == []
