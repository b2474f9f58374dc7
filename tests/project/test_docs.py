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
    for name in ("sphinx", "numpydoc", "myst_nb", "latex2mathml"):
        pytest.importorskip(name, reason="needs the extra docs")
    # A copy: pages are made beside the sources.
    ignored = shutil.ignore_patterns("_build", "generated", "tutorials")
    source = shutil.copytree(FOLDER, tmp_path / "docs", ignore=ignored)
    shutil.copytree(FOLDER.parent / "tutorials", tmp_path / "tutorials")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(source), str(tmp_path / "html")]
    built = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert built.returncode == 0, built.stderr
    site = tmp_path / "html"
    pages = {str(path.relative_to(site).with_suffix("")): path.read_text("utf-8") for path in site.rglob("*.html")}
    assert "cell factor of accessibility, in (0, 1)" in pages["program"]
    # Formulas and everything else are shown without a network.
    assert pages["program"].count("<math ") >= 4
    assert r"\mathrm" not in pages["program"]
    for name, page in pages.items():
        assert not re.search(r"""<(?:script|img|link)[^>]*(?:src|href)=["']https?:""", page), name
    # Notebooks with the outputs they were committed with.
    for notebook in (FOLDER.parent / "tutorials").glob("*.ipynb"):
        assert pages[f"tutorials/{notebook.stem}"].count("<img ") >= notebook.read_text(encoding="utf-8").count(
            '"image/png": '
        )


def test_every_page_of_the_tutorials_is_in_the_contents():
    contents = (FOLDER / "index.rst").read_text(encoding="utf-8")
    pages = {path.stem for path in (FOLDER.parent / "tutorials").iterdir() if path.suffix in (".md", ".ipynb")}
    assert set(re.findall(r"^   tutorials/(\w+)$", contents, re.MULTILINE)) == pages - {"README"}


def test_every_option_of_the_constructor_is_documented():
    options = set(inspect.signature(pm.MULTIVI.__init__).parameters) - {"self"}
    section = inspect.getdoc(pm.MULTIVI).split("Parameters\n")[1].split("See Also")[0]
    heads = re.findall(r"^(\w[\w, ]*)$", section, re.MULTILINE)
    assert options == {name for head in heads for name in head.split(", ")}


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
