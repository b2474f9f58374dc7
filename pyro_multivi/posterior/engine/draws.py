"""The one engine behind every posterior quantity: draws of the latents, and what the model makes of them.

The guide is run once per minibatch and gives S draws of every latent site, which the model then
replays. Wide sites are handed on as :class:`~pyro_multivi.distributions.Readout`: nobody pays for
a feature that is not asked for, and nothing of size cells x features x draws is ever made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_multivi.data.minibatch import Cells
from pyro_multivi.distributions import Readout
from pyro_multivi.posterior.engine.cell_noise import CellNoise
from pyro_multivi.posterior.engine.depth_regression import TRANSFORM, is_inferred, mean_depth, predicted
from pyro_multivi.posterior.engine.population_mixture import MIXTURE_WEIGHT, AggregatePosterior, mixed, normal_in
from pyro_multivi.program import MultiVIProgram, is_of_cells
from pyro_multivi.traces import evaluation_mode, is_deterministic

#: Draws x cells decoded together. Their hidden layers, and a block of 4 096 of their features (the
#: width at which a softmax is summed), take 2 and 64 MB in float32.
ROWS = 4096
#: Entries of sparse rows collected together: 128 MB, and twice that while they are joined.
ENTRIES = 2**24


def cells_at_a_time(batch_size: int, n_samples: int, whole_rows: int = 0) -> int:
    """Cells of a minibatch such that its draws stay within bounds.

    Parameters
    ----------
    batch_size
        Cells at most.
    n_samples
        Draws of each: cells x draws are at most :data:`ROWS`.
    whole_rows
        Number of features of which a cell's estimates are collected before they are passed on, as
        sparse rows are; cells x features are then at most :data:`ENTRIES`.

    Examples
    --------
    >>> cells_at_a_time(512, 1), cells_at_a_time(512, 100), cells_at_a_time(512, 1, whole_rows=80_000)
    (512, 40, 209)
    """
    fit = ENTRIES // whole_rows if whole_rows else batch_size
    return min(batch_size, max(1, min(ROWS // n_samples, fit)))


def draw(
    program: MultiVIProgram,
    cells: Cells,
    sites: Sequence[str] = ("rho", "p"),
    n_samples: int = 1,
    intervene: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw from the posterior of some cells.

    Parameters
    ----------
    program
        Model and guide; overridden ones are honoured, for both are traced.
    cells
        B cells.
    sites
        Names of sites of the model: ``"z"``, ``"l"``, ``"d"``, ``"rho"``, ``"p"``, those of an
        extension, or ``"x"`` and ``"y"`` (and other observed sites) for predicted counts, measured or not.
        Expression and library size of cells without RNA, accessibility and cell factor of cells without ATAC
        are those of :func:`imputation_latents`; ``"z"`` itself is the guide's.
    n_samples
        Number of draws S.
    intervene
        Values to force on sites of the model, as :func:`pyro.poutine.do` does. ``{"s": design}``
        asks what would be in another batch; the guide never sees it.
    seed
        Of the draws. A draw belongs to a cell (its ``cells.index``) and to its number: it does not
        depend on the other cells or on S. Predicted counts are the exception: they depend on how
        the cells are cut into minibatches.

    Returns
    -------
    dict
        By site, (S, B, ...), or (S, 1, ...) where all cells share it. ``rho`` and ``p`` are not
        evaluated yet: take ``.select(features)`` of some features, ``.blocks()`` of all, or any tensor
        operation for the dense values.

    Raises
    ------
    ValueError
        If there is no such site, or ``n_samples`` is below 1.

    Examples
    --------
    >>> from pyro_multivi import ProgramConfig
    >>> program = MultiVIProgram(ProgramConfig(n_genes=20, n_regions=30, n_hidden=8, n_latent=2))
    >>> cells = Cells(index=torch.arange(4), n_total=4, x=torch.ones(4, 20), y=torch.ones(4, 30),
    ...               has_rna=torch.ones(4, dtype=torch.bool), has_atac=torch.ones(4, dtype=torch.bool),
    ...               design=torch.ones(4, 1))
    >>> drawn = draw(program, cells, ("z", "rho"), n_samples=5)
    >>> drawn["z"].shape, drawn["rho"].select(torch.tensor([0, 3])).shape
    (torch.Size([5, 4, 2]), torch.Size([5, 4, 2]))
    """
    if n_samples < 1:
        raise ValueError(f"n_samples={n_samples} is not allowed: give at least 1.")
    with evaluation_mode(program):
        latents = draw_latents(program, cells, n_samples, seed)
        return replay(program, cells, latents, sites, intervene, seed)


