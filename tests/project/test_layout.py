"""The house rules that a machine can see: sizes of folders and files, and modalities translated in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pyro_multivi.data.modality import MODALITIES

PACKAGE = Path(__file__).parents[2] / "pyro_multivi"
FILES = sorted(PACKAGE.rglob("*.py"))
#: Every name that a modality goes by.
NAMES = {
    name
    for modality in MODALITIES
    for name in (modality.key, modality.name, modality.assay, modality.feature, *modality.sites)
}


def comparisons_with_modalities(source: str) -> list[int]:
    """Lines that compare something with the name of a modality."""

    def is_name(node: ast.expr) -> bool:
        if isinstance(node, ast.Tuple | ast.List | ast.Set):
            return any(map(is_name, node.elts))
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES

    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn)
        and any(map(is_name, (node.left, *node.comparators)))
    ]


def test_comparisons_are_found():
    source = "a = site == 'x'\nb = 'RNA' != c\nd = e in ('p', 'y')\nf = mode == 'change'"
    assert comparisons_with_modalities(source) == [1, 2, 3]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_file_translates_names_of_modalities_by_itself(path):
    lines = comparisons_with_modalities(path.read_text())
    # dispersion="gene" is a choice of the model that shares the word.
    allowed = [place for place, line in enumerate(path.read_text().splitlines(), 1) if "dispersion ==" in line]
    assert [line for line in lines if line not in allowed] == []


def test_no_file_is_longer_than_400_lines():
    assert [str(path) for path in FILES if len(path.read_text().splitlines()) > 400] == []


def test_no_folder_holds_more_than_11_files():
    folders = {path.parent for path in FILES}
    sizes = {folder.name: sum(path.name != "__init__.py" for path in folder.glob("*.py")) for folder in folders}
    assert {name: size for name, size in sizes.items() if size > 11} == {}
