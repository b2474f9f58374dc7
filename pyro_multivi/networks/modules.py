"""Networks and parameters of a program, and their initial values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from pyro_multivi.config import ProgramConfig
from pyro_multivi.data.checks import check_choice, check_type
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.marginals import Marginals
from pyro_multivi.data.modality import MODALITIES, PROTEIN, modelled
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.cell_factor import start_cell_factor, start_fragments, unlearned_cell_factor
from pyro_multivi.networks.decoders import AccessibilityDecoder, ExpressionDecoder
from pyro_multivi.networks.encoders import LibraryHead, SharedFirstLayer, expert_head
from pyro_multivi.networks.experts import LatentMixture
from pyro_multivi.networks.extra import ExtraModality, Proteins
from pyro_multivi.networks.layers import layer_options, start_constant
from pyro_multivi.networks.linear_start import start_linearly
from pyro_multivi.networks.surgery import add_intercepts, keep_columns

#: Number formats of the decoders' large matrix products; None is that of the parameters.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16}

# Directions of the last layers' posteriors, one of them that of the intercepts. On simulated cells intervals with 64
# hold 0.02 more of the truth in twice the time; a feature's random numbers are drawn four at a time.
_WEIGHT_DIRECTIONS = 16

Program = TypeVar("Program", bound="ProgramModules")


def build_program(program_class: type[Program], config: ProgramConfig, seed: int | None = None) -> Program:
    """A program whose buffers fit its layers, also those that a custom class made; torch's generator stays as it is.

    Parameters
    ----------
    program_class, config
        Class of the program, and its argument.
    seed
        Seed of the random weights; None: wherever torch's generator is.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        program = program_class(config)
    program.size_weight_directions()
    return program


