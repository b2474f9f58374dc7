"""``pyro-multivi differential``: features in which groups of cells differ, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyro_multivi.cli.inputs import load_model
from pyro_multivi.cli.outputs.folder import check_table, write_table
from pyro_multivi.data.modality import PROTEIN, modelled
from pyro_multivi.processes.group import distributed


def differential(options: argparse.Namespace) -> None:
    """Compare groups of cells and write a table."""
    out: Path = options.out
    check_table(out, options.overwrite)
    model = load_model(options)
    modality = options.modality or modelled(model.spec)[0].name
    compare = getattr(model, f"differential_{'protein_expression' if modality == PROTEIN else modality}")
    with distributed() as processes:
        table = compare(
            groupby=options.groupby,
            group1=options.group1,
            group2=options.group2,
            mode=options.mode,
            delta="default" if options.delta is None else options.delta,
            batch_correction=options.batch_correction,
            fdr_target=options.fdr_target,
            silent=options.quiet,
            unit=options.unit,
            n_samples=options.n_samples,
            seed=options.seed,
        )
    if not processes.is_first:
        return
    # A feature has a row in each comparison: a column, unlike an index, need not be unique.
    table = table.rename_axis("feature").reset_index()
    write_table(table, out)
    called = next((name for name in map(str, table) if name.startswith(("is_de_fdr", "is_da_fdr"))), None)
    for comparison, rows in table.groupby("comparison", sort=False):
        found = "" if called is None else f": {int(rows[called].sum())} called at FDR {options.fdr_target:g}"
        batches = table.attrs["batches"][comparison][0]
        found += "" if batches is None else f", decoded in {', '.join(batches)}"
        covariates = table.attrs["covariates"][comparison]
        found += f", at the same {', '.join(covariates)}" if covariates else ""
        print(f"  {comparison}, {len(rows)} features{found}")
    print(f"written to {out}")
