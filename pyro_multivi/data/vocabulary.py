"""Words as people write them: for the modalities a cell was measured in, and names of regions."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

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

#: Other feature types of 10x Genomics and usual names of other modalities: that they are ignored is no mistake.
OTHER_ASSAYS = frozenset(
    (
        "antibody capture",
        "antigen capture",
        "crispr guide capture",
        "custom",
        "multiplexing capture",
        "vdj-t",
        "vdj-b",
        "prot",
        "protein",
        "proteins",
        "protein_expression",
        "adt",
        "hto",
        "airr",
    )
)

#: Name of a region, as chr1:100-200, chr1-100-200 or chr1_100_200. Without "chr" only a colon tells it from a gene.
REGION_NAME = re.compile(r"\S+:\d+-\d+|chr\S+[-_]\d+[-_]\d+")
# Share of genes with such names that is beyond what a few oddly named ones are.
_MANY_REGIONS = 0.1


def feature_type_column(key: str, columns: Container[object], needed: bool = True) -> str:
    """The column of ``var`` with feature types: the one named, or that of scvi-tools' reader for the usual one.

    Empty if there is neither and none is needed, as features are in order.
    """
    if key != "feature_types" or key in columns:
        return key
    return "modality" if "modality" in columns else key if needed else ""


def says_types(words: Iterable[object]) -> bool:
    """Whether any of the words in a column is that of a feature type, as RNA or ATAC.

    Examples
    --------
    >>> says_types(["Gene Expression", "tiles"]), says_types(["0", "1"])
    (True, False)
    """
    return any(spelled(word) is not None or str(word).casefold() in OTHER_ASSAYS for word in set(words))


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


def regions_among(genes: Iterable[str]) -> list[str]:
    """Genes that have names of regions, as regions taken for genes do; none where they are but a few.

    Examples
    --------
    >>> regions_among(["CD3E", "chr1:10-20", "MS4A1"]), regions_among(["CD3E", "HLA-A", "chr1_1"])
    (['chr1:10-20'], [])
    """
    names = list(genes)
    found = [name for name in names if REGION_NAME.fullmatch(name)]
    return found if len(found) > _MANY_REGIONS * len(names) else []
