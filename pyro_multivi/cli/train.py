"""``pyro-multivi demo`` and ``train``: a trained model, tables and a picture of it."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.cli.filters import at_least, count_fragments, prepare
from pyro_multivi.cli.inputs import (
    feature_types,
    modality_names,
    named_paths,
    open_cells,
    read_cells,
    read_samples,
    state_features,
    words_given,
)
from pyro_multivi.cli.messages import in_options
from pyro_multivi.cli.outputs.folder import (
    check_model_folder,
    end_if_interrupted,
    folder_to_write,
    refuse_existing,
    save_model,
)
from pyro_multivi.cli.outputs.picture import first_picture
from pyro_multivi.cli.outputs.record import RECORD, Record, is_done
from pyro_multivi.data.checks import check_number, nearest
from pyro_multivi.data.modality import MODALITIES
from pyro_multivi.data.setup.options import UNS_KEY, Setup
from pyro_multivi.data.setup.register import PROTEIN_LAYER, with_feature_types
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.readers import sample_name
from pyro_multivi.datasets.samples import MODALITY_KEY
from pyro_multivi.files import write_whole
from pyro_multivi.plots.latent import is_continuous
from pyro_multivi.posterior.quantities.neighbour_purity import neighbour_purity
from pyro_multivi.processes.group import distributed, is_first_process
from pyro_multivi.training import FitOptions
from pyro_multivi.training.checkpoints.folder import Checkpoints
from pyro_multivi.training.cost.estimate import TrainingCost

#: Everything that is written to the folder.
OUTPUTS = ("model", "latent.csv", "history.csv", "figures.json", "latent.png", RECORD)


def demo(options: argparse.Namespace) -> None:
    """Analyse the built-in cells."""
    begun = _begin(options, {})
    if begun is None:
        return
    options, adata = begun, cell_lines()
    print("SNARE-seq of four human cell lines (Chen et al. 2019, GSE126074), shipped with the package.")
    print(MULTIVI.setup_anndata(adata))
    _analyse(MULTIVI(adata, seed=options.seed), adata, options)


def train(options: argparse.Namespace) -> None:
    """Train on one file or several samples and write what was learned."""
    samples = named_paths(options.data)
    if options.batch_from_file and options.batch_key is not None:
        raise ValueError("--batch-from-file and --batch-key both say what the batches are: give one of them.")
    if options.protein is not None and (options.from_disk or samples is not None or options.batch_from_file):
        raise ValueError(
            f"--protein {options.protein}: proteins are read of one file in memory, not of several samples nor "
            "--from-disk. Write one .h5ad or .h5mu of them first."
        )
    named = samples or {sample_name(options.data[0]): options.data[0]}
    begun = _begin(options, named)
    if begun is None:
        return
    options = begun
    joins = not options.from_disk and (samples is not None or options.batch_from_file)
    key, batch_key = options.feature_type_key, options.batch_key
    modality_key = options.modality_key or (MODALITY_KEY if joins else None)
    if options.from_disk:
        data = open_cells(options)
    elif joins:
        whole = Setup("anndata", options.layer, options.layer, modality_key=modality_key, feature_type_key=key)
        data = read_samples(named, with_feature_types(whole, words_given(options)), options, features=options.features)
    else:
        data = read_cells(options.data[0])
        state_features(data, key, options)
    if options.batch_from_file:
        batch_key = data.uns[UNS_KEY]["samples"].index.name
    elif batch_key is None and samples is not None:
        print("all samples are one batch; --batch-from-file makes each a batch of its own")
    keys: dict[str, Any] = {
        "batch_key": batch_key,
        "modality_key": modality_key,
        "categorical_covariate_keys": options.categorical_covariate or None,
        "continuous_covariate_keys": options.continuous_covariate or None,
        "feature_masks": options.feature_masks,
        "panel_key": options.panel_key,
    }
    kind = "anndata" if isinstance(data, AnnData) else "mudata"
    more, places = (_keys_of_anndata if kind == "anndata" else _keys_of_mudata)(data, options)
    setup = Setup(kind, options.layer, options.layer, modality_key=modality_key, feature_type_key=key, **places)
    if not joins:
        count_fragments(data, setup, options)
    data = prepare(data, setup, options, at_least(options.min_fraction))
    with warnings.catch_warnings():
        # They are among the notes of the report.
        warnings.simplefilter("ignore", UserWarning)
        report = getattr(MULTIVI, f"setup_{kind}")(data, **keys, **more)
    print(in_options(report, vars(options)))
    model = MULTIVI(
        data,
        n_latent=options.n_latent,
        n_hidden=options.n_hidden,
        gene_likelihood=options.gene_likelihood,
        accessibility_likelihood=options.accessibility_likelihood,
        fully_paired=options.fully_paired,
        mixing_weight=options.mixing_weight,
        contrast_weight=options.contrast_weight,
        latent_prior=options.latent_prior,
        seed=options.seed,
    )
    _analyse(model, data, options)


def _keys_of_anndata(adata: AnnData, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``setup_anndata`` that ``setup_mudata`` has not, and fields of :class:`Setup`, where counts lie."""
    # Several stores are joined under the usual words.
    joined_stores = options.from_disk and "samples" in adata.uns[UNS_KEY]
    words = {} if joined_stores else feature_types(adata, options.feature_type_key, options)
    keys = {
        "layer": options.layer,
        "feature_type_key": options.feature_type_key,
        "feature_type_values": words,
        "protein_expression_obsm_key": options.protein,
    }
    return keys, {f"{each.feature}_types": (words[each.features],) for each in MODALITIES if each.features in words}


