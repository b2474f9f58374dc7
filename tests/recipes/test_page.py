"""The page as its reader meets it: it runs from top to bottom, and no recipe is long."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType

LONGEST = 15


def lengths(source: str) -> dict[str, int]:
    """Lines of code of every class and function: without blank lines, comments and docstrings."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            docs = sum(len(doc.splitlines()) for inner in ast.walk(node) if (doc := docstring(inner)))
            found[node.name] = sum(bool(line.strip()) for line in ast.unparse(node).splitlines()) - docs
    return found


def docstring(node: ast.AST) -> str | None:
    return ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None


def test_docstrings_and_blank_lines_are_no_code():
    source = 'class A:\n    """Two\n    lines."""\n\n    x = 1\n\n    def f(self):\n        return 1\n'
    assert lengths(source) == {"A": 4}


def test_the_page_runs(page, tmp_path, monkeypatch):
    # What the examples write stays out of the repository.
    monkeypatch.chdir(tmp_path)
    module = ModuleType("own_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, source in page:
        # Blank lines before it make a traceback show the page's own line numbers.
        exec(compile("\n" * line + source, "recipes.md", "exec"), module.__dict__)


def test_recipes_are_short(source):
    assert len(lengths(source)) > 10
    assert {name: length for name, length in lengths(source).items() if length > LONGEST} == {}


def test_every_recipe_is_tested(source):
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    untested = [name for name in lengths(source) if f"recipes.{name}" not in tests]
    assert untested == ["fitted"]  # a helper of the page
