"""Posterior draws, replicates and log-likelihoods of cells for ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_multivi._optional import require
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import MODALITIES, modality_at
from pyro_multivi.posterior.engine.draws import draw_latents, model_trace
from pyro_multivi.posterior.engine.likelihood import LIKELIHOOD_DRAWS, cells_for_likelihood
from pyro_multivi.posterior.engine.replicates import check_memory, counts_of, replicate, where_measured
from pyro_multivi.processes.shares import Arrays, by_minibatch
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode, is_of_cells, log_density, random_sites

#: Group of the latents that all cells share, alike in every minibatch; they join the posterior.
SHARED = "shared"


def inference_data(
    program: MultiVIProgram,
    minibatches: Minibatches,
    features: Mapping[str, Tensor | None],
    feature_names: Mapping[str, Sequence[str]],
    n_samples: int,
    seed: int = 0,
) -> Any:
    """ArviZ's groups of draws and data of some cells, dense.

    Parameters
    ----------
    features, feature_names
        Positions (None for all) and names of the features of replicates and observed data, by site.
    n_samples, seed
        Number of draws, one chain, and their seed.

    Returns
    -------
    arviz.InferenceData

    Raises
    ------
    ImportError
        If ArviZ is not installed.
    MemoryError
        If the result would not fit into memory.
    """
    with warnings.catch_warnings():
        # ArviZ warns of its next version whenever it is imported.
        warnings.simplefilter("ignore", FutureWarning)
        arviz = require("arviz", "arviz")
    width = sum(map(len, feature_names.values()))
    check_memory(
        4.0 * n_samples * minibatches.n_cells * (width + program.config.latent),
        f"{n_samples} draws of {minibatches.n_cells} cells x {width} features, dense,",
        ["fewer n_samples", "some indices", "a gene_list and a region_list"],
    )
    size = cells_for_likelihood(minibatches.batch_size, n_samples)
    parts = by_minibatch(
        lambda cells: _of_minibatch(program, cells, features, n_samples, seed),
        Minibatches(minibatches.table, minibatches.index, batch_size=size, device=minibatches.device),
    )
    coords: dict[str, Any] = {"cell": minibatches.cell_names, "latent": np.arange(program.config.latent)}
    dims = {"z": ["cell", "latent"]}
    for modality in MODALITIES:
        dims[modality.depth] = dims[modality.mask] = ["cell"]
    for site in features:
        feature = modality_at(site).feature
        coords[feature] = list(feature_names[site])
        dims[site] = ["cell", feature]
    groups = _joined(parts, dims)
    # In two steps, because x has genes everywhere but in the log-likelihood.
    scored = groups.pop("log_likelihood")
    used = {site for values in groups.values() for site in values}
    made = arviz.from_dict(**groups, coords=coords, dims={site: dims[site] for site in dims if site in used})
    of_cells = {site: ["cell"] for site in scored}
    made.extend(arviz.from_dict(log_likelihood=scored, coords={"cell": coords["cell"]}, dims=of_cells))
    return made


def _of_minibatch(
    program: MultiVIProgram, cells: Cells, features: Mapping[str, Tensor | None], n_samples: int, seed: int
) -> Arrays:
    """Values by ``"group/site"``."""
    scored = _scored(program, cells, n_samples, seed)
    found = {f"{group}/{site}": values for (group, site), values in scored.items()}
    drawn: dict[str, list[Tensor]] = {site: [] for site in features}
    for _, part in replicate(program, cells, n_samples, seed):
        for site, chosen in features.items():
            values = part[site].values
            drawn[site].append(values if chosen is None else values[..., chosen])
    for site, chosen in features.items():
        found[f"posterior_predictive/{site}"] = torch.cat(drawn[site])
        counts = counts_of(program, cells, site)[0].masked_fill(~where_measured(cells, site), torch.nan)
        found[f"observed_data/{site}"] = counts if chosen is None else counts[:, chosen]
    for modality in MODALITIES:
        found[f"constant_data/{modality.mask}"] = modality.measured_in(cells)
    return {name: values.cpu().numpy() for name, values in found.items()}


def _joined(parts: list[Arrays], dims: dict[str, list[str]]) -> dict[str, Any]:
    """Arrays of all cells by group and site, draws behind one chain; the parts are emptied.

    ``dims`` takes in latents of cells that it does not name.
    """
    groups: dict[str, Any] = {"posterior": {}, "log_likelihood": {}}
    for name in list(parts[0]):
        group, _, site = name.partition("/")
        of_draws = group not in ("observed_data", "constant_data")
        found = [part.pop(name) for part in parts]
        if group == SHARED:
            group, values = "posterior", found[0]
        else:
            # Draws come first: cells are joined along their own axis.
            values = np.concatenate(found, int(of_draws))
            if group == "posterior":
                dims.setdefault(site, ["cell"])
        groups.setdefault(group, {})[site] = values[None] if of_draws else values
    return groups


def _scored(program: MultiVIProgram, cells: Cells, n_samples: int, seed: int) -> dict[tuple[str, str], Tensor]:
    """Latents and log-likelihoods of a minibatch by group and site, (S, B, ...), of what cells share (S, ...)."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for first in range(0, n_samples, LIKELIHOOD_DRAWS):
        size = min(LIKELIHOOD_DRAWS, n_samples - first)
        with evaluation_mode(program):
            latents = draw_latents(program, cells, size, seed, first)
            trace = model_trace(program.model, cells, latents)
            trace.compute_log_prob()
            for name, node in random_sites(trace).items():
                if node["is_observed"]:
                    parts.setdefault(("log_likelihood", name), []).append(log_density(node))
                    continue
                event_shape = node["value"].shape[node["value"].dim() - node["fn"].event_dim :]
                of_cells = is_of_cells(node)
                value = node["value"].expand(size, len(cells) if of_cells else 1, *event_shape)
                group, value = ("posterior", value) if of_cells else (SHARED, value[:, 0])
                parts.setdefault((group, name), []).append(value)
    return {key: torch.cat(values) for key, values in parts.items()}
