"""Cells drawn from the generative process of MultiVI, with the truth kept beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.special import softmax

from pyro_multivi.data.checks import checked, whole_numbers
from pyro_multivi.data.modality import ATAC, MODALITIES, RNA
from pyro_multivi.data.vocabulary import MEASUREMENT_PATTERNS
from pyro_multivi.datasets.simulate_parts import add_proteins, check_simulation, pattern_includes, simulated_mudata

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Cells x features drawn at once: a dozen dense float32 arrays of this size stay under 200 MB.
_BLOCK_ENTRIES = 4_000_000


@dataclass(frozen=True)
class _Decoders:
    """Decoders, the same for all cells: linear maps of z (loadings), followed by a softmax or a sigmoid."""

    centre_tk: Array
    rna_bias_g: Array
    rna_loading_kg: Array
    rna_batch_sg: Array
    dropout_loading_kg: Array
    inverse_dispersion_g: Array
    atac_bias_m: Array
    atac_loading_km: Array
    atac_batch_sm: Array
    region_factor_m: Array

    def rho(self, z_nk: Array, batch_ng: Array | float = 0.0) -> Array:
        """Expected share of each gene, shape (cells, genes); rows sum to 1."""
        rho_ng: Array = softmax(z_nk @ self.rna_loading_kg + self.rna_bias_g + batch_ng, axis=1)
        return rho_ng

    def pi(self, z_nk: Array, dropout: float) -> Array:
        """Probability of an excess zero, shape (cells, genes)."""
        return _sigmoid(z_nk @ self.dropout_loading_kg + _logit(dropout))

    def p(self, z_nk: Array, batch_nm: Array | float = 0.0) -> Array:
        """Probability that each region is accessible, shape (cells, regions)."""
        return _sigmoid(z_nk @ self.atac_loading_km + self.atac_bias_m + batch_nm)


@checked
def simulate_multiome(
    n_cells: Sequence[int] = (200, 100, 100),
    n_genes: int = 300,
    n_regions: int = 600,
    *,
    n_types: int = 4,
    n_latent: int = 5,
    n_batches: int = 1,
    type_separation: float = 0.9,
    differential_fraction: float = 0.3,
    effect_size: float = 1.0,
    batch_effect: float = 0.3,
    mean_library: float = 1000.0,
    library_sd: float = 0.4,
    inverse_dispersion: float = 5.0,
    dropout: float = 0.0,
    mean_accessibility: float = 0.3,
    fragments: bool | float = False,
    reads: bool = False,
    truth: bool = True,
    n_proteins: int = 0,
    stained: float = 1.0,
    seed: int = 0,
    return_mudata: bool = False,
) -> AnnData | Any:  # Any: a MuData, whose type needs the extra
    r"""Draw a mosaic data set from the generative process that MultiVI assumes.

    For cell n of type t and batch s, gene g and region j,

    .. math::

        z_n &= \sqrt{w}\, c_t + \sqrt{1 - w}\, \varepsilon_n, \quad \varepsilon_n \sim Normal(0, I) \\
        \rho_n &= softmax(a + B z_n + b_s), \quad \ell_n \sim LogNormal(\mu_s, \sigma^2) \\
        x_{ng} &\sim ZINB(\ell_n \rho_{ng}, \theta_g, \pi_{ng}) \\
        p_n &= sigmoid(a' + B' z_n + b'_s), \quad d_n, r_j \in (0, 1) \\
        y_{nj} &> 0 \text{ with probability } p_{nj} d_n r_j

    where the type centres c have mean 0 and variance 1 in every dimension, so that z has
    mean 0 and variance 1 as under the prior of the model. The rows of B and B' are zero for features
    that are not differential. Every cell is drawn in both modalities; what was not
    measured is then taken out of ``X`` and kept under ``obsm``.

    Parameters
    ----------
    n_cells
        Numbers of paired, RNA-only and ATAC-only cells; the rows come in this order.
    n_genes, n_regions
        Numbers of features; genes are the first columns.
    n_types
        Number of cell types, equally likely.
    n_latent
        Dimension of z.
    n_batches
        Number of batches, equally likely and independent of type and modality.
    type_separation
        Share w of the variance of z that lies between types, in [0, 1]. The rest is continuous
        variation within a type. With a single type all of it is.
    differential_fraction
        Share of the genes and of the regions that depend on z, in [0, 1].
    effect_size
        Standard deviation over cells, about, of the log expression of a differential gene, and half of
        that of the logit of accessibility of a differential region: regions open and close.
    batch_effect
        Standard deviation over features of the shift of log expression and of the logit of accessibility
        from batch to batch.
    mean_library
        Median of ℓ, in counts; batches lie around it.
    library_sd
        Standard deviation σ of log ℓ within a batch; also that of logit d.
    inverse_dispersion
        Median over genes of θ. Counts have variance μ + μ² / θ.
    dropout
        Probability π of an excess zero at z = 0, in [0, 1). 0 draws from the negative binomial.
    mean_accessibility
        Probability p at z = 0 of the median region, in (0, 1).
    fragments
        False: ``y`` is 0 and 1. True: counts of fragments, Poisson with the same probability of being positive. A
        number: Poisson with that many times :math:`p_{nj} d_n r_j` as mean.
    reads
        Whether fragments are counted by their ends: two, or one where the other lies outside (one in ten).
    truth
        Whether to keep what is as large as the data: the arrays marked * below. Without it the
        memory needed is that of the sparse counts.
    n_proteins
        Number of proteins (antibodies): a mixture of background and foreground that depends on z.
    stained
        Share of the cells in which they were measured, in (0, 1]; the counts of the others are hidden.
    seed
        Seed of the generator. The global random state is neither read nor changed.
    return_mudata
        Return a MuData of ``rna`` and ``atac`` (and ``protein``), each with the cells it was measured in; needs the
        extra ``mudata``. ``obs``, ``obsm`` and ``uns`` are then those of the MuData, ``var`` and
        ``varm`` those of its parts.

    Returns
    -------
    AnnData
        ``X`` holds the counts (csr, float32), all zero where a modality was not measured, and

        ========================================  ====================================================
        ``obs["modality"]``                       paired, expression or accessibility
        ``obs["batch"]``, ``obs["cell_type"]``
        ``obs["true_library"]``                   ℓ, in counts
        ``obs["true_cell_factor"]``               d
        ``obsm["true_z"]``                        z, (cells, latent)
        ``obsm["true_rho"]`` *                    ρ, (cells, genes)
        ``obsm["true_pi"]`` *                     π, (cells, genes), if ``dropout > 0``
        ``obsm["true_p"]`` *                      p, (cells, regions)
        ``obsm["hidden_x"]`` *                    counts of genes not measured, csr, else zero
        ``obsm["hidden_y"]`` *                    counts of regions not measured, csr, else zero
        ``var["feature_types"]``                  Gene Expression or Peaks
        ``var["is_differential"]``                whether the feature depends on z. The softmax
                                                  moves the other genes a little, all by one factor
        ``var["true_inverse_dispersion"]``        θ; NaN for regions
        ``var["true_region_factor"]``             r; NaN for genes
        ``varm["true_at_centre"]``                ρ or p at the centre of each type without batch
                                                  effect, (features, types), to derive true
                                                  log fold changes from
        ``uns["true_centres"]``                   type centres in z, (types, latent)
        ``uns["simulation"]``                     the arguments
        ========================================  ====================================================

        With proteins also counts in ``obsm["protein_expression"]``, a frame; ``obs["has_protein"]``;
        ``obsm["hidden_protein"]`` of the other cells; and ``obsm["true_protein_background"]``,
        ``"true_protein_foreground"`` (whether a count is foreground) and ``"true_protein_mean"``, (cells, proteins).
        ``uns["true_protein_background"]`` has the median background, (batches, proteins).

    Raises
    ------
    ValueError
        If an argument is out of its range.
    ImportError
        If ``return_mudata`` and mudata is not installed.

    Examples
    --------
    >>> adata = simulate_multiome((30, 10, 10), n_genes=50, n_regions=80, seed=1)
    >>> adata.shape
    (50, 130)
    >>> adata.obs["modality"].value_counts().to_dict()
    {'paired': 30, 'expression': 10, 'accessibility': 10}
    >>> adata.obsm["true_rho"].shape, adata.obsm["hidden_x"].shape
    ((50, 50), (50, 50))
    """
    arguments: dict[str, Any] = {key: value for key, value in locals().items() if key != "return_mudata"}
    arguments["n_cells"] = whole_numbers("n_cells", n_cells)
    check_simulation(arguments)
    n = sum(arguments["n_cells"])
    rng = np.random.default_rng(seed)
    decoders = _draw_decoders(rng, arguments)
    cells = _draw_cells(rng, n, arguments, decoders.centre_tk)
    blocks: dict[str, list[Any]] = {}
    size = max(1, _BLOCK_ENTRIES // (n_genes + n_regions))
    for start in range(0, n, size):
        drawn = _draw_counts(rng, cells.at(slice(start, start + size)), decoders, arguments)
        for key, block in drawn.items():
            blocks.setdefault(key, []).append(block)

    x = sp.hstack([sp.vstack(blocks.pop(key), format="csr") for key in (RNA.counts, ATAC.counts)], format="csr")
    obsm: dict[str, Any] = {"true_z": cells.z_nk}
    for key, parts in blocks.items():
        obsm[key] = sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)
    centre_tk = decoders.centre_tk
    adata = AnnData(
        x,
        obs=_obs(cells, n_batches, n_types),
        var=_variables(decoders),
        obsm=obsm,
        varm={"true_at_centre": np.hstack([decode(centre_tk) for decode in (decoders.rho, decoders.p)]).T},
        uns={"true_centres": centre_tk, "simulation": arguments},
    )
    if n_proteins:
        add_proteins(adata, n_proteins, stained, seed)
    return simulated_mudata(adata) if return_mudata else adata


class _Cells(NamedTuple):
    """State, depths and origin of n cells."""

    pattern_n: NDArray[np.int64]
    type_n: NDArray[np.int64]
    batch_n: NDArray[np.int64]
    z_nk: Array
    library_n: Array
    cell_factor_n: Array

    def at(self, rows: slice) -> _Cells:
        """Some of the cells."""
        return _Cells._make(part[rows] for part in self)


def _draw_cells(rng: np.random.Generator, n: int, arguments: dict[str, Any], centre_tk: Array) -> _Cells:
    n_types, n_batches, library_sd = arguments["n_types"], arguments["n_batches"], arguments["library_sd"]
    pattern_n = np.repeat(np.arange(len(MEASUREMENT_PATTERNS)), arguments["n_cells"])
    type_n = rng.integers(n_types, size=n)
    batch_n = rng.integers(n_batches, size=n)
    between = arguments["type_separation"] if n_types > 1 else 0.0
    z_nk = np.float32(np.sqrt(1 - between)) * rng.standard_normal((n, arguments["n_latent"]), dtype=np.float32)
    z_nk += centre_tk[type_n]
    # Batches differ in depth by half of the spread within a batch, so that they overlap.
    log_depth_s = np.log(arguments["mean_library"]) + _centred(rng, 0.5 * library_sd, n_batches)
    library_n = np.exp(log_depth_s[batch_n] + library_sd * rng.standard_normal(n)).astype(np.float32)
    # Around sigmoid(1) = 0.73: a cell shows most of what is open and never all of it.
    cell_factor_n = _sigmoid(1 + library_sd * rng.standard_normal(n, dtype=np.float32))
    return _Cells(pattern_n, type_n, batch_n, z_nk, library_n, cell_factor_n)


def _draw_counts(
    rng: np.random.Generator, cells: _Cells, decoders: _Decoders, arguments: dict[str, Any]
) -> dict[str, Array | sp.csr_matrix]:
    """Counts of some cells, and what they were drawn from, by the names that the result has."""
    found: dict[str, Array | sp.csr_matrix] = {}
    dropout, truth = arguments["dropout"], arguments["truth"]
    rho_bg = decoders.rho(cells.z_nk, decoders.rna_batch_sg[cells.batch_n])
    x_bg = _negative_binomial(rng, cells.library_n[:, None] * rho_bg, decoders.inverse_dispersion_g)
    p_bm = decoders.p(cells.z_nk, decoders.atac_batch_sm[cells.batch_n])
    detected_bm = p_bm * cells.cell_factor_n[:, None] * decoders.region_factor_m
    y_bm = _detections(rng, detected_bm, arguments["fragments"], arguments["reads"])
    if dropout > 0:
        pi_bg = decoders.pi(cells.z_nk, dropout)
        x_bg[rng.random(x_bg.shape, dtype=np.float32) < pi_bg] = 0
        if truth:
            found["true_pi"] = pi_bg
    for modality, counts, decoded in ((RNA, x_bg, rho_bg), (ATAC, y_bm, p_bm)):
        measured_b = pattern_includes(modality)[cells.pattern_n]
        found[modality.counts] = sp.csr_matrix(counts * measured_b[:, None])
        if truth:
            found[f"hidden_{modality.counts}"] = sp.csr_matrix(counts * ~measured_b[:, None])
            found[f"true_{modality.decoded}"] = decoded
    return found


def _obs(cells: _Cells, n_batches: int, n_types: int) -> pd.DataFrame:
    n = len(cells.type_n)
    width = len(str(n - 1))
    return pd.DataFrame(
        {
            "modality": pd.Categorical.from_codes(cells.pattern_n, pd.Index(MEASUREMENT_PATTERNS)),
            "batch": pd.Categorical.from_codes(cells.batch_n, pd.Index([f"batch_{s}" for s in range(n_batches)])),
            "cell_type": pd.Categorical.from_codes(cells.type_n, pd.Index([f"type_{t}" for t in range(n_types)])),
            "true_library": cells.library_n,
            "true_cell_factor": cells.cell_factor_n,
        },
        index=[f"cell_{i:0{width}d}" for i in range(n)],
    )


def _draw_decoders(rng: np.random.Generator, arguments: dict[str, Any]) -> _Decoders:
    n_genes, n_regions = arguments["n_genes"], arguments["n_regions"]
    n_latent, n_batches, n_types = arguments["n_latent"], arguments["n_batches"], arguments["n_types"]
    effect, fraction = arguments["effect_size"], arguments["differential_fraction"]

    def normal(sd: float, *shape: int) -> Array:
        return np.float32(sd) * rng.standard_normal(shape, dtype=np.float32)

    def loadings(n_features: int, sd: float) -> Array:
        loading = normal(sd / np.sqrt(n_latent), n_latent, n_features)
        same = rng.permutation(n_features)[round(fraction * n_features) :]
        loading[:, same] = 0
        return loading

    centre_tk = normal(1, n_types, n_latent)
    if n_types > 1:
        centre_tk -= centre_tk.mean(0)
        centre_tk *= np.float32(np.sqrt(arguments["type_separation"])) / centre_tk.std(0)
    else:
        centre_tk[:] = 0
    return _Decoders(
        centre_tk=centre_tk,
        # Log abundances and logits with a spread of 1: most features within a factor of ten.
        rna_bias_g=normal(1, n_genes),
        rna_loading_kg=loadings(n_genes, effect),
        rna_batch_sg=_centred(rng, arguments["batch_effect"], n_batches, n_genes),
        dropout_loading_kg=normal(0.5 / np.sqrt(n_latent), n_latent, n_genes),
        inverse_dispersion_g=np.float32(arguments["inverse_dispersion"]) * np.exp(normal(0.5, n_genes)),
        atac_bias_m=_logit(arguments["mean_accessibility"]) + normal(1, n_regions),
        atac_loading_km=loadings(n_regions, 2 * effect),
        atac_batch_sm=_centred(rng, arguments["batch_effect"], n_batches, n_regions),
        region_factor_m=_sigmoid(1 + normal(1, n_regions)),
    )


def _centred(rng: np.random.Generator, sd: float, n_batches: int, *shape: int) -> Array:
    """Effects of batches with mean 0 over the batches: none if there is only one."""
    effect_s = rng.standard_normal((n_batches, *shape), dtype=np.float32)
    return np.float32(sd) * (effect_s - effect_s.mean(0))


def _negative_binomial(rng: np.random.Generator, mean_bg: Array, inverse_dispersion_g: Array) -> Array:
    """Poisson counts whose rate is Gamma with the given mean, shape (cells, genes)."""
    rate_bg = rng.standard_gamma(np.broadcast_to(inverse_dispersion_g, mean_bg.shape), dtype=np.float32)
    rate_bg *= mean_bg
    rate_bg /= inverse_dispersion_g
    return rng.poisson(rate_bg).astype(np.float32)


def _detections(rng: np.random.Generator, q_bm: Array, fragments: bool | float, reads: bool) -> Array:
    """0 and 1, positive with probability q, or numbers of fragments or of their reads, shape (cells, regions)."""
    if fragments or reads:
        # A Poisson count is positive with probability 1 - exp(-rate).
        found = rng.poisson(-np.log1p(-q_bm) if isinstance(fragments, bool) else fragments * q_bm)
        return (found + rng.binomial(found, 0.9) if reads else found).astype(np.float32)
    return (rng.random(q_bm.shape, dtype=np.float32) < q_bm).astype(np.float32)


def _variables(decoders: _Decoders) -> pd.DataFrame:
    n_genes, n_regions = decoders.rna_loading_kg.shape[1], decoders.atac_loading_km.shape[1]
    gene_width, region_width = len(str(n_genes - 1)), len(str(n_regions - 1))
    missing_g, missing_m = np.full(n_genes, np.nan, np.float32), np.full(n_regions, np.nan, np.float32)
    loading_kv = np.hstack([decoders.rna_loading_kg, decoders.atac_loading_km])
    return pd.DataFrame(
        {
            "feature_types": pd.Categorical(
                np.repeat([RNA.feature_type, ATAC.feature_type], [n_genes, n_regions]),
                [modality.feature_type for modality in MODALITIES],
            ),
            "is_differential": (loading_kv != 0).any(0),
            "true_inverse_dispersion": np.concatenate([decoders.inverse_dispersion_g, missing_m]),
            "true_region_factor": np.concatenate([missing_g, decoders.region_factor_m]),
        },
        index=[f"gene_{g:0{gene_width}d}" for g in range(n_genes)]
        + [f"region_{m:0{region_width}d}" for m in range(n_regions)],
    )


def _sigmoid(logit: Array) -> Array:
    return np.reciprocal(1 + np.exp(-logit), dtype=np.float32)


def _logit(p: float) -> np.float32:
    return np.float32(np.log(p) - np.log1p(-p))
