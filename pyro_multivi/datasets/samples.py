"""Several samples, each with its own modalities and features, joined into one AnnData."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from pyro_multivi.data.checks import (
    check_choice,
    check_mapping,
    check_unique,
    checked,
    first_names,
    nearest,
    shown,
    unknown_key,
)
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.data.setup.adapter import Counts, open_data
from pyro_multivi.data.setup.counts import read_whole
from pyro_multivi.data.setup.masks.declared import PANEL_ENTRY
from pyro_multivi.data.setup.modalities import Measured, find_measured, has_counts
from pyro_multivi.data.setup.options import UNS_KEY, Setup, in_memory, is_mudata
from pyro_multivi.data.setup.register import modality_meanings, with_feature_types, with_modalities
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.data.stores.reference import joint_names
from pyro_multivi.data.vocabulary import MODALITIES_OF, feature_type_column
from pyro_multivi.datasets.assembly import (
    caution_of_same_cells,
    free_column,
    join_rows,
    moved,
    spell_out_unlike_columns,
)
from pyro_multivi.datasets.features.shared import shared_features
from pyro_multivi.datasets.features.union import described, masks, refuse_masks, united_features
from pyro_multivi.datasets.readers import read, sample_name

_log = logging.getLogger("pyro_multivi")

#: Column of ``obs`` with what was measured in a cell, where no other is named.
MODALITY_KEY = "modality"


@checked
def join_samples(
    samples: Mapping[str, Any] | Sequence[Any],
    features: str = "intersection",
    *,
    sample_key: str = "sample",
    modality_key: str = "modality",
    layer: str | None = None,
    feature_type_key: str = "feature_types",
    feature_type_values: Mapping[str, str | Sequence[str]] | None = None,
    modality_values: Mapping[str, str] | None = None,
    modalities: Mapping[str, str] | None = None,
) -> AnnData:
    """Join several samples, each with its own modalities, into one AnnData.

    A sample may have RNA, ATAC or both, in all cells or in some. A modality that a sample lacks is masked for its
    cells. Of a modality those features are kept that all samples with this modality have, the others being logged
    (:mod:`logging`, level warning); or with ``features="union"`` all, masked in the cells of samples that lack them.

    Set the result up with the same arguments, ``setup_anndata(joined, batch_key="sample", modality_key="modality")``.

    Parameters
    ----------
    samples
        Samples by name, or a list of them: AnnDatas, MuDatas, and files or folders that :func:`read` knows. In a list
        a path gives the name, ``"A"`` for ``A.h5`` and ``"S1"`` for ``S1/outs/filtered_feature_bc_matrix.h5``; objects
        are called ``"sample_0"``, ``"sample_1"``, ...
    features
        ``"intersection"`` or ``"union"``. Samples of a union must share some features of a modality, if only by way of
        a third one.
    sample_key
        Column of ``obs`` to write, with the name of the sample.
    modality_key
        Column of ``obs`` with the measurement pattern of each cell. It is read where a sample has it, and written. In a
        MuData without it cells are measured in the modalities that list them; elsewhere in the only one, or in
        those of two of which they have counts.
    layer
        Layer with the counts; ``X`` by default.
    feature_type_key, feature_type_values, modality_values
        As in :meth:`MULTIVI.setup_anndata`.
    modalities
        Names of RNA and ATAC in the MuDatas, ``{"rna_layer": "gex", "atac_layer": "peaks"}``, if they are not usual
        ones.

    Returns
    -------
    AnnData
        A new object that shares nothing with the samples. Counts are csr float32, in ``X`` or in ``layer``. ``obs`` has
        the columns of all samples, missing values where one lacks a column, words where a column holds numbers in one
        sample and words in another; those of a modality of a MuData are called ``"rna:column"``. ``obs_names`` stay as
        they are, but a name that occurs in more than one sample becomes ``name_sample`` in each. ``var`` has genes,
        then regions, each in the order and with the columns of the first sample that has the modality.
        ``uns["pyro_multivi"]["samples"]`` is a table of what was kept: for each sample the number of cells of each
        pattern, of genes and regions, and of those kept. Where a sample lacks features of a union,
        ``varm["pyro_multivi_measured"]`` tells which each measured; the setup finds it. Their own ``obsm``, ``varm``
        and ``raw`` are not taken over.

    Raises
    ------
    TypeError
        If a sample is none of these.
    ValueError
        If samples have no features of a modality in common or more regions that overlap under other names, if a column
        exists with other values, or a sample is not as :meth:`MULTIVI.setup_anndata` needs it; the message names it.

    Examples
    --------
    >>> from pyro_multivi.datasets.simulate import simulate_multiome
    >>> cells = simulate_multiome((6, 0, 0), n_genes=10, n_regions=20)
    >>> genes = cells.var["feature_types"] == "Gene Expression"
    >>> joined = join_samples({"multiome": cells[:4], "rna": cells[4:, genes]})
    >>> joined.shape, joined.obs["sample"].tolist()
    ((6, 30), ['multiome', 'multiome', 'multiome', 'multiome', 'rna', 'rna'])
    >>> joined.obs["modality"].value_counts().to_dict()
    {'paired': 4, 'expression': 2, 'accessibility': 0}
    >>> joined.uns["pyro_multivi"]["samples"].loc["rna", ["cells", "genes_kept", "regions_kept"]].to_dict()
    {'cells': 2, 'genes_kept': 10, 'regions_kept': 0}
    """
    if sample_key == modality_key:
        raise ValueError(f"sample_key and modality_key are both {sample_key!r}: give two columns.")
    if not feature_type_key:
        raise ValueError("feature_type_key='' is not allowed: name the column of var with feature types.")
    setup = Setup("anndata", layer, layer, modality_key=modality_key, feature_type_key=feature_type_key)
    setup = replace(with_feature_types(setup, feature_type_values), modality_values=modality_meanings(modality_values))
    return joined(named_samples(samples).items(), setup, [sample_key], features, modalities)


def named_samples(samples: Any) -> dict[str, Any]:
    """Samples by name, from a mapping or a list."""
    if isinstance(samples, Mapping):
        pairs = [(str(name), sample) for name, sample in samples.items()]
    elif isinstance(samples, Sequence) and not isinstance(samples, (str, bytes)):
        pairs = [
            (sample_name(sample) if isinstance(sample, (str, os.PathLike)) else f"sample_{number}", sample)
            for number, sample in enumerate(samples)
        ]
    else:
        alone = isinstance(samples, AnnData) or is_mudata(samples)
        advice = "; an object alone need not be joined, set it up as it is" if alone else ""
        raise TypeError(
            f"samples={shown(samples)} is not allowed: give a list or dictionary of AnnDatas, MuDatas or paths{advice}."
        )
    refuse_repeated([name for name, _ in pairs])
    return dict(pairs)


def refuse_repeated(names: Sequence[str], argument: str = "samples") -> None:
    """Refuse no name, and names of samples that occur more than once."""
    index = pd.Index(names)
    if not len(index):
        raise ValueError(f"{argument}={shown(list(names))} is empty: give at least one.")
    if not index.is_unique:
        raise ValueError(
            f"{argument} has more than one called {first_names(index[index.duplicated()].unique())}: name them, "
            "{'name': path, ...}."
        )


def joined(
    samples: Iterable[tuple[str, Any]],
    setup: Setup,
    sample_keys: Sequence[str],
    features: str = "intersection",
    modalities: Mapping[str, str] | None = None,
    names_needed: bool = True,
) -> AnnData:
    """Samples with their names, joined as :func:`join_samples` does; each is forgotten once it was read.

    The setup, of an AnnData, says where their counts lie; with ``names_needed`` some sample must have each column or
    word that it names. The sample is written to the first of some columns that no sample has with other values.
    """
    check_choice("features", features, ("intersection", "union"))
    places = check_mapping("modalities", modalities, "{'rna_layer': 'rna', 'atac_layer': 'atac'}")
    parts = [_Part.of(name, sample, setup, places) for name, sample in samples]
    if names_needed:
        _check_found(parts, setup, places)
    caution_of_same_cells(parts)
    var_of = {each: {part.name: part.var[each] for part in parts if each in part.var} for each in MODALITIES}
    find = united_features if features == "union" else shared_features
    kept = {modality: find(modality, found) for modality, found in var_of.items()}
    var = join_rows([described(var_of[modality], names) for modality, names in kept.items() if len(names)])
    check_unique(var.index, "the genes and regions together", "rename the genes or the regions")
    types = [setup.types_of(modality)[0] for modality in MODALITIES]
    var[setup.feature_type_key] = pd.Categorical(np.repeat(types, [len(names) for names in kept.values()]))
    x = sp.vstack([part.over(kept) for part in parts], format="csr")
    obs_of = {part.name: (f"samples[{part.name!r}].obs", part.obs) for part in parts}
    layer, sample_key = setup.rna_layer, free_column(obs_of, sample_keys)
    varm = masks(var_of, kept, [part.name for part in parts])
    noted = {PANEL_ENTRY: sample_key} if varm else {}
    return AnnData(
        x if layer is None else None,
        obs=_join_obs(parts, sample_key, setup.modality_key or MODALITY_KEY),
        var=var,
        layers={} if layer is None else {layer: x},
        uns={UNS_KEY: {"samples": _report(parts, kept).rename_axis(sample_key), **noted}},
        varm=varm,
    )


@dataclass(frozen=True)
class _Part:
    """One of the samples: counts and features of each modality that was measured in any of its cells."""

    name: str
    obs: pd.DataFrame
    measured: Measured
    x: dict[Modality, sp.csr_matrix]
    var: dict[Modality, pd.DataFrame]
    has_modality_key: bool
    words: set[str]

    @classmethod
    def of(cls, name: str, sample: Any, setup: Setup, places: Mapping[str, str]) -> _Part:
        """Read and check a sample; errors name it."""
        with naming(name):
            data = read(sample) if isinstance(sample, (str, os.PathLike)) else sample
            if not isinstance(data, AnnData) and not is_mudata(data):
                raise TypeError(f"must be an AnnData, a MuData or a path, got {shown(sample)}.")
            own = setup_of(data, setup, places)
            opened = open_data(data, own)
            refuse_masks(opened)
            counts = read_whole(opened.counts, {each: tuple(found.features) for each, found in opened.counts.items()})
            has_key = own.modality_key is not None and opened.has_column("modality_key", own.modality_key)
            counted = has_counts(opened, counts)
            if len(counts) == 1 and not has_key:
                # A sample of one modality has it in every cell, also in those without a count.
                counted = {each: np.full(len(opened.cells), each in counts) for each in MODALITIES}
            measured = find_measured(opened, own, counted, key_needed=False)
            obs = cells_of(data)
            check_unique(obs.columns, "adata.obs", "adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]")
        for kind, size in opened.ignored.items():
            _log.warning("sample %r: %d features of %r are left out", name, size, kind)
        present = [modality for modality in counts if measured.masks[modality].any()]
        return cls(
            name,
            obs,
            measured,
            {modality: _csr(counts[modality]) for modality in present},
            {modality: _var_of(data, own, opened.counts[modality]) for modality in present},
            has_key,
            _words_of(data, own.feature_type_key),
        )

    def over(self, kept: Mapping[Modality, pd.Index[str]]) -> sp.csr_matrix:
        """Counts over the features of the result, (cells, features)."""
        blocks = []
        for modality, names in kept.items():
            if modality in self.x:
                places = names.get_indexer(self.var[modality].index).astype(np.int64)
                blocks.append(moved(self.x[modality], places, len(names)))
            else:
                nothing: Any = (len(self.obs), len(names))  # SciPy's types have no matrix from its shape alone.
                blocks.append(sp.csr_matrix(nothing, dtype=np.float32))
        return sp.hstack(blocks, format="csr")

    def patterns(self) -> list[str]:
        """Measurement pattern of each cell."""
        masks = [self.measured.masks[modality] for modality in MODALITIES]
        words = {tuple(each in included for each in MODALITIES): word for word, included in MODALITIES_OF.items()}
        return [words[measured] for measured in zip(*(mask.tolist() for mask in masks), strict=True)]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of a sample, with its name."""
    try:
        yield
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"samples[{name!r}]: {error}") from error


