"""Marginal statistics of the data, before any model: shares, rates and depths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells, Panels
from pyro_multivi.data.modality import ATAC, RNA, Modality
from pyro_multivi.data.sparse import SparseCounts

#: Smallest variance of a batch's log library size: a standard deviation of 0.1, narrower than any
#: real library, so that a batch of one cell (variance 0) still gives a proper LogNormal prior.
LIBRARY_LOG_VAR_FLOOR = 0.01

# Overdispersion of a gene is pulled to 1 as if its cells had this many more squared expected counts with it: from
# only a few, its estimate is noise (its standard error is sqrt(2 / sum of squared expected counts)).
_PRIOR_SQUARED_COUNTS = 10.0
_LEAST_DISPERSION, _MOST_DISPERSION = 0.01, 100.0
# Shares of features that some cells were not measured for are found in rounds, until they change by less than this.
_ROUNDS, _CHANGE = 200, 1e-7


@dataclass(frozen=True)
class FragmentMarginals:
    """Statistics of counts of fragments over the ATAC cells of a data set.

    Attributes
    ----------
    region_share
        Share of each region among all fragments, shape (M,), as the ``gene_share`` of :class:`Marginals`.
    inverse_dispersion
        Moment estimate of theta of each region, shape (M,), as that of genes.
    log_mean, log_var
        Mean and variance of the log total per batch, shape (K,), as those of the RNA library.
    log_depth_mean
        Mean over ATAC cells of log(1 + total fragments); 0 without ATAC cells.
    """

    region_share: Tensor
    inverse_dispersion: Tensor
    log_mean: Tensor
    log_var: Tensor
    log_depth_mean: float


@dataclass(frozen=True)
class Marginals:
    """Statistics over the measured cells of a data set; parameters and priors start from them.

    Where cells were not measured for all features, those of a feature are over the cells that measured it, and the
    depth of a cell is its total over the share that the features of its panel have.

    Attributes
    ----------
    gene_share
        Share of each gene among all RNA counts, shape (G,); half a count is added to every gene.
        Sums to 1; uniform without RNA cells.
    region_share
        Share of each region among all that are open, shape (M,), in the same way.
    inverse_dispersion
        Moment estimate of theta of each gene, shape (G,): its counts have variance mu + mu^2 / theta around the mean
        mu = depth of the cell x gene_share. What cells really differ by counts as dispersion here, so theta given
        the state of a cell is larger. In [0.01, 100]; 1 without RNA cells.
    detection_rate
        Share of ATAC cells in which a region is open, shape (M,), smoothed:
        (cells + 0.5) / (cells that measured it + 1). 0.5 without ATAC cells.
    library_log_mean, library_log_var
        Mean and (population) variance of log(max(total RNA counts, 1)) per batch, shape (K,),
        natural log. A batch without RNA cells takes the values over all RNA cells; without
        any RNA cell they are 0 and 1. The variance is at least ``LIBRARY_LOG_VAR_FLOOR``.
    atac_log_mean, atac_log_var
        Those of log(max(number of open regions, 1)), over ATAC cells, shape (K,).
    rna_log_depth_mean
        Mean over RNA cells of log(1 + total counts); 0 without RNA cells.
    atac_log_depth_mean
        Mean over ATAC cells of log(1 + number of open regions); 0 without ATAC cells.
    fragments
        Statistics of counts of fragments, for models of these; else None.
    atac_size_mean
        Mean over ATAC cells of the known cell factors; None without them.
    rna_log_size_mean
        Mean over RNA cells of the logarithm of known size factors; 0 without them.

    Examples
    --------
    >>> one = torch.ones(2, dtype=torch.bool)
    >>> cells = Cells(index=torch.arange(2), n_total=2, x=torch.tensor([[3.0, 0.0], [2.0, 2.0]]),
    ...               y=torch.tensor([[1.0], [0.0]]), has_rna=one, has_atac=one, design=torch.ones(2, 1))
    >>> marginals = Marginals.of([cells], n_batch=1)
    >>> marginals.gene_share, marginals.detection_rate
    (tensor([0.6875, 0.3125]), tensor([0.5000]))
    """

    gene_share: Tensor
    region_share: Tensor
    inverse_dispersion: Tensor
    detection_rate: Tensor
    library_log_mean: Tensor
    library_log_var: Tensor
    atac_log_mean: Tensor
    atac_log_var: Tensor
    rna_log_depth_mean: float
    atac_log_depth_mean: float
    fragments: FragmentMarginals | None = None
    atac_size_mean: float | None = None
    rna_log_size_mean: float = 0.0

    @classmethod
    def of(
        cls,
        blocks: Iterable[Cells],
        n_batch: int,
        counts_fragments: bool = False,
        shares: Mapping[Modality, Tensor] | None = None,
    ) -> Marginals:
        """Accumulate the statistics over blocks of cells, each seen once.

        Parameters
        ----------
        blocks
            Minibatches that together are the data set; only sums over a block are kept.
        n_batch
            Number of batches K: the first K columns of ``design`` are the one-hot batch.
        counts_fragments
            Whether ``y`` counts fragments, whose statistics are wanted too.
        shares
            Share of each feature among all counts of a modality, (F,), where it is known and these cells were not
            measured for all features; else it is that of the cells.

        Raises
        ------
        ValueError
            If there is no block.
        """
        rna, atac = _FeatureMoments(RNA), _FeatureMoments(ATAC)
        counted = _FeatureMoments(replace(ATAC, binary=False)) if counts_fragments else None
        sizes: list[Tensor] = []
        log_sizes: list[Tensor] = []
        for cells in blocks:
            batch_nk = cells.design[:, :n_batch].detach().cpu().double()
            if cells.atac_size is not None:
                sizes.append(cells.atac_size[cells.has_atac].cpu().double())
            if cells.rna_size is not None:
                log_sizes.append(cells.rna_size[cells.has_rna].cpu().double().log())
            rna.add(cells, batch_nk)
            atac.add(cells, batch_nk)
            if counted is not None:
                counted.add(cells, batch_nk)
        if rna.feature_sum is None or atac.feature_sum is None:
            raise ValueError("blocks: no cells were given, at least one is needed for the data's marginals.")
        known = {modality: share.cpu().double() for modality, share in (shares or {}).items()}
        share_g = known[RNA] if RNA in known and not rna.complete else rna.share()
        share_m = known[ATAC] if ATAC in known and not atac.complete else atac.share()
        rna_depth, atac_depth = rna.depth(share_g), atac.depth(share_m)
        mean_k, var_k = _library_prior(rna_depth, rna.batch)
        atac_mean_k, atac_var_k = _library_prior(atac_depth, atac.batch)
        return cls(
            gene_share=share_g.float(),
            region_share=share_m.float(),
            inverse_dispersion=rna.inverse_dispersion(share_g).float(),
            detection_rate=((atac.feature_sum.sum(0) + 0.5) / (atac.n_cells() + 1)).float(),
            library_log_mean=mean_k.float(),
            library_log_var=var_k.float(),
            atac_log_mean=atac_mean_k.float(),
            atac_log_var=atac_var_k.float(),
            rna_log_depth_mean=_mean_log1p(rna_depth),
            atac_log_depth_mean=_mean_log1p(atac_depth),
            fragments=None if counted is None else counted.of_fragments(known.get(ATAC)),
            atac_size_mean=float(torch.cat(sizes).mean()) if any(len(some) for some in sizes) else None,
            rna_log_size_mean=float(torch.cat(log_sizes).mean()) if any(len(some) for some in log_sizes) else 0.0,
        )


class _FeatureMoments:
    """Sums per panel and feature, and depth, panel and batch of each measured cell, for one modality."""

    def __init__(self, modality: Modality) -> None:
        self._modality = modality
        #: Sum of each feature over the cells of each panel, (P, F).
        self.feature_sum: Tensor | None = None
        # Whether each feature belongs to each panel, (P, F).
        self._panels = torch.zeros(0)
        # Over cells: the squared value, and the value times the total of its cell, (P, F).
        self._squared: Tensor | float = 0.0
        self._with_total: Tensor | float = 0.0
        self._totals: list[Tensor] = []
        self._codes: list[Tensor] = []
        self._batches: list[Tensor] = []

    def add(self, cells: Cells, batch_nk: Tensor) -> None:
        counts, measured = self._modality.counts_in(cells), self._modality.measured_in(cells).cpu()
        panels: Panels | None = self._modality.panels_in(cells)
        rows = SparseCounts.of(counts)
        # On the CPU in double precision: a sum over 10^6 cells outgrows float32.
        col, val, n = rows.col.cpu(), rows.val.detach().cpu(), rows.shape[1]
        self._panels = torch.ones(1, n, dtype=torch.double) if panels is None else panels.measured.cpu().double()
        code = torch.zeros(len(measured), dtype=torch.int64) if panels is None else panels.code.cpu()
        length = rows.crow.cpu().diff()
        kept = torch.repeat_interleave(measured, length)
        if not bool(kept.all()):
            col, val, length = col[kept], val[kept], length * measured
        n_panels = len(self._panels)
        place = col if n_panels == 1 else col + n * torch.repeat_interleave(code, length)

        def summed(weights: Tensor | None = None) -> Tensor:
            # Without entries bincount forgets the type of its weights.
            return torch.bincount(place, weights=weights, minlength=n_panels * n).double().view(n_panels, n)

        if self._modality.binary:
            feature_sum, total = summed(), length.double()
        else:
            val = val.double()
            total = torch.segment_reduce(val, "sum", lengths=length.long(), initial=0.0)
            feature_sum = summed(val)
            self._squared = self._squared + summed(val.square())
            self._with_total = self._with_total + summed(val * torch.repeat_interleave(total, length))
        self.feature_sum = feature_sum if self.feature_sum is None else self.feature_sum + feature_sum
        self._totals.append(total[measured])
        self._codes.append(code[measured])
        self._batches.append(batch_nk[measured])

    def share(self) -> Tensor:
        """Share of each feature among the counts of a cell that was measured for all, (F,), summing to 1.

        With several panels it is that of the Poisson likelihood: the counts of a feature over the depth of the cells
        that measured it, the depth being the total of a cell over the share that its panel has. Panels without a
        feature in common are taken to have shares in proportion to their numbers of features.
        """
        assert self.feature_sum is not None
        counts = self.feature_sum.sum(0) + 0.5
        if len(self._panels) == 1:
            return counts / counts.sum()
        of_panel = self._sum_by_panel(torch.cat(self._totals)) + 0.5
        share = torch.full_like(counts, 1 / len(counts))
        for _ in range(_ROUNDS):
            exposure = (of_panel / (self._panels @ share)) @ self._panels
            # Of a feature that no cell measured, nothing is known.
            found = torch.where(exposure > 0, counts / exposure.clamp(min=1e-300), share)
            found = found / found.sum()
            done = bool(((found - share).abs() <= _CHANGE * share).all())
            share = found
            if done:
                break
        return share

    @property
    def complete(self) -> bool:
        """Whether all cells were measured for all features."""
        return bool(self._panels.all())

    def n_cells(self) -> Tensor:
        """Number of cells that measured each feature, (F,)."""
        codes = torch.cat(self._codes)
        return self._sum_by_panel(torch.ones(len(codes), dtype=torch.double)) @ self._panels

    def depth(self, share: Tensor) -> Tensor:
        """Depth of each measured cell, as if all features had been measured, (measured cells,)."""
        total = torch.cat(self._totals)
        return total if self.complete else total / (self._panels @ share)[torch.cat(self._codes)]

    def inverse_dispersion(self, share_g: Tensor) -> Tensor:
        """Theta of each feature from sum((x - mu)^2 - x) = sum(mu^2) / theta, shape (features,)."""
        assert self.feature_sum is not None
        squared_depth = self._sum_by_panel(self.depth(share_g).square()) @ self._panels
        of_panel = torch.ones(1, dtype=torch.double) if self.complete else self._panels @ share_g
        with_depth = torch.as_tensor(self._with_total / of_panel[:, None]).sum(0)
        squared = torch.as_tensor(self._squared).sum(0)
        expected = share_g.square() * squared_depth
        excess = squared - 2 * share_g * with_depth + expected - self.feature_sum.sum(0)
        prior = _PRIOR_SQUARED_COUNTS
        dispersion = (excess + prior) / (expected + prior)
        return dispersion.clamp(_LEAST_DISPERSION, _MOST_DISPERSION).reciprocal()

    def _sum_by_panel(self, values: Tensor) -> Tensor:
        """Sum of a number per measured cell over the cells of each panel, (P,)."""
        return torch.bincount(torch.cat(self._codes), weights=values, minlength=len(self._panels)).double()

    def of_fragments(self, known: Tensor | None) -> FragmentMarginals:
        """Statistics of counts of fragments; ``known`` are the shares of regions, if they are."""
        share_m = self.share() if known is None or self.complete else known
        depth = self.depth(share_m)
        mean_k, var_k = _library_prior(depth, self.batch)
        return FragmentMarginals(
            region_share=share_m.float(),
            inverse_dispersion=self.inverse_dispersion(share_m).float(),
            log_mean=mean_k.float(),
            log_var=var_k.float(),
            log_depth_mean=_mean_log1p(depth),
        )

    @property
    def batch(self) -> Tensor:
        """One-hot batch per measured cell, shape (measured cells, K)."""
        return torch.cat(self._batches)


def _library_prior(depth_n: Tensor, batch_nk: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and floored variance of the log library per batch, shapes (K,) and (K,)."""
    n_batch = batch_nk.shape[1]
    if len(depth_n) == 0:
        return torch.zeros(n_batch, dtype=torch.double), torch.ones(n_batch, dtype=torch.double)
    log_n = depth_n.clamp(min=1.0).log()
    size_k = batch_nk.sum(0)
    empty_k = size_k == 0
    size_k = size_k.masked_fill(empty_k, 1.0)
    mean_k = torch.where(empty_k, log_n.mean(), batch_nk.T @ log_n / size_k)
    squared_nk = batch_nk * (log_n[:, None] - mean_k).square()
    var_k = torch.where(empty_k, log_n.var(correction=0), squared_nk.sum(0) / size_k)
    return mean_k, var_k.clamp(min=LIBRARY_LOG_VAR_FLOOR)


def _mean_log1p(depth_n: Tensor) -> float:
    return float(depth_n.log1p().mean()) if len(depth_n) else 0.0
