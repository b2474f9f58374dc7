"""Normalized, denoised and imputed expression and accessibility, with their uncertainty."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_multivi.api.arguments import (
    AccessibilityOptions,
    Batches,
    Data,
    ExpressionOptions,
    FeatureList,
    ImputeOptions,
    Indices,
    LibrarySize,
    OutPath,
    accessibility_of,
    as_json,
    check_threshold,
    choose_features,
    imputed_quantities,
    library_factor,
)
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.data.checks import checked
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.engine.draws import cells_at_a_time
from pyro_multivi.posterior.quantities.estimates import Quantity
from pyro_multivi.posterior.quantities.impute import impute, imputed_modalities
from pyro_multivi.posterior.quantities.output import Estimates, deliver
from pyro_multivi.posterior.quantities.summary import Estimate

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EstimatesMixin(ModelBase):
    """Methods that return the expression and accessibility of cells, measured or not."""

    @overload
    def get_normalized_expression(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: Literal[False] = ...,
        return_mean: Literal[True] = ..., return_interval: None = ..., out: None = ...,
        **options: Unpack[ExpressionOptions],
    ) -> pd.DataFrame: ...  # fmt: skip
    @overload
    def get_normalized_expression(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: Literal[True],
        return_mean: bool = ..., return_interval: None = ..., out: None = ..., **options: Unpack[ExpressionOptions],
    ) -> NDArray[np.float32]: ...  # fmt: skip
    @overload
    def get_normalized_expression(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: bool = ...,
        return_interval: float, out: None = ..., **options: Unpack[ExpressionOptions],
    ) -> Estimate: ...  # fmt: skip
    @overload
    def get_normalized_expression(
        self, adata: Data | None = ..., indices: Indices = ..., n_samples_overall: int | None = ...,
        transform_batch: Batches = ..., gene_list: FeatureList = ..., use_z_mean: bool = ..., n_samples: int = ...,
        batch_size: int = ..., return_mean: bool = ..., return_numpy: bool = ..., silent: bool | None = ...,
        *, library_size: LibrarySize = ..., return_interval: float | None = ..., out: OutPath | None = ...,
        seed: int = ...,
    ) -> Estimates: ...  # fmt: skip
    @checked
    def get_normalized_expression(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        n_samples_overall: int | None = None,
        transform_batch: Batches = None,
        gene_list: FeatureList = None,
        use_z_mean: bool = True,
        n_samples: int = 1,
        batch_size: int = PREDICTION_BATCH,
        return_mean: bool = True,
        return_numpy: bool = False,
        silent: bool | None = None,
        *,
        library_size: LibrarySize = 1,
        return_interval: float | None = None,
        out: OutPath | None = None,
        seed: int = 0,
    ) -> Estimates:
        r"""Expected expression of each gene in each cell, :math:`E_q[\ell' f_w(z, s)]`.

        Denoised where RNA was measured, imputed where it was not, and drawn there towards the mean of the measured as
        :meth:`train` learned (:mod:`pyro_multivi.posterior.engine.decode`). With zero inflation it is before dropout.

        Parameters
        ----------
        adata, indices
            Other cells, default: those of training; positions, names or a mask of some of them.
        n_samples_overall
            Another name of ``n_samples``. (In scvi-tools it draws cells, not the posterior.)
        transform_batch
            Batch to decode in: its name or code, or a list of batches to average over, each once. The
            state of a cell is always inferred in its own batch. Default: each cell's own batch.
        gene_list
            Names, positions or a mask of genes; only these are computed.
        use_z_mean
            With ``n_samples=1``: decode the posterior mean of z instead of a draw. Where RNA was not measured, that
            would be too sure: there the decoder's last hidden layer is averaged over 24 points.
        n_samples
            Draws from the posterior of each cell that are decoded and averaged; real draws if more than one.
        batch_size
            Cells at a time, fewer with many draws. It does not change the result.
        return_mean
            Average over draws of the latent state. If not, and ``n_samples > 1``: return all, drawn as for an interval.
        return_numpy
            Return an array instead of a frame.
        silent
            Show no progress bar. Default: a bar when writing to ``out``.
        library_size
            :math:`\ell'`: 1 (shares of a cell's expression), a number, one per cell, or ``"latent"``, the inferred one.
            Without RNA it is predicted from accessibility as :meth:`train` fitted to pairs, else by the batch's prior.
        return_interval
            Probability of a central interval of the expectation over draws of the state, the decoder's last layer and
            how cells of one state differ, such as 0.9: also return its ends and the standard deviation, all of draws
            alone: what is imputed is not drawn towards the mean of the measured. Needs at least 2 / (1 - it) draws.
        out
            A path ending in ``.h5ad`` or ``.zarr``: write there, cell by cell, instead of returning
            arrays. X holds the expectation, layers ``sd``, ``lower`` and ``upper`` the rest. The file appears when it
            is complete (until then it is in ``.NAME.unfinished``); after an interruption make the same call to go on.
        seed
            Seed of the draws. Those of a cell depend on its position in the data, not on the other cells.

        Returns
        -------
        DataFrame or ndarray
            (cells, genes). With ``return_interval`` an :class:`~pyro_multivi.posterior.quantities.summary.Estimate` of
            four of these. With several draws and ``return_mean=False`` (n_samples, cells, genes). With ``out`` a path.

        Raises
        ------
        ValueError, TypeError, OSError
            If a gene or batch is unknown, an argument is wrong, or ``out`` cannot be written.

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
        if self._lacks("get_normalized_expression", RNA, return_interval, out):
            return self._without_features(adata, indices, return_numpy)
        average = self._average(
            [RNA], transform_batch, n_samples, n_samples_overall, use_z_mean, return_mean, return_interval, seed
        )
        genes, names = choose_features(self.spec, RNA, gene_list, self.device)
        cells = self._cells(adata, indices, cells_at_a_time(batch_size, average.n_samples), True, None)
        quantity = Quantity(RNA.decoded, genes, library_factor(library_size, cells, self.program))
        return deliver(
            self.program, cells, quantity, average, names,
            return_numpy=return_numpy, out=out, silent=silent,
        )  # fmt: skip

    @overload
    def get_accessibility_estimates(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: Literal[False] = ...,
        return_mean: Literal[True] = ..., return_interval: None = ..., threshold: float | None = ..., out: None = ...,
        **options: Unpack[AccessibilityOptions],
    ) -> pd.DataFrame: ...  # fmt: skip
    @overload
    def get_accessibility_estimates(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: Literal[True],
        return_mean: bool = ..., return_interval: None = ..., threshold: None = ..., out: None = ...,
        **options: Unpack[AccessibilityOptions],
    ) -> NDArray[np.float32]: ...  # fmt: skip
    @overload
    def get_accessibility_estimates(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: Literal[True],
        threshold: float, out: None = ..., **options: Unpack[AccessibilityOptions],
    ) -> sp.csr_matrix: ...  # fmt: skip
    @overload
    def get_accessibility_estimates(
        self, adata: Data | None = ..., indices: Indices = ..., *, return_numpy: bool = ...,
        return_interval: float, out: None = ..., **options: Unpack[AccessibilityOptions],
    ) -> Estimate: ...  # fmt: skip
    @overload
    def get_accessibility_estimates(
        self, adata: Data | None = ..., indices: Indices = ..., n_samples_overall: int | None = ...,
        region_list: FeatureList = ..., transform_batch: Batches = ..., use_z_mean: bool = ...,
        threshold: float | None = ..., normalize_cells: bool = ..., normalize_regions: bool = ...,
        batch_size: int = ..., return_numpy: bool = ..., *, n_samples: int = ..., return_mean: bool = ...,
        return_interval: float | None = ..., out: OutPath | None = ..., silent: bool | None = ..., seed: int = ...,
        detection: bool = ...,
    ) -> Estimates: ...  # fmt: skip
    @checked
    def get_accessibility_estimates(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        n_samples_overall: int | None = None,
        region_list: FeatureList = None,
        transform_batch: Batches = None,
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
        out: OutPath | None = None,
        silent: bool | None = None,
        seed: int = 0,
        detection: bool = False,
    ) -> Estimates:
        """Expected accessibility of each region in each cell, :math:`E_q[g_z(z, s)]`, a probability to be open.

        Where fragments are counted, it is their expected number in a cell of typical depth, :math:`E_q[g_z(z, s) r]`.
        Denoised where ATAC was measured, imputed where it was not, as in :meth:`get_normalized_expression`.
        Also available as ``get_normalized_accessibility``.

        Parameters
        ----------
        adata, indices, n_samples_overall, transform_batch, use_z_mean, batch_size, return_numpy, n_samples, \
        return_mean, return_interval, out, silent, seed
            As in :meth:`get_normalized_expression`.
        region_list
            Names, positions or a mask of regions; only these are computed.
        threshold
            In [0, 1]: estimates below it (after any scaling) become 0 and the result is sparse. Not possible
            with ``return_interval``.
        normalize_cells
            Multiply with the cell factor d. For a cell without ATAC d is predicted from its expression
            (:meth:`train` fits that to paired cells; without any, d has its prior).
            Of fragments: their expected number in the cell itself.
        normalize_regions
            Multiply with the region factor r. With both factors the result is the expected
            detection of a region in a cell. Fragments have it in any case.
        detection
            Where fragments are counted: the probability that there is at least one. Other estimates stay.

        Returns
        -------
        DataFrame, ndarray or csr_matrix
            (cells, regions). With ``threshold`` a frame of sparse columns, or a csr matrix with ``return_numpy``. With
            ``return_interval`` an :class:`~pyro_multivi.posterior.quantities.summary.Estimate` of four of these. With
            ``return_mean=False`` and several draws an array, (n_samples, cells, regions). With ``out`` its path.

        Raises
        ------
        ValueError, OSError
            If a region or batch is unknown, an argument is out of range, or ``out`` cannot be written.

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
        if self._lacks("get_accessibility_estimates", ATAC, return_interval, out):
            return self._without_features(adata, indices, return_numpy)
        average = self._average(
            [ATAC], transform_batch, n_samples, n_samples_overall, use_z_mean, return_mean, return_interval, seed
        )
        check_threshold(threshold, average)
        regions, names = choose_features(self.spec, ATAC, region_list, self.device)
        whole_rows = len(names) if threshold is not None else 0
        cells = self._cells(adata, indices, cells_at_a_time(batch_size, average.n_samples, whole_rows), True, None)
        quantity = accessibility_of(self.program, threshold, normalize_cells, normalize_regions, regions, detection)
        return deliver(
            self.program, cells, quantity, average, names,
            return_numpy=return_numpy, out=out, silent=silent,
        )  # fmt: skip

    get_normalized_accessibility = get_accessibility_estimates

    @overload
    def impute(
        self, adata: Data | None = ..., indices: Indices = ..., *, out: None = ..., **options: Unpack[ImputeOptions]
    ) -> Data: ...
    @overload
    def impute(
        self, adata: Data | None = ..., indices: Indices = ..., *, out: OutPath, **options: Unpack[ImputeOptions]
    ) -> Path: ...
    @checked
    def impute(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        transform_batch: Batches = None,
        use_z_mean: bool = True,
        n_samples: int = 1,
        *,
        n_samples_overall: int | None = None,
        library_size: LibrarySize = 1,
        threshold: float | None = None,
        normalize_cells: bool = False,
        normalize_regions: bool = False,
        include_protein_background: bool = False,
        measured_too: bool = False,
        return_interval: float | None = None,
        batch_size: int = PREDICTION_BATCH,
        out: OutPath | None = None,
        silent: bool | None = None,
        seed: int = 0,
    ) -> Data | Path:
        """Impute what cells were not measured for (expression, accessibility, proteins), and features a batch lacks.

        Parameters
        ----------
        adata, indices, transform_batch, use_z_mean, n_samples, n_samples_overall, library_size, return_interval, \
        batch_size, silent, seed
            As in :meth:`get_normalized_expression`.
        threshold, normalize_cells, normalize_regions
            As in :meth:`get_accessibility_estimates`; of accessibility only.
        include_protein_background
            As in :meth:`get_normalized_protein_expression`; of proteins only.
        measured_too
            Also estimate (denoise) what was measured.
        out
            A path ending in ``.h5ad`` or ``.zarr``: write the AnnData there, cell by cell.

        Returns
        -------
        AnnData, MuData or Path
            A new object of the model's features, genes first, proteins last; a MuData whose modalities all
            hold all cells, for a model of a MuData; with ``out`` its path. It holds

            ==============================================  ==================================================
            ``X``                                           measured counts, csr; empty where not measured
            ``layers["imputed"]``                           estimates of what was not measured (with
                                                            ``measured_too`` of everything), csr; else empty
            ``layers["imputed_sd"]``, ``"imputed_lower"``,  with ``return_interval``
            ``"imputed_upper"``
            ``obs["expression_source"]``,                   "measured", "imputed" or "measured in part": where
            ``obs["accessibility_source"]``,                a cell's entries of a modality come from
            ``obs["protein_source"]``
            ``var["feature_types"]``                        Gene Expression, Peaks, Antibody Capture; of another extra
                                                            modality its name
            ``uns["imputation"]``                           the arguments, as JSON
            ==============================================  ==================================================

            beside the other columns of ``obs``.

        Raises
        ------
        ValueError, OSError
            If the model has one modality only, an argument is out of range, or ``out`` cannot be written.

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
        parts = imputed_modalities(self.program, self.spec)
        for modality in MODALITIES if len(parts) < 2 else ():
            self._check_modality("impute", modality.name)
        average = self._average(
            parts, transform_batch, n_samples, n_samples_overall, use_z_mean, True, return_interval, seed
        )
        check_threshold(threshold, Average())
        n_features = sum(len(part.feature_names_in(self.spec)) for part in parts)
        cells = self._cells(adata, indices, cells_at_a_time(batch_size, average.n_samples, n_features))
        library = library_factor(library_size, cells, self.program)
        scaled = (threshold, normalize_cells, normalize_regions, include_protein_background)
        quantities = imputed_quantities(self.program, parts, library, *scaled)
        arguments = {
            "transform_batch": as_json(transform_batch), "library_size": as_json(library_size, "one number per cell"),
            "threshold": threshold, "normalize_cells": normalize_cells, "normalize_regions": normalize_regions,
            "include_protein_background": include_protein_background,
        }  # fmt: skip
        obs = self._obs_of(adata).iloc[cells.index.numpy()]
        return impute(
            self.program, cells, quantities, average, self.spec, obs, arguments,
            measured_too=measured_too, out=out, silent=silent,
        )  # fmt: skip
