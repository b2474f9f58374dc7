"""Differential expression and accessibility between groups of cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from pyro_multivi.api.arguments import Batches, Data, FeatureList, choose_features, measured_features
from pyro_multivi.api.base import PREDICTION_BATCH, ModelBase
from pyro_multivi.api.scvi_tools.arguments import DIFFERENTIAL, takes, tell_difference
from pyro_multivi.api.scvi_tools.minified import check_counts
from pyro_multivi.data.checks import checked
from pyro_multivi.data.minibatch import AnyModality
from pyro_multivi.data.modality import ATAC, RNA
from pyro_multivi.data.setup.covariates import covariate_columns
from pyro_multivi.posterior.differential.compare import compare_groups
from pyro_multivi.posterior.differential.contrasts import CellChoice, GroupChoice, resolve_contrasts
from pyro_multivi.posterior.differential.request import DifferentialRequest


class DifferentialMixin(ModelBase):
    """Methods that find the genes and regions in which groups of cells differ."""

    @takes(DIFFERENTIAL)
    @checked
    def differential_expression(
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
        pseudocounts: float | None = 1e-6,
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
        gene_list: FeatureList = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Genes whose normalized expression :math:`\rho` differs between two groups of cells.

        Every change and sign is **group 1 over group 2**: positive means more in group 1.

        Parameters
        ----------
        adata
            Other cells; default: those of training. Nothing is written to them.
        groupby
            Column of ``obs``, or a list of columns: then the groups are the combinations of their values, such as
            "B cell, donor 1". Cells without a value are in no group and in no rest.
        group1
            A group, or a list of groups; default: every group in turn.
        group2
            The group to compare with; default: all other cells that have a value in ``groupby``.
        idx1, idx2
            In place of ``groupby``: masks, positions, names, or queries of ``obs`` such as
            ``"cell_type == 'B' and batch == 'a'"``. Without ``idx2`` all other cells.
        mode
            ``"change"``: is the change larger than ``delta``? ``"vanilla"``: is group 1 higher?
        delta
            Least change that counts, on the scale of ``change_fn``. Default: 0.25 for ``"log-fold"``
            (a ratio of 1.19). None estimates it: three Normals are fitted to the changes of all
            genes, and 0.6 times the mean distance from 0 of the outer two is taken, at least 0.1.
        batch_size
            Cells at a time at most. It does not change the result.
        all_stats
            Also give statistics of the raw counts.
        batch_correction
            Decode both groups in the same batches: each draw in one batch, in equal numbers; pairs share it. The state
            z of a cell is inferred in its own batch. Default batches: all that hold cells of either group, also those
            where a group has no cell, which extrapolates if the groups share few batches. Other covariates have their
            mean over both groups. None, the default: in each comparison the batch, and those covariates (numbers by
            quarters), over which the groups lie unevenly, where more than a tenth of the cells of one group would have
            to change it to lie as the other, and that not by chance (chi-squared test, p < 0.01); but not where the
            groups share no value. ``attrs["batches"]`` and ``attrs["covariates"]`` of the table tell what was done.
            Errors are without those of the decoder's effects of batches: in simulation, where 90 and 20 % of two groups
            were of one batch, changes by more than 4 (log2) were given as two thirds of what they were.
        batchid1, batchid2
            Names or positions of the batches to decode group 1 and 2 in.
            One of them stands for both. If they differ, the change holds their difference too.
        fdr_target
            False discovery rate of the calls.
        silent
            Show no progress bar over comparisons.
        pseudocounts
            Added to both sides of log scales, in units of :math:`\rho`, whose sum over genes is 1.
            None estimates it from the genes whose mean count is below ``threshold_counts`` in a
            group: the 0.9 quantile of their largest draws, at least 1e-10.
        unit
            ``"group"``: do the *means* of the groups differ? ``"cell"``: does *a random cell* of
            group 1 differ from a random cell of group 2? See Notes.
        calibrated
            With ``unit="group"``, test the counts of the groups (pseudobulk) and shrink; False compares the means of
            the model. See Notes. Default: True with ``unit="group"``.
        test_mode
            ``"three"``: probability of the likelier direction, max(P(change >= delta),
            P(change <= -delta)). ``"two"``: of either, their sum. Between cells, ``"two"`` also
            finds genes that merely vary among the cells of both groups.
        change_fn
            ``"log-fold"`` (log2 ratio), ``"difference"``, or a function of arrays (scale1, scale2) or
            (scale1, scale2, pseudocounts), elementwise.
        m1_domain_fn
            In place of ``delta``: a function of draws of the change, (draws, genes), that returns a
            boolean array of that shape, or a pair of them (upwards, downwards).
        cred_interval_lvls
            Probabilities of credible intervals of the change (the shortest that hold it).
        n_samples, n_samples_overall
            Draws of each group: a random cell, then its state from the posterior q(z | x, y).
        use_permutation, m_permutation
            With ``unit="cell"``: form this many random pairs of the draws instead of one pair each.
        threshold_counts
            See ``pseudocounts``.
        weights
            ``"uniform"``: draws of q(z | x, y). ``"importance"``: draws of a cell are chosen from 64 by
            importance weights, so that they follow the posterior of the model where q misses it (an
            outlier). Costs the likelihood of 64 draws per cell.
        gene_list
            Names, positions or a mask: test these only. Calls are then made among them.
        seed
            Seed of all draws: same seed, same table. No global random state is used.

        Returns
        -------
        DataFrame
            One row per gene, most probable first; of several groups one comparison below the other.

            ===========================================  ====================================================
            ``proba_de``, ``proba_not_de``               posterior probability of a change, and its contrary
            ``bayes_factor``                             log of their ratio (natural)
            ``scale1``, ``scale2``                       mean of rho in each group
            ``pseudocounts``, ``delta``                  as used
            ``lfc_mean``, ``_median``, ``_std``,         posterior of the change, on the scale of ``change_fn``
            ``_min``, ``_max``                           (of draws: minimum and maximum)
            ``lfc_confidence_interval_{level}_min/max``  with ``cred_interval_lvls``
            ``raw_mean1/2``                              mean count
            ``non_zeros_proportion1/2``                  share of cells with a count
            ``raw_normalized_mean1/2``                   mean of counts scaled to 10 000 per cell
            ``is_de_fdr_{target}``                       called: the genes of highest probability whose
                                                         expected share of false ones is within the target;
                                                         NA where nothing can be said (``boolean`` of pandas)
            ``comparison``, ``group1``, ``group2``       with ``groupby``
            ===========================================  ====================================================

            Statistics of raw counts are over the cells in which RNA was measured; NaN without any. Where genes differ
            between batches, each is tested with the cells that measured it, ``n_measured1/2``; without any in a group
            probabilities are NaN and calls NA.
            With ``mode="vanilla"``: ``proba_m1``, ``proba_m2`` (that group 1 or 2 is higher),
            ``bayes_factor``, scales, statistics and groups, in descending order of ``proba_m1``.

        Raises
        ------
        ValueError
            If the model has no genes, groups are unknown, empty or overlap, or an argument is misspelt or out of range.

        Notes
        -----
        **Means of groups** (``unit="group"``). With ``calibrated=True`` this is a test of the *counts* of the groups.
        What the model gives to it is the ratio of batches and depths: each group's mean is that of the model times the
        ratio of the counts of its measured cells to those that the model expects of them, so the rest of the decoder
        cancels. A model trained for one epoch and one trained to the end give nearly the same table.

        - The sum of the counts of a group is negative binomial, with a dispersion between cells that is estimated in
          each group and shrunk over genes; the number of cells in which a region is open is binomial. Depth multiplies
          the mean of counts, and the rate of opening -log(1 - p): a region is closed in a cell without any of its
          fragments, so that p is proportional to the depth only far from 1. A group is as deep as its totals say: the
          sum of its counts, or its number of open regions beside that of the model; with ``size_factor_key`` as deep as
          the factors. A likelihood ratio tests whether both groups share a mean; of counts with the tails of a t
          distribution where cells are few. To each group one cell of the common mean is added. The change over its
          error is that test's score. Of two groups of n cells, a gene without a count in one changes by at most
          log2(n + 1) + 1, and may by more in truth: with 100 cells 5.8 to 7.5 were said, with a deviation of 0.34.
        - The changes of all genes are shrunk together: their prior is a mixture of Normals learnt from all genes
          (adaptive shrinkage, ash), so that the probabilities hold also for the genes picked as largest. Where a few
          genes take a larger share of the counts, all others have a smaller one: of log-fold changes the centre of the
          prior is learnt too. If it is further from 0 than ``delta``, the others have changed, and are called;
          ``attrs["changed_as_a_whole"]`` names the comparisons in which nearly all genes are.
        - Where cells are few, a low probability is no sign that nothing changes: with 5 cells against 1000 those of
          regions were 0.00 on average, while 16 % changed, and 90 % intervals held 78 to 80 % of the changes of regions
          and 82 to 89 % of those of genes (two simulations).
        - With fewer than three measured cells in a group, probabilities and changes are NaN. Without any, means are
          imputed, with an error that is not known. Either is a warning, and calls are NA.

        ``calibrated=False`` compares the means of the model, with an error of variance of a draw / n and without a
        prior. Its decoder smooths, and has no posterior of its own: in simulation that calls far too much.

        **Cells** (``unit="cell"``, as in scvi-tools). The probability is that of random pairs of cells, with neither
        the error of the decoder nor a prior: with few cells, ``is_de_fdr`` understates the false discoveries.

        **Several comparisons.** Each group is drawn and decoded once; the rest is made of the other
        groups, each with its share of the cells. In a single comparison against the rest, the rest is drawn as one
        group, with other draws. Its counts then also vary by the differences between the other groups, so that
        probabilities are those of a more cautious test, not only of another seed.

        **Donors and replicates.** The probability accounts for the posterior of each cell and for the sampling of
        cells, within the donors at hand. It does *not* account for how donors differ: cells of one donor are no
        replicates, and a difference between three patients and three controls may be that of two donors. Compare within
        each donor and look for agreement, as below, or sum the counts of each donor and group (pseudobulk) and test
        these with a method for bulk counts.

        References
        ----------
        Lopez et al. (2018), Nature Methods 15; Boyeau et al. (2023), PNAS 120 (change of effect size and
        expected FDR). Stephens (2017), Biostatistics 18 (adaptive shrinkage).

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, n_batches=2, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, batch_key="batch", modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> table = model.differential_expression(groupby="cell_type", n_samples=200)
        >>> table.shape[0], table["comparison"].unique()[0]
        (120, 'type_0 vs Rest')

        Within each donor (here: batch), then the genes that change in the same direction in all:

        >>> by_donor = [
        ...     model.differential_expression(
        ...         idx1=f"cell_type == 'type_0' and batch == '{donor}'",
        ...         idx2=f"cell_type != 'type_0' and batch == '{donor}'",
        ...         n_samples=200,
        ...     ).sort_index()
        ...     for donor in ("batch_0", "batch_1")
        ... ]
        >>> lfc = pd.concat([table["lfc_mean"] for table in by_donor], axis=1)
        >>> called = pd.concat([table["is_de_fdr_0.05"] for table in by_donor], axis=1)
        >>> agreed = called.all(axis=1) & ((lfc > 0).all(axis=1) | (lfc < 0).all(axis=1))
        """
        return self._compare(RNA.in_model(self.program.config), locals())

    @takes(DIFFERENTIAL)
    @checked
    def differential_accessibility(
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
        two_sided: bool = True,
        *,
        pseudocounts: float | None = 1e-3,
        unit: str = "group",
        calibrated: bool | None = None,
        test_mode: str = "three",
        change_fn: str | Callable[..., Any] = "difference",
        m1_domain_fn: Callable[[Any], Any] | None = None,
        cred_interval_lvls: Sequence[float] | float | None = None,
        n_samples: int = 5000,
        n_samples_overall: int | None = None,
        use_permutation: bool = False,
        m_permutation: int = 10_000,
        threshold_counts: float = 0.01,
        probability: str = "detected",
        weights: str = "uniform",
        region_list: FeatureList = None,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Regions whose accessibility differs between two groups of cells.

        Every change and sign is **group 1 over group 2** (``effect_size`` of scvi-tools is the opposite).

        Parameters
        ----------
        adata, groupby, group1, group2, idx1, idx2, mode, batch_size, all_stats, batch_correction, batchid1, batchid2, \
        fdr_target, silent, unit, calibrated, test_mode, m1_domain_fn, cred_interval_lvls, n_samples, \
        n_samples_overall, use_permutation, m_permutation, weights, seed
            As in :meth:`differential_expression`.
        delta
            Least change that counts, on the scale of ``change_fn`` and ``probability``. Default: 0.05, five percentage
            points, for ``"difference"``; 0.25 and 0.5 in log2 units for ``"log-fold"`` and ``"log-odds"``. None
            estimates it, as in :meth:`differential_expression`, but at least 0.02 for ``"difference"``.
        two_sided
            False counts only regions that are more open in group 1.
        pseudocounts, threshold_counts
            As in :meth:`differential_expression`, in units of the probability, with the share of open
            cells in place of the mean count. ``"difference"`` adds nothing.
        change_fn
            ``"difference"`` of probabilities, ``"log-fold"`` (log2 of their ratio), ``"log-odds"``
            (log2 of the ratio of odds), or a function as in :meth:`differential_expression`.
        probability
            Probability to compare. ``"detected"``: that the region is found open in a cell of
            mean depth, p r times the mean of d over the cells of both groups with ATAC: ``emp_prob``
            without the effects of depth and batches. ``"accessible"``: that it is open, p. See Notes.
            Where fragments are counted (``accessibility_likelihood``) their expected number in a cell of mean depth,
            p r d, takes the place of the probability, and ``"accessible"`` and ``"log-odds"`` are refused.
        region_list
            Names, positions or a mask: test these only.

        Returns
        -------
        DataFrame
            One row per region, in their order; of several groups one comparison below the other.

            ==============================================  =================================================
            ``prob_da``                                     posterior probability of a change
            ``is_da_fdr``                                   called at ``fdr_target``
            ``bayes_factor``                                log of prob_da / (1 - prob_da) (natural)
            ``effect_size``                                 est_prob1 - est_prob2
            ``emp_effect``                                  emp_prob1 - emp_prob2
            ``est_prob1/2``                                 mean of p in each group, whatever ``probability``
            ``emp_prob1/2``                                 share of cells in which the region is open, over
                                                            those with ATAC; NaN without any
            ``change_mean``, ``change_std``, ``delta``      posterior of the change on the scale of
                                                            ``change_fn`` and ``probability``; the bound
            ``change_confidence_interval_{level}_min/max``  with ``cred_interval_lvls``
            ``comparison``, ``group1``, ``group2``          with ``groupby``
            ==============================================  =================================================

            Where regions differ between batches, with ``n_measured1/2`` as in :meth:`differential_expression`.
            With ``mode="vanilla"`` ``proba_m1`` and ``proba_m2`` take the place of the first two. Where fragments are
            counted ``est_fragments1/2`` (expected fragments in a cell of typical depth) and ``emp_fragments1/2`` (mean
            count) take the place of ``est_prob1/2``, and of ``emp_prob1/2`` in ``emp_effect``.

        Raises
        ------
        ValueError
            If the model has no regions, groups are unknown, empty or overlap, or an argument is
            misspelt or out of range.

        Notes
        -----
        The notes of :meth:`differential_expression` apply: calibration, shrinkage, donors.

        Counts determine the product p d r, and hardly how it splits: a region that is found in few cells may be open in
        few or be hard to see. In simulation the p of one region is off by a factor of 1.7 in either direction, for all
        cells alike. That cancels in a ratio, but decides whether a difference of p exceeds ``delta``. Probabilities of
        detection are determined by the data. As d and r are at most 1, a region whose detection differs by ``delta``
        differs by no less in p.

        Examples
        --------
        >>> import pyro_multivi as pm
        >>> adata = pm.simulate_multiome((40, 20, 20), n_genes=30, n_regions=50, seed=0)
        >>> report = pm.MULTIVI.setup_anndata(adata, modality_key="modality")
        >>> model = pm.MULTIVI(adata, n_hidden=16, n_latent=3)
        >>> model.train(max_epochs=2, progress_bar=False)
        >>> table = model.differential_accessibility(
        ...     groupby="cell_type", group1="type_0", group2="type_1", cred_interval_lvls=[0.9], n_samples=200
        ... )
        >>> bool((table["effect_size"] == table["est_prob1"] - table["est_prob2"]).all())
        True
        >>> list(table.columns[-3:])
        ['comparison', 'group1', 'group2']
        """
        tell_difference("effect_size")
        return self._compare(ATAC.in_model(self.program.config), locals())

    def _compare(self, modality: AnyModality, arguments: Mapping[str, Any]) -> pd.DataFrame:
        """Compare groups in one modality; ``arguments`` are those of a method above, by name."""
        self._check_modality(f"differential_{modality.name}", modality.name)
        self._check_trained(warn=True)
        table, _ = self._table_of(arguments["adata"])
        wanted = arguments[modality.list_argument]
        features, names = choose_features(
            self.spec, modality, wanted, self.device, measured_features(table, modality, in_all=False)
        )
        request = DifferentialRequest.from_arguments(modality, self.spec, features, arguments)
        for name in ("batchid1", "batchid2"):
            self._tell_unmeasured(name, getattr(request, name), modality)
        if arguments["unit"] == "group" or arguments["all_stats"]:
            check_counts(table, mend="give unit='cell' and all_stats=False")
        chosen = {name: arguments[name] for name in ("groupby", "group1", "group2", "idx1", "idx2")}
        contrasts = resolve_contrasts(self._obs_of(arguments["adata"]), table.cell_names, **chosen)
        return compare_groups(
            self.program, table, contrasts, request, names, self.spec.batch_categories, covariate_columns(self.spec),
            self.device, arguments["silent"],
        )  # fmt: skip
