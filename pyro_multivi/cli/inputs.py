"""Inputs of a command: cells from a file, without those and the features that options leave out, and saved models."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.api.multivi import MULTIVI
from pyro_multivi.api.saving.description import Description
from pyro_multivi.api.saving.folder import read_model
from pyro_multivi.data.checks import caution, first_names, nearest
from pyro_multivi.data.fragments.checks import fragment_cautions
from pyro_multivi.data.fragments.reads import make_fragments
from pyro_multivi.data.modality import ATAC, MODALITIES, Modality
from pyro_multivi.data.setup.adapter import Counts, Opened, open_data
from pyro_multivi.data.setup.masks.panels import numbers_of_cells
from pyro_multivi.data.setup.options import UNS_KEY, Setup
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores.sums import Sums, sums_of
from pyro_multivi.data.vocabulary import PAIRED, feature_type_column, spelled
from pyro_multivi.datasets.assembly import existing
from pyro_multivi.datasets.examples import cell_lines
from pyro_multivi.datasets.readers import read, sample_name
from pyro_multivi.datasets.samples import cells_of, joined, naming, refuse_repeated, setup_of
from pyro_multivi.datasets.stores.open import open_stores, open_with_keys

#: Columns for the names of samples: the first that no file has with other values.
SAMPLE_KEYS = ("sample", "file")

Mask = NDArray[np.bool_]
Values = NDArray[np.floating[Any]]


def read_cells(path: str) -> AnnData | Any:  # Any: a MuData
    """Cells of a file, with names made unique as the readers of 10x files do; what changed is printed."""
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
    words = {each.features: getattr(options, each.key) for each in MODALITIES}
    given = {features: word for features, word in words.items() if word is not None}
    data = open_with_keys(samples, options.layer, SAMPLE_KEYS, options.feature_type_key, given or None)
    print(f"kept of each sample:\n{data.uns[UNS_KEY]['samples'].to_string()}")
    return data


def load_model(options: argparse.Namespace) -> MULTIVI:
    """The saved model that a command is given, with its data."""
    data = None
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


def feature_types(adata: AnnData, key: str, options: argparse.Namespace) -> dict[str, str]:
    """Words of the column of feature types that ``--rna`` and ``--atac`` give, as ``setup_anndata`` takes them."""
    words = {modality: getattr(options, modality.key) for modality in MODALITIES}
    given = {modality: word for modality, word in words.items() if word is not None}
    known = adata.var[key].astype(str).unique() if key in adata.var else []
    for modality, word in given.items():
        if word not in known:
            raise ValueError(
                f"--{modality.key} {word!r} is not among the words of var[{key!r}]. {nearest(word, known)}"
            )
    return {modality.features: word for modality, word in given.items()}


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
    unused = [name for name in mdata.mod if name not in found.values()]
    if unused:
        print(f"modalities not used: {first_names(unused)} ({ways} would name others).")
    return found


@dataclass(frozen=True)
class _Detected:
    """Which counts of a modality are above zero."""

    counts: Counts
    sums: Sums
    listed: Mask
    # Number of cells, out of some, in which each feature was measured.
    n_cells: Callable[[Mask], Any]

    @classmethod
    def of(cls, opened: Opened) -> dict[Modality, _Detected]:
        made: dict[int, Sums] = {}
        for counts in opened.counts.values():
            if id(counts.matrix) not in made:
                made[id(counts.matrix)] = sums_of(counts.matrix, counts.where)
        n = len(opened.cells)
        return {
            modality: cls(counts, made[id(counts.matrix)], counts.present(n), numbers_of_cells(opened, counts))
            for modality, counts in opened.counts.items()
        }

    def per_cell(self, features: Mask | None = None, positive: bool = False) -> Values:
        """Sum over features (default: all) of counts, or of whether they are above zero, for each cell, (n,)."""
        columns = self.counts.columns if features is None else self.counts.columns[features]
        inside = np.zeros(self.counts.matrix.shape[1], dtype=np.float32)
        inside[columns] = 1
        rows = self.sums.of_rows(inside, positive)
        return rows if self.counts.rows is None else np.where(self.listed, rows[self.counts.rows], 0)

    def share(self, cells: Mask) -> Values:
        """Share of some cells of the data set, those that measured it, in which each feature is detected."""
        weights = np.zeros(self.counts.matrix.shape[0], dtype=np.float64)
        weights[np.flatnonzero(cells) if self.counts.rows is None else self.counts.rows[cells & self.listed]] = 1
        return self.sums.of_columns(weights)[self.counts.columns] / np.maximum(self.n_cells(cells), 1)


#: Features of a modality that are kept, from its counts and the share of measured cells in which each is detected.
Choice = Callable[[Counts, Values], Mask]


def prepare(data: Any, setup: Setup, options: argparse.Namespace, choose: Choice) -> Any:
    """The data without the cells and features that options leave out; both are counted and printed."""
    if options.round:
        _round(data, setup)
    opened = open_data(data, setup)
    if any(counts.matrix.dtype.kind not in "buif" for counts in opened.counts.values()):
        return data  # Setup says what is wrong.
    detected = _Detected.of(opened)
    n = len(opened.cells)
    measured, stated = _measured(opened, setup, detected)
    totals = sum(found.per_cell() for found in detected.values())
    cells = ~(totals < options.min_counts)
    _print_left_out(~cells, "cells", f"have fewer than {options.min_counts} counts", "--min-counts")
    empty = cells & ~np.any([*measured.values()], axis=0)
    if not cells.any():
        raise ValueError(f"--min-counts {options.min_counts} leaves no cell: give a smaller number.")
    if empty.any():
        raise ValueError(
            f"{int(empty.sum())} of {n} cells have no count: {first_names(opened.cells[empty])}. Leave such cells out "
            "with --min-counts 1, or the empty barcodes of a raw_feature_bc_matrix with --min-counts 500 or another "
            "least number of counts; or give filtered_feature_bc_matrix."
        )
    kept = {}
    for modality, found in detected.items():
        seen = measured[modality] & cells
        kept[modality] = (
            choose(found.counts, found.share(seen)) if seen.any() else np.ones(len(found.counts.columns), bool)
        )
    if not stated:
        left = sum(found.per_cell(kept[modality], positive=True) for modality, found in detected.items())
        emptied = cells & (left == 0)
        if emptied.any() and not options.min_counts:
            raise ValueError(
                f"{int(emptied.sum())} of {n} cells have counts only in features that --min-fraction leaves out: "
                f"{first_names(opened.cells[emptied])}. Give a smaller --min-fraction, or leave such cells out with "
                "--min-counts 1."
            )
        _print_left_out(emptied, "cells", "have counts only in features that are left out", "--min-counts")
        cells &= ~emptied
    if cells.all() and all(mask.all() for mask in kept.values()):
        return data
    return _subset(data, opened, cells, kept)


def at_least(min_fraction: float) -> Choice:
    """Choice of the features detected in at least a share of the measured cells."""
    if not 0 <= min_fraction < 1:
        raise ValueError(f"--min-fraction {min_fraction} is not allowed: give a share from 0 to below 1.")

    def choose(counts: Counts, share: Values) -> Mask:
        kept: Mask = share >= min_fraction
        modality = counts.modality
        if not kept.any():
            raise ValueError(
                f"--min-fraction {min_fraction} leaves no {modality.features}: give a smaller share, at most "
                f"{share.max(initial=0):.3g}."
            )
        _print_left_out(
            ~kept,
            modality.features,
            f"are detected in less than {min_fraction:.3g} of the cells measured for {modality.assay}",
            "--min-fraction",
        )
        return kept

    return choose


def _print_left_out(mask: Mask, things: str, why: str, option: str) -> None:
    if mask.any():
        print(f"left out by {option}: {int(mask.sum())} of {len(mask)} {things}, which {why}")


def _measured(
    opened: Opened, setup: Setup, detected: Mapping[Modality, _Detected]
) -> tuple[dict[Modality, Mask], bool]:
    """Measured cells of each modality, as setup finds them, and whether the data state them."""
    key = setup.modality_key
    if key is not None and opened.has_column("modality_key", key):
        words = opened.column("modality_key", key)
        meaning = {word: setup.modality_values.get(str(word)) or spelled(word) for word in words.unique()}
        pattern = words.map(meaning).to_numpy(dtype=object)
        # A word that is not known is for setup to refuse.
        return {each: np.isin(pattern, [PAIRED, each.name]) | (pattern == None) for each in detected}, True  # noqa: E711
    if not all(found.listed.all() for found in detected.values()):
        return {each: found.listed for each, found in detected.items()}, True
    return {each: found.per_cell(positive=True) > 0 for each, found in detected.items()}, False


def _round(data: Any, setup: Setup) -> None:
    """Round the counts to whole numbers; the object was read for this command alone."""
    opened = open_data(data, setup)
    for matrix in {id(counts.matrix): counts.matrix for counts in opened.counts.values()}.values():
        values: NDArray[Any] = matrix.data if hasattr(matrix, "indptr") else matrix
        if values.dtype.kind == "f":
            np.rint(values, out=values)


def count_fragments(data: Any, setup: Setup, options: argparse.Namespace) -> None:
    """Make fragments of the reads of regions with ``--reads-to-fragments``; once for each file that was read."""
    if not options.reads_to_fragments:
        return
    counts = open_data(data, setup).counts.get(ATAC)
    if counts is None:
        raise ValueError("--reads-to-fragments is for counts of regions, and there are none.")
    make_fragments(counts.matrix, counts.columns, counts.where)


def _subset(data: Any, opened: Opened, cells: Mask, kept: Mapping[Modality, Mask]) -> Any:
    def columns(adata: AnnData, modality: Modality) -> Mask:
        wanted = np.ones(adata.n_vars, dtype=bool)
        wanted[opened.counts[modality].columns[~kept[modality]]] = False
        return wanted

    if isinstance(data, AnnData):
        return data[cells, np.all([columns(data, modality) for modality in kept], axis=0)].copy()
    names = opened.cells[cells]
    parts = dict(data.mod.items())
    for modality in kept:
        name = next(name for name, part in data.mod.items() if opened.counts[modality].owner == f"mdata.mod[{name!r}]")
        parts[name] = parts[name][:, columns(parts[name], modality)]
    parts = {name: part[part.obs_names.isin(names)].copy() for name, part in parts.items()}
    with mudata_as_given() as mudata:
        subset = mudata.MuData(parts)
    subset.obs = data.obs.loc[subset.obs_names]
    return subset
