"""Replicated data: counts as the model would have measured them in the same cells.

Observed sites are drawn instead (:class:`~pyro_multivi.traces.Uncondition`), at latents drawn
from the guide. A modality can be hidden from the guide first, so that it is predicted, not reconstructed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from pyro_multivi.data.checks import NotInModelError
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import AnyModality, Cells, ExtraFeatures, Measurement
from pyro_multivi.data.modality import MODALITIES, PROTEIN, modality_at, modelled
from pyro_multivi.data.sparse import SparseCounts
from pyro_multivi.distributions.base import dense_rows
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.draws import Latents, draw_latents, imputation_latents, model_trace
from pyro_multivi.posterior.engine.weight_posterior import WeightNoise
from pyro_multivi.processes.shares import Arrays, by_minibatch
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import Uncondition, evaluation_mode

#: Sources of the depth of a hidden modality: the hidden counts, the other modality, or the prior.
DEPTHS = ("observed", "predicted", "prior")
#: Bytes that replicates kept in memory may take.
MEMORY_LIMIT = 4 * 2**30
# Draws x cells x features drawn at once: a handful of float32 copies of 16 MB.
_BLOCK = 2**22
# What a sparse matrix of rows is made of.
_CSR = ("data", "indices", "indptr", "shape")


@dataclass(frozen=True)
class Replicate:
    """Some draws of an observed site in some cells.

    Attributes
    ----------
    values
        Replicated counts, (S, B, F); accessibility is 0 or 1, unless fragments are counted.
    fn
        Distribution that they were drawn from, one per draw of the latents.
    expected
        Function of that distribution: expected counts, or the probability of a region to be open.
    """

    values: Tensor
    fn: Any
    expected: Callable[[Any], Tensor]

    def mean(self) -> Tensor:
        """Expected values given each draw of the latents, (S, B, F)."""
        with torch.no_grad():
            return self.expected(self.fn).expand(self.values.shape)


def count_sites(program: MultiVIProgram) -> tuple[str, ...]:
    """Sites of counts that the program has: ``"x"``, ``"y"`` or both."""
    return tuple(modality.counts for modality in modelled(program.config))


def extra_features(program: MultiVIProgram) -> dict[str, ExtraFeatures]:
    """Extra modalities that the program models, by their observed sites."""
    return {
        each.name: ExtraFeatures(each.name, each.site(each.estimated), PROTEIN if each.name == PROTEIN else "feature")
        for each in program.modelled_extra
    }


def features_at(program: MultiVIProgram, site: str) -> AnyModality:
    """The modality of a site, as the program treats it; also an extra one."""
    found = extra_features(program).get(site)
    return modality_at(site).in_model(program.config) if found is None else found


def counts_of(program: MultiVIProgram, cells: Cells, site: str) -> tuple[Tensor, Tensor]:
    """Counts (B, F) of a site as the model sees them (open regions as 0 or 1), and where they were measured."""
    modality = features_at(program, site)
    counts = dense_rows(modality.counts_in(cells))
    return _opened(counts) if modality.binary else counts, modality.measured_in(cells)


def where_measured(cells: Cells, site: str) -> Tensor:
    """Whether each count of a site was measured, (B, F), or (B, 1) where no feature is missing."""
    modality = modality_at(site)
    measured, panels = modality.measured_in(cells)[:, None], modality.panels_in(cells)
    return measured if panels is None else measured & panels.measured[panels.code]


def hide(cells: Cells, modality: AnyModality) -> Cells:
    """Take one modality away from cells.

    Examples
    --------
    >>> from pyro_multivi.data.modality import ATAC
    >>> both = torch.ones(2, dtype=torch.bool)
    >>> cells = Cells(torch.arange(2), 2, torch.ones(2, 3), torch.ones(2, 4), both, both, torch.ones(2, 1))
    >>> hide(cells, ATAC).has_atac, hide(cells, ATAC).y
    (tensor([False, False]), SparseCounts(shape=(2, 4), nnz=0))
    """
    if isinstance(modality, ExtraFeatures):
        unmeasured = Measurement(*map(torch.zeros_like, cells.extra[modality.name]))
        return cells.replace(extra={**cells.extra, modality.name: unmeasured})
    counts = modality.counts_in(cells)
    crow = torch.zeros(len(cells) + 1, dtype=torch.long, device=cells.device)
    nothing = torch.zeros(0, dtype=counts.dtype, device=cells.device)
    empty = SparseCounts(crow, crow[:0], nothing, (len(cells), counts.shape[1]))
    never = torch.zeros_like(modality.measured_in(cells))
    return cells.replace(**{modality.counts: empty, modality.mask: never})


def replicate(
    program: MultiVIProgram,
    cells: Cells,
    n_samples: int,
    seed: int = 0,
    hidden: str | None = None,
    hidden_depth: str = "observed",
) -> Iterator[tuple[slice, dict[str, Replicate]]]:
    """Replicated counts of a minibatch, a few draws at a time.

    Parameters
    ----------
    cells
        B cells. All modalities are drawn in all of them, measured or not.
    n_samples
        Number of draws.
    seed
        Seed of the draws. Latents belong to a cell; counts depend on how cells are cut into minibatches.
    hidden
        Site of counts that the guide does not see.
    hidden_depth
        Source of the depth (l or d) of the hidden modality. ``"observed"``: the guide sees
        the hidden counts for it, and only for it, so that the profile of a cell is predicted and not its depth.
        ``"predicted"``: it is predicted from the other modality. ``"prior"``: it follows its prior.

    Yields
    ------
    slice, dict
        Numbers of the draws, and their counts by site.

    Raises
    ------
    NotInModelError
        If the program's model has no site of the counts of a modality.
    """
    hidden_modality = None if hidden is None else features_at(program, hidden)
    seen = cells if hidden_modality is None else hide(cells, hidden_modality)
    known_depth = next((each for each in MODALITIES if each == hidden_modality and hidden_depth != "predicted"), None)
    sites = (*count_sites(program), *extra_features(program))
    width = max(program.config.n_genes, program.config.n_regions, *program.config.extra.values())
    for draws in _draws_at_a_time(n_samples, len(cells) * width):
        with evaluation_mode(program):
            n = draws.stop - draws.start
            latents = _latents(program, cells, draws, seed, hidden_modality, hidden_depth)
            drawn = {}
            for together, part in imputation_latents(program, seen, latents, sites, known_depth):
                torch.manual_seed(CellNoise(cells.index, seed, draws.start).torch_seed("replicates"))
                model = WeightNoise(program, part.noise)(Uncondition()(program.model))
                nodes: dict[str, Any] = dict(model_trace(model, seen, part).nodes)
                for site in together:
                    if site not in nodes:
                        continue  # an extra modality with statements of another name
                    modality = features_at(program, site)
                    fn, value = nodes[site]["fn"], nodes[site]["value"].detach()
                    # A custom likelihood may draw counts of a region; only open or closed is compared.
                    value = _opened(value) if modality.binary else value
                    shape = (n, len(cells), value.shape[-1])
                    drawn[site] = Replicate(value.expand(shape), fn, _expected_by(program, modality))
        for site in count_sites(program):
            if site not in drawn:
                raise NotInModelError(
                    f"{type(program).__name__}.model has no site {site!r}, at which counts of "
                    f"{features_at(program, site).features} would be replicated: keep it, and take it out of handlers "
                    "that hide it (poutine.block)."
                )
        # Outside, so that no state of torch is held while the caller is at work.
        yield draws, {site: drawn[site] for site in sites if site in drawn}


def _draws_at_a_time(n_samples: int, n_numbers: int) -> Iterator[slice]:
    """Slices of the draws, so small that their counts, of ``n_numbers`` each, stay within bounds."""
    size = max(1, _BLOCK // max(1, n_numbers))
    for first in range(0, n_samples, size):
        yield slice(first, min(first + size, n_samples))


def _latents(
    program: MultiVIProgram, cells: Cells, draws: slice, seed: int, hidden: AnyModality | None, hidden_depth: str
) -> Latents:
    n = draws.stop - draws.start
    if hidden is None:
        return draw_latents(program, cells, n, seed, draws.start)
    latents = draw_latents(program, hide(cells, hidden), n, seed, draws.start)
    if hidden_depth != "observed" or hidden.depth not in latents.trace.nodes:
        return latents
    known: Any = draw_latents(program, cells, n, seed, draws.start).trace.nodes[hidden.depth]
    return latents.at(hidden.depth, known["value"])


def _expected_by(program: MultiVIProgram, modality: AnyModality) -> Callable[[Any], Tensor]:
    """Function of a distribution of counts: expected counts, or the probability of a region to be open."""
    return program.open_probability if modality.binary else attrgetter("mean")


def sample_replicates(
    program: MultiVIProgram,
    minibatches: Minibatches,
    features: Mapping[str, Tensor | None],
    n_samples: int,
    seed: int = 0,
) -> dict[str, list[sp.csr_matrix]]:
    """Replicated counts of some cells, sparse, one matrix (cells, features) per draw.

    Parameters
    ----------
    features
        Positions of the wanted features by site, int64; None for all. Sites that are not
        named are left out.
    n_samples, seed
        As in :func:`replicate`.

    Raises
    ------
    MemoryError
        If they would not fit at the density of the data.
    """
    check_memory(
        _sparse_bytes(program, minibatches, features, n_samples),
        f"{n_samples} replicates of {minibatches.n_cells} cells",
        ["fewer n_samples", "some indices", "a gene_list and a region_list",
         "posterior_predictive_check, which keeps no replicate"],
    )  # fmt: skip

    def of_minibatch(cells: Cells) -> Arrays:
        """Parts of a sparse matrix of all draws of all cells, one draw below the other, by site."""
        parts: dict[str, list[sp.csr_matrix]] = {site: [] for site in features}
        for _, found in replicate(program, cells, n_samples, seed):
            for site, chosen in features.items():
                values = found[site].values if chosen is None else found[site].values[..., chosen]
                parts[site].append(sp.csr_matrix(values.flatten(0, 1).cpu().numpy()))
        arrays: Arrays = {}
        for site, matrices in parts.items():
            whole = sp.vstack(matrices, format="csr")
            parts_of = (whole.data, whole.indices, whole.indptr, np.array(whole.shape))
            arrays |= {f"{site}/{name}": array for name, array in zip(_CSR, parts_of, strict=True)}
        return arrays

    found = by_minibatch(of_minibatch, minibatches)
    return {site: _by_draw(found, site, n_samples) for site in features}


def _by_draw(found: Sequence[Arrays], site: str, n_samples: int) -> list[sp.csr_matrix]:
    """One matrix per draw, (cells, features), from those of minibatches, which lie draw below draw."""
    rows: list[list[sp.csr_matrix]] = [[] for _ in range(n_samples)]
    for arrays in found:
        data, indices, indptr, shape = (arrays.pop(f"{site}/{name}") for name in _CSR)
        whole, n = sp.csr_matrix((data, indices, indptr), shape=tuple(shape)), int(shape[0]) // n_samples
        for number, parts in enumerate(rows):
            parts.append(whole[number * n : (number + 1) * n])
    return [sp.vstack(parts, format="csr") for parts in rows]


def _sparse_bytes(
    program: MultiVIProgram, minibatches: Minibatches, features: Mapping[str, Tensor | None], n_samples: int
) -> float:
    """Memory of sparse replicates as dense as the measured counts: 4 bytes for a count, 4 for its place."""
    total = 0.0
    for site, chosen in features.items():
        modality, table = features_at(program, site), minibatches.table
        counts = modality.counts_in(table)
        if counts is None:
            continue
        share = 1.0 if chosen is None else len(chosen) / max(counts.shape[1], 1)
        total += 8.0 * int(counts.crow[-1]) / max(int(modality.measured_in(table).sum()), 1) * share
    return total * minibatches.n_cells * n_samples


def masked_replicate(program: MultiVIProgram, minibatches: Minibatches, number: int, seed: int = 0) -> sp.csr_matrix:
    """The replicate of this number, of all features: a matrix (cells, G + M), empty where nothing was measured."""
    rows: list[sp.csr_matrix] = []
    for cells in minibatches:
        # One draw, of another seed each time, so that a single replicate is in memory.
        one = CellNoise(cells.index[:1], seed, number).torch_seed("whole", of_cells=False)
        (_, found) = next(replicate(program, cells, 1, one))
        parts = [found[site].values[0] * where_measured(cells, site) for site in count_sites(program)]
        rows.append(sp.csr_matrix(torch.cat(parts, -1).cpu().numpy()))
    return sp.vstack(rows, format="csr")


def observed_matrix(program: MultiVIProgram, minibatches: Iterable[Cells]) -> sp.csr_matrix:
    """Measured counts as :func:`masked_replicate` lays them out."""
    rows: list[sp.csr_matrix] = []
    for cells in minibatches:
        parts = [counts_of(program, cells, site)[0] for site in count_sites(program)]
        rows.append(sp.csr_matrix(torch.cat(parts, -1).cpu().numpy()))
    return sp.vstack(rows, format="csr")


def check_memory(n_bytes: float, what: str, alternatives: Sequence[str]) -> None:
    """Refuse results that would not fit into memory.

    Raises
    ------
    MemoryError
        If more than :data:`MEMORY_LIMIT` is needed.

    Examples
    --------
    >>> check_memory(8e9, "100 replicates of 50 cells", ["fewer n_samples"])
    Traceback (most recent call last):
        ...
    MemoryError: 100 replicates of 50 cells would take about 8.0 GB, more than the limit of 4.3 GB: ask for fewer
    n_samples.
    """
    if n_bytes > MEMORY_LIMIT:
        raise MemoryError(
            f"{what} would take about {n_bytes / 1e9:.1f} GB, more than the limit of {MEMORY_LIMIT / 1e9:.1f} GB: "
            f"ask for {', or '.join(alternatives)}."
        )


def _opened(counts: Tensor) -> Tensor:
    return (counts > 0).to(counts.dtype)