@dataclass(frozen=True)
class Latents:
    """What the guide says of some cells: a trace whose latent sites hold S draws, (S, B, ...).

    ``noise`` is what they were drawn with; None where they are the means of their posteriors.
    """

    trace: Trace
    n_samples: int
    noise: CellNoise | None

    def at(self, site: str, value: Tensor) -> Latents:
        """The same latents but for the value of one site."""
        trace = self.trace.copy()
        nodes: Any = trace.nodes
        nodes[site] = {**nodes[site], "value": value}
        return Latents(trace, self.n_samples, self.noise)

    def some(self, draws: slice) -> Latents:
        """Some of the draws; of the guide's distributions nothing is known any more."""
        trace = Trace()
        nodes: dict[str, Any] = dict(self.trace.nodes)
        for name, node in nodes.items():
            if node["type"] == "sample" and not site_is_subsample(node):
                trace.add_node(name, **{**node, "value": node["value"][draws], "fn": None})
        return Latents(trace, len(range(self.n_samples)[draws]), self.noise)


def draw_latents(program: MultiVIProgram, cells: Cells, n_samples: int = 1, seed: int = 0, first: int = 0) -> Latents:
    """Draw every latent of the guide S times, numbered from ``first``. For use within ``evaluation_mode``."""
    noise = CellNoise(cells.index, seed, first)
    return Latents(_guided(program, cells, n_samples, noise), n_samples, noise)


def mean_latents(program: MultiVIProgram, cells: Cells) -> Latents:
    """Every latent at the mean of its posterior, as one draw. For use within ``evaluation_mode``."""
    return Latents(_guided(program, cells, 1, None), 1, None)


def replay(
    program: MultiVIProgram,
    cells: Cells,
    latents: Latents,
    sites: Sequence[str],
    intervene: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    *,
    plain: bool = False,
) -> dict[str, Tensor]:
    """Values of sites of the model at given latents, (S, B, ...). For use within ``evaluation_mode``.

    ``plain`` leaves the latents as they are where :func:`imputation_latents` would change them.
    """
    parts = [(list(sites), latents)] if plain else imputation_latents(program, cells, latents, sites)
    values: dict[str, Tensor] = {}
    for names, trusted in parts:
        values |= _values(program, cells, trusted, names, dict(intervene or {}), seed)
    return {name: values[name] for name in sites}


def _values(
    program: MultiVIProgram, cells: Cells, latents: Latents, sites: Sequence[str], forced: dict[str, Any], seed: int
) -> dict[str, Tensor]:
    def trace(model: Any) -> dict[str, Any]:
        return dict(model_trace(poutine.do(model, forced) if forced else model, cells, latents).nodes)

    nodes = trace(program.model)
    known = [name for name, node in nodes.items() if node["type"] == "sample" and not site_is_subsample(node)]
    for name in (*sites, *forced):
        if name not in known:
            raise ValueError(f"{name!r} is no site of this model: choose from {', '.join(known)}.")
    if any(is_measured(nodes[name]) for name in sites):
        # Nothing wide was evaluated so far: the second trace is what costs.
        torch.manual_seed(CellNoise(cells.index, seed).torch_seed("counts"))
        nodes = trace(poutine.uncondition(program.model))
    values = {}
    for name in sites:
        fn = nodes[name]["fn"]
        # A trace holds the factual value of a site that was intervened on.
        value = forced.get(name, nodes[name]["value"])
        values[name] = value.detach().expand(fn.batch_shape + value.shape[value.dim() - fn.event_dim :])
    return values


def imputation_latents(
    program: MultiVIProgram, cells: Cells, latents: Latents, sites: Iterable[str], known_depth: str | None = None
) -> list[tuple[list[str], Latents]]:
    """Sites that are decoded from the same latents, and these. For use within ``evaluation_mode``.

    Where a cell has only the other modality than a site belongs to, z is that of the cell or of another one
    (:mod:`~pyro_multivi.posterior.engine.population_mixture`), and l or d is what the other modality says of it
    (:mod:`~pyro_multivi.posterior.engine.depth_regression`), unless it is ``known_depth`` or z has no Normal posterior.
    Without such cells, and where neither was learned, all sites have the latents that the guide drew.
    """
    found: list[tuple[list[str], Latents]] = []
    plain = list(sites)
    for names, site, depth, has, other in (
        (("rho", "x", "l"), "x", "l", cells.has_rna, cells.has_atac),
        (("p", "y", "d"), "y", "d", cells.has_atac, cells.has_rna),
    ):
        wanted = [name for name in plain if name in names]
        if not wanted or bool(has.all()):
            continue
        trusted, told_by_other = latents, ~has & other
        trust = float(getattr(program, MIXTURE_WEIGHT[site]))
        population = AggregatePosterior.of(program, site) if trust != 1 else None
        if population is not None:
            z = _node(latents, "z")["value"]
            batch = cells.design[:, : program.config.n_batch].argmax(1)
            some_of_others = mixed(z, population, trust, batch, latents.noise)
            trusted = trusted.at("z", torch.where(told_by_other[:, None], some_of_others, z))
        if depth != known_depth and is_inferred(program, cells, depth, dict(latents.trace.nodes)):
            posterior = normal_in(_node(latents, "z")["fn"])
            normal = None if posterior is None else predicted(program, cells, depth, posterior.loc)
            if normal is not None:
                told = _told(depth, normal, latents, len(cells))
                trusted = trusted.at(depth, torch.where(told_by_other, told, _node(latents, depth)["value"]))
        if trusted is not latents:
            found.append((wanted, trusted))
            plain = [name for name in plain if name not in wanted]
    return [*found, (plain, latents)] if plain else found


