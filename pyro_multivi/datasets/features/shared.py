"""Features of a modality that all samples have; regions that overlap under other names are found out."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_multivi.data.checks import caution, first_names
from pyro_multivi.data.modality import Modality
from pyro_multivi.datasets.assembly import FEATURE_COLUMNS

_log = logging.getLogger("pyro_multivi")

#: Name of a region, as chr1:100-200, chr1-100-200 or 1_100_200, and the first of these forms.
_INTERVAL, _USUAL = r"^(?:chr)?(\S+?)[:_-](\d+)[_-](\d+)$", r"chr\1:\2-\3"
# Share of the others' names that a column has to hold for it to be what the names should be.
_FOUND = 0.5


def shared_features(modality: Modality, var_of: Mapping[str, pd.DataFrame]) -> pd.Index[str]:
    """Find the features that all samples with a modality have, in the order of the first; what is left out is logged.

    Parameters
    ----------
    modality
        The modality.
    var_of
        Features of each sample that has it, by name of the sample.

    Raises
    ------
    ValueError
        If there are none, or if more regions overlap under other names.
    """
    shared, left = in_all_samples(modality, var_of)
    if not left:
        return shared
    number, sentence, _ = unlike_regions(modality, left)
    if number >= max(len(shared), 1):
        raise ValueError(f"{sentence} Only {len(shared)} {modality.features} of the same name are in all samples.")
    if not len(shared):
        raise ValueError(nothing_shared(modality, var_of))
    if number:
        caution(sentence)
    for sample, own in left.items():
        _log.warning(
            "%d of the %d %s of sample %r are left out: not all samples with %s have them",
            len(own), len(var_of[sample]), modality.features, sample, modality.assay,
        )  # fmt: skip
    return shared


def in_all_samples(
    modality: Modality, var_of: Mapping[str, pd.DataFrame]
) -> tuple[pd.Index[str], dict[str, pd.Index[str]]]:
    """Features that all samples have, in the order of the first, and all others of each sample that has any.

    Warns
    -----
    UserWarning
        If samples know features of one name by different identifiers.
    """
    names = {sample: var.index for sample, var in var_of.items()}
    shared = next(iter(names.values()), pd.Index([], dtype=object))
    for other in names.values():
        shared = shared[shared.isin(other)]
    caution_of_identifiers(modality, var_of, shared)
    others = {sample: own[~own.isin(shared)] for sample, own in names.items()}
    return shared, {sample: own for sample, own in others.items() if len(own)}


def caution_of_identifiers(modality: Modality, var_of: Mapping[str, pd.DataFrame], shared: pd.Index[str]) -> None:
    """Warn of features of one name that two samples know by different identifiers: they are not the same."""
    column = FEATURE_COLUMNS["id"]
    known = [(sample, var) for sample, var in var_of.items() if column in var]
    for sample, var in known[1:]:
        first, own = known[0][1].loc[shared, column].astype(str), var.loc[shared, column].astype(str)
        # ENSG00000141510.18 and ENSG00000141510.16 are two versions of one.
        unlike = (first.str.replace(r"\.\d+$", "", regex=True) != own.str.replace(r"\.\d+$", "", regex=True)).to_numpy()
        if unlike.any():
            name = shared[unlike][0]
            caution(
                f"{int(unlike.sum())} {modality.features} of one name have other {column} in sample {sample!r} than in "
                f"{known[0][0]!r}, such as {name!r}: {own[name]} and {first[name]}. Count all samples over one "
                f"reference, or name them by {column}."
            )


def nothing_shared(modality: Modality, var_of: Mapping[str, pd.DataFrame]) -> str:
    """Error for samples without a feature in common; if a column has the names of another sample, it is named."""
    # Some of more than two samples may well share features; two without any tell more.
    pairs = [(one, other) for one in var_of for other in var_of if one != other]
    disjoint = [(one, other) for one, other in pairs if not var_of[one].index.isin(var_of[other].index).any()]
    one, other = (disjoint or pairs)[0]
    advice = "Use the same names"
    for first, second in disjoint:
        for column in var_of[second]:
            if var_of[second][column].astype(str).isin(var_of[first].index).mean() > _FOUND:
                advice = (
                    f"var[{column!r}] of {second!r} holds such names as those of {first!r}: "
                    f"adata.var_names = adata.var[{column!r}]"
                )
    return (
        f"no {modality.feature} is in all samples with {modality.assay}: {one!r} has "
        f"{first_names(var_of[one].index, 3)}, {other!r} has {first_names(var_of[other].index, 3)}. {advice}."
    )


def unlike_regions(modality: Modality, left: Mapping[str, pd.Index[str]]) -> tuple[int, str, bool]:
    """Most features of a sample that overlap with one of another name in another sample, and a sentence on them.

    The last tells whether they are the same intervals, written otherwise.
    """
    most, sentence, are_same = 0, "", False
    places = {sample: intervals(names) for sample, names in left.items()}
    for sample, own in places.items():
        others = pd.concat([place for other, place in places.items() if other != sample] or [own[:0]])
        others = others[~others.index.isin(left[sample])]
        found = overlapping(own, others)
        if found.sum() > most:
            most = int(found.sum())
            first = own[found][:1]
            second = others[overlapping(others, first)][:1]
            same = own.merge(others, how="inner").drop_duplicates()
            are_same = 2 * len(same) > most
            if are_same:
                mend = (
                    "They are the same intervals: write them alike in every sample, adata.var_names = "
                    f"adata.var_names.str.replace(r'{_INTERVAL}', r'{_USUAL}', regex=True)."
                )
            else:
                mend = (
                    "Peaks that were called in each sample by itself cannot be joined: count all samples over one set "
                    "of peaks first (cellranger-arc aggr, FeatureMatrix of Signac, make_peak_matrix of SnapATAC2)."
                )
            sentence = (
                f"{most} {modality.features} of sample {sample!r} overlap with {modality.features} of other samples "
                f"under another name, such as {first.index[0]!r} with {second.index[0]!r}. {mend}"
            )
    return most, sentence, are_same


def intervals(names: pd.Index[str]) -> pd.DataFrame:
    """Chromosome, start and end of the names that are intervals, indexed by name.

    Examples
    --------
    >>> intervals(pd.Index(["chr1:10-20", "X_5_9", "TP53"])).to_numpy().tolist()
    [['1', 10, 20], ['X', 5, 9]]
    """
    found = names.to_series().astype(str).str.extract(_INTERVAL).dropna()
    found.columns = pd.Index(["chromosome", "start", "end"])
    return found.astype({"start": np.int64, "end": np.int64})


def overlapping(regions: pd.DataFrame, others: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether each interval has a position in common with any of the others.

    Parameters
    ----------
    regions, others
        Intervals as :func:`intervals` returns them; ends are exclusive.

    Examples
    --------
    >>> overlapping(intervals(pd.Index(["chr1:10-20", "chr2:10-20"])), intervals(pd.Index(["chr1:19-30"])))
    array([ True, False])
    """
    found = np.zeros(len(regions), dtype=bool)
    places: dict[Hashable, pd.DataFrame] = dict(iter(others.groupby("chromosome")))
    row_of = pd.Series(np.arange(len(regions)))
    for chromosome, rows in row_of.groupby(regions["chromosome"].to_numpy()):
        if chromosome not in places:
            continue
        there = places[chromosome].sort_values("start")
        start, end = (regions[side].to_numpy()[rows] for side in ("start", "end"))
        # Of the intervals that begin before this one ends, the furthest end decides.
        before = np.searchsorted(there["start"].to_numpy(), end, side="left")
        furthest = np.concatenate([[-1], np.maximum.accumulate(there["end"].to_numpy())])
        found[rows] = furthest[before] > start
    return found
