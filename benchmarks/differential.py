"""Differential accessibility of several groups against the rest: scvi-tools (`peer`) and ours in alternation.

One fresh process per turn, on the same random data; each trains a model for one epoch first.
Only the test itself is timed and its memory watched. Ours is measured with both units: `cell` is
what scvi-tools computes, `group` is our default. Working memory is the peak above what data, model and
training took and above the tables that are returned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch import available_memory, launch

HERE = Path(__file__).resolve().parent
SYSTEMS = ("peer", "ours cell", "ours group")


def main() -> None:
    """Measure, or be one worker."""
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        work(json.loads(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--regions", type=int, nargs="+", default=[20_000, 80_000], help="numbers of regions")
    parser.add_argument("--genes", type=int, default=2_000, help="genes")
    parser.add_argument("--cells", type=int, default=2_000, help="cells")
    parser.add_argument("--groups", type=int, default=5, help="groups, each against the rest")
    parser.add_argument("--samples", type=int, default=5_000, help="draws of each group")
    parser.add_argument("--rounds", type=int, default=3, help="how often everyone runs")
    parser.add_argument("--threads", type=int, default=2, help="threads of every worker")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds before a worker is stopped")
    parser.add_argument("--peer-python", default=os.environ.get("PYRO_MULTIVI_PEER_PYTHON"), help="else ours alone")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    records = []
    for n_regions in options.regions:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            data = {"n_cells": options.cells, "n_genes": options.genes, "n_regions": n_regions}
            data |= {"rna_density": 0.1, "atac_density": 0.05}
            made = start([sys.executable, HERE / "make_data.py"], {"folder": f"{folder}/data", "random": data}, options)
            if made.result is None:
                sys.exit(f"The data could not be made: {made.detail}")
            for number in range(options.rounds):
                # Turned round in every other round, so that nobody always comes first.
                for system in SYSTEMS if number % 2 == 0 else reversed(SYSTEMS):
                    if system == "peer" and options.peer_python is None:
                        continue
                    python = options.peer_python if system == "peer" else sys.executable
                    task = {"system": system, "data": f"{folder}/data", **vars(options), "out": None}
                    outcome = start([python, Path(__file__)], task, options)
                    records.append({"system": system, "n_regions": n_regions, "round": number, **outcome._asdict()})
                    found = outcome.result or outcome.detail
                    print(f"{n_regions} regions, round {number}, {system}: {found}", flush=True)
            print(render(records, n_regions), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(records, indent=1), encoding="utf-8")


def start(command: list[Any], task: dict[str, Any], options: argparse.Namespace) -> Any:
    """One worker as a fresh process."""
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    return launch([*map(str, command), json.dumps(task)], env, options.timeout, 0.9 * available_memory())


def render(records: list[dict[str, Any]], n_regions: int) -> str:
    """Medians over rounds, and the median of the ratios within rounds."""
    lines = [
        f"\n{n_regions} regions",
        "| | seconds | working memory, MB | tables, MB | peer / it, time | peer / it, working memory |",
        "|---|---|---|---|---|---|",
    ]
    mine = [record for record in records if record["n_regions"] == n_regions]

    def results(system: str) -> dict[int, Any]:
        return {one["round"]: one["result"] for one in mine if one["system"] == system and one["result"]}

    peer = results("peer")
    for system in SYSTEMS:
        found = results(system)
        if not found:
            why = next((one["failed"] for one in mine if one["system"] == system), "not run")
            lines.append(f"| {system} | {why} | | | | |")
            continue
        times, working, tables = (
            statistics.median(result[key] for result in found.values())
            for key in ("seconds", "working_bytes", "table_bytes")
        )
        cells = [system, f"{times:.1f}", f"{working / 1e6:.0f}", f"{tables / 1e6:.0f}"]
        for key in ("seconds", "working_bytes"):
            ratios = [peer[number][key] / one[key] for number, one in found.items() if number in peer and one[key] > 0]
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})" if ratios else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def work(job: dict[str, Any]) -> None:
    """Train for a moment, then time the test."""
    import warnings

    warnings.filterwarnings("ignore")
    import numpy as np
    import torch
    from make_data import load
    from measure import Memory, report, seconds

    torch.set_num_threads(job["threads"])
    mdata = load(job["data"])
    mdata.obs["group"] = [f"group_{i % job['groups']}" for i in range(mdata.n_obs)]
    setup = {"modalities": {"rna_layer": "rna", "atac_layer": "atac"}}
    brief = {"max_epochs": 1, "lr": 1e-4, "accelerator": "cpu", "train_size": 1.0, "validation_size": 0.0}
    brief |= {"batch_size": 128, "early_stopping": False}
    arguments: dict[str, Any] = {"groupby": "group", "n_samples_overall": job["samples"]}
    if job["system"] == "peer":
        import scvi

        scvi.model.MULTIVI.setup_mudata(mdata, **setup)
        model = scvi.model.MULTIVI(mdata, n_hidden=128, n_latent=11)
        model.train(**brief, adversarial_mixing=False, enable_progress_bar=False)
        # Its table of several groups cannot be put together (index); one after the other it can.
        groups = sorted(set(mdata.obs["group"]))

        def compare() -> list[Any]:
            return [
                model.differential_accessibility(
                    idx1=(mdata.obs["group"] == group).to_numpy(), silent=True, n_samples_overall=job["samples"]
                )
                for group in groups
            ]

    else:
        import pyro_multivi as pm

        pm.MULTIVI.setup_mudata(mdata, **setup)
        model = pm.MULTIVI(mdata, n_hidden=128, n_latent=11)
        model.train(**brief, progress_bar=False)
        arguments["unit"] = job["system"].removeprefix("ours ")

        def compare() -> list[Any]:
            return [model.differential_accessibility(**arguments)]

    # Above what data, model and training took: what the test itself needs.
    memory = Memory()
    taken, tables = seconds(compare)
    peak, table_bytes = memory.peak(), sum(int(table.memory_usage(index=True).sum()) for table in tables)
    if sum(map(len, tables)) != mdata["atac"].n_vars * job["groups"]:
        raise RuntimeError("the tables do not hold every region once for each group")
    effect = np.concatenate([table["effect_size"] for table in tables])
    if not np.isfinite(effect.astype(float)).all():
        raise RuntimeError("an effect size is not finite")
    sizes = {"peak_bytes": peak, "table_bytes": table_bytes, "working_bytes": max(0, peak - table_bytes)}
    report({"seconds": taken, **sizes, "peak_reset": memory.resettable})


if __name__ == "__main__":
    main()
