"""Mixin: differential tests of proteins and of other extra modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from pyro_multivi.api.arguments import Batches, Data, FeatureList
from pyro_multivi.api.base import PREDICTION_BATCH
from pyro_multivi.api.differential import DifferentialMixin
from pyro_multivi.api.proteins.estimates import PROTEINS, ProteinEstimatesMixin
from pyro_multivi.api.scvi_tools.arguments import DIFFERENTIAL, takes
from pyro_multivi.data.checks import checked
from pyro_multivi.data.minibatch import ExtraFeatures
from pyro_multivi.data.modality import PROTEIN
from pyro_multivi.posterior.differential.contrasts import CellChoice, GroupChoice


class ProteinDifferentialMixin(ProteinEstimatesMixin, DifferentialMixin):
    """Methods that find the proteins, and features of other extra modalities, in which groups of cells differ."""

    @takes(DIFFERENTIAL)
    @checked
    def differential_protein_expression(
        self,
        adata: Data | None = None,
        groupby: str | Sequence[str] | None = None,
        group1: GroupChoice = None,
        group2: str | float | None = None,
        idx1: CellChoice = None,
        idx2: CellChoice = None,
        mode: str = "change",
        delta: float | str | None = "default",
        batch_size: int = PREDICTION_BATCH,
        all_stats: bool = True,
        batch_correction: bool | None = None,
        batchid1: Batches = None,
        batchid2: Batches = None,
        fdr_target: float = 0.05,
        silent: bool = True,
        pseudocounts: float | None = 1.0,
        *,
        unit: str = "group",
        calibrated: bool | None = None,
        test_mode: str = "three",
        change_fn: str | Callable[..., Any] = "log-fold",
        m1_domain_fn: Callable[[Any], Any] | None = None,
        cred_interval_lvls: Sequence[float] | float | None = None,
        n_samples: int = 5000,
        n_samples_overall: int | None = None,
        use_permutation: bool = False,
        m_permutation: int = 10_000,
        threshold_counts: float = 0.01,
        weights: str = "uniform",
        protein_list: FeatureList = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Proteins whose expected counts differ between two groups of cells.

        With ``unit="group"`` the counts of the groups are tested, their background included, as in
        :meth:`differential_expression`; a background that both have makes changes smaller, not less certain. With
        ``unit="cell"`` the foreground of random cells is compared.

        Parameters
        ----------
        adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats, batch_correction, batchid1, \
        batchid2, fdr_target, silent, unit, calibrated, test_mode, change_fn, m1_domain_fn, cred_interval_lvls, \
        n_samples, n_samples_overall, use_permutation, m_permutation, threshold_counts, weights, seed
            As in :meth:`differential_expression`.
        pseudocounts
            Added to both sides of log scales, in counts.
        protein_list
            Names, positions or a mask: test these only. Each is compared between the cells that measured it, whose
            numbers are `n_measured1` and `n_measured2`.

        Returns
        -------
        DataFrame
            One row per protein, with the columns of :meth:`differential_expression`; scales are in counts.

        Raises
        ------
        ValueError
            If the model has no proteins, groups are unknown, empty or overlap, or an argument is out of range.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((60, 20, 20), n_genes=30, n_regions=50, n_proteins=6)
        >>> report = pm.MULTIVI.setup_anndata(
        ...     adata, modality_key="modality", protein_expression_obsm_key="protein_expression"
        ... )
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> model.differential_protein_expression(groupby="cell_type", group1="type_0", n_samples=200).shape[0]
        6
        """
        arguments = locals()
        self._check_extra("differential_protein_expression", PROTEIN)
        of_cells = isinstance(unit, str) and unit == "cell"
        site = f"{PROTEIN}_foreground_mean" if of_cells else f"{PROTEIN}_mean"
        return self._compare(replace(PROTEINS, decoded=site), arguments)

    @takes(DIFFERENTIAL)
    @checked
    def differential_extra(
        self,
        name: str,
        adata: Data | None = None,
        groupby: str | Sequence[str] | None = None,
        group1: GroupChoice = None,
        group2: str | float | None = None,
        idx1: CellChoice = None,
        idx2: CellChoice = None,
        mode: str = "change",
        delta: float | str | None = "default",
        batch_size: int = PREDICTION_BATCH,
        batch_correction: bool | None = None,
        batchid1: Batches = None,
        batchid2: Batches = None,
        fdr_target: float = 0.05,
        silent: bool = True,
        pseudocounts: float | None = 1e-3,
        *,
        test_mode: str = "three",
        change_fn: str | Callable[..., Any] = "log-fold",
        m1_domain_fn: Callable[[Any], Any] | None = None,
        cred_interval_lvls: Sequence[float] | float | None = None,
        n_samples: int = 5000,
        n_samples_overall: int | None = None,
        use_permutation: bool = False,
        m_permutation: int = 10_000,
        threshold_counts: float = 0.01,
        weights: str = "uniform",
        feature_list: FeatureList = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Features of an extra modality whose estimate differs between random cells of two groups.

        Parameters
        ----------
        name
            Name of the extra modality; its class names what is compared, ``estimated``.
        adata, groupby, group1, group2, idx1, idx2, mode, delta, batch_size, batch_correction, batchid1, batchid2, \
        fdr_target, silent, test_mode, change_fn, m1_domain_fn, cred_interval_lvls, n_samples, n_samples_overall, \
        use_permutation, m_permutation, threshold_counts, weights, seed
            As in :meth:`differential_expression` with ``unit="cell"``.
        pseudocounts
            Added to both sides of log scales, in units of the estimate.
        feature_list
            Names, positions or a mask: test these only.

        Returns
        -------
        DataFrame
            One row per feature, with the columns of :meth:`differential_expression`.

        Raises
        ------
        ValueError
            If the program models no such modality, groups are unknown, empty or overlap, or an argument is out of
            range.
        """
        arguments = {**locals(), "unit": "cell", "calibrated": None, "all_stats": False}
        part = self._check_extra("name", name)
        return self._compare(ExtraFeatures(name, f"{name}_{part}"), arguments)
