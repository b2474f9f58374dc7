r"""Posterior of the decoders' last layers, approximated after training.

Training leaves one value of each weight, and so draws of z alone are as sure of the decoder as if it had been seen. Of
each feature j the weights and the intercept of its logit are given a Normal posterior in a few directions k of the last
hidden layer, which all features share. At hidden layer h, with coordinates :math:`\phi(h)` in these directions (the
last is 1, for the intercept), a draw of the logit is

.. math:: a_j(h) + \sum_k \phi_k(h)\, \sigma_{jk}\, \varepsilon_{jk} - \tfrac12 c_j(h) \sum_k \phi_k(h)^2 \sigma_{jk}^2

where :math:`\varepsilon` is the same for all cells of a draw: what is unknown of a weight errs alike in every cell. The
last term keeps the mean of rho or p where the fitted weights have it; c is the ratio of second to first derivative of
the link, 1 for shares of counts and 1 - 2 p for probabilities. Directions and standard deviations are buffers of the
program (``rna_weight_directions``, ``rna_weight_sd``, and those of ATAC), set by
:mod:`pyro_multivi.posterior.calibration.fit_weights`; zeros before that, with which draws are of the fitted decoder.

Cells of one state z are not all alike: each draw of a cell and feature adds :math:`\eta_j \sum_k u_k a_{jk} / \sqrt K`
with u of its own for the cell, :math:`a_{jk}` for all cells, both standard Normal, and :math:`\eta_j^2` in the sum of
the last term. The standard deviations :math:`\eta` (``rna_residual_sd``, ``atac_residual_sd``) are set by
:mod:`pyro_multivi.posterior.calibration.fit_residual`. Replicated counts do without, for fitted dispersions have it
already.

The weights, what is decoded at posterior means, the ELBO and the marginal likelihood stay as they were trained.
Differential tests draw the latent state alone: in those of groups, calibrated by counts, the decoder cancels; those of
random cells (``unit="cell"``) are of the fitted decoder.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_multivi.data.modality import MODALITIES, Modality, modelled
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.kernels.readout import Link
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.program import MultiVIProgram

#: Directions in which cells of one state differ in a draw: enough for the sum to be about Normal.
RESIDUAL_DIRECTIONS = 8
_DECODED = tuple(modality.decoded for modality in MODALITIES)


@dataclass(frozen=True)
class WeightPosterior:
    """Posterior of the last layer of a modality's decoder.

    Attributes
    ----------
    directions
        Coordinates of a hidden layer with a 1 behind it, (R, H + 1).
    sd
        Standard deviation of each feature's weight in each direction, (F, R).
    residual_sd
        Standard deviation of each feature's logit among cells of one state, (F,).
    name
        Name of the stream of random numbers.
    """

    directions: Tensor
    sd: Tensor
    residual_sd: Tensor
    name: str

    @classmethod
    def of(cls, program: MultiVIProgram, modality: Modality) -> WeightPosterior | None:
        """Read it from a program; None before it is fitted."""
        directions, sd = weight_buffers(program, modality)
        if not bool(sd.any()):
            return None
        return cls(directions, sd, residual_buffer(program, modality), f"{modality.decoded} weights")

    def coordinates(self, hidden: Tensor) -> Tensor:
        """Coordinates of hidden layers (..., H), (..., R)."""
        return torch.nn.functional.linear(hidden, self.directions[:, :-1], self.directions[:, -1])


def weight_buffers(program: MultiVIProgram, modality: Modality) -> tuple[Tensor, Tensor]:
    """Buffers with the directions, (R, H + 1), and the standard deviations, (F, R), of a modality's last layer."""
    return getattr(program, f"{modality.key}_weight_directions"), getattr(program, f"{modality.key}_weight_sd")


def residual_buffer(program: MultiVIProgram, modality: Modality) -> Tensor:
    """Buffer with the standard deviation of each feature's logit among cells of one state, (F,)."""
    return getattr(program, f"{modality.key}_residual_sd")


