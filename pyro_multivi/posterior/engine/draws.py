"""Draws of the latents from the guide, and their replay by the model: the engine of every posterior quantity.

The guide is run once per minibatch and gives S draws of every latent site, which the model then
replays. Wide sites are passed on as :class:`~pyro_multivi.distributions.Readout`, so that features that are not
wanted cost nothing, and nothing of size cells x features x draws is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_multivi.data.checks import check_mapping, check_type, checked, name_list
from pyro_multivi.data.minibatch import Cells
from pyro_multivi.data.modality import ATAC, MODALITIES, Modality
from pyro_multivi.distributions import Readout
from pyro_multivi.distributions.kernels.readout import Link
from pyro_multivi.posterior.engine.cell_noise import CellNoise, MirroredNoise
from pyro_multivi.posterior.engine.depth_regression import imputation_depth
from pyro_multivi.posterior.engine.posterior_scale import NoMeanError, corrected, corrected_depth, mean_of
from pyro_multivi.posterior.engine.stored_posterior import guide_of
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import Uncondition, evaluation_mode, is_deterministic, is_of_cells

#: Draws x cells decoded together. Their hidden layers, and a block of 4 096 of their features (the
#: width at which a softmax is summed), take 2 and 64 MB in float32.
ROWS = 4096
#: Entries of sparse rows collected together: 128 MB, and twice that while they are joined.
ENTRIES = 2**24


def cells_at_a_time(batch_size: int, n_samples: int, whole_rows: int = 0) -> int:
    """Number of cells of a minibatch such that its draws stay within bounds.

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


