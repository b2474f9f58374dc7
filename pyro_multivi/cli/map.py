"""``pyro-multivi map``: cells of a query placed among those of a saved model, and labels carried over to them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.cli.inputs import caution_of_reads, data_for, load_model, spec_of
from pyro_multivi.cli.outputs.folder import check_table, end_if_interrupted, write_table
from pyro_multivi.processes.group import distributed


def map_query(options: argparse.Namespace) -> None:
    """Map a query onto a saved model and write a table of its cells."""
    out: Path = options.out
    check_table(out, options.overwrite)
    if options.reference and options.labels is None:
        raise ValueError("--reference gives the cells whose --labels are carried over: give --labels KEY too.")
    spec = spec_of(options.model)
    query = data_for(spec, options.query, options)
    _state_batch(query, spec.setup.batch_key, options.batch)
    if options.labels is None:
        reference = MULTIVI.load(options.model)
    else:
        # The reference's own cells, of which only the labels and states are needed.
        own = {"data": options.reference, "feature_type": None, "min_counts": 0, "round": False}
        reference = load_model(argparse.Namespace(**{**vars(options), **own}))
    with distributed() as processes:
        mapped = MULTIVI.load_query_data(query, reference, freeze_expression=not options.align)
        caution_of_reads(mapped, options)
        print(mapped.query_report)
        if options.max_epochs or options.align:
            mapped.train(options.max_epochs or None, seed=options.seed, progress_bar=not options.quiet)
        latent = np.asarray(mapped.get_latent_representation())
        columns = [f"z{number + 1}" for number in range(latent.shape[1])]
        table = pd.DataFrame(latent, index=pd.Index(query.obs_names, name="cell"), columns=columns)
        if options.labels is not None:
            chosen = {name: getattr(options, name) for name in ("n_neighbors", "threshold", "alpha")}
            labels = reference.transfer_labels(mapped, options.labels, **chosen)
            table = table.join(labels)
            for label, size in labels["label"].value_counts().items():
                if size:
                    print(f"  {label}: {size} cells")
    if processes.is_first:
        write_table(table.reset_index(), out)
    print(f"written to {out}")
    end_if_interrupted(mapped)


def _state_batch(query: Any, key: str | None, batch: str | None) -> None:
    """Write the batch of all cells that ``--batch`` states."""
    if batch is None:
        if key is not None and key not in query.obs:
            raise ValueError(
                f"the query has no column {key!r} of batches: give --batch NAME, what its cells are called."
            )
        return
    if key is None:
        raise ValueError(f"--batch {batch}: the model was trained without batches. Leave --batch out.")
    if key in query.obs:
        raise ValueError(f"--batch {batch}: the query has a column {key!r} of batches. Leave --batch out.")
    query.obs[key] = batch
