"""A reference's specification and program, grown by the batches and categories of a query."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pyro_multivi.data.modality import PROTEIN, RNA, Modality, modelled
from pyro_multivi.data.setup.adapter import Opened
from pyro_multivi.data.setup.covariates import categories
from pyro_multivi.data.setup.extra.proteins import missing_by_batch
from pyro_multivi.data.setup.spec import DataSpec
from pyro_multivi.data.table import CellTable
from pyro_multivi.networks.cell_factor import set_factor_mean, set_factor_spread
from pyro_multivi.networks.modules import build_program
from pyro_multivi.networks.panels import typical_buffer
from pyro_multivi.networks.surgery import Growth, Parts, add_intercepts
from pyro_multivi.posterior.mapping.typical import set_typical
from pyro_multivi.program import MultiVIProgram
from pyro_multivi.traces import evaluation_mode


def query_spec(reference: DataSpec, data: Any, needs_labels: bool) -> tuple[DataSpec, Opened]:
    """Specification of a query's model: known categories keep their places, new ones come behind them.

    Parameters
    ----------
    reference
        Specification of the reference.
    data
        The query, which need not be set up.
    needs_labels
        Whether the program reads labels. Otherwise a query may lack them, or have others.

    Raises
    ------
    ValueError, TypeError
        If a column of a covariate is missing, or the data are none.
    """
    opened = reference.open(data)
    setup = reference.setup
    if not needs_labels:
        reference = replace(reference, setup=replace(setup, labels_key=None), label_categories=())
    batches = reference.batch_categories
    if setup.batch_key is not None:
        batches += _new(opened, "batch_key", setup.batch_key, batches)
    grown = {
        key: known + _new(opened, "categorical_covariate_keys", key, known)
        for key, known in reference.categorical.items()
    }
    spec = replace(reference, batch_categories=batches, categorical=grown, partial=True)
    return replace(spec, missing_proteins=spec.missing_proteins | _missing_in_new(spec, reference, opened)), opened


def _missing_in_new(spec: DataSpec, reference: DataSpec, opened: Opened) -> dict[str, tuple[str, ...]]:
    """Proteins that new batches did not measure."""
    if PROTEIN not in opened.extra or not spec.n_proteins:
        return {}
    measurement = opened.extra[PROTEIN].read(spec.protein_names, partial=True)
    found = missing_by_batch(measurement, spec.protein_names, spec.batch_codes_of(opened), spec.batch_categories)
    return {batch: names for batch, names in found.items() if batch not in reference.batch_categories}


def _new(opened: Opened, argument: str, key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in categories(opened, argument, key, known) if name not in known)


def grown_program(reference: MultiVIProgram, old: DataSpec, spec: DataSpec) -> tuple[MultiVIProgram, Parts]:
    """A program of the query's size, whose tensors are those of the reference; and the new parts of its tensors."""
    config = replace(reference.config, n_batch=spec.n_batch, n_labels=spec.n_labels, n_covariates=spec.design_width)
    program = build_program(type(reference), config)
    growth = Growth.of(
        [old.batch_categories, *old.categorical.values()],
        [spec.batch_categories, *spec.categorical.values()],
        len(spec.continuous),
    )
    wider = None
    if type(reference) is not MultiVIProgram and spec.design_width > spec.n_batch > old.n_batch:
        # A network of its own may see the batch without the other covariates.
        wider = build_program(type(reference), replace(config, n_batch=old.n_batch)).state_dict()
    known = reference.state_dict()
    for each in (known, wider):
        if each is not None:
            add_intercepts(each, program, old.n_batch)
    state, parts = growth.state(known, program.state_dict(), wider)
    program.load_state_dict(state)
    return program.eval(), parts


@torch.no_grad()
def set_priors(program: MultiVIProgram, table: CellTable, spec: DataSpec, n_known: int) -> None:
    """Priors of the depth of new batches from the query, and the means that stand for features it lacks.

    Parameters
    ----------
    spec
        Specification of the query's model.
    n_known
        Number of batches of the reference, the first ones.
    """
    for extra in program.modelled_extra:
        extra.start_batches_from(table, n_known)
    if not any(bool(typical_buffer(program, modality).any()) for modality in modelled(program.config)):
        set_typical(program, n_known, list(map(len, spec.categorical.values())))
    _set_accessibility_prior(program, table, n_known)
    if not bool((RNA.measured_in(table) & (table.batch_code >= n_known)).any()):
        return
    marginals = table.marginals(shares=_shares(program))
    program.library_log_mean[n_known:] = marginals.library_log_mean[n_known:]
    program.library_log_var[n_known:] = marginals.library_log_var[n_known:]


def _shares(program: MultiVIProgram) -> dict[Modality, torch.Tensor]:
    """Share of each feature in a typical cell's counts, by which depths are those of all features."""
    return {modality: typical_buffer(program, modality)[0] for modality in modelled(program.config)}


def _set_accessibility_prior(program: MultiVIProgram, table: CellTable, n_known: int) -> None:
    """Prior of the cell factor, or of the number of fragments, of new batches."""
    if not program.config.n_regions or not bool((table.has_atac & (table.batch_code >= n_known)).any()):
        return
    marginals = table.marginals(program.config.counts_fragments, shares=_shares(program))
    if not program.config.counts_fragments:
        set_factor_spread(program, marginals, n_known)
        with evaluation_mode(program):
            set_factor_mean(program, table.blocks(), n_known)
        return
    fragments = marginals.fragments
    assert fragments is not None
    program.fragments_log_mean[n_known:] = fragments.log_mean[n_known:]
    program.fragments_log_var[n_known:] = fragments.log_var[n_known:]
