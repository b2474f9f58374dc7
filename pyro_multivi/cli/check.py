"""``pyro-multivi check``: replicates of a saved model against its data."""

from __future__ import annotations

import argparse
from contextlib import ExitStack

from pyro_multivi.cli.inputs import load_model
from pyro_multivi.cli.outputs.folder import folder_to_write, refuse_existing
from pyro_multivi.plots.report import PAGE, check_and_report
from pyro_multivi.posterior.checks.result import CSV_FILES
from pyro_multivi.processes.group import distributed

#: Everything that may be written to the folder.
FILES = (*CSV_FILES, PAGE)


def check(options: argparse.Namespace) -> None:
    """Compare a saved model with data, print the result and write tables and a page."""
    refuse_existing(options.out, FILES, options.overwrite)
    model = load_model(options)
    with ExitStack() as stack:
        with distributed() as processes:
            processes.on_first(lambda: stack.enter_context(folder_to_write(options.out, FILES, options.overwrite)))
            check, written = check_and_report(
                model,
                options.out,
                labels=options.labels,
                n_samples=options.n_samples,
                held_out=not options.all_cells,
                hidden_depth=options.hidden_depth,
                seed=options.seed,
            )
        if not processes.is_first:
            return
        for name in set(CSV_FILES) - set(written):
            # A table of an earlier run would be taken for one of this check.
            (options.out / name).unlink(missing_ok=True)
    print(check)
    print(f"written to {options.out}: {', '.join(written)}")
