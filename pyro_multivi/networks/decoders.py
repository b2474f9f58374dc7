"""Decoders: from the latent state to normalized expression and accessibility.

The last layer of a decoder is by far its widest, so it is returned as a
:class:`~pyro_multivi.distributions.Readout`, not multiplied out: the likelihood evaluates it
block by block, prediction evaluates only the requested features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_multivi.config import ProgramConfig
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.kernels.readout import Link
from pyro_multivi.networks.layers import CovariateStack


class DecodedExpression(NamedTuple):
    """Arguments of the distribution of a cell's expression.

    Attributes
    ----------
    rho
        Normalized expression, (..., G).
    pi_logits
        Logit of the zero-inflation probability, (..., G), or None.
    theta_logits
        Log inverse dispersion of each gene in each cell, (..., G), or None.
    """

    rho: Tensor
    pi_logits: Tensor | None
    theta_logits: Tensor | None


class ExpressionDecoder(nn.Module):
    """Decoder of expression: f_w (normalized expression), f_h (zero inflation) and, per cell, the dispersion.

    Parameters
    ----------
    n_latent, n_genes, n_hidden, n_layers
        Widths.
    simplex
        Whether rho sums to one within a cell (softmax) or is only non-negative (softplus).
    zero_inflation, cell_dispersion
        Whether these arguments are decoded as well.
    **options
        Other arguments of :class:`~pyro_multivi.networks.layers.CovariateStack`.
    """

    def __init__(
        self,
        n_latent: int,
        n_genes: int,
        n_hidden: int,
        n_layers: int,
        *,
        simplex: bool,
        zero_inflation: bool,
        cell_dispersion: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        self.stack = CovariateStack(n_latent, n_hidden, n_layers, activation=nn.ReLU, **options)
        self.link: Link = "softmax" if simplex else "softplus"
        self.rho = nn.Linear(self.stack.n_out, n_genes)
        self.pi = nn.Linear(self.stack.n_out, n_genes) if zero_inflation else None
        self.theta = nn.Linear(self.stack.n_out, n_genes) if cell_dispersion else None
        self.gemm_dtype: torch.dtype | None = None

    def forward(self, z: Tensor, s: Tensor) -> DecodedExpression:
        """Decode z (..., n_latent) under covariates s (B, n_covariates)."""
        hidden = self.stack(z, s)

        def logits(layer: nn.Module | None) -> Tensor | None:
            if layer is None:
                return None
            assert isinstance(layer, nn.Linear)
            return Readout(hidden, layer.weight, layer.bias, "identity", self.gemm_dtype)

        rho = Readout(hidden, self.rho.weight, self.rho.bias, self.link, self.gemm_dtype)
        return DecodedExpression(rho, logits(self.pi), logits(self.theta))


def dispersions_of_cells(config: ProgramConfig, log_theta: Tensor, s: Tensor, label: Tensor | None) -> Tensor:
    """Inverse dispersions of genes, (G,), or of genes in each cell, (..., B, G), from sets of logs, (..., sets, G)."""
    if config.dispersion == "gene":
        return log_theta[..., 0, :].exp()
    if log_theta.dim() > 2:
        # Draws of random dispersions are (S, 1, sets, G): the 1 stands where cells do.
        log_theta = log_theta.squeeze(-3)
    if config.dispersion == "gene-batch":
        return (s[..., : config.n_batch] @ log_theta).exp()
    assert label is not None, "gene-label dispersion needs Cells.label"
    return log_theta[..., label, :].exp()


class AccessibilityDecoder(nn.Module):
    """Decoder of accessibility, g_z: probability that a region is accessible, before cell and region factors.

    Arguments as those of :class:`ExpressionDecoder`.
    """

    def __init__(self, n_latent: int, n_regions: int, n_hidden: int, n_layers: int, **options: Any) -> None:
        super().__init__()
        self.stack = CovariateStack(n_latent, n_hidden, n_layers, activation=nn.LeakyReLU, **options)
        self.p = nn.Linear(self.stack.n_out, n_regions)
        self.gemm_dtype: torch.dtype | None = None

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        """Decode z (..., n_latent) under covariates s (B, n_covariates) to p, (..., n_regions)."""
        return Readout(self.stack(z, s), self.p.weight, self.p.bias, "sigmoid", self.gemm_dtype)
