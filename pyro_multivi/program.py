"""MultiVI as a Pyro program: ``model`` is the graph, small methods are its edges, ``guide`` stands below."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA, modality_named
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions import (
    NegativeBinomialCounts,
    PoissonCounts,
    ScaledBernoulli,
    ZeroInflatedNegativeBinomialCounts,
    measured_only,
)
from pyro_multivi.distributions.fragments import FragmentCounts
from pyro_multivi.distributions.logit_normal import LogitNormal
from pyro_multivi.networks import cell_factor as factors
from pyro_multivi.networks.alignment import DISTILLATION_WEIGHT, distillation, mmd_between_patterns, penalty
from pyro_multivi.networks.decoders import DecodedExpression, dispersions_of_cells
from pyro_multivi.networks.encoders import HiddenState, HiddenStates
from pyro_multivi.networks.experts import (
    Expert,
    alone_of,
    average,
    expert_weights,
    experts_of,
    in_all,
    measurement_patterns,
    seen_from_one,
)
from pyro_multivi.networks.modules import ProgramModules
from pyro_multivi.networks.panels import depth, log_depth, measured_share, missing_input, totals
from pyro_multivi.networks.param_sites import register_param_sites

#: Name of the plate of cells.
CELLS = "cells"


class MultiVIProgram(ProgramModules):
    """The generative model of MultiVI and its amortised posterior.

    Parameters
    ----------
    config
        Sizes and modelling choices.

    Notes
    -----
    Every distribution and every network call of :meth:`model` and :meth:`guide` is one small
    method; a variant of the model overrides one of them or wraps a Pyro handler around an
    unchanged program. Draws add dimensions on the left: all methods accept z of shape (..., B, K).

    The program trains under :func:`pyro_multivi.training.fit` and under a plain
    ``pyro.infer.SVI(program.model, program.guide, ...)``; it never enters Pyro's global
    parameter store.

    A latent that an override adds needs a site of the same name in the guide: one of each cell in
    :meth:`guide_extra`, one that all cells share in :meth:`guide_shared`, in the model's order.

    References
    ----------
    Ashuach, Gabitto, Koodli, Saldi, Jordan, Yosef (2023), MultiVI: deep generative model for the
    integration of multimodal data, Nature Methods 20.

    Examples
    --------
    >>> from pyro_multivi import ProgramConfig
    >>> program = MultiVIProgram(ProgramConfig(n_genes=20, n_regions=30, n_hidden=8, n_latent=2))
    >>> cells = Cells(index=torch.arange(4), n_total=4, x=torch.ones(4, 20), y=torch.ones(4, 30),
    ...               has_rna=torch.ones(4, dtype=torch.bool), has_atac=torch.ones(4, dtype=torch.bool),
    ...               design=torch.ones(4, 1))
    >>> trace = pyro.poutine.trace(program.model).get_trace(cells)
    >>> [name for name in trace.stochastic_nodes if name != "cells"]
    ['z', 'l', 'd']
    """

    # ------------------------------------------------------------------ the generative model

    def model(self, cells: Cells) -> None:
        r"""The joint density of the paper.

        .. math::

            \begin{split}
            p(z, \ell, d, x, y \mid s) = \prod_n\; & p(z_n)\, p(\ell_n \mid s_n)\, p(d_n \mid s_n) \\
            & \prod_g p(x_{ng} \mid \ell_n \rho_{ng}, \theta_g, \pi_{ng})
            \prod_j \mathrm{Bernoulli}(y_{nj} \mid p_{nj} d_n r_j)
            \end{split}

        ========== ========== ======= ==========================================================
        symbol     site       shape   meaning
        ========== ========== ======= ==========================================================
        s          ``s``      (B, S)  observed design: batch, covariates
        z          ``z``      (B, K)  state of the cell
        l          ``l``      (B,)    RNA library size
        rho        ``rho``    (B, G)  normalized expression, sums to 1 (unless size factors)
        x          ``x``      (B, G)  gene counts
        p          ``p``      (B, M)  accessibility
        d          ``d``      (B,)    cell factor of accessibility, in (0, 1)
        y          ``y``      (B, M)  accessible or not
        theta, pi  --         (G,)    inverse dispersion; zero-inflation probability (B, G)
        r          --         (M,)    region factor, in (0, 1)
        ========== ========== ======= ==========================================================

        Counts of fragments (``accessibility_likelihood``) follow :mod:`~pyro_multivi.networks.cell_factor`.
        Unmeasured modalities are masked out of the density; sampling ignores the mask, so the
        same statements impute them.
        """
        register_param_sites(self, self.uid)
        log_theta = self.log_dispersions() if self.config.n_genes else None
        r = self.region_factors() if self.config.n_regions else None
        with pyro.plate(CELLS, cells.n_total, subsample=cells.index):
            s = pyro.deterministic("s", cells.design, event_dim=1)
            z = pyro.sample("z", self.z_prior(s))
            if self.config.n_genes:
                l = pyro.sample("l", self.library_prior(cells, s))
                decoded = self.expression(z, s)
                rho = pyro.deterministic("rho", decoded.rho, event_dim=1)
                theta = self.theta(cells, s, decoded, log_theta)
                x = self.expression_dist(l, rho, theta, decoded.pi_logits)
                pyro.sample("x", measured_only(x, cells.has_rna, cells.rna_rows, cells.rna_panels), obs=cells.x)
            if self.config.n_regions:
                p = pyro.deterministic("p", self.accessibility(z, s), event_dim=1)
                d = pyro.sample("d", self.cell_factor_prior(cells, s))
                y = self.accessibility_dist(p, d, r)
                pyro.sample("y", measured_only(y, cells.has_atac, cells.atac_rows, cells.atac_panels), obs=cells.y)
            self.observe_extra(cells, z, s)

    def guide(self, cells: Cells) -> None:
        r"""The amortised posterior.

        .. math::

            q(z, \ell, d \mid x, y, s) = \prod_n
            \mathrm{Normal}\Big(z_n \Big| \sum_k w_k \mu_k, \sum_k w_k^2 \sigma_k^2\Big)\,
            q(\ell_n \mid x_n)\, q(d_n \mid y_n)

        k runs over the measured modalities of the cell and the weights sum to one over them: z is
        the average of one expert per modality. d is LogitNormal around :math:`f_\ell(y_n)`. Where nothing was measured
        the prior takes its place; q(z) is Normal(0, I) there, whatever the prior of z is.
        """
        register_param_sites(self, self.uid)
        self.guide_shared()
        with pyro.plate(CELLS, cells.n_total, subsample=cells.index):
            s = cells.design
            hidden = self.encode(cells, s)
            experts = self.experts(cells, s, hidden)
            pyro.sample("z", self.mix(self.seen(experts)))
            if self.config.n_genes:
                pyro.sample("l", self.library_posterior(cells, s, hidden))
            if self.config.n_regions:
                pyro.sample("d", self.cell_factor_posterior(cells, s, hidden))
            # Terms of training, not of the model: hidden whenever an ELBO is reported.
            pyro.factor("alignment", self.alignment(experts, s), has_rsample=True)
            pyro.factor("mixing", self.mixing(experts), has_rsample=True)
            if self.config.fully_paired:
                pyro.factor("distillation", self.distillation(cells, s, hidden, experts), has_rsample=True)
            self.guide_extra(cells, s)

    # ------------------------------------------------------------------ edges of the model

    def z_prior(self, s: Tensor) -> dist.TorchDistribution:
        """z ~ Normal(0, I), or the mixture that ``latent_prior`` chooses, event shape (K,)."""
        if self.config.latent_prior == "mixture":
            return self.latent_mixture(s)
        zero = s.new_zeros(*s.shape[:-1], self.config.latent)
        return dist.Normal(zero, torch.ones_like(zero)).to_event(1)

    def library_prior(self, cells: Cells, s: Tensor) -> dist.TorchDistribution:
        """l ~ LogNormal with the mean and variance of the batch's log library sizes; known sizes as they are."""
        known = self.known_library(cells, s)
        if known is not None:
            return dist.Delta(known)
        loc, scale = self.library_moments(s)
        return dist.LogNormal(loc, scale)

    def expression(self, z: Tensor, s: Tensor) -> DecodedExpression:
        """rho = f_w(z, s), pi = f_h(z, s)."""
        return self.expression_decoder(self.transform(z), s)

    def log_dispersions(self) -> Tensor | None:
        """Log inverse dispersions, (sets, G): one row, or one per batch or label. None where cells share none.

        Called above the plate of cells: an override may draw them by a sample statement, as one event of (sets, G).
        """
        return getattr(self, "log_theta", None)

    def theta(self, cells: Cells, s: Tensor, decoded: DecodedExpression, log_theta: Tensor | None) -> Tensor | None:
        """theta, inverse dispersion, (G,) or (..., B, G); None for a Poisson."""
        if decoded.theta_logits is not None:
            return decoded.theta_logits.exp()
        return None if log_theta is None else dispersions_of_cells(self.config, log_theta, s, cells.label)

    def expression_dist(
        self, l: Tensor, rho: Tensor, theta: Tensor | None, pi_logits: Tensor | None
    ) -> dist.TorchDistribution:
        """x ~ ObservationModel(l rho, theta, pi), event shape (G,)."""
        if theta is None:
            return PoissonCounts(rho, l)
        if pi_logits is None:
            return NegativeBinomialCounts(rho, l, theta)
        return ZeroInflatedNegativeBinomialCounts(rho, l, theta, pi_logits)

    def accessibility(self, z: Tensor, s: Tensor) -> Tensor:
        """p = g_z(z, s), (..., B, M)."""
        return self.accessibility_decoder(self.transform(z), s)

    def cell_factor_prior(self, cells: Cells, s: Tensor) -> dist.TorchDistribution:
        """d ~ LogitNormal of the batch, or of fragments LogNormal; known factors as they are."""
        if cells.atac_size is not None:
            return dist.Delta(cells.atac_size)
        return factors.batch_prior(self, s)

    def region_factors(self) -> Tensor | None:
        """r, (M,), in (0, 1), or a rate of fragments; None stands for 1.

        Called above the plate of cells: an override may draw them by a sample statement.
        """
        if self.config.counts_fragments:
            return self.region_log_rate.exp()
        return self.region_logit.sigmoid() if self.config.region_factors else None

    def accessibility_dist(self, p: Tensor, d: Tensor, r: Tensor | None) -> dist.TorchDistribution:
        """y ~ Bernoulli(p d r), or counts of fragments, event shape (M,)."""
        if self.config.counts_fragments and r is not None:
            return factors.fragments_likelihood(self, p, d, r)
        return ScaledBernoulli(p, d, r)

    def open_probability(self, y: dist.TorchDistribution) -> Tensor:
        """P(y > 0) of each region under :meth:`accessibility_dist`, (..., M): the mean of a Bernoulli."""
        return y.open_probability if isinstance(y, FragmentCounts) else y.mean

    def transform(self, z: Tensor) -> Tensor:
        """Input of the decoders, (..., B, K): z itself, or softmax(z) for ``latent_distribution="ln"``."""
        return z.softmax(-1) if self.config.latent_distribution == "ln" else z

    def observe_extra(self, cells: Cells, z: Tensor, s: Tensor) -> None:
        """Sample statements of extra modalities, inside the plate of cells; a hook for others."""
        for modality in self.modelled_extra:
            modality.observe(cells, self.transform(z), s)

    # ------------------------------------------------------------------ edges of the guide

    def rna_input(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """Input of the RNA encoder: log(1 + count), the count being that of a cell of typical depth.

        ``share``, (B,), is the part of such a cell's counts in the genes that were measured; None where all were.
        """
        per_count = self.rna_log_depth.exp() / totals(x).clamp(min=1.0)
        if share is not None:
            per_count = per_count * share
        if isinstance(x, SparseCounts):
            return x.with_values((x.val * per_count.index_select(0, x.rows())).log1p())
        return (x * per_count.unsqueeze(-1)).log1p()

    def atac_input(self, y: Tensor) -> Tensor:
        """Input of the ATAC encoder: 1 where a region is open."""
        if isinstance(y, SparseCounts):
            return y.binary()
        return (y > 0).to(y.dtype)

    def encode(self, cells: Cells, s: Tensor) -> HiddenStates:
        """Encode the measured counts by the first layer of each modality, which its expert and its depth share."""
        rna = atac = None
        if self.config.n_genes:
            missing = missing_input(self, cells, RNA)
            share = {} if missing is None else {"share": measured_share(self, cells, RNA)}
            x = self.rna_input(cells.x, **share)
            rna = self.rna_first_layer(x, cells.has_rna, s, log_depth(self, cells, RNA), cells.rna_rows, missing)
        if self.config.n_regions:
            y, missing = self.atac_input(cells.y), missing_input(self, cells, ATAC)
            atac = self.atac_first_layer(y, cells.has_atac, s, log_depth(self, cells, ATAC), cells.atac_rows, missing)
        return HiddenStates(rna, atac)

    def experts(self, cells: Cells, s: Tensor, hidden: HiddenStates) -> dict[str, Expert]:
        """q_k(z) = Normal(mu_k, sigma_k) of each modality, by its name; extend the dict for an extra modality."""
        return experts_of(self, cells, s, hidden)

    def experts_alone(self, cells: Cells, s: Tensor, hidden: HiddenStates) -> dict[str, Expert]:
        """q(z) given one modality, by its name: those of :meth:`experts`, but with ``fully_paired`` of own networks."""
        alone = alone_of(self, cells, s, hidden) if self.config.fully_paired else {}
        return {**self.experts(cells, s, hidden), **alone}

    def seen(self, experts: dict[str, Expert]) -> dict[str, Expert]:
        """Experts that z is drawn from: in training, half of the paired cells are seen from one modality alone.

        So the posterior from one modality learns to predict the other; with ``fully_paired`` it learns that from
        :meth:`distillation`. Return ``experts`` for the paper's guide.
        """
        return seen_from_one(experts) if self.training and not self.config.fully_paired else experts

    def weight_logit(self, name: str, expert: Expert) -> Tensor:
        """Unnormalised log weight of an expert in each cell, (B,)."""
        modality = modality_named(name)
        if modality is None or self.config.modality_weights == "equal":
            return expert.loc.new_zeros(len(expert.loc))
        place = MODALITIES.index(modality)
        if self.config.modality_weights == "universal":
            return self.weight_logits[place].expand(len(expert.loc))
        logit: Tensor = self.weight_net[place](torch.cat([expert.loc, expert.scale.log()], -1))
        return logit.squeeze(-1)

    def averaged(self, experts: dict[str, Expert]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the average of the measured experts, (B, K) each."""
        measured = torch.stack([expert.measured for expert in experts.values()], -1)
        logits = torch.stack([self.weight_logit(name, expert) for name, expert in experts.items()], -1)
        return average(list(experts.values()), expert_weights(logits, measured))

    def mix(self, experts: dict[str, Expert]) -> dist.TorchDistribution:
        """z ~ the average of the measured experts, event shape (K,)."""
        return dist.Normal(*self.averaged(experts)).to_event(1)

    def depth_hidden_state(self, state: HiddenState) -> HiddenState:
        """Input of the depth heads: the shared first layer, without a gradient to it.

        On the SNARE-seq cell lines a first layer that was also trained for the depth cost 3 nats per held-out
        cell. Return ``state`` for the plain gradient.
        """
        return state._replace(hidden=state.hidden.detach())

    def library_posterior(self, cells: Cells, s: Tensor, hidden: HiddenStates) -> dist.TorchDistribution:
        """q(l | x): LogNormal around the observed depth; the prior for cells without RNA."""
        known = self.known_library(cells, s)
        if known is not None:
            return dist.Delta(known)
        assert hidden.rna is not None
        prior, state = factors.library_prior(self, cells, s), self.depth_hidden_state(hidden.rna)
        return factors.depth_posterior(self.library_head, state, self.rna_log_depth, *prior)

    def cell_factor_posterior(self, cells: Cells, s: Tensor, hidden: HiddenStates) -> dist.TorchDistribution:
        """q(d | y): LogitNormal around :meth:`cell_factor`, or of fragments LogNormal; the prior without ATAC."""
        prior = self.cell_factor_prior(cells, s)
        if isinstance(prior, dist.Delta):
            return prior
        # A prior of one's own may be of another family.
        if not isinstance(prior, dist.LogNormal if self.config.counts_fragments else LogitNormal):
            prior = factors.batch_prior(self, s)
        if not self.config.counts_fragments:
            return factors.factor_posterior(self, cells, self.cell_factor(cells, hidden), prior)
        assert hidden.atac is not None
        state = self.depth_hidden_state(hidden.atac)
        return factors.depth_posterior(self.cell_factor_head, state, self.atac_log_depth, prior.loc, prior.scale)

    def cell_factor(self, cells: Cells, hidden: HiddenStates) -> Tensor:
        """f_l(y), the centre of q(d | y), (B,); 1/2 for cells without ATAC."""
        assert hidden.atac is not None
        log_depth = self.cell_factor_head(self.depth_hidden_state(hidden.atac), self.atac_log_depth)[:, 0]
        d = (log_depth - self.atac_log_depth + self.cell_factor_offset).sigmoid()
        return hidden.atac.scatter(d, cells.design.new_full((len(cells),), 0.5))

    def alignment(self, experts: dict[str, Expert], s: Tensor) -> Tensor:
        """Penalty in nats that draws the experts of a cell together, (B,); zero unless both were measured."""
        total, batch = s.new_zeros(len(s)), s[:, : self.config.n_batch].argmax(-1)
        for a, b in itertools.combinations(experts.values(), 2):
            total = total + penalty(a, b, str(self.config.modality_penalty), self.config.contrast, batch)
        return total

    def mixing(self, experts: dict[str, Expert]) -> Tensor:
        """Penalty in nats for measurement patterns whose posterior means lie apart, (B,)."""
        loc, _ = self.averaged(experts)
        if not self.config.mixing:
            return loc.new_zeros(len(loc))
        # A property of all cells together: it enters each cell's ELBO as a whole.
        mmd = mmd_between_patterns(loc, measurement_patterns(list(experts.values())))
        return self.config.mixing * mmd.expand(len(loc))

    def distillation(self, cells: Cells, s: Tensor, hidden: HiddenStates, experts: dict[str, Expert]) -> Tensor:
        """Penalty in nats that teaches the posteriors from one modality that from all, (B,)."""
        alone = alone_of(self, cells, s, hidden)
        return DISTILLATION_WEIGHT * distillation(Expert(*self.averaged(experts), in_all(alone)), alone.values())

    def guide_shared(self) -> None:
        """Hook: sample statements for latents that all cells share, above the plate of cells."""

    def guide_extra(self, cells: Cells, s: Tensor) -> None:
        """Sample statements for latents that :meth:`observe_extra` introduced."""
        for modality in self.modelled_extra:
            modality.guide(cells, s)

    # ------------------------------------------------------------------ parameters and data

    def known_library(self, cells: Cells, s: Tensor) -> Tensor | None:
        """Library sizes that are not inferred, (B,), of cells without RNA the median of the prior; None if they are."""
        if self.config.library == "size_factor":
            assert cells.rna_size is not None, "library='size_factor' needs Cells.rna_size"
            return cells.rna_size * self.library_log_unit.exp()
        if self.config.library == "observed":
            return torch.where(cells.has_rna, depth(self, cells, RNA), self.library_moments(s)[0].exp())
        return None