def _told(depth: str, normal: dist.Normal, latents: Latents, n_cells: int) -> Tensor:
    """l or d as the other modality tells it, (S, B): drawn, or its mean where the latents are means."""
    normal = normal.expand((latents.n_samples, n_cells))
    if latents.noise is None:
        return mean_depth(depth, normal)
    value: Tensor = TRANSFORM[depth](latents.noise.draw(f"{depth} told", normal))
    return value


def _node(latents: Latents, site: str) -> Any:
    return latents.trace.nodes[site]


def is_measured(site: Any) -> bool:
    """Whether a site of the model holds data, rather than a latent or what follows from latents."""
    return bool(site["is_observed"]) and not is_deterministic(site)


def model_trace(model: Any, cells: Cells, latents: Latents) -> Trace:
    """The trace of a model at given latents. For use within ``evaluation_mode``."""
    # The plate lies inside the replay: a handler that gives values hides sites from plates around it.
    return poutine.trace(poutine.replay(_drawn(model, latents.n_samples), trace=latents.trace)).get_trace(cells)


def mean_of(name: str, fn: Any) -> Tensor:
    """Mean of a site of the guide.

    Raises
    ------
    ValueError
        If it is not known, as that of a normalising flow.
    """
    try:
        mean: Tensor = fn.mean
    except NotImplementedError as error:
        raise ValueError(
            f"The guide's distribution of {name!r} has no mean: ask for draws (n_samples above 1, use_z_mean=False or "
            "give_mean=False)."
        ) from error
    return mean


def region_factors(program: MultiVIProgram) -> Tensor | None:
    """r of each region, (M,), at the mean of what the guide says of it; None where the model has none."""
    with evaluation_mode(program), _Fill(program, None, None):
        guide = poutine.trace(program.guide_shared).get_trace()
        factors: Tensor | None = poutine.replay(program.region_factors, trace=guide)()
    return factors


def feature_blocks(values: Tensor, features: Tensor | None, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Dense values of some features (default all), ``width`` at a time.

    Parameters
    ----------
    values
        (..., F), a readout or dense.
    features
        Positions in [0, F), (k,), int64.
    width
        Most features in a block.

    Yields
    ------
    slice, Tensor
        Which of the k features, and their values (..., width).
    """
    if not isinstance(values, Readout):
        chosen = values if features is None else values[..., features]
        for start in range(0, chosen.shape[-1], width):
            block = slice(start, min(start + width, chosen.shape[-1]))
            yield block, chosen[..., block]
    elif features is None:
        yield from values.blocks(width)
    elif len(features) <= width:
        yield slice(0, len(features)), values.select(features)
    else:
        # A softmax is summed over all features once, not once for each block of those asked for.
        norm = values.log_normalizer()[..., None] if values.link == "softmax" else None
        link = values.link if norm is None else "identity"
        part = Readout(values.hidden, values.weight[features], values.bias[features], link, values.gemm_dtype)
        for block, block_values in part.blocks(width):
            yield block, block_values if norm is None else (block_values - norm).exp()


def _guided(program: MultiVIProgram, cells: Cells, n_samples: int, noise: CellNoise | None) -> Trace:
    with _Fill(program, cells, noise):
        return poutine.trace(_drawn(program.guide, n_samples)).get_trace(cells)


def _drawn(statements: Any, n_samples: int) -> Callable[[Cells], None]:
    """The statements of a model or guide for S draws at once, on the left of all else."""

    def run(cells: Cells) -> None:
        with pyro.plate("draws", n_samples, dim=-2):
            statements(cells)

    return run


class _Fill(Messenger):
    """Gives each latent site of a guide its value: from a cell's noise, or the mean where there is none.

    The guide holds d of a cell without ATAC at one number that it drew by itself. Here d of such
    cells follows its prior, as every latent does of which nothing was measured.
    """

    def __init__(self, program: MultiVIProgram, cells: Cells | None, noise: CellNoise | None) -> None:
        super().__init__()
        self.program, self.cells, self.noise = program, cells, noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        name, fn, cells = msg["name"], msg["fn"], self.cells
        of_cells = is_of_cells(msg)
        value = self._value(name, fn, of_cells)
        if name == "d" and isinstance(fn, dist.Delta) and cells is not None and _guesses_factor(cells):
            prior = self.program.cell_factor_prior(cells).expand(fn.batch_shape)
            value = torch.where(cells.has_atac, value, self._value(name, prior, of_cells))
            msg["fn"] = dist.Delta(value)
        msg["value"] = value

    def _value(self, name: str, fn: Any, of_cells: bool) -> Tensor:
        return mean_of(name, fn) if self.noise is None else self.noise.draw(name, fn, of_cells)


def _guesses_factor(cells: Cells) -> bool:
    return cells.atac_size is None and not bool(cells.has_atac.all())
