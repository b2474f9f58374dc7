"""The notebooks: they run from top to bottom, and what is committed is their output."""

from __future__ import annotations

import ast
import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
#: Where a machine's own paths begin.
MACHINE = re.compile(r"(?<![\w./])/(?:home|root|opt|tmp|usr|work|Users|private)/|[A-Z]:\\\\|site-packages")

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert [path.name[:2] for path in NOTEBOOKS[:3]] == ["01", "02", "03"]


@each_notebook
def test_committed_outputs_are_of_one_run_from_top_to_bottom(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    types = [(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]]
    assert not [one for one in types if one[0] == "error" or one[1] == "stderr"], "an error or a warning"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


@each_notebook
def test_committed_outputs_are_small_and_hold_no_paths_of_a_machine(path):
    assert path.stat().st_size < 400_000
    said = json.dumps([cell["outputs"] for cell in code_cells(path)])
    # Pictures are base64, in which anything may occur.
    said = re.sub(r'"image/png": "[^"]*"', "", said)
    assert not MACHINE.findall(said)


@each_notebook
def test_pictures_have_150_dots_per_inch(path):
    found = [output.get("data", {}) for cell in code_cells(path) for output in cell["outputs"]]
    pictures = [base64.b64decode("".join(data["image/png"])) for data in found if "image/png" in data]
    for picture in pictures:
        # Chunk pHYs of a PNG: pixels per metre across and up.
        place = picture.index(b"pHYs") + 4
        assert struct.unpack(">II", picture[place : place + 8]) == (5906, 5906)


def test_the_program_is_drawn():
    found = [output.get("data", {}) for cell in code_cells(FOLDER / NAMES[1]) for output in cell["outputs"]]
    [picture] = ["".join(data["image/svg+xml"]) for data in found if "image/svg+xml" in data]
    assert {">z<", ">l<", ">d<", ">x<", ">y<"} <= set(re.findall(r">\w+<", picture))


@each_notebook
def test_sections_are_numbered_without_a_gap(path):
    prose = ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    numbers = re.findall(r"^## (\d+)\.", "\n".join(prose), re.MULTILINE)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
    assert len(numbers) >= 5


@each_notebook
def test_links_lead_somewhere(path):
    prose = "".join(line for cell in read(path)["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", prose):
        assert (FOLDER / target).is_file(), target


@each_notebook
def test_short_mode_depends_on_the_variable_the_tests_set(path):
    sources = ["".join(cell["source"]) for cell in code_cells(path)]
    python = "\n".join(line for source in sources for line in source.splitlines() if not line.startswith("%"))
    names = {node.value for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Constant)}
    assert "PYRO_MULTIVI_SHORT" in names


@each_notebook
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra test")
    nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
    pytest.importorskip("ipykernel", reason="needs the extra test")
    monkeypatch.setenv("PYRO_MULTIVI_SHORT", "1")
    # One thread: a kernel does not inherit the tests' own settings.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    warned = [o["text"] for cell in notebook.cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
    assert not warned
