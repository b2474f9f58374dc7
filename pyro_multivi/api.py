"""The analyst's door: AnnData or MuData in, arrays and frames out. Every method is thin."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.setup import setup_anndata, setup_mudata
from pyro_multivi.data.spec import DataSpec
from pyro_multivi.model import TrainableModel
from pyro_multivi.posterior.latent import MODALITIES, depth_factors, latent_state
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.training.fit import evaluate

#: Cells at a time in prediction: more than in training, nothing is kept for a backward pass.
PREDICTION_BATCH = 512


class MULTIVI(TrainableModel):
    """Joint model of gene expression and chromatin accessibility of single cells.

    Parameters
    ----------
    adata
        AnnData or MuData prepared by :meth:`setup_anndata` or :meth:`setup_mudata`. It is read,
        never changed.
    n_genes, n_regions
        Checked against the data if given; scvi-tools needs them, here they are known.
    n_hidden, n_latent, n_layers_encoder, n_layers_decoder, dropout_rate, gene_likelihood, \
    dispersion, latent_distribution, modality_weights, modality_penalty, region_factors, \
    encode_covariates, deeply_inject_covariates, use_batch_norm, use_layer_norm
        See :class:`~pyro_multivi.config.ProgramConfig`.
    fully_paired
        State that every cell has both modalities; an error is raised if one has not.
    library
        ``"latent"`` or ``"observed"``; with a size factor in the data that is used.
    seed
        Of the initial weights.
    program_class
        A subclass of :class:`~pyro_multivi.program.MultiVIProgram` with a model of your own.

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

    def __init__(
        self,
        adata: Any,
        n_genes: int | None = None,
        n_regions: int | None = None,
        modality_weights: str = "equal",
        modality_penalty: str | None = "Jeffreys",
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
        fully_paired: bool = False,
        library: str = "latent",
        seed: int = 0,
        program_class: type[MultiVIProgram] = MultiVIProgram,
    ) -> None:
        spec = DataSpec.of(adata)
        for name, given, known in (("n_genes", n_genes, spec.n_genes), ("n_regions", n_regions, spec.n_regions)):
            if given is not None and given != known:
                raise ValueError(f"{name}={given}, but the data set up has {known}: leave {name} out.")
        table = spec.table(adata)
        unpaired = int((~(table.has_rna & table.has_atac)).sum())
        if fully_paired and unpaired:
            raise ValueError(
                f"fully_paired=True, but {unpaired} of {len(table)} cells lack a modality: leave it out or "
                "keep paired cells only."
            )
        config = ProgramConfig(
            n_genes=spec.n_genes,
            n_regions=spec.n_regions,
            n_batch=spec.n_batch,
            n_labels=spec.n_labels,
            n_covariates=spec.design_width,
            n_hidden=n_hidden,
            n_latent=n_latent,
            n_layers_encoder=n_layers_encoder,
            n_layers_decoder=n_layers_decoder,
            dropout_rate=dropout_rate,
            gene_likelihood=gene_likelihood,
            dispersion=dispersion,
            latent_distribution=latent_distribution,
            modality_weights=modality_weights,
            modality_penalty=modality_penalty,
            region_factors=region_factors,
            encode_covariates=encode_covariates,
            deeply_inject_covariates=deeply_inject_covariates,
            use_batch_norm=use_batch_norm,
            use_layer_norm=use_layer_norm,
            library="size_factor" if table.rna_size is not None else library,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            program = program_class(config)
        program.start_from(table.marginals())
        program.eval()
        self._assemble(spec, program, adata, table)

    # ------------------------------------------------------------------ data

    setup_anndata = staticmethod(setup_anndata)
    setup_mudata = staticmethod(setup_mudata)

    def __repr__(self) -> str:
        config = self.program.config
        trained = f"trained for {self._history.n_epochs} epochs" if self.is_trained else "not trained"
        return (
            f"MULTIVI: {config.n_genes} genes ({config.gene_likelihood}, dispersion {config.dispersion}), "
            f"{config.n_regions} regions, {config.n_batch} batches; latent {config.latent}, hidden {config.hidden}; "
            f"{trained}"
        )

    # ------------------------------------------------------------------ results

    def get_latent_representation(
        self,
        adata: Any = None,
        modality: str = "joint",
        indices: Any = None,
        give_mean: bool = True,
        batch_size: int = PREDICTION_BATCH,
        return_dist: bool = False,
        n_samples: int = 1,
        seed: int = 0,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Latent state of each cell.

        Parameters
        ----------
        adata
            Other cells; default: those of training.
        modality
            ``"joint"``: given everything measured in a cell. ``"expression"`` or
            ``"accessibility"``: given that modality alone; NaN for cells that lack it.
        indices
            Positions, names or a mask of cells.
        give_mean
            The posterior mean. With ``latent_distribution="ln"``, its softmax, as the decoders read
            it. Otherwise draws.
        batch_size
            Cells at a time.
        return_dist
            Return mean and variance of the Normal over z instead.
        n_samples
            Draws per cell if ``give_mean=False``.
        seed
            Of the draws.

        Returns
        -------
        ndarray
            (cells, K); for several draws (n_samples, cells, K). With ``return_dist`` two of these.

        Raises
        ------
        ValueError
            If the modality is unknown, not modelled, or measured in none of the cells.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality={modality!r} is not allowed: choose one of {', '.join(map(repr, MODALITIES))}.")
        if n_samples < 1:
            raise ValueError(f"n_samples={n_samples} is not allowed: give at least 1.")
        self._check_modality("modality", modality)
        cells = self._cells(adata, indices, batch_size)
        measured = {"expression": cells.table.has_rna, "accessibility": cells.table.has_atac}.get(modality)
        if measured is not None and not bool(measured[cells.index].any()):
            raise ValueError(f"modality={modality!r}: none of the {cells.n_cells} cells has it. Use modality='joint'.")
        state = latent_state(self.program, cells, modality, 0 if give_mean or return_dist else n_samples, seed)
        if return_dist:
            return state.mean, state.variance
        if give_mean:
            return state.point
        assert state.samples is not None
        return state.samples if n_samples > 1 else state.samples[0]

    def get_library_size_factors(
        self, adata: Any = None, indices: Any = None, batch_size: int = PREDICTION_BATCH
    ) -> dict[str, NDArray[np.float32]]:
        """Depth of each cell.

        Returns
        -------
        dict
            ``"expression"``: posterior mean of l in counts (scvi-tools returns a logarithm);
            ``"accessibility"``: the cell factor d in (0, 1). NaN for cells that lack the modality.
        """
        return depth_factors(self.program, self._cells(adata, indices, batch_size))

    def get_region_factors(self) -> NDArray[np.float32]:
        """Factor r_j in (0, 1) of each region, (M,)."""
        self._check_trained()
        self._check_modality("get_region_factors", "accessibility")
        factors = self.program.region_factors()
        if factors is None:
            raise ValueError("region_factors=False was chosen for this model: it has no region factors.")
        return cast("NDArray[np.float32]", factors.detach().cpu().numpy())

    def get_elbo(
        self, adata: Any = None, indices: Any = None, batch_size: int = PREDICTION_BATCH, seed: int = 0
    ) -> float:
        """Evidence lower bound in nats per cell, one draw per cell; higher is better, no training term in it."""
        terms = evaluate(self.program, self._cells(adata, indices, batch_size), seed)
        return terms.elbo / terms.n_cells

    def get_reconstruction_error(
        self, adata: Any = None, indices: Any = None, batch_size: int = PREDICTION_BATCH, seed: int = 0
    ) -> dict[str, float]:
        """Minus log p(x | z) and minus log p(y | z) in nats per cell in which the modality was measured."""
        row = evaluate(self.program, self._cells(adata, indices, batch_size), seed).per_cell()
        prefix = "reconstruction_"
        names = [name for name in row if name.startswith(prefix) and name != "reconstruction_loss"]
        return {f"reconstruction_loss_{name[len(prefix):]}": row[name] for name in names}

    def _check_modality(self, argument: str, modality: str) -> None:
        missing = {"expression": self.spec.n_genes == 0, "accessibility": self.spec.n_regions == 0}
        if missing.get(modality, False):
            feature = "genes" if modality == "expression" else "regions"
            raise ValueError(f"{argument}: this model has no {feature}, so it knows nothing of {modality}.")
