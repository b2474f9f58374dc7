"""``pyro-multivi check``: replicates of a saved model against its data."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.cli.outputs import refuse_existing
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.readers import read
from pyro_multivi.plots.report import PAGE, check_and_report
from pyro_multivi.posterior.checks.result import CSV_FILES


def check(options: argparse.Namespace) -> None:
    """Compare a saved model with data, print the result and write tables and a page."""
    refuse_existing(options.out, (*CSV_FILES, PAGE), options.overwrite)
    data = None
    if options.data is not None:
        built_in = options.data == "demo" and not Path(options.data).exists()
        data = cell_lines() if built_in else read(options.data)
    model = MULTIVI.load(options.model, data)
    if model.adata is None:
        raise ValueError(f"{str(options.model)!r} holds no data: give DATA, a file or 'demo' for the built-in cells.")
    check, written = check_and_report(
        model,
        options.out,
        labels=options.labels,
        n_samples=options.n_samples,
        held_out=not options.all_cells,
        hidden_depth=options.hidden_depth,
        seed=options.seed,
    )
    for name in set(CSV_FILES) - set(written):
        # A table of an earlier run would be taken for one of this check.
        (options.out / name).unlink(missing_ok=True)
    print(check)
    print(f"written to {options.out}: {', '.join(written)}")
