"""Criticise a model before believing it: replicated data, predictive checks, exchange with ArviZ."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from pyro_multivi.api.arguments import select_features
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.data.checks import check_number, least_draws, nearest, number_of_draws
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.posterior.checks.predictive_check import criticise
from pyro_multivi.posterior.checks.result import CheckRequest, Grouping, PredictiveCheck
from pyro_multivi.posterior.checks.statistics import check_names, names_for
from pyro_multivi.posterior.engine.replicates import DEPTHS, check_memory, observed_sites, sample_replicates
from pyro_multivi.posterior.quantities.inference_data import inference_data


class ChecksMixin(ModelBase):
    """A model whose predictions can be held against data."""

    @property
    def validation_indices(self) -> NDArray[np.int64]:
        """Positions of the cells held out of training, ascending; empty if there are none or they are not known."""
        return np.zeros(0, dtype=np.int64) if self._split is None else self._split.validation.numpy()

    def posterior_predictive_sample(
        self,
        adata: Any = None,
        indices: Any = None,
        n_samples: int = 1,
        gene_list: Any = None,
        region_list: Any = None,
        sites: Any = None,
        *,
        batch_size: int = PREDICTION_BATCH,
        seed: int = 0,
    ) -> dict[str, list[sp.csr_matrix]]:
        """Counts as the model would have measured them in the same cells.

        The latents of each cell are drawn from its posterior, counts from the likelihood. A modality
        that was not measured is drawn as well; its depth is then what the other says of it, or follows the prior.

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
            ``"x"`` (gene counts), ``"y"`` (accessibility), or both; default: all that the model has.
        batch_size
            Cells at a time. Latents do not depend on it, the counts drawn do.
        seed
            Of the draws.

        Returns
        -------
        dict
            By site a list of ``n_samples`` csr matrices, (cells, features). Accessibility is 0 or 1.

        Raises
        ------
        ValueError
            If a feature or site is not known or ``n_samples`` is below 1.
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
        n_samples = number_of_draws(n_samples, None)
        features = self._features_of_sites(gene_list, region_list, self._sites(sites))
        cells = self._cells(adata, indices, batch_size)
        check_memory(
            _expected_bytes(cells, features, n_samples),
            f"{n_samples} replicates of {cells.n_cells} cells",
            ["fewer n_samples", "some indices", "a gene_list and a region_list",
             "posterior_predictive_check, which keeps no replicate"],
        )  # fmt: skip
        return sample_replicates(self.program, cells, features, n_samples, seed)

    def posterior_predictive_check(
        self,
        adata: Any = None,
        indices: Any = None,
        statistics: Any = None,
        n_samples: int = 100,
        held_out: bool = True,
        *,
        groupby: str | None = None,
        gene_list: Any = None,
        region_list: Any = None,
        hide_modalities: bool = True,
        hidden_depth: str = "observed",
        level: float = 0.95,
        batch_size: int = PREDICTION_BATCH,
        seed: int = 0,
    ) -> PredictiveCheck:
        r"""Compare data with replicates of them, and predictions with what was measured.

        Statistics are compared over the cells in which a modality was measured. Replicates are
        summed up as they are drawn and never kept.

        Parameters
        ----------
        adata
            Other cells; default: those of training.
        indices
            Positions, names or a mask of cells.
        statistics
            None for all built-in ones; a list of names to restrict them (``"mean"``, ``"variance"``,
            ``"cv"``, ``"zero_fraction"`` of genes, ``"detection_rate"`` of regions,
            ``"expression_depth"``, ``"detected_genes"``, ``"accessible_regions"`` of cells); or a
            mapping ``{"name": f}`` of statistics of your own beside all built-in ones. ``f`` is given
            a csr matrix (cells, genes + regions), genes first, accessibility as 0 or 1, rows empty
            where a modality was not measured, observed and replicated alike, and returns a number or a
            flat array.
        n_samples
            Number of replicates.
        held_out
            Check cells that the model was not trained on: its validation cells (among ``indices``).
            Otherwise all of ``indices``.
        groupby
            Column of obs: statistics are also computed within its groups, as always within batches.
        gene_list, region_list
            Features to look at; default: all.
        hide_modalities
            Also hide each modality of the paired cells in turn, predict it from the other and score
            the prediction.
        hidden_depth
            How deeply a hidden modality was sequenced is told by the other only roughly. ``"observed"``:
            l or d is inferred from the hidden counts, and they serve for nothing else. ``"predicted"``: what the
            other modality says of it, as where a modality was not measured. ``"prior"``: it follows its prior.
        level
            Probability of the intervals of replicates.
        batch_size
            Cells at a time.
        seed
            Of the draws.

        Returns
        -------
        PredictiveCheck
            Tidy tables, their :meth:`~pyro_multivi.posterior.checks.result.PredictiveCheck.summary`, and a
            compact repr.

        Raises
        ------
        ValueError
            If nothing was held out, a name is not known, ``level`` is no probability, or
            ``n_samples`` is too small for it.
        TypeError, ValueError
            If a statistic of yours returns no flat array of numbers or changes its shape.
        MemoryError
            If the sums over all replicates and features would take more than 4.3 GB.

        Notes
        -----
        Replicates know nothing of the error of the weights, which were estimated from other cells. With h held-out
        cells for n of training the mean of a feature therefore lies outside the central 95 % about
        :math:`2\Phi(-1.96 / \sqrt{1 + h / n})` of the time also under the right model: 6 % for one held-out cell
        in ten, 10 % for three in ten.

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
        n_samples = number_of_draws(n_samples, None)
        probability = check_number("level", level)
        if not 0 < probability < 1:
            raise ValueError(f"level={level!r} is not allowed: give a probability such as 0.95.")
        if n_samples < least_draws(probability):
            raise ValueError(
                f"n_samples={n_samples} is too few for level={level!r}: give at least {least_draws(probability)}."
            )
        if hidden_depth not in DEPTHS:
            raise ValueError(
                f"hidden_depth={hidden_depth!r} is not allowed: choose one of {', '.join(map(repr, DEPTHS))}."
            )
        sites = self._sites(None)
        names, user = check_names(statistics, names_for(sites))
        features = self._features_of_sites(gene_list, region_list, sites)
        if held_out:
            self._check_held_out(adata)
        cells = self._cells(adata, indices, batch_size)
        if held_out:
            cells = self._held_out(cells)
        obs = (self.adata if adata is None else adata).obs.iloc[cells.index.numpy()]
        request = CheckRequest(
            features=features,
            feature_names={site: self._names_of(site, chosen) for site, chosen in features.items()},
            cell_names=list(map(str, self._cell_names(adata)[cells.index.numpy()])),
            statistics=names,
            user=user,
            groupings=self._groupings(cells, obs, groupby),
            n_samples=n_samples,
            level=probability,
            seed=seed,
            setting="held-out cells" if held_out else "cells",
            hide_modalities=hide_modalities,
            hidden_depth=hidden_depth,
        )
        return criticise(self.program, cells, request)

    def to_inference_data(
        self,
        adata: Any = None,
        indices: Any = None,
        n_samples: int = 100,
        gene_list: Any = None,
        region_list: Any = None,
        *,
        batch_size: int = PREDICTION_BATCH,
        seed: int = 0,
    ) -> Any:
        """Posterior draws, replicates and log-likelihoods of some cells as an ArviZ ``InferenceData``.

        Parameters
        ----------
        adata, indices
            Which cells; better some than all, for everything is dense.
        n_samples
            Number of draws; they form one chain.
        gene_list, region_list
            Features of the replicates and of the observed data. Log-likelihoods are of all features.
        batch_size, seed
            As in :meth:`posterior_predictive_sample`.

        Returns
        -------
        arviz.InferenceData
            ``posterior``: latents by site (z, l, d). ``posterior_predictive``, ``observed_data``: x and y
            (0 or 1), observed ones NaN where not measured. ``log_likelihood``: x and y of each cell given
            each draw, 0 where not measured. ``constant_data``: ``has_rna``, ``has_atac``.

        Raises
        ------
        ImportError
            Without the extra ``arviz``.
        MemoryError
            If draws, cells and features together would take more than 4.3 GB.
        """
        n_samples = number_of_draws(n_samples, None)
        features = self._features_of_sites(gene_list, region_list, self._sites(None))
        cells = self._cells(adata, indices, batch_size)
        names = {site: self._names_of(site, chosen) for site, chosen in features.items()}
        cell_names = list(map(str, self._cell_names(adata)[cells.index.numpy()]))
        return inference_data(self.program, cells, features, names, cell_names, n_samples, seed)

    # ------------------------------------------------------------------ what the methods share

    def _sites(self, sites: Any) -> tuple[str, ...]:
        known = observed_sites(self.program)
        if sites is None:
            return known
        wanted = (sites,) if isinstance(sites, str) else tuple(sites)
        if not wanted or any(site not in known for site in wanted):
            raise ValueError(f"sites={sites!r} is not allowed: choose from {', '.join(map(repr, known))}.")
        return tuple(dict.fromkeys(wanted))

    def _features_of_sites(
        self, gene_list: Any, region_list: Any, sites: tuple[str, ...]
    ) -> dict[str, torch.Tensor | None]:
        if gene_list is not None:
            self._check_modality("gene_list", "expression")
        if region_list is not None:
            self._check_modality("region_list", "accessibility")
        chosen = {
            "x": select_features("gene_list", gene_list, self.spec.gene_names, "gene", self.device),
            "y": select_features("region_list", region_list, self.spec.region_names, "region", self.device),
        }
        return {site: chosen[site] for site in sites}

    def _names_of(self, site: str, chosen: torch.Tensor | None) -> tuple[str, ...]:
        names = self.spec.gene_names if site == "x" else self.spec.region_names
        return names if chosen is None else tuple(names[place] for place in chosen.tolist())

    def _cell_names(self, adata: Any) -> pd.Index[Any]:
        return self.spec.cell_names(self.adata if adata is None else adata)

    def _check_held_out(self, adata: Any) -> None:
        if adata is not None and adata is not self.adata:
            raise ValueError(
                "held_out=True means the cells that training left out of its data, and adata is other data: "
                "give held_out=False to check all of it."
            )
        if not len(self.validation_indices):
            raise ValueError(
                "held_out=True, but no cell is known to be held out: train with validation_size above 0, load the "
                "model with the data of training, or give held_out=False."
            )

    def _held_out(self, cells: Minibatches) -> Minibatches:
        """Those of the cells that were not trained on."""
        index = cells.index[torch.from_numpy(np.isin(cells.index.numpy(), self.validation_indices))]
        if not len(index):
            raise ValueError(
                f"held_out=True, but none of the {cells.n_cells} cells asked for was held out of training: give "
                "other indices, or held_out=False."
            )
        return Minibatches(cells.table, index, batch_size=cells.batch_size, device=cells.device)

    def _groupings(self, cells: Minibatches, obs: pd.DataFrame, groupby: str | None) -> list[Grouping]:
        found = []
        if self.spec.n_batch > 1:
            code = cells.table.batch_code[cells.index].numpy()
            found.append(Grouping(self.spec.setup.batch_key or "batch", code, self.spec.batch_categories))
        if groupby is not None:
            if groupby not in obs:
                raise ValueError(f"groupby={groupby!r} is no column of obs. {nearest(groupby, list(obs))}")
            groups = pd.Categorical([None if pd.isna(value) else str(value) for value in obs[groupby]])
            if not len(found) or groupby != found[0].by:
                found.append(Grouping(groupby, groups.codes.astype(np.int64), list(map(str, groups.categories))))
        return found


def _expected_bytes(cells: Minibatches, features: dict[str, torch.Tensor | None], n_samples: int) -> float:
    """Of sparse replicates as dense as the measured counts: 4 bytes for a count, 4 for its place."""
    total = 0.0
    for site, chosen in features.items():
        counts = cells.table.x if site == "x" else cells.table.y
        has = cells.table.has_rna if site == "x" else cells.table.has_atac
        if counts is None:
            continue
        share = 1.0 if chosen is None else len(chosen) / max(counts.shape[1], 1)
        total += 8.0 * len(counts.val) / max(int(has.sum()), 1) * share
    return total * cells.n_cells * n_samples
