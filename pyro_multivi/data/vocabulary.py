"""Measurement patterns: words for which modalities a cell was measured in, as people write them."""

from __future__ import annotations

import re

from pyro_multivi.data.modality import ATAC, RNA

#: Values of ``obs["modality"]``: both modalities, RNA alone, ATAC alone.
PAIRED = "paired"
EXPRESSION = RNA.name
ACCESSIBILITY = ATAC.name
MEASUREMENT_PATTERNS = (PAIRED, EXPRESSION, ACCESSIBILITY)

#: How people write which modalities a cell has. Compared in lower case, any sign being a space.
SPELLINGS: dict[str, tuple[str, ...]] = {
    PAIRED: (
        "paired", "multiome", "multi", "multiomic", "multiomics", "multimodal", "both", "joint",
        "rna atac", "atac rna", "gex atac", "rna and atac",
    ),
    EXPRESSION: (
        "expression", "rna", "gex", "gene", "genes", "gene expression", "transcriptome", "transcriptomics",
        "rna seq", "scrna", "scrna seq", "snrna", "snrna seq", "rna only", "rna unpaired",
    ),
    ACCESSIBILITY: (
        "accessibility", "atac", "peak", "peaks", "chromatin", "chromatin accessibility", "epigenome",
        "atac seq", "scatac", "scatac seq", "snatac", "snatac seq", "atac only", "atac unpaired",
    ),
}  # fmt: skip


def spelled(word: object) -> str | None:
    """The modalities that a word stands for, in any known spelling.

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
