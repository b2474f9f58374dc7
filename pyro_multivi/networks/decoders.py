"""Decoders: from the latent state to normalized expression and accessibility.

The last layer of a decoder is by far its widest, so it is returned as a
:class:`~pyro_multivi.distributions.Readout`, not multiplied out: the likelihood evaluates it
block by block, prediction evaluates only the requested features.

Where there are several batches it has an intercept of each batch for each feature, beside the batch's part in the first
layer. What differs between batches feature by feature is then explained from the start. Otherwise it has to be learned
by way of the hidden units, and meanwhile the state takes it up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.modality import MODALITIES, Modality
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.kernels.readout import Link, apply_link
from pyro_multivi.networks.layers import CovariateStack, beside


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


def read_out(layer: nn.Module, hidden: Tensor, s: Tensor, link: Link, gemm_dtype: torch.dtype | None) -> Tensor:
    """Decode a hidden layer (..., H) under covariates s by a last layer, (..., F): dense if that is no ``nn.Linear``.

    Columns of an ``nn.Linear`` behind those of the hidden units are intercepts of the first columns of s, the batches,
    times :func:`intercept_scale`.

    Examples
    --------
    >>> hidden, s, low_rank = torch.ones(2, 8), torch.eye(2), nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 5))
    >>> for layer in (nn.Linear(8, 5), nn.Linear(8 + 2, 5, bias=False), low_rank):
    ...     type(read_out(layer, hidden, s, "softmax", None)).__name__
    'Readout'
    'Readout'
    'Tensor'
    """
    if isinstance(layer, nn.Linear):
        n_intercepts = layer.in_features - hidden.shape[-1]
        if n_intercepts > 0:
            hidden = beside(hidden, intercept_scale(hidden.shape[-1]) * s[..., :n_intercepts])
        bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
        return Readout(hidden, layer.weight, bias, link, gemm_dtype)
    return apply_link(layer(hidden), link)


def intercept_scale(n_hidden: int) -> float:
    r"""Factor of the batch in the input of a last layer.

    The prior of that layer's weights is Normal(0, :math:`\sigma^2` / H). Times :math:`\sqrt H` the intercept of a batch
    has the standard deviation :math:`\sigma`, as what H hidden units of about 1 add up to.
    """
    return math.sqrt(n_hidden)


def intercepts_of(decoder: nn.Module, layer: nn.Linear) -> int:
    """Number of the last columns of a decoder's last layer that are intercepts of batches."""
    stack = getattr(decoder, "stack", None)
    return layer.in_features - stack.n_out if isinstance(stack, CovariateStack) else 0


def with_intercepts(program: nn.Module) -> Iterator[tuple[Modality, nn.Linear, int]]:
    """Last layers of a program in which batches have intercepts: modality, layer, and their number."""
    for modality in MODALITIES:
        decoder = getattr(program, f"{modality.name}_decoder", None)
        layer = getattr(decoder, modality.decoded, None)
        if decoder is not None and isinstance(layer, nn.Linear) and (n := intercepts_of(decoder, layer)) > 0:
            yield modality, layer, n


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
    n_intercepts
        Number of batches that have intercepts of their own in rho; 0 for none.
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
        n_intercepts: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.stack = CovariateStack(n_latent, n_hidden, n_layers, activation=nn.ReLU, **options)
        self.link: Link = "softmax" if simplex else "softplus"
        self.rho = nn.Linear(self.stack.n_out + n_intercepts, n_genes)
        self.pi = nn.Linear(self.stack.n_out, n_genes) if zero_inflation else None
        self.theta = nn.Linear(self.stack.n_out, n_genes) if cell_dispersion else None
        self.gemm_dtype: torch.dtype | None = None

    def forward(self, z: Tensor, s: Tensor) -> DecodedExpression:
        """Decode z (..., n_latent) under covariates s (B, n_covariates)."""
        hidden = self.stack(z, s)
        pi, theta = (
            None if layer is None else read_out(layer, hidden, s, "identity", self.gemm_dtype)
            for layer in (self.pi, self.theta)
        )
        return DecodedExpression(read_out(self.rho, hidden, s, self.link, self.gemm_dtype), pi, theta)


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

    def __init__(
        self, n_latent: int, n_regions: int, n_hidden: int, n_layers: int, *, n_intercepts: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self.stack = CovariateStack(n_latent, n_hidden, n_layers, activation=nn.LeakyReLU, **options)
        self.p = nn.Linear(self.stack.n_out + n_intercepts, n_regions)
        self.gemm_dtype: torch.dtype | None = None

    def forward(self, z: Tensor, s: Tensor) -> Tensor:
        """Decode z (..., n_latent) under covariates s (B, n_covariates) to p, (..., n_regions)."""
        return read_out(self.p, self.stack(z, s), s, "sigmoid", self.gemm_dtype)
