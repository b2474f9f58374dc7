"""Mixin: attributes of scvi-tools' models that scripts read; all are views of the specification and the split."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_multivi.api.arguments import Data
from pyro_multivi.api.base import ModelBase
from pyro_multivi.api.saving.description import Description
from pyro_multivi.api.saving.folder import model_folder, read_model
from pyro_multivi.api.scvi_tools.arguments import ABSENT, VAR_NAMES, Absent, takes
from pyro_multivi.api.scvi_tools.manager import AnnDataManager, setup_arguments
from pyro_multivi.data.checks import checked, nearest
from pyro_multivi.data.modality import MODALITIES, PROTEIN
from pyro_multivi.data.setup.spec import describe
from pyro_multivi.data.setup.summary import SetupReport
from pyro_multivi.program import MultiVIProgram


class ScviAttributes(ModelBase):
    """Attributes of scvi-tools' models."""

    get_normalized_function_name: str = "get_normalized_accessibility"

    @property
    def module(self) -> MultiVIProgram:
        """The program, :attr:`program`: a ``torch.nn.Module``.

        Its sizes and choices are in ``module.config``. They are attributes of it as well, by scvi-tools' names too:
        ``n_input_genes``, ``n_input_regions``, ``n_hidden``, ``n_latent``, ``use_size_factor_key``.
        """
        config = self.program.config
        known = {field.name: getattr(config, field.name) for field in fields(config)}
        known |= {f"n_input_{modality.features}": modality.n_features_in(config) for modality in MODALITIES}
        known |= {"n_input_proteins": self.n_proteins, "n_hidden": config.hidden, "n_latent": config.latent}
        known["use_size_factor_key"] = any(key is not None for key in self.spec.setup.size_factor_keys)
        for name, value in known.items():
            if not hasattr(self.program, name):
                self.program.__dict__[name] = value
        return self.program

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.spec.n_genes

    @property
    def n_regions(self) -> int:
        """Number of regions."""
        return self.spec.n_regions

    @property
    def n_proteins(self) -> int:
        """Number of proteins."""
        return self.spec.n_proteins

    @property
    def n_latent(self) -> int:
        """Dimension of the latent state."""
        return self.program.config.latent

    @property
    def train_indices(self) -> NDArray[np.int64]:
        """Positions of the cells trained on, ascending; empty if there are none or they are unknown."""
        split = self._current_split()
        return np.zeros(0, dtype=np.int64) if split is None else split.train.numpy().copy()

    @property
    def test_indices(self) -> NDArray[np.int64]:
        """Positions of the cells that were neither trained on nor held out, ascending."""
        split = self._current_split()
        if split is None or self._table is None:
            return np.zeros(0, dtype=np.int64)
        used = np.concatenate([split.ever_trained.numpy(), split.validation.numpy()])
        return np.setdiff1d(np.arange(len(self._table)), used)

    @property
    def summary_string(self) -> str:
        """Sizes and choices of the model in one line, as ``repr(model)``."""
        return repr(self)

    @property
    def adata_manager(self) -> AnnDataManager:
        """Places of the data, for reading."""
        known: AnnDataManager | None = getattr(self, "_manager", None)
        if known is None or known.adata is not self.adata:
            self._manager = known = AnnDataManager(self.spec, self.adata)
        return known

    @property
    def registry(self) -> dict[str, Any]:
        """Version, arguments of the setup, places and states of the data."""
        return self.adata_manager.registry

    @property
    def summary_stats(self) -> dict[str, int]:
        """Numbers of cells, genes, regions, batches, labels and covariates."""
        return self.adata_manager.summary_stats

    @checked
    def data_registry(self, registry_key: str) -> Any:
        """Data of one kind: counts of ``"X"``, ``"atac"``, ``"proteins"``, codes of ``"batch"``, covariates, ...

        Places of the data in the object are in ``adata_manager.data_registry``.

        Parameters
        ----------
        registry_key
            Its name there.

        Returns
        -------
        ndarray, sparse matrix or DataFrame
            Counts: the object's own matrix, all of it. Batches and labels: codes, (n, 1), positions in
            ``get_state_registry(registry_key).categorical_mapping``. Covariates and size factors: a frame, categories
            as codes.
        """
        return self.adata_manager.get_from_registry(registry_key)

    @checked
    def get_from_registry(self, adata: Data, registry_key: str) -> Any:
        """Data of one kind in any object, as :meth:`data_registry` of the model's own.

        Parameters
        ----------
        adata
            The object. Its columns are found by the names of the model's own data.
        registry_key
            As in :meth:`data_registry`.
        """
        return AnnDataManager(self.spec, adata).get_from_registry(registry_key)

    @checked
    def get_state_registry(self, registry_key: str) -> dict[str, Any]:
        """Names of the features, or categories, of one kind of data.

        Parameters
        ----------
        registry_key
            Its name in ``adata_manager.data_registry``.
        """
        return self.adata_manager.get_state_registry(registry_key)

    @checked
    def get_setup_arg(self, setup_arg: str) -> Any:
        """Value of an argument of the setup, such as ``"batch_key"``.

        Parameters
        ----------
        setup_arg
            Its name, as in ``registry["setup_args"]``: those of ``setup_anndata`` or ``setup_mudata`` in scvi-tools,
            and those of the setup here.
        """
        known = setup_arguments(self.spec.setup)
        if setup_arg not in known:
            raise KeyError(f"setup_arg={setup_arg!r} is no argument of the setup. {nearest(setup_arg, known)}")
        return known[setup_arg]

    @takes(VAR_NAMES)
    def get_var_names(self) -> dict[str, NDArray[Any]]:
        """Names of the features of the model, by modality: its name in the MuData, else "rna", "atac", "protein"."""
        spec, setup = self.spec, self.spec.setup
        names: dict[str, Sequence[str]] = {
            setup.mudata_name(modality) or modality.key: modality.feature_names_in(spec) for modality in MODALITIES
        }
        if spec.n_proteins:
            names[setup.place_of_extra(PROTEIN) if setup.kind == "mudata" else PROTEIN] = spec.protein_names
        return {name: np.array(found, dtype=object) for name, found in names.items()}

    @checked
    def get_anndata_manager(self, adata: Data, required: bool = False) -> AnnDataManager:
        """Places of the data of an object.

        Parameters
        ----------
        adata
            The object. Its columns and features are found by the names of the model's own data.
        required
            No effect: every object has one.
        """
        self.spec.table(adata)
        return AnnDataManager(self.spec, adata)

    @checked
    def view_anndata_setup(self, adata: Data | None = None, hide_state_registries: bool = False) -> None:
        """Print what the setup found: cells, features, batches, and remarks.

        Parameters
        ----------
        adata
            Another object, read by the same arguments; default: that of training.
        hide_state_registries
            Print the arguments of the setup only.
        """
        setup = self.spec.setup
        given = self.adata if adata is None else adata
        if hide_state_registries or given is None:
            _show(setup.to_dict())
        else:
            stated = {modality: modality.n_features_in(self.spec) for modality in MODALITIES}
            sys.stdout.write(f"{SetupReport.of(describe(given, setup, None if setup.feature_type_key else stated))}\n")

    @checked
    def view_registry(self, hide_state_registries: bool = False) -> None:
        """Print what :meth:`view_anndata_setup` prints.

        Parameters
        ----------
        hide_state_registries
            Print the arguments of the setup only.
        """
        self.view_anndata_setup(hide_state_registries=hide_state_registries)

    def view_setup_method_args(self) -> None:
        """Print the arguments of the setup."""
        _show(self.spec.setup.to_dict())

    @staticmethod
    @checked
    def view_setup_args(dir_path: str | os.PathLike[str], prefix: str | None = None) -> None:
        """Print the arguments of the setup of a saved model.

        Parameters
        ----------
        dir_path, prefix
            As in :meth:`load`.
        """
        _show(ScviAttributes.load_registry(dir_path, prefix)["setup_args"])

    @staticmethod
    @checked
    def load_registry(dir_path: str | os.PathLike[str], prefix: str | None = None) -> dict[str, Any]:
        """Registry of a saved model, as :attr:`registry`.

        Parameters
        ----------
        dir_path, prefix
            As in :meth:`load`.
        """
        folder = model_folder(dir_path, prefix)
        saved = read_model(folder, with_tensors=False)
        return AnnDataManager(Description.of(saved, f"dir_path={str(folder)!r}").spec, None).registry


#: Attributes that scvi-tools also has with an underscore behind their names.
_UNDERSCORED = ("registry", "history", "is_trained", "train_indices", "validation_indices", "test_indices")
for _name in _UNDERSCORED:
    _set = (lambda model, value: setattr(model, "is_trained", value)) if _name == "is_trained" else None
    _doc = f":attr:`{_name}`, as scvi-tools names it."
    setattr(ScviAttributes, f"{_name}_", property(attrgetter(_name), _set, doc=_doc))

for _name, _says in ABSENT.items():
    setattr(ScviAttributes, _name, Absent(_name, _says))


def _show(arguments: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(arguments, indent=2, ensure_ascii=False)}\n")
