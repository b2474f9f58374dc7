"""Arguments of the setup, as they are kept with the data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from pyro_multivi.data.checks import shown
from pyro_multivi.data.modality import ATAC, MODALITIES, PROTEIN, RNA, Modality
from pyro_multivi.data.vocabulary import spelled

#: Where it is kept: ``data.uns["pyro_multivi"]["setup"]``, a JSON string, which h5ad and h5mu carry as it is.
UNS_KEY = "pyro_multivi"
#: Version of that string's content.
SETUP_VERSION = 2


@dataclass(frozen=True)
class Setup:
    """The arguments of ``setup_anndata`` or ``setup_mudata``, in one form for both.

    Attributes
    ----------
    kind
        ``"anndata"`` or ``"mudata"``.
    rna_layer, atac_layer
        Layer of the counts; None is ``.X``. The same for both in an AnnData.
    batch_key, modality_key, labels_key
        Columns of obs, or None.
    size_factor_keys
        Columns of obs for RNA and for ATAC, either None.
    categorical_covariate_keys, continuous_covariate_keys
        Columns of obs.
    modality_values
        Words of the ``modality_key`` column beyond the known ones, each for "paired",
        "expression" or "accessibility".
    feature_type_key
        Column of var that distinguishes genes from regions in an AnnData; empty where there is none, and genes come
        before regions in as many columns as the constructor of a model states.
    gene_types, region_types
        Its values for genes and for regions.
    rna_modality, atac_modality
        Names of the modalities of a MuData, or None where there is none.
    obs_modalities
        For arguments whose columns lie in the obs of one modality of a MuData: its name.
    extra
        Names of extra modalities: keys of obsm, or modalities of a MuData.
    protein_key
        Key of obsm, or modality of a MuData, with the counts of proteins, which are the extra modality
        ``"protein"``; None without.
    protein_layer
        Layer of that modality; None is ``.X``.
    protein_names_key
        Key of uns with the names of proteins; None takes those that the matrix has.
    feature_masks
        Key of varm with the features that were measured in each panel, or None.
    panel_key
        Column of obs with the panel of each cell.
    """

    kind: str
    rna_layer: str | None = None
    atac_layer: str | None = None
    batch_key: str | None = None
    modality_key: str | None = None
    labels_key: str | None = None
    size_factor_keys: tuple[str | None, str | None] = (None, None)
    categorical_covariate_keys: tuple[str, ...] = ()
    continuous_covariate_keys: tuple[str, ...] = ()
    modality_values: dict[str, str] = field(default_factory=dict)
    feature_type_key: str = "feature_types"
    gene_types: tuple[str, ...] = RNA.feature_types
    region_types: tuple[str, ...] = ATAC.feature_types
    rna_modality: str | None = None
    atac_modality: str | None = None
    obs_modalities: dict[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    protein_key: str | None = None
    protein_layer: str | None = None
    protein_names_key: str | None = None
    feature_masks: str | None = None
    panel_key: str | None = None

    def place_of_extra(self, name: str) -> str:
        """Key of obsm, or modality of a MuData, of an extra modality."""
        return self.protein_key if name == PROTEIN and self.protein_key is not None else name

    def layer_of_extra(self, name: str) -> str | None:
        """Layer of an extra modality of a MuData, None for ``.X``."""
        return self.protein_layer if self.holds_proteins(name) else None

    @property
    def modelled_extra(self) -> tuple[str, ...]:
        """Names of the extra modalities that every program models: proteins, if there are some."""
        return () if self.protein_key is None else (PROTEIN,)

    def holds_proteins(self, name: str) -> bool:
        """Whether an extra modality holds the counts of proteins that a program models."""
        return name in self.modelled_extra

    def layer_of(self, modality: Modality) -> str | None:
        """Layer of a modality's counts, None for ``.X``."""
        return getattr(self, f"{modality.key}_layer")

    def layer_argument(self, modality: Modality) -> str:
        """Argument that names that layer."""
        return "layer" if self.kind == "anndata" else f"{modality.key}_layer"

    def types_of(self, modality: Modality) -> tuple[str, ...]:
        """Feature types that belong to a modality."""
        return getattr(self, f"{modality.feature}_types")

    def types_found(self, modality: Modality, kinds: Iterable[str]) -> tuple[str, ...]:
        """Feature types in the data that belong to a modality; without the default ones its spellings."""
        found = set(kinds)
        stated = self.types_of(modality)
        if found & set(stated) or stated != modality.feature_types:
            return tuple(sorted(found & set(stated)))
        others = {kind for other in MODALITIES if other is not modality for kind in self.types_of(other)}
        return tuple(sorted(kind for kind in found - others if spelled(kind) == modality.name))

    def mudata_name(self, modality: Modality) -> str | None:
        """Name of a modality in a MuData."""
        return getattr(self, f"{modality.key}_modality")

    def columns(self) -> list[tuple[str, str]]:
        """Every column of obs that is used, after the argument that names it."""
        single = ("batch_key", "modality_key", "labels_key")
        several = ("categorical_covariate_keys", "continuous_covariate_keys")
        named = [(argument, getattr(self, argument)) for argument in single]
        named += [("size_factor_key", key) for key in self.size_factor_keys]
        named += [(argument, key) for argument in several for key in getattr(self, argument)]
        return [(argument, key) for argument, key in named if key is not None]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Setup:
        """The inverse of :meth:`to_dict`.

        Raises
        ------
        TypeError
            If an entry is missing, unknown or of another type.
        """
        read: dict[str, Any] = {key: tuple(kept) if isinstance(kept, list) else kept for key, kept in values.items()}
        made = cls(**read)
        for entry in fields(cls):
            if not _is_of_type(getattr(made, entry.name), str(entry.type)):
                raise TypeError(f"{entry.name} is {getattr(made, entry.name)!r}, no {entry.type}")
        if made.kind not in ("anndata", "mudata"):
            raise TypeError(f"kind is {made.kind!r}, neither 'anndata' nor 'mudata'")
        return made

    def to_json(self) -> str:
        """The string kept in ``uns``."""
        return json.dumps({"version": SETUP_VERSION, **self.to_dict()}, ensure_ascii=False)

    @classmethod
    def of(cls, data: Any) -> Setup:
        """Read what ``setup_anndata`` or ``setup_mudata`` kept in ``data.uns``.

        Raises
        ------
        ValueError
            If the object was not set up, or by a version of the package that is not understood.
        """
        if not hasattr(data, "uns"):
            raise TypeError(f"adata must be an AnnData or a MuData, got {shown(data)}{how_to_make(data)}.")
        verb = "setup_mudata(mdata, ...)" if is_mudata(data) else "setup_anndata(adata, ...)"
        kept = data.uns.get(UNS_KEY)
        if not isinstance(kept, Mapping) or "setup" not in kept:
            raise ValueError(f"This {type(data).__name__} was not set up: call MULTIVI.{verb} first.")
        try:
            values = json.loads(str(kept["setup"]))
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise _damaged(verb)
        version = values.pop("version", None)
        if version != SETUP_VERSION:
            raise ValueError(
                f"uns[{UNS_KEY!r}]['setup'] has version {version!r} and this package reads "
                f"{SETUP_VERSION}: call MULTIVI.{verb} again."
            )
        try:
            return cls.from_dict(values)
        except TypeError:
            raise _damaged(verb) from None