def setup_of(data: Any, setup: Setup, places: Mapping[str, str]) -> Setup:
    """The setup of the samples for one of them."""
    if not is_mudata(data):
        key = feature_type_column(setup.feature_type_key, data.var)
        # Words that other samples use need not be those of this one.
        unused = [each for each in MODALITIES if not {*setup.types_of(each)} & _words_of(data, key)]
        usual: dict[str, Any] = {f"{modality.feature}_types": modality.feature_types for modality in unused}
        return replace(setup, feature_type_key=key, **usual)
    here = {argument: name for argument, name in places.items() if name in list(data.mod)}
    # That the layer is in a modality which this sample lacks is no mistake.
    own = with_modalities(replace(setup, kind="mudata", rna_layer=None, atac_layer=None), data, here)
    return replace(own, rna_layer=setup.rna_layer, atac_layer=setup.atac_layer)


def _words_of(data: Any, key: str) -> set[str]:
    """Names of modalities of a MuData, or feature types of an AnnData."""
    if is_mudata(data):
        return set(data.mod)
    return {*in_memory(data.var)[key].astype(str)} if key in data.var else set()


def cells_of(data: Any) -> pd.DataFrame:
    """The columns of ``obs``, those of a modality of a MuData as ``"rna:column"``; a new table."""
    if not is_mudata(data):
        return in_memory(data.obs).copy()
    obs: pd.DataFrame = data.obs.copy()
    for name, part in data.mod.items():
        for column in part.obs:
            # As mudata calls them itself when it updates.
            if f"{name}:{column}" not in obs:
                obs[f"{name}:{column}"] = part.obs[column].reindex(data.obs_names)
    return obs


