"""Scripts of the quality benchmark, and simulated cells for them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
TINY = {"n_cells": (120, 0, 0), "n_genes": 40, "n_regions": 60, "n_types": 3}


@pytest.fixture
def module(monkeypatch) -> Iterator[object]:
    """Loads a script of the benchmark, which is no package; nothing of it stays behind."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(FOLDER)])
    scripts = [path.stem for path in (*FOLDER.glob("*.py"), *FOLDER.parent.glob("*.py"))]

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        # Where dataclasses, and scripts that import each other, look for it.
        sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded

    yield load
    for name in scripts:
        sys.modules.pop(name, None)


@pytest.fixture
def hidden(module, tmp_path):
    """Simulated cells with a part hidden."""
    protocol = module("protocol")
    path = tmp_path / "cells.h5ad"
    module("simulated").simulate(0, **TINY).write_h5ad(path)
    return protocol.prepare(path, seed=0)
