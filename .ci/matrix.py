#!/usr/bin/env python3
"""The default suite with the oldest allowed and the newest available dependencies.

The lower bounds of setup.cfg, as constraints, make the oldest set; it runs with the oldest Python. Whatever pip takes
without constraints makes the newest set; it runs with every Python that setup.cfg names and PATH has. Each environment
is made anew in a temporary folder.

    .ci/matrix.py                            all of them
    .ci/matrix.py --only oldest newest-3.13  some of them
    .ci/matrix.py --list                     what there is
"""

from __future__ import annotations

import argparse
import configparser
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lower_bounds(setup: configparser.ConfigParser) -> list[str]:
    """``name==lower bound`` of every dependency of the package and of its tests that has one."""
    lines = setup["options"]["install_requires"] + setup["options.extras_require"]["test"]
    found = (re.match(r"([\w-]+)>=([\w.]+)", line) for line in lines.split("\n"))
    return [f"{match[1]}=={match[2]}" for match in found if match]


def interpreters(setup: configparser.ConfigParser) -> dict[str, str]:
    """Path of each Python that the classifiers name and that starts, by version, the oldest first."""
    versions = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    found = {}
    for version in sorted(versions, key=lambda text: int(text.split(".")[1])):
        path = shutil.which(f"python{version}")
        # A launcher may be there without its interpreter.
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0:
            found[version] = path
    return found


def run(python: str, constraints: list[str], pytest_arguments: list[str]) -> tuple[str, bool]:
    """Make an environment and run the suite in it; its last line, and whether it passed."""
    with tempfile.TemporaryDirectory(prefix="matrix-") as name:
        folder = Path(name)
        own = str(folder / "venv" / "bin" / "python")
        bounds = folder / "constraints.txt"
        bounds.write_text("\n".join(constraints) + "\n", encoding="utf-8")
        subprocess.run([python, "-m", "venv", folder / "venv"], check=True)
        install = [own, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", bounds, "-e", f"{ROOT}[test]"]
        if subprocess.run(install, check=False).returncode:
            return "could not be installed", False
        freeze = [own, "-m", "pip", "list", "--format=freeze"]
        shown = subprocess.run(freeze, capture_output=True, text=True, check=True)
        print(" ".join(shown.stdout.split()), flush=True)
        tests = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        with subprocess.Popen(tests, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            last = "no output"
            for line in process.stdout or ():
                print(line, end="", flush=True)
                last = line.strip() or last
        return last, process.returncode == 0


def main() -> int:
    """Run from the command line."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pythons = interpreters(setup)
    if not pythons:
        sys.exit("matrix: PATH has no python3.x that setup.cfg names")
    jobs = {"oldest": (next(iter(pythons.values())), lower_bounds(setup))}
    jobs.update({f"newest-{version}": (path, []) for version, path in pythons.items()})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(jobs), default=list(jobs), help="environments to run")
    parser.add_argument("--list", action="store_true", help="print the environments and their constraints, run nothing")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=["-n", "auto"], help="arguments of pytest; last")
    options = parser.parse_args()
    results = {}
    for name in options.only:
        python, constraints = jobs[name]
        print(f"== {name}: {python} {' '.join(constraints)}", flush=True)
        if not options.list:
            results[name] = run(python, constraints, options.pytest)
    for name, (last, _) in results.items():
        print(f"{name}: {last}")
    return int(not all(passed for _, passed in results.values()))


if __name__ == "__main__":
    sys.exit(main())
