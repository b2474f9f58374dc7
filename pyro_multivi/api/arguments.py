"""Arguments of the analyst's methods: their types, and what the posterior functions take in their place."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from pyro_multivi.api.scvi_tools.arguments import tell_difference
from pyro_multivi.data.checks import (
    check_number,
    check_probability,
    first_names,
    least_draws,
    nearest,
    shown,
    unwrapped,
)
from pyro_multivi.data.loader import Minibatches
from pyro_multivi.data.minibatch import AnyModality, Panels
from pyro_multivi.data.modality import ATAC, PROTEIN, RNA
from pyro_multivi.data.selection import as_list, check_order, refuse_numbers_for_mask
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.table import CellTable
from pyro_multivi.posterior.engine.decode import Average
from pyro_multivi.posterior.engine.draws import region_factors
from pyro_multivi.posterior.quantities.estimates import Quantity
from pyro_multivi.program import MultiVIProgram

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from numpy.typing import ArrayLike

logger = logging.getLogger("pyro_multivi")

#: Cells and what was measured in them.
Data: TypeAlias = "AnnData | MuData"
#: Cells by position (negative ones count from the end), name or mask; None for all.
Indices: TypeAlias = "ArrayLike | None"
#: Features in the same ways.
FeatureList: TypeAlias = "ArrayLike | None"
#: A batch by name or code, or several; None for each cell's own.
Batches: TypeAlias = "str | int | Sequence[str | int] | None"
#: A number, one number per cell, or ``"latent"``.
LibrarySize: TypeAlias = "float | str | ArrayLike"
#: File to write.
OutPath: TypeAlias = "str | os.PathLike[str]"


class _Options(TypedDict, total=False):
    """Arguments of both estimates that do not decide the type of the result; the overloads name those that do."""

    n_samples_overall: int | None
    transform_batch: Batches
    use_z_mean: bool
    n_samples: int
    batch_size: int
    silent: bool | None
    seed: int


class ExpressionOptions(_Options, total=False):
    """Such arguments of expression."""

    gene_list: FeatureList
    library_size: LibrarySize


class AccessibilityOptions(_Options, total=False):
    """Such arguments of accessibility."""

    region_list: FeatureList
    normalize_cells: bool
    normalize_regions: bool
    detection: bool


class ImputeOptions(_Options, total=False):
    """Such arguments of imputation."""

    library_size: LibrarySize
    threshold: float | None
    normalize_cells: bool
    normalize_regions: bool
    include_protein_background: bool
    measured_too: bool
    return_interval: float | None


def choose_features(
    spec: DataSpec,
    modality: AnyModality,
    wanted: FeatureList,
    device: torch.device,
    measured: Tensor | None = None,
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Positions, int64, and names of the features meant by a list of names or positions, or a mask, in their order.

    One name stands for a list of one; None stands for all features, and for their positions. With ``measured``, (F,),
    only those that are true in it are chosen.

    Raises
    ------
    ValueError
        If a name is unknown or given twice, a position is out of range, nothing is selected, or something that was not
        measured.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> spec = SimpleNamespace(gene_names=("ACTB", "CD3E", "CD4"))
    >>> choose_features(spec, RNA, ["CD4", "ACTB"], torch.device("cpu"))
    (tensor([2, 0]), ('CD4', 'ACTB'))
    """
    argument, what, names = modality.list_argument, modality.feature, modality.feature_names_in(spec)
    if measured is not None:
        chosen_features = choose_features(spec, modality, wanted, device)
        return _among_measured(measured, chosen_features, modality, names, wanted is None)
    if wanted is None:
        return None, names
    chosen = as_list(argument, wanted)
    if chosen.ndim != 1:
        raise ValueError(f"{argument}={shown(wanted)} has {chosen.ndim} dimensions: give a flat list of {what} names.")
    if chosen.dtype == bool:
        if len(chosen) != len(names):
            raise ValueError(
                f"{argument} is a mask of {len(chosen)} and the model has {len(names)} {what}s: give one value for "
                "each of these, or names, such as adata.var_names[mask]."
            )
        check_order(argument, wanted, names)
        chosen = np.flatnonzero(chosen)
    elif chosen.dtype.kind in "iu":
        refuse_numbers_for_mask(argument, wanted, chosen, names)
    if chosen.size == 0:
        raise ValueError(f"{argument} selects no {what}: give at least one, or None for all.")
    if chosen.dtype.kind in "iu":
        outside = chosen[(chosen < -len(names)) | (chosen >= len(names))]
        if len(outside):
            raise ValueError(f"{argument} holds position {outside[0]}, and the model has {len(names)} {what}s.")
        places = np.where(chosen < 0, chosen + len(names), chosen)
    else:
        place = {name: number for number, name in enumerate(names)}
        unknown = [str(name) for name in chosen.tolist() if not isinstance(name, str) or name not in place]
        if unknown:
            raise ValueError(
                f"{argument} holds {first_names(unknown)}: no {what} of the model. {nearest(unknown[0], names)}"
            )
        places = np.array([place[name] for name in chosen.tolist()])
    found, count = np.unique(places, return_counts=True)
    if (count > 1).any():
        twice = first_names(names[number] for number in found[count > 1])
        raise ValueError(f"{argument} holds {twice} more than once: give each {what} once.")
    return torch.from_numpy(places.astype(np.int64)).to(device), tuple(names[place] for place in places.tolist())


