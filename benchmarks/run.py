"""scvi-tools and ours side by side: fresh processes in alternation on the same data, one table per case.

See README.md in this folder for the environments and for how to read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import CASES, Case
from launch import Outcome, available_memory, launch
from table import arithmetic, render

HERE = Path(__file__).resolve().parent
SCRIPTS = {"data": "make_data.py", "peer": "worker_peer.py", "ours": "worker_ours.py", "floor": "floor.py"}
NO_PEER = "scvi-tools was not run: give --peer-python or set PYRO_MULTIVI_PEER_PYTHON (see benchmarks/README.md)."
BATCH_SIZE = 128
# The same for everyone; it costs no time, and with random counts a larger one could diverge.
LEARNING_RATE = 1e-4
# Minibatches of the single epoch that makes a model ready to predict.
_STEPS_BEFORE_PREDICTION = 2


def main() -> None:
    """Measure and print the tables."""
    options = arguments()
    environment = describe_machine(options)
    measured = []
    for name in options.case:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            case, tasks = prepare(CASES[name], Path(folder), options)
            records = list(rounds(case["name"], tasks, options))
        measured.append({"case": case, "records": records})
        print(render(case, records), flush=True)
        # After every case: a long run that ends badly keeps what it has.
        text = as_markdown(environment, measured, with_peer=options.peer_python is not None)
        for path in options.out:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"environment": environment, "cases": measured}
            path.write_text(json.dumps(content, indent=1) if path.suffix == ".json" else text, encoding="utf-8")
    if options.peer_python is None:
        print(NO_PEER)


def arguments() -> argparse.Namespace:
    """Command-line options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=["small"], help="what to measure")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("PYRO_MULTIVI_PEER_PYTHON"),
        help="Python of an environment with scvi-tools; else of PYRO_MULTIVI_PEER_PYTHON; else ours runs alone",
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often everyone runs")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of training; the first is not counted")
    parser.add_argument(
        "--precision",
        action="append",
        choices=["fp32", "fp32+compile", "bf16", "bf16+compile"],
        help="of ours, with compile=True if it ends so; may be repeated (default: fp32)",
    )
    parser.add_argument("--part", nargs="+", choices=["train", "predict"], default=["train", "predict"])
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu", help="of everyone; no floor on gpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of every worker")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("PYRO_MULTIVI_DATA"),
        help="of cell_lines: the h5ad, or the folder with snare_cell_lines.h5ad; else PYRO_MULTIVI_DATA",
    )
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds before a worker is stopped")
    parser.add_argument(
        "--memory-limit", type=float, help="GB at which a worker is stopped (default: 90 %% of what is free)"
    )
    parser.add_argument("--out", type=Path, nargs="+", default=[], help="files to write, .md or .json")
    options = parser.parse_args()
    options.precision = list(dict.fromkeys(options.precision or ["fp32"]))
    for name, least in (("rounds", 1), ("epochs", 2), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} is not allowed: give at least {least}")
    for path in options.out:
        if path.suffix not in (".md", ".json"):
            parser.error(f"--out {path}: the name must end in .md or .json")
    if "cell_lines" in options.case:
        if options.data is None:
            parser.error("cell_lines needs --data or PYRO_MULTIVI_DATA")
        options.data = options.data / "snare_cell_lines.h5ad" if options.data.is_dir() else options.data
        if not options.data.is_file():
            parser.error(f"--data: there is no file {options.data}")
    limit = available_memory() * 0.9 if options.memory_limit is None else options.memory_limit * 1e9
    options.memory_limit = limit
    return options


