"""Cells that all have both modalities: ours against each modality alone, their concatenation and WNN.

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

from compare import PEERS, named, start  # noqa: E402
from summary import PAIRED_METRICS, render_rivals  # noqa: E402

#: Systems without training, as paired_worker.py names them.
RIVALS = ("RNA", "ATAC", "concatenation", "WNN")


def main() -> None:
    """Train, score, and print tables."""
    options = arguments()
    if options.render:
        records = [json.loads(line) for path in options.render for line in path.read_text().splitlines()]
        print(render_rivals(records, PAIRED_METRICS, every=True))
        return
    records = []
    with tempfile.TemporaryDirectory(prefix="paired-") as folder:
        kept = options.latents or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        for data in options.data:
            found = list(runs(data, kept, options))
            records += found
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with options.out.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(record) + "\n" for record in found)
    print(render_rivals(records, PAIRED_METRICS, every=True))


def arguments() -> argparse.Namespace:
    """Command-line options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="h5ad files of paired cells")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of systems, Leiden, labels")
    parser.add_argument("--score-python", help="Python of an environment with scanpy, igraph and muon")
    parser.add_argument("--peer-python", default=os.environ.get("PYRO_MULTIVI_PEER_PYTHON"), help="else left out")
    parser.add_argument("--peer-epochs", type=int, default=300, help="of scvi-tools")
    parser.add_argument(
        "--ours", action="append", metavar="NAME=JSON", help="a setting of ours, see ours.py; may be repeated"
    )
    parser.add_argument("--epochs", type=int, help="of ours (default: the package's)")
    parser.add_argument("--batch-key", help="column of obs: adds ours with it, and is scored as batch_mixing")
    parser.add_argument("--cells", type=int, help="take so many cells of each file")
    parser.add_argument("--unlabelled", nargs="*", default=["Mis"], help="types that mean no type; not scored")
    parser.add_argument("--latents", type=Path, help="folder to keep latent spaces in; those that are there are used")
    parser.add_argument("--threads", type=int, default=1, help="threads of every worker")
    parser.add_argument("--timeout", type=float, default=36_000.0, help="seconds before a worker is stopped")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    parser.add_argument("--render", type=Path, nargs="+", help="run nothing: print the tables of such files")
    options = parser.parse_args()
    if not options.render and (not options.data or options.score_python is None):
        parser.error("--data and --score-python are needed, or --render")
    for name in options.data:
        if not Path(name).is_file():
            parser.error(f"--data: there is no file {name}")
    try:
        options.ours = named(options.ours) or {"ours": {}}
    except ValueError as error:
        parser.error(f"--ours: {error}")
    return options


def trained(options: argparse.Namespace) -> Iterator[tuple[str, str, int | None, dict[str, Any]]]:
    """Name, kind, epochs and settings of each system that is trained."""
    for name, settings in options.ours.items():
        yield name, "ours", options.epochs, settings
        if options.batch_key is not None:
            setup = {**settings.get("setup", {}), "batch_key": options.batch_key}
            yield f"{name}, batches", "ours", options.epochs, {**settings, "setup": setup}
    if options.peer_python is not None:
        for name, settings in PEERS.items():
            yield name, "peer", options.peer_epochs, settings


def runs(data: str, folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every system for every seed; yields one record per run."""
    common = {"data": data, "n_cells": options.cells, "threads": options.threads}
    waiting, failed = [], []
    for name, kind, epochs, settings in trained(options):
        for seed in options.seeds:
            record = {"data": Path(data).stem, "seed": seed, "system": name, "kind": kind, "settings": settings}
            latent = folder / f"{Path(data).stem}-{name}-{seed}.npy"
            times: dict[str, Any] = {}
            if not latent.exists():
                print(f"{Path(data).stem}, seed {seed}: {name}", file=sys.stderr, flush=True)
                job = {"stage": "fit", "system": kind, "seed": seed, "epochs": epochs, "settings": settings}
                python = options.peer_python if kind == "peer" else sys.executable
                outcome = start(python, "paired_worker.py", {**common, **job, "latent": str(latent)}, options)
                if outcome.result is None:
                    failed.append({**record, **outcome._asdict()})
                    continue
                times = outcome.result
            waiting.append(({**record, "latent": str(latent)}, times))
    for name in RIVALS:
        for seed in options.seeds:
            waiting.append(
                ({"data": Path(data).stem, "seed": seed, "system": name, "kind": "rival", "latent": None}, {})
            )
    print(f"{Path(data).stem}: scores", file=sys.stderr, flush=True)
    asked = [{key: record[key] for key in ("system", "seed", "latent")} for record, _ in waiting]
    job = {"stage": "score", "runs": asked, "batch_key": options.batch_key, "unlabelled": options.unlabelled}
    outcome = start(options.score_python, "paired_worker.py", {**common, **job}, options)
    yield from failed
    for number, (record, times) in enumerate(waiting):
        result = None if outcome.result is None else {**outcome.result["runs"][number], **times}
        yield {**record, **outcome._asdict(), "result": result}


if __name__ == "__main__":
    main()