def measured_features(
    table: CellTable, modality: AnyModality, index: Tensor | None = None, in_all: bool = True
) -> Tensor | None:
    """Features that were measured in all cells with the modality, or in any, (F,), bool; None where all were in all.

    ``index``, int64, are the cells, by default all of the table.
    """
    panels: Panels | None = modality.panels_in(table)
    if panels is None:
        return None
    cells = modality.measured_in(table) if index is None else index[modality.measured_in(table)[index]]
    measured = panels.measured[panels.code[cells].unique()]
    return measured.all(0) if in_all else measured.any(0)


def _among_measured(
    measured: Tensor,
    chosen: tuple[Tensor | None, tuple[str, ...]],
    modality: AnyModality,
    every: tuple[str, ...],
    of_all: bool,
) -> tuple[Tensor, tuple[str, ...]]:
    """Chosen features that were measured in all cells: all of them, unless everything was chosen."""
    places = torch.arange(len(every)) if chosen[0] is None else chosen[0].cpu()
    there = measured[places]
    lacking = [name for name, is_there in zip(chosen[1], there.tolist(), strict=True) if not is_there]
    if lacking and not of_all:
        raise ValueError(
            f"{modality.list_argument} holds {first_names(lacking)}, which were not measured in all of these cells: "
            "leave them out. get_normalized_expression and get_accessibility_estimates impute them."
        )
    if len(lacking) == len(chosen[1]):
        raise ValueError(
            f"No {modality.feature} was measured in all of these cells: choose cells of one batch (indices), whose "
            f"{modality.features} are the same."
        )
    if lacking:
        logger.info("%d %s were not measured in all of these cells and are left out.", len(lacking), modality.features)
    kept = places[there]
    device = kept.device if chosen[0] is None else chosen[0].device
    return kept.to(device), tuple(every[place] for place in kept.tolist())


def average_over(
    spec: DataSpec,
    transform_batch: Batches,
    n_samples: int,
    n_samples_overall: int | None,
    use_z_mean: bool,
    return_mean: bool,
    return_interval: float | None,
    seed: int,
) -> Average:
    """Average over draws and batches that a method's arguments describe.

    Raises
    ------
    ValueError
        If they are out of range or contradict each other.
    """
    n_draws = n_samples if n_samples_overall is None else n_samples_overall
    if n_samples not in (1, n_draws):
        raise ValueError(
            f"n_samples={n_samples} and n_samples_overall={n_samples_overall} both mean the number of draws "
            "averaged: give one of them."
        )
    if n_samples_overall is not None:
        tell_difference("n_samples_overall")
    if return_interval is not None:
        level = check_probability("return_interval", return_interval, 0.9)
        if not return_mean:
            raise ValueError("return_interval is a summary of the draws, return_mean=False asks for them: choose one.")
        least = least_draws(level)
        if n_draws < least:
            raise ValueError(
                f"return_interval={return_interval!r} needs at least {least} draws, n_samples is {n_draws}: "
                f"give n_samples={max(100, least)}."
            )
    return Average(
        n_samples=n_draws,
        use_mean=use_z_mean,
        batches=spec.batch_codes("transform_batch", transform_batch),
        level=return_interval,
        # One draw has nothing to average over: it is returned as a mean is, as in scvi-tools.
        keep_draws=not return_mean and n_draws > 1,
        seed=seed,
    )


