"""Places of a model's data by the names of scvi-tools."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from pyro_multivi._version import __version__
from pyro_multivi.api.arguments import Data
from pyro_multivi.data.checks import nearest
from pyro_multivi.data.modality import MODALITIES, RNA
from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.covariates import codes
from pyro_multivi.data.setup.options import Setup
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.stores.reference import stores_of
from pyro_multivi.utils import attrdict


class AnnDataManager:
    """Places of a model's data, for reading, by the names of scvi-tools.

    Attributes
    ----------
    adata
        The object, or None for a model that was loaded without.
    """

    def __init__(self, spec: DataSpec, adata: Data | None) -> None:
        self._spec = spec
        self.adata = adata

    @cached_property
    def registry(self) -> attrdict:
        """Version, arguments of the setup, places and states of the data."""
        states = {key: self.get_state_registry(key) for key in self.data_registry}
        fields = {
            key: attrdict(data_registry=place, state_registry=states[key]) for key, place in self.data_registry.items()
        }
        setup = self._spec.setup
        return attrdict(
            pyro_multivi_version=__version__,
            model_name="MULTIVI",
            setup_method_name=f"setup_{setup.kind}",
            setup_args=setup_arguments(setup),
            field_registries=attrdict(fields),
        )

    @property
    def data_registry(self) -> attrdict:
        """Places of counts (``X``, ``atac``, ``proteins``), batches, labels, covariates, size factors in the object."""
        setup, found = self._spec.setup, attrdict()
        for modality in MODALITIES:
            if modality.n_features_in(self._spec):
                layer = setup.layer_of(modality)
                name = "X" if modality is RNA else modality.key
                found[name] = _place("layers" if layer else "X", layer, setup.mudata_name(modality))
        if setup.protein_key is not None:
            of_mudata, layer = setup.kind == "mudata", setup.protein_layer
            place, key = ("layers" if layer else "X", layer) if of_mudata else ("obsm", setup.protein_key)
            found["proteins"] = _place(place, key, setup.protein_key if of_mudata else None)
        for name, argument, keys in (
            ("batch", "batch_key", setup.batch_key),
            ("labels", "labels_key", setup.labels_key),
            ("size_factor", "size_factor_key", [key for key in setup.size_factor_keys if key]),
            ("extra_categorical_covs", "categorical_covariate_keys", list(setup.categorical_covariate_keys)),
            ("extra_continuous_covs", "continuous_covariate_keys", list(setup.continuous_covariate_keys)),
        ):
            if keys:
                found[name] = _place("obs", keys, setup.obs_modalities.get(argument))
        return found

    @property
    def summary_stats(self) -> attrdict:
        """Numbers of cells, genes (``n_vars``), regions (``n_atac``), batches, labels and covariates."""
        spec = self._spec
        return attrdict(
            n_cells=self._n_cells,
            n_vars=spec.n_genes,
            n_atac=spec.n_regions,
            **({"n_proteins": spec.n_proteins} if spec.n_proteins else {}),
            n_batch=spec.n_batch,
            n_labels=max(1, spec.n_labels),
            n_extra_categorical_covs=len(spec.categorical),
            n_extra_continuous_covs=len(spec.continuous),
            n_size_factor=sum(key is not None for key in spec.setup.size_factor_keys),
        )

    def get_state_registry(self, registry_key: str) -> attrdict:
        """Names of the features, or categories, of one entry of :attr:`data_registry`."""
        self._place_of(registry_key)
        spec = self._spec
        states: dict[str, dict[str, Any]] = {
            "batch": _categories(spec.batch_categories, spec.setup.batch_key),
            "labels": _categories(spec.label_categories, spec.setup.labels_key),
            "extra_categorical_covs": {
                "field_keys": tuple(spec.categorical),
                "mappings": {name: np.array(known, dtype=object) for name, known in spec.categorical.items()},
                "n_cats_per_key": [len(known) for known in spec.categorical.values()],
            },
            "extra_continuous_covs": {"columns": list(spec.continuous)},
            "size_factor": {"columns": [key for key in spec.setup.size_factor_keys if key]},
            "proteins": {"n_proteins": spec.n_proteins, **self._features(spec.protein_names)},
        }
        for modality in MODALITIES:
            states["X" if modality is RNA else modality.key] = self._features(modality.feature_names_in(spec))
        return attrdict(states.get(registry_key, {}))

    def get_from_registry(self, registry_key: str) -> Any:
        """Data of one entry of :attr:`data_registry`.

        Counts are the object's own matrix, all of it: of an AnnData genes and regions together. Batches and labels are
        codes, (n, 1), positions in ``categorical_mapping``; covariates and size factors a frame, categories as codes.

        Raises
        ------
        KeyError
            If there is no such entry.
        ValueError
            If there are no data, or the object does not hold their counts.
        """
        place = self._place_of(registry_key)
        if self.adata is None:
            raise ValueError("This model has no data: give it some first, model.adata = adata.")
        opened = self._spec.open(self.adata)
        if place.attr_name == "obs":
            return self._columns(registry_key, place.attr_key, opened)
        if registry_key != "proteins" and (opened.posterior is not None or stores_of(self.adata) is not None):
            raise ValueError(
                f"registry_key={registry_key!r}: the object does not hold the counts, which are on disk or were left "
                "out by minify_adata or minify_mudata. model.minibatch(indices) reads those on disk."
            )
        holder = self.adata if place.mod_key is None else self.adata.mod[place.mod_key]
        return holder.X if place.attr_name == "X" else getattr(holder, place.attr_name)[place.attr_key]

    @property
    def _n_cells(self) -> int:
        """Cells of the object; without one, of that which was set up."""
        return sum(self._spec.n_cells.values()) if self.adata is None else int(self.adata.n_obs)

    def _features(self, names: Sequence[str]) -> dict[str, Any]:
        kept = np.array(names, dtype=object)
        return {"n_obs": self._n_cells, "n_vars": len(kept), "column_names": kept}

    def _place_of(self, registry_key: str) -> attrdict:
        known = self.data_registry
        if registry_key not in known:
            raise KeyError(f"registry_key={registry_key!r} is not there. {nearest(registry_key, known)}")
        return known[registry_key]

    def _columns(self, registry_key: str, keys: Any, opened: Opened) -> Any:
        spec = self._spec
        if registry_key == "batch":
            return spec.batch_codes_of(opened)[:, None]
        if registry_key == "labels":
            return codes(opened, "labels_key", keys, spec.label_categories)[:, None]
        if registry_key == "extra_categorical_covs":
            argument = "categorical_covariate_keys"
            found = {key: codes(opened, argument, key, known) for key, known in spec.categorical.items()}
        else:
            argument = "size_factor_key" if registry_key == "size_factor" else "continuous_covariate_keys"
            found = {key: opened.column(argument, key).to_numpy() for key in keys}
        return pd.DataFrame(found, index=opened.cells)


def _categories(names: Sequence[str], key: str | None) -> dict[str, Any]:
    return {"categorical_mapping": np.array(names, dtype=object), "original_key": key}


def _place(where: str, key: Any, modality: str | None) -> attrdict:
    return attrdict(mod_key=modality, attr_name=where, attr_key=key)


def setup_arguments(setup: Setup) -> attrdict:
    """Arguments of a setup, by their names here and, where these are others, in scvi-tools."""
    sizes = list(setup.size_factor_keys)
    known = {**setup.to_dict(), "size_factor_key": sizes if sizes[1] else sizes[0]}
    if setup.kind == "anndata":
        known |= {"layer": setup.rna_layer, "protein_expression_obsm_key": setup.protein_key}
        known["protein_names_uns_key"] = setup.protein_names_key
    else:
        found = {f"{modality.key}_layer": setup.mudata_name(modality) for modality in MODALITIES}
        found = {**found, "protein_layer": setup.protein_key, **setup.obs_modalities}
        known |= {"idx_layer": None, "modalities": {key: name for key, name in found.items() if name is not None}}
    return attrdict(known)
