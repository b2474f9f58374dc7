"""Simulated cells: checks of arguments, counts of proteins with the truth kept beside them, the form of a MuData."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from numpy.typing import NDArray

from pyro_multivi._optional import mudata_as_given
from pyro_multivi.data.checks import check_number
from pyro_multivi.data.modality import MODALITIES, PROTEIN, Modality
from pyro_multivi.data.vocabulary import MEASUREMENT_PATTERNS, MODALITIES_OF

# Median background and its spread over proteins, from cell to cell and from batch to batch; as in CITE-seq data
# the background has some counts, and a foreground ten times of it or more.
_BACKGROUND, _BETWEEN_PROTEINS, _BETWEEN_CELLS, _BETWEEN_BATCHES = 8.0, 0.6, 0.2, 0.3
_LOG_RATIO, _RATIO_SD = np.log(12.0), 0.4
_INVERSE_DISPERSION = 10.0
# Share of the foreground at z = 0, as a logit, and how steeply it depends on z: cells differ by their state, little by
# chance.
_LOGIT, _SLOPE = -2.0, 12.0


def add_proteins(adata: AnnData, n_proteins: int, stained: float, seed: int) -> None:
    r"""Add counts of proteins to cells of :func:`~pyro_multivi.simulate_multiome`, in place.

    .. math::

        f_{nt} &\sim Bernoulli(sigmoid(a_t + b_t^T z_n)), \quad \log \beta_{nt} \sim Normal(m_{ts}, \sigma^2) \\
        y_{nt} &\sim NB(\beta_{nt} (1 + f_{nt} (\alpha_t - 1) e^{c_t^T z_n}), \phi)

    See the function for what is kept.

    Parameters
    ----------
    stained
        Share of the cells in which proteins were measured, in (0, 1]; it does not depend on anything else.
    """
    rng = np.random.default_rng([seed, 1])
    z_nk, batch_n = adata.obsm["true_z"].astype(np.float64), adata.obs["batch"].cat.codes.to_numpy()
    n, n_latent = z_nk.shape
    n_batches = int(batch_n.max()) + 1

    def normal(sd: float, *shape: int) -> Any:
        return sd * rng.standard_normal(shape)

    log_background_st = np.log(_BACKGROUND) + normal(_BETWEEN_PROTEINS, n_proteins)
    shift_st = normal(_BETWEEN_BATCHES, n_batches, n_proteins)
    log_background_st = log_background_st + shift_st - shift_st.mean(0)
    background_nt = np.exp(log_background_st[batch_n] + normal(_BETWEEN_CELLS, n, n_proteins))
    direction_kt = normal(1.0, n_latent, n_proteins)
    direction_kt /= np.linalg.norm(direction_kt, axis=0)
    probability_nt = 1 / (1 + np.exp(-(_LOGIT + _SLOPE * (z_nk @ direction_kt))))
    is_foreground_nt = rng.random((n, n_proteins)) < probability_nt
    ratio_nt = np.exp(
        _LOG_RATIO + normal(_RATIO_SD, n_proteins) + z_nk @ normal(0.3 / np.sqrt(n_latent), n_latent, n_proteins)
    )
    mean_nt = background_nt * np.where(is_foreground_nt, 1 + ratio_nt, 1.0)
    counts_nt = rng.poisson(mean_nt * rng.gamma(_INVERSE_DISPERSION, 1 / _INVERSE_DISPERSION, mean_nt.shape))
    is_stained_n = rng.random(n) < stained
    names = [f"protein_{place:0{len(str(n_proteins - 1))}d}" for place in range(n_proteins)]

    def frame(values: Any) -> pd.DataFrame:
        return pd.DataFrame(values, index=adata.obs_names, columns=names)

    adata.obs["has_protein"] = is_stained_n
    adata.obsm["protein_expression"] = frame(np.where(is_stained_n[:, None], counts_nt, 0).astype(np.float32))
    adata.obsm["hidden_protein"] = frame(np.where(is_stained_n[:, None], 0, counts_nt).astype(np.float32))
    adata.obsm["true_protein_background"] = frame(background_nt.astype(np.float32))
    adata.obsm["true_protein_foreground"] = frame(is_foreground_nt)
    adata.obsm["true_protein_mean"] = frame(mean_nt.astype(np.float32))
    adata.uns["true_protein_background"] = np.exp(log_background_st).astype(np.float32)
    adata.uns["protein_names"] = np.array(names)


def pattern_includes(modality: Modality) -> NDArray[np.bool_]:
    """Whether each of the measurement patterns includes a modality."""
    return np.array([modality in MODALITIES_OF[pattern] for pattern in MEASUREMENT_PATTERNS])


def simulated_mudata(adata: AnnData) -> Any:
    """MuData of simulated cells, whose modalities hold only the cells measured in them."""
    parts = {}
    for modality in MODALITIES:
        cells = pattern_includes(modality)[adata.obs["modality"].cat.codes]
        features = (adata.var["feature_types"] == modality.feature_type).to_numpy()
        part = adata[cells, features].copy()
        parts[modality.key] = AnnData(part.X, obs=part.obs[[]], var=part.var, varm=dict(part.varm))
    if "has_protein" in adata.obs:
        counts = adata.obsm["protein_expression"][adata.obs["has_protein"].to_numpy()]
        parts[PROTEIN] = AnnData(
            sp.csr_matrix(counts.to_numpy()), obs=counts[[]], var=pd.DataFrame(index=counts.columns)
        )
    with mudata_as_given() as mudata:
        mdata = mudata.MuData(parts)
    # MuData has an order of cells of its own; what describes them follows it.
    adata = adata[mdata.obs_names]
    for column in adata.obs:
        mdata.obs[column] = adata.obs[column]
    for key, value in adata.obsm.items():
        mdata.obsm[key] = value
    mdata.uns.update(adata.uns)
    return mdata


def check_simulation(arguments: dict[str, Any]) -> None:
    """Reject arguments for which the process is not defined."""
    n_cells = arguments["n_cells"]
    if len(n_cells) != len(MEASUREMENT_PATTERNS) or min(n_cells) < 0 or sum(n_cells) == 0:
        raise ValueError(
            f"n_cells is {tuple(n_cells)}; give three numbers of cells, none negative and not all zero: "
            "paired, RNA-only and ATAC-only"
        )
    for name in ("n_genes", "n_regions"):
        if arguments[name] < 1:
            raise ValueError(f"{name} is {arguments[name]}; it must be at least 1")
    for name in ("effect_size", "batch_effect", "library_sd"):
        if not 0 <= arguments[name] < np.inf:
            raise ValueError(f"{name} is {arguments[name]}; it must be finite and not negative")
    for name in ("mean_library", "inverse_dispersion"):
        if not 0 < arguments[name] < np.inf:
            raise ValueError(f"{name} is {arguments[name]}; it must be finite and positive")
    for name in ("type_separation", "differential_fraction"):
        if not 0 <= arguments[name] <= 1:
            raise ValueError(f"{name} is {arguments[name]}; it must lie in [0, 1]")
    if not 0 < arguments["stained"] <= 1:
        raise ValueError(f"stained is {arguments['stained']}; it must lie in (0, 1]")
    if not 0 <= arguments["dropout"] < 1:
        raise ValueError(f"dropout is {arguments['dropout']}; it must lie in [0, 1)")
    if not isinstance(arguments["fragments"], bool):
        check_number("fragments", arguments["fragments"], above=0, allowed=", or True or False")
    if not 0 < arguments["mean_accessibility"] < 1:
        raise ValueError(f"mean_accessibility is {arguments['mean_accessibility']}; it must lie in (0, 1)")
