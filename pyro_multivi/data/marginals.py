"""Marginal statistics of the data, before any model: shares, rates and depths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import ATAC, RNA, Modality
from pyro_multivi.data.sparse import SparseCounts

#: Smallest variance of a batch's log library size: a standard deviation of 0.1, narrower than any
#: real library, so that a batch of one cell (variance 0) still gives a proper LogNormal prior.
LIBRARY_LOG_VAR_FLOOR = 0.01

# Overdispersion of a gene is pulled to 1 as if its cells had this many more squared expected counts with it: from
# only a few, its estimate is noise (its standard error is sqrt(2 / sum of squared expected counts)).
_PRIOR_SQUARED_COUNTS = 10.0
_LEAST_DISPERSION, _MOST_DISPERSION = 0.01, 100.0


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

    Attributes
    ----------
    gene_share
        Share of each gene among all RNA counts, shape (G,); half a count is added to every gene.
        Sums to 1; uniform without RNA cells.
    inverse_dispersion
        Moment estimate of theta of each gene, shape (G,): its counts have variance mu + mu^2 / theta around the mean
        mu = depth of the cell x gene_share. What cells really differ by counts as dispersion here, so theta given
        the state of a cell is larger. In [0.01, 100]; 1 without RNA cells.
    detection_rate
        Share of ATAC cells in which a region is open, shape (M,), smoothed:
        (cells + 0.5) / (ATAC cells + 1). 0.5 without ATAC cells.
    library_log_mean, library_log_var
        Mean and (population) variance of log(max(total RNA counts, 1)) per batch, shape (K,),
        natural log. A batch without RNA cells takes the values over all RNA cells; without
        any RNA cell they are 0 and 1. The variance is at least ``LIBRARY_LOG_VAR_FLOOR``.
    rna_log_depth_mean
        Mean over RNA cells of log(1 + total counts); 0 without RNA cells.
    atac_log_depth_mean
        Mean over ATAC cells of log(1 + number of open regions); 0 without ATAC cells.
    fragments
        Statistics of counts of fragments, for models of these; else None.

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
    inverse_dispersion: Tensor
    detection_rate: Tensor
    library_log_mean: Tensor
    library_log_var: Tensor
    rna_log_depth_mean: float
    atac_log_depth_mean: float
    fragments: FragmentMarginals | None = None

    @classmethod
    def of(cls, blocks: Iterable[Cells], n_batch: int, counts_fragments: bool = False) -> Marginals:
        """Accumulate the statistics over blocks of cells, each seen once.

        Parameters
        ----------
        blocks
            Minibatches that together are the data set; only sums over a block are kept.
        n_batch
            Number of batches K: the first K columns of ``design`` are the one-hot batch.
        counts_fragments
            Whether ``y`` counts fragments, whose statistics are wanted too.

        Raises
        ------
        ValueError
            If there is no block.
        """
        rna, atac = _FeatureMoments(RNA), _FeatureMoments(ATAC)
        counted = _FeatureMoments(replace(ATAC, binary=False)) if counts_fragments else None
        for cells in blocks:
            batch_nk = cells.design[:, :n_batch].detach().cpu().double()
            rna.add(cells, batch_nk)
            atac.add(cells, batch_nk)
            if counted is not None:
                counted.add(cells, batch_nk)
        if rna.feature_sum is None or atac.feature_sum is None:
            raise ValueError("blocks: no cells were given, at least one is needed for the data's marginals.")
        share_g = rna.feature_sum + 0.5
        rate_m = (atac.feature_sum + 0.5) / (len(atac.depth) + 1)
        mean_k, var_k = _library_prior(rna.depth, rna.batch)
        return cls(
            gene_share=(share_g / share_g.sum()).float(),
            inverse_dispersion=rna.inverse_dispersion(share_g / share_g.sum()).float(),
            detection_rate=rate_m.float(),
            library_log_mean=mean_k.float(),
            library_log_var=var_k.float(),
            rna_log_depth_mean=_mean_log1p(rna.depth),
            atac_log_depth_mean=_mean_log1p(atac.depth),
            fragments=None if counted is None else counted.of_fragments(),
        )


class _FeatureMoments:
    """Sums per feature, and depth and batch of each measured cell, for one modality."""

    def __init__(self, modality: Modality) -> None:
        self._modality = modality
        self.feature_sum: Tensor | None = None
        # Of each feature, over cells: the squared value, and the value times the depth of its cell.
        self._squared: Tensor | float = 0.0
        self._with_depth: Tensor | float = 0.0
        self._depths: list[Tensor] = []
        self._batches: list[Tensor] = []

    def add(self, cells: Cells, batch_nk: Tensor) -> None:
        counts, measured = self._modality.counts_in(cells), self._modality.measured_in(cells).cpu()
        rows = counts if isinstance(counts, SparseCounts) else SparseCounts.from_dense(counts)
        # On the CPU in double precision: a sum over 10^6 cells outgrows float32.
        col, val, n = rows.col.cpu(), rows.val.detach().cpu(), rows.shape[1]
        length = rows.crow.cpu().diff()
        kept = torch.repeat_interleave(measured, length)
        if not bool(kept.all()):
            col, val, length = col[kept], val[kept], length * measured
        if self._modality.binary:
            feature_sum, depth = torch.bincount(col, minlength=n).double(), length.double()
        else:
            val = val.double()
            depth = torch.segment_reduce(val, "sum", lengths=length.long(), initial=0.0)
            with_depth = val * torch.repeat_interleave(depth, length)
            # Without entries bincount forgets the type of its weights.
            feature_sum, squared, with_depth = (
                torch.bincount(col, weights=weights, minlength=n).double()
                for weights in (val, val.square(), with_depth)
            )
            self._squared = self._squared + squared
            self._with_depth = self._with_depth + with_depth
        self.feature_sum = feature_sum if self.feature_sum is None else self.feature_sum + feature_sum
        self._depths.append(depth[measured])
        self._batches.append(batch_nk[measured])

    def inverse_dispersion(self, share_g: Tensor) -> Tensor:
        """Theta of each feature from sum((x - mu)^2 - x) = sum(mu^2) / theta, shape (features,)."""
        assert self.feature_sum is not None
        squared_depth = self.depth.square().sum()
        expected = share_g.square() * squared_depth
        excess = self._squared - 2 * share_g * self._with_depth + expected - self.feature_sum
        prior = _PRIOR_SQUARED_COUNTS
        dispersion = (excess + prior) / (expected + prior)
        return dispersion.clamp(_LEAST_DISPERSION, _MOST_DISPERSION).reciprocal()

    def of_fragments(self) -> FragmentMarginals:
        """Statistics of counts of fragments."""
        assert self.feature_sum is not None
        share_m = (self.feature_sum + 0.5) / (self.feature_sum + 0.5).sum()
        mean_k, var_k = _library_prior(self.depth, self.batch)
        return FragmentMarginals(
            region_share=share_m.float(),
            inverse_dispersion=self.inverse_dispersion(share_m).float(),
            log_mean=mean_k.float(),
            log_var=var_k.float(),
            log_depth_mean=_mean_log1p(self.depth),
        )

    @property
    def depth(self) -> Tensor:
        """Total per measured cell, shape (measured cells,)."""
        return torch.cat(self._depths)

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
