"""Train in 1, 2 and 3 processes at the same batch size: loss, steps per second and efficiency.

    python benchmarks/distributed.py --processes 1 2 3

Each run is a torchrun of its own (Gloo) on the same simulated cells. With fewer cores than processes they share cores,
so that efficiency says what is lost to sharing, not what several machines would gain.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyro_multivi as pm


def main() -> int:
    """Start the runs and print a table; 1 if losses differ by more than the tolerance."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--cells", type=int, default=3000)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--regions", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest relative difference of ELBOs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        _train(options)
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in options.processes:
            out = Path(folder) / f"{number}.json"
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
            command = [sys.executable, *launch, __file__, *sys.argv[1:], "--worker", str(out)]
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
            found[number] = json.loads(out.read_text())
    return report(found, os.cpu_count() or 1, options.tolerance)


def report(found: dict[int, dict[str, float]], n_cores: int, tolerance: float) -> int:
    """Print a table; 1 if a loss differs from that of the fewest processes by more than the tolerance, else 0."""
    least = min(found)
    base = found[least]
    print(f"{n_cores} cores\nprocesses  -elbo train  -elbo validation  steps/s  efficiency")
    worst = 0.0
    for number, row in sorted(found.items()):
        worst = max(worst, abs(row["elbo_validation"] / base["elbo_validation"] - 1))
        # Of ideal speed: as many times that of one process as there are processes, or cores.
        ideal = base["steps"] * min(number, n_cores) / min(least, n_cores)
        print(
            f"{number:9d}  {row['elbo_train']:11.2f}  {row['elbo_validation']:16.2f}  {row['steps']:7.2f}  "
            f"{row['steps'] / ideal:9.0%}"
        )
    print(f"validation losses differ by {worst:.2%} at most")
    return int(worst > tolerance)


def _train(options: argparse.Namespace) -> None:
    third = options.cells // 3
    adata = pm.simulate_multiome((third, third, third), n_genes=options.genes, n_regions=options.regions, seed=0)
    pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    model = pm.MULTIVI(adata)
    model.train(options.epochs, batch_size=options.batch_size, progress_bar=False, early_stopping=False)
    rows = {name: frame[name] for name, frame in model.history.items()}
    steps = -(-int(0.9 * options.cells) // options.batch_size)
    row = {
        "elbo_train": float(rows["elbo_train"].iloc[-1]),
        "elbo_validation": float(rows["elbo_validation"].iloc[-1]),
        # The first epoch holds what is made once.
        "steps": steps / float(rows["seconds"].iloc[1:].median()),
    }
    if os.environ.get("RANK", "0") == "0":
        options.worker.write_text(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