def library_factor(library_size: LibrarySize, cells: Minibatches, program: MultiVIProgram) -> float | Tensor | str:
    """Factor of each cell's expression, from the argument ``library_size``, which is in units of known size factors.

    Raises
    ------
    ValueError
        If it is neither a positive number, nor one per cell in the order of the cells, nor ``"latent"``.
    """
    library_size = unwrapped(library_size)
    if isinstance(library_size, str):
        if library_size != "latent":
            raise ValueError(
                f"library_size={library_size!r} is not allowed: give 'latent', a number, or one number per cell."
            )
        return RNA.depth
    if np.ndim(library_size) == 0:
        size = check_number("library_size", library_size)
        if size <= 0:
            raise ValueError(f"library_size={library_size!r} is not allowed: a library size is positive.")
        return size * library_unit(program)
    try:
        sizes = np.asarray(library_size, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"library_size={shown(library_size)} is not allowed: give 'latent', a number, or one number per cell."
        ) from error
    if sizes.shape != (cells.n_cells,):
        raise ValueError(
            f"library_size has shape {sizes.shape} and {cells.n_cells} cells are asked for: give one number per cell."
        )
    check_order("library_size", library_size, cells.cell_names)
    wrong = ~(np.isfinite(sizes) & (sizes > 0))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(f"library_size holds {sizes[at]} at position {at}: a library size is finite and positive.")
    return torch.from_numpy(sizes * np.float32(library_unit(program))).to(program.library_log_mean.device)


def library_unit(program: MultiVIProgram) -> float:
    """Counts of a cell of size factor 1, where these are known; else 1, since library sizes are counts."""
    return program.library_log_unit.exp().item() if program.config.library == "size_factor" else 1.0


def accessibility_of(
    program: MultiVIProgram,
    threshold: float | None,
    normalize_cells: bool,
    normalize_regions: bool,
    regions: Tensor | None = None,
    detection: bool = False,
) -> Quantity:
    """Accessibility of regions that a method's arguments describe.

    Counts of fragments determine p only up to the rate of a region, so that theirs is always multiplied in.
    """
    fragments = program.config.counts_fragments
    factors = region_factors(program) if normalize_regions or fragments else None
    theta = program.region_log_theta.exp() if program.config.accessibility_likelihood == "nb" else None
    if fragments and normalize_cells and factors is not None:
        factors = factors / program.atac_log_depth.exp()
    factors, theta = (each if each is None or regions is None else each[regions] for each in (factors, theta))
    by_cell = ATAC.depth if normalize_cells else 1.0
    return Quantity(
        ATAC.decoded, regions, by_cell, factors, threshold, detection=detection and fragments, inverse_dispersion=theta
    )


def imputed_quantities(
    program: MultiVIProgram,
    modalities: Sequence[AnyModality],
    library: float | Tensor | str,
    threshold: float | None,
    normalize_cells: bool,
    normalize_regions: bool,
    include_protein_background: bool,
) -> list[Quantity]:
    """Quantity of each modality that is imputed, by arguments of the method."""
    found = []
    for modality in modalities:
        if modality == ATAC:
            found.append(accessibility_of(program, threshold, normalize_cells, normalize_regions))
        elif modality == RNA:
            found.append(Quantity(RNA.decoded, by_cell=library))
        else:
            site = f"{PROTEIN}_mean" if include_protein_background and modality.counts == PROTEIN else modality.decoded
            found.append(Quantity(site))
    return found


def as_json(value: Any, several: str = "") -> Any:
    """A name or number, or a list of them, as JSON holds it; ``several`` stands for a list if it is given."""
    found = unwrapped(value)
    single = found is None or isinstance(found, (str, int, float))
    return found if single else several or [unwrapped(each) for each in found]


def check_threshold(threshold: float | None, average: Average) -> None:
    """Refuse a threshold outside [0, 1], or of results that are more than one sparse matrix.

    Raises
    ------
    ValueError
    """
    if threshold is None:
        return
    if not 0 <= check_number("threshold", threshold) <= 1:
        raise ValueError(f"threshold={threshold!r} is not allowed: accessibility lies between 0 and 1.")
    if average.level is not None or average.keep_draws:
        other = "return_mean=False" if average.keep_draws else f"return_interval={average.level}"
        raise ValueError(f"threshold makes one sparse matrix of estimates, {other} asks for more: choose one.")


def check_paired(table: CellTable, extra: Iterable[str], advice: str) -> None:
    """Refuse cells that lack a modality, or one of some extra modalities."""
    n_lacking = int((~table.has_all(extra)).sum())
    if n_lacking:
        raise ValueError(f"fully_paired=True, but {n_lacking} of {len(table)} cells lack a modality: {advice}")