def _is_of_type(value: Any, annotation: str) -> bool:
    """Whether a value has the type of a field: strings, their collections, or None."""
    if annotation == "tuple[str | None, str | None]":
        return (
            isinstance(value, tuple) and len(value) == 2 and all(isinstance(name, (str, type(None))) for name in value)
        )
    if annotation.startswith("tuple"):
        return isinstance(value, tuple) and all(isinstance(name, str) for name in value)
    if annotation.startswith("dict"):
        return isinstance(value, dict) and all(isinstance(word, str) for pair in value.items() for word in pair)
    return isinstance(value, str) or (value is None and "None" in annotation)


def _damaged(verb: str) -> ValueError:
    return ValueError(f"uns[{UNS_KEY!r}]['setup'] is damaged: call MULTIVI.{verb} again.")


def gathering(argument: str, key: str, tables: Mapping[str, Any], cells: Any) -> str:
    """The advice to gather a column in ``mdata.obs``, where the modalities of a MuData have it for all cells together.

    Parameters
    ----------
    argument, key
        The argument that names the column; its name may have the prefix by which mudata copies it, "rna:batch".
    tables
        Tables of cells by how the user would write them.
    cells
        All cells.

    Returns
    -------
    A sentence, with a blank before it; empty where the modalities lack the column for some cell.
    """
    name = key.rpartition(":")[2]
    parts = {place: table[name] for place, table in tables.items() if place.startswith("mdata.mod[") and name in table}
    known = [column.dropna().index for column in parts.values() if column.ndim == 1]
    if len(known) < max(1, len(parts)) or not cells.isin(known[0].append(known[1:])).all():
        return ""
    # Categories that differ do not combine.
    cast = "" if all(column.dtype.kind in "biuf" for column in parts.values()) else ".astype(object)"
    first, *others = (f"{place}[{name!r}]{cast}" for place in parts)
    line = f"mdata.obs[{name!r}] = {first}{''.join(f'.combine_first({other})' for other in others)}"
    return f" Gather it from the modalities, {line}" + ("." if key == name else f", and give {argument}={name!r}.")


def elsewhere(argument: str, key: str, tables: Mapping[str, Any], cells: Any) -> str:
    """The end of an error on a column that modalities of a MuData have: where it is, and how it is taken from there.

    Parameters are those of :func:`gathering`.
    """
    parts = [place for place, table in tables.items() if key in table]
    found = f" It is in {' and in '.join(parts)}." if parts else ""
    whole = next((place for place in parts if cells.isin(tables[place].index).all()), None)
    if whole == "mdata.obs":
        return f"{found} Leave {argument!r} out of modalities in the setup."
    if whole is not None:
        name = whole.removeprefix("mdata.mod[").removesuffix("].obs")
        return f"{found} Name that modality in the setup, modalities={{{argument!r}: {name}}}."
    gathered = gathering(argument, key, tables, cells)
    if found and not gathered:
        found += " Put a column with a value for every cell into mdata.obs."
    return found + gathered


def how_to_make(data: object) -> str:
    """The end of an error: how an AnnData is made of a path or of several objects; empty for anything else."""
    if isinstance(data, (str, os.PathLike)):
        return ": read it first, adata = pyro_multivi.read(path), or leave the counts on disk, open_stores(path)"
    several = isinstance(data, (list, tuple, Mapping)) and len(data) > 0
    return ": join several samples first, adata = pyro_multivi.join_samples(samples)" if several else ""


def is_lazy(matrix: object) -> bool:
    """Whether a matrix is a dask array, without importing dask."""
    return hasattr(matrix, "dask") and hasattr(matrix, "compute")


def in_memory(table: Any) -> Any:
    """A table of cells or features; one of anndata's ``read_lazy`` is read."""
    return table.to_memory() if hasattr(table, "to_memory") else table


def is_mudata(data: object) -> bool:
    """Whether an object is a MuData, without importing mudata (an optional extra)."""
    return any(base.__name__ == "MuData" and base.__module__.split(".")[0] == "mudata" for base in type(data).__mro__)
