"""Class of the analyst: its constructor; the mixins beside this file hold its methods."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_multivi._settings import settings
from pyro_multivi.api.arguments import Data, check_paired
from pyro_multivi.api.checks import ChecksMixin
from pyro_multivi.api.custom_program import configure, learns_together, modelled_extra
from pyro_multivi.api.estimates import EstimatesMixin
from pyro_multivi.api.latent import LatentMixin
from pyro_multivi.api.proteins.differential import ProteinDifferentialMixin
from pyro_multivi.api.query.mixin import QueryMixin
from pyro_multivi.api.scvi_tools.arguments import CONSTRUCTOR, SETUP_ANNDATA, takes
from pyro_multivi.api.scvi_tools.attributes import ScviAttributes
from pyro_multivi.api.scvi_tools.minify import MinifyMixin
from pyro_multivi.api.training import TrainingMixin
from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.checks import caution, check_mapping, checked
from pyro_multivi.data.fragments.checks import check_fragments, fragment_cautions
from pyro_multivi.data.modality import MODALITIES, PROTEIN, RNA
from pyro_multivi.data.setup.register import setup_anndata, setup_mudata
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.datasets.stores.open import open_stores
from pyro_multivi.isolation import isolated
from pyro_multivi.networks.modules import build_program
from pyro_multivi.networks.panels import start_typical
from pyro_multivi.program import MultiVIProgram


class MULTIVI(
    TrainingMixin,
    LatentMixin,
    EstimatesMixin,
    ChecksMixin,
    ProteinDifferentialMixin,
    QueryMixin,
    MinifyMixin,
    ScviAttributes,
):
    """Joint model of gene expression and chromatin accessibility of single cells.

    Parameters
    ----------
    adata
        AnnData or MuData prepared by :meth:`setup_anndata` or :meth:`setup_mudata`. It is read and never changed. Or
        the path of an AnnData that was written after that: its counts stay on disk
        (:func:`~pyro_multivi.open_stores`).
    n_genes, n_regions
        Numbers of features; default: those of the data. They are needed for an AnnData without feature types, whose
        first columns are genes, followed by regions. Of a MuData that has more, the first are modelled.
    modality_weights
        Weights of the average of what RNA and ATAC say of a cell's state: ``"equal"``, ``"universal"`` (learned), or
        ``"cell"`` (learned for each cell).
    modality_penalty
        Penalty that draws the two halves of a paired cell together in training: ``"contrastive"``, ``"Jeffreys"``
        (the paper's), ``"MMD"`` or None.
    n_hidden
        Width of hidden layers; default 128.
    n_latent
        Dimension of the latent state; default 20, or ``n_hidden`` where that is less.
    n_layers_encoder, n_layers_decoder
        Numbers of hidden layers.
    dropout_rate
        Dropout rate of the encoders' hidden layers.
    region_factors
        Whether each region has a factor of its own for how often it is found open.
    gene_likelihood
        Distribution of gene counts: ``"zinb"``, ``"nb"`` or ``"poisson"``.
    dispersion
        Inverse dispersion for each ``"gene"``, or for each gene and batch (``"gene-batch"``), label (``"gene-label"``,
        needs ``labels_key`` of the setup) or cell (``"gene-cell"``).
    use_batch_norm, use_layer_norm
        Networks that have it: ``"none"``, ``"encoder"``, ``"decoder"`` or ``"both"``.
    latent_distribution
        ``"normal"``, or ``"ln"``: the decoders are given softmax(z), a composition.
    deeply_inject_covariates
        Give batch and covariates to every layer rather than the first.
    encode_covariates
        Give batch and covariates to the encoders too; the decoders always have them.
    fully_paired
        Learn the states from all modalities together, without a penalty that draws them to each other (give
        ``contrast_weight`` or ``mixing_weight`` to keep it), which fits cells with all of them better. States given one
        modality alone, of other cells or for ``modality=``, are learned from those given all, by encoders of their
        own. Every cell of training needs all modalities (RNA, ATAC and proteins, two of them or more), else an error is
        raised; data that the model is used on later do not. Default: whether every cell has them, unless a penalty
        other than the default's, one of its weights, or a ``program_class`` with extra modalities or a guide of its own
        is chosen; a log line at level INFO says so.
    protein_dispersion
        Inverse dispersion for each ``"protein"``, or for each protein and batch (``"protein-batch"``) or label
        (``"protein-label"``).
    library
        RNA depth of a cell: ``"latent"``, inferred with a prior for each batch, or ``"observed"``, its total count.
        Size factors in the data (``size_factor_key`` of the setup) take precedence.
    seed
        Seed of the initial weights; default: ``pyro_multivi.settings.seed``, or 0.
    program_class
        Subclass of :class:`~pyro_multivi.program.MultiVIProgram` with a model of your own.
    program_options
        Values of the options that the ``config_class`` of that class has beyond those above.
    mixing_weight
        Weight, in nats, of a penalty for paired, RNA-only and ATAC-only cells whose states lie apart. It takes them for
        samples of one population: give 0 where they come from different tissues. Default: 4 with
        ``modality_penalty="contrastive"``, else 0.
    contrast_weight
        Weight of the term by which the two halves of a cell must find each other among other cells. Less of it
        matches halves less closely, and gives purer types in shallow data. Default: 2.5 with
        ``modality_penalty="contrastive"``, else 0.
    region_dropout_rate
        Share of a cell's open regions that the ATAC encoder does not see in training, another one at each step.
    accessibility_likelihood
        Distribution of accessibility: ``"bernoulli"``, open or closed, whatever the count; ``"poisson"`` or ``"nb"``,
        counts of fragments, of which there may be more in a region the more it is open. Counts of reads are turned into
        those by :func:`~pyro_multivi.reads_to_fragments`.
    latent_prior
        Prior of the states of cells: ``"normal"``, the paper's, or ``"mixture"``, one of Normals whose weights each
        batch has, which keeps batches of other types of cells from being laid on each other.

    See Also
    --------
    pyro_multivi.config.ProgramConfig : The same choices, as the program holds them.

    Examples
    --------
    >>> import pyro_multivi as pm
    >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
    >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
    >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
    >>> model.train(max_epochs=2, progress_bar=False)
    >>> model.get_latent_representation().shape
    (80, 3)
    """

    @takes(CONSTRUCTOR)
    @isolated()
    @checked
    def __init__(
        self,
        adata: Data | str | os.PathLike[str],
        n_genes: int | None = None,
        n_regions: int | None = None,
        modality_weights: str = "equal",
        modality_penalty: str | None = "contrastive",
        n_hidden: int | None = None,
        n_latent: int | None = None,
        n_layers_encoder: int = 2,
        n_layers_decoder: int = 2,
        dropout_rate: float = 0.1,
        region_factors: bool = True,
        gene_likelihood: str = "zinb",
        dispersion: str = "gene",
        use_batch_norm: str = "none",
        use_layer_norm: str = "both",
        latent_distribution: str = "normal",
        deeply_inject_covariates: bool = False,
        encode_covariates: bool = False,
        fully_paired: bool | None = None,
        protein_dispersion: str = "protein",
        library: str = "latent",
        seed: int | None = None,
        program_class: type[MultiVIProgram] = MultiVIProgram,
        program_options: Mapping[str, Any] | None = None,
        mixing_weight: float | None = None,
        contrast_weight: float | None = None,
        region_dropout_rate: float = 0.25,
        accessibility_likelihood: str = "bernoulli",
        latent_prior: str = "normal",
    ) -> None:
        # First, while the arguments are the only local names.
        choices = {name: value for name, value in locals().items() if name in ProgramConfig.__dataclass_fields__}
        if isinstance(adata, (str, os.PathLike)):
            if not Path(adata).exists():
                raise ValueError(
                    f"adata={str(adata)!r} is neither an AnnData nor a MuData, and no file or folder that is there."
                )
            adata = open_stores(adata)
        spec = DataSpec.of(adata, dict(zip(MODALITIES, (n_genes, n_regions), strict=True)))
        table = spec.table(adata)
        if fully_paired:
            check_paired(table, modelled_extra(spec, program_class), "leave it out or keep paired cells only.")
        elif fully_paired is None:
            is_default = str(modality_penalty) == "contrastive" and contrast_weight is None and mixing_weight is None
            choices["fully_paired"] = is_default and learns_together(spec, table, program_class)
        given_size = RNA.size_factor_in(table) is not None
        if library == "size_factor" and not given_size:
            raise ValueError(
                "library='size_factor' needs size factors in the data: give size_factor_key to setup_anndata or "
                "setup_mudata, or choose 'latent' or 'observed'."
            )
        choices.update(
            n_genes=spec.n_genes,
            n_regions=spec.n_regions,
            n_batch=spec.n_batch,
            n_labels=spec.n_labels,
            n_covariates=spec.design_width,
            library="size_factor" if given_size else library,
            extra={name: len(features) for name, features in spec.extra.items()},
            proteins=spec.setup.protein_key is not None,
        )
        options = check_mapping("program_options", program_options, "{'name': value}")
        config = configure(program_class, options, **choices)
        if config.counts_fragments:
            check_fragments(table, spec.region_names)
            for sentence in fragment_cautions(table):
                caution(sentence)
        program = build_program(program_class, config, settings.seed_or(seed))
        marginals = table.marginals(config.counts_fragments)
        program.start_from(marginals)
        program.start_extra_from(table)
        if any(modality.panels_in(table) is not None for modality in MODALITIES):
            start_typical(program, table.blocks(), marginals)
        program.eval()
        self._assemble(spec, program, adata, table)

    # ------------------------------------------------------------------ data

    setup_anndata = staticmethod(takes(SETUP_ANNDATA)(setup_anndata))
    setup_mudata = staticmethod(setup_mudata)

    def __repr__(self) -> str:
        config = self.program.config
        names = [each.name for each in self.program.modelled_extra]
        also = "".join(f", {config.extra[name]} {'proteins' if name == PROTEIN else name}" for name in names)
        batches = f"{config.n_batch} batch{'es' * (config.n_batch != 1)}"
        trained = f"trained for {self._history.n_epochs} epochs" if self.is_trained else "not trained"
        return (
            f"MULTIVI: {config.n_genes} genes ({config.gene_likelihood}, dispersion {config.dispersion}), "
            f"{config.n_regions} regions ({config.accessibility_likelihood}), {batches}{also}; "
            f"latent {config.latent}, hidden {config.hidden}; {trained}"
        )
