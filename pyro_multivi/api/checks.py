"""Methods that compare a model with data: replicates, predictive checks, exchange with ArviZ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_multivi.api.arguments import Data, FeatureList, Indices, choose_features, measured_features
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.data.checks import checked, name_list, shown
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.data.modality import ATAC, RNA, modelled
from pyro_multivi.posterior.checks.predictive_check import predictive_check
from pyro_multivi.posterior.checks.request import CheckRequest, Statistics, batches_and_groups
from pyro_multivi.posterior.checks.result import PredictiveCheck
from pyro_multivi.posterior.engine.replicates import count_sites, extra_features, features_at, sample_replicates
from pyro_multivi.posterior.quantities.inference_data import inference_data

if TYPE_CHECKING:
    from arviz import InferenceData


class ChecksMixin(ModelBase):
    """Methods that compare a model with data."""

    @property
    def validation_indices(self) -> NDArray[np.int64]:
        """Positions of the cells held out of training, ascending; empty if there are none or they are unknown."""
        split = self._current_split()
        return np.zeros(0, dtype=np.int64) if split is None else split.validation.numpy().copy()

    @checked
    def posterior_predictive_sample(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        n_samples: int = 1,
        gene_list: FeatureList = None,
        region_list: FeatureList = None,
        sites: str | Sequence[str] | None = None,
        *,
        batch_size: int = PREDICTION_BATCH,
        seed: int = 0,
    ) -> dict[str, list[sp.csr_matrix]]:
        """Counts as the model would have measured them in the same cells.

        The latents of each cell are drawn from its posterior, counts from the likelihood. A modality that was
        not measured is drawn as well, at the depth that the other modality predicts or that follows the prior.

        Parameters
        ----------
        adata
            Other cells; default: those of training.
        indices
            Positions, names or a mask of cells.
        n_samples
            Number of replicates.
        gene_list, region_list
            Names, positions or a mask of features; default: all.
        sites
            ``"x"`` (gene counts), ``"y"`` (accessibility), ``"protein"`` or the name of another extra modality;
            default: all that the model has.
        batch_size
            Cells at a time. Latents do not depend on it, the counts drawn do.
        seed
            Seed of the draws.

        Returns
        -------
        dict
            By site a list of ``n_samples`` csr matrices, (cells, features). Accessibility is 0 or 1, or
            counts of fragments (``accessibility_likelihood``).

        Raises
        ------
        ValueError
            If a feature or site is unknown or ``n_samples`` is below 1.
        MemoryError
            If the replicates would take more than 4.3 GB at the density of the data.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> replicates = model.posterior_predictive_sample(n_samples=3, gene_list=["gene_03", "gene_07"])
        >>> len(replicates["x"]), replicates["x"][0].shape, replicates["y"][0].shape
        (3, (80, 2), (80, 50))
        """
        features, _ = self._features(gene_list, region_list)
        wanted = {site: features.get(features_at(self.program, site)) for site in self._sites(sites)}
        cells = self._cells(adata, indices, batch_size, counts=None)
        return sample_replicates(self.program, cells, wanted, n_samples, seed)

    @checked
    def posterior_predictive_check(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        statistics: Statistics = None,
        n_samples: int = 100,
        held_out: bool = True,
        *,
        groupby: str | Sequence[str] | None = None,
        gene_list: FeatureList = None,
        region_list: FeatureList = None,
        hide_modalities: bool = True,
        hidden_depth: str = "observed",
        level: float = 0.95,
        batch_size: int = PREDICTION_BATCH,
        seed: int = 0,
    ) -> PredictiveCheck:
        r"""Compare statistics of the data with those of replicates, and predictions with measured counts.

        Statistics are computed over the cells in which a modality was measured. Replicates are
        summed up as they are drawn and never kept.

        Parameters
        ----------
        adata, indices, n_samples, batch_size, seed
            As in :meth:`posterior_predictive_sample`.
        statistics
            None for all built-in ones; a list of names to restrict them (``"mean"``, ``"variance"``, ``"cv"``,
            ``"zero_fraction"`` of genes, ``"detection_rate"`` of regions, ``"expression_depth"``, ``"detected_genes"``,
            ``"accessible_regions"`` of cells); or a mapping ``{"name": f}`` of statistics of your own beside all
            built-in ones. Those of proteins, and of other extra modalities, have the names of genes (of cells
            ``"protein_depth"``, ``"detected_proteins"``). ``f`` is given a csr matrix (cells, genes + regions), genes
            first, and returns a number or a flat array. Accessibility in it is 0 or 1 (or fragments); rows are empty
            where a modality was not measured, in observed and replicated counts alike.
        held_out
            Check cells that the model was not trained on: its validation cells (among ``indices``).
            Otherwise all of ``indices``.
        groupby
            Column of obs, or a list of columns for the combinations of their values: statistics are also computed
            within its groups, as always within batches.
        gene_list, region_list
            Features to check; default: all that were measured in all of these cells.
        hide_modalities
            Also hide each modality of the paired cells in turn, and proteins of cells that have another, predict it
            from the others and score the prediction.
        hidden_depth
            Sequencing depth, l or d, of a hidden modality, which the other predicts only roughly. ``"observed"``:
            it is inferred from the hidden counts, which serve for nothing else. ``"predicted"``: it is predicted
            from the other modality, as where a modality was not measured. ``"prior"``: it follows its prior.
        level
            Probability of the intervals of replicates.

        Returns
        -------
        PredictiveCheck
            Tidy tables, their :meth:`~pyro_multivi.posterior.checks.result.PredictiveCheck.summary`, and a
            compact repr.

        Raises
        ------
        ValueError
            If nothing was held out, a name is unknown, ``level`` is no probability, or ``n_samples`` is
            too small for it.
        TypeError, ValueError
            If a statistic of yours returns no flat array of numbers or changes its shape.
        MemoryError
            If the sums over all replicates and features would take more than 4.3 GB.

        Notes
        -----
        Replicates leave out the error of the weights, which were estimated from other cells. With h held-out
        cells for n of training the mean of a feature therefore lies outside the central 95 % about
        :math:`2\Phi(-1.96 / \sqrt{1 + h / n})` of the time also under the right model: 6 % for one held-out cell
        in ten, 10 % for three in ten.

        Where the guide infers the depth of a cell, its total count has no verdict
        (:attr:`~pyro_multivi.posterior.checks.result.PredictiveCheck.untested`): the replicates have the depth that
        this count suggested. The replicates are of the model *and* the guide, so that one which is no posterior, as
        that of a model trained for a few epochs, fails too. A row that fails tells that there is a difference, not that
        it is large: of cells that were simulated from the model's own likelihoods, the mean of ``"detected_genes"``
        failed in three of three models, and was 0.5 to 1.2 % above that of the replicates. Their inverse dispersions
        were fitted 9 to 17 % too small, as these take what the state leaves unexplained, which gives genes more zeros;
        with the true ones replicates had 0.4 % more. Of wrong models, ``"nb"`` for data with 25 % dropout, or for
        dispersions that differ 16-fold between batches, failed in many statistics; 10 % of doublets failed in one.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((60, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> check = model.posterior_predictive_check(n_samples=40)
        >>> sorted(check.tables)
        ['cells', 'coverage', 'genes', 'histogram', 'imputed', 'regions', 'reliability', 'scores', 'totals']
        >>> check.genes.columns.tolist()
        ['statistic', 'gene', 'observed', 'replicated', 'lower', 'upper', 'p_value']
        """
        cells = self._held_out(adata, indices, batch_size) if held_out else self._cells(adata, indices, batch_size)
        features, names = self._features(gene_list, region_list, cells)
        for each in extra_features(self.program).values():
            if bool((measured := measured_features(cells.table, each, cells.index)) is None or measured.any()):
                features[each], names[each] = choose_features(self.spec, each, None, self.device, measured)
        request = CheckRequest(
            features=features,
            feature_names=names,
            statistics=statistics,
            n_samples=n_samples,
            level=level,
            seed=seed,
            held_out=held_out,
            hide_modalities=hide_modalities,
            hidden_depth=hidden_depth,
        )
        obs = self._obs_of(adata).iloc[cells.index.numpy()]
        groupings = batches_and_groups(self.spec, cells.table.batch_code[cells.index].numpy(), obs, groupby)
        return predictive_check(self.program, cells, request, groupings)

    @checked
    def to_inference_data(
        self,
        adata: Data | None = None,
        indices: Indices = None,
        n_samples: int = 100,
        gene_list: FeatureList = None,
        region_list: FeatureList = None,
        *,
        batch_size: int = PREDICTION_BATCH,
        seed: int = 0,
    ) -> InferenceData:
        """Posterior draws, replicates and log-likelihoods of some cells as an ArviZ ``InferenceData``.

        Parameters
        ----------
        adata, indices
            Cells to export; better some than all, for everything is dense.
        n_samples
            Number of draws; they form one chain.
        gene_list, region_list
            Features of the replicates and of the observed data. Log-likelihoods are of all features.
        batch_size, seed
            As in :meth:`posterior_predictive_sample`.

        Returns
        -------
        arviz.InferenceData
            ``posterior``: latents by site (z, l, d), those that all cells share once. ``posterior_predictive``,
            ``observed_data``: x and y (0 or 1, or fragments), observed ones NaN where not measured.
            ``log_likelihood``: x and y of each cell given each draw, 0 where not measured. ``constant_data``:
            ``has_rna``, ``has_atac``.

        Raises
        ------
        ImportError
            Without the extra ``arviz``.
        MemoryError
            If draws, cells and features together would take more than 4.3 GB.
        """
        features, chosen = self._features(gene_list, region_list)
        positions = {modality.counts: places for modality, places in features.items()}
        names = {modality.counts: found for modality, found in chosen.items()}
        cells = self._cells(adata, indices, batch_size)
        return inference_data(self.program, cells, positions, names, n_samples, seed)

    # ------------------------------------------------------------------ shared by the methods

    def _sites(self, sites: str | Sequence[str] | None) -> tuple[str, ...]:
        known = (*count_sites(self.program), *extra_features(self.program))
        if sites is None:
            return known
        wanted = name_list("sites", sites)
        if not wanted or any(site not in known for site in wanted):
            raise ValueError(f"sites={sites!r} is not allowed: choose from {', '.join(map(repr, known))}.")
        return tuple(dict.fromkeys(wanted))

    def _features(
        self, gene_list: FeatureList, region_list: FeatureList, cells: Minibatches | None = None
    ) -> tuple[dict[AnyModality, Tensor | None], dict[AnyModality, tuple[str, ...]]]:
        """Positions of the chosen features of each modality of the model, None for all, and their names.

        With ``cells`` of those that were measured in all of them.
        """
        positions: dict[AnyModality, Tensor | None] = {}
        names: dict[AnyModality, tuple[str, ...]] = {}
        for each, wanted in ((RNA, gene_list), (ATAC, region_list)):
            modality = each.in_model(self.program.config)
            if wanted is not None:
                self._check_modality(modality.list_argument, modality.name)
            if modality in modelled(self.spec):
                measured = None if cells is None else measured_features(cells.table, modality, cells.index)
                positions[modality], names[modality] = choose_features(
                    self.spec, modality, wanted, self.device, measured
                )
        return positions, names

    def _held_out(self, adata: Data | None, indices: Indices, batch_size: int) -> Minibatches:
        """Cells that the model was not trained on."""
        if adata is not None and adata is not self.adata:
            if not hasattr(adata, "obs_names"):
                raise TypeError(f"adata must be an AnnData or a MuData, got {shown(adata)}.")
            raise ValueError(
                "held_out=True means the cells that training left out of its data, and adata is other data: "
                "give held_out=False to check all of it."
            )
        if self._split is None or not len(self._split.validation):
            raise ValueError(
                "held_out=True, but no cell is known to be held out: train with validation_size above 0, load the "
                "model with the data of training, or give held_out=False."
            )
        cells = self._cells(adata, indices, batch_size)
        validation = self._split.validation
        if cells.table is not self._table:  # the object was changed: the same cells by name
            among = self._split.among(cells.table.cell_names)
            validation = validation[:0] if among is None else among.validation
        index = cells.index[torch.isin(cells.index, validation)]
        if not len(index):
            raise ValueError(
                f"held_out=True, but none of the {cells.n_cells} cells asked for was held out of training: give "
                "other indices, or held_out=False."
            )
        return Minibatches(cells.table, index, batch_size=cells.batch_size, device=cells.device)
