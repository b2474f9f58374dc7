"""Summary of a saved model, read without its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_multivi.api.saving.data_file import DATA_FILES
from pyro_multivi.api.saving.description import Description
from pyro_multivi.api.saving.folder import FILES, model_folder, read_model
from pyro_multivi.data.checks import checked
from pyro_multivi.data.modality import MODALITIES, PROTEIN
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.vocabulary import PAIRED
from pyro_multivi.files import present

# Categories listed by name in the text.
_LISTED = 8


@dataclass(frozen=True, repr=False)
class SavedModel:
    """Content of a model folder without the tensors; printing it gives a text.

    Attributes
    ----------
    path
        The folder.
    version, format
        Version of the package that wrote it, and number of the format.
    program_class
        Import path of the program's class.
    config
        Sizes and modelling choices.
    spec
        Names of features and categories, and arguments of the setup.
    is_trained, n_epochs, losses
        Whether and for how long it was trained, and the last row of its history.
    n_train, n_validation
        Numbers of cells trained on and held out.
    minified
        Whether its data were minified.
    files
        Size of each file in bytes.
    """

    path: Path
    version: str
    format: int
    program_class: str
    config: Mapping[str, Any]
    spec: DataSpec
    is_trained: bool
    n_epochs: int
    losses: Mapping[str, float]
    n_train: int
    n_validation: int
    minified: bool
    files: Mapping[str, int]

    def __repr__(self) -> str:
        config, spec, sizes = self.config, self.spec, self.spec.n_cells
        alone = ", ".join(f"{sizes.get(each.name, 0)} {each.assay} only" for each in MODALITIES)
        alone += f", {sizes[PROTEIN]} proteins only" if PROTEIN in sizes else ""
        proteins = f", {spec.n_proteins} proteins" if spec.n_proteins else ""
        lines = [
            f"pyro-multivi model in {self.path}",
            f"  version     {self.version}, format {self.format}, class {self.program_class}",
            f"  features    {spec.n_genes} genes, {spec.n_regions} regions{proteins}",
            f"  cells       {sum(sizes.values())}: {sizes.get(PAIRED, 0)} paired, {alone}",
            f"  batches     {_listed(spec.batch_categories)}",
            *(f"  covariate   {name}: {_listed(known)}" for name, known in spec.categorical.items()),
            *(f"  covariate   {name}" for name in spec.continuous),
            f"  network     latent {config['n_latent']}, hidden {config['n_hidden']}, {config['gene_likelihood']}, "
            f"{config.get('accessibility_likelihood', 'bernoulli')}",
            f"  training    {self._training()}",
        ]
        data = " (minified)" if self.minified else ""
        for name, size in self.files.items():
            lines.append(f"  file        {name}{data if name in DATA_FILES else ''}: {size / 2**20:.1f} MB")
        if not any(name in self.files for name in DATA_FILES):
            lines.append("  data        not saved with it: load(path, adata)")
        return "\n".join(lines)

    def _training(self) -> str:
        if not self.is_trained:
            return "none"
        elbo = [f"{name} {self.losses[name]:.4g}" for name in ("elbo_train", "elbo_validation") if name in self.losses]
        cells = f"{self.n_train} cells, {self.n_validation} held out"
        return ", ".join([f"{self.n_epochs} epochs on {cells}", *elbo])


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)}: {', '.join(names[:_LISTED])}{more}"


@checked
def describe(dir_path: str | os.PathLike[str], prefix: str | None = None) -> SavedModel:
    """Describe a saved model without loading its tensors or data.

    Checksums of the weights and the data are not compared; :meth:`pyro_multivi.MULTIVI.load` does that.

    Parameters
    ----------
    dir_path, prefix
        As in :meth:`pyro_multivi.MULTIVI.load`.

    Returns
    -------
    SavedModel

    Raises
    ------
    FileNotFoundError
        If there is no saved model.
    BrokenModelError
        If its description is damaged, a file is missing, or it is of a newer format.

    Examples
    --------
    >>> import tempfile
    >>> import pyro_multivi as pm
    >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
    >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(f"{folder}/model")
    ...     found = pm.describe(f"{folder}/model")
    >>> found.spec.n_genes, found.config["n_latent"], found.is_trained
    (30, 3, False)
    """
    folder = model_folder(dir_path, prefix)
    saved = read_model(folder, with_tensors=False)
    described = Description.of(saved, f"dir_path={str(folder)!r}")
    split, there = described.split, present(folder.resolve())
    return SavedModel(
        path=folder,
        version=str(saved.description.get("version")),
        format=saved.version,
        program_class=described.program_class,
        config=described.config,
        spec=described.spec,
        is_trained=described.is_trained,
        n_epochs=len(described.history),
        losses=described.history[-1] if described.history else {},
        n_train=0 if split is None else len(split.train),
        n_validation=0 if split is None else len(split.validation),
        minified=described.minified,
        files={path.name: path.stat().st_size for path in sorted(there.iterdir()) if path.name in FILES},
    )
