"""Normalized, denoised and imputed expression and accessibility, with their uncertainty."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from pyro_multivi.api.arguments import average_over, check_threshold, library_factor, select_features
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.engine.draws import cells_at_a_time, region_factors
from pyro_multivi.posterior.quantities.estimates import Quantity
from pyro_multivi.posterior.quantities.impute import impute
from pyro_multivi.posterior.quantities.output import deliver


class EstimatesMixin(ModelBase):
    """A model that tells the expression and accessibility of cells, measured or not."""

    def get_normalized_expression(
        self,
        adata: Any = None,
        indices: Any = None,
        n_samples_overall: int | None = None,
        transform_batch: Any = None,
        gene_list: Any = None,
        use_z_mean: bool = True,
        n_samples: int = 1,
        batch_size: int = PREDICTION_BATCH,
        return_mean: bool = True,
        return_numpy: bool = False,
        silent: bool | None = None,
        *,
        library_size: Any = 1,
        return_interval: float | None = None,
        out: str | os.PathLike[str] | None = None,
        seed: int = 0,
    ) -> Any:
        r"""Expected expression of each gene in each cell, :math:`E_q[\ell' f_w(z, s)]`.

        Denoised where RNA was measured, imputed where it was not; :meth:`train` finds how far other evidence is
        trusted there. With a zero-inflated likelihood it is the expression before dropout.

        Parameters
        ----------
        adata
            Other cells; default: those of training.
        indices
            Positions, names or a mask of cells.
        n_samples_overall
            Another name of ``n_samples``. (In scvi-tools it draws cells, not the posterior.)
        transform_batch
            What would be in this batch: its name or code, or a list over which is averaged. The
            state of a cell is always inferred in its own batch. Default: each cell's own batch.
        gene_list
            Names, positions or a mask of genes; only these are computed.
        use_z_mean
            With ``n_samples=1``: decode the posterior mean of z instead of a draw.
        n_samples
            Draws from the posterior of each cell that are averaged. With more than one they are
            always real draws; of a cell without RNA some are states of other cells, as :meth:`train` found.
        batch_size
            Cells at a time, fewer if many draws are asked for. It does not change the result.
        return_mean
            Average over the draws; otherwise all of them are returned.
        return_numpy
            An array instead of a frame.
        silent
            Show no progress bar. Default: a bar when writing to ``out``.
        library_size
            :math:`\ell'`: 1 (shares of a cell's expression), a number, one number per cell, or
            ``"latent"``, the inferred library size, drawn along with z. For a cell without RNA that
            is what its accessibility says of it (:meth:`train` learns that from paired cells; without such,
            the prior of its own batch), also under ``transform_batch``.
        return_interval
            Probability of a central interval, such as 0.9: also return standard deviation and ends
            of the interval. It is of the expectation's z-driven part (and l with
            ``library_size="latent"``); counts scatter further. Needs ``n_samples`` of at least
            2 / (1 - return_interval).
        out
            A path ending in ``.h5ad`` or ``.zarr``: write there, cell by cell, instead of returning
            arrays. X holds the expectation, layers ``sd``, ``lower`` and ``upper`` the rest. The file
            appears when it is complete; after an interruption make the same call again to go on.
        seed
            Of the draws. A cell's draws do not depend on the other cells.

        Returns
        -------
        DataFrame or ndarray
            (cells, genes). With ``return_interval`` an
            :class:`~pyro_multivi.posterior.quantities.summary.Estimate` of four of these. With
            ``return_mean=False`` an array, (n_samples, cells, genes). With ``out`` its path.

        Raises
        ------
        ValueError
            If the model has no genes, a gene or batch is not known, or an argument is out of range.
        FileExistsError, FileNotFoundError, PermissionError
            If ``out`` cannot be written.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, n_batches=2, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> model.get_normalized_expression(gene_list=["gene_03", "gene_07"], transform_batch="batch_1").shape
        (80, 2)
        >>> found = model.get_normalized_expression(n_samples=50, return_interval=0.9)
        >>> bool((found.lower < found.upper).all(axis=None))
        True
        """
        self._check_modality("get_normalized_expression", "expression")
        average = average_over(
            self.spec, transform_batch, n_samples, n_samples_overall, use_z_mean, return_mean, return_interval, seed
        )
        genes = select_features("gene_list", gene_list, self.spec.gene_names, "gene", self.device)
        cells = self._cells(adata, indices, cells_at_a_time(batch_size, average.n_samples))
        quantity = Quantity("rho", genes, library_factor(library_size, cells.n_cells, self.device))
        return self._deliver(adata, cells, quantity, average, return_numpy, out, silent)

    def get_accessibility_estimates(
        self,
        adata: Any = None,
        indices: Any = None,
        n_samples_overall: int | None = None,
        region_list: Any = None,
        transform_batch: Any = None,
        use_z_mean: bool = True,
        threshold: float | None = None,
        normalize_cells: bool = False,
        normalize_regions: bool = False,
        batch_size: int = PREDICTION_BATCH,
        return_numpy: bool = False,
        *,
        n_samples: int = 1,
        return_mean: bool = True,
        return_interval: float | None = None,
        out: str | os.PathLike[str] | None = None,
        silent: bool | None = None,
        seed: int = 0,
    ) -> Any:
        r"""Expected accessibility of each region in each cell, :math:`E_q[g_z(z, s)]`.

        Denoised where ATAC was measured, imputed where it was not; :meth:`train` finds how far other evidence is
        trusted there. Also available as ``get_normalized_accessibility``.

        Parameters
        ----------
        adata, indices, transform_batch, use_z_mean, batch_size, return_numpy, return_mean, out, silent, seed
            As in :meth:`get_normalized_expression`.
        n_samples_overall, n_samples
            Two names of the number of draws from the posterior of each cell that are averaged. With
            more than one they are always real draws; of a cell without ATAC some are states of other cells.
        region_list
            Names, positions or a mask of regions; only these are computed.
        threshold
            In [0, 1]: estimates below it (after any scaling) become 0 and the result is sparse.
        normalize_cells
            Multiply with the cell factor d. For a cell without ATAC d is what its expression says of
            it: :meth:`train` learns that from paired cells. Without such cells d follows its prior, uniform
            on (0, 1).
        normalize_regions
            Multiply with the region factor r. With both factors the result is the expected
            detection of a region in a cell.
        return_interval
            As in :meth:`get_normalized_expression`; not together with ``threshold``.

        Returns
        -------
        DataFrame, ndarray or csr_matrix
            (cells, regions). With ``threshold`` a frame of sparse columns, or a csr matrix with
            ``return_numpy``. With ``return_interval`` an
            :class:`~pyro_multivi.posterior.quantities.summary.Estimate` of four of these. With
            ``return_mean=False`` an array, (n_samples, cells, regions). With ``out`` its path.

        Raises
        ------
        ValueError
            If the model has no regions, a region or batch is not known, or an argument is out of range.
        FileExistsError, FileNotFoundError, PermissionError
            If ``out`` cannot be written.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> model.get_accessibility_estimates(region_list=["region_05"], n_samples_overall=10).shape
        (80, 1)
        >>> model.get_normalized_accessibility(threshold=0.5, return_numpy=True).format
        'csr'
        """
        self._check_modality("get_accessibility_estimates", "accessibility")
        average = average_over(
            self.spec, transform_batch, n_samples, n_samples_overall, use_z_mean, return_mean, return_interval, seed
        )
        check_threshold(threshold, average)
        regions = select_features("region_list", region_list, self.spec.region_names, "region", self.device)
        n_regions = len(regions) if regions is not None else self.spec.n_regions
        whole_rows = n_regions if threshold is not None else 0
        cells = self._cells(adata, indices, cells_at_a_time(batch_size, average.n_samples, whole_rows))
        quantity = self._accessibility(regions, threshold, normalize_cells, normalize_regions)
        return self._deliver(adata, cells, quantity, average, return_numpy, out, silent)

    get_normalized_accessibility = get_accessibility_estimates

    def impute(
        self,
        adata: Any = None,
        indices: Any = None,
        transform_batch: Any = None,
        use_z_mean: bool = True,
        n_samples: int = 1,
        *,
        n_samples_overall: int | None = None,
        library_size: Any = 1,
        threshold: float | None = None,
        normalize_cells: bool = False,
        normalize_regions: bool = False,
        measured_too: bool = False,
        return_interval: float | None = None,
        batch_size: int = PREDICTION_BATCH,
        out: str | os.PathLike[str] | None = None,
        silent: bool | None = None,
        seed: int = 0,
    ) -> Any:
        """Fill the gaps of a mosaic: expression of ATAC-only cells, accessibility of RNA-only cells.

        Parameters
        ----------
        adata, indices, transform_batch, use_z_mean, n_samples, n_samples_overall, library_size, batch_size, \
        silent, seed
            As in :meth:`get_normalized_expression`.
        threshold, normalize_cells, normalize_regions
            As in :meth:`get_accessibility_estimates`; of accessibility only.
        measured_too
            Also estimate (denoise) what was measured.
        return_interval
            Also give standard deviation and interval, as in :meth:`get_normalized_expression`.
        out
            A path ending in ``.h5ad`` or ``.zarr``: write the AnnData there, cell by cell.

        Returns
        -------
        AnnData, MuData or Path
            A new object of the model's features, genes first; a MuData of two modalities that both
            hold all cells, for a model of a MuData; with ``out`` its path. It holds

            ==============================================  ==================================================
            ``X``                                           measured counts, csr; empty where not measured
            ``layers["imputed"]``                           estimates of what was not measured (with
                                                            ``measured_too`` of everything), csr; else empty
            ``layers["imputed_sd"]``, ``"imputed_lower"``,  with ``return_interval``
            ``"imputed_upper"``
            ``obs["expression_source"]``,                   "measured" or "imputed": where a cell's entries
            ``obs["accessibility_source"]``                 of a modality come from
            ``uns["imputation"]``                           the arguments, as JSON
            ==============================================  ==================================================

            beside the other columns of ``obs``.

        Raises
        ------
        ValueError
            If the model has one modality only, or an argument is out of range.
        FileExistsError, FileNotFoundError, PermissionError
            If ``out`` cannot be written.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> filled = model.impute()
        >>> filled.obs["expression_source"].value_counts().to_dict()
        {'measured': 60, 'imputed': 20}
        >>> bool(filled[filled.obs["expression_source"] == "imputed", :30].layers["imputed"].min() > 0)
        True
        """
        for modality in ("expression", "accessibility"):
            self._check_modality("impute", modality)
        average = average_over(
            self.spec, transform_batch, n_samples, n_samples_overall, use_z_mean, True, return_interval, seed
        )
        check_threshold(threshold, Average())
        n_features = self.spec.n_genes + self.spec.n_regions
        cells = self._cells(adata, indices, cells_at_a_time(batch_size, average.n_samples, n_features))
        quantities = [
            Quantity("rho", by_cell=library_factor(library_size, cells.n_cells, self.device)),
            self._accessibility(None, threshold, normalize_cells, normalize_regions),
        ]
        scale = {
            "transform_batch": transform_batch,
            "library_size": library_size if isinstance(library_size, (str, int, float)) else "one number per cell",
            "threshold": threshold,
            "normalize_cells": normalize_cells,
            "normalize_regions": normalize_regions,
        }
        obs = (self.adata if adata is None else adata).obs.iloc[cells.index.numpy()]
        return impute(
            self.program, cells, quantities, average, self.spec, obs, scale,
            measured_too=measured_too, out=out, silent=silent,
        )  # fmt: skip

    # ------------------------------------------------------------------ what the methods share

    def _accessibility(
        self, regions: Tensor | None, threshold: float | None, normalize_cells: bool, normalize_regions: bool
    ) -> Quantity:
        factors = region_factors(self.program) if normalize_regions else None
        if factors is not None and regions is not None:
            factors = factors[regions]
        return Quantity("p", regions, "d" if normalize_cells else 1.0, factors, threshold)

    def _deliver(
        self,
        adata: Any,
        cells: Minibatches,
        quantity: Quantity,
        average: Average,
        return_numpy: bool,
        out: str | os.PathLike[str] | None,
        silent: bool | None,
    ) -> Any:
        names = self.spec.gene_names if quantity.site == "rho" else self.spec.region_names
        if quantity.features is not None:
            names = tuple(names[place] for place in quantity.features.tolist())
        return deliver(
            self.program, cells, quantity, average, cells.cell_names, names,
            return_numpy=return_numpy, out=out, silent=silent,
        )  # fmt: skip
