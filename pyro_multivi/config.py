"""Configuration of a program: sizes and modelling choices, nothing learned."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pyro_multivi.data.checks import check_choice, check_fields, check_whole, shown
from pyro_multivi.data.modality import PROTEIN

CHOICES: dict[str, tuple[str, ...]] = {
    "gene_likelihood": ("zinb", "nb", "negative_binomial", "poisson"),
    "accessibility_likelihood": ("bernoulli", "poisson", "nb", "negative_binomial"),
    "dispersion": ("gene", "gene-batch", "gene-label", "gene-cell"),
    "latent_distribution": ("normal", "ln"),
    "latent_prior": ("normal", "mixture"),
    "modality_weights": ("equal", "universal", "cell"),
    "modality_penalty": ("contrastive", "Jeffreys", "MMD", "None"),
    "use_batch_norm": ("none", "encoder", "decoder", "both"),
    "use_layer_norm": ("none", "encoder", "decoder", "both"),
    "library": ("latent", "observed", "size_factor"),
    "protein_dispersion": ("protein", "protein-batch", "protein-label"),
}

#: Defaults of ``n_hidden`` and ``n_latent``.
N_HIDDEN = 128
N_LATENT = 20

#: Defaults of ``contrast_weight`` and ``mixing_weight`` with the penalty "contrastive".
CONTRAST_WEIGHT = 2.5
MIXING_WEIGHT = 4.0


@dataclass(frozen=True)
class ProgramConfig:
    """Sizes and choices of a :class:`~pyro_multivi.program.MultiVIProgram`.

    Attributes
    ----------
    n_genes, n_regions
        G and M; one of them may be 0 for data of one modality.
    n_batch, n_labels
        Number of batches and of labels (for gene-label dispersion).
    n_covariates
        Width of the design s: batches, then categorical, then continuous covariates.
    n_hidden
        Width of hidden layers. Default: 128. (In scvi-tools the square root of M, which is narrow for few
        regions; a prior on the loadings keeps a wide model from overfitting.)
    n_latent
        Dimension K of the state. Default: 20, or ``n_hidden`` where that is less. (In scvi-tools the square root of
        ``n_hidden``, 11 of 128; with 20 measurement patterns mix better at the same purity of types.)
    n_layers_encoder, n_layers_decoder
        Hidden layers.
    dropout_rate
        Dropout rate of the encoders' hidden layers.
    region_dropout_rate
        Share of a cell's open regions that the ATAC encoder does not see in training. A cell's fragments are a small
        sample of its open regions: an encoder that sees others of them at each epoch overfits the training cells less,
        and predicts hidden expression and accessibility better.
    gene_likelihood
        ``"zinb"``, ``"nb"`` (also ``"negative_binomial"``) or ``"poisson"``.
    accessibility_likelihood
        ``"bernoulli"``: regions are open or closed. ``"poisson"`` or ``"nb"`` (also ``"negative_binomial"``): counts of
        fragments.
    dispersion
        ``"gene"``, ``"gene-batch"``, ``"gene-label"`` or ``"gene-cell"``: sharing of the inverse dispersion.
    latent_distribution
        ``"normal"``, or ``"ln"``: the input of the decoders is softmax(z).
    latent_prior
        Prior of z: ``"normal"``, Normal(0, I), or ``"mixture"``, one of Normals whose weights each batch has; see
        :class:`~pyro_multivi.networks.experts.LatentMixture`.
    modality_weights
        Weights of the average of the experts: equal, learned, or learned for each cell.
    modality_penalty
        Penalty that draws the experts of a paired cell together in training: ``"Jeffreys"``, their symmetric
        Kullback-Leibler divergence; ``"contrastive"``, that and a term by which they must find each
        other among the other cells; ``"MMD"``; or ``"None"``, for which ``None`` is accepted too. See
        :mod:`pyro_multivi.networks.alignment`.
    contrast_weight
        Weight of the term by which the experts of a paired cell must find each other among those of the other paired
        cells of a minibatch, :func:`~pyro_multivi.networks.alignment.contrast`. With less of it the halves of a cell
        are matched less closely, but types of cells are purer and measurement patterns mix better in shallow data.
        Default: 2.5 with ``modality_penalty="contrastive"``, 0 with any other.
    mixing_weight
        Weight, in nats, of a penalty for measurement patterns whose posterior means lie apart: the squared maximum
        mean discrepancy between RNA-only, ATAC-only and paired cells. It takes measurement patterns for samples of
        one population: where they hold other types of cells, give 0. Default: 4 with
        ``modality_penalty="contrastive"``, 0 with any other, which then is the only penalty.
    region_factors
        Whether regions have a factor r_j; without, it is 1. Counts of fragments need it.
    encode_covariates, deeply_inject_covariates
        Give s to the encoders; give it to every layer rather than the first.
    use_batch_norm, use_layer_norm
        Networks that have it: ``"none"``, ``"encoder"``, ``"decoder"`` or ``"both"``.
    library
        ``"latent"``: l has a LogNormal prior and its own guide. ``"observed"``: l is the total
        count. ``"size_factor"``: l comes with the data, and rho is only non-negative.
    extra
        Number of features of each extra modality by name.
    proteins
        Whether ``extra["protein"]`` are counts of proteins, which the program models; see
        :mod:`pyro_multivi.networks.extra.proteins`. Other extra modalities are for a custom program.
    protein_dispersion
        ``"protein"``, ``"protein-batch"`` or ``"protein-label"``: sharing of the inverse dispersion of proteins.
    fully_paired
        Whether every cell of training has all modalities of the model, two or more. Then z is drawn from all of them in
        training, and the penalty ``"contrastive"`` becomes ``"None"`` unless a weight of it is given. The posterior
        given one modality alone is that of networks of their own, which learn it from the posterior given all.

    Raises
    ------
    ValueError, TypeError
        If a choice is not one of those allowed, a size is impossible, or a value of the wrong type.
    """

    n_genes: int
    n_regions: int
    n_batch: int = 1
    n_labels: int = 0
    n_covariates: int = 1
    n_hidden: int | None = None
    n_latent: int | None = None
    n_layers_encoder: int = 2
    n_layers_decoder: int = 2
    dropout_rate: float = 0.1
    region_dropout_rate: float = 0.25
    gene_likelihood: str = "zinb"
    dispersion: str = "gene"
    latent_distribution: str = "normal"
    modality_weights: str = "equal"
    modality_penalty: str | None = "contrastive"
    contrast_weight: float | None = None
    mixing_weight: float | None = None
    region_factors: bool = True
    encode_covariates: bool = False
    deeply_inject_covariates: bool = False
    use_batch_norm: str = "none"
    use_layer_norm: str = "both"
    library: str = "latent"
    accessibility_likelihood: str = "bernoulli"
    extra: dict[str, int] = field(default_factory=dict)
    proteins: bool = False
    protein_dispersion: str = "protein"
    fully_paired: bool = False
    latent_prior: str = "normal"

    def __post_init__(self) -> None:
        if self.modality_penalty is None:
            object.__setattr__(self, "modality_penalty", "None")
        for name, allowed in CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        check_fields(self, ProgramConfig)
        self._resolve()
        self._check_sizes()
        for name in ("contrast_weight", "mixing_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed: give a finite number, 0 or more; 0 for none."
                )
        for name in ("dropout_rate", "region_dropout_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is not in [0, 1).")
        if self.counts_fragments and not self.region_factors:
            raise ValueError(
                f"region_factors=False and accessibility_likelihood={self.accessibility_likelihood!r}: counts need a "
                "rate for each region. Leave region_factors out, or choose 'bernoulli'."
            )
        for name, needs in (("dispersion", "gene-label"), ("protein_dispersion", "protein-label")):
            if getattr(self, name) == needs and self.n_labels < 1:
                raise ValueError(
                    f"{name}={needs!r} needs labels: give labels_key to setup_anndata or setup_mudata, "
                    "or choose another dispersion."
                )

    def _resolve(self) -> None:
        """Put defaults that depend on other choices in the place of None, and scvi-tools' words under ours."""
        weights = self.contrast_weight, self.mixing_weight
        if self.fully_paired and self.modality_penalty == "contrastive" and weights == (None, None):
            object.__setattr__(self, "modality_penalty", "None")
        for name, default in (("contrast_weight", CONTRAST_WEIGHT), ("mixing_weight", MIXING_WEIGHT)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default if self.modality_penalty == "contrastive" else 0.0)
        for name in ("gene_likelihood", "accessibility_likelihood"):
            if getattr(self, name) == "negative_binomial":
                object.__setattr__(self, name, "nb")
        if self.n_hidden is None:
            object.__setattr__(self, "n_hidden", N_HIDDEN)
        if self.n_latent is None:
            object.__setattr__(self, "n_latent", min(N_LATENT, self.hidden))

    def _check_sizes(self) -> None:
        """Refuse features that no model can have."""
        if not isinstance(self.extra, dict) or not all(isinstance(name, str) for name in self.extra):
            raise TypeError(f"extra={shown(self.extra)} is not allowed: give numbers of features by name.")
        for name, number in self.extra.items():
            check_whole(f"extra[{name!r}]", number)
        if self.proteins and PROTEIN not in self.extra:
            raise ValueError(f"proteins=True needs extra[{PROTEIN!r}], the number of proteins.")
        if self.n_genes < 0 or self.n_regions < 0 or self.n_genes + self.n_regions == 0:
            raise ValueError(
                f"n_genes={self.n_genes} and n_regions={self.n_regions}: a model needs at least one gene or region."
            )
        if self.fully_paired and bool(self.n_genes) + bool(self.n_regions) + self.proteins < 2:
            raise ValueError(
                f"fully_paired=True with n_genes={self.n_genes} and n_regions={self.n_regions}: it is for cells with "
                "two modalities or more. Leave it out."
            )

    @property
    def counts_fragments(self) -> bool:
        """Whether counts of fragments are modelled, rather than open or closed regions."""
        return self.accessibility_likelihood != "bernoulli"

    @property
    def n_intercepts(self) -> int:
        """Number of batches that have intercepts of their own in the decoders' last layers: all, if several."""
        return self.n_batch if self.n_batch > 1 else 0

    @property
    def hidden(self) -> int:
        """Width of hidden layers, resolved."""
        assert self.n_hidden is not None
        return self.n_hidden

    @property
    def latent(self) -> int:
        """Dimension of the latent state, resolved."""
        assert self.n_latent is not None
        return self.n_latent

    @property
    def contrast(self) -> float:
        """Weight of the contrast, resolved."""
        assert self.contrast_weight is not None
        return self.contrast_weight

    @property
    def mixing(self) -> float:
        """Weight of the mixing penalty, resolved."""
        assert self.mixing_weight is not None
        return self.mixing_weight

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)