def _keys_of_mudata(mdata: Any, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of ``setup_mudata`` that ``setup_anndata`` has not, and fields of :class:`Setup`, where counts lie."""
    names = modality_names(mdata, options)
    modalities = {f"{modality.key}_layer": name for modality, name in names.items()}
    keys: dict[str, Any] = dict.fromkeys(modalities, options.layer)
    if options.protein is not None:
        modalities[PROTEIN_LAYER] = options.protein
    return {**keys, "modalities": modalities}, {f"{each.key}_modality": name for each, name in names.items()}


def _begin(options: argparse.Namespace, samples: Mapping[str, str]) -> argparse.Namespace | None:
    """Check, before any work, what is there; None if an earlier run of the same command has done it all.

    The options returned hold the record of this run, and say to replace what an earlier one had only begun to write.
    """
    Checkpoints.wanted(options.checkpoint, options.checkpoint_every, options.resume)
    record, done = None, None

    def look() -> None:
        nonlocal record, done
        goes_on = options.resume and not options.overwrite
        # Before the files are read for their checksums.
        refuse_existing(options.out, OUTPUTS, options.overwrite or goes_on)
        record = Record.of(options, samples)
        if goes_on:
            done = is_done(record, options.out, OUTPUTS)

    # The folder may be on the machine of the first process alone.
    with distributed() as processes:
        processes.on_first(look)
        ends = processes.any(done is True)[0]
    if ends:
        print(f"{options.out} holds all that this command writes: nothing is left to do. --overwrite does it again.")
        return None
    if done is False:
        print(f"{options.out} holds what this command had begun to write, which is replaced.")
    return argparse.Namespace(**{**vars(options), "overwrite": options.overwrite or done is not None, "record": record})


def _cost(model: MULTIVI, options: argparse.Namespace, timed: bool) -> TrainingCost:
    names = ("max_epochs", "lr", "precision", "compile")
    check_number("max_epochs", options.max_epochs, least=1)
    chosen = FitOptions(**{name: getattr(options, name) for name in names})
    return model._training_cost(
        options.accelerator,
        options.batch_size,
        chosen,
        options.seed,
        checkpoint=options.checkpoint is not None,
        timed=timed,
    )


def _say_cost(model: MULTIVI, options: argparse.Namespace) -> None:
    """Print what training would take, from a few steps of it."""
    cost = _cost(model, options, timed=True)
    print(cost)
    for each in cost.shortages(options.out):
        print(f"will not fit: {each}")
    print("dry run: nothing is written")


def _warn_of_shortage(model: MULTIVI, options: argparse.Namespace) -> None:
    """Say before a run that will not fit what it takes."""
    cost = _cost(model, options, timed=False)
    short = cost.shortages(options.out)
    if short:
        print(f"this run will not fit: {'; '.join(short)}\n{cost}\n--dry-run says this, with the time, and ends")


def _analyse(model: MULTIVI, data: Any, options: argparse.Namespace) -> None:
    """Train, then write the model, the latent space, the history, figures and a picture."""
    out: Path = options.out
    labels = None
    if options.labels is not None:
        if options.labels not in data.obs:
            raise KeyError(
                f"--labels {options.labels!r} is not a column of obs; there are {', '.join(data.obs)}. "
                f"{nearest(options.labels, data.obs).partition('Known')[0]}"
            )
        labels = data.obs[options.labels]
    print(model)
    if options.dry_run:
        _say_cost(model, options)
        return
    with ExitStack() as stack:

        def take_folder() -> None:
            stack.enter_context(folder_to_write(out, OUTPUTS, options.overwrite))
            check_model_folder(model, out / "model")

        with distributed() as processes:
            processes.on_first(take_folder)
            _warn_of_shortage(model, options)
            started = time.perf_counter()
            model.train(
                max_epochs=options.max_epochs,
                batch_size=options.batch_size,
                lr=options.lr,
                seed=options.seed,
                accelerator=options.accelerator,
                precision=options.precision,
                compile=options.compile,
                progress_bar=not options.quiet,
                checkpoint=options.checkpoint,
                checkpoint_every=options.checkpoint_every,
                resume=options.resume,
            )
        if is_first_process():
            _write(model, data, labels, options, started)
    end_if_interrupted(model)


def _write(model: MULTIVI, data: Any, labels: Any, options: argparse.Namespace, started: float) -> None:
    """Write what was learned since a time of :func:`time.perf_counter`; labels are a column of obs or None."""
    out: Path = options.out
    record: Record = options.record
    # One of an earlier run would be taken for that of this model.
    (out / RECORD).unlink(missing_ok=True)
    # Before anything that may fail.
    saved = save_model(model, out / "model", options.overwrite, options.from_disk)
    # At once: what follows may fail, for instance where the disk is full.
    print(f"the model is saved: {saved}")
    written = [f"{saved.name}/"]
    record.write(out)
    if not model.history:  # interrupted in its first epoch
        print(f"written to {out}: {', '.join(written)}")
        return
    latent = np.asarray(model.get_latent_representation())
    figures: dict[str, float] = {
        "cells": len(latent),
        "epochs": len(model.history["train_loss"]),
        "training_seconds": round(time.perf_counter() - started, 1),
        "elbo_per_cell": model.get_elbo(),
        **model.get_reconstruction_error(),
    }
    labelled = np.zeros(len(latent), bool) if labels is None or is_continuous(labels) else labels.notna().to_numpy()
    if labels is not None and labelled.sum() > 30:
        names = labels[labelled].astype(str).to_numpy()
        figures["neighbour_purity_30"] = neighbour_purity(latent[labelled], names, 30)
        shares = pd.Series(names).value_counts(normalize=True)
        figures["neighbour_purity_chance"] = float((shares**2).sum())
    columns = [f"z{number + 1}" for number in range(latent.shape[1])]
    table = pd.DataFrame(latent, index=pd.Index(data.obs_names, name="cell"), columns=columns)
    for name, text in {
        "latent.csv": table.to_csv(),
        "history.csv": pd.concat(model.history.values(), axis=1).to_csv(),
        "figures.json": json.dumps(figures, indent=1) + "\n",
    }.items():
        write_whole(out / name, text.encode())
        written.append(name)
    drawn = first_picture(model, latent, None if labels is None else {options.labels: labels}, options.seed)
    if drawn is None:
        # One of an earlier run would be taken for one of this model.
        (out / "latent.png").unlink(missing_ok=True)
    else:
        write_whole(out / "latent.png", drawn)
        written.append("latent.png")
    # One that was interrupted is gone on with.
    record.write(out, () if model._history.interrupted else written)
    for name, value in figures.items():
        print(f"  {name:40s} {value:.4g}" if isinstance(value, float) else f"  {name:40s} {value}")
    print(f"written to {out}: {', '.join([*written, RECORD])}")
