"""Registration: the places of counts, batches and covariates in an AnnData or a MuData, checked and kept with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from anndata import AnnData, ImplicitModificationWarning

from pyro_multivi.data.checks import (
    caution,
    check_mapping,
    checked,
    first_names,
    name_list,
    nearest,
    unknown_key,
)
from pyro_multivi.data.modality import MODALITIES, PROTEIN, Modality
from pyro_multivi.data.setup.adapter import known_modalities
from pyro_multivi.data.setup.cautions import cautions
from pyro_multivi.data.setup.counts import refuse_counts_beside_stores
from pyro_multivi.data.setup.covariates import size_factor_keys
from pyro_multivi.data.setup.masks.declared import with_masks
from pyro_multivi.data.setup.options import UNS_KEY, Setup, how_to_make, in_memory, is_mudata
from pyro_multivi.data.setup.spec import describe
from pyro_multivi.data.setup.summary import SetupReport
from pyro_multivi.data.vocabulary import MEASUREMENT_PATTERNS, feature_type_column, says_types
from pyro_multivi.isolation import isolated

logger = logging.getLogger("pyro_multivi")

PROTEIN_LAYER = "protein_layer"
#: Arguments of ``setup_mudata`` that ``modalities`` may place in a modality.
_PLACED = (
    *(f"{modality.key}_layer" for modality in MODALITIES),
    PROTEIN_LAYER,
    "batch_key",
    "size_factor_key",
    "categorical_covariate_keys",
    "continuous_covariate_keys",
    "labels_key",
    "modality_key",
    "panel_key",
)


@isolated()
@checked
def setup_anndata(
    adata: AnnData,
    layer: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | Sequence[str | None] | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    protein_expression_obsm_key: str | None = None,
    protein_names_uns_key: str | None = None,
    *,
    modality_key: str | None = None,
    feature_type_key: str = "feature_types",
    labels_key: str | None = None,
    modality_values: Mapping[str, str] | None = None,
    feature_type_values: Mapping[str, str | Sequence[str]] | None = None,
    extra_obsm_keys: Sequence[str] | None = None,
    feature_masks: str | None = None,
    panel_key: str | None = None,
) -> SetupReport:
    """Declare where counts, batches and covariates lie in an AnnData, and check them.

    Genes and regions are distinguished by a column of ``var``, in any order of columns; genes alone or
    regions alone will do. Cells may have RNA, ATAC or both. Counts may be sparse, dense or in a file
    (``backed="r"``); those of ATAC may be binary, since only zero or not zero is used.

    The only thing written is ``adata.uns["pyro_multivi"]["setup"]``, a string. A view becomes an object of
    its own by that, a copy of its cells as at any assignment to a view; its parent stays as it is.

    Parameters
    ----------
    adata
        Raw counts of shape (cells, genes and regions).
    layer
        Layer with the counts; ``adata.X`` by default.
    batch_key
        Column of ``obs`` with the batch of each cell. By default all cells are of one.
    modality_key
        Column of ``obs`` with the measurement pattern of each cell: "paired", "expression" or
        "accessibility", or a usual spelling of it ("multiome", "rna", "ATAC", ...). Without it, a
        modality counts as measured where a cell has any count.
    feature_type_key
        Column of ``var`` that distinguishes genes from regions; where there is no ``"feature_types"``, the column
        ``"modality"`` of scvi-tools' reader, if it does. Without either, genes are the first columns and regions those
        behind them: ``MULTIVI(adata, n_genes=..., n_regions=...)`` is told how many.
    size_factor_key
        Column of ``obs`` with RNA size factors (> 0, in any unit), or ``[rna, atac]`` with those of ATAC (between 0
        and 1) as well; either may be None. By default the model infers them. Cells without the modality may have
        NaN: whatever they have, what they lack is predicted at the median of the others.
    categorical_covariate_keys, continuous_covariate_keys
        Columns of ``obs`` that the model shall account for. Continuous ones are standardised.
    protein_expression_obsm_key
        Key of ``obsm`` with raw counts of proteins (antibodies): an array, sparse matrix or frame. A protein that is 0
        in all cells of a batch that has others counts as not measured there, as does NaN; a cell without any count as
        not measured for proteins.
    protein_names_uns_key
        Key of ``uns`` with their names. By default those of the frame's columns, or "0", "1", ...
    labels_key
        Column of ``obs`` with labels, for dispersion by gene and label.
    modality_values
        Meaning of other words of the ``modality_key`` column, ``{"both assays": "paired"}``.
    feature_type_values
        Words of the ``feature_type_key`` column: ``{"genes": "Gene Expression", "regions": ["Peaks",
        "Chromatin Accessibility"]}`` by default, or where there are none of these a usual spelling ("GEX", "RNA",
        "ATAC", ...). Features of other types are ignored and reported.
    extra_obsm_keys
        Keys of ``obsm`` with extra modalities, such as protein counts: arrays, sparse matrices or
        frames, a row of NaN for a cell that was not measured. A custom program finds them in
        ``cells.extra[key]``.
    feature_masks
        Key of ``varm`` with a table of True and False, features x batches: which were measured in the cells of each
        batch. The others are no zeros there: likelihoods and the data's statistics leave them out. Default: the masks
        of ``join_samples(..., features="union")``, if there are any; else every feature was measured in all cells.
    panel_key
        Column of ``obs`` whose values the columns of that table are named by; default: the samples of
        ``join_samples``, else ``batch_key``.

    Returns
    -------
    What was found. It is also logged to the logger "pyro_multivi" at level INFO.

    Raises
    ------
    TypeError
        If ``adata`` is no AnnData.
    ValueError
        If something named is not there, counts are not raw counts, names are not unique, a column has
        gaps, or a cell has nothing measured.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> adata = AnnData(np.array([[3.0, 0.0, 1.0], [1.0, 2.0, 0.0]], dtype=np.float32),
    ...                 var=pd.DataFrame({"feature_types": ["Gene Expression", "Gene Expression", "Peaks"]},
    ...                                  index=["CD3E", "MS4A1", "chr1:10-20"]))
    >>> report = setup_anndata(adata)
    >>> report.n_genes, report.n_regions, report.n_cells
    (2, 1, {'paired': 1, 'expression': 1, 'accessibility': 0})
    """
    if is_mudata(adata):
        raise TypeError("adata is a MuData: use setup_mudata(mdata, ...).")
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, got {type(adata).__name__}{how_to_make(adata)}.")
    if not feature_type_key:
        raise unknown_key("feature_type_key", feature_type_key, "adata.var", adata.var.columns)
    setup = Setup(
        kind="anndata",
        rna_layer=layer,
        atac_layer=layer,
        batch_key=batch_key,
        modality_key=modality_key,
        labels_key=labels_key,
        size_factor_keys=size_factor_keys(size_factor_key),
        categorical_covariate_keys=name_list("categorical_covariate_keys", categorical_covariate_keys, distinct=True),
        continuous_covariate_keys=name_list("continuous_covariate_keys", continuous_covariate_keys, distinct=True),
        modality_values=modality_meanings(modality_values),
        feature_type_key=_column_of_types(adata, feature_type_key, feature_type_values is not None),
        extra=name_list("extra_obsm_keys", extra_obsm_keys, distinct=True),
    )
    if protein_names_uns_key is not None:
        if protein_expression_obsm_key is None:
            raise ValueError(
                f"protein_names_uns_key={protein_names_uns_key!r} names proteins: give protein_expression_obsm_key too."
            )
        if protein_names_uns_key not in adata.uns:
            raise unknown_key("protein_names_uns_key", protein_names_uns_key, "adata.uns", adata.uns)
    setup = with_proteins(setup, "extra_obsm_keys", protein_expression_obsm_key, names=protein_names_uns_key)
    return _set_up(adata, with_masks(with_feature_types(setup, feature_type_values), adata, feature_masks, panel_key))


@isolated()
@checked
def setup_mudata(
    mdata: Any,
    rna_layer: str | None = None,
    atac_layer: str | None = None,
    protein_layer: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | Sequence[str | None] | None = None,
    categorical_covariate_keys: Sequence[str] | None = None,
    continuous_covariate_keys: Sequence[str] | None = None,
    idx_layer: str | None = None,
    modalities: Mapping[str, str] | None = None,
    *,
    labels_key: str | None = None,
    modality_key: str | None = None,
    modality_values: Mapping[str, str] | None = None,
    extra_modalities: Sequence[str] | None = None,
    feature_masks: str | None = None,
    panel_key: str | None = None,
) -> SetupReport:
    """Declare where counts, batches and covariates lie in a MuData, and check them.

    Cells that a modality does not list are not measured there; nothing has to be padded with zeros. An
    object that was padded will do as well: by ``modality_key``, or by its rows without counts. One
    modality alone will do, and their order does not matter.

    The only thing written is ``mdata.uns["pyro_multivi"]["setup"]``, a string. A view becomes an object of
    its own by that, a copy of its cells as at any assignment to a view; its parent stays as it is.

    Parameters
    ----------
    mdata
        A MuData with raw counts.
    rna_layer, atac_layer
        Layers with the counts of RNA and of ATAC; ``.X`` by default.
    protein_layer
        Layer with the counts of proteins, ``.X`` by default, of the modality that
        ``modalities={"protein_layer": ...}`` names; without that there are none. They are as in
        :func:`setup_anndata`.
    idx_layer
        An argument of scvi-tools, here for its place in the order. It has no effect, since cells are known by name.
    batch_key, size_factor_key, labels_key, modality_key
    categorical_covariate_keys, continuous_covariate_keys
        As in :func:`setup_anndata`: columns of ``mdata.obs``, or of the obs of the modality that
        ``modalities`` names for that argument (which must then have every cell).
    modalities
        Names of arguments to names of modalities: ``{"rna_layer": "rna", "atac_layer": "atac",
        "batch_key": "rna"}``. Without the first two, RNA and ATAC are recognised by their names, such as
        "rna" and "atac"; columns of arguments that are not listed are in ``mdata.obs``.
    modality_values
        Meaning of other words of the ``modality_key`` column, ``{"both assays": "paired"}``.
    extra_modalities
        Names of extra modalities (their ``.X``), or keys of ``mdata.obsm``, for a custom program:
        see ``extra_obsm_keys`` of :func:`setup_anndata`.
    feature_masks, panel_key
        As in :func:`setup_anndata`, in ``varm`` of the modalities; one without that key was measured for all features.

    Returns
    -------
    What was found. It is also logged to the logger "pyro_multivi" at level INFO.

    Raises
    ------
    TypeError
        If ``mdata`` is no MuData.
    ValueError
        As in :func:`setup_anndata`.
    """
    if not is_mudata(mdata):
        verb = ": use setup_anndata(adata, ...)" if isinstance(mdata, AnnData) else how_to_make(mdata)
        raise TypeError(f"mdata must be a MuData, got {type(mdata).__name__}{verb}.")
    setup = Setup(
        kind="mudata",
        rna_layer=rna_layer,
        atac_layer=atac_layer,
        batch_key=batch_key,
        modality_key=modality_key,
        labels_key=labels_key,
        size_factor_keys=size_factor_keys(size_factor_key),
        categorical_covariate_keys=name_list("categorical_covariate_keys", categorical_covariate_keys, distinct=True),
        continuous_covariate_keys=name_list("continuous_covariate_keys", continuous_covariate_keys, distinct=True),
        modality_values=modality_meanings(modality_values),
        extra=name_list("extra_modalities", extra_modalities, distinct=True),
        protein_layer=protein_layer,
    )
    return _set_up(mdata, with_masks(with_modalities(setup, mdata, modalities), mdata, feature_masks, panel_key))


def _set_up(data: Any, setup: Setup) -> SetupReport:
    found = describe(data, setup)
    refuse_counts_beside_stores(found.opened)
    likely_mistakes = cautions(found)
    report = SetupReport.of(found, likely_mistakes)
    _keep(data, setup)
    logger.info("%s", report)
    for sentence in likely_mistakes:
        caution(sentence)
    return report


def _keep(data: Any, setup: Setup) -> None:
    """Write the arguments into ``uns``, beside whatever else the package keeps there."""
    kept = data.uns.get(UNS_KEY)
    entry = {**(kept if isinstance(kept, Mapping) else {}), "setup": setup.to_json()}
    if not data.is_view:
        data.uns[UNS_KEY] = entry
        return
    if data.isbacked:
        raise ValueError(
            "A view of an object in a file cannot be set up. Load it: adata = adata.to_memory(), or set up "
            "the whole object."
        )
    with warnings.catch_warnings():
        # The view turns into a copy here, on purpose and as documented.
        warnings.simplefilter("ignore", ImplicitModificationWarning)
        # MuData makes that copy through calls of its own that it has deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        data.uns[UNS_KEY] = entry


def modality_meanings(values: Mapping[str, str] | None) -> dict[str, str]:
    """Meanings of words for what was measured, checked."""
    found = check_mapping("modality_values", values, "{'both assays': 'paired'}")
    given = {str(word): meaning for word, meaning in found.items()}
    for word, meaning in given.items():
        if not isinstance(meaning, str) or meaning not in MEASUREMENT_PATTERNS:
            raise ValueError(
                f"modality_values[{word!r}] is {meaning!r} and must be one of {first_names(MEASUREMENT_PATTERNS)}."
            )
    return given


def _column_of_types(adata: AnnData, key: str, needed: bool) -> str:
    """The column of feature types, or none where the one taken for it says nothing: a label of ``anndata.concat``."""
    column = feature_type_column(key, adata.var, needed)
    guessed = column != key and column != "" and not needed
    return "" if guessed and not says_types(in_memory(adata.var)[column]) else column


def with_feature_types(setup: Setup, values: Mapping[str, str | Sequence[str]] | None) -> Setup:
    """A setup with the words for feature types that ``feature_type_values`` gives, checked."""
    given = check_mapping("feature_type_values", values, "{'genes': 'Gene Expression', 'regions': 'Peaks'}")
    known = [modality.features for modality in MODALITIES]
    for word in given:
        if word not in known:
            raise ValueError(
                f"feature_type_values has the key {word!r}. {nearest(word, known)} For "
                f"instance {{'genes': 'Gene Expression', 'regions': 'Peaks'}}."
            )
    types = {
        modality: name_list(
            f"feature_type_values[{modality.features!r}]", given.get(modality.features, setup.types_of(modality))
        )
        for modality in MODALITIES
    }
    for one, other in combinations(MODALITIES, 2):
        shared = set(types[one]) & set(types[other])
        if shared:
            raise ValueError(
                f"feature_type_values: {first_names(sorted(shared))} cannot be both {one.features} and "
                f"{other.features}."
            )
    fields: dict[str, Any] = {f"{modality.feature}_types": names for modality, names in types.items()}
    return replace(setup, **fields)


def with_proteins(setup: Setup, argument: str, key: str | None, names: str | None = None) -> Setup:
    """A setup with counts of proteins as the extra modality of that name; ``argument`` names the others."""
    if key is None:
        return setup
    for taken in {PROTEIN, key} & set(setup.extra):
        raise ValueError(
            f"{argument} holds {taken!r}, and so does what is modelled as proteins: leave it out of {argument}, or the "
            "proteins out of the setup for a program of your own."
        )
    return replace(setup, extra=(*setup.extra, PROTEIN), protein_key=key, protein_names_key=names)


def with_modalities(setup: Setup, mdata: Any, modalities: Mapping[str, str] | None) -> Setup:
    """A setup with the places in a MuData that ``modalities`` gives, checked; RNA and ATAC else by usual names."""
    given = check_mapping("modalities", modalities, "{'rna_layer': 'rna', 'atac_layer': 'atac'}")
    # None stands for a modality that is not there, and cells are known by name.
    given = {name: place for name, place in given.items() if place is not None and name != "idx_layer"}
    for argument, name in given.items():
        if argument not in _PLACED:
            raise ValueError(
                f"modalities has the key {argument!r}, which is no argument that lies in a modality. "
                f"{nearest(argument, _PLACED)}"
            )
        if not isinstance(name, str) or name not in mdata.mod:
            raise ValueError(
                f"modalities[{argument!r}] is {name!r}, which is not in mdata.mod. {nearest(name, mdata.mod)}"
            )
    found: dict[Modality, str | None] = {each: given.pop(setup.layer_argument(each), None) for each in MODALITIES}
    protein = given.pop(PROTEIN_LAYER, None)
    if not any(found.values()):
        found = known_modalities(mdata)
    names = [name for name in (*found.values(), protein) if name is not None]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        kinds = [each.assay for each, name in found.items() if name == twice] + ["proteins"] * (protein == twice)
        raise ValueError(f"modalities: {twice!r} cannot be both {' and '.join(kinds)}.")
    if setup.protein_layer is not None and protein is None:
        raise ValueError(
            f"{PROTEIN_LAYER}={setup.protein_layer!r} was given, but modalities does not name its modality: "
            f"modalities={{{PROTEIN_LAYER!r}: ...}}, one of {first_names(mdata.mod)}."
        )
    setup = with_proteins(setup, "extra_modalities", protein)
    for modality, place in found.items():
        argument, layer = setup.layer_argument(modality), setup.layer_of(modality)
        if layer is not None and place is None:
            raise ValueError(
                f"{argument}={layer!r} was given, but modalities does not name its modality: "
                f"modalities={{{argument!r}: ...}}, one of {first_names(mdata.mod)}."
            )
    placed: dict[str, Any] = {f"{modality.key}_modality": name for modality, name in found.items()}
    return replace(setup, obs_modalities=given, **placed)
