"""The architecture, as far as imports show it: data -> program -> training, posterior -> api -> plots -> cli."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import anndata
import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "pyro_multivi"

#: Third parties that only an extra installs.
OPTIONAL = {"mudata", "matplotlib", "arviz", "zarr", "numba", "sklearn", "scanpy", "scvi", "xarray", "seaborn"}
#: What Numba compiles has to be written beside it; whoever wants it imports these modules late, as if they were Numba.
COMPILED = tuple(f"distributions.kernels.numba.{name}" for name in ("fragments", "loops", "scalar_math"))
#: Third parties that read or hold a user's tables; the tensors' side imports none of them.
TABLES = {"anndata", "pandas", "mudata"}
#: The tensors' side: what a modeler uses without AnnData.
TENSORS = (
    "config",
    "processes",
    "program",
    "traces",
    "networks",
    "distributions",
    "training",
    *(
        f"data.{name}"
        for name in (
            "checks",
            "loader",
            "marginals",
            "minibatch",
            "modality",
            "resident",
            "sparse",
            "split",
            "table",
            "stores.counts",
            "stores.matrix",
            "stores.passes",
        )
    ),
)
#: Parts of posterior/ that import the engine, and not each other.
ON_THE_ENGINE = ("calibration", "quantities", "differential", "checks", "mapping")
#: Methods of the analyst's class, side by side.
SIBLINGS = ("latent", "estimates", "checks", "differential")


def forbidden_to(name: str) -> tuple[str, ...]:
    """Modules and packages that a module of ours may not import."""
    found = ["cli", "__main__"]
    if not is_within(name, ("plots", "cli")):
        found.append("plots")
    if not is_within(name, ("api", "plots", "cli", "model")) and name:
        found.append("api")
    if is_within(name, ("data", "networks", "distributions")):
        found += ["program", "traces", "training", "posterior"]
    if is_within(name, ("config", "program", "traces")):
        found += ["training", "posterior"]
    if is_within(name, ("training",)):
        found.append("posterior")
    if is_within(name, ("datasets",)):
        found += ["program", "networks", "distributions", "training", "posterior"]
    if is_within(name, ("posterior",)):
        found.append("training")
    if is_within(name, ("posterior.engine",)):
        found += [f"posterior.{part}" for part in ON_THE_ENGINE]
    for part in ON_THE_ENGINE:
        if is_within(name, (f"posterior.{part}",)):
            found += [f"posterior.{other}" for other in ON_THE_ENGINE if other != part]
    for sibling in SIBLINGS:
        if name == f"api.{sibling}":
            found += [f"api.{other}" for other in (*SIBLINGS, "multivi", "compare_models") if other != sibling]
    return tuple(found)


@dataclass(frozen=True)
class Import:
    """One import: its target, and whether it happens when the module is imported."""

    target: str
    at_top: bool


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path: Path, name: str) -> list[Import]:
    found: list[Import] = []
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, at_top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([base] if base else [])])
            # `from package import name` may import a module of that name.
            found.extend(Import(f"{base}.{alias.name}", at_top) for alias in node.names)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not typing_only and not inside)

    visit(ast.parse(path.read_text()), True)
    return found


def is_within(target: str, names: tuple[str, ...]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def violations(root: Path) -> list[str]:
    """Imports that run against the architecture, one line each."""
    wrong = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        full = module_name(path, root)
        name = full.removeprefix(PACKAGE).removeprefix(".")
        tables = tuple(sorted(TABLES)) if is_within(name, TENSORS) else ()
        for imported in imports_of(path, full):
            target = imported.target
            local = target.removeprefix(f"{PACKAGE}.")
            if local != target and not is_within(name, ("cli", "__main__")) and is_within(local, forbidden_to(name)):
                wrong.append(f"{full} imports {target}")
            if is_within(target, tables):
                wrong.append(f"{full} imports {target}")
            compiled = target == "numba" or is_within(local, COMPILED)
            optional = compiled or target.split(".")[0] in OPTIONAL
            if imported.at_top and optional and not (compiled and name in COMPILED):
                wrong.append(f"{full} imports the optional {target} at the top")
    return wrong


def reached(root: Path, start: str) -> dict[str, str]:
    """Modules of ours that ``start`` imports directly or through others, each with the one that imports it."""
    files = {module_name(path, root): path for path in (root / PACKAGE).rglob("*.py")}
    by: dict[str, str] = {}
    pending = [name for name in files if name == start or name.startswith(f"{start}.")]
    seen = set(pending)
    while pending:
        name = pending.pop()
        for imported in imports_of(files[name], name):
            # A name imported from a module, that module, and the packages above it, all of which are run.
            parts = imported.target.split(".")
            for length in range(2, len(parts) + 1):
                target = ".".join(parts[:length])
                if target in files and target not in seen:
                    seen.add(target)
                    by[target] = name
                    pending.append(target)
    return by


def test_imports_run_one_way():
    assert violations(ROOT) == []


@pytest.mark.parametrize("start", ["program", "networks", "distributions", "training", "traces"])
def test_tensors_side_reaches_no_tables(start):
    files = {module_name(path, ROOT): path for path in (ROOT / PACKAGE).rglob("*.py")}
    start = f"{PACKAGE}.{start}"
    by = reached(ROOT, start)
    wrong = [
        f"{name} (through {by.get(name, 'itself')}) imports {imported.target}"
        for name in [*by, *(name for name in files if is_within(name, (start,)))]
        for imported in imports_of(files[name], name)
        if imported.target.split(".")[0] in TABLES
    ]
    assert wrong == []


def test_data_package_itself_is_light():
    # The tensors' side imports from it; what its __init__ imports, everyone gets.
    found = imports_of(ROOT / PACKAGE / "data" / "__init__.py", f"{PACKAGE}.data")
    assert [each.target for each in found] == ["importlib.import_module"]


def test_third_parties_are_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    declared = {re.split(r"[<>=!~\[;]", line)[0].replace("pyro-ppl", "pyro") for line in lines}
    # AnnData's own format is HDF5: it cannot be had without h5py.
    declared |= {"h5py", PACKAGE}
    wrong = {
        f"{name} imports {imported.target}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        for name in [module_name(path, ROOT)]
        for imported in imports_of(path, name)
        if imported.at_top and imported.target.split(".")[0] not in declared | sys.stdlib_module_names
        if imported.target != "numba" or name.removeprefix(f"{PACKAGE}.") not in COMPILED
    }
    assert wrong == set()


def test_nothing_private_of_anndata_or_mudata_is_used():
    classes = (anndata.AnnData, pytest.importorskip("mudata").MuData)
    private = {name for cls in classes for name in dir(cls) if name.startswith("_") and not name.endswith("__")}
    perhaps = re.compile(rf"\.({'|'.join(private)})\b")
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} uses {ast.unparse(node)}"
        for folder in (PACKAGE, "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        if perhaps.search(path.read_text())
        for node in ast.walk(ast.parse(path.read_text()))
        # scanpy shortens an object in place by these methods, and nothing public does.
        if isinstance(node, ast.Attribute) and node.attr in private - {"_inplace_subset_obs", "_inplace_subset_var"}
        if ast.unparse(node.value) not in ("self", "cls")
    ]
    wrong += [
        f"{name} imports {imported.target}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        for name in [module_name(path, ROOT)]
        for imported in imports_of(path, name)
        if re.match(r"(anndata|mudata)(\.\w+)*\._", imported.target)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("program.py", "import anndata", "pyro_multivi.program imports anndata"),
        ("distributions/counts.py", "def f():\n    from pandas import Series", "imports pandas.Series"),
        ("networks/layers.py", "from pyro_multivi.training.fit import fit", "imports pyro_multivi.training"),
        ("data/setup/spec.py", "from ...posterior.engine import draws", "imports pyro_multivi.posterior.engine.draws"),
        ("data/setup/spec.py", "from ... import api", "imports pyro_multivi.api"),
        ("data/table.py", "from mudata import MuData", "imports mudata.MuData"),
        ("training/fit.py", "from anndata import AnnData", "fit imports anndata.AnnData"),
        (
            "training/fit.py",
            "from pyro_multivi.posterior.engine.draws import draw",
            "fit imports pyro_multivi.posterior",
        ),
        ("posterior/engine/draws.py", "import pyro_multivi.api", "imports pyro_multivi.api"),
        (
            "posterior/engine/draws.py",
            "from pyro_multivi.posterior.quantities import latent",
            "posterior.quantities.latent",
        ),
        (
            "posterior/differential/compare.py",
            "from pyro_multivi.posterior.quantities.summary import Estimate",
            "quantities",
        ),
        (
            "posterior/checks/scoring.py",
            "from pyro_multivi.posterior.differential import effect",
            "differential.effect",
        ),
        (
            "api/saving.py",
            "from pyro_multivi.plots import latent",
            "pyro_multivi.api.saving imports pyro_multivi.plots",
        ),
        (
            "api/checks.py",
            "from pyro_multivi.api.latent import LatentMixin",
            "imports pyro_multivi.api.latent.LatentMixin",
        ),
        ("plots/report.py", "from pyro_multivi.cli import main", "pyro_multivi.plots.report imports pyro_multivi.cli"),
        ("plots/latent.py", "import matplotlib.pyplot", "imports the optional matplotlib.pyplot at the top"),
        ("distributions/kernels/numba/switch.py", "import numba", "imports the optional numba at the top"),
        (
            "distributions/kernels/numba/switch.py",
            "from pyro_multivi.distributions.kernels.numba import loops",
            "imports the optional pyro_multivi.distributions.kernels.numba.loops at the top",
        ),
        ("plots/latent.py", "try:\n    import arviz\nexcept ImportError:\n    pass", "imports the optional arviz"),
    ],
)
def test_a_violation_is_found(tmp_path, file, source, message):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert any(message in line for line in violations(tmp_path))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from pyro_multivi.api.multivi import MULTIVI"),
        ("cli/train.py", "from pyro_multivi.api.multivi import MULTIVI"),
        ("plots/report.py", "from pyro_multivi.api.multivi import MULTIVI"),
        ("plots/latent.py", "def plot():\n    import matplotlib"),
        ("plots/latent.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mudata import MuData"),
        ("datasets/readers.py", "import pandas, anndata"),
        ("distributions/kernels/numba/loops.py", "import numba"),
        (
            "distributions/kernels/numba/switch.py",
            "def compiled():\n    from pyro_multivi.distributions.kernels.numba import loops",
        ),
        ("posterior/differential/tables.py", "import pandas"),
        ("posterior/checks/scoring.py", "from pyro_multivi.posterior.engine import draws"),
    ],
)
def test_what_is_allowed_is_not_a_violation(tmp_path, file, source):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert violations(tmp_path) == []


def test_a_detour_is_found(tmp_path):
    for file, source in {
        "program.py": "from pyro_multivi.data import minibatch",
        "data/minibatch.py": "from pyro_multivi.data.frames import Frames",
        "data/frames.py": "import pandas",
    }.items():
        path = tmp_path / PACKAGE / file
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(source)
    assert reached(tmp_path, f"{PACKAGE}.program") == {
        f"{PACKAGE}.data.minibatch": f"{PACKAGE}.program",
        f"{PACKAGE}.data.frames": f"{PACKAGE}.data.minibatch",
    }