def prepare(case: Case, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Make the data of a case; returns its sizes and the task of each part."""

    def make(name: str, n_cells: int | None) -> dict[str, Any]:
        print(f"{case.name}: making the data", file=sys.stderr)
        source = {"path": str(options.data)} if n_cells is None else {"random": case.random_data(n_cells)}
        made = start("data", {"folder": str(folder / name), **source}, options)
        if made.result is None:
            sys.exit(f"{case.name}: the data could not be made: {made.detail}")
        return made.result

    sizes = make("train", case.n_train)
    n_train = n_predict = sizes["n_cells"]
    predict_from = "train"
    if "predict" in options.part and case.n_predict != case.n_train:
        n_predict, predict_from = make("predict", case.n_predict)["n_cells"], "predict"
    widths = {"n_hidden": case.n_hidden, "n_latent": case.n_latent, "batch_size": BATCH_SIZE}
    features = {key: sizes[key] for key in ("n_genes", "n_regions")}
    shared = {**widths, **features, "threads": options.threads, "lr": LEARNING_RATE, "accelerator": options.accelerator}
    # Half a cell less: both packages round the number of training cells up.
    few = min(1.0, (_STEPS_BEFORE_PREDICTION * BATCH_SIZE - 0.5) / n_predict)
    tasks = {
        "train": {**shared, "data": str(folder / "train"), "epochs": options.epochs, "train_size": 1.0},
        "predict": {**shared, "data": str(folder / predict_from), "epochs": 1, "train_size": few},
    }
    described = {"name": case.name, **features, "n_train": n_train, "n_predict": n_predict, **widths}
    return described, {part: {"part": part, **tasks[part]} for part in options.part}


def rounds(name: str, tasks: dict[str, dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run everyone in every round, the order turned round each time; yield one record per worker."""
    gave_up: set[tuple[str, str, str]] = set()
    for part, task in tasks.items():
        runs: list[tuple[str, str]] = [("peer", "fp32")] if options.peer_python else []
        floors = set()
        for precision in options.precision:
            runs.append(("ours", precision))
            if part == "train" and options.accelerator == "cpu" and arithmetic(precision) not in floors:
                floors.add(arithmetic(precision))
                runs.append(("floor", arithmetic(precision)))
        for number in range(options.rounds):
            for system, precision in runs if number % 2 == 0 else reversed(runs):
                if (part, system, precision) in gave_up:
                    continue
                print(f"{name}: round {number + 1}, {part}, {system} {precision}", file=sys.stderr)
                outcome = start(system, {**task, "precision": precision}, options)
                if outcome.failed:
                    gave_up.add((part, system, precision))
                yield {"system": system, "precision": precision, "part": part, "round": number, **outcome._asdict()}


def start(system: str, task: dict[str, Any], options: argparse.Namespace) -> Outcome:
    """One worker from start to end."""
    python = options.peer_python if system == "peer" else sys.executable
    command = [python, str(HERE / SCRIPTS[system]), json.dumps(task)]
    environment = environment_of(system != "peer", options.threads)
    return launch(command, environment, options.timeout, options.memory_limit)


def environment_of(ours: bool, threads: int) -> dict[str, str]:
    """Variables of a worker: its threads, and for ours the package of this checkout."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if ours:
        env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**env, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def describe_machine(options: argparse.Namespace) -> dict[str, Any]:
    """Machine and versions, on which the figures depend."""
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if ":" in line
    )
    flags = set(fields.get("flags", "").split())
    return {
        "processor": fields.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        # Of the last minute, before anything of ours ran: other work on the machine spoils the figures.
        "load": round(os.getloadavg()[0], 1),
        "threads": options.threads,
        "rounds": options.rounds,
        "epochs": options.epochs,
        "memory_limit_gb": round(options.memory_limit / 1e9, 1),
    }


def as_markdown(environment: dict[str, Any], measured: list[dict[str, Any]], with_peer: bool) -> str:
    """The whole report."""
    versions: dict[str, set[str]] = {}
    for entry in measured:
        for record in entry["records"]:
            for package, version in (record["result"] or {}).get("versions", {}).items():
                versions.setdefault(package, set()).add(version)
    packages = ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in sorted(versions.items()))
    instructions = ", ".join(environment["instructions"]) or "no vector instructions named"
    head = (
        f"{environment['processor']}, {environment['cores']} cores ({instructions}), "
        f"load before {environment['load']}; {environment['threads']} threads, "
        f"{environment['rounds']} rounds of {environment['epochs']} epochs; {packages}."
    )
    tables = [render(entry["case"], entry["records"]) for entry in measured]
    return "\n".join([head, "", *([] if with_peer else [NO_PEER, ""]), *tables])


if __name__ == "__main__":
    main()
