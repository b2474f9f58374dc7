r"""Counts of surface proteins, as in totalVI (Gayoso et al. 2021, Nature Methods 18).

.. math::

    u_{nt} &\sim \mathrm{Normal}(0, 1), \quad \beta_{nt} = \exp(m_{tb} + s_{tb} u_{nt}) \\
    y_{nt} &\sim \pi_{nt}\, \mathrm{NB}(\beta_{nt}, \phi_t)
             + (1 - \pi_{nt})\, \mathrm{NB}(\alpha_{nt} \beta_{nt}, \phi_t)

The background beta is LogNormal with a mean and a standard deviation of each protein t in each batch b, which start
from the data and are learned. It is written by u, its deviation in units of that standard deviation, so that putting a
cell into another batch moves its background there: the KL term is the same. alpha > 1 and pi are decoded from the
state.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_multivi.data.minibatch import Cells, Measurement
from pyro_multivi.data.table import CellTable
from pyro_multivi.distributions.mixture import NegativeBinomialMixture
from pyro_multivi.networks.extra.given_count import given_count
from pyro_multivi.networks.extra.modality import ExtraModality
from pyro_multivi.networks.extra.protein_marginals import ProteinMarginals
from pyro_multivi.networks.layers import start_constant

#: A background that differs by a quarter between cells; it is learned.
START_SD = 0.25
# exp of more is no count of a protein.
_MAX_LOG_MEAN, _MAX_LOG_RATIO = 12.0, 10.0
_MAX_LOG_SD = 1.0
# Cells of a new batch that tell its background: that of other batches is 0.3 off (root mean square of logs, simulated
# cells), that which 20, 10, 5 and 1 cells show 0.3, 0.4, 0.7 and 1.8, as a few may all be foreground.
_FEWEST_CELLS = 20
_CALIBRATED = ("calibrated_log_sd", "calibrated_log_theta", "weight_directions", "weight_sd")
#: Directions of the decoder's hidden layer in which its last layers have a posterior.
WEIGHT_DIRECTIONS = 16


class Proteins(ExtraModality):
    """Counts of proteins: a mixture of background and foreground, with the background of each cell a latent.

    ``values`` hold NaN for a protein that was not measured in a cell.

    ======================================= ======== ============================================================
    site                                    shape    meaning
    ======================================= ======== ============================================================
    ``protein_background``                  (B, F)   u, latent: log background of a cell, standardised
    ``protein_background_mean``             (B, F)   beta, mean count of the background
    ``protein_foreground_probability``      (B, F)   1 - pi
    ``protein_foreground_mean``             (B, F)   (1 - pi) alpha beta: expected counts beside the background
    ``protein_mean``                        (B, F)   expected counts, background included
    ``protein``                             (B, F)   y, counts
    ======================================= ======== ============================================================
    """

    estimated: ClassVar[str] = "foreground_mean"
    #: Last layers of the decoder, which have a posterior after training.
    readouts: ClassVar[tuple[str, ...]] = ("log_ratio", "odds")

    background_log_mean: Tensor
    background_log_sd: Tensor
    input_mean: Tensor
    #: Set after training for intervals by :mod:`pyro_multivi.posterior.calibration.fit_proteins`: what is added to
    #: the log standard deviation of the background and its standard error, (2,), and to log theta, (F,);
    #: directions of the hidden layer, (R, H + 1), and standard deviations of the weights in them, (2, F, R).
    calibrated_log_sd: Tensor
    calibrated_log_theta: Tensor
    weight_directions: Tensor
    weight_sd: Tensor

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        width, n, hidden = self.decoder.n_out, self.n_features, config.hidden
        self.log_ratio, self.odds = nn.Linear(width, n), nn.Linear(width, n)
        self.background_log_mean = nn.Parameter(torch.zeros(config.n_batch, n))
        self.background_log_sd = nn.Parameter(torch.full((config.n_batch, n), START_SD).log())
        sets = {"protein": 1, "protein-batch": config.n_batch, "protein-label": config.n_labels}
        self.log_theta = nn.Parameter(torch.zeros(sets[config.protein_dispersion], n))
        # q(u | y): it starts at the prior.
        self.background_hidden, self.background_head = nn.Linear(n, hidden), nn.Linear(hidden, 2 * n)
        nn.init.zeros_(self.background_head.weight)
        nn.init.zeros_(self.background_head.bias)
        self.register_buffer("input_mean", torch.zeros(n))
        self.register_buffer("calibrated_log_sd", torch.zeros(2))
        self.register_buffer("calibrated_log_theta", torch.zeros(n))
        self.register_buffer("weight_directions", torch.zeros(min(WEIGHT_DIRECTIONS, width) + 1, width + 1))
        self.register_buffer("weight_sd", torch.zeros(len(self.readouts), n, len(self.weight_directions)))

    @torch.no_grad()
    def start_from(self, table: CellTable) -> None:
        """Start at the background and foreground that the counts of each protein show in each batch."""
        found = ProteinMarginals.of(self.measurement(table), table.batch_code, table.n_batch)
        self.background_log_mean.copy_(found.background_log_mean)
        self.log_theta.copy_(found.log_theta.expand_as(self.log_theta))
        self.input_mean.copy_(found.log1p_mean)
        start_constant(self.odds, "odds", found.foreground_logit)
        start_constant(self.log_ratio, "log_ratio", found.foreground_log_ratio.expm1().log())

    @torch.no_grad()
    def start_batches_from(self, table: CellTable, n_known: int) -> None:
        """Take the background of new batches from their own counts; where these are few, that of the others."""
        found = ProteinMarginals.of(self.measurement(table), table.batch_code, table.n_batch)
        new = found.n_cells[n_known:] >= _FEWEST_CELLS
        self.background_log_mean[n_known:][new] = found.background_log_mean[n_known:][new]

    # ------------------------------------------------------------------ the generative model

    def observe(self, cells: Cells, z: Tensor, s: Tensor) -> None:
        """Background u, what is decoded, and the counts y."""
        u = pyro.sample(self.site("background"), self.background_prior(s))
        background = pyro.deterministic(self.site("background_mean"), self.background(u, s), event_dim=1)
        hidden = self.decode(z, s)
        ratio, logits = 1 + self.log_ratio(hidden).clamp(max=_MAX_LOG_RATIO).exp(), self.odds(hidden)
        probability = pyro.deterministic(self.site("foreground_probability"), logits.sigmoid(), event_dim=1)
        foreground = ratio * background
        pyro.deterministic(self.site("foreground_mean"), probability * foreground, event_dim=1)
        pyro.deterministic(self.site("mean"), torch.lerp(background, foreground, probability), event_dim=1)
        counts = NegativeBinomialMixture(background, foreground, self.theta(cells, s), logits)
        values, measured = self.seen(cells)
        pyro.sample(self.name, counts.mask(measured).to_event(1), obs=values)

    def background_prior(self, s: Tensor) -> dist.TorchDistribution:
        """u ~ Normal(0, I), event shape (F,)."""
        zero = s.new_zeros(*s.shape[:-1], self.n_features)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def background(self, u: Tensor, s: Tensor) -> Tensor:
        """beta = exp(m + s u) with the moments of the batch, (..., B, F)."""
        s_nb = s[..., : self.config.n_batch]
        sd = self.background_log_sd.clamp(max=_MAX_LOG_SD).exp()
        return (s_nb @ self.background_log_mean + (s_nb @ sd) * u).clamp(max=_MAX_LOG_MEAN).exp()

    def theta(self, cells: Cells, s: Tensor) -> Tensor:
        """phi, inverse dispersion, (F,) or (..., B, F)."""
        if self.config.protein_dispersion == "protein-batch":
            return (s[..., : self.config.n_batch] @ self.log_theta).exp()
        if self.config.protein_dispersion == "protein-label":
            assert cells.label is not None, "protein-label dispersion needs Cells.label"
            return self.log_theta[cells.label].exp()
        return self.log_theta[0].exp()

    # ------------------------------------------------------------------ the posterior

    def guide(self, cells: Cells, s: Tensor) -> None:
        """q(u | y): Normal; the prior for what was not measured."""
        _, measured = self.seen(cells)
        hidden = nn.functional.leaky_relu(self.background_hidden(self.input(cells)))
        loc, log_scale = self.background_head(hidden).chunk(2, -1)
        loc = torch.where(measured, loc, 0.0)
        scale = torch.where(measured, log_scale.clamp(-10.0, _MAX_LOG_SD).exp(), 1.0)
        pyro.sample(self.site("background"), dist.Normal(loc, scale).to_event(1))

    def input(self, cells: Cells) -> Tensor:
        """log(1 + count) less its mean over cells; 0, that mean, for a protein that was not measured."""
        values, measured = self.seen(cells)
        return torch.where(measured, values.log1p() - self.input_mean, 0.0)

    def seen(self, cells: Cells) -> Measurement:
        """Counts, 0 where not measured, and whether each was measured, both (B, F)."""
        values, measured = self.measurement(cells)
        known = ~values.isnan() & measured[:, None]
        return Measurement(torch.where(known, values, 0.0), known)

    # ------------------------------------------------------------------ the values of a cell itself, for intervals

    @property
    def calibrated(self) -> list[Tensor]:
        """Buffers that are set after training and cleared before more of it."""
        return [getattr(self, name) for name in _CALIBRATED]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Programs that were saved without them.
        for name in _CALIBRATED:
            state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def is_as_written(self) -> bool:
        """Whether the statements are those of this class, which :meth:`realised` and its calibration are about."""
        return type(self).observe is Proteins.observe

    def realised(self, part: str, cells: Cells, z: Tensor, s: Tensor, noise: Any) -> Tensor | None:
        """Draws of the background, and of which component a count is of, given the count where it was measured."""
        if not self.is_as_written:
            return None
        if part == "foreground_probability":
            return self.decoded(z, s, noise).logits.sigmoid()
        if part not in ("mean", "foreground_mean", "background_mean"):
            return None
        n_draws, own = len(z), self.decoded(z, cells.design, noise)
        y, measured = self.seen(cells)
        shift, error = self.calibrated_log_sd
        log_sd_shift = shift + error * noise.of(torch.zeros_like(cells.index[:1])).coarse_normal(
            self.site("log sd"), n_draws, 1
        )
        log_theta = self.theta(cells, cells.design).log() + self.calibrated_log_theta
        log_mean, log_sd = self.moments(cells.design, log_sd_shift)
        components = [
            given_count(y, measured, log_mean + log_ratio, log_sd, log_theta)
            for log_ratio in (torch.zeros_like(own.log_ratio), own.log_ratio)
        ]
        odds = own.logits + components[1].log_evidence - components[0].log_evidence
        shape = (self.n_features,)
        is_foreground = noise.uniform(self.site("component"), n_draws, shape).to(odds.dtype) < odds.sigmoid()
        unit = torch.special.ndtri(noise.uniform(self.site("background of a cell"), n_draws, shape)).to(odds.dtype)
        u = torch.where(
            is_foreground,
            components[1].mode + components[1].sd * unit,
            components[0].mode + components[0].sd * unit,
        )
        there = own if s is cells.design else self.decoded(z, s, noise)
        log_mean, log_sd = self.moments(s, log_sd_shift)
        background = (log_mean + log_sd.exp() * u).clamp(max=_MAX_LOG_MEAN).exp()
        if part == "background_mean":
            return background
        foreground = background * there.log_ratio.exp()
        return torch.where(is_foreground, foreground, 0.0 if part == "foreground_mean" else background)

    def moments(self, s: Tensor, log_sd_shift: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log standard deviation of the log background in the batches of a design, (..., B, F)."""
        s_nb = s[..., : self.config.n_batch]
        log_sd = (s_nb @ self.background_log_sd.clamp(max=_MAX_LOG_SD).exp()).log()
        return s_nb @ self.background_log_mean, log_sd + log_sd_shift

    def decoded(self, z: Tensor, s: Tensor, noise: Any) -> Decoded:
        """Log ratio of foreground to background and log odds of the foreground, with draws of the last layers.

        Parameters
        ----------
        z, s
            Draws of the state, (S, B, k), and the design.
        noise
            Of the draws.
        """
        hidden = self.decode(z, s.expand(*z.shape[:-1], s.shape[-1]))
        coordinates = nn.functional.linear(hidden, self.weight_directions[:, :-1], self.weight_directions[:, -1])
        features = torch.arange(self.n_features, device=z.device)
        found = []
        for name, sd in zip(self.readouts, self.weight_sd, strict=True):
            value = getattr(self, name)(hidden)
            if bool(sd.any()):
                weights = noise.of(features).coarse_normal(self.site(name), len(z), sd.shape[1]) * sd
                # What keeps the mean of the decoded value where the fitted weights have it.
                bend = 1 - 2 * value.sigmoid() if name == "odds" else 1.0
                variance = coordinates.square() @ sd.square().T
                value = value + coordinates @ weights.transpose(1, 2) - 0.5 * bend * variance
            found.append(value)
        log_ratio, logits = found
        return Decoded(log_ratio.clamp(max=_MAX_LOG_RATIO).exp().log1p(), logits, hidden)


class Decoded(NamedTuple):
    """Arguments of the mixture, decoded from the state, (S, B, F), and the hidden layer behind them, (S, B, H)."""

    log_ratio: Tensor
    logits: Tensor
    hidden: Tensor
