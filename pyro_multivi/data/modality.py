"""Modality: one kind of measurement, and every name that it goes by.

Tables, programs, sites, files and messages each have their own word for the same thing: RNA is ``rna`` in the name of
a field, ``"expression"`` in ``obs["modality"]``, ``"x"``, ``"rho"`` and ``"l"`` among the sites of the model, a "gene"
in a message. All translation between these words is here; code that treats modalities alike loops over
:data:`MODALITIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


class Named:
    """Names that follow from those of a modality and of one of its features."""

    name: str
    feature: str

    @property
    def features(self) -> str:
        """Plural of :attr:`feature`."""
        return f"{self.feature}s"

    @property
    def list_argument(self) -> str:
        """Argument that chooses some of the features."""
        return f"{self.feature}_list"

    @property
    def source_column(self) -> str:
        """Column of ``obs`` that records whether a cell's values were measured or imputed."""
        return f"{self.name}_source"


@dataclass(frozen=True)
class Modality(Named):
    """One kind of measurement of a cell.

    Attributes
    ----------
    key
        Prefix or suffix of fields and arguments: ``has_rna``, ``rna_layer``.
    name
        Word of the analyst's methods, of ``obs["modality"]`` (a cell with this modality alone) and of the encoder's
        expert.
    assay
        Word of messages.
    feature
        One feature of it, in messages and arguments (``gene_list``).
    feature_types
        Values of ``var["feature_types"]``, the first as it is written.
    counts
        Observed site of the model, and field of the tables of cells.
    decoded
        Site of what the model decodes from the latent state.
    depth
        Latent site of a cell's sequencing depth.
    compositional
        Whether values are shares of a cell's total, so that one takes what others lose. Not in a model of RNA whose
        size factors come with the data, see :meth:`in_model`.
    binary
        Whether only "zero or not" is modelled of a count. A model of fragment counts has
        another value, see :meth:`in_model`; both are the same modality.

    Examples
    --------
    >>> ATAC.features, ATAC.list_argument, modality_at("p") is ATAC
    ('regions', 'region_list', True)
    """

    key: str
    name: str
    assay: str
    feature: str
    feature_types: tuple[str, ...]
    counts: str
    decoded: str
    depth: str
    compositional: bool = field(compare=False)
    binary: bool = field(compare=False)

    @property
    def feature_type(self) -> str:
        """Value of ``var["feature_types"]``, as Cell Ranger writes it."""
        return self.feature_types[0]

    @property
    def sites(self) -> tuple[str, str, str]:
        """All sites of the model that belong to it."""
        return self.counts, self.decoded, self.depth

    @property
    def mask(self) -> str:
        """Field that marks the measured cells."""
        return f"has_{self.key}"

    @property
    def rows(self) -> str:
        """Field of the positions of the measured cells of a minibatch."""
        return f"{self.key}_rows"

    @property
    def panels(self) -> str:
        """Field of the panels of features that cells were measured with."""
        return f"{self.key}_panels"

    @property
    def size_factor(self) -> str:
        """Field of fixed size factors."""
        return f"{self.key}_size"

    def in_model(self, config: Any) -> Modality:
        """The modality as a model treats it.

        With fragment counts accessibility is not binary, with size factors of the data expression is not compositional.

        Examples
        --------
        >>> from pyro_multivi import ProgramConfig
        >>> found = ATAC.in_model(ProgramConfig(n_genes=1, n_regions=1, accessibility_likelihood="poisson"))
        >>> found == ATAC, found.binary
        (True, False)
        """
        if self.compositional and config.library == "size_factor":
            return replace(self, compositional=False)
        return replace(self, binary=False) if self.binary and config.counts_fragments else self

    def counts_in(self, cells: Any) -> Any:
        """Counts in a minibatch or table, (n, features); None in a table without any."""
        return getattr(cells, self.counts)

    def measured_in(self, cells: Any) -> Any:
        """Whether each cell of a minibatch, a table or a setup was measured, (n,), bool."""
        return getattr(cells, self.mask)

    def panels_in(self, cells: Any) -> Any:
        """Panels of features of a minibatch or table; None where every feature was measured."""
        return getattr(cells, self.panels)

    def size_factor_in(self, cells: Any) -> Any:
        """Fixed size factors of a minibatch or table, (n,), or None."""
        return getattr(cells, self.size_factor)

    def n_features_in(self, owner: Any) -> int:
        """Number of features in a configuration, table or specification."""
        return getattr(owner, f"n_{self.features}")

    def feature_names_in(self, spec: Any) -> tuple[str, ...]:
        """Names of the features in a specification."""
        return getattr(spec, f"{self.feature}_names")


RNA = Modality(
    key="rna",
    name="expression",
    assay="RNA",
    feature="gene",
    feature_types=("Gene Expression",),
    counts="x",
    decoded="rho",
    depth="l",
    compositional=True,
    binary=False,
)
ATAC = Modality(
    key="atac",
    name="accessibility",
    assay="ATAC",
    feature="region",
    feature_types=("Peaks", "Chromatin Accessibility"),
    counts="y",
    decoded="p",
    depth="d",
    compositional=False,
    binary=True,
)

#: Name of the extra modality that holds counts of proteins, where setup names some; and of the analyst's methods.
PROTEIN = "protein"
#: Values of ``var["feature_types"]`` for proteins, the first as Cell Ranger writes it.
PROTEIN_FEATURE_TYPES = ("Antibody Capture",)

#: In the order in which features of both stand beside each other.
MODALITIES = (RNA, ATAC)

_BY_SITE = {site: modality for modality in MODALITIES for site in modality.sites}
_BY_NAME = {modality.name: modality for modality in MODALITIES}


def modality_at(site: str) -> Modality:
    """The modality that a site of the model belongs to.

    Raises
    ------
    KeyError
        For a site of all modalities or of none.
    """
    return _BY_SITE[site]


def modality_named(name: str) -> Modality | None:
    """The modality of an analyst's word, ``"expression"`` or ``"accessibility"``; None for any other."""
    return _BY_NAME.get(name)


def modelled(config: Any) -> tuple[Modality, ...]:
    """The modalities of which a configuration, table or specification has features.

    Those of a configuration are as its model treats them.
    """
    found = (modality for modality in MODALITIES if modality.n_features_in(config))
    return tuple(each.in_model(config) if hasattr(config, "counts_fragments") else each for each in found)
