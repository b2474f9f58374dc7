"""Joining paired, RNA-only and ATAC-only data sets into one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi.data.checks import check_unique, checked, first_names, name_list, shown
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, modality_named
from pyro_multivi.data.setup.adapter import layer_names
from pyro_multivi.data.setup.masks.declared import MASKS_KEY
from pyro_multivi.data.setup.options import is_mudata
from pyro_multivi.data.stores.reference import joint_names
from pyro_multivi.data.vocabulary import (
    MEASUREMENT_PATTERNS,
    MODALITIES_OF,
    PAIRED,
    feature_type_column,
    says_types,
    spelled,
)
from pyro_multivi.datasets.assembly import join_obsm, join_rows, moved

_log = logging.getLogger(__name__)

#: Feature types allowed for each measurement pattern.
_TYPES = {pattern: tuple(modality.feature_type for modality in included) for pattern, included in MODALITIES_OF.items()}


@dataclass(frozen=True)
class _Part:
    """One of the data sets: its matrices, not copied; ``spellings`` are its own words for each feature type."""

    argument: str
    pattern: str
    x: Any
    layers: Mapping[str, Any]
    obs: pd.DataFrame
    var: pd.DataFrame
    type_v: NDArray[np.object_]
    spellings: dict[str, set[str]]
    obsm: Mapping[str, Any]


@checked
def organize_multiome_anndatas(
    multi_anndata: AnnData | Any | None = None,
    rna_anndata: AnnData | None = None,
    atac_anndata: AnnData | None = None,
    modality_key: str = "modality",
    *,
    feature_type_key: str = "feature_types",
    mudata_modalities: tuple[str, str] = ("rna", "atac"),
) -> AnnData:
    """Join paired, RNA-only and ATAC-only cells into one AnnData.

    The features are those of ``multi_anndata`` if it is given, else all of ``rna_anndata`` and
    ``atac_anndata``; genes come first, then peaks, each in the order of the input. Where the others have
    other features than ``multi_anndata``, the numbers of features left out, and of features that
    their cells count as zero, are logged (:mod:`logging`, level warning); :func:`join_samples`, for any number of
    samples, leaves such features out.

    Parameters
    ----------
    multi_anndata
        Cells with both modalities: an AnnData of genes and peaks, or a MuData in which every cell
        has both.
    rna_anndata
        Cells with RNA only: an AnnData of genes. Peaks beside them are left out if they hold no counts.
    atac_anndata
        Cells with ATAC only: an AnnData of peaks. Genes beside them are left out if they hold no counts.
    modality_key
        Column of ``obs`` to write. Where inputs have it, the result has other values in it, and a log line says so
        unless they mean the same.
    feature_type_key
        Column of ``var`` with Gene Expression or Peaks, ``"modality"`` where scvi-tools' reader wrote it.
        ``rna_anndata`` and ``atac_anndata`` may lack it, for their features are of one type. Where ``multi_anndata``
        has neither column, features keep its order and get no types, and a log line says so.
    mudata_modalities
        Names of RNA and ATAC in a MuData.

    Returns
    -------
    AnnData
        A new object that shares nothing with the inputs. ``X`` and the layers that all inputs
        have are csr, zero where a modality was not measured. ``obs`` has the columns of all inputs,
        missing values where an input lacks one, and ``obs[modality_key]``, which is paired, expression or
        accessibility. ``obs_names`` stay as they are, but a name that occurs in more than one input becomes
        ``name_paired``, ``name_expression`` or ``name_accessibility`` in each. ``var`` has the columns
        of the inputs that the features come from; types are spelled as in the inputs if these spell them alike, else
        Gene Expression and Peaks. ``obsm`` has what all inputs have with the same columns, such as counts of proteins;
        what is left out is logged. ``varm``, ``obsp``, ``varp``, ``uns`` and ``raw`` are not taken over.

    Raises
    ------
    TypeError
        If an input is of another class.
    ValueError
        If no input is given, names repeat, the named column of feature types is missing or holds types that are not
        allowed, features do not overlap, or an input has masks of features that were measured in some cells only.

    Examples
    --------
    >>> from pyro_multivi.datasets.simulate import simulate_multiome
    >>> cells = simulate_multiome((4, 3, 2), n_genes=10, n_regions=20)
    >>> pattern, feature = cells.obs.pop("modality"), cells.var["feature_types"]
    >>> joined = organize_multiome_anndatas(
    ...     cells[pattern == "paired"],
    ...     cells[pattern == "expression", feature == "Gene Expression"],
    ...     cells[pattern == "accessibility", feature == "Peaks"],
    ... )
    >>> joined.shape
    (9, 30)
    >>> joined.obs["modality"].value_counts().to_dict()
    {'paired': 4, 'expression': 3, 'accessibility': 2}
    """
    if not feature_type_key:
        raise ValueError("feature_type_key='' is not allowed: name a column of var, or leave it out")
    if isinstance(multi_anndata, AnnData):
        column = feature_type_column(feature_type_key, multi_anndata.var, needed=False)
        guessed = column not in ("", feature_type_key)
        feature_type_key = "" if guessed and not says_types(multi_anndata.var[column]) else column
    names = name_list("mudata_modalities", mudata_modalities)
    if len(names) != len(MODALITIES):
        raise ValueError(
            f"mudata_modalities={shown(mudata_modalities)} is not allowed: give two names, of RNA and ATAC"
        )
    parts = []
    if is_mudata(multi_anndata):
        parts.append(_from_mudata(multi_anndata, names, feature_type_key))
    elif multi_anndata is not None:
        parts.append(_from_anndata("multi_anndata", multi_anndata, PAIRED, feature_type_key))
    for modality, adata in ((RNA, rna_anndata), (ATAC, atac_anndata)):
        if adata is not None:
            parts.append(_from_anndata(f"{modality.key}_anndata", adata, modality.name, feature_type_key))
    if not parts:
        raise ValueError("give at least one of multi_anndata, rna_anndata and atac_anndata")

    var = _join_var(parts, feature_type_key)
    type_v = _usual_types(var[feature_type_key]) if feature_type_key else np.full(len(var), "", dtype=object)
    if not feature_type_key:
        _tell_of_no_types(parts)
    columns = [_place_columns(part, var, type_v) for part in parts]
    layers = {}
    for name in sorted({name for part in parts for name in layer_names(part.layers)}):
        lacking = [part.argument for part in parts if name not in part.layers]
        if lacking:
            _log.warning("layer %r is left out: %s has none", name, " and ".join(lacking))
        else:
            layers[name] = _stack([part.layers[name] for part in parts], columns, len(var))
    obs = _join_obs(parts, modality_key)
    return AnnData(
        _stack([part.x for part in parts], columns, len(var)),
        obs=obs,
        var=var,
        layers=layers,
        obsm=join_obsm([part.obsm for part in parts], [part.argument for part in parts], obs.index),
    )


def _from_anndata(argument: str, adata: Any, pattern: str, feature_type_key: str) -> _Part:
    if not isinstance(adata, AnnData):
        advice = f"; give its AnnData: {argument}.mod[...]" if is_mudata(adata) else ""
        if isinstance(adata, (list, tuple, Mapping)):
            advice = "; join several samples with pyro_multivi.join_samples"
        raise TypeError(f"{argument} must be an AnnData, not {type(adata).__name__}{advice}")
    _check_matrix(argument, adata)
    allowed = _TYPES[pattern]
    if not feature_type_key:
        type_v = np.full(adata.n_vars, "", dtype=object)
        return _Part(argument, pattern, adata.X, adata.layers, adata.obs, adata.var, type_v, {}, adata.obsm)
    if feature_type_key in adata.var:
        type_v = _usual_types(adata.var[feature_type_key])
    elif len(allowed) == 1:
        type_v = np.full(adata.n_vars, allowed[0], dtype=object)
    else:
        raise ValueError(
            f"multi_anndata.var has no column {feature_type_key!r}, which must be {RNA.feature_type!r} or "
            f"{ATAC.feature_type!r} for each feature; it has {first_names(adata.var.columns) or 'none'}. "
            "Name another with feature_type_key"
        )
    adata, type_v = _without_other_types(argument, adata, type_v, allowed, feature_type_key)
    spellings: dict[str, set[str]] = {}
    if feature_type_key in adata.var:
        for kind, word in zip(type_v, adata.var[feature_type_key].astype(str), strict=True):
            spellings.setdefault(kind, set()).add(word)
    return _Part(argument, pattern, adata.X, adata.layers, adata.obs, adata.var, type_v, spellings, adata.obsm)


def _without_other_types(
    argument: str, adata: AnnData, type_v: NDArray[np.object_], allowed: Sequence[str], feature_type_key: str
) -> tuple[AnnData, NDArray[np.object_]]:
    """Leave out features of types that are not allowed, if they hold no counts and others are there."""
    is_other = ~np.isin(type_v, allowed)
    if not is_other.any():
        return adata, type_v
    are_known = {*type_v[is_other]} <= {*_TYPES[PAIRED]}
    if not is_other.all() and are_known and _empty(adata, is_other):
        _log.info("%d other features of %s hold no counts and are left out", int(is_other.sum()), argument)
        return adata[:, ~is_other], type_v[~is_other]
    kinds = f"{argument}.var[{feature_type_key!r}]"
    other = sorted(set(adata.var[feature_type_key].astype(str)[is_other]))
    rename = f"{kinds}.astype(str).replace({other[0]!r}, {allowed[0]!r})"
    advice = f"Write one of these where they mean it: {kinds} = {rename}"
    if set(type_v) & set(allowed):
        both = " They hold counts: if the cells have both modalities, they belong into multi_anndata."
        advice = f"Take the others out: {argument}[:, ~{kinds}.isin({other})].{both if are_known else ''}"
    elif are_known:
        advice = f"Give it as {_argument_of(type_v[is_other][0])}"
    raise ValueError(
        f"{argument} holds features of type {first_names(other)}; allowed: {first_names(allowed)}. {advice}"
    )


def _argument_of(kind: str) -> str:
    """The argument for cells with features of one type."""
    return next(f"{each.key}_anndata" for each in MODALITIES if each.feature_type == kind)


def _empty(adata: AnnData, features: NDArray[np.bool_]) -> bool:
    """Whether some features hold nothing but zeros."""
    matrices = [adata.X, *(adata.layers[name] for name in layer_names(adata.layers))]
    return not any(sp.csr_matrix(matrix[:, features]).count_nonzero() for matrix in matrices)


def _tell_of_no_types(parts: list[_Part]) -> None:
    """Say what cannot be told without types, and which features the cells of other parts count as zero."""
    names, others = parts[0].var.index, [part.argument for part in parts[1:]]
    _log.warning(
        "multi_anndata.var has no column 'feature_types' (or 'modality') with known words: genes are not told from "
        "peaks, and stay in their order; if another column tells, name it by feature_type_key"
    )
    lacking = int((~names.isin([name for part in parts[1:] for name in part.var.index])).sum()) if others else 0
    if lacking:
        _log.warning(
            "%d of the %d features of multi_anndata are not in %s: cells of these count as zero there",
            lacking, len(names), " or ".join(others),
        )  # fmt: skip


def _usual_types(types: pd.Series[Any]) -> NDArray[np.object_]:
    """Feature types with those of RNA and ATAC as Cell Ranger writes them, whatever their spelling."""
    found = types.astype(str)
    names = {kind: modality_named(spelled(kind) or "") for kind in found.unique()}
    usual = {kind: kind if modality is None else modality.feature_type for kind, modality in names.items()}
    return found.map(usual).to_numpy(dtype=object)


def _from_mudata(mdata: Any, names: tuple[str, ...], feature_type_key: str) -> _Part:
    absent = [name for name in names if name not in mdata.mod]
    if absent:
        raise ValueError(
            f"multi_anndata is a MuData without modality {first_names(absent)}; it has "
            f"{first_names(mdata.mod)}. Name RNA and ATAC with mudata_modalities"
        )
    rna, atac = (mdata.mod[name] for name in names)
    check_unique(mdata.obs_names, "multi_anndata.obs_names", "call obs_names_make_unique() on it")
    if not (set(rna.obs_names) == set(atac.obs_names) == set(mdata.obs_names)):
        raise ValueError(
            f"multi_anndata is a MuData of {mdata.n_obs} cells, of which {rna.n_obs} are in {names[0]!r} and "
            f"{atac.n_obs} in {names[1]!r}; all must be in both. A MuData need not be organized: "
            "use setup_mudata with it as it is"
        )
    parts = [
        _from_anndata(f"multi_anndata.mod[{name!r}]", mdata.mod[name], modality.name, feature_type_key)
        for name, modality in zip(names, MODALITIES, strict=True)
    ]
    order = [adata.obs_names.get_indexer(mdata.obs_names) for adata in (rna, atac)]

    def side_by_side(matrices: list[Any]) -> sp.csr_matrix:
        rows = [sp.csr_matrix(matrix)[index] for matrix, index in zip(matrices, order, strict=True)]
        return sp.hstack(rows, format="csr")

    shared_layers = sorted(set(layer_names(rna.layers)) & set(atac.layers))
    return _Part(
        "multi_anndata",
        PAIRED,
        side_by_side([part.x for part in parts]),
        {name: side_by_side([rna.layers[name], atac.layers[name]]) for name in shared_layers},
        mdata.obs,
        join_rows([part.var for part in parts]),
        np.concatenate([part.type_v for part in parts]),
        {kind: words for part in parts for kind, words in part.spellings.items()},
        # Those by the names of modalities say which cells each lists.
        {key: found for key, found in mdata.obsm.items() if key not in mdata.mod},
    )


def _check_matrix(argument: str, adata: AnnData) -> None:
    if adata.isbacked:
        raise ValueError(f"{argument} is backed by a file; load it: {argument}.to_memory()")
    if adata.X is None:
        raise ValueError(f"{argument}.X is None; put the counts there")
    if 0 in adata.shape:
        raise ValueError(f"{argument} has {adata.n_obs} cells and {adata.n_vars} features; leave it out")
    check_unique(adata.var_names, f"{argument}.var_names", f"{argument}.var_names_make_unique()")
    check_unique(adata.obs_names, f"{argument}.obs_names", f"{argument}.obs_names_make_unique()")
    if MASKS_KEY in adata.varm:
        raise ValueError(
            f"{argument}.varm[{MASKS_KEY!r}] says that some features were measured in some of its cells only, as in "
            "samples that were joined before, and zeros would stand for the others. Give the samples that it was made "
            "of, and all others, to pyro_multivi.join_samples"
        )


def _join_var(parts: list[_Part], feature_type_key: str) -> pd.DataFrame:
    """The features of the result: genes, then peaks; without types those of the first part as they are."""
    if not feature_type_key:
        return parts[0].var.copy()
    sources = parts[:1] if parts[0].pattern == PAIRED else parts
    frames, types = [], []
    for modality in MODALITIES:
        words = {word for part in parts for word in part.spellings.get(modality.feature_type, ())}
        word = words.pop() if len(words) == 1 else modality.feature_type
        for part in sources:
            frame = part.var[part.type_v == modality.feature_type].drop(columns=feature_type_key, errors="ignore")
            frames.append(frame)
            types += [word] * len(frame)
    var = join_rows(frames)
    check_unique(var.index, "the genes and peaks together", "rename the genes or the peaks")
    var[feature_type_key] = pd.Categorical(types)
    return var


def _place_columns(part: _Part, var: pd.DataFrame, type_v: NDArray[np.object_]) -> NDArray[np.int64]:
    """Column of the result for each feature of a part, -1 where there is none."""
    columns = np.asarray(var.index.get_indexer(part.var.index), dtype=np.int64)
    # A gene and a region of one name are not the same feature.
    columns[type_v[columns] != part.type_v] = -1
    kept, own = int((columns >= 0).sum()), len(columns)
    is_wanted = np.isin(type_v, _TYPES[part.pattern]) | (type_v == "")
    wanted = int(is_wanted.sum())
    if kept == 0:
        [*others] = set(type_v[var.index.isin(part.var.index)])
        if len(others) == 1 and part.var.index.isin(var.index).all():
            raise ValueError(
                f"the {own} features of {part.argument} have names of {others[0]} in multi_anndata: give it as "
                f"{_argument_of(others[0])}"
            )
        raise ValueError(
            f"none of the {own} features of {part.argument} is in multi_anndata: {part.argument} has "
            f"{first_names(part.var.index)}, multi_anndata has "
            f"{first_names(var.index[is_wanted]) or 'none of this type'}. "
            "Use the same names, for peaks the same regions"
        )
    if kept < own:
        _log.warning(
            "%d of the %d features of %s are not in multi_anndata and are left out",
            own - kept, own, part.argument,
        )  # fmt: skip
    if kept < wanted and type_v.any():
        _log.warning(
            "%d of the %d features of multi_anndata are not in %s: its cells count as zero there",
            wanted - kept, wanted, part.argument,
        )  # fmt: skip
    return columns


def _stack(matrices: list[Any], columns: list[NDArray[np.int64]], width: int) -> sp.csr_matrix:
    """Rows of all matrices over the columns of the result."""
    pairs = zip(matrices, columns, strict=True)
    return sp.vstack([moved(sp.csr_matrix(matrix), place, width) for matrix, place in pairs], format="csr")


def _join_obs(parts: list[_Part], modality_key: str) -> pd.DataFrame:
    """The cells of the result, with unique names and the column of modalities."""
    frames = []
    for part in parts:
        if modality_key in part.obs:
            found = {word for word in set(part.obs[modality_key].astype(str)) if spelled(word) != part.pattern}
            if found:
                _log.warning(
                    "obs[%r] of %s holds %s: the result has %r there; give another modality_key to keep it",
                    modality_key, part.argument, first_names(sorted(found)), part.pattern,
                )  # fmt: skip
        frames.append(part.obs.drop(columns=modality_key, errors="ignore"))
    names = joint_names([frame.index for frame in frames], [part.pattern for part in parts])
    obs = join_rows(frames).set_axis(names)
    check_unique(obs.index, "obs_names of all inputs together", "rename the cells of one of them")
    pattern_n = np.repeat([part.pattern for part in parts], [len(frame) for frame in frames])
    obs[modality_key] = pd.Categorical(pattern_n, list(MEASUREMENT_PATTERNS))
    return obs
