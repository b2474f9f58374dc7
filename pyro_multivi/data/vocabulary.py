"""Measurement patterns: words for which modalities a cell was measured in, as people write them."""

from __future__ import annotations

import re
from collections.abc import Container

from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, Modality

#: The pattern of cells measured in every modality; that of cells measured in one alone is the modality's name.
PAIRED = "paired"
#: Modalities that each pattern includes. The patterns are the values of ``obs["modality"]``.
MODALITIES_OF: dict[str, tuple[Modality, ...]] = {
    PAIRED: MODALITIES,
    **{modality.name: (modality,) for modality in MODALITIES},
}
MEASUREMENT_PATTERNS = tuple(MODALITIES_OF)

#: Spellings of each pattern that people use. Compared in lower case, any sign being a space.
SPELLINGS: dict[str, tuple[str, ...]] = {
    PAIRED: (
        "paired", "multiome", "multi", "multiomic", "multiomics", "multimodal", "both", "joint",
        "rna atac", "atac rna", "gex atac", "rna and atac",
    ),
    RNA.name: (
        "expression", "rna", "gex", "gene", "genes", "gene expression", "transcriptome", "transcriptomics",
        "rna seq", "scrna", "scrna seq", "snrna", "snrna seq", "rna only", "rna unpaired",
    ),
    ATAC.name: (
        "accessibility", "atac", "peak", "peaks", "chromatin", "chromatin accessibility", "epigenome",
        "atac seq", "scatac", "scatac seq", "snatac", "snatac seq", "atac only", "atac unpaired",
    ),
}  # fmt: skip


def feature_type_column(key: str, columns: Container[object], needed: bool = True) -> str:
    """The column of ``var`` with feature types: the one named, or that of scvi-tools' reader for the usual one.

    Empty if there is neither and none is needed, as features are in order.
    """
    if key != "feature_types" or key in columns:
        return key
    return "modality" if "modality" in columns else key if needed else ""


def spelled(word: object) -> str | None:
    """The measurement pattern that a word stands for, in any known spelling.

    Returns
    -------
    ``"paired"``, ``"expression"``, ``"accessibility"``, or None for a word that is not known.

    Examples
    --------
    >>> spelled("RNA+ATAC"), spelled("scATAC-seq"), spelled("protein")
    ('paired', 'accessibility', None)
    """
    plain = re.sub(r"[\W_]+", " ", str(word)).strip().casefold()
    return next((meaning for meaning, known in SPELLINGS.items() if plain in known), None)
