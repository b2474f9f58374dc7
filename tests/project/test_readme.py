"""Python examples of the README and of the pages on own data and on scvi-tools, run in their order as one session."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / "tutorials" / name for name in ("your_data.md", "from_scvi_tools.md"))]


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and source of each block fenced as python."""
    pattern = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in pattern.finditer(text)]


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n```bash\nls\n```\n```python\ny = 2\nz = 3\n```\n"
    assert python_blocks(text) == [(2, "x = 1\n"), (8, "y = 2\nz = 3\n")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    # What the examples write stays out of the repository.
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(page.read_text(encoding="utf-8"))
    assert blocks, "the page has no Python example"
    session: dict[str, object] = {"__name__": "__page__"}
    for line, source in blocks:
        # Blank lines before it make a traceback show the page's own line numbers.
        exec(compile("\n" * line + source, str(page), "exec"), session)


def test_ci_runs_the_command_to_test():
    lines = README.read_text(encoding="utf-8").splitlines()
    [command] = [line for line in lines if line.startswith("python3 -m venv") and "-m pytest" in line]
    # The same but for where the environment lies.
    script = (ROOT / ".ci" / "run").read_text().replace('"', "").replace("$venv", ".venv")
    for step in command.split(" && "):
        assert step in script