@checked
def draw(
    program: MultiVIProgram,
    cells: Cells,
    sites: str | Sequence[str] = ("rho", "p"),
    n_samples: int = 1,
    intervene: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draw from the posterior of some cells.

    Parameters
    ----------
    program
        Model and guide. Both are traced, so that overridden ones are used.
    cells
        B cells.
    sites
        Names of sites of the model: ``"z"``, ``"l"``, ``"d"``, ``"rho"``, ``"p"``, those of an
        extension, or ``"x"`` and ``"y"`` (and other observed sites) for predicted counts, measured or not.
        The library size of cells without RNA and the cell factor of cells without ATAC follow from
        :func:`imputation_latents`.
    n_samples
        Number of draws S.
    intervene
        Values to force on sites of the model, as :func:`pyro.poutine.do` does. ``{"s": design}``
        puts the cells into another batch; the guide sees their own one.
    seed
        Seed of the draws. A draw depends on its cell (``cells.index``) and its number, not
        on the other cells or on S. Predicted counts are the exception: they depend on how
        the cells are cut into minibatches.

    Returns
    -------
    dict
        Values by site, (S, B, ...), or (S, 1, ...) where all cells share them. ``rho`` and ``p`` are not
        evaluated yet: take ``.select(features)`` of some features, ``.blocks()`` of all, or any tensor
        operation for the dense values.

    Raises
    ------
    ValueError, TypeError
        If there is no such site, ``n_samples`` is below 1, or an argument is of the wrong type.

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
    check_type("program", program, MultiVIProgram)
    check_type("cells", cells, Cells, ": model.minibatch(...) makes them of a model's data")
    sites = name_list("sites", sites)
    if not sites:
        raise ValueError("sites=() is not allowed: name at least one site of the model.")
    for name, value in check_mapping("intervene", intervene, "{'s': design}").items():
        check_type(f"intervene[{name!r}]", value, Tensor)
    with evaluation_mode(program):
        latents = draw_latents(program, cells, n_samples, seed)
        return replay(program, cells, latents, sites, intervene, seed)


@dataclass(frozen=True)
class Latents:
    """Trace of the guide for some cells, whose latent sites hold S draws, (S, B, ...).

    ``noise`` is the noise of these draws; None where the sites hold the means of their posteriors, or NaN where these
    have none.
    """

    trace: Trace
    n_samples: int
    noise: CellNoise | None
    #: The same with other categories, which have no mean either: what differs depends on them.
    other: Latents | None = None

    @property
    def without_mean(self) -> list[str]:
        """Names of the sites that hold NaN, or a category."""
        nodes: dict[str, Any] = dict(self.trace.nodes)
        return [name for name, node in nodes.items() if node.get("without_mean")]

    def at(self, site: str, value: Tensor) -> Latents:
        """Latents with another value of one site."""
        trace = self.trace.copy()
        nodes: Any = trace.nodes
        nodes[site] = {**nodes[site], "value": value}
        return Latents(trace, self.n_samples, self.noise)

    def some(self, draws: slice) -> Latents:
        """Some of the draws, without the guide's distributions."""
        trace = Trace()
        nodes: dict[str, Any] = dict(self.trace.nodes)
        for name, node in nodes.items():
            if node["type"] == "sample" and not site_is_subsample(node):
                trace.add_node(name, **{**node, "value": node["value"][draws], "fn": None})
        return Latents(trace, len(range(self.n_samples)[draws]), self.noise)


def draw_latents(
    program: MultiVIProgram,
    cells: Cells,
    n_samples: int = 1,
    seed: int = 0,
    first: int = 0,
    *,
    as_trained: bool = False,
) -> Latents:
    """Draw every latent of the guide S times, numbered from ``first``. For use within ``evaluation_mode``.

    With ``as_trained`` all are drawn from the guide itself, for the ELBO; otherwise with the standard deviations of
    :mod:`~pyro_multivi.posterior.engine.posterior_scale`.
    """
    noise = CellNoise(cells.index, seed, first)
    return Latents(_guide_trace(program, cells, n_samples, Fill(program, cells, noise, as_trained)), n_samples, noise)


def mirrored_latents(program: MultiVIProgram, cells: Cells, n_samples: int) -> Latents:
    """Latents at the same points of every cell's posterior, for an average. For use within ``evaluation_mode``."""
    noise = MirroredNoise(cells.index, seed=0)
    return Latents(_guide_trace(program, cells, n_samples, Fill(program, cells, noise)), n_samples, noise)


def mean_latents(program: MultiVIProgram, cells: Cells) -> Latents:
    """Posterior mean of every latent, as one draw. For use within ``evaluation_mode``."""
    first, last = Fill(program, cells, None), Fill(program, cells, None)
    last.place = -1
    latents = Latents(_guide_trace(program, cells, 1, first), 1, None)
    return (
        replace(latents, other=Latents(_guide_trace(program, cells, 1, last), 1, None)) if first.categories else latents
    )


def replay(
    program: MultiVIProgram,
    cells: Cells,
    latents: Latents,
    sites: Sequence[str],
    intervene: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Values of sites of the model at given latents, (S, B, ...). For use within ``evaluation_mode``."""
    values: dict[str, Tensor] = {}
    for names, changed in imputation_latents(program, cells, latents, sites):
        values |= _values(program, cells, changed, names, dict(intervene or {}), seed)
    others = {} if latents.other is None else replay(program, cells, latents.other, sites, intervene, seed)
    for name, other in others.items():
        if not all(map(torch.equal, _parts(values[name]), _parts(other))):
            raise NoMeanError.of(latents.without_mean[0])
    return {name: values[name] for name in sites}


def _values(
    program: MultiVIProgram, cells: Cells, latents: Latents, sites: Sequence[str], forced: dict[str, Any], seed: int
) -> dict[str, Tensor]:
    def trace(model: Any) -> dict[str, Any]:
        return dict(model_trace(poutine.do(model, forced) if forced else model, cells, latents).nodes)

    nodes, unknown = trace(program.model), latents.without_mean
    known = [name for name, node in nodes.items() if node["type"] == "sample" and not site_is_subsample(node)]
    for argument, names in (("sites", sites), ("intervene", forced)):
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: {name!r} is no site of this model: choose from {', '.join(known)}.")
    if unknown and any(_needs(nodes[name]) for name in sites):
        raise NoMeanError.of(unknown[0])
    if any(nodes[name]["is_observed"] and not is_deterministic(nodes[name]) for name in sites):
        # Counts are drawn. Nothing wide was evaluated so far: the second trace is what costs.
        torch.manual_seed(CellNoise(cells.index, seed).torch_seed("counts"))
        nodes = trace(Uncondition()(program.model))
    values = {}
    for name in sites:
        fn = nodes[name]["fn"]
        # A trace holds the factual value of a site that was intervened on.
        value = forced.get(name, nodes[name]["value"])
        values[name] = value.detach().expand(fn.batch_shape + value.shape[value.dim() - fn.event_dim :])
    return values


def imputation_latents(
    program: MultiVIProgram, cells: Cells, latents: Latents, sites: Iterable[str], known_depth: Modality | None = None
) -> list[tuple[list[str], Latents]]:
    """Latents to decode sites from, with the sites that share them. For use within ``evaluation_mode``.

    Sites of a modality that some cells lack, while they have another, get a depth of their own: in these cells it
    is predicted by :mod:`~pyro_multivi.posterior.engine.depth_regression`, unless it is that of ``known_depth``. All
    other sites are decoded from the latents that the guide drew.
    """
    nodes: dict[str, Any] = dict(latents.trace.nodes)
    parts: list[tuple[list[str], Latents]] = []
    rest = list(sites)
    for modality in MODALITIES:
        names = [name for name in rest if name in modality.sites]
        measured = modality.measured_in(cells)
        if not names or bool(measured.all()) or modality == known_depth:
            continue
        depth = imputation_depth(program, cells, modality, nodes, latents.n_samples, latents.noise)
        if depth is not None:
            imputed = ~measured & torch.stack([other.measured_in(cells) for other in MODALITIES]).any(0)
            drawn = torch.where(imputed, depth, nodes[modality.depth]["value"])
            parts.append((names, latents.at(modality.depth, drawn)))
            rest = [name for name in rest if name not in names]
    return [*parts, (rest, latents)] if rest else parts


def model_trace(model: Any, cells: Cells, latents: Latents) -> Trace:
    """Trace of a model at given latents. For use within ``evaluation_mode``."""
    # The plate lies inside the replay: a handler that gives values hides sites from plates around it.
    return poutine.trace(poutine.replay(_repeated(model, latents.n_samples), trace=latents.trace)).get_trace(cells)


def _needs(node: Any) -> bool:
    """Whether a site of the model was computed from a NaN; of counts, which would be drawn, it is assumed."""
    is_counts = node["is_observed"] and not is_deterministic(node)
    return is_counts or any(bool(part.isnan().any()) for part in _parts(node["value"]))


def _parts(value: Any) -> list[Tensor]:
    return [value.hidden, value.weight, value.bias] if isinstance(value, Readout) else [value]


def region_factors(program: MultiVIProgram) -> Tensor | None:
    """Factor r of each region, (M,), at its posterior mean; None where the model has none."""
    with evaluation_mode(program), Fill(program, None, None):
        guide = poutine.trace(program.guide_shared).get_trace()
        factors: Tensor | None = poutine.replay(program.region_factors, trace=guide)()
    unknown = Latents(guide, 1, None).without_mean
    if unknown and factors is not None and bool(factors.isnan().any()):
        raise NoMeanError.of(unknown[0], "tests of regions and get_region_factors need one")
    return factors


def feature_blocks(
    values: Tensor, features: Tensor | None, width: int, which: slice = slice(None)
) -> Iterator[tuple[slice, Tensor]]:
    """Dense values of some features (default all), ``width`` at a time.

    Parameters
    ----------
    values
        (..., F), a readout or dense.
    features
        Positions in [0, F), (k,), int64.
    width
        Most features in a block.
    which
        Blocks to evaluate (default all), as those of one of several processes.

    Yields
    ------
    slice, Tensor
        Positions among the k features, and their values, (..., width).
    """
    if not isinstance(values, Readout):
        chosen = values if features is None else values[..., features]
        for start in range(0, chosen.shape[-1], width)[which]:
            block = slice(start, min(start + width, chosen.shape[-1]))
            yield block, chosen[..., block]
    elif features is None:
        yield from values.blocks(width, which)
    elif len(features) <= width:
        if range(1)[which]:
            yield slice(0, len(features)), values.select(features)
    else:
        # A softmax is summed over all features once, not once for each block.
        norm = values.log_normalizer()[..., None] if values.link == "softmax" else None
        link: Link = values.link if norm is None else "identity"
        for block, block_values in values.of_features(features, link).blocks(width, which):
            yield block, block_values if norm is None else (block_values - norm).exp()


def _guide_trace(program: MultiVIProgram, cells: Cells, n_samples: int, fill: Fill) -> Trace:
    with fill:
        return poutine.trace(_repeated(guide_of(program, cells), n_samples)).get_trace(cells)


def _repeated(statements: Any, n_samples: int) -> Callable[[Cells], None]:
    """Statements of a model or guide for S draws at once, in a dimension on the left of all others."""

    def run(cells: Cells) -> None:
        with pyro.plate("draws", n_samples, dim=-2):
            statements(cells)

    return run


class Fill(Messenger):
    """Handler that sets each latent site of a guide: to a draw from a cell's noise, or to the mean without any.

    Where a guide of one's own fixes d at a point, d of a cell without ATAC still follows its prior, as every
    latent does of which nothing was measured.
    """

    def __init__(
        self, program: MultiVIProgram, cells: Cells | None, noise: CellNoise | None, as_trained: bool = False
    ) -> None:
        super().__init__()
        self.program, self.cells, self.noise, self.as_trained = program, cells, noise, as_trained
        # Which of its values a site that is a category, without a mean, is set to; and names of such sites.
        self.place, self.categories = 0, list[str]()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or site_is_subsample(msg):
            return
        name, fn, cells = msg["name"], msg["fn"], self.cells
        of_cells = is_of_cells(msg)
        if name == "z" and cells is not None and not self.as_trained:
            fn = msg["fn"] = corrected(self.program, cells, fn)
        elif of_cells and cells is not None and self.noise is not None and not self.as_trained:
            fn = msg["fn"] = corrected_depth(self.program, cells, name, fn)
        try:
            value = self._value(name, fn, of_cells)
        except NoMeanError:
            # Of the state nearly everything is decoded. What another site matters to says so when it is asked for.
            if name == "z":
                raise
            msg["without_mean"] = True
            if fn.has_enumerate_support:
                self.categories.append(name)
                value = fn.enumerate_support()[self.place]
            else:
                value = torch.full_like(fn.sample(), torch.nan)
        is_point = name == ATAC.depth and isinstance(fn, dist.Delta)
        if is_point and cells is not None and cells.atac_size is None and not bool(cells.has_atac.all()):
            prior = self.program.cell_factor_prior(cells, cells.design).expand(fn.batch_shape)
            value = torch.where(cells.has_atac, value, self._value(name, prior, of_cells))
            msg["fn"] = dist.Delta(value)
        msg["value"] = value

    def _value(self, name: str, fn: Any, of_cells: bool) -> Tensor:
        return mean_of(name, fn) if self.noise is None else self.noise.draw(name, fn, of_cells)