class ProgramModules(nn.Module):
    """Encoders, decoders and parameters of :class:`~pyro_multivi.program.MultiVIProgram`.

    Attributes
    ----------
    config_class
        Class of ``config``. A custom program with choices of its own names a subclass of
        :class:`~pyro_multivi.config.ProgramConfig` here.
    config
        Sizes and modelling choices.
    uid
        Prefix of the param sites, different for each program in a process, also for copies.
    rna_log_depth, atac_log_depth
        Typical log depth of a cell, scalars.
    library_log_mean, library_log_var
        Moments of the log library size per batch, (n_batch,): the prior of l.
    library_log_unit
        Log of the counts of a cell of size factor 1, scalar: of models with known size factors, whose l are counts.
    cell_factor_loc, cell_factor_sd
        Mean and standard deviation of logit d per batch, (n_batch,): its prior. The mean is a parameter.
    cell_factor_offset
        Logit of the d that a cell of typical depth starts with, scalar.
    fragments_log_mean, fragments_log_var
        Those of the log number of fragments: the prior of d in models of fragment counts, which alone have them.
    posterior_scale
        Factor of the standard deviations of q(z) by measurement pattern, (2^E, K), with which draws are made after
        training; see :mod:`pyro_multivi.posterior.engine.posterior_scale`. Not part of the model itself.
    depth_scale
        The same of the logarithm of the library size and the logit of the cell factor, (2^E, 2).
    rna_typical, atac_typical
        Share of each feature in a typical cell's counts, and its mean encoder input, (2, F); zeros before they are
        needed, see :mod:`pyro_multivi.networks.panels`. Not part of the model itself.
    rna_depth_regression, atac_depth_regression
        Regression that predicts the depth of a modality that was not measured, (1 + 1 + K + n_batch,): standard
        deviation of the errors (0 before it was learned), coefficients; see
        :mod:`pyro_multivi.posterior.engine.depth_regression`. Not part of the model itself.
    rna_mean, atac_mean, rna_mean_weight, atac_mean_weight
        Mean of the measured cells, (F,), and its weight in what is imputed, (), 0 before it was learned; see
        :mod:`pyro_multivi.posterior.engine.decode`. Not part of the model itself.
    rna_weight_directions, atac_weight_directions, rna_weight_sd, atac_weight_sd
        Posterior of the decoders' last layers, (R, H + 1) and (F, R); zeros before it was fitted, see
        :mod:`pyro_multivi.posterior.engine.weight_posterior`. Not part of the model itself.
    rna_residual_sd, atac_residual_sd
        Standard deviation of each feature's logit among cells of one state, (F,), for intervals; see
        :mod:`pyro_multivi.posterior.calibration.fit_residual`. Not part of the model itself.
    """

    config_class: ClassVar[type[ProgramConfig]] = ProgramConfig

    #: Classes of the extra modalities that a program models, by their name in the data; see
    #: :class:`~pyro_multivi.networks.extra.ExtraModality`. Proteins that the setup names need none.
    extra_modalities: ClassVar[Mapping[str, type[ExtraModality]]] = {}

    #: Parameters of which only a part is trained: its axis and positions; see :mod:`pyro_multivi.networks.surgery`.
    partly_trained: Mapping[str, tuple[int, list[int]]] = MappingProxyType({})

    @property
    def needs_labels(self) -> bool:
        """Whether model or guide read ``cells.label``, so that queries need labels; override it where yours do."""
        config = self.config
        of_proteins = config.proteins and config.protein_dispersion == "protein-label"
        return config.dispersion == "gene-label" or of_proteins

    _uid = itertools.count()

    rna_log_depth: Tensor
    atac_log_depth: Tensor
    library_log_mean: Tensor
    library_log_var: Tensor
    library_log_unit: Tensor
    fragments_log_mean: Tensor
    fragments_log_var: Tensor
    posterior_scale: Tensor
    depth_scale: Tensor

    def __init__(self, config: ProgramConfig) -> None:
        super().__init__()
        check_type("config", config, ProgramConfig)
        self.config = config
        # Param sites of two programs in one process must differ; see param_sites.py.
        self.uid = self._next_uid()
        if config.n_genes:
            self._add_rna(config)
        if config.n_regions:
            self._add_atac(config)
        if config.latent_prior == "mixture":
            self.latent_mixture = LatentMixture(config.n_batch, config.latent)
        if config.modality_weights == "universal":
            self.weight_logits = nn.Parameter(torch.zeros(len(MODALITIES)))
        elif config.modality_weights == "cell":
            self.weight_net = nn.ModuleList([nn.Linear(2 * config.latent, 1) for _ in MODALITIES])
            # Experts start with equal weights.
            for parameter in self.weight_net.parameters():
                nn.init.zeros_(parameter)
        self._add_buffers(config)
        kinds = {**self.extra_modalities, **({PROTEIN: Proteins} if config.proteins else {})}
        self.extra = nn.ModuleDict({name.replace(".", "_"): kind(name, config) for name, kind in kinds.items()})
        if config.fully_paired:
            for modality in modelled(config):
                setattr(self, f"{modality.key}_alone_expert", expert_head(config))

    def _add_rna(self, config: ProgramConfig) -> None:
        self.rna_first_layer = SharedFirstLayer(config.n_genes, config.hidden, **layer_options(config, "encoder"))
        self.rna_expert = expert_head(config)
        # A log standard deviation of -2 starts q(l|x) at 14 %, about what the counts determine.
        self.library_head = LibraryHead(config.hidden, 2, start=-2.0)
        self.expression_decoder = ExpressionDecoder(
            config.latent,
            config.n_genes,
            simplex=config.library != "size_factor",
            zero_inflation=config.gene_likelihood == "zinb",
            cell_dispersion=config.dispersion == "gene-cell" and config.gene_likelihood != "poisson",
            **_decoder_options(config),
        )
        sets = {"gene": 1, "gene-batch": config.n_batch, "gene-label": config.n_labels}.get(config.dispersion)
        if config.gene_likelihood != "poisson" and sets is not None:
            self.log_theta = nn.Parameter(torch.zeros(sets, config.n_genes))

    def _add_atac(self, config: ProgramConfig) -> None:
        self.atac_first_layer = SharedFirstLayer(
            config.n_regions, config.hidden, input_dropout_rate=config.region_dropout_rate,
            **layer_options(config, "encoder"),
        )  # fmt: skip
        self.atac_expert = expert_head(config)
        # As that of the library where d is a number of fragments.
        self.cell_factor_head = LibraryHead(config.hidden, 2 if config.counts_fragments else 1, start=-2.0)
        self.accessibility_decoder = AccessibilityDecoder(config.latent, config.n_regions, **_decoder_options(config))
        if config.counts_fragments:
            self.region_log_rate = nn.Parameter(torch.zeros(config.n_regions))
            self.register_buffer("fragments_log_mean", torch.zeros(config.n_batch))
            self.register_buffer("fragments_log_var", torch.ones(config.n_batch))
        else:
            start = unlearned_cell_factor(config.n_batch)
            self.cell_factor_loc = nn.Parameter(start["cell_factor_loc"])
            self.cell_factor_log_scale = nn.Parameter(start["cell_factor_log_scale"])
            self.register_buffer("cell_factor_offset", start["cell_factor_offset"])
            self.register_buffer("cell_factor_sd", start["cell_factor_sd"])
            if config.region_factors:
                self.region_logit = nn.Parameter(torch.zeros(config.n_regions))
        if config.accessibility_likelihood == "nb":
            self.region_log_theta = nn.Parameter(torch.zeros(config.n_regions))

    def _add_buffers(self, config: ProgramConfig) -> None:
        """Add what is not trained: statistics of the data, and the calibration after training."""
        for modality in MODALITIES:
            self.register_buffer(f"{modality.key}_log_depth", torch.tensor(0.0))
        width = config.hidden + config.n_intercepts
        for modality in modelled(config):
            n_features, n_directions = modality.n_features_in(config), min(_WEIGHT_DIRECTIONS, config.hidden)
            self.register_buffer(f"{modality.key}_typical", torch.zeros(2, n_features))
            self.register_buffer(f"{modality.key}_mean", torch.zeros(n_features))
            self.register_buffer(f"{modality.key}_mean_weight", torch.tensor(0.0))
            self.register_buffer(f"{modality.key}_weight_directions", torch.zeros(n_directions, width + 1))
            self.register_buffer(f"{modality.key}_weight_sd", torch.zeros(n_features, n_directions))
            self.register_buffer(f"{modality.key}_residual_sd", torch.zeros(n_features))
        self.register_buffer("library_log_mean", torch.zeros(config.n_batch))
        self.register_buffer("library_log_var", torch.ones(config.n_batch))
        if config.library == "size_factor":
            self.register_buffer("library_log_unit", torch.tensor(0.0))
        self.register_buffer("posterior_scale", torch.ones(2 ** len(MODALITIES), config.latent))
        self.register_buffer("depth_scale", torch.ones(2 ** len(MODALITIES), len(MODALITIES)))
        for modality in MODALITIES:
            self.register_buffer(f"{modality.key}_depth_regression", torch.zeros(2 + config.latent + config.n_batch))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy, also one by pickle, has parameters of its own.
        self.uid = self._next_uid()
        # Torch copies no hooks.
        keep_columns(self)

    @staticmethod
    def _next_uid() -> str:
        return f"multivi{next(ProgramModules._uid)}"

    @property
    def modelled_extra(self) -> list[ExtraModality]:
        """Extra modalities that the program models."""
        return [modality for modality in self.extra.values() if isinstance(modality, ExtraModality)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.size_weight_directions()
        # Models of earlier versions were saved without it.
        for name in ("posterior_scale", "depth_scale"):
            state_dict.setdefault(prefix + name, torch.ones_like(getattr(self, name)))
        if self.config.library == "size_factor":
            state_dict.setdefault(prefix + "library_log_unit", torch.zeros_like(self.library_log_unit))
        for modality in modelled(self.config):
            if self.config.fully_paired:
                # In them the expert of both modalities together answered for one alone.
                together, alone = (f"{prefix}{modality.key}_{name}." for name in ("expert", "alone_expert"))
                if not any(name.startswith(alone) for name in state_dict):
                    for name in [name for name in state_dict if name.startswith(together)]:
                        state_dict[alone + name.removeprefix(together)] = state_dict[name]
            for name in ("typical", "mean", "mean_weight", "weight_directions", "weight_sd", "residual_sd"):
                name = f"{modality.key}_{name}"
                state_dict.setdefault(prefix + name, torch.zeros_like(getattr(self, name)))
        if self.config.n_regions and not self.config.counts_fragments:
            # In them d was a point, and its prior uniform.
            for name, value in unlearned_cell_factor(self.config.n_batch).items():
                state_dict.setdefault(prefix + name, value)
        add_intercepts(state_dict, self, self.config.n_batch, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def size_weight_directions(self) -> None:
        """Give the directions of each last layer the width of that layer, which a decoder of one's own may change."""
        for modality in modelled(self.config):
            name = f"{modality.key}_weight_directions"
            directions = getattr(self, name)
            layer = getattr(getattr(self, f"{modality.name}_decoder", None), modality.decoded, None)
            if isinstance(layer, nn.Linear) and directions.shape[1] != layer.in_features + 1:
                setattr(self, name, directions.new_zeros(len(directions), layer.in_features + 1))

    def library_moments(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the log library size in the batch of each cell, (..., B) each."""
        s_nb = s[..., : self.config.n_batch]
        return s_nb @ self.library_log_mean, (s_nb @ self.library_log_var).sqrt()

    def use_precision(self, precision: str) -> None:
        """Use ``"fp32"`` or ``"bf16"`` for the matrix products of the decoders' last layers.

        In bf16 only these matrix products are in reduced precision: parameters, sums and
        likelihoods stay in float32.
        """
        check_choice("precision", precision, list(PRECISIONS))
        for modality in MODALITIES:
            decoder = getattr(self, f"{modality.name}_decoder", None)
            if decoder is not None:
                decoder.gemm_dtype = PRECISIONS[precision]

    @torch.no_grad()
    def start_from(self, marginals: Marginals) -> None:
        """Set priors and initial parameters from the data's marginals.

        Decoders start at the mean profile instead of a flat one. The bias of rho is the log mean share of each gene,
        and its dispersion that of its counts. p d r starts at the detection rate of each region for a cell of typical
        depth, or at its mean number of fragments there. Loadings start at zero, so that this profile is that of every
        cell: with random ones each feature would start with differences between cells that are not in the data. A last
        layer of a custom class that is no ``nn.Linear`` with a bias keeps its start, and so does a decoder of one's own
        without a layer of that name; a log line at level INFO says so.
        """
        self.rna_log_depth.fill_(marginals.rna_log_depth_mean)
        self.atac_log_depth.fill_(marginals.atac_log_depth_mean)
        self.library_log_mean.copy_(marginals.library_log_mean)
        self.library_log_var.copy_(marginals.library_log_var)
        if self.config.n_genes:
            decoder = self.expression_decoder
            share = marginals.gene_share
            start = share.log()
            if self.config.library == "size_factor":
                # Of shares softplus is nearly exp, so that logits are logarithms: of counts they would be counts,
                # which the prior of the loadings and the steps of training take for far too large.
                self.library_log_unit.copy_(self.library_log_mean.mean() - marginals.rna_log_size_mean)
                start = share.expm1().log()
            start_constant(getattr(decoder, "rho", None), "rho", start)
            if getattr(decoder, "pi", None) is not None:
                # Few dropouts to begin with: 5 %.
                start_constant(decoder.pi, "pi", torch.full_like(start, -3.0))
            log_theta = marginals.inverse_dispersion.log()
            if getattr(decoder, "theta", None) is not None:
                start_constant(decoder.theta, "theta", log_theta)
            elif hasattr(self, "log_theta"):
                self.log_theta.copy_(log_theta.expand_as(self.log_theta))
        if self.config.n_regions and self.config.counts_fragments:
            assert marginals.fragments is not None, "marginals of fragments are needed: counts_fragments=True"
            p = start_fragments(self, marginals.fragments)
            start_constant(
                getattr(self.accessibility_decoder, "p", None), "p", torch.logit(p.expand(self.config.n_regions))
            )
        elif self.config.n_regions:
            typical = start_cell_factor(self, marginals)
            wanted = (marginals.detection_rate / typical).clamp(max=0.95)  # p r
            if self.config.region_factors:
                # p = 1/2 where possible: a cell type may open a region to twice its mean rate.
                r = (2.0 * wanted).clamp(1e-7, 0.95)
                self.region_logit.copy_(torch.logit(r))
                wanted = (wanted / r).clamp(1e-7, 0.99)
            start_constant(getattr(self.accessibility_decoder, "p", None), "p", torch.logit(wanted))

    def start_extra_from(self, table: CellTable) -> None:
        """Set initial parameters of the extra modalities from the data."""
        for modality in self.modelled_extra:
            modality.start_from(table)

    def start_training_from(self, train: Minibatches) -> None:
        """Set weights that the first training starts from: a linear model of the cells where there is one.

        See :mod:`pyro_multivi.networks.linear_start`, which says when there is none. Override it with ``pass`` to start
        from random weights.
        """
        start_linearly(self, train)


def _decoder_options(config: ProgramConfig) -> dict[str, Any]:
    """Arguments that both decoders have."""
    return {
        **layer_options(config, "decoder"),
        "n_intercepts": config.n_intercepts,
        "n_hidden": config.hidden,
        "n_layers": config.n_layers_decoder,
        "inject_everywhere": config.deeply_inject_covariates,
    }
