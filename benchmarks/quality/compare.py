"""Quality of scvi-tools (`peer`), ours and a linear baseline over data sets and seeds; time to equal quality.

See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from launch import Outcome, available_memory, launch  # noqa: E402
from run import NO_PEER, environment_of  # noqa: E402
from summary import METRICS, render, render_rivals, render_times  # noqa: E402

#: Settings of scvi-tools, without early stopping, as its figures were always taken; its default is the first.
PEERS = {
    "peer, adversary": {"train": {"adversarial_mixing": True, "early_stopping": False}},
    "peer, no adversary": {"train": {"adversarial_mixing": False, "early_stopping": False}},
}
#: Names in regression.py, which runs in the worker.
METHODS = ("canonical correlations", "partial least squares", "ridge")
TO_REACH = (
    "knn_celltype_purity",
    "modality_mixing",
    "atac_imputed_auprc_per_cell",
    "rna_imputed_poisson_nll_per_count",
)
# Between two looks at ours, the number of epochs grows by this factor (at least by one).
_STRIDE = 1.1


def main() -> None:
    """Run the systems, and print tables."""
    options = arguments()
    if options.render:
        records = [json.loads(line) for path in options.render for line in path.read_text().splitlines()]
        print_tables(records, options)
        return
    records = []
    with tempfile.TemporaryDirectory(prefix="quality-") as folder:
        for data in options.data:
            for record in runs(data, Path(folder), options):
                records.append(record)
                if options.out is not None:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
    print_tables(records, options)
    if options.peer_python is None and "peer" in options.systems:
        print(NO_PEER)


def print_tables(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    print(render(records))
    if options.rivals:
        print(render_rivals(records))
    if any((record["result"] or {}).get("checkpoints") for record in records):
        print(render_times(records, options.to_reach))


def arguments() -> argparse.Namespace:
    """Command-line options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["simulated"], help="h5ad files of paired cells, or 'simulated'")
    parser.add_argument("--simulate", type=json.loads, default={}, help="JSON: arguments of simulate_multiome")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the split and of every system")
    parser.add_argument(
        "--systems", nargs="+", choices=["linear", "regression", "peer", "ours"], default=["linear", "peer", "ours"]
    )
    parser.add_argument("--twins", type=float, default=0.0, help="share of the cells that are there twice, see README")
    parser.add_argument("--paired", type=float, help="share of the cells that stays paired (default: a third)")
    parser.add_argument("--rivals", action="store_true", help="also ours beside the best of all other systems")
    parser.add_argument(
        "--ours", action="append", metavar="NAME=JSON", help="a setting of ours, see ours.py; may be repeated"
    )
    parser.add_argument(
        "--peer", action="append", metavar="NAME=JSON", help="a setting of scvi-tools, see peer.py; may be repeated"
    )
    parser.add_argument("--epochs", type=int, help="of ours (default: the package's)")
    parser.add_argument("--peer-epochs", type=int, default=300, help="of scvi-tools")
    parser.add_argument("--batch-key", help="column of obs, given to both and scored as batch_mixing")
    parser.add_argument("--cells", type=int, help="take so many cells of each file")
    parser.add_argument("--peer-python", default=os.environ.get("PYRO_MULTIVI_PEER_PYTHON"), help="else left out")
    parser.add_argument("--time", action="store_true", help="score ours during training: time to equal quality")
    parser.add_argument("--to-reach", nargs="+", choices=list(METRICS), default=list(TO_REACH), help="with --time")
    parser.add_argument("--threads", type=int, default=1, help="threads of every worker")
    parser.add_argument("--timeout", type=float, default=36_000.0, help="seconds before a worker is stopped")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    parser.add_argument("--render", type=Path, nargs="+", help="run nothing: print the tables of such files")
    options = parser.parse_args()
    for name in options.data:
        if name != "simulated" and not Path(name).is_file():
            parser.error(f"--data: there is no file {name}")
    for name in ("ours", "peer"):
        try:
            setattr(options, name, named(getattr(options, name)))
        except ValueError as error:
            parser.error(f"--{name}: {error}")
    options.ours = options.ours or {"ours": {}}
    options.peer = options.peer or PEERS
    return options


def named(texts: list[str] | None) -> dict[str, Any]:
    """Settings by name."""
    found = {}
    for text in texts or []:
        name, equals, setting = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not NAME=JSON")
        found[name] = json.loads(setting)
    return found


def runs(data: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every system for every seed, scvi-tools and ours in alternation; yields one record per run."""
    for number, seed in enumerate(options.seeds):
        path = data
        if data == "simulated":
            path = str(folder / f"simulated-{seed}.h5ad")
            made = start(
                sys.executable, "simulated.py", {"path": path, "seed": seed, "arguments": options.simulate}, options
            )
            if made.failed:
                sys.exit(f"The simulated cells could not be made: {made.detail}")
        turns = list(systems(options))
        # Turned round in every other seed, so that nobody always comes first; ours needs no target to be timed.
        for name, kind, epochs, settings in turns if number % 2 == 0 else reversed(turns):
            print(f"{Path(path).stem}, seed {seed}: {name}", file=sys.stderr, flush=True)
            watched = options.time and kind == "ours"
            job = {
                "system": kind,
                "data": path,
                "n_cells": options.cells,
                "seed": seed,
                "epochs": epochs,
                "settings": settings,
                "batch_key": options.batch_key,
                "twins": options.twins,
                "paired": options.paired,
                "threads": options.threads,
                "checkpoints": list(checkpoints(epochs)) if watched else None,
                "scored": options.to_reach,
            }
            outcome = start(options.peer_python if kind == "peer" else sys.executable, "worker.py", job, options)
            yield {
                "data": Path(data).stem, "seed": seed, "system": name, "kind": kind, "settings": settings,
                **outcome._asdict(),
            }  # fmt: skip


def systems(options: argparse.Namespace) -> Iterator[tuple[str, str, int | None, dict[str, Any]]]:
    """Name, kind (which is the module), epochs and settings of each system."""
    if "linear" in options.systems:
        yield "linear", "linear", None, {}
    if "regression" in options.systems:
        for name in METHODS:
            yield name, "regression", None, {"method": name}
    if "peer" in options.systems and options.peer_python is not None:
        for name, settings in options.peer.items():
            batch = {} if options.batch_key is None else {"batch_key": options.batch_key}
            yield name, "peer", options.peer_epochs, {**batch, **settings}
    if "ours" in options.systems:
        for name, settings in options.ours.items():
            batch = {} if options.batch_key is None else {"batch_key": options.batch_key}
            yield name, "ours", options.epochs, {**settings, "setup": {**batch, **settings.get("setup", {})}}


def checkpoints(epochs: int | None) -> Iterator[int]:
    """Epochs after which ours is scored."""
    at = 1
    while at <= (epochs or 1000):
        yield at
        at = max(at + 1, round(at * _STRIDE))


def start(python: str, script: str, task: dict[str, Any], options: argparse.Namespace) -> Outcome:
    """One worker from start to end."""
    environment = environment_of(python == sys.executable, options.threads)
    command = [python, str(HERE / script), json.dumps(task)]
    return launch(command, environment, options.timeout, 0.9 * available_memory())


if __name__ == "__main__":
    main()
