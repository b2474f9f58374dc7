"""Run notebooks from top to bottom and keep their outputs: ``python tutorials/run.py [NOTEBOOK ...]``, default all."""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

# Of a picture: enough for curves, points and their overlaps, at a third of the bytes of all colours.
COLOURS = 48


def run(path: Path) -> None:
    """Run a notebook and write it back."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shrink(output.get("data", {}))
    # As the pages of documentation are built from these files, nothing of the machine stays in them.
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def shrink(data: dict[str, Any]) -> None:
    """Store the picture of an output in few colours, at the same size and resolution."""
    if "image/png" not in data:
        return
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    file = io.BytesIO()
    few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    few.save(file, format="png", optimize=True, dpi=image.info["dpi"])
    data["image/png"] = base64.b64encode(file.getvalue()).decode("ascii")


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(map(str, Path(__file__).parent.glob("*.ipynb"))):
        run(Path(name))
