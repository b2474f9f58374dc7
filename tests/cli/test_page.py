"""The page on the command line says what is written: files, columns and keys as they are."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd
import pytest

import pyro_multivi as pm
from pyro_multivi.cli import main
from pyro_multivi.cli.check import FILES
from pyro_multivi.cli.parser import command_parser
from pyro_multivi.cli.train import OUTPUTS

PAGE = (Path(__file__).parents[2] / "tutorials" / "command_line.md").read_text(encoding="utf-8")
SIZES = "--n-hidden 6 --n-latent 2 --accelerator cpu --quiet --max-epochs 1"


def section(title: str) -> str:
    """Text from a heading, or the first words of a line, to the next heading."""
    return PAGE.split(f"\n{title}")[1].split("\n## ")[0]


def first_cells(text: str) -> list[list[str]]:
    """Words in code of the first column of each row of the tables in a text."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [re.findall(r"`([^`]+)`", row) for row in rows]


def said(text: str) -> list[str]:
    return [word for words in first_cells(text) for word in words]


def unsaid(found, words: list[str]) -> list[str]:
    """What is found and none of the words or patterns tells of."""
    return [name for name in found if not any(fnmatchcase(name, word) for word in words)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with files of paired cells, of a mosaic and of proteins, and what commands wrote of them."""
    folder, patch = tmp_path_factory.mktemp("page"), pytest.MonkeyPatch()
    patch.chdir(folder)
    make = {"n_genes": 12, "n_regions": 20, "n_proteins": 4, "n_batches": 2, "truth": False, "seed": 0}
    mosaic = pm.simulate_multiome((60, 20, 20), **make)
    mosaic.write_h5ad("mosaic.h5ad")
    paired = mosaic[mosaic.obs["modality"] == "paired"]
    paired.write_h5ad("paired.h5ad")
    compare = "differential mosaic/model mosaic.h5ad --groupby cell_type --n-samples 50 --quiet"
    for command in (
        f"train mosaic.h5ad --modality-key modality --batch-key batch --protein protein_expression --labels cell_type "
        f"--checkpoint checkpoints --out mosaic {SIZES}",
        f"train paired.h5ad --modality-key modality --out paired {SIZES}",
        *(f"{compare} --modality {name} --out {name}.csv" for name in ("expression", "accessibility", "protein")),
        *(f"{compare} --mode vanilla --modality {name} --out {name}_2.csv" for name in ("expression", "accessibility")),
        "map paired/model mosaic.h5ad --labels cell_type --reference paired.h5ad --out mapped.csv --quiet",
        "check mosaic/model mosaic.h5ad --labels cell_type --n-samples 40 --all-cells --out checked",
    ):
        assert main(command.split()) == 0, command
    patch.undo()
    return folder


def test_commands_and_files_are_all_there(folder):
    actions = command_parser()._actions
    commands = next(action.choices for action in actions if action.dest == "command")
    assert {words[0].split()[0] for words in first_cells(PAGE.split("## In a job")[0])} == set(commands)
    files = section("## Files of train").split("Columns of")[0]
    assert [name.rstrip("/") for name in said(files)] == list(OUTPUTS)
    assert {path.name for path in (folder / "mosaic").iterdir()} == set(OUTPUTS)
    assert {*said(section("## Files of check")), "check.html"} >= {path.name for path in (folder / "checked").iterdir()}
    assert {*said(section("## Files of check")), "check.html"} >= set(FILES) - {"user.csv"}


def test_columns_and_keys_of_train_are_those_of_the_page(folder):
    found = [list(pd.read_csv(folder / name / "history.csv")) for name in ("mosaic", "paired")]
    words = said(section("Columns of `history.csv`").split("Keys of")[0])
    assert [unsaid(columns, words) for columns in found] == [[], []]
    every = {name for columns in found for name in columns}
    assert [word for word in words if not any(fnmatchcase(name, word) for name in every)] == []
    figures = json.loads((folder / "mosaic" / "figures.json").read_text())
    assert set(said(section("Keys of `figures.json`"))) == set(figures)
    files = section("## Files of train").split("Columns of")[0]
    assert set(json.loads((folder / "mosaic" / "command.json").read_text())) <= set(re.findall(r"`([^`]+)`", files))


def test_columns_of_tables_are_those_of_the_page(folder):
    words = said(section("## Table of differential"))
    tables = [
        list(pd.read_csv(folder / f"{name}.csv"))
        for name in ("expression", "accessibility", "protein", "expression_2", "accessibility_2")
    ]
    assert [unsaid(columns, words) for columns in tables] == [[]] * 5
    every = {name for columns in tables for name in columns}
    elsewhere = [word for word in words if not any(fnmatchcase(name, word) for name in every)]
    # Of counts of fragments, and of features that differ between batches.
    assert all(re.fullmatch(r"(est|emp)_fragments[12]|n_measured[12]", word) for word in elsewhere)
    mapped = re.findall(r"`([^`]+)`", section("## Table of map"))
    assert unsaid(pd.read_csv(folder / "mapped.csv"), mapped) == []


def test_columns_of_checks_are_those_of_the_page(folder):
    rows = [line.split("|") for line in section("## Files of check").splitlines() if line.startswith("| `")]
    for _, files, columns, *_ in rows:
        for name in re.findall(r"`([^`]+)`", files):
            if (folder / "checked" / name).is_file():
                own = re.findall(r"`([^`]+)`", columns.replace("`gene` or `region`", f"`{name[:-5]}`"))
                assert list(pd.read_csv(folder / "checked" / name)) == own