def with_weight_noise(
    program: MultiVIProgram, site: str, values: Tensor, noise: CellNoise, *, residual: bool = True
) -> Tensor:
    """Decoded values (S, B, F) of a site, with a draw of the last layer for each of S draws of the cells.

    With ``residual`` cells of one state differ too. Values are returned as they are without a posterior of the last
    layer, and where no readout of it is behind them.
    """
    modality = next((one for one in modelled(program.config) if one.decoded == site), None)
    posterior = None if modality is None else WeightPosterior.of(program, modality)
    if posterior is None or not isinstance(values, Readout) or values.weight.shape[0] != len(posterior.sd):
        return values
    if not residual:
        posterior = replace(posterior, residual_sd=torch.zeros_like(posterior.residual_sd))
    features = torch.arange(len(posterior.sd), device=values.device)
    return PerturbedReadout.of(values, posterior, features, noise)


class WeightNoise(Messenger):
    """Handler by which the decoders of a model have draws of their last layers, for the counts that it draws."""

    def __init__(self, program: MultiVIProgram, noise: CellNoise | None) -> None:
        super().__init__()
        self.program, self.noise = program, noise

    def _pyro_sample(self, msg: Any) -> None:
        if self.noise is None or msg["name"] not in _DECODED:
            return
        values = with_weight_noise(self.program, msg["name"], msg["fn"].base_dist.v, self.noise, residual=False)
        msg["fn"] = dist.Delta(values, event_dim=1).mask(False)
        if msg["value"] is not None:
            msg["value"] = values


class PerturbedReadout(Readout):
    """Readout (S, ..., F) of which each draw s has its own draw of the weights."""

    posterior: WeightPosterior
    features: Tensor
    noise: CellNoise

    @staticmethod
    def of(readout: Readout, posterior: WeightPosterior, features: Tensor, noise: CellNoise) -> PerturbedReadout:
        """Readout of some features of a posterior, at positions (F,), int64, with noise for its draws."""
        parts = (readout.hidden, readout.weight, readout.bias, readout.link, readout.gemm_dtype)
        made: PerturbedReadout = PerturbedReadout(*parts)
        made.posterior, made.features, made.noise = posterior, features, noise
        return made

    def of_features(self, features: Tensor, link: Link | None = None) -> Readout:
        """Readout of some features, with the same draws of their weights."""
        part = super().of_features(features, link)
        return PerturbedReadout.of(part, self.posterior, self.features[features], self.noise)

    def of_cells(self, rows: Tensor) -> Readout:
        """Readout of some cells, with the same draws of what distinguishes them."""
        noise = replace(self.noise, index=self.noise.index[rows])
        return PerturbedReadout.of(super().of_cells(rows), self.posterior, self.features, noise)

    def _with(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Readout:
        return PerturbedReadout.of(super()._with(hidden, weight, bias), self.posterior, self.features, self.noise)

    def _logits_at(self, features: slice | Tensor) -> Tensor:
        return self._perturb(super()._logits_at(features), features)

    def _pooled_logits(self, features: slice) -> Tensor:
        return self._perturb(super()._pooled_logits(features), features)

    def _perturb(self, logits: Tensor, features: slice | Tensor) -> Tensor:
        chosen = self.features[features]
        sd_fr, residual_f = self.posterior.sd[chosen], self.posterior.residual_sd[chosen]
        n_draws, n_directions = len(logits), sd_fr.shape[1]
        name, source = self.posterior.name, self.noise.of(chosen)
        weights_sfr = source.coarse_normal(name, n_draws, n_directions) * sd_fr
        # All dimensions between draws and features are cells.
        phi_scr = self.posterior.coordinates(self.hidden).reshape(n_draws, -1, n_directions)
        variance = (phi_scr.square() @ sd_fr.square().T).reshape(logits.shape)
        if bool(residual_f.any()):
            n = RESIDUAL_DIRECTIONS
            effect_sfk = source.coarse_normal(f"{name} residual", n_draws, n) * (residual_f[:, None] * n**-0.5)
            state_sck = self.noise.coarse_normal(f"{name} state", n_draws, n)
            phi_scr = torch.cat([phi_scr, state_sck], -1)
            weights_sfr = torch.cat([weights_sfr, effect_sfk], -1)
            variance += residual_f.square()
        bend = 1.0 if self.link in ("softmax", "identity") else self._bend(logits)
        noise = (phi_scr @ weights_sfr.transpose(1, 2)).reshape(logits.shape)
        return logits.add(noise).sub_(variance.mul_(0.5 * bend))

    def _bend(self, logits: Tensor) -> Tensor:
        """Ratio of second to first derivative of a sigmoid or softplus."""
        return 1 - (2 if self.link == "sigmoid" else 1) * logits.sigmoid()