def _csr(counts: SparseCounts) -> sp.csr_matrix:
    values = counts.val.numpy().astype(np.float32)
    return sp.csr_matrix((values, counts.col.numpy(), counts.crow.numpy()), shape=(counts.shape[0], counts.shape[1]))


def _var_of(data: Any, own: Setup, counts: Counts) -> pd.DataFrame:
    table = data.mod[own.mudata_name(counts.modality)].var if is_mudata(data) else data.var
    var = in_memory(table).iloc[counts.columns].drop(columns=own.feature_type_key, errors="ignore")
    return var.set_axis(pd.Index(list(map(str, counts.features))))


def _check_found(parts: Sequence[_Part], setup: Setup, places: Mapping[str, str]) -> None:
    """Refuse names that are in none of the samples."""
    key = setup.modality_key
    if key not in (None, MODALITY_KEY) and not any(part.has_modality_key for part in parts):
        raise unknown_key("modality_key", key, "obs of any sample", dict.fromkeys(c for p in parts for c in p.obs))
    known = sorted({word for part in parts for word in part.words})
    for argument, name in places.items():
        if name not in known:
            raise ValueError(f"modalities[{argument!r}] is {name!r}, which no sample has. {nearest(name, known)}")
    for modality in MODALITIES:
        words = setup.types_of(modality)
        if words != modality.feature_types and not {*words} & {*known}:
            raise ValueError(
                f"feature_type_values[{modality.features!r}] is {first_names(words)}, which no sample has. "
                f"{nearest(words[0], known)}"
            )


