"""Inputs of a command: cells of files, and saved models with their data."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.api.saving.description import Description
from pyro_multivi.api.saving.folder import read_model
from pyro_multivi.cli.filters import count_fragments, prepare
from pyro_multivi.data.checks import caution, first_names, nearest
from pyro_multivi.data.fragments.checks import fragment_cautions
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.data.setup.options import UNS_KEY, Setup
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.vocabulary import feature_type_column, spelled
from pyro_multivi.datasets.assembly import existing
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.readers import read, sample_name
from pyro_multivi.datasets.samples import cells_of, joined, naming, refuse_repeated, setup_of
from pyro_multivi.datasets.stores.open import open_stores, open_with_keys

#: Columns for the names of samples: the first that no file has with other values.
SAMPLE_KEYS = ("sample", "file")


def read_cells(path: str) -> AnnData | Any:  # Any: a MuData
    """Cells of a file, with names made unique as the readers of 10x files do; what changed is printed."""
    with warnings.catch_warnings():
        # What is made of them is printed.
        warnings.filterwarnings("ignore", "(Observation|Variable) names are not unique", UserWarning)
        data = read(path)
    for part in data.mod.values() if hasattr(data, "mod") else [data]:
        repeated = int(part.var_names.duplicated().sum())
        if repeated:
            part.var_names_make_unique()
            print(f"{repeated} names of features occur more than once: each got -1, -2, ... behind it.")
    if isinstance(data, AnnData):
        repeated = int(data.obs_names.duplicated().sum())
        if repeated:
            data.obs_names_make_unique()
            print(f"{repeated} names of cells occur more than once: each got -1, -2, ... behind it.")
    else:
        data.obs = cells_of(data)
    return data


def named_paths(paths: Sequence[str]) -> dict[str, str] | None:
    """Paths of samples by name, as NAME=PATH or the path says; None for one path without a name: nothing to join."""
    pairs = []
    for path in paths:
        name, sign, rest = path.partition("=")  # A path may hold the sign too.
        stated = bool(name and sign) and not Path(path).exists()
        pairs.append((name, rest) if stated else (sample_name(path), path))
    if [path for _, path in pairs] == [*paths] and len(paths) == 1:
        return None
    given = [Path(path).resolve() for _, path in pairs]
    twice = next((path for path in given if given.count(path) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given more than once: its cells would count as those of several samples.")
    refuse_repeated([name for name, _ in pairs])
    return dict(pairs)


def read_samples(
    paths: Mapping[str, str],
    setup: Setup,
    options: argparse.Namespace,
    names_needed: bool = True,
    features: str = "intersection",
) -> AnnData:
    """Join the samples of several files, without the cells that options leave out; what was kept is printed.

    The words for feature types that the setup gives are also the names of modalities in an ``.h5mu``. Files for a saved
    model may be some of those that it was trained on, and need not have all the names of its setup.
    """
    setup = replace(setup, kind="anndata")
    given = {each: setup.types_of(each)[0] for each in MODALITIES if setup.types_of(each) != each.feature_types}
    places = {f"{modality.key}_layer": word for modality, word in given.items()}
    unstated = []
    for path in paths.values():
        existing(path)  # Before the first of them is read.

    def prepared() -> Iterator[tuple[str, Any]]:
        for name, path in paths.items():
            print(f"sample {name!r}: {path}")
            data = read_cells(path)
            if isinstance(data, AnnData) and feature_type_column(setup.feature_type_key, data.var) not in data.var:
                state_features(data, setup.feature_type_key, options)
                unstated.append(name)
            with naming(name):
                own = setup_of(data, setup, places)
                count_fragments(data, own, options)
                yield name, prepare(data, own, options, lambda counts, _: np.ones(len(counts.columns), bool))

    joined_cells = joined(prepared(), setup, SAMPLE_KEYS, features, modalities=places, names_needed=names_needed)
    if options.feature_type is not None and not unstated:
        raise ValueError(f"--feature-type {options.feature_type}: every file says the types of its features.")
    print(f"kept of each sample:\n{joined_cells.uns[UNS_KEY]['samples'].to_string()}")
    return joined_cells


def open_cells(options: argparse.Namespace) -> AnnData:
    """Cells whose counts stay on disk, of one store or of several with the names of their samples."""
    refused = {
        "--round": (options.round, "the files are never written to; round their counts, or leave --from-disk out"),
        "--reads-to-fragments": (options.reads_to_fragments, "the files are never written to; leave one of them out"),
        "--feature-type": (options.feature_type, "write the types into var of the file, or leave --from-disk out"),
        "--features union": (options.features == "union", "masks are for counts in memory; leave one of them out"),
    }
    for option, (given, mend) in refused.items():
        if given:
            raise ValueError(f"--from-disk does not go with {option}: {mend}.")
    samples = named_paths(options.data)
    if samples is None:
        if not options.batch_from_file:
            return open_stores(options.data[0], layer=options.layer)
        samples = {sample_name(options.data[0]): options.data[0]}
    data = open_with_keys(samples, options.layer, SAMPLE_KEYS, options.feature_type_key, words_given(options) or None)
    print(f"kept of each sample:\n{data.uns[UNS_KEY]['samples'].to_string()}")
    return data


def load_model(options: argparse.Namespace) -> MULTIVI:
    """The saved model that a command is given, with its data."""
    data = None
    changes = ("feature_type", "min_counts", "round", "reads_to_fragments")
    given = [f"--{name.replace('_', '-')}" for name in changes if getattr(options, name)]
    if given and not options.data:
        raise ValueError(f"{' and '.join(given)} change the cells of DATA, and none are given: name their file.")
    if options.data == ["demo"] and not Path("demo").exists():
        data = cell_lines()
    elif options.data:
        data = data_for(spec_of(options.model), options.data, options)
    model = MULTIVI.load(options.model, data)
    if model.adata is None:
        how = (
            "--reference DATA, the file of its cells"
            if "reference" in options
            else "DATA, the file of the cells, after it"
        )
        raise ValueError(f"{str(options.model)!r} holds no data: give {how}.")
    if data is not None:
        caution_of_reads(model, options)
    return model


def caution_of_reads(model: MULTIVI, options: argparse.Namespace) -> None:
    """Warn of data of a model of fragments that are hardly such, as ``train`` does."""
    if model.program.config.counts_fragments and model._table is not None and not options.reads_to_fragments:
        for sentence in fragment_cautions(model._table):
            caution(sentence)


def spec_of(model: Path) -> DataSpec:
    """Specification of a saved model."""
    return Description.of(read_model(model), f"dir_path={str(model)!r}").spec


def data_for(spec: DataSpec, paths: Sequence[str], options: argparse.Namespace) -> Any:
    """Cells of one or several files for a saved model: an AnnData or a MuData."""
    samples, key = named_paths(paths), spec.setup.batch_key
    if samples is None:
        data = read_cells(paths[0])
        if key in SAMPLE_KEYS and key not in data.obs:
            data.obs[key] = sample_name(paths[0])
        state_features(data, spec.setup.feature_type_key, options)
        count_fragments(data, spec.setup, options)
    else:
        features = "intersection" if spec.setup.feature_masks is None else "union"
        data = read_samples(samples, spec.setup, options, names_needed=False, features=features)
    if options.feature_type or options.min_counts or options.round:
        names = {modality: modality.feature_names_in(spec) for modality in MODALITIES}
        data = prepare(data, spec.setup, options, lambda counts, _: counts.features.isin(names[counts.modality]))
    return data


def state_features(data: Any, key: str, options: argparse.Namespace) -> None:
    """Write the type of all features that ``--feature-type`` states, where a file does not say it."""
    if options.feature_type is None:
        return
    if not isinstance(data, AnnData):
        raise ValueError("--feature-type is for a file without modalities: name those of an .h5mu with --rna, --atac.")
    if key in data.var:
        found = first_names(data.var[key].astype(str).unique())
        raise ValueError(f"--feature-type {options.feature_type}: var has a column {key!r}, which says {found}.")
    data.var[key] = next(each.feature_type for each in MODALITIES if each.key == options.feature_type)


def words_given(options: argparse.Namespace) -> dict[str, str]:
    """Words for feature types that ``--rna`` and ``--atac`` give, as ``feature_type_values`` of the setup."""
    words = {modality.features: getattr(options, modality.key) for modality in MODALITIES}
    return {features: word for features, word in words.items() if word is not None}


def feature_types(adata: AnnData, key: str, options: argparse.Namespace) -> dict[str, str]:
    """Those words, of which each has to be in the column of feature types."""
    words, known = words_given(options), adata.var[key].astype(str).unique() if key in adata.var else []
    for modality in MODALITIES:
        word = words.get(modality.features)
        if word is not None and word not in known:
            raise ValueError(
                f"--{modality.key} {word!r} is not among the words of var[{key!r}]. {nearest(word, known)}"
            )
    return words


def modality_names(mdata: Any, options: argparse.Namespace) -> dict[Modality, str]:
    """Modalities of a MuData: as ``--rna`` and ``--atac`` name them, else by their usual names; others are printed."""
    found: dict[Modality, str] = {}
    for modality in MODALITIES:
        given = getattr(options, modality.key)
        names = [name for name in mdata.mod if spelled(name) == modality.name]
        if given is not None and given not in mdata.mod:
            raise ValueError(f"--{modality.key} {given!r} is not a modality of the file. {nearest(given, mdata.mod)}")
        if given is None and len(names) > 1:
            raise ValueError(f"{first_names(names)} could all be {modality.assay}: choose one with --{modality.key}.")
        if given is not None or names:
            found[modality] = names[0] if given is None else given
    ways = " and ".join(f"--{modality.key} NAME" for modality in MODALITIES)
    if not found:
        raise ValueError(f"the file has the modalities {first_names(mdata.mod)}: say which is which with {ways}.")
    unused = [name for name in mdata.mod if name not in found.values() and name != options.protein]
    if unused:
        print(f"modalities not used: {first_names(unused)} ({ways} would name others).")
    return found