def _join_obs(parts: Sequence[_Part], sample_key: str, modality_key: str) -> pd.DataFrame:
    """The cells of the result, with unique names and the columns of samples and patterns."""
    frames = [part.obs.drop(columns=[sample_key, modality_key], errors="ignore") for part in parts]
    spell_out_unlike_columns(frames, "sample")
    obs = join_rows(frames).set_axis(joint_names([frame.index for frame in frames], [part.name for part in parts]))
    check_unique(obs.index, "obs_names of all samples together", "rename the cells or the samples")
    sizes = [len(frame) for frame in frames]
    obs[sample_key] = pd.Categorical(np.repeat([part.name for part in parts], sizes), [part.name for part in parts])
    obs[modality_key] = pd.Categorical([word for part in parts for word in part.patterns()], list(MODALITIES_OF))
    return obs


def _report(parts: Sequence[_Part], kept: Mapping[Modality, pd.Index[str]]) -> pd.DataFrame:
    """For each sample the number of cells and features, and of features kept."""
    rows = {}
    for part in parts:
        row = {"cells": len(part.obs), **part.measured.sizes()}
        for modality, names in kept.items():
            own = part.var[modality].index if modality in part.var else pd.Index([])
            row |= {modality.features: len(own), f"{modality.features}_kept": int(names.isin(own).sum())}
        rows[part.name] = row
    return pd.DataFrame.from_dict(rows, orient="index")
